package programmed

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

func acceptedPolicy(ranges ...string) *v1alpha1.ServiceProxyPolicy {
	p := &v1alpha1.ServiceProxyPolicy{Status: v1alpha1.ServiceProxyPolicyStatus{Conditions: []metav1.Condition{{Type: v1alpha1.PolicyAccepted, Status: metav1.ConditionTrue}}}}
	for _, r := range ranges {
		p.Spec.ServiceRanges = append(p.Spec.ServiceRanges, v1alpha1.ServiceRange{CIDR: r})
	}
	return p
}

// One range more than the schema takes must not keep the rest, or the report interval, from a node.
func TestNoMoreRangesThanTheSchemaTakes(t *testing.T) {
	d := newDeclarations()
	for policy := range maxServiceRanges/16 + 1 {
		var ranges []string
		for i := range 16 {
			ranges = append(ranges, fmt.Sprintf("10.%d.%d.0/28", policy/16, policy%16*16+i))
		}
		d.set(fmt.Sprint(policy), declarationOf(acceptedPolicy(ranges...)))
	}
	got := d.forNode(labels.Set{}, nil)
	if len(got) != maxServiceRanges || got[0] != "10.0.0.0/28" || !slices.IsSortedFunc(got, func(a, b string) int { return netip.MustParsePrefix(a).Compare(netip.MustParsePrefix(b)) }) {
		t.Errorf("%d ranges, from %s", len(got), got[0])
	}
}

func TestDeclarationsChangeOnlyWithWhatNodesAreTold(t *testing.T) {
	d := newDeclarations()
	p := acceptedPolicy("10.99.0.0/16", "fd00:99::/112")
	if !d.set("a", declarationOf(p)) {
		t.Error("a new declaration is no change")
	}
	p.Spec.Priority = 3
	p.Spec.ServiceRanges[0], p.Spec.ServiceRanges[1] = p.Spec.ServiceRanges[1], p.Spec.ServiceRanges[0]
	p.Spec.ServiceRanges[0].Reserved = []string{"fd00:99::1"}
	if d.set("a", declarationOf(p)) {
		t.Error("a change of what nodes are not told is one")
	}
	p.Spec.NodeSelector.MatchLabels = map[string]string{"zone": "a"}
	if !d.set("a", declarationOf(p)) || len(d.forNode(labels.Set{}, nil)) != 0 || len(d.forNode(labels.Set{"zone": "a"}, nil)) != 2 {
		t.Error("another node selector is no change")
	}
	if !d.set("a", declaration{}) || d.set("a", declaration{}) || len(d.forNode(labels.Set{"zone": "a"}, nil)) != 0 {
		t.Error("the end of a declaration is one change")
	}
}

// BenchmarkForNode is what one node costs when a policy changes, in a cluster with a hundred policies.
func BenchmarkForNode(b *testing.B) {
	d := newDeclarations()
	for i := range 100 {
		p := acceptedPolicy(fmt.Sprintf("10.%d.0.0/16", i), fmt.Sprintf("fd00:%x::/112", i))
		p.Spec.NodeSelector.MatchLabels = map[string]string{"zone": fmt.Sprint(i % 3)}
		d.set(fmt.Sprint(i), declarationOf(p))
	}
	b.ReportAllocs()
	for b.Loop() {
		d.forNode(labels.Set{"zone": "1", "kubernetes.io/hostname": "n"}, nil)
	}
}
