package nftables

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// counted is a state in which traffic is counted.
func counted(services ...*forwarding.Service) forwarding.State {
	g := ground
	g.CountTraffic = true
	return state(services...).On(g)
}

// trafficOf gives what was counted of one service.
func trafficOf(t testing.TB, b *Backend, k forwarding.ServiceKey) (backend.Traffic, bool) {
	t.Helper()
	all, err := b.Traffic(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(t backend.Traffic) bool { return t.Service == k })
	if i < 0 {
		return backend.Traffic{Service: k}, false
	}
	return all[i], true
}

// TestTrafficIsCountedOnce: every packet counts once, whichever way it takes: forwarded, to or from the node, within the node, back to where it came from.
func TestTrafficIsCountedOnce(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for family, name := range []string{"IPv4", "IPv6"} {
		pod, host := netip.AddrPortFrom(podAddr(family, 0, 0), 8080), netip.AddrPortFrom(nodeAddr.addr(family), 8080)
		for network := range transports {
			serve(t, top.pods[0], network, pod)
			serve(t, top.node, network, host)
		}
		for network, proto := range transports {
			for endpoint, at := range map[string]netip.AddrPort{"pod": pod, "node": host} {
				s := web(family, proto)
				s.Internal = forward(forwarding.Endpoint{AddrPort: at, Local: true})
				s.External, s.ExternalFromHere = s.Internal, s.Internal
				apply(t, b, nil, counted(s))
				for place, from := range map[string]*netns.NS{"client": top.client, "node": top.node, "pod": top.pods[0], "other pod": top.pods[1]} {
					for kind, at := range map[string]netip.AddrPort{
						"service IP":  netip.AddrPortFrom(s.ServiceIPs[0], 80),
						"external IP": netip.AddrPortFrom(s.ExternalIPs[0], 80),
						"node port":   netip.AddrPortFrom(nodeAddr.addr(family), 30080),
					} {
						t.Run(fmt.Sprintf("%s/%s/%s to %s by %s", name, network, place, endpoint, kind), func(t *testing.T) {
							before, _ := trafficOf(t, b, s.Key)
							server, seen, err := ask(from, network, at, netip.Addr{})
							if err != nil {
								t.Fatal(err)
							}
							after, _ := trafficOf(t, b, s.Key)
							expectOnce(t, network, before, after, 4, len(fmt.Sprintf("%s %s\n", server, seen)), []int{28, 48}[family])
						})
					}
				}
			}
		}
	}
}

// expectOnce checks what one question of so many bytes and its answer counted; header is what precedes the bytes of a datagram.
func expectOnce(t *testing.T, network string, before, after backend.Traffic, question, answer, header int) {
	t.Helper()
	if n := after.Connections - before.Connections; n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
	sent, got := since(before.Original, after.Original), since(before.Reply, after.Reply)
	if network == "udp" {
		if want := (backend.Volume{Packets: 1, Bytes: uint64(header + question)}); sent != want {
			t.Errorf("sent %+v, want %+v", sent, want)
		}
		if want := (backend.Volume{Packets: 1, Bytes: uint64(header + answer)}); got != want {
			t.Errorf("answered %+v, want %+v", got, want)
		}
		return
	}
	// What ends this connection may not have come yet, and what ends the one before may have come now.
	if sent.Packets < 2 || sent.Packets > 10 || got.Packets < 2 || got.Packets > 10 || got.Bytes < uint64(answer) {
		t.Errorf("sent %+v, answered %+v in one connection", sent, got)
	}
}

// TestOnlyServicesCount: connections that something else translates are not taken for those of a service with the same node port.
func TestOnlyServicesCount(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	serve(t, top.pods[0], "udp", netip.AddrPortFrom(podAddr(0, 0, 0), 8080))
	s := web(0, forwarding.UDP)
	apply(t, b, nil, counted(s))
	if _, err := top.node.Run("nft", `table ip other { chain pre { type nat hook prerouting priority -100; ip daddr 203.0.113.1 udp dport 30080 dnat to 10.244.1.10:8080; }; }`); err != nil {
		t.Fatal(err)
	}
	if _, _, err := ask(top.client, "udp", netip.MustParseAddrPort("203.0.113.1:30080"), netip.Addr{}); err != nil {
		t.Fatal(err)
	}
	if got, some := trafficOf(t, b, s.Key); some {
		t.Errorf("counted %+v", got)
	}
}

// TestTrafficNeverFalls: what a service had stays its own when its frontends go and come, when somebody flushes the counters, and as long as it is there.
func TestTrafficNeverFalls(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	serve(t, top.pods[0], "udp", netip.AddrPortFrom(podAddr(0, 0, 0), 8080))
	s := web(0, forwarding.UDP)
	s.Internal = forward(forwarding.Endpoint{AddrPort: netip.AddrPortFrom(podAddr(0, 0, 0), 8080), Local: true})
	s.External, s.ExternalFromHere = s.Internal, s.Internal
	less := *s
	less.ExternalIPs, less.NodePort, less.NodePortAddresses = nil, 0, nil
	with, without := counted(s), counted(&less)
	apply(t, b, nil, with)
	total := 0
	call := func(b *Backend, at netip.AddrPort) {
		t.Helper()
		if _, _, err := ask(top.client, "udp", at, netip.Addr{}); err != nil {
			t.Fatal(err)
		}
		total++
		expectTotal(t, b, s.Key, total)
	}
	service, external, nodePort := netip.AddrPortFrom(s.ServiceIPs[0], 80), netip.AddrPortFrom(s.ExternalIPs[0], 80), netip.AddrPortFrom(nodeAddr.addr(0), 30080)
	for _, at := range []netip.AddrPort{service, external, nodePort, nodePort} {
		call(b, at)
	}
	apply(t, b, &with, without)
	expectTotal(t, b, s.Key, total)
	call(b, service)
	apply(t, b, &without, with)
	for _, at := range []netip.AddrPort{service, external, nodePort} {
		call(b, at)
	}

	for _, breakage := range []string{"flush set ip serviceproxy traffic", "delete table ip serviceproxy"} {
		if _, err := top.node.Run("nft", breakage); err != nil {
			t.Fatal(err)
		}
		drifts, err := b.Verify(context.Background(), with)
		if err != nil || len(drifts) == 0 {
			t.Errorf("%s: drift %v, %v", breakage, drifts, err)
		}
		expectTotal(t, b, s.Key, total)
		apply(t, b, nil, with)
		for _, at := range []netip.AddrPort{service, external, nodePort} {
			call(b, at)
		}
	}

	// Another process begins at 0, as counters do, and not with what an earlier one has not told.
	next := newBackend(t, top.node)
	apply(t, next, nil, with)
	total = 0
	expectTotal(t, next, s.Key, 0)
	call(next, external)

	// The Service goes and comes.
	none := counted()
	apply(t, next, &with, none)
	expectTotal(t, next, s.Key, 0)
	apply(t, next, &none, with)
	total = 0
	expectTotal(t, next, s.Key, 0)
	call(next, external)

	// Switched off and on.
	off := state(s)
	apply(t, next, &with, off)
	list, err := top.node.Run("nft", "list table ip serviceproxy")
	if err != nil || strings.Contains(list, "traffic") || strings.Contains(list, "counter") {
		t.Errorf("not switched off: %v\n%s", err, list)
	}
	total = 0
	expectTotal(t, next, s.Key, 0)
	apply(t, next, &off, with)
	expectTotal(t, next, s.Key, 0)
	call(next, service)
}

// TestCountingEnds: whoever asks while the agent ends gets an error, not the figures of another file.
func TestCountingEnds(t *testing.T) {
	var b *Backend
	if err := netns.NewT(t).Do(func() (err error) { b, err = New(); return err }); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Traffic(context.Background()); err == nil {
		t.Error("a closed backend counts")
	}
}

func expectTotal(t *testing.T, b *Backend, k forwarding.ServiceKey, want int) {
	t.Helper()
	got, _ := trafficOf(t, b, k)
	if n := uint64(want); got.Connections != n || got.Original.Packets != n || got.Reply.Packets != n {
		t.Errorf("counted %+v, want %d of each", got, want)
	}
}

// TestCountersFollowFrontends: every frontend has its counters, and none is left when it goes.
func TestCountersFollowFrontends(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	keys := func() []string {
		out := map[string]bool{}
		for i, f := range families {
			for s := range b.counting.ledgers[i].begin() {
				set := f.tallySet(s)
				if err := b.conn.Elements(set, elementNamer(set, out)); err != nil {
					t.Fatal(err)
				}
			}
		}
		return slices.Sorted(maps.Keys(out))
	}
	s := web(0, forwarding.TCP)
	with, without := counted(s), counted()
	apply(t, b, nil, with)
	want := []string{
		"connections original . 10.99.0.1 . tcp . 80", "connections original . 198.51.100.7 . tcp . 80",
		"traffic original . 10.99.0.1 . tcp . 80", "traffic original . 198.51.100.7 . tcp . 80",
		"traffic reply . 10.99.0.1 . tcp . 80", "traffic reply . 198.51.100.7 . tcp . 80",
		"connections-nodeports original . tcp . 30080", "traffic-nodeports original . tcp . 30080", "traffic-nodeports reply . tcp . 30080",
	}
	slices.Sort(want)
	if got := keys(); !slices.Equal(got, want) {
		t.Errorf("counters\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	apply(t, b, &with, without)
	list, err := top.node.Run("nft", "list table ip serviceproxy")
	if err != nil || strings.Contains(list, "elements") || strings.Contains(list, "-nodeports-") {
		t.Errorf("left after the service is gone: %v\n%s", err, list)
	}
}

// elementNamer collects elements as nft prints them, with the name of their set but for its class.
func elementNamer(set *nfnl.Set, into map[string]bool) func(nfnl.Element) {
	name := set.Name
	if s, ok := parseTallySet(name); ok && s.class != 0 {
		name = string(s.kind) + "-" + mapNodePorts
	}
	return func(e nfnl.Element) { into[name+" "+formatKey(set, e.Key)] = true }
}
