package controllers

import (
	"net/netip"
	"strings"
	"testing"

	apimeta "k8s.io/apimachinery/pkg/api/meta"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

func TestProgrammedSaysHowManyAreMissing(t *testing.T) {
	c := policyView{tally: tally{covered: 3, programmed: 1}}.programmed()
	if c.Reason != reasonProgramming || !strings.HasPrefix(c.Message, "1 of 3 covered Services") {
		t.Errorf("got %s: %s", c.Reason, c.Message)
	}
}

// A policy without selectors covers default/kubernetes, which can be neither deleted nor relabelled for good: narrowing the selectors must be offered.
func TestDeletionSaysWhatLetsItEnd(t *testing.T) {
	var status v1alpha1.ServiceProxyPolicyStatus
	setDeleting(&status, &v1alpha1.ServiceProxyPolicy{}, 0, 0, policyView{tally: tally{covered: 1}})
	c := apimeta.FindStatusCondition(status.Conditions, v1alpha1.PolicyReady)
	if c == nil || c.Reason != reasonDeletionWaits || !strings.Contains(c.Message, "narrow the policy's selectors") {
		t.Errorf("got %+v", c)
	}
}

// The API server refuses a status that lists one range twice.
func TestEachRangeIsListedOnce(t *testing.T) {
	kept, gone := netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("10.2.0.0/24")
	view := policyView{terminating: true, resolved: &allocator.Policy{Ranges: []allocator.Range{{Prefix: kept, Use: v1alpha1.RangeUseClusterIP}}}}
	status := policyStatus(&v1alpha1.ServiceProxyPolicy{}, view, []drainedRange{{prefix: kept, foreign: 1}, {prefix: gone, claims: 1}})
	var listed []string
	for _, r := range status.ServiceRanges {
		listed = append(listed, r.CIDR)
	}
	if strings.Join(listed, " ") != "10.1.0.0/24 10.2.0.0/24" {
		t.Errorf("lists %q", listed)
	}
}
