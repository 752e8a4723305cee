package controllers

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// policyView is what the ledger knows about one policy at one moment.
type policyView struct {
	invalid     error  // the spec could not be parsed
	clash       string // the cluster's addresses that a range overlaps
	refused     string // why the API server does not take a range, empty if it does
	terminating bool
	resolved    *allocator.Policy   // nil if invalid
	served      []v1alpha1.IPFamily // the families of which the API server gives Services addresses, empty while unknown
	serverPorts allocator.PortRange // the API server's range of node ports, zero while unknown
	conflicts   []allocator.Conflict
	heirs       map[netip.Prefix]string // other policies that declare precisely the same range
	registered  map[netip.Prefix]string // ServiceCIDRs by range
	ranges      map[netip.Prefix]allocator.Counts
	families    map[v1alpha1.IPFamily]allocator.Counts
	ports       allocator.Counts
	tally       tally
	covers      []string // of a policy that is being deleted, the first few Services, default/kubernetes before others
	clusterSize int      // how many nodes there are, selected or not
	unsettled   bool     // Services that the policy covers, or may cover, have not been looked at since the policies changed
	nodes       v1alpha1.PolicyNodesStatus
	unsupported []string  // the first few nodes that cannot do the mode, and what they can do
	localPorts  []string  // the selected nodes that give ports of nodePortRange to outgoing connections, and which
	nextReady   time.Time // when a range's grace ends
	shared      sharing
	kubeProxy   hosts
	leftOut     []string // nodes that the policy does not select
	grace       time.Duration
}

// maxNamed bounds how many nodes or conflicts a message names.
const maxNamed = 5

// view takes a policyView. It is not ok if the ledger has not seen this generation of the policy yet.
func (l *ledger) view(policy *v1alpha1.ServiceProxyPolicy, now time.Time) (policyView, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e := l.policies[policy.Name]
	if e == nil || e.api.UID != policy.UID || e.api.Generation != policy.Generation {
		return policyView{}, false
	}
	l.refresh(now)
	v := policyView{
		invalid: e.err, clash: e.clash(), terminating: policy.DeletionTimestamp != nil, nextReady: l.nextReady,
		unsettled: l.unsettled.of(policy.Name), served: l.families(), serverPorts: l.serverPorts,
		heirs: map[netip.Prefix]string{}, registered: map[netip.Prefix]string{},
		ranges: map[netip.Prefix]allocator.Counts{}, families: map[v1alpha1.IPFamily]allocator.Counts{},
	}
	if t := l.tallies[policy.Name]; t != nil {
		v.tally = *t
	}
	if v.terminating {
		v.covers = l.coveredBy(policy.Name)
	}
	for name, c := range l.cidrs {
		for _, p := range c.prefixes {
			if have := v.registered[p]; have == "" || name < have {
				v.registered[p] = name
			}
		}
	}
	for _, p := range l.resolved {
		if p.Name == policy.Name {
			v.resolved = p
			continue
		}
		for _, r := range p.Ranges {
			if r.Use == v1alpha1.RangeUseClusterIP && !p.Terminating {
				v.heirs[r.Prefix] = p.Name
			}
		}
	}
	for _, c := range l.conflicts {
		if c.Policy == policy.Name {
			v.conflicts = append(v.conflicts, c)
		}
	}
	if v.resolved != nil {
		for _, r := range v.resolved.Ranges {
			v.ranges[r.Prefix] = l.space.RangeCounts(policy.Name, r.Prefix)
			family := allocator.FamilyOf(r.Prefix.Addr())
			v.families[family] = l.space.FamilyCounts(policy.Name, family)
		}
		v.ports = l.space.PortCounts(policy.Name)
		v.countNodes(l.nodes, policy.Spec.ProxyMode)
		v.shared, v.kubeProxy, v.leftOut, v.grace = l.shared[policy.Name], l.kubeProxy, l.leftOut(v.resolved), l.options.HandBackGrace
	}
	return v, true
}

// coveredBy names the first few Services that a policy covers, default/kubernetes before others. Callers hold mu.
func (l *ledger) coveredBy(policy string) (out []string) {
	for key, a := range l.assignments {
		if a.policy == policy {
			out = append(out, key.String())
		}
	}
	slices.SortFunc(out, func(a, b string) int {
		if (a == kubernetesService) != (b == kubernetesService) {
			if a == kubernetesService {
				return -1
			}
			return 1
		}
		return strings.Compare(a, b)
	})
	if len(out) > maxNamed {
		out = append(out[:maxNamed:maxNamed], "...")
	}
	return out
}

func (v *policyView) countNodes(nodes map[string]nodeEntry, mode v1alpha1.ProxyMode) {
	mode = cmp.Or(mode, v1alpha1.ProxyModeNFTables)
	for name, n := range nodes {
		if n.exists {
			v.clusterSize++
		}
		if !n.exists || !v.resolved.SelectsNode(n.labels) {
			continue
		}
		v.nodes.Selected++
		if n.ready {
			v.nodes.Ready++
		}
		if ports := overlap(v.resolved.NodePorts, n.localPorts); ports != "" {
			v.localPorts = append(v.localPorts, name+" ("+ports+")")
		}
		var can []string
		able := len(n.modes) == 0 // it has not reported yet
		for _, m := range n.modes {
			if m.Available {
				can = append(can, string(m.Mode))
				able = able || m.Mode == mode
			}
		}
		if able {
			continue
		}
		v.nodes.Unsupported++
		slices.Sort(can)
		what := "no mode at all"
		if len(can) > 0 {
			what = strings.Join(can, ", ")
		}
		v.unsupported = append(v.unsupported, name+" (can do "+what+")")
	}
	slices.Sort(v.localPorts) // map order must not reach the status
	slices.Sort(v.unsupported)
	if len(v.unsupported) > maxNamed {
		v.unsupported = append(v.unsupported[:maxNamed:maxNamed], "...")
	}
}

// overlap says which ports of a range the local ones are, "" if none.
func overlap(ports allocator.PortRange, local []v1alpha1.NodePortRange) string {
	var out []string
	for _, r := range local {
		if both := ports.Intersect(allocator.PortRange{First: uint16(r.Start), Last: uint16(r.End)}); both.Size() > 0 {
			out = append(out, both.String())
		}
	}
	if len(out) > maxNamed {
		out = append(out[:maxNamed:maxNamed], "...")
	}
	return strings.Join(out, ", ")
}

// wholly says whether nothing of a range is left to the policy because older ones declare it.
func (v policyView) wholly(prefix netip.Prefix) bool {
	return slices.ContainsFunc(v.conflicts, func(c allocator.Conflict) bool { return c.Whole && c.Overlap == prefix })
}

// serves says whether Services of this cluster can have addresses of the range's family, and yes while that is not known.
func (v policyView) serves(prefix netip.Prefix) bool {
	return len(v.served) == 0 || slices.Contains(v.served, allocator.FamilyOf(prefix.Addr()))
}

// toRegister lists the ranges that the API server must know.
func (v policyView) toRegister() (out []netip.Prefix) {
	if v.resolved == nil || v.terminating || v.clash != "" {
		return nil
	}
	for _, r := range v.resolved.Ranges {
		if r.Use == v1alpha1.RangeUseClusterIP && !v.wholly(r.Prefix) && v.serves(r.Prefix) {
			out = append(out, r.Prefix)
		}
	}
	return out
}

// declares says whether the policy keeps a registered range. While its spec cannot be understood it keeps everything.
func (v policyView) declares(prefix netip.Prefix) bool {
	return !v.terminating && (v.resolved == nil || slices.ContainsFunc(v.resolved.Ranges, func(r allocator.Range) bool {
		return r.Prefix == prefix && r.Use == v1alpha1.RangeUseClusterIP
	}))
}

// declared lists the policy's ranges.
func (v policyView) declared() (out []netip.Prefix) {
	if v.resolved != nil {
		for _, r := range v.resolved.Ranges {
			out = append(out, r.Prefix)
		}
	}
	return out
}
