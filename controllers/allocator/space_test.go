package allocator

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

func newTestSpace(policies ...*Policy) *Space {
	s := NewSpace(rand.New(rand.NewPCG(1, 2)))
	resolved, _ := Resolve(policies)
	s.Configure(resolved, Server{})
	return s
}

func autoRange(cidr string, excluded ...string) Range {
	r := Range{Prefix: netip.MustParsePrefix(cidr), Use: v1alpha1.RangeUseClusterIP, Allocation: v1alpha1.RangeAllocationAutomatic, Usable: true}
	for _, e := range excluded {
		p, err := parsePrefixOrAddr(e)
		if err != nil {
			panic(err)
		}
		r.Excluded = append(r.Excluded, p)
	}
	return r
}

func request(policy string, f v1alpha1.IPFamily, name string) Request {
	use := v1alpha1.ClaimUseAdditionalIP
	if f == "" {
		use = v1alpha1.ClaimUseNodePort
	}
	return Request{Policy: policy, Family: f, Use: use, Holder: Holder{"ns", name, "uid-" + name}}
}

func TestGrantsEveryAddressOnceAndThenReportsExhaustion(t *testing.T) {
	for _, tt := range []struct {
		cidr     string
		excluded []string
		total    int
	}{
		{"10.99.0.0/24", nil, 254},
		{"10.99.0.0/30", nil, 2},
		{"10.99.0.0/24", []string{"10.99.0.0/25", "10.99.0.200", "10.99.0.255"}, 126},
		{"10.99.0.0/24", []string{"10.99.0.0/24"}, 0},
		{"fd00::/120", nil, 255}, // IPv6 has no broadcast address
		{"fd00::/126", []string{"fd00::3"}, 2},
	} {
		t.Run(fmt.Sprint(tt.cidr, tt.excluded), func(t *testing.T) {
			policy := &Policy{Name: "p", Ranges: []Range{autoRange(tt.cidr, tt.excluded...)}}
			s := newTestSpace(policy)
			family := v1alpha1.IPv6
			if policy.Ranges[0].Prefix.Addr().Is4() {
				family = v1alpha1.IPv4
			}
			seen := map[Lock]bool{}
			for i := range tt.total {
				g, err := s.Grant(request("p", family, fmt.Sprint(i)))
				if err != nil {
					t.Fatalf("grant %d of %d: %v", i, tt.total, err)
				}
				if seen[g.Lock] || !policy.Ranges[0].Prefix.Contains(g.Lock.Addr) {
					t.Fatalf("grant %d: %v is outside the range or was given before", i, g.Lock)
				}
				for _, e := range policy.Ranges[0].Excluded {
					if e.Contains(g.Lock.Addr) {
						t.Fatalf("%v is excluded", g.Lock)
					}
				}
				seen[g.Lock] = true
			}
			_, err := s.Grant(request("p", family, "late"))
			var exhausted *ExhaustedError
			if !errors.As(err, &exhausted) || !errors.Is(err, ErrExhausted) {
				t.Fatalf("got %v", err)
			}
			if want := (ExhaustedError{"p", family, v1alpha1.RangeUseClusterIP, int64(tt.total), int64(tt.total)}); *exhausted != want {
				t.Errorf("got %+v, want %+v", *exhausted, want)
			}
			for l := range seen {
				s.Drop(l)
			}
			if c := s.RangeCounts("p", policy.Ranges[0].Prefix); c != (Counts{Total: int64(tt.total), Free: int64(tt.total)}) {
				t.Errorf("after dropping all: %+v", c)
			}
		})
	}
}

func TestUpperBandFirst(t *testing.T) {
	for _, tt := range []struct {
		cidr string
		band int // as in kube-apiserver: addresses at the bottom left alone
	}{{"10.99.0.0/28", 0}, {"10.99.0.0/27", 16}, {"10.99.0.0/24", 16}, {"10.99.0.0/22", 64}, {"10.99.0.0/16", 256}, {"fd00::/112", 256}, {"fd00::/64", 256}} {
		p := newAddrPool("p", &Range{Prefix: netip.MustParsePrefix(tt.cidr)})
		if got := int(p.band - p.first); got != tt.band {
			t.Errorf("%s: band %d, want %d", tt.cidr, got, tt.band)
		}
	}
	for _, tt := range []struct{ first, last, band uint16 }{{30000, 30015, 0}, {30000, 30016, 16}, {30000, 32767, 86}, {20000, 60000, 128}} {
		if got := newPortPool("p", PortRange{tt.first, tt.last}, nil).band; got != uint64(tt.band) {
			t.Errorf("%d-%d: band %d, want %d", tt.first, tt.last, got, tt.band)
		}
	}
	// A second range's upper band comes before the first range's lower one.
	s := newTestSpace(&Policy{Name: "p", Ranges: []Range{autoRange("10.1.0.0/27"), autoRange("10.2.0.0/27")}})
	low := 0
	for i := range 60 {
		g, err := s.Grant(request("p", v1alpha1.IPv4, fmt.Sprint(i)))
		if err != nil {
			t.Fatal(err)
		}
		if g.Lock.Addr.As4()[3] < 17 {
			low++
		} else if low > 0 {
			t.Fatalf("grant %d is %v, after %d from the lower bands", i, g.Lock, low)
		}
	}
}

func TestNodePorts(t *testing.T) {
	old := &Policy{Name: "old", Created: time.Unix(1, 0), NodePorts: PortRange{30000, 30009}}
	young := &Policy{Name: "young", Created: time.Unix(2, 0), NodePorts: PortRange{30005, 30014}}
	s := newTestSpace(old, young)
	for i := range 5 {
		g, err := s.Grant(request("young", "", fmt.Sprint(i)))
		if err != nil || g.Lock.Port < 30010 || g.Lock.Port > 30014 {
			t.Fatalf("got %v, %v", g.Lock, err)
		}
	}
	if _, err := s.Grant(request("young", "", "x")); !errors.Is(err, ErrExhausted) {
		t.Errorf("got %v", err)
	}
}

func TestHugeRange(t *testing.T) {
	s := newTestSpace(&Policy{Name: "p", Ranges: []Range{autoRange("fd00::/64", "fd00::/65")}})
	for i := range 1000 {
		g, err := s.Grant(request("p", v1alpha1.IPv6, fmt.Sprint(i)))
		if err != nil || !netip.MustParsePrefix("fd00:0:0:0:8000::/65").Contains(g.Lock.Addr) {
			t.Fatalf("got %v, %v", g.Lock, err)
		}
	}
	if c := s.FamilyCounts("p", v1alpha1.IPv6); c.Total != math.MaxInt64 || uint64(c.Free) != 1<<63-1000 || c.Allocated != 1000 {
		t.Errorf("got %+v", c)
	}
}

func TestGrantRefusals(t *testing.T) {
	manual, draining, unready, lb := autoRange("10.1.0.0/24"), autoRange("10.2.0.0/24"), autoRange("10.3.0.0/24"), autoRange("10.4.0.0/24")
	manual.Allocation, draining.Allocation = v1alpha1.RangeAllocationManual, v1alpha1.RangeAllocationDraining
	unready.Usable, lb.Use = false, v1alpha1.RangeUseLoadBalancer
	for name, tt := range map[string]struct {
		policy Policy
		want   error
	}{
		"manual, draining and load-balancer ranges serve nothing": {Policy{Name: "p", Ranges: []Range{manual, draining, lb}}, ErrNoRange},
		"no ranges":          {Policy{Name: "p"}, ErrNoRange},
		"not registered yet": {Policy{Name: "p", Ranges: []Range{unready}}, ErrNotUsable},
		"being deleted":      {Policy{Name: "p", Terminating: true, Ranges: []Range{autoRange("10.1.0.0/24")}}, ErrNotUsable},
	} {
		if g, err := newTestSpace(&tt.policy).Grant(request("p", v1alpha1.IPv4, "web")); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, %v", name, g, err)
		}
	}
}

func TestSticky(t *testing.T) {
	policy := &Policy{Name: "p", StickyFor: time.Hour, Ranges: []Range{autoRange("10.99.0.0/16")}}
	s := newTestSpace(policy)
	first, err := s.Grant(request("p", v1alpha1.IPv4, "web"))
	if err != nil {
		t.Fatal(err)
	}
	release := func() {
		s.Hold(first.Lock, Hold{Policy: "p", State: v1alpha1.ClaimReleased, Holder: Holder{"ns", "web", "uid-web"}})
	}
	release()
	if g, _ := s.Grant(request("p", v1alpha1.IPv4, "other")); g.Lock == first.Lock {
		t.Error("another Service got what rests for web")
	}
	if g, _ := s.Grant(request("p", v1alpha1.IPv4, "web")); g != (Grant{first.Lock, true}) {
		t.Errorf("web got %+v back, want %v", g, first.Lock)
	}
	release()
	s.SetTaken(first.Lock, true)
	if g, _ := s.Grant(request("p", v1alpha1.IPv4, "web")); g.Reclaim {
		t.Error("web got back an address that the API server has not let go of")
	}
	s.SetTaken(first.Lock, false)
	once := *policy
	once.StickyFor = 0
	s.Configure([]*Policy{&once}, Server{})
	if g, _ := s.Grant(request("p", v1alpha1.IPv4, "web")); g.Reclaim {
		t.Error("sticky although stickyFor is 0")
	}
}

// TestSpaceProperties drives a Space through random histories and compares it with the plainest model there is.
func TestSpaceProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		m := newModel(seed)
		t.Repeat(map[string]func(*rapid.T){
			"grant": func(t *rapid.T) {
				check(t, m.grant(rapid.SampledFrom(m.kinds()).Draw(t, "kind"), fmt.Sprint(rapid.IntRange(0, 5).Draw(t, "service"))))
			},
			"take":        func(t *rapid.T) { m.take(rapid.SampledFrom(m.universe).Draw(t, "lock")) },
			"release":     func(t *rapid.T) { m.release(rapid.SampledFrom(m.universe).Draw(t, "lock")) },
			"drop":        func(t *rapid.T) { m.drop(rapid.SampledFrom(m.universe).Draw(t, "lock")) },
			"reconfigure": func(t *rapid.T) { m.reconfigure(rapid.IntRange(0, len(configs)-1).Draw(t, "config")) },
			"":            func(t *rapid.T) { check(t, m.compare()) },
		})
	})
}

func check(t *rapid.T, err error) {
	if err != nil {
		t.Fatal(err)
	}
}

// FuzzSpace does the same with histories that the fuzzer finds: two bytes are one step.
func FuzzSpace(f *testing.F) {
	f.Add(uint64(1), []byte{0, 1, 0, 2, 1, 17, 2, 17, 3, 17, 4, 1, 0, 3})
	f.Add(uint64(9), []byte("granted, released, dropped, granted again"))
	f.Fuzz(func(t *testing.T, seed uint64, steps []byte) {
		m := newModel(seed)
		for i := 0; i+1 < len(steps) && i < 400; i += 2 {
			arg := int(steps[i+1])
			lock := m.universe[arg%len(m.universe)]
			var err error
			switch steps[i] % 5 {
			case 0:
				err = m.grant(m.kinds()[arg%len(m.kinds())], fmt.Sprint(arg%6))
			case 1:
				m.take(lock)
			case 2:
				m.release(lock)
			case 3:
				m.drop(lock)
			case 4:
				m.reconfigure(arg % len(configs))
			}
			if err := errors.Join(err, m.compare()); err != nil {
				t.Fatalf("step %d: %v", i/2, err)
			}
		}
	})
}

func BenchmarkGrant(b *testing.B) {
	for _, bb := range []struct {
		cidr   string
		family v1alpha1.IPFamily
		full   float64 // share of the range that is in use
	}{{"10.96.0.0/12", v1alpha1.IPv4, 0.01}, {"10.99.0.0/16", v1alpha1.IPv4, 0.5}, {"10.99.0.0/16", v1alpha1.IPv4, 0.999}, {"fd00::/112", v1alpha1.IPv6, 0.5}, {"fd00::/64", v1alpha1.IPv6, 0}} {
		b.Run(fmt.Sprintf("cidr=%s/full=%v", bb.cidr, bb.full), func(b *testing.B) {
			s := newTestSpace(&Policy{Name: "p", StickyFor: time.Hour, Ranges: []Range{autoRange(bb.cidr)}})
			total := s.FamilyCounts("p", bb.family).Total
			for i := range int(float64(min(total, 1<<24)) * bb.full) {
				if _, err := s.Grant(request("p", bb.family, fmt.Sprint(i))); err != nil {
					b.Fatal(err)
				}
			}
			r := request("p", bb.family, "web")
			b.ReportAllocs()
			for b.Loop() {
				g, err := s.Grant(r)
				if err != nil {
					b.Fatal(err)
				}
				s.Drop(g.Lock)
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "grants/s")
		})
	}
}
