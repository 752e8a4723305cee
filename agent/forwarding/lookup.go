package forwarding

import (
	"net/netip"
	"slices"
)

// Node is what of a node decides about packets besides its State.
type Node struct {
	// Addrs are the node's own addresses, loopback among them.
	Addrs []netip.Addr
}

// Packet is the first packet of a connection as it reaches the node or leaves one of its own sockets. One of a protocol that has no ports, such as an ICMP
// echo request, is for no service: at a service IP it is refused like an unused port, elsewhere it passes.
type Packet struct {
	Protocol    Protocol
	Source      netip.Addr
	Destination netip.AddrPort
	// In is the interface by which it came, empty if the node itself sends it.
	In string
	// Pinned is the endpoint to which the client's earlier connections to the same service port went, if its time is not over. The zero value: none.
	Pinned netip.AddrPort
}

// Fate is what becomes of a packet.
type Fate uint8

const (
	// Passed packets are none of ours.
	Passed Fate = iota
	// Rejected packets are answered at once: connection refused.
	Rejected
	// Dropped packets are discarded silently.
	Dropped
	// Forwarded packets go to an endpoint.
	Forwarded
)

func (f Fate) String() string {
	return [...]string{"passed", "rejected", "dropped", "forwarded"}[f]
}

// Verdict is what a State does with a packet.
type Verdict struct {
	Fate Fate
	// Service is the one that the packet is for; nil if Passed, or Rejected because no service has that port.
	Service *Service
	// Endpoints are those that may be chosen, by the Service's scheduler; of the destination's family.
	Endpoints []Endpoint
	// masquerade gives the connection an address of the node as its source. See Masquerades.
	masquerade bool
	source     netip.Addr
	own        []netip.Addr
}

// Masquerades says whether a connection that goes to this endpoint gets an address of the node as its source: where its answer would otherwise not come
// back through this node. An endpoint that calls itself through the service is such a case, one that has an address of the node itself is none.
func (v Verdict) Masquerades(e Endpoint) bool {
	to := e.AddrPort.Addr()
	return (v.masquerade || e.Local && to == v.source) && !slices.Contains(v.own, to)
}

// Lookup says what becomes of a packet. It is the specification that every backend is held to, written to be read: its cost grows with the State.
//
// A frontend that two services claim is whose key comes first; the agent never makes such a State.
func (s State) Lookup(n Node, p Packet) Verdict {
	if p.In != "" && p.Destination.Addr().IsLoopback() {
		return Verdict{Fate: Dropped} // loopback is reached from the node itself, whatever is served there
	}
	var found *Service
	how := none
	known := false // some service has the address
	for svc := range s.All() {
		known = known || slices.Contains(svc.ServiceIPs, p.Destination.Addr())
		f := svc.frontend(n, p)
		// A service's address beats a node port where they meet: external IPs may be addresses of the node.
		if f > how || f == how && f != none && svc.Key.Compare(found.Key) < 0 {
			found, how = svc, f
		}
	}
	switch {
	case found != nil:
		return found.decide(n, s.Ground(), p, how)
	case known:
		return Verdict{Fate: Rejected}
	case slices.ContainsFunc(s.Ground().Ranges, func(r netip.Prefix) bool { return r.Contains(p.Destination.Addr()) }) && !slices.Contains(n.Addrs, p.Destination.Addr()):
		return Verdict{Fate: Dropped}
	}
	return Verdict{}
}

// frontend is by which of its addresses a packet is for a service; a later one beats an earlier one.
type frontend uint8

const (
	none frontend = iota
	nodePort
	externalIP
	serviceIP
)

func (s *Service) frontend(n Node, p Packet) frontend {
	to := p.Destination.Addr()
	switch {
	case s.Key.Protocol != p.Protocol:
		return none
	case s.Key.Port == p.Destination.Port() && slices.Contains(s.ServiceIPs, to):
		return serviceIP
	case s.Key.Port == p.Destination.Port() && slices.Contains(s.ExternalIPs, to):
		return externalIP
	case s.NodePort != 0 && s.NodePort == p.Destination.Port() && slices.Contains(n.Addrs, to) && NodePortAt(s.NodePortAddresses, to):
		return nodePort
	}
	return none
}

// decide says what becomes of a packet that is for the service.
func (s *Service) decide(n Node, g Ground, p Packet, how frontend) Verdict {
	v := Verdict{Service: s, source: p.Source, own: n.Addrs}
	own := slices.Contains(n.Addrs, p.Source)
	pod := g.Pods.Match(p)
	target := &s.Internal
	switch {
	case how == serviceIP:
		v.masquerade = g.MasqueradeAll || !pod && g.Pods.Known(p.Source)
	case own || pod:
		target = &s.ExternalFromHere
		v.masquerade = own || !s.PreserveSource
	default:
		target = &s.External
		v.masquerade = !s.PreserveSource
	}
	if how == externalIP && len(s.SourceRanges) > 0 && slices.Contains(s.LoadBalancerIPs, p.Destination.Addr()) &&
		!slices.ContainsFunc(s.SourceRanges, func(r netip.Prefix) bool { return r.Contains(p.Source) }) {
		v.Fate = Dropped
		return v
	}
	switch target.Action(FamilyOf(p.Destination.Addr())) {
	case Drop:
		v.Fate = Dropped
	case Reject:
		v.Fate = Rejected
	case Forward:
		v.Fate = Forwarded
		for _, e := range target.Endpoints {
			if FamilyOf(e.AddrPort.Addr()) == FamilyOf(p.Destination.Addr()) {
				v.Endpoints = append(v.Endpoints, e)
			}
		}
		v.Endpoints = s.pinned(v.Endpoints, p.Pinned)
	}
	return v
}

// pinned narrows the endpoints to the one that the client is pinned to, if it is still one of them.
func (s *Service) pinned(all []Endpoint, to netip.AddrPort) []Endpoint {
	if s.Affinity == 0 || !to.IsValid() {
		return all
	}
	if i := slices.IndexFunc(all, func(e Endpoint) bool { return e.AddrPort == to }); i >= 0 {
		return all[i : i+1]
	}
	return all
}
