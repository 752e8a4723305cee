package agent

import (
	"net/netip"
	"slices"

	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/agent/sysctl"
)

// Settings are what the node's administrator chooses for all Services alike. They may change while the agent runs.
type Settings struct {
	// Pods says how the traffic of pods is told from other traffic.
	Pods forwarding.PodTraffic
	// NodeCIDR adds the Node's own pod ranges (spec.podCIDRs) to Pods.Sources; nothing is programmed before it has any.
	NodeCIDR bool
	// MasqueradeAll and DropInvalid are as in forwarding.Ground.
	MasqueradeAll, DropInvalid bool
	// CountTraffic counts packets, bytes and connections of each Service, in modes that can.
	CountTraffic bool
	// Conntrack is what the node's connection tracking should be able to hold. The zero value leaves it as it is.
	Conntrack sysctl.Conntrack
}

// groundOf puts together what holds for all Services of the node: what its administrator chose, what its Node object says, and which ranges the policies
// declare for it.
func groundOf(s Settings, node *compile.Node, ranges []netip.Prefix) forwarding.Ground {
	g := forwarding.Ground{Pods: s.Pods, MasqueradeAll: s.MasqueradeAll, DropInvalid: s.DropInvalid, CountTraffic: s.CountTraffic, Ranges: ranges}
	if s.NodeCIDR {
		g.Pods.Sources = slices.Concat(g.Pods.Sources, node.PodCIDRs)
		slices.SortFunc(g.Pods.Sources, netip.Prefix.Compare)
		g.Pods.Sources = slices.Compact(g.Pods.Sources)
	}
	return g
}
