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

// place is where a packet comes from.
type place struct {
	name string
	ns   *netns.NS
	addr both
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
		{"outside", top.client, clientAddr},
		{"node", top.node, nodeAddr},
		{"pod 0", top.pods[0], both{podAddr(0, 0, 0).String(), podAddr(1, 0, 0).String()}},
		{"pod elsewhere", top.client, elsewhere},
	}
	node := forwarding.Node{}
	for family := range families {
		node.Addrs = append(node.Addrs, nodeAddr.addr(family))
	}
	prev := new(state())
	for family := range families {
		// The first packet from each place finds out who its neighbours are, which may take longer than a refusal is waited for.
		next := state(web(family, forwarding.TCP))
		apply(t, b, prev, next)
		prev = &next
		for _, p := range places {
			if _, _, err := ask(p.ns, "tcp", netip.AddrPortFrom(serviceIP.addr(family), 80), p.addr.addr(family)); err != nil {
				t.Fatalf("from %s: %v", p.name, err)
			}
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		family := rapid.IntRange(0, 1).Draw(t, "family")
		network := rapid.SampledFrom([]string{"tcp", "udp"}).Draw(t, "network")
		s := drawShape(t, family, transports[network])
		next := state(s)
		if err := b.Apply(context.Background(), prev, next); err != nil {
			t.Fatal(err)
		}
		prev = &next
		from := rapid.SampledFrom(places).Draw(t, "from")
		to := rapid.SampledFrom([]netip.AddrPort{
			netip.AddrPortFrom(serviceIP.addr(family), 80), netip.AddrPortFrom(serviceIP.addr(family), 81),
			netip.AddrPortFrom(externalIP.addr(family), 80), netip.AddrPortFrom(nodeAddr.addr(family), 30080),
		}).Draw(t, "to")
		v := next.Lookup(node, forwarding.Packet{Protocol: s.Key.Protocol, Source: from.addr.addr(family), Destination: to})
		if err := agree(v, from, network, to, from.addr.addr(family)); err != nil {
			t.Fatalf("%s from %s to %s, which Lookup says is %s: %v", network, from.name, to, v.Fate, err)
		}
	})
}

// drawShape is a service with every address, whose targets, policies and guards vary.
func drawShape(t *rapid.T, family int, proto forwarding.Protocol) *forwarding.Service {
	s := web(family, proto)
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
	if len(all) > 0 {
		cluster, local = forward(all...), forwarding.Target{Elsewhere: forwarding.IPv4 | forwarding.IPv6}
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
	unsent := from.name == "node" && errors.Is(err, syscall.EPERM)
	switch v.Fate {
	case forwarding.Forwarded:
		i := slices.IndexFunc(v.Endpoints, func(e forwarding.Endpoint) bool { return e.AddrPort == server })
		if err != nil || i < 0 {
			return fmt.Errorf("%v answered (%w), want one of %v", server, err, v.Endpoints)
		}
		// The node's own address is the same before and after, except where the kernel takes the one next to the pod.
		if masqueraded := seen.Addr() != source; masqueraded != v.Masquerades(v.Endpoints[i]) && from.name != "node" {
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
