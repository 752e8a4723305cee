package nftables

import (
	"context"
	"errors"
	"net/netip"
	"testing"

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
