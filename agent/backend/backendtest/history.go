package backendtest

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// Kernel is how a backend's part of a kernel is made and read.
type Kernel struct {
	// Open makes a backend. It is called on a thread in the namespace.
	Open func() (backend.Backend, error)
	// Snapshot reads what the kernel of a namespace does with packets, on a ground. It must be the same text whenever that is the same, wherever in the
	// kernel it is kept.
	Snapshot func(*netns.NS, forwarding.Ground) (string, error)
}

// ForgetsHistory checks with random states that what a kernel holds after an Apply depends on the state alone: not on what states were before, nor on an
// Apply before that was cut short, and that it is what the same state makes of an empty kernel.
func ForgetsHistory(t *testing.T, k Kernel) {
	walked := netns.NewT(t)
	b := k.open(t, walked)
	rapid.Check(t, func(t *rapid.T) {
		ctx := context.Background()
		var prev *forwarding.State
		for step := range rapid.IntRange(1, 4).Draw(t, "steps") {
			next := DrawState(t)
			if rapid.IntRange(0, 2).Draw(t, "cut short") == 0 {
				other := DrawState(t)
				// Whether it fails, and where, is up to how often the backend looks.
				if err := b.Apply(&cut{ctx, atomic.Int64{}, int64(rapid.IntRange(0, 8).Draw(t, "looks"))}, prev, other); err != nil {
					prev = nil
				} else {
					prev = &other
				}
			}
			if err := b.Apply(ctx, prev, next); err != nil {
				t.Fatalf("step %d: %v", step, err)
			}
			prev = &next
		}
		if drifts, err := b.Verify(ctx, *prev); err != nil || len(drifts) > 0 {
			t.Fatalf("drifts %v, %v", drifts, err)
		}
		got, err := k.Snapshot(walked, prev.Ground())
		if err != nil {
			t.Fatal(err)
		}
		want, err := k.fresh(*prev)
		if err != nil {
			t.Fatal(err)
		}
		if got != want {
			t.Fatalf("the kernel holds\n%s\nand a fresh one\n%s", got, want)
		}
	})
}

func (k Kernel) open(t testing.TB, ns *netns.NS) backend.Backend {
	t.Helper()
	var b backend.Backend
	if err := ns.Do(func() (err error) { b, err = k.Open(); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return b
}

// fresh gives what an empty kernel holds after a first Apply.
func (k Kernel) fresh(s forwarding.State) (text string, err error) {
	ns, err := netns.New()
	if err != nil {
		return "", err
	}
	defer ns.Close()
	err = ns.Do(func() error {
		b, err := k.Open()
		if err != nil {
			return err
		}
		defer b.Close()
		return b.Apply(context.Background(), nil, s)
	})
	if err != nil {
		return "", fmt.Errorf("in an empty kernel: %w", err)
	}
	return k.Snapshot(ns, s.Ground())
}

// cut is a context that ends when it was looked at so many times.
type cut struct {
	context.Context
	looks atomic.Int64
	most  int64
}

func (c *cut) Err() error {
	if c.looks.Add(1) > c.most {
		return context.Canceled
	}
	return nil
}

func (c *cut) Done() <-chan struct{} {
	if c.Err() == nil {
		return nil
	}
	ended := make(chan struct{})
	close(ended)
	return ended
}

// DrawState draws a state of few services, which have all that services can have, and much in common.
func DrawState(t *rapid.T) forwarding.State {
	s := forwarding.State{}.On(drawGround(t))
	for i := range rapid.IntRange(0, 6).Draw(t, "services") {
		s = s.With(drawService(t, i))
	}
	return s
}

func drawService(t *rapid.T, i int) *forwarding.Service {
	s := &forwarding.Service{Key: forwarding.ServiceKey{Namespace: "ns", Name: fmt.Sprint("s", i), Port: 80}}
	s.Key.Protocol = rapid.SampledFrom([]forwarding.Protocol{forwarding.TCP, forwarding.UDP, forwarding.SCTP}).Draw(t, "protocol")
	s.Scheduler = rapid.SampledFrom([]forwarding.Scheduler{forwarding.Random, forwarding.SourceHash}).Draw(t, "scheduler")
	s.Affinity = rapid.SampledFrom([]time.Duration{0, 0, time.Second, 3 * time.Hour}).Draw(t, "affinity")
	service, external := addrs("10.99.0.1", "fd00:99::1"), addrs("198.51.100.7", "2001:db8:7::7")
	for family := range 2 {
		if rapid.Bool().Draw(t, "service IP") {
			ip := service[family]
			for range i {
				ip = ip.Next()
			}
			s.ServiceIPs = append(s.ServiceIPs, ip)
		}
		if rapid.Bool().Draw(t, "external IP") { // services collide on it
			s.ExternalIPs = append(s.ExternalIPs, external[family])
			if rapid.Bool().Draw(t, "of a load balancer") {
				s.LoadBalancerIPs = append(s.LoadBalancerIPs, external[family])
			}
		}
	}
	s.SourceRanges = drawPrefixes(t, "source", "0.0.0.0/1", "10.0.0.0/8", "192.0.2.2/32", "2001:db8::/32", "fd00::/64")
	if rapid.Bool().Draw(t, "node port") {
		s.NodePort = uint16(30000 + rapid.IntRange(0, 2).Draw(t, "number"))
		s.NodePortAddresses = drawPrefixes(t, "at", "0.0.0.0/0", "127.0.0.0/8", "192.0.2.1/32", "2001:db8:1::1/128", "::1/128")
	}
	local := rapid.Bool().Draw(t, "local")
	s.Internal, s.External = drawTarget(t, local), drawTarget(t, local)
	s.ExternalFromHere = s.External
	if s.PreserveSource = rapid.Bool().Draw(t, "preserve"); s.PreserveSource {
		s.ExternalFromHere = s.Internal
	}
	return s
}

func drawTarget(t *rapid.T, local bool) (target forwarding.Target) {
	elsewhere := forwarding.Families(rapid.IntRange(0, 3).Draw(t, "elsewhere"))
	if rapid.Bool().Draw(t, "empty") {
		return forwarding.Target{Elsewhere: elsewhere}
	}
	for i := range rapid.SampledFrom([]int{1, 2, 3, 5, 8, 9, 20}).Draw(t, "endpoints") {
		base := addrs("10.244.1.10", "fd00:244:1::10")[0]
		if rapid.IntRange(0, 4).Draw(t, "family") == 0 {
			base = addrs("10.244.1.10", "fd00:244:1::10")[1]
		}
		raw := base.AsSlice()
		raw[len(raw)-1] += byte(rapid.IntRange(0, 30).Draw(t, "address"))
		a, _ := netip.AddrFromSlice(raw) // its length is right
		target.Endpoints = append(target.Endpoints, forwarding.Endpoint{AddrPort: netip.AddrPortFrom(a, uint16(8080+i%2)), Local: local})
	}
	slices.SortFunc(target.Endpoints, forwarding.Endpoint.Compare)
	target.Endpoints = slices.Compact(target.Endpoints)
	for _, e := range target.Endpoints {
		elsewhere &^= forwarding.FamilyOf(e.AddrPort.Addr())
	}
	target.Elsewhere = elsewhere
	return target
}

func drawGround(t *rapid.T) forwarding.Ground {
	g := forwarding.Ground{
		MasqueradeAll: rapid.Bool().Draw(t, "masquerade all"), DropInvalid: rapid.Bool().Draw(t, "drop invalid"),
		CountTraffic: rapid.Bool().Draw(t, "count traffic"),
	}
	g.Pods.Sources = drawPrefixes(t, "pods", "10.244.0.0/16", "10.245.0.0/24", "fd00:244::/32")
	for _, name := range []string{"*", "br-pods", "fifteen-letters", "veth*"} {
		if rapid.IntRange(0, 3).Draw(t, "pods at "+name) == 0 {
			g.Pods.Interfaces = append(g.Pods.Interfaces, name)
		}
	}
	// Some lie within others, some touch, one reaches to the end of all addresses.
	g.Ranges = drawPrefixes(t, "range", "10.96.0.0/12", "10.99.0.0/24", "10.99.1.0/24", "10.99.2.128/25", "128.0.0.0/1", "fd00:99::/112", "fd00:99::1:0/112", "8000::/1")
	return g
}

// drawPrefixes draws some of the prefixes.
func drawPrefixes(t *rapid.T, what string, from ...string) (out []netip.Prefix) {
	for _, p := range from {
		if rapid.IntRange(0, 3).Draw(t, what+" "+p) == 0 {
			out = append(out, netip.MustParsePrefix(p))
		}
	}
	return out
}
