package nftables

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// benchService is service i with n endpoints. Host numbers go on from first.
func benchService(i, first, n int) *forwarding.Service {
	var target forwarding.Target
	for j := range n {
		e := i*16 + first + j
		target.Endpoints = append(target.Endpoints, forwarding.Endpoint{
			AddrPort: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 128 + byte(e>>16), byte(e >> 8), byte(e)}), 8080),
		})
	}
	return &forwarding.Service{
		Key:        forwarding.ServiceKey{Namespace: "bench", Name: fmt.Sprintf("service-%d", i), Port: 80, Protocol: forwarding.TCP},
		ServiceIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 99 + byte(i>>16), byte(i >> 8), byte(i)})},
		Internal:   target,
	}
}

// benchExternal gives a service an external IP.
func benchExternal(i int, s *forwarding.Service) {
	s.ExternalIPs = []netip.Addr{netip.AddrFrom4([4]byte{198, 18 + byte(i>>16), byte(i >> 8), byte(i)})}
	s.External, s.ExternalFromHere = s.Internal, s.Internal
}

// benchGuarded gives a service an external IP with source ranges that no other has, which differ by round.
func benchGuarded(i, round int, s *forwarding.Service) {
	benchExternal(i, s)
	s.LoadBalancerIPs = s.ExternalIPs
	s.SourceRanges = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{100, 64 + byte(round%2), byte(i >> 8), byte(i)}), 32)}
}

func benchState(services int) forwarding.State {
	s := forwarding.State{}.On(ground)
	for i := range services {
		s = s.With(benchService(i, 0, 10))
	}
	return s
}

var benchSizes = []int{1000, 10000, 50000}

func eachSize(b *testing.B, f func(b *testing.B, services int)) {
	for _, services := range benchSizes {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) { f(b, services) })
	}
}

// cpu is this process's CPU time so far, the kernel's on its behalf included.
func cpu(b *testing.B) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// BenchmarkLoad fills an empty kernel.
func BenchmarkLoad(b *testing.B) {
	eachSize(b, func(b *testing.B, services int) {
		want := benchState(services)
		b.ReportAllocs()
		var spent time.Duration
		for b.Loop() {
			b.StopTimer()
			ns := netns.NewT(b)
			be := newBackend(b, ns)
			runtime.GC()
			before := cpu(b)
			b.StartTimer()
			apply(b, be, nil, want)
			spent += cpu(b) - before
		}
		b.ReportMetric(float64(spent)/float64(b.N), "cpu-ns/op")
	})
}

// BenchmarkRestart finds everything in place.
func BenchmarkRestart(b *testing.B) {
	eachSize(b, func(b *testing.B, services int) {
		want := benchState(services)
		ns := netns.NewT(b)
		apply(b, newBackend(b, ns), nil, want)
		b.ReportAllocs()
		var spent time.Duration
		for b.Loop() {
			b.StopTimer()
			be := newBackend(b, ns)
			runtime.GC()
			before := cpu(b)
			b.StartTimer()
			apply(b, be, nil, want)
			spent += cpu(b) - before
			if be.commits != 0 {
				b.Fatalf("%d transactions", be.commits)
			}
		}
		b.ReportMetric(float64(spent)/float64(b.N), "cpu-ns/op")
	})
}

// BenchmarkMirror tells the memory that a backend keeps.
func BenchmarkMirror(b *testing.B) {
	eachSize(b, func(b *testing.B, services int) {
		want := benchState(services)
		ns := netns.NewT(b)
		be := newBackend(b, ns)
		heap := func() uint64 {
			runtime.GC()
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return m.HeapAlloc
		}
		before := heap()
		for b.Loop() {
			apply(b, be, nil, want)
		}
		b.ReportMetric(float64(heap()-before), "heap-bytes")
		runtime.KeepAlive(be)
		runtime.KeepAlive(want.Len())
	})
}

// BenchmarkChange changes services one way and another, from the state to the kernel.
func BenchmarkChange(b *testing.B) {
	replaced := func(round int) (first, n int) { return round % 2, 10 }
	for _, c := range []struct {
		name  string
		dirty int
		// shape gives a service's endpoints in a round: the number of the first, and how many.
		shape func(round int) (first, n int)
		// feature is what every service has besides, in a round.
		feature func(i, round int, s *forwarding.Service)
	}{
		{"replaced", 1, replaced, nil},
		{"added-removed", 1, func(round int) (first, n int) { return 0, 10 + round%2 }, nil},
		{"replaced", 50, replaced, nil},
		{"replaced-affinity", 1, replaced, func(_, _ int, s *forwarding.Service) { s.Affinity = 3 * time.Hour }},
		{"replaced-ranges", 1, replaced, func(i, _ int, s *forwarding.Service) { benchGuarded(i, 0, s) }},
		{"resized", 1, func(round int) (first, n int) { return 0, 10 - 7*(round%2) }, nil},
		{"resized-ranges", 1, func(round int) (first, n int) { return 0, 10 - 7*(round%2) }, func(i, _ int, s *forwarding.Service) { benchGuarded(i, 0, s) }},
		{"edited-ranges", 1, func(int) (first, n int) { return 0, 10 }, benchGuarded},
		{"replaced-local", 1, replaced, func(i, _ int, s *forwarding.Service) {
			benchExternal(i, s)
			s.PreserveSource, s.External = true, forwarding.Target{Endpoints: s.Internal.Endpoints[:3]}
		}},
		{"replaced-localhost", 1, replaced, func(i, _ int, s *forwarding.Service) {
			s.External, s.ExternalFromHere = s.Internal, s.Internal
			s.NodePort, s.NodePortAddresses = uint16(10000+i), []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("192.0.2.1/32")}
		}},
	} {
		b.Run(fmt.Sprintf("%s/dirty=%d", c.name, c.dirty), func(b *testing.B) {
			eachSize(b, func(b *testing.B, services int) {
				be := newBackend(b, netns.NewT(b))
				service := func(i, round, first, n int) *forwarding.Service {
					s := benchService(i, first, n)
					if c.feature != nil {
						c.feature(i, round, s)
					}
					return s
				}
				prev := forwarding.State{}.On(ground)
				for i := range services {
					prev = prev.With(service(i, 0, 0, 10))
				}
				apply(b, be, nil, prev)
				rounds := make([]int, services)
				var took []time.Duration
				i := 0
				runtime.GC()
				b.ReportAllocs()
				before := cpu(b)
				for b.Loop() {
					next := prev
					for range c.dirty {
						i = (i + 7919) % services
						rounds[i]++
						first, n := c.shape(rounds[i])
						next = next.With(service(i, rounds[i], first, n))
					}
					start := time.Now()
					if err := be.Apply(context.Background(), &prev, next); err != nil {
						b.Fatal(err)
					}
					took = append(took, time.Since(start))
					prev = next
				}
				b.ReportMetric(float64(cpu(b)-before)/float64(b.N), "cpu-ns/op")
				slices.Sort(took)
				b.ReportMetric(float64(took[len(took)/2]), "p50-ns")
			})
		})
	}
}
