package controllers

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// moving are the options of specs that hand Services back.
func moving(grace time.Duration) Options {
	o := quick
	o.HandBackGrace, o.TakeOverRate = grace, 1000
	return o
}

// node makes a node, until the spec ends, whose agent reports where kube-proxy is, if anything.
func (t *tenant) node(name string, kubeProxy v1alpha1.KubeProxyPresence, labels map[string]string) {
	GinkgoHelper()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name + "-" + t.name, Labels: labels}}
	Expect(k8s.Create(ctx, node)).To(Succeed())
	DeferCleanup(func() { Expect(client.IgnoreNotFound(k8s.Delete(ctx, node))).To(Succeed()) })
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	Expect(k8s.Status().Update(ctx, node)).To(Succeed())
	state := &v1alpha1.NodeProxyState{ObjectMeta: metav1.ObjectMeta{Name: node.Name}}
	Expect(k8s.Create(ctx, state)).To(Succeed())
	DeferCleanup(func() { Expect(client.IgnoreNotFound(k8s.Delete(ctx, state))).To(Succeed()) })
	if kubeProxy != "" {
		t.kubeProxy(name, kubeProxy)
	}
}

func (t *tenant) kubeProxy(node string, presence v1alpha1.KubeProxyPresence) {
	GinkgoHelper()
	state := &v1alpha1.NodeProxyState{ObjectMeta: metav1.ObjectMeta{Name: node + "-" + t.name}}
	Expect(k8s.Status().Patch(ctx, state, client.RawPatch(types.MergePatchType, fmt.Appendf(nil, `{"status":{"kubeProxy":%q}}`, presence)))).To(Succeed())
}

// programmed makes the assignment of a Service Programmed, as it is when it comes to be.
func (t *tenant) programmed(names ...string) {
	GinkgoHelper()
	for _, name := range names {
		Eventually(func() any { return t.assignment(name) }).ShouldNot(BeNil())
		t.nodesHold(name, "Programmed", 3)
	}
}

// label gives "LABEL by POLICY" of a Service, without the second if nobody claims the label.
func (t *tenant) label(name string) func() string {
	return func() string {
		var svc corev1.Service
		if err := k8s.Get(ctx, client.ObjectKey{Namespace: t.name, Name: name}, &svc); err != nil {
			return err.Error()
		}
		out := svc.Labels[v1alpha1.LabelServiceProxyName]
		if by, claimed := svc.Annotations[v1alpha1.AnnotationTakenOver]; claimed {
			out += " by " + by
		}
		return out
	}
}

const handedOver = v1alpha1.ServiceProxyName

func labelled(with string) func(*corev1.Service) {
	return func(s *corev1.Service) { s.Labels = map[string]string{v1alpha1.LabelServiceProxyName: with} }
}

var _ = Describe("TakeOver", func() {
	It("labels a Service once every node forwards it, and says how far it got", func() {
		t := newTenant()
		t.node("n1", v1alpha1.KubeProxyNFTables, nil)
		t.node("n2", v1alpha1.KubeProxyAbsent, nil)
		p := t.policy("", nil)
		t.service("a", nil)
		t.service("b", nil)
		t.service("mine", labelled(handedOver))
		t.service("other", labelled("cilium"))
		startManager(moving(time.Minute), nil)
		t.programmed("mine", "a")
		Eventually(t.label("a")).Should(Equal(handedOver + " by " + t.name))
		Eventually(policyCondition(p, v1alpha1.PolicyTakenOver)).Should(Equal("False WaitingForProgrammed: kube-proxy leaves 2 of 3 covered Services to us; the others are not forwarded by every Ready node yet: kubectl get svca -A tells which"))
		Consistently(t.label("b")).Should(BeEmpty())

		t.nodesHold("b", v1alpha1.ReasonNoReadyEndpoints, 3)
		Eventually(t.label("b")).Should(Equal(handedOver+" by "+t.name), "nodes refuse its connections, as kube-proxy does")
		Eventually(policyCondition(p, v1alpha1.PolicyTakenOver)).Should(Equal("True TakenOver: kube-proxy leaves all 3 covered Services to us"))
		Expect(p.Status.Services.TakenOver).To(BeEquivalentTo(2))
		Expect(t.label("mine")()).To(Equal(handedOver))
		Expect(t.label("other")()).To(Equal("cilium"))

		By("somebody removes the label: it is put back")
		mergePatch(t.existing("a"), map[string]any{"metadata": map[string]any{"labels": map[string]any{v1alpha1.LabelServiceProxyName: nil}}})
		Eventually(t.label("a")).Should(Equal(handedOver + " by " + t.name))
		Consistently(t.label("a")).Should(Equal(handedOver + " by " + t.name))
		Expect(t.assignment("a")).NotTo(BeNil())
	})

	It("touches no Service where kube-proxy runs on no node, until it does", func() {
		t := newTenant()
		t.node("n1", v1alpha1.KubeProxyStopped, nil)
		p := t.policy("", nil)
		t.service("a", nil)
		startManager(moving(time.Minute), nil)
		t.programmed("a")
		Eventually(policyCondition(p, v1alpha1.PolicyTakenOver)).Should(HavePrefix("True NoKubeProxy"))
		Consistently(t.label("a")).Should(BeEmpty())
		t.kubeProxy("n1", v1alpha1.KubeProxyIPTables)
		Eventually(t.label("a")).Should(Equal(handedOver + " by " + t.name))

		By("kube-proxy goes: what was taken over stays so")
		t.kubeProxy("n1", v1alpha1.KubeProxyAbsent)
		Eventually(policyCondition(p, v1alpha1.PolicyTakenOver)).Should(HavePrefix("True NoKubeProxy"))
		Consistently(t.label("a")).Should(Equal(handedOver + " by " + t.name))
	})

	It("needs a nodeSelector that selects all nodes, and hands back when one is left out", func() {
		t := newTenant()
		t.node("n1", v1alpha1.KubeProxyNFTables, map[string]string{"pool": t.name})
		t.node("n2", v1alpha1.KubeProxyNFTables, nil)
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.NodeSelector.MatchLabels = map[string]string{"pool": t.name}
		})
		t.service("a", nil)
		startManager(moving(time.Second), nil)
		t.programmed("a")
		Eventually(policyCondition(p, v1alpha1.PolicyTakenOver)).Should(HavePrefix("False NodesNotSelected: kube-proxy goes on with the covered Services, because nodeSelector leaves nodes to it: n2-" + t.name))
		Consistently(t.label("a")).Should(BeEmpty())

		By("all nodes are selected")
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) { s.NodeSelector = metav1.LabelSelector{} })
		Eventually(func() any { return t.assignment("a").Spec.NodeSelector.MatchLabels }).Should(BeEmpty())
		t.programmed("a")
		Eventually(t.label("a")).Should(Equal(handedOver + " by " + t.name))

		By("they are not any more: nodes that are left out stop only when kube-proxy has had time")
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.NodeSelector.MatchLabels = map[string]string{"pool": t.name}
		})
		Eventually(t.label("a")).Should(BeEmpty())
		back := time.Now()
		Expect(t.assignment("a").Spec.NodeSelector.MatchLabels).To(BeEmpty())
		Eventually(func() any { return t.assignment("a").Spec.NodeSelector.MatchLabels }).ShouldNot(BeEmpty())
		Expect(time.Since(back)).To(BeNumerically(">", 700*time.Millisecond))
		Eventually(func() any { return t.assignment("a").Annotations }).ShouldNot(HaveKey(v1alpha1.AnnotationHandingBack))
	})
})

var _ = Describe("TakeOver beside what is not well", func() {
	It("waits for agents on Ready nodes to report, and leaves alone what was taken over", func() {
		t := newTenant()
		t.node("n1", v1alpha1.KubeProxyNFTables, nil)
		p := t.policy("", nil)
		t.service("a", nil)
		startManager(moving(time.Minute), nil)
		t.programmed("a")
		Eventually(t.label("a")).Should(Equal(handedOver + " by " + t.name))

		By("a node joins, and its agent is not there yet: what was Programmed before says nothing of it")
		t.node("n2", "", nil)
		t.service("b", nil)
		t.programmed("b")
		Eventually(policyCondition(p, v1alpha1.PolicyTakenOver)).Should(Equal("False AgentSilent: kube-proxy leaves 1 of 2 covered Services to us, and keeps the others while agents on Ready nodes do not report: n2-" + t.name))
		Consistently(t.label("b")).Should(BeEmpty())
		t.kubeProxy("n2", v1alpha1.KubeProxyNFTables)
		Eventually(t.label("b")).Should(Equal(handedOver + " by " + t.name))

		By("an agent falls silent")
		state := &v1alpha1.NodeProxyState{ObjectMeta: metav1.ObjectMeta{Name: "n2-" + t.name}}
		Expect(k8s.Status().Patch(ctx, state, client.RawPatch(types.MergePatchType, fmt.Appendf(nil,
			`{"status":{"conditions":[{"type":"Ready","status":"Unknown","reason":"AgentSilent","message":"","lastTransitionTime":%q}]}}`, time.Now().UTC().Format(time.RFC3339))))).To(Succeed())
		t.service("c", nil)
		t.programmed("c")
		Eventually(policyCondition(p, v1alpha1.PolicyTakenOver)).Should(HavePrefix("False AgentSilent: kube-proxy leaves 2 of 3 covered Services to us"))
		Consistently(t.label("c")).Should(BeEmpty())
		Expect(t.label("a")()).To(Equal(handedOver + " by " + t.name))
	})

	It("does not fight for the label all the time", func() {
		t := newTenant()
		t.node("n1", v1alpha1.KubeProxyNFTables, nil)
		t.policy("", nil)
		t.service("a", nil)
		startManager(moving(time.Minute), nil)
		t.programmed("a")
		labelled := 0
		for begun := time.Now(); time.Since(begun) < 2500*time.Millisecond; { // after 0 s, 1 s, 3 s
			if t.label("a")() != "" {
				labelled++
				mergePatch(t.existing("a"), map[string]any{"metadata": map[string]any{"labels": map[string]any{v1alpha1.LabelServiceProxyName: nil}, "annotations": map[string]any{v1alpha1.AnnotationTakenOver: nil}}})
			}
		}
		Expect(labelled).To(BeNumerically("<=", 2))
		Eventually(t.label("a")).Should(Equal(handedOver+" by "+t.name), "the fight is over")
	})
})

var _ = Describe("going back to kube-proxy", func() {
	// takenOver makes a policy that has taken Service a over.
	takenOver := func(grace time.Duration) (*tenant, *v1alpha1.ServiceProxyPolicy) {
		GinkgoHelper()
		t := newTenant()
		t.node("n1", v1alpha1.KubeProxyNFTables, nil)
		p := t.policy("", ranges(t.v4))
		svc := t.service("a", func(s *corev1.Service) {
			s.Spec.Type, s.Spec.ExternalTrafficPolicy = corev1.ServiceTypeLoadBalancer, corev1.ServiceExternalTrafficPolicyLocal
		})
		startManager(moving(grace), nil)
		t.allocated(svc) // its last generation
		t.programmed("a")
		Eventually(t.label("a")).Should(Equal(handedOver + " by " + t.name))
		Eventually(policyCondition(p, v1alpha1.PolicyTakenOver)).Should(HavePrefix("True TakenOver")) // who is quicker is not told of it
		return t, p
	}
	gone := func(t *tenant) func() bool { return func() bool { return t.assignment("a") == nil } }

	It("takes the label away first, and the assignment only after a while", func() {
		t, p := takenOver(time.Second)
		Expect(t.assignment("a").Spec.HealthCheckNodePort).NotTo(BeZero())
		own := t.assignment("a").Spec.ServiceIPs
		Expect(own).To(HaveLen(2), "its own, and one of the policy")
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) { s.KubeProxy = v1alpha1.KubeProxyCoexist })
		Eventually(t.label("a")).Should(BeEmpty())
		back := time.Now()
		held := t.assignment("a")
		Expect(held).NotTo(BeNil())
		Expect(held.Spec.ServiceIPs).To(Equal(own))
		Expect(held.Spec.HealthCheckNodePort).To(BeZero(), "kube-proxy is to listen there")
		Eventually(policyCondition(p, v1alpha1.PolicyTakenOver)).Should(HavePrefix("False HandingBack: 1 Services are kube-proxy's again"))
		Eventually(gone(t)).Should(BeTrue())
		Expect(time.Since(back)).To(BeNumerically(">", 700*time.Millisecond))
		Eventually(policyCondition(p, v1alpha1.PolicyTakenOver)).Should(HavePrefix("False Coexist"))
		Eventually(func() []string { return t.events(p.Name) }).Should(ContainElements("TakenOver", "HandingBack", "HandedBack"))
	})

	It("is what deleting the policy does, and the policy stays until that is done", func() {
		t, p := takenOver(time.Second)
		t.service("labelled", labelled(handedOver))
		t.programmed("labelled")
		Expect(k8s.Delete(ctx, p)).To(Succeed())
		Eventually(t.label("a")).Should(BeEmpty())
		Expect(t.assignment("a")).NotTo(BeNil())
		Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
		Eventually(gone(t)).Should(BeTrue())
		Consistently(func() any { return t.assignment("labelled") }).ShouldNot(BeNil(), "kube-proxy would not take it")
		mergePatch(t.existing("labelled"), map[string]any{"metadata": map[string]any{"labels": map[string]any{v1alpha1.LabelServiceProxyName: nil}}})
		Eventually(func() bool { return apierrors.IsNotFound(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)) }).Should(BeTrue())
	})

	It("does not follow the deletion of a policy where a node has no kube-proxy", func() {
		t, p := takenOver(time.Second)
		t.node("n2", v1alpha1.KubeProxyAbsent, nil)
		Expect(k8s.Delete(ctx, p)).To(Succeed())
		Eventually(policyCondition(p, v1alpha1.PolicyTakenOver)).Should(HavePrefix("False KubeProxyMissing: the 1 Services that were taken over stay, because nodes without kube-proxy would forward them no more: n2-" + t.name))
		Expect(t.label("a")()).To(Equal(handedOver + " by " + t.name))
		t.kubeProxy("n2", v1alpha1.KubeProxyIPVS)
		Eventually(gone(t)).Should(BeTrue())
	})

	It("does not happen on the way to another policy that takes over", func() {
		t, p := takenOver(time.Minute)
		t.policy("-next", nil)
		Expect(k8s.Delete(ctx, p)).To(Succeed())
		Eventually(func() string { return t.assignment("a").Spec.PolicyName }).Should(Equal(t.name + "-next"))
		Expect(t.label("a")()).To(HavePrefix(handedOver + " by "))
		Expect(isHandingBack(t.assignment("a"))).To(BeFalse())
	})

	It("can be called off", func() {
		t, p := takenOver(time.Minute)
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) { s.KubeProxy = v1alpha1.KubeProxyCoexist })
		Eventually(t.label("a")).Should(BeEmpty())
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) { s.KubeProxy = v1alpha1.KubeProxyTakeOver })
		Eventually(func() bool { return isHandingBack(t.assignment("a")) }).Should(BeFalse())
		t.programmed("a")
		Eventually(t.label("a")).Should(Equal(handedOver + " by " + t.name))
	})

	It("keeps a Service that waits for its turn as its user changes it, because kube-proxy does not see it yet", func() {
		t := newTenant()
		t.node("n1", v1alpha1.KubeProxyNFTables, map[string]string{"pool": t.name})
		p := t.policy("", ranges(t.v4))
		svc := t.service("a", nil)
		slow := moving(time.Minute)
		slow.TakeOverRate = 0.001 // the first turn is for labelling
		startManager(slow, nil)
		t.allocated(svc)
		t.programmed("a")
		Eventually(t.label("a")).Should(Equal(handedOver + " by " + t.name))
		own := t.assignment("a").Spec.ServiceIPs
		Expect(own).To(HaveLen(2), "its own, and one of the policy")
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.KubeProxy, s.NodeSelector.MatchLabels = v1alpha1.KubeProxyCoexist, map[string]string{"pool": "other"}
		})
		mergePatch(t.existing("a"), map[string]any{"spec": map[string]any{"ports": []map[string]any{{"port": 81, "protocol": "TCP"}}}})
		Eventually(func() any { return t.assignment("a").Spec.Ports }).Should(HaveExactElements(HaveField("Port", BeEquivalentTo(81))))
		Expect(t.label("a")()).To(Equal(handedOver+" by "+t.name), "its turn has not come")
		Expect(t.assignment("a").Spec.ServiceIPs).To(Equal(own))
		Expect(t.assignment("a").Spec.NodeSelector.MatchLabels).To(BeEmpty())
	})

	It("waits for the EndpointSlices, without which kube-proxy would refuse", func() {
		t, p := takenOver(100 * time.Millisecond)
		slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: t.name, Name: "a-1", Labels: map[string]string{discoveryv1.LabelServiceName: "a",
			discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io", v1alpha1.LabelServiceProxyName: handedOver}}, AddressType: discoveryv1.AddressTypeIPv4}
		Expect(k8s.Create(ctx, slice)).To(Succeed())
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) { s.KubeProxy = v1alpha1.KubeProxyCoexist })
		Eventually(t.label("a")).Should(BeEmpty())
		Consistently(gone(t)).WithTimeout(time.Second).Should(BeFalse())
		Expect(k8s.Delete(ctx, slice)).To(Succeed())
		Eventually(gone(t)).Should(BeTrue())
	})

	It("gives kube-proxy time also where a user removes a label of their own", func() {
		t := newTenant()
		t.node("n1", v1alpha1.KubeProxyNFTables, nil)
		t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) { s.KubeProxy = v1alpha1.KubeProxyCoexist })
		svc := t.service("a", labelled(handedOver))
		startManager(moving(time.Second), nil)
		t.programmed("a")
		removed := time.Now()
		mergePatch(svc, map[string]any{"metadata": map[string]any{"labels": map[string]any{v1alpha1.LabelServiceProxyName: nil}}})
		Eventually(gone(t)).Should(BeTrue())
		Expect(time.Since(removed)).To(BeNumerically(">=", time.Second))
	})
})

var _ = Describe("a controller that is killed on the way from kube-proxy and back", func() {
	It("after any write leaves a Service that somebody forwards, and the next one goes on", func() {
		t := newTenant()
		t.node("n1", v1alpha1.KubeProxyNFTables, nil)
		const grace = 300 * time.Millisecond
		svc := t.service("a", nil)
		var followed hands
		for n := int64(0); ; n++ {
			Expect(n).To(BeNumerically("<=", 25), "writes: the assignment, the label and back, statuses of the policy")
			policy := t.policy(fmt.Sprint("-", n), nil)
			var died atomic.Bool
			stop := startManager(moving(grace), func(c client.Client) client.Client { return followed.follow(dyingClient(n, &died)(c), grace) })
			there := func() bool {
				if a := t.assignment("a"); a != nil && !onEveryNode(a) {
					t.nodesHold("a", "Programmed", 3)
				}
				return died.Load() || t.label("a")() == handedOver+" by "+policy.Name
			}
			Eventually(there).Should(BeTrue())
			if !died.Load() {
				updatePolicy(policy, func(s *v1alpha1.ServiceProxyPolicySpec) { s.KubeProxy = v1alpha1.KubeProxyCoexist })
				Eventually(func() bool { return died.Load() || t.assignment("a") == nil }).Should(BeTrue())
			}
			stop()
			complete := !died.Load()
			stop = startManager(moving(grace), func(c client.Client) client.Client { return followed.follow(c, grace) })
			Expect(client.IgnoreNotFound(k8s.Delete(ctx, policy))).To(Succeed())
			Eventually(func(g Gomega) {
				g.Expect(t.label("a")()).To(BeEmpty())
				g.Expect(t.assignment("a")).To(BeNil())
				g.Expect(apierrors.IsNotFound(k8s.Get(ctx, client.ObjectKeyFromObject(policy), policy))).To(BeTrue(), "the policy is still there")
			}).Should(Succeed(), "killed after write %d", n)
			stop()
			Expect(followed.broken).To(BeEmpty(), "killed after write %d", n)
			if complete {
				Expect(n).To(BeNumerically(">", 5), "writes of a full run")
				Expect(k8s.Delete(ctx, svc)).To(Succeed())
				return
			}
		}
	})
})

// hands follows who forwards Services, write by write, over several controllers.
type hands struct {
	mu     sync.Mutex
	broken []string
}

// follow looks at each write of a client: a Service is labelled only while every node forwards it, and let go of only when kube-proxy has had its time.
func (h *hands) follow(inner client.Client, grace time.Duration) client.Client {
	tell := func(format string, args ...any) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.broken = append(h.broken, fmt.Sprintf(format, args...))
	}
	return interceptor.NewClient(watchless{inner}, interceptor.Funcs{
		Patch: func(ctx context.Context, c client.WithWatch, obj client.Object, patch client.Patch, opts ...client.PatchOption) error {
			before := obj.GetLabels()[v1alpha1.LabelServiceProxyName]
			if err := c.Patch(ctx, obj, patch, opts...); err != nil {
				return err
			}
			if svc, ok := obj.(*corev1.Service); ok && svc.Labels[v1alpha1.LabelServiceProxyName] != before {
				var a v1alpha1.ServiceAssignment
				if err := k8s.Get(ctx, client.ObjectKeyFromObject(svc), &a); err != nil || before == "" && !onEveryNode(&a) {
					tell("label %q became %q while not every node forwards the Service: %v", before, svc.Labels[v1alpha1.LabelServiceProxyName], err)
				} else if left := timeLeft(&a, grace); before != "" && left < -time.Second { // a second for both writes
					tell("the label went when kube-proxy's time had been over for %v", -left)
				}
			}
			return nil
		},
		Delete: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.DeleteOption) error {
			var svc corev1.Service
			found := k8s.Get(ctx, client.ObjectKeyFromObject(obj), &svc) == nil
			if err := c.Delete(ctx, obj, opts...); err != nil { // refused, if the assignment was marked anew meanwhile
				return err
			}
			if _, ok := obj.(*v1alpha1.ServiceAssignment); !ok || !found {
				return nil
			}
			if svc.Labels[v1alpha1.LabelServiceProxyName] != "" {
				tell("the assignment goes while kube-proxy ignores the Service")
			}
			if left := timeLeft(obj, grace); left > 0 {
				tell("the assignment goes %v before kube-proxy's time is over", left)
			}
			return nil
		},
	})
}

// timeLeft is what is left of kube-proxy's time: all of it if it has not begun.
func timeLeft(assignment client.Object, grace time.Duration) time.Duration {
	since, err := time.Parse(time.RFC3339, assignment.GetAnnotations()[v1alpha1.AnnotationHandingBack])
	if err != nil {
		return grace
	}
	return time.Until(since.Add(grace))
}

// events are the reasons of the events about a policy.
func (t *tenant) events(policy string) (out []string) {
	var list corev1.EventList
	Expect(k8s.List(ctx, &list)).To(Succeed())
	for _, e := range list.Items {
		if e.InvolvedObject.Kind == "ServiceProxyPolicy" && e.InvolvedObject.Name == policy {
			out = append(out, e.Reason)
		}
	}
	return out
}

// existing stands for a Service that exists.
func (t *tenant) existing(name string) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: t.name, Name: name}}
}

func TestPaceGivesTurnsInOrderAtItsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		turns := make(chan string, 100)
		p := newPace(10, func(key types.NamespacedName) { turns <- key.String() })
		p.limit.SetBurst(1)
		for _, name := range []string{"b/1", "a/2", "c/1", "a/1", "a/2", "gone/1"} {
			namespace, name, _ := strings.Cut(name, "/")
			if p.pass(types.NamespacedName{Namespace: namespace, Name: name}) {
				t.Errorf("%s/%s passed without its turn", namespace, name)
			}
		}
		p.forget(types.NamespacedName{Namespace: "gone", Name: "1"})
		begun := time.Now()
		go func() {
			if err := p.Start(ctx); err != nil {
				t.Error(err)
			}
		}()
		for _, want := range []string{"a/1", "a/2", "b/1", "c/1"} {
			if got := <-turns; got != want {
				t.Errorf("the turn is %s's, want %s", got, want)
			}
		}
		if took := time.Since(begun); took < 300*time.Millisecond || took > 400*time.Millisecond {
			t.Errorf("four turns at ten per second took %v", took)
		}
		key := types.NamespacedName{Namespace: "a", Name: "1"}
		if !p.pass(key) || p.pass(key) {
			t.Error("a turn is good for passing once")
		}
		cancel()
		synctest.Wait()
	})
}
