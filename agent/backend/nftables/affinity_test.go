package nftables

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// TestAffinity follows clients through all that happens to a service.
func TestAffinity(t *testing.T) {
	top := newTopology(t)
	restart := func() *Backend { return newBackend(t, top.node) }
	b := restart()
	for family := range families {
		for i := range 20 {
			for network := range transports {
				serve(t, top.pods[i/10], network, netip.AddrPortFrom(podAddr(family, i/10, i%10), 53))
			}
		}
	}
	var prev *forwarding.State
	for family, name := range []string{"IPv4", "IPv6"} {
		for network, proto := range transports {
			t.Run(name+"/"+network, func(t *testing.T) {
				s := web(family, proto)
				s.Affinity = time.Hour
				with := func(list []forwarding.Endpoint, others ...*forwarding.Service) {
					t.Helper()
					svc := *s
					svc.Internal = forward(list...)
					svc.External, svc.ExternalFromHere = svc.Internal, svc.Internal
					next := state(append(others, &svc)...)
					apply(t, b, prev, next)
					prev = &next
					if drifts, err := b.Verify(context.Background(), next); err != nil || len(drifts) > 0 {
						t.Errorf("%v %v", drifts, err)
					}
				}
				at := []netip.AddrPort{
					netip.AddrPortFrom(s.ServiceIPs[0], 80), netip.AddrPortFrom(s.ExternalIPs[0], 80), netip.AddrPortFrom(nodeAddr.addr(family), 30080),
				}
				who := func(i int) netip.AddrPort {
					t.Helper()
					server, _, err := ask(top.client, network, at[i%len(at)], netip.Addr{})
					if err != nil {
						t.Fatalf("%v: %v", at[i%len(at)], err)
					}
					return server
				}
				stays := func(server netip.AddrPort, connections int, when string) {
					t.Helper()
					for i := range connections {
						if got := who(i); got != server {
							t.Fatalf("%s, connection %d to %v: %v, before %v", when, i, at[i%len(at)], got, server)
						}
					}
				}
				ten := endpoints(family, 10, 53)
				with(ten)
				mine := who(0)
				stays(mine, 60, "over all addresses")

				servers := map[netip.AddrPort]bool{}
				for i := range 10 {
					server, _, err := ask(top.pods[1], network, at[0], podAddr(family, 1, i))
					if err != nil {
						t.Fatal(err)
					}
					servers[server] = true
				}
				if len(servers) < 2 {
					t.Errorf("ten clients are all at %v", servers)
				}

				with(ten, benchService(1000, 0, 3))
				stays(mine, 9, "after an unrelated change")
				with(endpoints(family, 20, 53))
				stays(mine, 9, "with more endpoints")
				few := slices.DeleteFunc(endpoints(family, 6, 53), func(e forwarding.Endpoint) bool { return e.AddrPort == mine })
				withMine := append(slices.Clone(few), forwarding.Endpoint{AddrPort: mine, Local: true})
				slices.SortFunc(withMine, forwarding.Endpoint.Compare)
				with(withMine)
				stays(mine, 9, "with few endpoints")
				b = restart()
				if apply(t, b, nil, *prev); b.commits != 0 {
					t.Errorf("a restart wrote %d transactions", b.commits)
				}
				stays(mine, 9, "after a restart")

				with(few)
				moved := who(0)
				if moved == mine {
					t.Fatalf("still at %v, which is gone", mine)
				}
				stays(moved, 30, "after its endpoint went")
				with(ten)
				if slices.ContainsFunc(ten, func(e forwarding.Endpoint) bool { return e.AddrPort == moved }) {
					stays(moved, 9, "after the old endpoint came back")
				}
			})
		}
	}
}

// TestAffinityExpires: each connection prolongs a pin; after a pause the client is free again.
func TestAffinityExpires(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for i := range 10 {
		serve(t, top.pods[0], "tcp", netip.AddrPortFrom(podAddr(0, 0, i), 8080))
	}
	s := web(0, forwarding.TCP)
	s.Affinity = time.Second
	s.Internal = forward(endpoints(0, 10, 8080)...)
	apply(t, b, nil, state(s))
	who := func() netip.AddrPort {
		t.Helper()
		server, _, err := ask(top.client, "tcp", netip.AddrPortFrom(s.ServiceIPs[0], 80), netip.Addr{})
		if err != nil {
			t.Fatal(err)
		}
		return server
	}
	first := who()
	for start := time.Now(); time.Since(start) < 2500*time.Millisecond; {
		if got := who(); got != first {
			t.Fatalf("after %v of asking: %v, before %v", time.Since(start), got, first)
		}
	}
	// The same of ten endpoints may be drawn again, but not each time.
	for range 12 {
		start := time.Now()
		for pinned := 1; pinned > 0; {
			pinned = 0
			if err := b.conn.Elements(families[0].pinSet(pinOf(s).mapName()), func(nfnl.Element) { pinned++ }); err != nil {
				t.Fatal(err)
			}
			if time.Since(start) > 10*time.Second {
				t.Fatal("the pin does not expire")
			}
		}
		if who() != first {
			return
		}
	}
	t.Errorf("always %v", first)
}

// TestAffinityUniform: who is not pinned yet is spread evenly. The limit is chi-square of ten endpoints at p = 0.0001.
func TestAffinityUniform(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for i := range 10 {
		serve(t, top.pods[0], "udp", netip.AddrPortFrom(podAddr(0, 0, i), 53))
	}
	s := web(0, forwarding.UDP)
	s.Affinity = time.Hour
	s.Internal = forward(endpoints(0, 10, 53)...)
	apply(t, b, nil, state(s))
	var script strings.Builder
	const clients = 1000
	client := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 77, byte(i >> 8), byte(i)}) }
	for i := range clients {
		fmt.Fprintf(&script, "ip addr add %s/32 dev eth0\n", client(i))
	}
	sh(t, top.client, script.String())
	sh(t, top.node, "ip route add 10.77.0.0/16 via 192.0.2.2")
	counts := map[netip.AddrPort]int{}
	for i := range clients {
		var first netip.AddrPort
		for n := range 2 {
			server, _, err := ask(top.client, "udp", netip.AddrPortFrom(s.ServiceIPs[0], 80), client(i))
			if err != nil {
				t.Fatal(err)
			}
			if n > 0 && server != first {
				t.Errorf("client %v at %v and %v", client(i), first, server)
			}
			first = server
		}
		counts[first]++
	}
	chi := 0.0
	for _, e := range s.Internal.Endpoints {
		d := float64(counts[e.AddrPort]) - clients/10
		chi += d * d / (clients / 10)
	}
	if chi > 33.7 {
		t.Errorf("chi-square %.1f: %v", chi, counts)
	}
	// An admin lists this with all its pins, and can load it again.
	list := nft(t, top.node, "", "list", "ruleset")
	if !strings.Contains(list, "10.77.0.9 timeout 1h expires") {
		t.Errorf("no pins are listed:\n%s", list[:min(len(list), 4000)])
	}
	nft(t, top.node, list, "-c", "-f", "-")
	if drifts, err := b.Verify(context.Background(), state(s)); err != nil || len(drifts) > 0 {
		t.Errorf("pins are taken for drift: %v %v", drifts, err)
	}
}

// TestAffinitySwitched: sessionAffinity and its timeout are edited while the service is in use.
func TestAffinitySwitched(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for i := range 10 {
		serve(t, top.pods[0], "tcp", netip.AddrPortFrom(podAddr(0, 0, i), 8080))
	}
	var prev *forwarding.State
	for step, affinity := range []time.Duration{0, time.Hour, 2 * time.Hour, 0, time.Minute} {
		s := web(0, forwarding.TCP)
		s.Affinity = affinity
		s.Internal = forward(endpoints(0, 10, 8080)...)
		next := state(s)
		apply(t, b, prev, next)
		prev = &next
		servers := map[netip.AddrPort]bool{}
		for range 40 {
			server, _, err := ask(top.client, "tcp", netip.AddrPortFrom(s.ServiceIPs[0], 80), netip.Addr{})
			if err != nil {
				t.Fatalf("step %d: %v", step, err)
			}
			servers[server] = true
		}
		if (len(servers) == 1) != (affinity > 0) {
			t.Errorf("step %d: affinity %v: %d servers", step, affinity, len(servers))
		}
		if drifts, err := b.Verify(context.Background(), next); err != nil || len(drifts) > 0 {
			t.Errorf("step %d: %v %v", step, drifts, err)
		}
	}
}

// TestAffinityLeavesNoTrace: marks of others come through as they were, and the packet's priority is cleared again.
func TestAffinityLeavesNoTrace(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	nft(t, top.node, `table inet other {
		counter changed {}
		counter dirty {}
		counter seen {}
		chain pre { type filter hook prerouting priority -300; meta mark set 0x1200; }
		chain out { type route hook output priority -300; meta mark set 0x1200; }
		chain way { type filter hook forward priority 0; ct status dnat meta mark & 0xffffbfff != 0x1200 counter name changed; }
		chain post { type filter hook postrouting priority 300; ct status dnat counter name seen; ct status dnat meta mark != 0x1200 counter name changed; meta priority & 8000:0 == 8000:0 counter name dirty; }
	}`, "-f", "-")
	for family := range families {
		s := web(family, forwarding.TCP)
		s.Affinity = time.Hour
		for pod := range top.pods {
			serve(t, top.pods[pod], "tcp", netip.AddrPortFrom(podAddr(family, pod, 0), 8080))
		}
		apply(t, b, nil, state(s))
		for _, at := range []netip.AddrPort{netip.AddrPortFrom(s.ServiceIPs[0], 80), netip.AddrPortFrom(nodeAddr.addr(family), 30080)} {
			for range 5 {
				for place, err := range map[string]error{
					"client": func() error { _, _, err := ask(top.client, "tcp", at, netip.Addr{}); return err }(),
					"node":   func() error { _, _, err := ask(top.node, "tcp", at, netip.Addr{}); return err }(),
					"pod":    func() error { _, _, err := ask(top.pods[0], "tcp", at, podAddr(family, 0, 0)); return err }(),
				} {
					if err != nil {
						t.Errorf("%s → %v: %v", place, at, err)
					}
				}
			}
		}
	}
	for counter, zero := range map[string]bool{"changed": true, "dirty": true, "seen": false} {
		if list := nft(t, top.node, "", "list", "counter", "inet", "other", counter); strings.Contains(list, "packets 0 ") != zero {
			t.Errorf("want zero: %v: %s", zero, list)
		}
	}
}

// TestAffinityTransitions keeps asking while endpoints come and go: nobody may lose a packet, nor move unless its endpoint went.
func TestAffinityTransitions(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for i := range 20 {
		serve(t, top.pods[i/10], "tcp", netip.AddrPortFrom(podAddr(0, i/10, i%10), 8080))
	}
	s := web(0, forwarding.TCP)
	s.Affinity = time.Hour
	with := func(n int) forwarding.State {
		svc := *s
		svc.Internal = forward(endpoints(0, n, 8080)...)
		return state(&svc)
	}
	prev := with(1) // it is pinned to the one that always stays
	apply(t, b, nil, prev)
	if _, _, err := ask(top.client, "tcp", netip.AddrPortFrom(s.ServiceIPs[0], 80), netip.Addr{}); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan error, 1)
	asked := 0
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			start := time.Now()
			server, _, err := ask(top.client, "tcp", netip.AddrPortFrom(s.ServiceIPs[0], 80), netip.Addr{})
			if took := time.Since(start); err == nil && took > 900*time.Millisecond {
				err = fmt.Errorf("took %v: a packet was lost and sent again", took)
			}
			if err == nil && server.Addr() != podAddr(0, 0, 0) {
				err = fmt.Errorf("moved to %v", server)
			}
			if err != nil {
				done <- fmt.Errorf("connection %d: %w", asked, err)
				return
			}
			asked++
		}
	}()
	for n, start := 1, time.Now(); time.Since(start) < 2*time.Second; n = n*7%20 + 1 {
		next := with(n)
		apply(t, b, &prev, next)
		prev = next
	}
	close(stop)
	if err := <-done; err != nil || asked < 100 {
		t.Fatalf("%v after %d connections", err, asked)
	}
}

// TestNumbers: numbers are distinct, those of endpoints without a rival do not depend on where they are or who else is there.
func TestNumbers(t *testing.T) {
	f := families[0]
	rapid.Check(t, func(t *rapid.T) {
		hosts := rapid.SliceOfNDistinct(rapid.Uint16(), 1, 40, rapid.ID).Draw(t, "hosts")
		list := func(hosts []uint16) slots {
			var s slots
			for _, h := range hosts {
				s = append(s, 10, 0, byte(h>>8), byte(h), 0, 80)
				s = append(s, make([]byte, 6*rapid.IntRange(0, 1).Draw(t, "hole"))...)
			}
			return s
		}
		number := func(s slots) map[string]uint32 {
			all := map[string]uint32{}
			seen := map[uint32]bool{}
			for i, n := range f.numbers(s) {
				if e := f.slot(s, i); empty(e) != (n == 0) || (n != 0 && (seen[n] || n&endpointNumber == 0 || n == 1<<32-1)) {
					t.Fatalf("slot %x has number %x", e, n)
				} else if n != 0 {
					seen[n], all[string(e)] = true, n
				}
			}
			return all
		}
		all, some := number(list(hosts)), number(list(rapid.Permutation(hosts).Draw(t, "order")[:(len(hosts)+1)/2]))
		for e, n := range some {
			if all[e] != n {
				t.Fatalf("%x is %x among all and %x among some", e, all[e], n)
			}
		}
	})
	// The same endpoint in two slots, as a broken kernel state may have it, gets two numbers.
	if n := f.numbers(slots{10, 0, 0, 1, 0, 80, 10, 0, 0, 1, 0, 80}); n[0] == n[1] {
		t.Errorf("numbers %x", n)
	}
}
