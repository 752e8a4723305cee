package programmed_test

import (
	"fmt"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// declare creates a policy that is accepted, for the nodes of a zone ("" for all).
func (c *cluster) declare(name, zone string, ranges ...v1alpha1.ServiceRange) *v1alpha1.ServiceProxyPolicy {
	c.t.Helper()
	p := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.ServiceProxyPolicySpec{ServiceRanges: ranges}}
	if zone != "" {
		p.Spec.NodeSelector.MatchLabels = map[string]string{"zone": zone}
	}
	c.Expect(c.Create(c.ctx, p)).To(Succeed())
	c.accept(p, metav1.ConditionTrue)
	return p
}

// accept plays the controller of policies.
func (c *cluster) accept(p *v1alpha1.ServiceProxyPolicy, status metav1.ConditionStatus) {
	c.t.Helper()
	meta.SetStatusCondition(&p.Status.Conditions, metav1.Condition{Type: v1alpha1.PolicyAccepted, Status: status, Reason: "Test", ObservedGeneration: p.Generation})
	c.Expect(c.Status().Update(c.ctx, p)).To(Succeed())
}

func clusterIPs(cidr string) v1alpha1.ServiceRange { return v1alpha1.ServiceRange{CIDR: cidr} }

// ranges are those that a node's agent is told, as "a b c".
func (c *cluster) ranges(node string) func() string {
	return func() string {
		s, err := c.state(node)
		if err != nil {
			return err.Error()
		}
		return strings.Join(s.Spec.ServiceRanges, " ")
	}
}

func TestNodesLearnTheRangesOfTheirPolicies(t *testing.T) {
	c := newCluster(t)
	c.addNode("early", map[string]string{"zone": "a"})
	everywhere := c.declare("everywhere", "", clusterIPs("fd00:99::/112"), clusterIPs("10.99.0.0/16"),
		v1alpha1.ServiceRange{CIDR: "10.98.0.0/16", Allocation: v1alpha1.RangeAllocationDraining}, v1alpha1.ServiceRange{CIDR: "192.0.2.0/24", Use: v1alpha1.RangeUseLoadBalancer})
	c.declare("zone-b", "b", clusterIPs("10.9.0.0/16"), clusterIPs("10.99.0.0/16"))
	c.addNode("late", map[string]string{"zone": "b"})
	c.Eventually(c.ranges("early")).Should(Equal("10.98.0.0/16 10.99.0.0/16 fd00:99::/112"))
	c.Eventually(c.ranges("late")).Should(Equal("10.9.0.0/16 10.98.0.0/16 10.99.0.0/16 fd00:99::/112"))

	// A node that is selected later.
	n := &corev1.Node{}
	c.Expect(c.Get(c.ctx, client.ObjectKey{Name: "early"}, n)).To(Succeed())
	n.Labels["zone"] = "b"
	c.Expect(c.Update(c.ctx, n)).To(Succeed())
	c.Eventually(c.ranges("early")).Should(HavePrefix("10.9.0.0/16 "))

	// Somebody else's hand is corrected, and a controller that starts later knows as much.
	s, err := c.state("late")
	c.Expect(err).NotTo(HaveOccurred())
	s.Spec.ServiceRanges = []string{"203.0.113.0/24"}
	c.Expect(c.Update(c.ctx, s)).To(Succeed())
	c.Eventually(c.ranges("late")).Should(Equal("10.9.0.0/16 10.98.0.0/16 10.99.0.0/16 fd00:99::/112"))
	c.stop()
	c.Expect(c.Delete(c.ctx, everywhere)).To(Succeed())
	c.start()
	c.Eventually(c.ranges("late")).Should(Equal("10.9.0.0/16 10.99.0.0/16"))
	c.Eventually(c.ranges("early")).Should(Equal("10.9.0.0/16 10.99.0.0/16"))
}

// A range that nobody has judged yet may be where pods and nodes are. Nodes would drop their traffic.
func TestOnlyAcceptedRangesAreDeclared(t *testing.T) {
	c := newCluster(t)
	c.addNode("a", nil)
	p := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: "tenant"}, Spec: v1alpha1.ServiceProxyPolicySpec{ServiceRanges: []v1alpha1.ServiceRange{clusterIPs("10.99.0.0/16")}}}
	c.Expect(c.Create(c.ctx, p)).To(Succeed())
	other := c.declare("other", "", clusterIPs("10.1.0.0/16"))
	c.Eventually(c.ranges("a")).Should(Equal("10.1.0.0/16"))
	c.accept(p, metav1.ConditionTrue)
	c.Eventually(c.ranges("a")).Should(Equal("10.1.0.0/16 10.99.0.0/16"))

	// Edited and not judged yet: what is left of the old ranges stays, what is new waits.
	p.Spec.ServiceRanges = append(p.Spec.ServiceRanges, clusterIPs("10.244.0.0/16"))
	c.Expect(c.Update(c.ctx, p)).To(Succeed())
	c.Expect(c.Delete(c.ctx, other)).To(Succeed())
	c.Eventually(c.ranges("a")).Should(Equal("10.99.0.0/16"))
	c.accept(p, metav1.ConditionFalse)
	c.Eventually(c.ranges("a")).Should(BeEmpty())
	c.accept(p, metav1.ConditionTrue)
	c.Eventually(c.ranges("a")).Should(Equal("10.99.0.0/16 10.244.0.0/16"))

	// Being deleted, held by what it covers.
	controllerutil.AddFinalizer(p, v1alpha1.FinalizerPolicy)
	c.Expect(c.Update(c.ctx, p)).To(Succeed())
	c.accept(p, metav1.ConditionTrue)
	c.Expect(c.Delete(c.ctx, p)).To(Succeed())
	c.Eventually(c.ranges("a")).Should(BeEmpty())
	c.Expect(c.Get(c.ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
	controllerutil.RemoveFinalizer(p, v1alpha1.FinalizerPolicy)
	c.Expect(c.Update(c.ctx, p)).To(Succeed())
}

// Every write reaches an agent.
func TestRangesAreWrittenOnlyWhenTheyChange(t *testing.T) {
	c := newCluster(t)
	p := c.declare("tenant", "", clusterIPs("10.99.0.0/16"))
	var names []string
	for i := range 20 {
		names = append(names, fmt.Sprintf("n%02d", i))
		c.addNode(names[i], nil)
		c.Eventually(c.ranges(names[i])).Should(Equal("10.99.0.0/16"))
	}
	generations := func() map[string]int64 {
		var l v1alpha1.NodeProxyStateList
		c.Expect(c.List(c.ctx, &l)).To(Succeed())
		m := map[string]int64{}
		for i := range l.Items {
			m[l.Items[i].Name] = l.Items[i].Generation
		}
		return m
	}
	before := generations()
	p.Spec.Priority = 7
	p.Spec.ServiceRanges[0].Allocation = v1alpha1.RangeAllocationManual
	c.Expect(c.Update(c.ctx, p)).To(Succeed())
	c.accept(p, metav1.ConditionTrue)
	c.stop()
	c.start()
	c.declare("canary", "", clusterIPs("10.1.0.0/16"))
	for _, name := range names {
		c.Eventually(c.ranges(name)).Should(Equal("10.1.0.0/16 10.99.0.0/16"))
	}
	for name, generation := range generations() {
		if generation != before[name]+1 {
			t.Errorf("%s was written %d times, want once: for the canary", name, generation-before[name])
		}
	}
	if len(before) != len(names) {
		t.Errorf("there are %d states of %d nodes", len(before), len(names))
	}
}
