package nftables

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// eachGround runs a benchmark without and with counting.
func eachGround(b *testing.B, f func(b *testing.B, g forwarding.Ground)) {
	for _, count := range []bool{false, true} {
		g := ground
		g.CountTraffic = count
		b.Run(fmt.Sprintf("counting=%t", count), func(b *testing.B) { f(b, g) })
	}
}

// BenchmarkCountedLoad fills an empty kernel.
func BenchmarkCountedLoad(b *testing.B) {
	eachGround(b, func(b *testing.B, g forwarding.Ground) {
		want := benchState(10_000).On(g)
		var spent time.Duration
		for b.Loop() {
			b.StopTimer()
			be := newBackend(b, netns.NewT(b))
			before := cpu(b)
			b.StartTimer()
			apply(b, be, nil, want)
			spent += cpu(b) - before
		}
		b.ReportMetric(float64(spent)/float64(b.N), "cpu-ns/op")
	})
}

// BenchmarkCountedChange adds and removes a Service, and changes an endpoint, beside 10 000 others.
func BenchmarkCountedChange(b *testing.B) {
	for _, change := range []string{"service", "endpoint"} {
		b.Run(change, func(b *testing.B) {
			eachGround(b, func(b *testing.B, g forwarding.Ground) {
				be := newBackend(b, netns.NewT(b))
				prev := benchState(10_000).On(g)
				apply(b, be, nil, prev)
				extra := benchService(20_000, 0, 10)
				var took []time.Duration
				for i := 0; b.Loop(); i++ {
					var next forwarding.State
					switch {
					case change == "endpoint":
						next = prev.With(benchService(1234, i%2, 10))
					case prev.Get(extra.Key) == nil:
						next = prev.With(extra)
					default:
						next = prev.Without(extra.Key)
					}
					start := time.Now()
					apply(b, be, &prev, next)
					took = append(took, time.Since(start))
					prev = next
				}
				slices.Sort(took)
				b.ReportMetric(float64(took[len(took)/2]), "p50-ns")
			})
		})
	}
}

// BenchmarkTraffic reads the counters of 10 000 Services.
func BenchmarkTraffic(b *testing.B) {
	be := newBackend(b, netns.NewT(b))
	g := ground
	g.CountTraffic = true
	apply(b, be, nil, benchState(10_000).On(g))
	b.ReportAllocs()
	before := cpu(b)
	for b.Loop() {
		if _, err := be.Traffic(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(cpu(b)-before)/float64(b.N), "cpu-ns/op")
}

// BenchmarkPacket tells what counting costs what is forwarded: CPU time of sender, kernel and receiver together, per datagram of 64 bytes and per GB of a
// TCP connection. Short rounds without and with counting take turns, because the machine may be shared; the figures are medians, and the cost is the median of
// what two neighbouring rounds differ by.
func BenchmarkPacket(b *testing.B) {
	const rounds = 200
	top := newTopology(b)
	be := newBackend(b, top.node)
	endpoint := netip.AddrPortFrom(podAddr(0, 1, 0), 8080)
	to := netip.MustParseAddrPort("10.89.0.1:80")
	state := map[bool]forwarding.State{}
	for _, count := range []bool{false, true} {
		g := ground
		g.CountTraffic = count
		state[count] = benchState(10).On(g)
		for _, proto := range transports {
			s := web(0, proto)
			s.ServiceIPs, s.Internal = []netip.Addr{to.Addr()}, forward(forwarding.Endpoint{AddrPort: endpoint, Local: true})
			state[count] = state[count].With(s)
		}
	}
	apply(b, be, nil, state[false])
	for name, send := range map[string]func(*testing.B) func() float64{
		"ns-per-datagram": func(b *testing.B) func() float64 { return datagrams(b, top, endpoint, to) },
		"cpu-s-per-GB":    func(b *testing.B) func() float64 { return stream(b, top, endpoint, to) },
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				send := send(b)
				took := map[bool][]float64{}
				for round := range 2 * rounds {
					count := round%2 == 1
					apply(b, be, nil, state[count])
					before := cpu(b)
					amount := send()
					took[count] = append(took[count], float64(cpu(b)-before)/amount)
				}
				var more []float64
				for i := range rounds {
					more = append(more, 100*(took[true][i]/took[false][i]-1))
				}
				b.ReportMetric(median(more), "%-more")
				for count, list := range took {
					b.ReportMetric(median(list), fmt.Sprintf("%s/counting=%t", name, count))
				}
			}
		})
	}
}

func median(list []float64) float64 {
	slices.Sort(list)
	return list[len(list)/2]
}

// datagrams gives what sends datagrams from one pod to another and says how many.
func datagrams(b *testing.B, top *topology, endpoint, at netip.AddrPort) func() float64 {
	const n = 5_000
	err := top.pods[1].Do(func() error {
		conn, err := net.ListenPacket("udp", endpoint.String())
		if err == nil {
			b.Cleanup(func() { conn.Close() }) // nobody reads: what the socket does with them is not our cost
		}
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	conn, err := dial(top.pods[0], "udp", at, netip.Addr{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	payload := make([]byte, 64)
	return func() float64 {
		for range n {
			if _, err := conn.Write(payload); err != nil {
				b.Fatal(err)
			}
		}
		return n
	}
}

// stream gives what sends a part of a stream from one pod to another and says how many seconds of CPU in nanoseconds make one per GB.
func stream(b *testing.B, top *topology, endpoint, at netip.AddrPort) func() float64 {
	const n = 32 << 20
	done := make(chan error)
	err := top.pods[1].Do(func() error {
		l, err := net.Listen("tcp", endpoint.String())
		if err != nil {
			return err
		}
		b.Cleanup(func() { l.Close() })
		go func() {
			c, err := l.Accept()
			for err == nil {
				_, err = io.CopyN(io.Discard, c, n)
				done <- err
			}
		}()
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	conn, err := dial(top.pods[0], "tcp", at, netip.Addr{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	chunk := make([]byte, 1<<20)
	return func() float64 {
		for range n / len(chunk) {
			if _, err := conn.Write(chunk); err != nil {
				b.Fatal(err)
			}
		}
		if err := <-done; err != nil {
			b.Fatal(err)
		}
		return float64(n) / (1 << 30) * 1e9
	}
}
