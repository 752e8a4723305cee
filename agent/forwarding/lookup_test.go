package forwarding

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"
)

var (
	podHere, podThere, outside, nodeIP = addr("10.244.1.2"), addr("10.244.2.9"), addr("192.0.2.2"), addr("10.0.0.1")
	home                               = Node{Addrs: []netip.Addr{nodeIP, addr("127.0.0.1"), addr("fd00::1")}}
	pods                               = Ground{Pods: PodTraffic{Sources: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}}}
	near, far                          = Endpoint{netip.MustParseAddrPort("10.244.1.2:8080"), true}, Endpoint{netip.MustParseAddrPort("10.244.2.2:8080"), false}
	both                               = Target{Endpoints: []Endpoint{near, far}}
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// shop is a service with an address of each kind; change makes it what a case needs.
func shop(change func(*Service)) State {
	s := &Service{
		Key: ServiceKey{"ns", "shop", 80, TCP}, ServiceIPs: []netip.Addr{addr("10.99.0.1")}, ExternalIPs: []netip.Addr{addr("198.51.100.7")},
		NodePort: 30080, NodePortAddresses: []netip.Prefix{netip.PrefixFrom(nodeIP, 32)}, Internal: both, External: both, ExternalFromHere: both,
	}
	if change != nil {
		change(s)
	}
	return State{}.On(pods).With(s)
}

func TestLookupOfProtocolsWithoutPorts(t *testing.T) {
	const icmp Protocol = 1
	ground := pods
	ground.Ranges = []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16")}
	for to, want := range map[string]Fate{"10.99.0.1": Rejected, "10.99.0.2": Dropped, "198.51.100.7": Passed, "10.0.0.1": Passed, "10.244.1.2": Passed} {
		p := Packet{Protocol: icmp, Source: podHere, Destination: netip.AddrPortFrom(addr(to), 0)}
		if v := shop(nil).On(ground).Lookup(home, p); v.Fate != want {
			t.Errorf("to %s: %s, want %s", to, v.Fate, want)
		}
	}
}

func TestLookup(t *testing.T) {
	local := func(s *Service) {
		s.PreserveSource, s.External = true, Target{Endpoints: []Endpoint{near}}
	}
	guarded := func(s *Service) {
		s.LoadBalancerIPs, s.SourceRanges = s.ExternalIPs, []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}
	}
	for _, c := range []struct {
		name   string
		change func(*Service)
		from   netip.Addr
		to     string
		want   string // fate, endpoints, m for masqueraded
	}{
		{"service IP from a pod", nil, podThere, "10.99.0.1:80", "forwarded here there"},
		{"service IP from itself", nil, podHere, "10.99.0.1:80", "forwarded here+m there"},
		{"service IP from outside", nil, outside, "10.99.0.1:80", "forwarded here+m there+m"},
		{"service IP from the node", nil, nodeIP, "10.99.0.1:80", "forwarded here+m there+m"},
		{"unused port", nil, podHere, "10.99.0.1:81", "rejected"},
		{"unknown address", nil, podHere, "10.99.0.2:80", "passed"},
		{"unused port of an external IP", nil, podHere, "198.51.100.7:81", "passed"},
		{"external IP", nil, outside, "198.51.100.7:80", "forwarded here+m there+m"},
		{"external IP, local policy", local, outside, "198.51.100.7:80", "forwarded here"},
		{"external IP, local policy, from a pod", local, podThere, "198.51.100.7:80", "forwarded here there"},
		{"external IP, local policy, from the node", local, nodeIP, "198.51.100.7:80", "forwarded here+m there+m"},
		{"local policy and nobody here", func(s *Service) { local(s); s.External = Target{Elsewhere: IPv4} }, outside, "10.0.0.1:30080", "dropped"},
		{"local policy and nobody here, from a pod", func(s *Service) { local(s); s.External = Target{Elsewhere: IPv4} }, podThere, "10.0.0.1:30080", "forwarded here there"},
		{"node port", nil, outside, "10.0.0.1:30080", "forwarded here+m there+m"},
		{"node port at an address without", nil, outside, "127.0.0.1:30080", "passed"},
		{"node port at all but loopback", func(s *Service) { s.NodePortAddresses = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")} }, nodeIP, "127.0.0.1:30080", "passed"},
		{"node port at loopback", func(s *Service) { s.NodePortAddresses = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} }, nodeIP, "127.0.0.1:30080", "forwarded here+m there+m"},
		{"node port at another node's address", nil, outside, "10.0.0.2:30080", "passed"},
		{"no endpoint", func(s *Service) { s.Internal = Target{} }, podHere, "10.99.0.1:80", "rejected"},
		{"no endpoint of the family", func(s *Service) { s.ServiceIPs = append(s.ServiceIPs, addr("fd00:99::1")) }, addr("fd00:244::2"), "[fd00:99::1]:80", "rejected"},
		{"an endpoint at the node's own address", func(s *Service) { s.External = Target{Endpoints: []Endpoint{{netip.AddrPortFrom(nodeIP, 8080), true}}} }, outside, "10.0.0.1:30080", "forwarded here"},
		{"source ranges keep out", guarded, outside, "198.51.100.7:80", "dropped"},
		{"source ranges let in", guarded, addr("203.0.113.9"), "198.51.100.7:80", "forwarded here+m there+m"},
		{"source ranges guard no node port", guarded, outside, "10.0.0.1:30080", "forwarded here+m there+m"},
		{"source ranges before no endpoint", func(s *Service) { guarded(s); s.External = Target{} }, outside, "198.51.100.7:80", "dropped"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := shop(c.change).Lookup(home, Packet{Protocol: TCP, Source: c.from, Destination: netip.MustParseAddrPort(c.to)})
			if got := describe(v); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
			if (v.Service != nil) != (v.Fate == Forwarded || v.Fate == Dropped || v.Fate == Rejected && c.name != "unused port") {
				t.Errorf("%s for service %v", v.Fate, v.Service)
			}
		})
	}
}

func describe(v Verdict) string {
	out := v.Fate.String()
	for _, e := range v.Endpoints {
		out += map[bool]string{true: " here", false: " there"}[e.Local]
		if v.Masquerades(e) {
			out += "+m"
		}
	}
	return out
}

func TestLookupOtherProtocol(t *testing.T) {
	p := Packet{Protocol: UDP, Source: podHere, Destination: netip.MustParseAddrPort("10.99.0.1:80")}
	if v := shop(nil).Lookup(home, p); v.Fate != Rejected || v.Service != nil {
		t.Errorf("UDP to a TCP port of a service IP: %v for %v, want rejected for none", v.Fate, v.Service)
	}
}

func TestLookupLoopbackFromOutside(t *testing.T) {
	served := shop(func(s *Service) { s.NodePortAddresses = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} })
	p := Packet{Protocol: TCP, Source: outside, Destination: netip.MustParseAddrPort("127.0.0.1:30080"), In: "eth0"}
	if v := served.Lookup(home, p); v.Fate != Dropped {
		t.Errorf("a neighbour's packet to loopback is %s", v.Fate)
	}
}

func TestLookupAffinity(t *testing.T) {
	pinned := shop(func(s *Service) { s.Affinity = time.Hour })
	p := Packet{Protocol: TCP, Source: podThere, Destination: netip.MustParseAddrPort("10.99.0.1:80"), Pinned: far.AddrPort}
	if v := pinned.Lookup(home, p); !slices.Equal(v.Endpoints, []Endpoint{far}) {
		t.Errorf("a pinned client may go to %v", v.Endpoints)
	}
	if v := shop(nil).Lookup(home, p); len(v.Endpoints) != 2 {
		t.Errorf("without affinity a pin narrows to %v", v.Endpoints)
	}
	p.Pinned = netip.MustParseAddrPort("10.244.9.9:8080")
	if v := pinned.Lookup(home, p); len(v.Endpoints) != 2 {
		t.Errorf("a client that was pinned to an endpoint that is gone may go to %v", v.Endpoints)
	}
}

// A node address that is a service's external IP too, at the port that is another's node port, belongs to the external IP.
func TestLookupPrecedence(t *testing.T) {
	port := &Service{Key: ServiceKey{"a", "port", 8080, TCP}, NodePort: 30080, NodePortAddresses: []netip.Prefix{netip.PrefixFrom(nodeIP, 32)}, External: both, ExternalFromHere: both}
	ip := &Service{Key: ServiceKey{"b", "ip", 30080, TCP}, ExternalIPs: []netip.Addr{nodeIP}, External: both, ExternalFromHere: both}
	for i, s := range []State{State{}.With(port).With(ip), State{}.With(ip).With(port)} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			if v := s.Lookup(home, Packet{Protocol: TCP, Source: outside, Destination: netip.AddrPortFrom(nodeIP, 30080)}); v.Service != ip {
				t.Errorf("for %v", v.Service)
			}
		})
	}
}
