package nftables

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"slices"
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
	type front struct {
		s       slots
		numbers []uint32
		of      *numbering
	}
	// sorted are the endpoints in slots.
	sorted := func(s slots) []byte {
		list := slices.Collect(slices.Chunk(s, 6))
		slices.SortFunc(list, func(a, b slots) int { return bytes.Compare(a, b) })
		return slices.Concat(list...)
	}
	rapid.Check(t, func(t *rapid.T) {
		all := newNumberings()
		key := func(i int) forwarding.ServiceKey { return forwarding.ServiceKey{Name: fmt.Sprint("s", i), Port: 80} }
		fronts := map[int]front{} // 0 to 8, three of each Service
		check := func(before map[string]uint32) map[string]uint32 {
			now, seen := map[string]uint32{}, map[uint32]string{}
			for i, fr := range fronts {
				for j, n := range fr.numbers {
					e := string(f.slot(fr.s, j))
					if empty([]byte(e)) != (n == 0) || n != 0 && (n&numberMark == 0 || n == 1<<32-1 || ownerOf(n) != fr.of.owner) {
						t.Fatalf("slot %x has number %x", e, n)
					}
					if n == 0 {
						continue
					}
					id := fmt.Sprint(i/3, " ", e)
					if was, ok := before[id]; ok && was != n || now[id] != 0 && now[id] != n || seen[n] != "" && seen[n] != id {
						t.Fatalf("%x: number %x, before %x, of another frontend %x; the number was %q", id, n, was, now[id], seen[n])
					}
					now[id], seen[n] = n, id
				}
			}
			return now
		}
		before := map[string]uint32{}
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			i := rapid.IntRange(0, 8).Draw(t, "frontend")
			old := fronts[i]
			delete(fronts, i)
			if rapid.IntRange(0, 3).Draw(t, "gone") > 0 {
				var s slots
				for _, h := range rapid.SliceOfNDistinct(rapid.ByteMax(60), 1, 30, rapid.ID).Draw(t, "hosts") {
					s = append(s, 10, 0, 0, h, 0, 80)
					s = append(s, make([]byte, 6*rapid.IntRange(0, 1).Draw(t, "hole"))...)
				}
				n := all.provide(key(i / 3))
				fronts[i] = front{s, n.take(f, s), n}
			}
			if old.of != nil {
				old.of.give(f, old.s, old.numbers)
				all.drop(old.of)
			}
			before = check(before)
			if rapid.IntRange(0, 3).Draw(t, "restart") == 0 {
				read := newNumberings()
				for i, fr := range fronts {
					if fr.of, fr.numbers = read.adopt(key(i/3), f, fr.s, fr.numbers, sorted(fr.s)); fr.of == nil {
						t.Fatalf("frontend %d is not adopted", i)
					}
					fronts[i] = fr
				}
				all = read
				before = check(before)
			}
		}
		for i, fr := range fronts {
			fr.of.give(f, fr.s, fr.numbers)
			all.drop(fr.of)
			delete(fronts, i)
		}
		if len(all.of)+len(all.owned) > 0 {
			t.Fatalf("left: %v %v", all.of, all.owned)
		}
	})
}

// TestNumberingCollides: where hashes meet, numbers do not; and what belongs to another Service port is not adopted.
func TestNumberingCollides(t *testing.T) {
	f := families[0]
	n := newNumbering(numberMark)
	var s slots
	for i := range 2000 { // 30 of them meet
		s = append(s, 10, 0, byte(i>>8), byte(i), 0, 80)
	}
	numbers := n.take(f, s)
	if distinct := slices.Compact(slices.Sorted(slices.Values(numbers))); len(distinct) != 2000 {
		t.Errorf("%d numbers for 2000 endpoints", len(distinct))
	}
	all := newNumberings()
	a := all.provide(forwarding.ServiceKey{Name: "a"})
	mine := a.take(f, s[:6])
	if n, _ := all.adopt(forwarding.ServiceKey{Name: "b"}, f, s[:6], mine, s[:6]); n != nil {
		t.Error("a Service port adopted the numbers of another")
	}
	owners := map[uint32]bool{a.owner: true}
	for i := range 3000 {
		owners[all.provide(forwarding.ServiceKey{Name: fmt.Sprint(i)}).owner] = true
	}
	if len(owners) != 3001 {
		t.Errorf("%d owners for 3001 Service ports", len(owners))
	}
}
