package controllers

import (
	"strings"
	"testing"

	apimeta "k8s.io/apimachinery/pkg/api/meta"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
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
