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

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// web is a service with all kinds of addresses of one family, two endpoints on port 8080.
func web(family int, proto forwarding.Protocol) *forwarding.Service {
	target := forward(
		forwarding.Endpoint{AddrPort: netip.AddrPortFrom(podAddr(family, 0, 0), 8080), Local: true},
		forwarding.Endpoint{AddrPort: netip.AddrPortFrom(podAddr(family, 1, 0), 8080), Local: true})
	return &forwarding.Service{
		Key:        forwarding.ServiceKey{Namespace: "default", Name: "web", Port: 80, Protocol: proto},
		ServiceIPs: []netip.Addr{serviceIP.addr(family)}, ExternalIPs: []netip.Addr{externalIP.addr(family)},
		NodePort: 30080, NodePortAddresses: []netip.Prefix{netip.PrefixFrom(nodeAddr.addr(family), nodeAddr.addr(family).BitLen())},
		Internal: target, External: target, ExternalFromHere: target,
	}
}

func state(services ...*forwarding.Service) forwarding.State {
	s := forwarding.State{}.On(ground)
	for _, svc := range services {
		s = s.With(svc)
	}
	return s
}

var transports = map[string]forwarding.Protocol{"tcp": forwarding.TCP, "udp": forwarding.UDP}

// TestForward sends real traffic at every kind of address from every side, and checks who the server thinks is calling.
func TestForward(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for family := range families {
		for pod := range top.pods {
			for network := range transports {
				serve(t, top.pods[pod], network, netip.AddrPortFrom(podAddr(family, pod, 0), 8080))
			}
		}
	}
	for family, name := range []string{"IPv4", "IPv6"} {
		for network, proto := range transports {
			s := web(family, proto)
			apply(t, b, nil, state(s))
			t.Run(name+"/"+network, func(t *testing.T) {
				places := map[string]struct {
					ns   int // 0 client, 1 node, 2 first pod
					from netip.Addr
				}{"client": {0, clientAddr.addr(family)}, "node": {1, netip.Addr{}}, "pod": {2, podAddr(family, 0, 0)}}
				targets := map[string]netip.AddrPort{
					"service IP":  netip.AddrPortFrom(s.ServiceIPs[0], 80),
					"external IP": netip.AddrPortFrom(s.ExternalIPs[0], 80),
					"node port":   netip.AddrPortFrom(nodeAddr.addr(family), 30080),
				}
				for place, p := range places {
					for kind, at := range targets {
						ns := top.client
						switch p.ns {
						case 1:
							ns = top.node
						case 2:
							ns = top.pods[0]
						}
						served := map[netip.Addr]bool{}
						for i := 0; i < 200 && len(served) < 2; i++ {
							server, seen, err := ask(ns, network, at, p.from)
							if err != nil {
								t.Fatalf("%s → %s: %v", place, kind, err)
							}
							served[server.Addr()] = true
							hairpin := p.from.IsValid() && p.from == server.Addr()
							masqueraded := hairpin || place == "client" || kind != "service IP"
							if place == "node" {
								continue // its own addresses before and after masquerading are alike
							}
							if keeps := seen.Addr() == p.from; keeps == masqueraded {
								t.Errorf("%s → %s: server %v saw %v, masqueraded should be %v", place, kind, server, seen, masqueraded)
							}
						}
						if len(served) != 2 {
							t.Errorf("%s → %s: only %v answered in 200 connections", place, kind, served)
						}
					}
				}
			})
		}
	}
}

// TestRefused checks that nobody waits for an answer that does not come.
func TestRefused(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for family, name := range []string{"IPv4", "IPv6"} {
		for network, proto := range transports {
			s := web(family, proto)
			s.Internal, s.External, s.ExternalFromHere = forwarding.Target{}, forwarding.Target{}, forwarding.Target{}
			apply(t, b, nil, state(s))
			t.Run(name+"/"+network, func(t *testing.T) {
				for kind, at := range map[string]netip.AddrPort{
					"service IP":  netip.AddrPortFrom(s.ServiceIPs[0], 80),
					"unused port": netip.AddrPortFrom(s.ServiceIPs[0], 81),
					"external IP": netip.AddrPortFrom(s.ExternalIPs[0], 80),
					"node port":   netip.AddrPortFrom(nodeAddr.addr(family), 30080),
				} {
					for place, ns := range map[string]func() error{
						"client": func() error { _, _, err := ask(top.client, network, at, netip.Addr{}); return err },
						"node":   func() error { _, _, err := ask(top.node, network, at, netip.Addr{}); return err },
						"pod":    func() error { _, _, err := ask(top.pods[0], network, at, podAddr(family, 0, 0)); return err },
					} {
						start := time.Now()
						err := ns()
						// A datagram that is discarded on the way out fails its own sendto.
						refused := errors.Is(err, syscall.ECONNREFUSED) || (place == "node" && network == "udp" && errors.Is(err, syscall.EPERM))
						if !refused || time.Since(start) > time.Second {
							t.Errorf("%s → %s: %v after %v, want connection refused at once", place, kind, err, time.Since(start))
						}
					}
				}
			})
		}
	}
}

// TestExternalLocal is external traffic policy Local: the client's address is kept, traffic from here goes elsewhere, and without an
// endpoint here packets vanish.
func TestExternalLocal(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for family := range families {
		for pod := range top.pods {
			serve(t, top.pods[pod], "tcp", netip.AddrPortFrom(podAddr(family, pod, 0), 8080))
		}
	}
	for family, name := range []string{"IPv4", "IPv6"} {
		t.Run(name, func(t *testing.T) {
			s := web(family, forwarding.TCP)
			s.PreserveSource = true
			s.External = forward(s.Internal.Endpoints[0])
			s.ExternalFromHere = forward(s.Internal.Endpoints[1])
			apply(t, b, nil, state(s))
			addrs := []netip.AddrPort{netip.AddrPortFrom(s.ExternalIPs[0], 80), netip.AddrPortFrom(nodeAddr.addr(family), 30080)}
			for _, at := range addrs {
				server, seen, err := ask(top.client, "tcp", at, netip.Addr{})
				if err != nil || server.Addr() != podAddr(family, 0, 0) || seen.Addr() != clientAddr.addr(family) {
					t.Errorf("client → %v: %v saw %v, %v; want the first pod to see the client", at, server, seen, err)
				}
				server, seen, err = ask(top.pods[0], "tcp", at, podAddr(family, 0, 1))
				if err != nil || server.Addr() != podAddr(family, 1, 0) || seen.Addr() != podAddr(family, 0, 1) {
					t.Errorf("pod → %v: %v saw %v, %v; want the second pod to see the first", at, server, seen, err)
				}
				if server, _, err = ask(top.node, "tcp", at, netip.Addr{}); err != nil || server.Addr() != podAddr(family, 1, 0) {
					t.Errorf("node → %v: %v, %v; want the second pod", at, server, err)
				}
			}
			dropped := *s
			dropped.External = forwarding.Target{Elsewhere: forwarding.IPv4 | forwarding.IPv6}
			apply(t, b, nil, state(&dropped))
			for _, at := range addrs {
				if _, _, err := ask(top.client, "tcp", at, netip.Addr{}); !isTimeout(err) {
					t.Errorf("client → %v without an endpoint here: %v, want a timeout", at, err)
				}
				if server, _, err := ask(top.pods[0], "tcp", at, netip.Addr{}); err != nil || server.Addr() != podAddr(family, 1, 0) {
					t.Errorf("pod → %v: %v, %v; want the second pod", at, server, err)
				}
			}
		})
	}
}

func isTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.As(err, &timeout) && timeout.Timeout()
}

// TestHairpinOnlyTranslated checks that an endpoint that calls its own address directly keeps its source.
func TestHairpinOnlyTranslated(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	s := web(0, forwarding.TCP)
	at := netip.AddrPortFrom(podAddr(0, 0, 0), 8080)
	s.Internal = forward(forwarding.Endpoint{AddrPort: at, Local: true})
	serve(t, top.pods[0], "tcp", at)
	apply(t, b, nil, state(s))
	if _, seen, err := ask(top.pods[0], "tcp", netip.AddrPortFrom(s.ServiceIPs[0], 80), at.Addr()); err != nil || seen.Addr() == at.Addr() {
		t.Errorf("by the service: the pod saw %v, %v; want the node", seen, err)
	}
	if _, seen, err := ask(top.pods[0], "tcp", at, at.Addr()); err != nil || seen.Addr() != at.Addr() {
		t.Errorf("directly: the pod saw %v, %v; want itself", seen, err)
	}
}

// TestUniform counts real connections over ten endpoints in sixteen slots, then across a power of two. The limits are chi-square at p = 0.0001.
func TestUniform(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for i := range 20 {
		serve(t, top.pods[i/10], "tcp", netip.AddrPortFrom(podAddr(0, i/10, i%10), 53))
	}
	s := web(0, forwarding.TCP)
	var prev *forwarding.State
	for _, c := range []struct {
		n     int
		limit float64
	}{{10, 33.7}, {17, 44.9}, {16, 43.3}, {5, 23.5}, {3, 18.4}} {
		svc := *s
		svc.Internal = forward(endpoints(0, c.n, 53)...)
		next := state(&svc)
		apply(t, b, prev, next)
		prev = &next
		const connections = 3000
		counts := map[netip.AddrPort]int{}
		for range connections {
			server, _, err := ask(top.client, "tcp", netip.AddrPortFrom(s.ServiceIPs[0], 80), netip.Addr{})
			if err != nil {
				t.Fatal(err)
			}
			counts[server]++
		}
		chi, expected := 0.0, float64(connections)/float64(c.n)
		for _, e := range svc.Internal.Endpoints {
			d := float64(counts[e.AddrPort]) - expected
			chi += d * d / expected
		}
		if len(counts) != c.n || chi > c.limit {
			t.Errorf("%d endpoints: chi-square %.1f over %d servers, want below %.1f: %v", c.n, chi, len(counts), c.limit, counts)
		}
	}
}

func TestSourceHash(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for i := range 10 {
		serve(t, top.pods[0], "udp", netip.AddrPortFrom(podAddr(0, 0, i), 53))
		serve(t, top.pods[0], "udp", netip.AddrPortFrom(podAddr(1, 0, i), 53))
	}
	for family := range families {
		s := web(family, forwarding.UDP)
		s.Scheduler = forwarding.SourceHash
		s.Internal = forward(endpoints(family, 10, 53)...)
		s.External, s.ExternalFromHere = s.Internal, s.Internal
		apply(t, b, nil, state(s))
		for kind, at := range map[string]netip.AddrPort{
			"service IP": netip.AddrPortFrom(s.ServiceIPs[0], 80), "node port": netip.AddrPortFrom(nodeAddr.addr(family), 30080),
		} {
			servers := map[netip.AddrPort]bool{}
			for i := range 10 {
				var first netip.AddrPort
				for range 5 {
					server, _, err := ask(top.pods[1], "udp", at, podAddr(family, 1, i))
					if err != nil {
						t.Fatalf("%s: %v", kind, err)
					}
					if first.IsValid() && server != first {
						t.Errorf("%s: one client reached %v and %v", kind, first, server)
					}
					first = server
				}
				servers[first] = true
			}
			if len(servers) < 3 {
				t.Errorf("%s: ten clients reached only %v", kind, servers)
			}
		}
	}
}

// TestTransitions keeps asking for a service while its endpoints come and go through several powers of two; nobody may notice.
func TestTransitions(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for i := range 20 {
		serve(t, top.pods[i/10], "tcp", netip.AddrPortFrom(podAddr(0, i/10, i%10), 8080))
	}
	s := web(0, forwarding.TCP)
	at := netip.AddrPortFrom(s.ServiceIPs[0], 80)
	with := func(n int) forwarding.State {
		svc := *s
		svc.Internal = forward(endpoints(0, n, 8080)...)
		return state(&svc)
	}
	prev := with(1)
	apply(t, b, nil, prev)

	ctx, cancel := context.WithCancel(context.Background())
	failed := make(chan error, 1)
	asked := make(chan int, 1)
	go func() {
		n := 0
		for ctx.Err() == nil {
			start := time.Now()
			_, _, err := ask(top.client, "tcp", at, netip.Addr{})
			if took := time.Since(start); err == nil && took > 900*time.Millisecond {
				err = fmt.Errorf("took %v: a packet was lost and sent again", took)
			}
			if err != nil {
				failed <- fmt.Errorf("connection %d: %w", n, err)
				break
			}
			n++
		}
		asked <- n
	}()
	deadline := time.Now().Add(2 * time.Second)
	changes := 0
	for n := 1; time.Now().Before(deadline); n = n*7%20 + 1 {
		next := with(n)
		apply(t, b, &prev, next)
		prev = next
		changes++
	}
	cancel()
	n := <-asked
	select {
	case err := <-failed:
		t.Fatalf("%v (after %d changes)", err, changes)
	default:
	}
	if n < 100 {
		t.Fatalf("only %d connections during %d changes", n, changes)
	}
}

// TestConflict: two services want one node port; the first by name has it, and the other when that one goes.
func TestConflict(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for pod := range top.pods {
		serve(t, top.pods[pod], "tcp", netip.AddrPortFrom(podAddr(0, pod, 0), 8080))
	}
	a, z := web(0, forwarding.TCP), web(0, forwarding.TCP)
	a.Key.Name, z.Key.Name = "a", "z"
	a.ServiceIPs, z.ServiceIPs, a.ExternalIPs, z.ExternalIPs = nil, nil, nil, nil
	a.External, z.External = forward(a.External.Endpoints[0]), forward(z.External.Endpoints[1])
	a.ExternalFromHere, z.ExternalFromHere = a.External, z.External
	at := netip.AddrPortFrom(nodeAddr.addr(0), 30080)
	var prev *forwarding.State
	for i, step := range []struct {
		services []*forwarding.Service
		want     netip.Addr
	}{
		{[]*forwarding.Service{z}, podAddr(0, 1, 0)},
		{[]*forwarding.Service{a, z}, podAddr(0, 0, 0)},
		{[]*forwarding.Service{z}, podAddr(0, 1, 0)},
		{[]*forwarding.Service{z, a}, podAddr(0, 0, 0)},
		{[]*forwarding.Service{a}, podAddr(0, 0, 0)},
	} {
		next := state(step.services...)
		apply(t, b, prev, next)
		prev = &next
		server, _, err := ask(top.client, "tcp", at, netip.Addr{})
		if err != nil || server.Addr() != step.want {
			t.Errorf("step %d: %v, %v; want %v", i, server, err, step.want)
		}
		if drifts, err := b.Verify(context.Background(), next); err != nil || len(drifts) > 0 {
			t.Errorf("step %d: %v %v", i, drifts, err)
		}
	}
}

// TestNodePortAddresses: a node port answers at the addresses of its class and at no other.
func TestNodePortAddresses(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	serve(t, top.pods[0], "tcp", netip.AddrPortFrom(podAddr(0, 0, 0), 8080))
	serve(t, top.node, "tcp", netip.MustParseAddrPort("127.0.0.1:30080"))
	s := web(0, forwarding.TCP)
	s.External = forward(s.External.Endpoints[0])
	s.ExternalFromHere = s.External
	primary := netip.AddrPortFrom(nodeAddr.addr(0), 30080)
	other := netip.MustParseAddrPort("10.244.1.1:30080")
	for _, c := range []struct {
		prefixes []string
		want     []netip.AddrPort
	}{
		{[]string{"192.0.2.1/32"}, []netip.AddrPort{primary}},
		{[]string{"10.244.0.0/16"}, []netip.AddrPort{other}},
		{[]string{"0.0.0.0/0", "::/0"}, []netip.AddrPort{primary, other}},
		{[]string{"::/0"}, nil},
	} {
		svc := *s
		svc.NodePortAddresses = nil
		for _, p := range c.prefixes {
			svc.NodePortAddresses = append(svc.NodePortAddresses, netip.MustParsePrefix(p))
		}
		apply(t, b, nil, state(&svc))
		for _, at := range []netip.AddrPort{primary, other} {
			server, _, err := ask(top.client, "tcp", at, netip.Addr{})
			want := slices.Contains(c.want, at)
			if (err == nil && server.Addr() == podAddr(0, 0, 0)) != want {
				t.Errorf("%v at %v: %v, %v; want it served: %v", c.prefixes, at, server, err, want)
			}
		}
		// The node's own listener on loopback is not taken over.
		if server, _, err := ask(top.node, "tcp", netip.MustParseAddrPort("127.0.0.1:30080"), netip.Addr{}); err != nil || !server.Addr().IsLoopback() {
			t.Errorf("%v on loopback: %v, %v", c.prefixes, server, err)
		}
	}
}
