package forwarding

import (
	"net/netip"
	"slices"
	"strings"
)

// Ground is what holds for all services of a node alike. It changes rarely, and a change may cost a backend as much as a restart.
type Ground struct {
	// Pods says whose traffic comes from a pod.
	Pods PodTraffic
	// MasqueradeAll gives every connection through a service IP an address of the node as its source.
	MasqueradeAll bool
	// Ranges are the service IP ranges declared for this node, sorted. What goes to an address in them that no service has is dropped: it would wander to the
	// default route and back.
	Ranges []netip.Prefix
	// DropInvalid drops packets that connection tracking takes for part of no connection: left to themselves, such packets of a translated connection
	// would reach the client untranslated and end the connection (kubernetes#74839).
	DropInvalid bool
	// CountTraffic counts what goes to and comes from each service, in backends that can.
	CountTraffic bool
}

// Equal says whether two are the same.
func (g Ground) Equal(o Ground) bool {
	return g.MasqueradeAll == o.MasqueradeAll && g.DropInvalid == o.DropInvalid && g.CountTraffic == o.CountTraffic && slices.Equal(g.Ranges, o.Ranges) && g.Pods.Equal(o.Pods)
}

// PodTraffic tells the traffic of the cluster's pods from other traffic: a packet that one of its fields matches comes from a pod. The zero value knows no
// pods, so nothing is known to come from outside either.
type PodTraffic struct {
	// Sources are prefixes of pods' addresses, sorted.
	Sources []netip.Prefix
	// Interfaces are the interfaces by which pods' packets come in, sorted: names, or with a "*" at the end prefixes of names.
	Interfaces []string
}

// Equal says whether two are the same.
func (t PodTraffic) Equal(o PodTraffic) bool {
	return slices.Equal(t.Sources, o.Sources) && slices.Equal(t.Interfaces, o.Interfaces)
}

// Match says whether a packet comes from a pod.
func (t PodTraffic) Match(p Packet) bool {
	return slices.ContainsFunc(t.Sources, func(s netip.Prefix) bool { return s.Contains(p.Source) }) ||
		p.In != "" && slices.ContainsFunc(t.Interfaces, func(name string) bool {
			prefix, open := strings.CutSuffix(name, "*")
			return p.In == name || open && strings.HasPrefix(p.In, prefix)
		})
}

// Known says whether pods of the address's family can be told from others at all.
func (t PodTraffic) Known(a netip.Addr) bool {
	return len(t.Interfaces) > 0 || slices.ContainsFunc(t.Sources, func(s netip.Prefix) bool { return s.Addr().Is4() == a.Is4() })
}
