package compile

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

var zones = []string{"", "a", "b", "a,b"}

func drawSlice(t *rapid.T) *Slice {
	s := &Slice{Service: "web", Ports: []SlicePort{{Name: "http", Protocol: forwarding.TCP, Port: 8080}}}
	if rapid.Bool().Draw(t, "second port") {
		s.Ports = append(s.Ports, SlicePort{Name: "dns", Protocol: forwarding.UDP, Port: uint16(rapid.IntRange(53, 54).Draw(t, "port"))})
	}
	for range rapid.IntRange(0, 5).Draw(t, "endpoints") {
		ip := netip.AddrFrom4([4]byte{10, 1, 0, byte(rapid.IntRange(1, 5).Draw(t, "ip"))})
		if rapid.Bool().Draw(t, "v6") {
			b := [16]byte{0xfd}
			b[15] = ip.As4()[3]
			ip = netip.AddrFrom16(b)
		}
		s.Endpoints = append(s.Endpoints, SliceEndpoint{Addr: ip, Flags: Flags(rapid.IntRange(0, 63).Draw(t, "flags")),
			ZoneHints: rapid.SampledFrom(zones).Draw(t, "zones")})
	}
	return s
}

func drawAssignment(t *rapid.T) *Assignment {
	return &Assignment{
		Namespace: "shop", Name: "web",
		Ports: []Port{{Name: "http", Protocol: forwarding.TCP, Port: 80, NodePort: uint16(rapid.SampledFrom([]int{0, 30080}).Draw(t, "node port"))},
			{Name: "dns", Protocol: forwarding.UDP, Port: 53}},
		ServiceIPs:    []netip.Addr{netip.MustParseAddr("10.99.0.1")},
		InternalLocal: rapid.Bool().Draw(t, "internal local"), ExternalLocal: rapid.Bool().Draw(t, "external local"),
	}
}

// TestOutcomeDependsOnContentOnly: whatever the order in which the API hands things over, the outcome is the same, sorted and without duplicates.
func TestOutcomeDependsOnContentOnly(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := drawAssignment(t)
		list := rapid.SliceOfN(rapid.Custom(drawSlice), 0, 4).Draw(t, "slices")
		n := node(rapid.SampledFrom([]string{"", "a", "b"}).Draw(t, "zone"))
		got := Services(a, list, n)

		shuffled := *a
		shuffled.Ports = shuffle(a.Ports)
		var other []*Slice
		for _, s := range shuffle(list) {
			other = append(other, &Slice{Service: s.Service, Ports: shuffle(s.Ports), Endpoints: shuffle(s.Endpoints)})
		}
		if again := Services(&shuffled, other, n); !slices.EqualFunc(got, again, func(x, y *forwarding.Service) bool { return x.Equal(y) }) {
			t.Fatalf("another order, another outcome:\n%+v\n%+v", got, again)
		}
		if !slices.IsSortedFunc(got, func(x, y *forwarding.Service) int { return x.Key.Compare(y.Key) }) {
			t.Fatal("services are not sorted")
		}
		for _, s := range got {
			for _, target := range []forwarding.Target{s.Internal, s.External, s.ExternalFromHere} {
				checkTarget(t, target)
			}
		}
	})
}

func shuffle[T any](list []T) []T {
	out := slices.Clone(list)
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

func checkTarget(t *rapid.T, target forwarding.Target) {
	for _, e := range target.Endpoints {
		if f := forwarding.FamilyOf(e.AddrPort.Addr()); target.Elsewhere&f != 0 || target.Action(f) != forwarding.Forward {
			t.Fatalf("endpoint %v although they are elsewhere", e)
		}
	}
	for i := 1; i < len(target.Endpoints); i++ {
		if target.Endpoints[i-1].AddrPort.Compare(target.Endpoints[i].AddrPort) >= 0 {
			t.Fatalf("endpoints are not sorted or hold duplicates: %v", target.Endpoints)
		}
	}
}

// TestAgainstTheRules states the rules once more, endpoint by endpoint and without regard to cost, for inputs in which no address is there twice.
func TestAgainstTheRules(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := drawAssignment(t)
		s := drawSlice(t)
		seen := map[netip.Addr]bool{}
		s.Endpoints = slices.DeleteFunc(s.Endpoints, func(e SliceEndpoint) bool {
			twice := seen[e.Addr]
			seen[e.Addr] = true
			return twice
		})
		zone := rapid.SampledFrom([]string{"", "a", "b"}).Draw(t, "zone")
		got := Services(a, []*Slice{s}, node(zone))
		http := got[slices.IndexFunc(got, func(x *forwarding.Service) bool { return x.Key.Port == 80 })]

		wantInternal := ruled(s.Endpoints, zone, a.InternalLocal)
		if !http.Internal.Equal(wantInternal) {
			t.Fatalf("internal is %+v, want %+v", http.Internal, wantInternal)
		}
		var wantExternal, wantFromHere forwarding.Target
		if a.Ports[0].NodePort != 0 {
			wantExternal, wantFromHere = ruled(s.Endpoints, zone, a.ExternalLocal), ruled(s.Endpoints, zone, false)
		}
		if !http.External.Equal(wantExternal) || !http.ExternalFromHere.Equal(wantFromHere) {
			t.Fatalf("external is %+v and %+v, want %+v and %+v", http.External, http.ExternalFromHere, wantExternal, wantFromHere)
		}
	})
}

func ruled(all []SliceEndpoint, zone string, local bool) forwarding.Target {
	var out forwarding.Target
	for _, v4 := range []bool{true, false} {
		count := func(match func(SliceEndpoint) bool) (n int) {
			for _, e := range all {
				if e.Addr.Is4() == v4 && match(e) {
					n++
				}
			}
			return n
		}
		ready := func(e SliceEndpoint) bool { return e.Flags&Ready != 0 }
		draining := func(e SliceEndpoint) bool {
			return e.Flags&Ready == 0 && e.Flags&Serving != 0 && e.Flags&Terminating != 0
		}
		here := func(e SliceEndpoint) bool { return e.Flags&Local != 0 }
		both := func(f, g func(SliceEndpoint) bool) func(SliceEndpoint) bool {
			return func(e SliceEndpoint) bool { return f(e) && g(e) }
		}
		inZone := func(e SliceEndpoint) bool {
			return zone != "" && (e.ZoneHints == zone || e.ZoneHints == "a,b")
		}
		hasZone := func(e SliceEndpoint) bool { return e.ZoneHints != "" }
		onNode := func(e SliceEndpoint) bool { return e.Flags&HintedHere != 0 }
		hasNode := func(e SliceEndpoint) bool { return e.Flags&NodeHinted != 0 }

		var use func(SliceEndpoint) bool
		switch {
		case local && count(both(here, ready)) > 0:
			use = both(here, ready)
		case local:
			use = both(here, draining)
		case count(ready) == 0:
			use = draining
		case count(both(ready, hasNode)) == count(ready) && count(both(ready, onNode)) > 0:
			use = both(ready, onNode)
		case count(both(ready, hasZone)) == count(ready) && count(both(ready, inZone)) > 0:
			use = both(ready, inZone)
		default:
			use = ready
		}
		if anywhere := count(ready)+count(draining) > 0; anywhere && count(use) == 0 {
			out.Elsewhere |= map[bool]forwarding.Families{true: forwarding.IPv4, false: forwarding.IPv6}[v4]
		}
		for _, e := range all {
			if e.Addr.Is4() == v4 && use(e) {
				out.Endpoints = append(out.Endpoints, forwarding.Endpoint{AddrPort: netip.AddrPortFrom(e.Addr, 8080), Local: here(e)})
			}
		}
	}
	slices.SortFunc(out.Endpoints, forwarding.Endpoint.Compare)
	return out
}

func BenchmarkServices(b *testing.B) {
	for _, n := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("endpoints=%d", n), func(b *testing.B) {
			a := &Assignment{Namespace: "shop", Name: "web", Ports: []Port{{Name: "http", Protocol: forwarding.TCP, Port: 80, NodePort: 30080}},
				ServiceIPs: []netip.Addr{netip.MustParseAddr("10.99.0.1")}, NodePortAddresses: NodePortAddresses{Primary: true}}
			s := &Slice{Service: "web", Ports: []SlicePort{{Name: "http", Protocol: forwarding.TCP, Port: 8080}}}
			for i := range n {
				s.Endpoints = append(s.Endpoints, SliceEndpoint{Addr: netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), Flags: Ready | Serving})
			}
			where := node("a")
			b.ReportAllocs()
			for b.Loop() {
				Services(a, []*Slice{s}, where)
			}
		})
	}
}
