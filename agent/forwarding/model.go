// Package forwarding is the model of what one node forwards: the output of compile, the input of every backend.
//
// Everything in it is immutable once it is in a State, so snapshots share what did not change and a backend finds the
// difference of two snapshots in time proportional to the difference. "Endpoint" is a target of traffic; family is a property
// of an address and never of a type. Every decision about readiness, traffic policy and topology is already taken here.
package forwarding

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"time"
)

// Protocol is an IP protocol number.
type Protocol uint8

const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

// String gives the protocol's Kubernetes name.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case SCTP:
		return "SCTP"
	}
	return "protocol " + strconv.Itoa(int(p))
}

// Scheduler is how an endpoint is chosen for a new connection.
type Scheduler uint8

const (
	Random Scheduler = iota
	RoundRobin
	LeastConnection
	SourceHash
	Maglev
)

// ServiceKey identifies one port of one Service. Two ports of a Service may have the same number and differ in protocol.
type ServiceKey struct {
	Namespace, Name string
	Port            uint16
	Protocol        Protocol
}

// Compare orders keys by namespace, name, port, protocol.
func (k ServiceKey) Compare(o ServiceKey) int {
	return cmp.Or(cmp.Compare(k.Namespace, o.Namespace), cmp.Compare(k.Name, o.Name),
		cmp.Compare(k.Port, o.Port), cmp.Compare(k.Protocol, o.Protocol))
}

// String gives namespace/name:port/protocol.
func (k ServiceKey) String() string {
	return k.Namespace + "/" + k.Name + ":" + strconv.Itoa(int(k.Port)) + "/" + k.Protocol.String()
}

// Endpoint is one target of traffic.
type Endpoint struct {
	AddrPort netip.AddrPort
	// Local says that the endpoint is on this node, so that its own traffic to the service comes back to it through
	// this node's kernel (hairpin).
	Local bool
}

// Compare orders endpoints by address and port.
func (e Endpoint) Compare(o Endpoint) int { return e.AddrPort.Compare(o.AddrPort) }

// Families is a set of address families.
type Families uint8

const (
	IPv4 Families = 1 << iota
	IPv6
)

// FamilyOf gives the family of an address.
func FamilyOf(a netip.Addr) Families {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// Action is what happens to a packet that a Target matches.
type Action uint8

const (
	// Reject answers at once that nobody is there (ICMP port unreachable, or TCP reset): the Service has no endpoint at all.
	Reject Action = iota
	// Drop discards silently: there are endpoints, but none that the traffic policy allows on this node.
	Drop
	// Forward sends to one of the endpoints.
	Forward
)

// Target is where traffic of one kind goes. Each family is by itself: what comes to an IPv4 address knows nothing of the IPv6 endpoints.
type Target struct {
	// Endpoints is sorted by Endpoint.Compare, without duplicates, of both families: IPv4 first.
	Endpoints []Endpoint
	// Elsewhere are the families in which the Service has endpoints but none that this traffic may use from this node. No family is in both.
	Elsewhere Families
}

// Action gives what happens to traffic of one family.
func (t Target) Action(f Families) Action {
	if n := len(t.Endpoints); n > 0 && (FamilyOf(t.Endpoints[0].AddrPort.Addr()) == f || FamilyOf(t.Endpoints[n-1].AddrPort.Addr()) == f) {
		return Forward
	}
	if t.Elsewhere&f != 0 {
		return Drop
	}
	return Reject
}

// Equal says whether two targets are the same.
func (t Target) Equal(o Target) bool {
	return t.Elsewhere == o.Elsewhere && slices.Equal(t.Endpoints, o.Endpoints)
}

// Service is one port of one Service as one node forwards it. The slices are never changed after the Service is in a State.
type Service struct {
	Key       ServiceKey
	Scheduler Scheduler

	// ServiceIPs are the addresses at which the cluster reaches the Service (ClusterIPs and additional service IPs), sorted.
	ServiceIPs []netip.Addr
	// ExternalIPs are external and load-balancer addresses, sorted. Traffic to them is masqueraded unless PreserveSource.
	ExternalIPs []netip.Addr
	// NodePort is the port on the node's addresses, 0 for none.
	NodePort uint16
	// NodePortAddresses says on which of the node's addresses NodePort is served: the prefixes a local address must lie in,
	// sorted. Resolved for this node: "Primary" is one full-length prefix per node address, "All" is 0.0.0.0/0 and ::/0,
	// loopback only if it is listed as a loopback prefix.
	NodePortAddresses []netip.Prefix

	// Internal serves traffic to ServiceIPs.
	Internal Target
	// External serves traffic from outside to ExternalIPs and NodePort.
	External Target
	// ExternalFromHere serves traffic from this node and its pods to ExternalIPs and NodePort, where that differs (external
	// traffic policy Local); else it equals External.
	ExternalFromHere Target
	// PreserveSource says that External keeps the client's address (external traffic policy Local): no masquerade.
	PreserveSource bool
	// Lingering are endpoints that still serve but get no new connection from this node: they terminate, or traffic policy or topology prefer others.
	// UDP flows that lead to one go on, as TCP connections do. Sorted; only of UDP services, and none of them is in a target.
	Lingering []netip.AddrPort

	// Affinity pins a client to its endpoint for this long after its last connection. 0: no affinity.
	Affinity time.Duration
	// SourceRanges are the sources that may use LoadBalancerIPs; empty: all. Sorted.
	SourceRanges []netip.Prefix
	// LoadBalancerIPs are those of ExternalIPs that SourceRanges guards, sorted.
	LoadBalancerIPs []netip.Addr
}

// Equal says whether two services forward alike.
func (s *Service) Equal(o *Service) bool {
	if s == o {
		return true
	}
	return s.Key == o.Key && s.Scheduler == o.Scheduler && s.NodePort == o.NodePort &&
		s.PreserveSource == o.PreserveSource && s.Affinity == o.Affinity &&
		slices.Equal(s.ServiceIPs, o.ServiceIPs) && slices.Equal(s.ExternalIPs, o.ExternalIPs) &&
		slices.Equal(s.NodePortAddresses, o.NodePortAddresses) && slices.Equal(s.Lingering, o.Lingering) &&
		s.Internal.Equal(o.Internal) && s.External.Equal(o.External) && s.ExternalFromHere.Equal(o.ExternalFromHere) &&
		slices.Equal(s.SourceRanges, o.SourceRanges) && slices.Equal(s.LoadBalancerIPs, o.LoadBalancerIPs)
}

// NodePortAt says whether node ports with such NodePortAddresses are served at one of the node's addresses: loopback only if it is asked for, not as a part of everything.
func NodePortAt(addresses []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(addresses, func(p netip.Prefix) bool { return p.Contains(a) && (!a.IsLoopback() || p.Addr().IsLoopback()) })
}
