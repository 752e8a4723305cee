package nftables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// place is where a packet comes from, and by which of the node's interfaces.
type place struct {
	name string
	ns   *netns.NS
	addr both
	in   string
}

// TestAgreesWithLookup draws services of every shape, sends real packets at all their addresses from everywhere, and compares what becomes of them with
// what State.Lookup says.
func TestAgreesWithLookup(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for family := range families {
		for pod := range top.pods {
			for network := range transports {
				serve(t, top.pods[pod], network, netip.AddrPortFrom(podAddr(family, pod, 0), 8080))
			}
		}
	}
	elsewhere := both{"10.244.3.10", "fd00:244:3::10"} // a pod of another node
	sh(t, top.client, `ip addr add 10.244.3.10/32 dev lo; ip addr add fd00:244:3::10/128 dev lo nodad`)
	sh(t, top.node, `ip route add 10.244.3.0/24 via 192.0.2.2; ip route add fd00:244:3::/64 via 2001:db8:1::2`)
	// Refusals of UDP are ICMP, of which the kernel otherwise sends one client a few a second.
	sh(t, top.node, `sysctl -qw net.ipv4.icmp_ratelimit=0 net.ipv4.icmp_msgs_per_sec=100000 net.ipv6.icmp.ratelimit=0`)
	places := []place{
		{"outside", top.client, clientAddr, "client"},
		{"node", top.node, nodeAddr, ""},
		{"pod 0", top.pods[0], both{podAddr(0, 0, 0).String(), podAddr(1, 0, 0).String()}, "pod0"},
		{"pod elsewhere", top.client, elsewhere, "client"},
		{"loopback", top.node, both{"127.0.0.1", "::1"}, ""},
	}
	node := forwarding.Node{}
	for family := range families {
		node.Addrs = append(node.Addrs, nodeAddr.addr(family), both{"127.0.0.1", "::1"}.addr(family))
	}
	sh(t, top.node, `sysctl -qw net.ipv4.conf.all.route_localnet=1`)
	prev := new(state())
	for family := range families {
		// The first packet from each place finds out who its neighbours are, which may take longer than a refusal is waited for.
		next := state(web(family, forwarding.TCP))
		apply(t, b, prev, next)
		prev = &next
		for _, p := range places[:len(places)-1] {
			if _, _, err := ask(p.ns, "tcp", netip.AddrPortFrom(serviceIP.addr(family), 80), p.addr.addr(family)); err != nil {
				t.Fatalf("from %s: %v", p.name, err)
			}
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		family := rapid.IntRange(0, 1).Draw(t, "family")
		network := rapid.SampledFrom([]string{"tcp", "udp"}).Draw(t, "network")
		proto := transports[network]
		s := drawShape(t, family, proto, 80, 30080)
		// Another port of the same Service has endpoints of its own; what is at one port says nothing about the other.
		other := drawShape(t, family, proto, 443, 30443)
		next := state(s, other).On(drawLab(t, family))
		if err := b.Apply(context.Background(), prev, next); err != nil {
			t.Fatal(err)
		}
		prev = &next
		from := rapid.SampledFrom(places).Draw(t, "from")
		at := func(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }
		to := rapid.SampledFrom([]netip.AddrPort{
			at(serviceIP.addr(family), 80), at(serviceIP.addr(family), 443), at(serviceIP.addr(family), 81), at(unallocated.addr(family), 80),
			at(externalIP.addr(family), 80), at(externalIP.addr(family), 443), at(nodeAddr.addr(family), 30080), at(nodeAddr.addr(family), 30443),
		}).Draw(t, "to")
		if from.name == "loopback" {
			to = at(from.addr.addr(family), 30080)
		}
		v := next.Lookup(node, forwarding.Packet{Protocol: proto, Source: from.addr.addr(family), Destination: to, In: from.in})
		if family == 1 && from.name == "loopback" {
			v = forwarding.Verdict{} // the kernel leaves [::1] to the agent's listener
		}
		if err := agree(v, from, network, to, from.addr.addr(family)); err != nil {
			t.Fatalf("%s from %s to %s, which Lookup says is %s: %v", network, from.name, to, v.Fate, err)
		}
	})
}

// unallocated is an address of a range that no service has.
var unallocated = both{"10.99.0.9", "fd00:99::9"}

// drawLab is a ground on which pods are told in one way or another, or not at all.
func drawLab(t *rapid.T, family int) forwarding.Ground {
	g := rapid.SampledFrom([]forwarding.Ground{
		ground, {}, {Pods: forwarding.PodTraffic{Interfaces: []string{"pod*"}}}, {Pods: forwarding.PodTraffic{Interfaces: []string{"pod0", "pod1"}}},
		{Pods: forwarding.PodTraffic{Sources: []netip.Prefix{netip.PrefixFrom(podAddr(family, 1, 0), 64>>(1-family))}, Interfaces: []string{"pod0"}}},
		{Pods: forwarding.PodTraffic{Interfaces: []string{"*"}}},
	}).Draw(t, "ground")
	g.MasqueradeAll = rapid.Bool().Draw(t, "masquerade all")
	g.DropInvalid = rapid.Bool().Draw(t, "drop invalid")
	if rapid.Bool().Draw(t, "ranges") {
		g.Ranges = []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16"), netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("fd00:99::/112")}
	}
	return g
}

// drawShape is a service with every address, whose targets, policies and guards vary.
func drawShape(t *rapid.T, family int, proto forwarding.Protocol, port, nodePort uint16) *forwarding.Service {
	s := web(family, proto)
	s.Key.Port, s.NodePort = port, nodePort
	if rapid.Bool().Draw(t, "at loopback") {
		s.NodePortAddresses = append(s.NodePortAddresses, netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128"))
		slices.SortFunc(s.NodePortAddresses, netip.Prefix.Compare)
	}
	if rapid.IntRange(0, 3).Draw(t, "with affinity") == 0 {
		s.Affinity = time.Second
	}
	var here, all []forwarding.Endpoint
	for pod := range 2 {
		if !rapid.Bool().Draw(t, fmt.Sprintf("pod %d is an endpoint", pod)) {
			continue
		}
		e := forwarding.Endpoint{AddrPort: netip.AddrPortFrom(podAddr(family, pod, 0), 8080), Local: pod == 0}
		all = append(all, e)
		if e.Local {
			here = append(here, e)
		}
	}
	cluster, local := forwarding.Target{}, forwarding.Target{}
	mine := forwarding.Families(1) << family
	if rapid.Bool().Draw(t, "elsewhere in the other family") {
		cluster.Elsewhere, local.Elsewhere = 3&^mine, 3&^mine // which is none of this one's business
	}
	if len(all) > 0 {
		cluster, local = forward(all...), forwarding.Target{Elsewhere: mine}
	}
	if len(here) > 0 {
		local = forward(here...)
	}
	s.Internal, s.External, s.ExternalFromHere = cluster, cluster, cluster
	if rapid.Bool().Draw(t, "internal policy Local") {
		s.Internal = local
	}
	if rapid.Bool().Draw(t, "external policy Local") {
		s.External, s.PreserveSource = local, true
	}
	if rapid.Bool().Draw(t, "guarded") {
		s.LoadBalancerIPs = s.ExternalIPs
		who := rapid.SampledFrom([]both{clientAddr, {podAddr(0, 0, 0).String(), podAddr(1, 0, 0).String()}}).Draw(t, "who may")
		s.SourceRanges = []netip.Prefix{netip.PrefixFrom(who.addr(family), who.addr(family).BitLen())}
	}
	return s
}

// agree connects and says how what happens differs from the verdict.
func agree(v forwarding.Verdict, from place, network string, to netip.AddrPort, source netip.Addr) error {
	wait := patience
	if v.Fate == forwarding.Dropped || v.Fate == forwarding.Passed {
		wait = 150 * time.Millisecond // for something that is not to come
	}
	server, seen, err := askWithin(wait, from.ns, network, to, source)
	// A datagram that an output hook rejects or drops never leaves the socket, whose owner is told so.
	unsent := from.in == "" && errors.Is(err, syscall.EPERM)
	switch v.Fate {
	case forwarding.Forwarded:
		i := slices.IndexFunc(v.Endpoints, func(e forwarding.Endpoint) bool { return e.AddrPort == server })
		if err != nil || i < 0 {
			return fmt.Errorf("%v answered (%w), want one of %v", server, err, v.Endpoints)
		}
		// The node's own address is the same before and after, except where the kernel takes the one next to the pod.
		if masqueraded := seen.Addr() != source; masqueraded != v.Masquerades(v.Endpoints[i]) && from.in != "" {
			return fmt.Errorf("%v saw %v, masqueraded should be %v", server, seen, !masqueraded)
		}
	case forwarding.Rejected:
		if !errors.Is(err, syscall.ECONNREFUSED) && !unsent {
			return fmt.Errorf("%v answered (%w), want connection refused", server, err)
		}
	case forwarding.Dropped:
		if !isTimeout(err) && !unsent {
			return fmt.Errorf("%v answered (%w), want silence", server, err)
		}
	case forwarding.Passed:
		if err == nil {
			return fmt.Errorf("%v answered", server)
		}
	}
	return nil
}
