package nftables

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

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
