package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// nodeState is the compact form of this node's NodeProxyState: what the controller tells the agent.
type nodeState struct {
	uid      types.UID
	interval time.Duration
	// heartbeat is how often to report at least.
	heartbeat time.Duration
	// ranges are those of spec.serviceRanges, sorted.
	ranges []netip.Prefix
	// conditions are the status', so that a restart of the agent is no transition.
	conditions []metav1.Condition
}

// shortestRange is how many bits a declared range has at least: what goes to its unused addresses is dropped, so a typo must not cut off half the world.
const shortestRange = 8

// parseNodeState gives the compact form of a NodeProxyState and what was left out of it.
func parseNodeState(in *v1alpha1.NodeProxyState) (*nodeState, []compile.Problem) {
	out := &nodeState{uid: in.UID, interval: defaultReportInterval, heartbeat: in.Spec.HeartbeatInterval(), conditions: in.Status.Conditions}
	if i := in.Spec.ReportInterval; i != nil && i.Duration > 0 {
		out.interval = i.Duration
	}
	var bad []compile.Problem
	for i, s := range in.Spec.ServiceRanges {
		p, err := netip.ParsePrefix(s)
		if err != nil || p != p.Masked() || p.Addr().Is4In6() || p.Bits() < shortestRange {
			bad = append(bad, compile.Problem{Field: fmt.Sprintf("spec.serviceRanges[%d]", i), Value: s,
				Reason: fmt.Sprintf("must be a CIDR in canonical form with a length of at least %d, such as 10.99.0.0/16", shortestRange)})
			continue
		}
		out.ranges = append(out.ranges, p)
	}
	slices.SortFunc(out.ranges, netip.Prefix.Compare)
	out.ranges = slices.Compact(out.ranges)
	return out, bad
}
