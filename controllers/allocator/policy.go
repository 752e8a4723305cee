package allocator

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// LabelServiceProxyName hands a Service to a proxy other than kube-proxy.
const LabelServiceProxyName = v1alpha1.LabelServiceProxyName

// Policy is a ServiceProxyPolicy parsed once. It is immutable.
type Policy struct {
	Name    string
	UID     string
	Created time.Time
	// Terminating policies give out nothing new and keep the Services that they cover already.
	Terminating bool
	Priority    int32
	// HandsBack says of a policy that is being deleted that kube-proxy is there to take over what it covers. The caller sets it. It then keeps only what
	// kube-proxy would not take: Services with a label of the user's.
	HandsBack bool
	// Strict policies refuse a Service that cannot get what they declare.
	Strict    bool
	Ranges    []Range
	NodePorts PortRange
	// NodePortsExcluded are ports of NodePorts that belong to an older policy.
	NodePortsExcluded []PortRange
	// Quarantine is how long what a Service released rests before another gets it, StickyFor how long it is kept for a Service of the
	// same namespace and name.
	Quarantine, StickyFor time.Duration

	namespaces, services, nodes labels.Selector
	coexist                     bool
}

// Range is one range of service addresses.
type Range struct {
	Prefix     netip.Prefix
	Use        v1alpha1.RangeUse
	Allocation v1alpha1.RangeAllocation
	// Excluded addresses are never given out: the range's reserved list, and what an older policy declares too.
	Excluded []netip.Prefix
	// Usable says that addresses can be given out now. The caller sets it when the API server knows the range.
	Usable bool
}

// PortRange is a range of node ports, both ends included. The zero value is empty.
type PortRange struct{ First, Last uint16 }

// Size is how many ports the range has.
func (r PortRange) Size() int {
	if r.First == 0 {
		return 0
	}
	return int(r.Last) - int(r.First) + 1
}

// Contains says whether the range has the port.
func (r PortRange) Contains(p uint16) bool { return r.First != 0 && r.First <= p && p <= r.Last }

func (r PortRange) overlaps(o PortRange) bool {
	return r.First != 0 && o.First != 0 && r.First <= o.Last && o.First <= r.Last
}

// Intersect is what both ranges have.
func (r PortRange) Intersect(o PortRange) PortRange {
	if !r.overlaps(o) {
		return PortRange{}
	}
	return PortRange{max(r.First, o.First), min(r.Last, o.Last)}
}

func (r PortRange) String() string { return fmt.Sprintf("%d-%d", r.First, r.Last) }

// DefaultQuarantine is how long a released lock rests if its policy does not say.
const DefaultQuarantine = time.Minute

// ParsePolicy turns the API object into a Policy. It fails only on what the API's own validation refuses, and then names the field.
func ParsePolicy(p *v1alpha1.ServiceProxyPolicy) (*Policy, error) {
	out := &Policy{
		Name: p.Name, UID: string(p.UID), Created: p.CreationTimestamp.Time, Terminating: p.DeletionTimestamp != nil,
		Priority: p.Spec.Priority, Strict: p.Spec.Enforcement == v1alpha1.EnforcementStrict, coexist: p.Spec.KubeProxy == v1alpha1.KubeProxyCoexist,
		Quarantine: DefaultQuarantine,
	}
	var errs []error
	selector := func(field string, s *metav1.LabelSelector) labels.Selector {
		sel, err := metav1.LabelSelectorAsSelector(s)
		if err != nil {
			errs = append(errs, fmt.Errorf("spec.%s: %w", field, err))
			return labels.Nothing()
		}
		return sel
	}
	out.namespaces = selector("namespaceSelector", &p.Spec.NamespaceSelector)
	out.services = selector("serviceSelector", &p.Spec.ServiceSelector)
	out.nodes = selector("nodeSelector", &p.Spec.NodeSelector)
	for i, r := range p.Spec.ServiceRanges {
		parsed, err := parseRange(r)
		if err != nil {
			errs = append(errs, fmt.Errorf("spec.serviceRanges[%d]: %w", i, err))
			continue
		}
		out.Ranges = append(out.Ranges, parsed)
	}
	if r := p.Spec.NodePortRange; r != nil {
		if r.Start < 1 || r.End > 65535 || r.Start > r.End {
			errs = append(errs, fmt.Errorf("spec.nodePortRange: %d-%d is not a range of ports", r.Start, r.End))
		} else {
			out.NodePorts = PortRange{uint16(r.Start), uint16(r.End)}
		}
	}
	if q := p.Spec.Reuse.Quarantine; q != nil {
		out.Quarantine = q.Duration
	}
	if s := p.Spec.Reuse.StickyFor; s != nil {
		out.StickyFor = s.Duration
	}
	return out, errors.Join(errs...)
}

func parseRange(r v1alpha1.ServiceRange) (Range, error) {
	prefix, err := netip.ParsePrefix(r.CIDR)
	if err != nil {
		return Range{}, fmt.Errorf("cidr %q: %w", r.CIDR, err)
	}
	if prefix != prefix.Masked() || prefix.Addr().Is4In6() || prefix.Addr().Is6() && prefix.Bits() < 64 {
		return Range{}, fmt.Errorf("cidr %q: host bits must be zero and an IPv6 prefix at least 64 bits long", r.CIDR)
	}
	out := Range{Prefix: prefix, Use: cmp.Or(r.Use, v1alpha1.RangeUseClusterIP), Allocation: cmp.Or(r.Allocation, v1alpha1.RangeAllocationAutomatic)}
	for _, s := range r.Reserved {
		reserved, err := parsePrefixOrAddr(s)
		if err != nil {
			return Range{}, fmt.Errorf("reserved %q: %w", s, err)
		}
		out.Excluded = append(out.Excluded, reserved)
	}
	return out, nil
}

func parsePrefixOrAddr(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	return p.Masked(), err
}

// RestFor is how long a lock that a Service of this policy released rests, before anybody else can get it.
func (p *Policy) RestFor() time.Duration { return max(p.Quarantine, p.StickyFor) }

// RangeOf finds the range of the policy that holds the address, nil if none does.
func (p *Policy) RangeOf(a netip.Addr) *Range {
	for i := range p.Ranges {
		if p.Ranges[i].Prefix.Contains(a) {
			return &p.Ranges[i]
		}
	}
	return nil
}

// Gives says whether the policy gives Services cluster IPs of a family without being asked for a particular one.
func (p *Policy) Gives(family v1alpha1.IPFamily) bool {
	return slices.ContainsFunc(p.Ranges, func(r Range) bool {
		return r.Use == v1alpha1.RangeUseClusterIP && r.Allocation == v1alpha1.RangeAllocationAutomatic && FamilyOf(r.Prefix.Addr()) == family
	})
}

// SelectsNode says whether the policy's Services are forwarded on a node with these labels.
func (p *Policy) SelectsNode(nodeLabels map[string]string) bool {
	return p.nodes.Matches(labels.Set(nodeLabels))
}

// SelectsAllNodes says whether the policy asks for all nodes, whatever labels they have.
func (p *Policy) SelectsAllNodes() bool { return p.nodes.Empty() }

// TakesOver says whether the policy covers Services that kube-proxy forwards as well, so that kube-proxy has to be told to let go.
func (p *Policy) TakesOver() bool { return !p.coexist }

// TakenOver says whether the Service's service-proxy-name label is one that we set, to be removed by us again.
func TakenOver(svc *corev1.Service) bool {
	_, claimed := svc.Annotations[v1alpha1.AnnotationTakenOver]
	return claimed && svc.Labels[LabelServiceProxyName] == v1alpha1.ServiceProxyName
}

// userLabels are the labels without the one that we set: it must not change what selectors select, or a Service would leave its policy by being taken over.
func userLabels(svc *corev1.Service) labels.Set {
	if !TakenOver(svc) {
		return svc.Labels
	}
	out := maps.Clone(svc.Labels)
	delete(out, LabelServiceProxyName)
	return out
}

// Matches says whether the policy's selectors select the Service, whatever other policies do. The label that we set for a policy with TakeOver counts as none.
func (p *Policy) Matches(svc *corev1.Service, namespaceLabels map[string]string) bool {
	set := userLabels(svc)
	if p.coexist && set[LabelServiceProxyName] != v1alpha1.ServiceProxyName {
		return false
	}
	return p.services.Matches(set) && p.namespaces.Matches(labels.Set(namespaceLabels))
}

// keeps says whether the policy, which is being deleted, keeps a Service that it covers.
func (p *Policy) keeps(svc *corev1.Service) bool {
	_, byUser := userLabels(svc)[LabelServiceProxyName]
	return byUser || !p.HandsBack
}

// Coverable says whether any policy may cover the Service: headless and ExternalName Services have no address, and a
// service-proxy-name label other than ours belongs to another proxy.
func Coverable(svc *corev1.Service) bool {
	if svc.Spec.Type == corev1.ServiceTypeExternalName || svc.Spec.ClusterIP == corev1.ClusterIPNone {
		return false
	}
	name, labelled := svc.Labels[LabelServiceProxyName]
	return !labelled || name == v1alpha1.ServiceProxyName
}

// SortByPrecedence puts the policy that wins first: the highest priority, then the oldest, then the first by name.
func SortByPrecedence(policies []*Policy) {
	slices.SortFunc(policies, func(a, b *Policy) int {
		return cmp.Or(cmp.Compare(b.Priority, a.Priority), a.Created.Compare(b.Created), cmp.Compare(a.Name, b.Name))
	})
}

// Select finds the policy that covers the Service among policies sorted by precedence, nil if none does. current names the policy that
// covers it so far, if any: a policy that is being deleted covers only what it covers already, and of this only what nobody else would take.
func Select(policies []*Policy, svc *corev1.Service, namespaceLabels map[string]string, current string) *Policy {
	if !Coverable(svc) {
		return nil
	}
	for _, p := range policies {
		if (!p.Terminating || p.Name == current && p.keeps(svc)) && p.Matches(svc, namespaceLabels) {
			return p
		}
	}
	return nil
}

// Conflict is something that two policies both declare. The older one, With, has it; Policy does not give it out.
type Conflict struct {
	Policy, With string
	// Overlap is the smaller of two overlapping ranges of addresses, or the zero Prefix for a conflict of node ports.
	Overlap netip.Prefix
	// Ports are the node ports that both declare.
	Ports PortRange
	// Whole says that nothing of the policy's range is left.
	Whole bool
}

func (c Conflict) String() string {
	if c.Ports.First != 0 {
		return fmt.Sprintf("node ports %s belong to the older policy %s", c.Ports, c.With)
	}
	return fmt.Sprintf("%s belongs to the older policy %s", c.Overlap, c.With)
}

// Resolve settles what several policies declare: the older policy (then the first by name) has it, and the others' ranges exclude it.
// The result is sorted by precedence, the input is not changed.
func Resolve(policies []*Policy) ([]*Policy, []Conflict) {
	sorted := slices.Clone(policies)
	slices.SortFunc(sorted, byAge)
	var conflicts []Conflict
	for i, p := range sorted {
		resolved := *p
		resolved.Ranges = slices.Clone(p.Ranges)
		for _, older := range sorted[:i] {
			conflicts = append(conflicts, resolved.yieldTo(older)...)
		}
		sorted[i] = &resolved
	}
	SortByPrecedence(sorted)
	return sorted, conflicts
}

// byAge orders policies by their rights to what several declare.
func byAge(a, b *Policy) int {
	return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Name, b.Name))
}

// yieldTo excludes from p's ranges what older declares.
func (p *Policy) yieldTo(older *Policy) []Conflict {
	var conflicts []Conflict
	for i := range p.Ranges {
		mine := &p.Ranges[i]
		for _, theirs := range older.Ranges {
			if !mine.Prefix.Overlaps(theirs.Prefix) {
				continue
			}
			whole := theirs.Prefix.Bits() <= mine.Prefix.Bits()
			overlap := theirs.Prefix
			if whole {
				overlap = mine.Prefix
			}
			mine.Excluded = append(slices.Clone(mine.Excluded), overlap)
			conflicts = append(conflicts, Conflict{Policy: p.Name, With: older.Name, Overlap: overlap, Whole: whole})
		}
	}
	if both := p.NodePorts.Intersect(older.NodePorts); both.Size() > 0 {
		p.NodePortsExcluded = append(slices.Clone(p.NodePortsExcluded), both)
		conflicts = append(conflicts, Conflict{Policy: p.Name, With: older.Name, Ports: both, Whole: both == p.NodePorts})
	}
	return conflicts
}
