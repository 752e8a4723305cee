package controllers

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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

// Two nodes give ports of the policy's range to outgoing connections, one has reserved them, one is not selected.
func TestNodePortsThatAreLocalPorts(t *testing.T) {
	selected := map[string]string{"edge": "yes"}
	local := func(ends ...int32) (out []v1alpha1.NodePortRange) {
		for i := 0; i < len(ends); i += 2 {
			out = append(out, v1alpha1.NodePortRange{Start: ends[i], End: ends[i+1]})
		}
		return out
	}
	nodes := map[string]nodeEntry{
		"b":        {exists: true, labels: selected, localPorts: local(32768, 60999)},
		"a":        {exists: true, labels: selected, localPorts: local(1024, 30999, 33001, 60999)},
		"reserved": {exists: true, labels: selected, localPorts: local(1024, 29999, 33001, 60999)},
		"silent":   {exists: true, labels: selected},
		"other":    {exists: true, localPorts: local(1024, 65535)},
	}
	resolved, err := allocator.ParsePolicy(&v1alpha1.ServiceProxyPolicy{Spec: v1alpha1.ServiceProxyPolicySpec{
		NodePortRange: &v1alpha1.NodePortRange{Start: 30000, End: 33000},
		NodeSelector:  metav1.LabelSelector{MatchLabels: selected},
	}})
	if err != nil {
		t.Fatal(err)
	}
	v := policyView{resolved: resolved}
	v.countNodes(nodes, v1alpha1.ProxyModeNFTables)
	all := v.conditions()
	c := apimeta.FindStatusCondition(all, v1alpha1.PolicyNodePortsExclusive)
	const want = "2 selected nodes give ports of nodePortRange 30000-33000 to outgoing connections, too, so that one may be taken when it is needed: " +
		"a (30000-30999), b (32768-33000); set net.ipv4.ip_local_reserved_ports=30000-33000 "
	if c == nil || c.Status != metav1.ConditionFalse || c.Reason != reasonLocalPorts || !strings.HasPrefix(c.Message, want) {
		t.Errorf("got %+v\nwant False, %s: %s", c, reasonLocalPorts, want)
	}
	if ready := apimeta.FindStatusCondition(all, v1alpha1.PolicyReady); ready.Reason == reasonLocalPorts {
		t.Error("a policy is not ready because a port may be taken some day")
	}
	delete(nodes, "a")
	delete(nodes, "b")
	v = policyView{resolved: resolved}
	v.countNodes(nodes, v1alpha1.ProxyModeNFTables)
	if c := v.nodePortsExclusive(); c.Status != metav1.ConditionTrue {
		t.Errorf("got %+v although the nodes keep off these ports", c)
	}
}

// A policy without selectors covers default/kubernetes, which kube-proxy keeps. That must not keep those waiting who wait for TakenOver.
func TestTakenOverDoesNotWaitForTheAPIServersService(t *testing.T) {
	l := newLedger(Options{}.withDefaults())
	for _, name := range []string{"kubernetes", "web"} {
		l.onAssignment(nil, &v1alpha1.ServiceAssignment{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Labels: ourLabels("all")}, Spec: v1alpha1.ServiceAssignmentSpec{PolicyName: "all"}})
	}
	view := policyView{resolved: &allocator.Policy{}, kubeProxy: hosts{some: true}, shared: sharing{keeps: true, takes: true}}
	state := func() string {
		view.tally = *l.tallies["all"]
		c := view.takenOver()
		return c.Reason + ": " + c.Message
	}
	if got, want := state(), "WaitingForProgrammed: kube-proxy leaves 0 of 1 covered Services to us; "; !strings.HasPrefix(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	l.onService(nil, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web", Labels: map[string]string{v1alpha1.LabelServiceProxyName: v1alpha1.ServiceProxyName},
		Annotations: map[string]string{v1alpha1.AnnotationTakenOver: "all"}}})
	view.unsettled = true
	if got, want := state(), "WaitingForProgrammed: not every Service"; !strings.HasPrefix(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	view.unsettled = false
	if got, want := state(), "TakenOver: kube-proxy leaves all 1 covered Services to us; it goes on with default/kubernetes, too, for nodes that boot"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Nodes flap. Admission waits for what follows from it, so that is not everything that policies declare.
func TestNodesThatFlapOnlyChangeTheSharing(t *testing.T) {
	l := newLedger(Options{}.withDefaults())
	deleted := metav1.Now()
	l.onPolicy(nil, &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: "all", UID: "1", DeletionTimestamp: &deleted}})
	settled := func() *allocator.Policy {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.refresh(time.Now())
		return l.resolved[0]
	}
	before := settled()
	for _, name := range []string{"a", "b"} {
		l.onNode(nil, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}}})
	}
	if settled() != before || l.kubeProxy.some || len(l.kubeProxy.silent) != 2 {
		t.Errorf("got %+v", l.kubeProxy)
	}
	for _, name := range []string{"a", "b"} {
		l.onNodeProxyState(nil, &v1alpha1.NodeProxyState{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: v1alpha1.NodeProxyStateStatus{KubeProxy: v1alpha1.KubeProxyIPTables}})
	}
	if now := settled(); now == before || before.HandsBack || !now.HandsBack || !l.sharing("all").handsBack {
		t.Errorf("the policy is not handed back, or somebody who reads it saw it change: %+v", l.sharing("all"))
	}
}
