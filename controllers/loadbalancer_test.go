package controllers

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// vipsFrom adds a range of load-balancer addresses to a policy.
func vipsFrom(prefix netip.Prefix, change func(*v1alpha1.ServiceRange)) func(*v1alpha1.ServiceProxyPolicySpec) {
	return func(s *v1alpha1.ServiceProxyPolicySpec) {
		r := v1alpha1.ServiceRange{CIDR: prefix.String(), Use: v1alpha1.RangeUseLoadBalancer}
		if change != nil {
			change(&r)
		}
		s.ServiceRanges = append(s.ServiceRanges, r)
	}
}

func vipsFromBoth(t *tenant) func(*v1alpha1.ServiceProxyPolicySpec) {
	return func(s *v1alpha1.ServiceProxyPolicySpec) {
		vipsFrom(t.v4, nil)(s)
		vipsFrom(t.v6, nil)(s)
	}
}

// vipService makes a Service of our class; with asks, it asks for those addresses.
func (t *tenant) vipService(name, asks string, families corev1.IPFamilyPolicy) *corev1.Service {
	GinkgoHelper()
	return t.service(name, t.vip(asks, families))
}

func (t *tenant) vip(asks string, families corev1.IPFamilyPolicy) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.Type, s.Spec.LoadBalancerClass = corev1.ServiceTypeLoadBalancer, ptr.To(v1alpha1.LoadBalancerClass)
		s.Spec.AllocateLoadBalancerNodePorts = ptr.To(false)
		s.Spec.IPFamilyPolicy = ptr.To(families)
		if asks != "" {
			s.Annotations = map[string]string{v1alpha1.AnnotationLoadBalancerIPs: asks}
		}
	}
}

func ask(svc *corev1.Service, addresses string) {
	GinkgoHelper()
	mergePatch(svc, map[string]any{"metadata": map[string]any{"annotations": map[string]any{v1alpha1.AnnotationLoadBalancerIPs: addresses}}})
}

func mergePatch(obj client.Object, body map[string]any) {
	GinkgoHelper()
	b, err := json.Marshal(body)
	Expect(err).NotTo(HaveOccurred())
	Expect(k8s.Patch(ctx, obj, client.RawPatch(types.MergePatchType, b))).To(Succeed())
}

// external is what kubectl shows as EXTERNAL-IP.
func external(svc *corev1.Service) func() []string {
	return func() (out []string) {
		var now corev1.Service
		if err := k8s.Get(ctx, client.ObjectKeyFromObject(svc), &now); err != nil {
			return []string{err.Error()}
		}
		for _, in := range now.Status.LoadBalancer.Ingress {
			out = append(out, in.IP+in.Hostname)
			if ptr.Deref(in.IPMode, "") != corev1.LoadBalancerIPModeVIP {
				out = append(out, "without ipMode VIP")
			}
		}
		return out
	}
}

func (t *tenant) forwarded(name string) func() []string {
	return func() []string {
		if a := t.assignment(name); a != nil {
			return a.Spec.LoadBalancerIPs
		}
		return nil
	}
}

// nodesHold plays package programmed: so many of three nodes hold the assignment as it is now.
func (t *tenant) nodesHold(name, reason string, nodes int32) {
	GinkgoHelper()
	Eventually(func(g Gomega) {
		a := t.assignment(name)
		status := metav1.ConditionFalse
		if reason == "Programmed" {
			status = metav1.ConditionTrue
		}
		apimeta.SetStatusCondition(&a.Status.Conditions, metav1.Condition{Type: v1alpha1.AssignmentProgrammed, Status: status, Reason: reason, ObservedGeneration: a.Generation})
		a.Status.Nodes = v1alpha1.AssignmentNodesStatus{Desired: 3, Programmed: nodes}
		g.Expect(k8s.Status().Update(ctx, a)).To(Succeed())
	}).Should(Succeed())
}

// vipClaims are the claims on load-balancer addresses that Services of the tenant hold.
func (t *tenant) vipClaims() map[string]string {
	GinkgoHelper()
	var list v1alpha1.AllocationClaimList
	Expect(k8s.List(ctx, &list)).To(Succeed())
	out := map[string]string{}
	for _, c := range list.Items {
		if c.Spec.Holder.Namespace == t.name && c.Spec.Use == v1alpha1.ClaimUseLoadBalancerIP && c.Spec.State == v1alpha1.ClaimBound {
			out[c.Spec.Address] = c.Spec.Holder.Name
		}
	}
	return out
}

// allocatedText is the condition Allocated of the assignment as it is now.
func (t *tenant) allocatedText(name string) func() string {
	return func() string {
		a := t.assignment(name)
		if a == nil {
			return "no assignment"
		}
		c := apimeta.FindStatusCondition(a.Status.Conditions, v1alpha1.AssignmentAllocated)
		if c == nil || c.ObservedGeneration != a.Generation {
			return "unknown"
		}
		return string(c.Status) + " " + c.Reason + ": " + c.Message
	}
}

func (t *tenant) nth(n byte) string {
	b := t.v4.Addr().As4()
	b[3] = n
	return netip.AddrFrom4(b).String()
}

var _ = Describe("a Service of our load-balancer class", func() {
	It("shows its addresses once every node holds them, keeps them whatever nodes and endpoints do, and gives them back", func() {
		stop := startManager(quick, nil)
		t := newTenant()
		t.policy("", vipsFromBoth(t))
		svc := t.vipService("web", "", corev1.IPFamilyPolicyRequireDualStack)
		ips := t.allocated(svc).Spec.LoadBalancerIPs
		Expect(ips).To(HaveLen(2))
		Expect(t.v4.Contains(netip.MustParseAddr(ips[0])) && t.v6.Contains(netip.MustParseAddr(ips[1]))).To(BeTrue(), "%v", ips)
		Expect(t.vipClaims()).To(Equal(map[string]string{ips[0]: "web", ips[1]: "web"}))
		Expect(t.reservations()).To(BeEmpty(), "the API server has no say in these")

		t.nodesHold("web", "WaitingForNodes", 2)
		Consistently(external(svc)).Should(BeEmpty())
		t.nodesHold("web", v1alpha1.ReasonNoReadyEndpoints, 2)
		Consistently(external(svc)).Should(BeEmpty(), "one node of three does not refuse connections yet")
		t.nodesHold("web", v1alpha1.ReasonNoReadyEndpoints, 3)
		Eventually(external(svc)).Should(Equal(ips), "the primary family first")

		By("what the status says besides is not ours, what it says of load balancers is")
		Expect(k8s.Get(ctx, client.ObjectKeyFromObject(svc), svc)).To(Succeed())
		svc.Status.Conditions = []metav1.Condition{{Type: "theirs", Status: "True", Reason: "Theirs", LastTransitionTime: metav1.Now()}}
		svc.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{Hostname: "lb.example", Ports: nil}, svc.Status.LoadBalancer.Ingress[0]}
		Expect(k8s.Status().Update(ctx, svc)).To(Succeed())
		Eventually(external(svc)).Should(Equal(ips))
		Expect(k8s.Get(ctx, client.ObjectKeyFromObject(svc), svc)).To(Succeed())
		Expect(svc.Status.Conditions).To(HaveLen(1))

		By("a generation that no node holds yet, then no node at all, and a new controller")
		mergePatch(svc, map[string]any{"spec": map[string]any{"sessionAffinity": "ClientIP"}})
		Eventually(func() int32 { return t.assignment("web").Spec.SessionAffinitySeconds }).ShouldNot(BeZero())
		t.nodesHold("web", "NoNodes", 0)
		Consistently(external(svc)).Should(Equal(ips))
		stop()
		startManager(quick, nil)
		Consistently(external(svc)).Should(Equal(ips))

		By("no load balancer any more")
		Eventually(func(g Gomega) {
			g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(svc), svc)).To(Succeed())
			svc.Spec.Type, svc.Spec.LoadBalancerClass, svc.Spec.AllocateLoadBalancerNodePorts = corev1.ServiceTypeClusterIP, nil, nil
			g.Expect(k8s.Update(ctx, svc)).To(Succeed())
		}).Should(Succeed())
		Eventually(t.vipClaims).Should(BeEmpty())
		Expect(external(svc)()).To(BeEmpty())
		Expect(t.forwarded("web")()).To(BeEmpty())
	})

	It("gets the address that it asks for, before it loses the one that it has, and is told what is valid instead", func() {
		startManager(quick, nil)
		t := newTenant()
		t.policy("", vipsFrom(t.v4, func(r *v1alpha1.ServiceRange) {
			r.Allocation, r.Reserved = v1alpha1.RangeAllocationManual, []string{t.nth(5)}
		}))
		web := t.vipService("web", "", corev1.IPFamilyPolicySingleStack)
		Eventually(t.allocatedText("web")).Should(And(HavePrefix("False NoLoadBalancerRange: "), ContainSubstring(t.v4.String()+" (Manual)")))
		for asked, want := range map[string]string{
			"198.51.100.1":            "False AddressNotOffered: 198.51.100.1 is not offered by policy " + t.name,
			t.nth(5):                  "it is reserved",
			t.nth(0):                  "first address",
			t.nth(255):                "broadcast",
			"nonsense":                `False RequestInvalid: annotation networking.serviceproxy.io/load-balancer-ips: "nonsense" is not an IP address`,
			t.nth(6) + "," + t.nth(7): "False RequestInvalid: ",
			"2001:db8::1":             "spec.ipFamilies of the Service is [IPv4]",
		} {
			ask(web, asked)
			Eventually(t.allocatedText("web")).Should(ContainSubstring(want))
			Eventually(warnings(web)).Should(ContainElement(ContainSubstring(strings.TrimSpace(want[strings.Index(want, ":")+1:]))))
		}
		Expect(t.vipClaims()).To(BeEmpty())

		ask(web, " "+strings.Replace(t.nth(10), ".", ".0", 1)+" ") // as the API server reads addresses
		Eventually(t.forwarded("web")).Should(Equal([]string{t.nth(10)}))
		t.nodesHold("web", "Programmed", 3)
		Eventually(external(web)).Should(Equal([]string{t.nth(10)}))

		By("an address that another Service holds")
		other := t.service("other", func(s *corev1.Service) {
			t.vip("", corev1.IPFamilyPolicySingleStack)(s)
			s.Spec.LoadBalancerIP = t.nth(20)
		})
		t.allocated(other)
		ask(web, t.nth(20))
		Eventually(t.allocatedText("web")).Should(HavePrefix(fmt.Sprintf("False AddressInUse: %s is held by Service %s/other", t.nth(20), t.name)))
		Consistently(external(web)).Should(Equal([]string{t.nth(10)}))

		By("its release serves it at once: the new address first, then the old one goes")
		Expect(k8s.Delete(ctx, other)).To(Succeed())
		Eventually(t.forwarded("web")).Should(Equal([]string{t.nth(10), t.nth(20)}))
		Consistently(external(web)).Should(Equal([]string{t.nth(10)}), "no node is known to have the new one")
		Expect(t.vipClaims()).To(HaveLen(2))
		t.nodesHold("web", "Programmed", 3)
		Eventually(external(web)).Should(Equal([]string{t.nth(20)}))
		Eventually(t.forwarded("web")).Should(Equal([]string{t.nth(20)}))
		Eventually(t.vipClaims).Should(Equal(map[string]string{t.nth(20): "web"}))
		Eventually(t.allocatedText("web")).Should(HavePrefix("True"))

		By("nothing asked for any more: a valid address is never moved")
		mergePatch(web, map[string]any{"metadata": map[string]any{"annotations": map[string]any{v1alpha1.AnnotationLoadBalancerIPs: nil}}})
		Consistently(external(web)).Should(Equal([]string{t.nth(20)}))
	})

	It("waits for a release, takes both families or none if it requires both, and what there is if it prefers both", func() {
		startManager(quick, nil)
		t := newTenant()
		tiny4, tiny6 := netip.PrefixFrom(t.v4.Addr(), 30), netip.PrefixFrom(t.v6.Addr(), 126)
		p := t.policy("", vipsFrom(tiny4, nil))
		first, second := t.vipService("first", "", corev1.IPFamilyPolicySingleStack), t.vipService("second", "", corev1.IPFamilyPolicyPreferDualStack)
		Expect(t.allocated(first).Spec.LoadBalancerIPs).To(HaveLen(1))
		Expect(t.allocated(second).Spec.LoadBalancerIPs).To(HaveLen(1), "the family that the policy has")
		both := t.vipService("both", "", corev1.IPFamilyPolicyRequireDualStack)
		Eventually(t.allocatedText("both")).Should(ContainSubstring("declares no IPv6 range with use LoadBalancer"))

		By("a second family for whoever would have it")
		updatePolicy(p, vipsFrom(tiny6, nil))
		Eventually(t.forwarded("second")).Should(HaveLen(2))
		Eventually(t.allocatedText("both")).Should(And(HavePrefix("False RangeExhausted"), ContainSubstring("policy "+t.name+" has no free IPv4 addresses for load balancers: 2 of 2 in use")))
		Eventually(warnings(both)).Should(ContainElement(ContainSubstring("2 of 2 in use")))
		Eventually(policyCondition(p, v1alpha1.PolicyCapacityAvailable)).Should(HavePrefix("False RangeExhausted"))
		Consistently(t.forwarded("both")).Should(BeEmpty(), "IPv6 alone is of no use to it, and may be to another")
		Expect(t.vipClaims()).To(HaveLen(3))

		By("a release")
		Expect(k8s.Delete(ctx, first)).To(Succeed())
		Eventually(t.forwarded("both")).Should(HaveLen(2))
		Eventually(t.allocatedText("both")).Should(HavePrefix("True"))
	})

	It("gets its addresses back when the claims are lost, whoever comes first, and racing replicas agree on one address each", func() {
		t := newTenant()
		small := netip.PrefixFrom(t.v4.Addr(), 28)
		t.policy("", vipsFrom(small, nil))
		stop := startManager(quick, nil)
		const n = 6
		services, had := make([]*corev1.Service, n), map[string]string{}
		for i := range services {
			services[i] = t.vipService(fmt.Sprint("old-", i), "", corev1.IPFamilyPolicySingleStack)
			had[t.allocated(services[i]).Spec.LoadBalancerIPs[0]] = services[i].Name
			t.nodesHold(services[i].Name, "Programmed", 3)
			Eventually(external(services[i])).Should(HaveLen(1))
		}
		stop()
		Expect(k8s.DeleteAllOf(ctx, &v1alpha1.AllocationClaim{}, client.MatchingLabels{v1alpha1.LabelPolicy: t.name})).To(Succeed())
		Expect(k8s.DeleteAllOf(ctx, &v1alpha1.ServiceAssignment{}, client.InNamespace(t.name))).To(Succeed())
		fresh := make([]*corev1.Service, 8) // as many as are left of fourteen
		for i := range fresh {
			fresh[i] = t.vipService(fmt.Sprint("a-new-", i), "", corev1.IPFamilyPolicySingleStack)
		}
		startManager(quick, nil)
		startManager(quick, nil)
		Eventually(t.vipClaims).Should(HaveLen(len(services) + len(fresh)))
		for ip, name := range had {
			Expect(t.vipClaims()).To(HaveKeyWithValue(ip, name))
		}
		for _, svc := range slices.Concat(services, fresh) {
			Eventually(t.forwarded(svc.Name)).Should(HaveLen(1), svc.Name)
			Expect(t.vipClaims()).To(HaveKeyWithValue(t.forwarded(svc.Name)()[0], svc.Name))
		}
		for _, svc := range services {
			Expect(had).To(HaveKeyWithValue(external(svc)()[0], svc.Name), "never hidden")
		}
	})

	It("moves with its policy, new address first, and shows none without a policy; others' load balancers are never touched", func() {
		startManager(quick, nil)
		t := newTenant()
		one, two := netip.PrefixFrom(t.v4.Addr(), 25), netip.PrefixFrom(netip.MustParseAddr(t.nth(128)), 25)
		t.policy("-one", vipsFrom(one, nil))
		gold := t.policy("-two", func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.Priority, s.ServiceSelector = 1, metav1.LabelSelector{MatchLabels: map[string]string{"tier": "gold"}}
			s.Reuse.Quarantine = &metav1.Duration{Duration: time.Hour}
			vipsFrom(two, nil)(s)
		})
		web := t.vipService("web", "", corev1.IPFamilyPolicySingleStack)
		theirs := t.service("theirs", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeLoadBalancer })
		theirs.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "198.51.100.1", IPMode: ptr.To(corev1.LoadBalancerIPModeVIP)}}
		Expect(k8s.Status().Update(ctx, theirs)).To(Succeed())
		before := t.allocated(web).Spec.LoadBalancerIPs
		t.nodesHold("web", "Programmed", 3)
		Eventually(external(web)).Should(Equal(before))
		Eventually(t.forwarded("theirs")).Should(Equal([]string{"198.51.100.1"}))
		t.nodesHold("theirs", "Programmed", 3)

		mergePatch(web, map[string]any{"metadata": map[string]any{"labels": map[string]any{"tier": "gold"}}})
		Eventually(t.forwarded("web")).Should(HaveLen(2))
		Consistently(external(web)).Should(Equal(before))
		t.nodesHold("web", "Programmed", 3)
		Eventually(external(web)).ShouldNot(Equal(before))
		after := external(web)()
		Expect(two.Contains(netip.MustParseAddr(after[0]))).To(BeTrue())
		Eventually(t.vipClaims).Should(Equal(map[string]string{after[0]: "web"}))

		By("handed to another proxy: no policy covers it")
		mergePatch(web, map[string]any{"metadata": map[string]any{"labels": map[string]any{"service.kubernetes.io/service-proxy-name": "other"}}})
		Eventually(external(web)).Should(BeEmpty())
		Eventually(t.vipClaims).Should(BeEmpty())
		rests := claimOn(allocator.AddrLock(netip.MustParseAddr(after[0])))
		Expect(rests.Spec.State).To(Equal(v1alpha1.ClaimReleased))

		By("an address that rests is at once whose who asks for it")
		heir := t.service("heir", func(s *corev1.Service) {
			t.vip(after[0], corev1.IPFamilyPolicySingleStack)(s)
			s.Labels = map[string]string{"tier": "gold"}
		})
		Expect(t.allocated(heir).Spec.LoadBalancerIPs).To(Equal(after))
		updatePolicy(gold, func(s *v1alpha1.ServiceProxyPolicySpec) { s.Reuse.Quarantine = &metav1.Duration{} })
		Expect(external(theirs)()).To(Equal([]string{"198.51.100.1"}))
		Expect(t.forwarded("theirs")()).To(Equal([]string{"198.51.100.1"}))
	})
})

// warnings are the notes of Warning events about a Service.
func warnings(svc *corev1.Service) func() []string {
	return func() (out []string) {
		var list eventsv1.EventList
		if err := k8s.List(ctx, &list, client.InNamespace(svc.Namespace)); err != nil {
			return []string{err.Error()}
		}
		for _, e := range list.Items {
			if e.Regarding.UID == svc.UID && e.Type == corev1.EventTypeWarning {
				out = append(out, e.Note)
			}
		}
		return out
	}
}

// Every Programmed of an ordinary Service would cost a reconcile.
func TestOnlyWithVIPsProgrammedCostsAReconcile(t *testing.T) {
	l := newLedger(Options{}.withDefaults())
	vip := netip.MustParseAddr("192.0.2.1")
	l.space.Hold(allocator.AddrLock(vip), allocator.Hold{Policy: "p", Use: v1alpha1.ClaimUseLoadBalancerIP, State: v1alpha1.ClaimBound, Holder: allocator.Holder{Namespace: "n", Name: "web", UID: "1"}})
	r := &serviceReconciler{ledger: l}
	assignment := func(status metav1.ConditionStatus, ips ...string) *v1alpha1.ServiceAssignment {
		a := &v1alpha1.ServiceAssignment{ObjectMeta: metav1.ObjectMeta{Generation: 2}, Spec: v1alpha1.ServiceAssignmentSpec{LoadBalancerIPs: ips}}
		a.Status.Conditions = []metav1.Condition{{Type: v1alpha1.AssignmentProgrammed, Status: status, ObservedGeneration: 2}}
		return a
	}
	old := assignment("True", vip.String())
	old.Generation = 3 // which no node is known to hold
	for name, tt := range map[string]struct {
		before, after *v1alpha1.ServiceAssignment
		want          bool
	}{
		"a VIP of ours":                  {assignment("False", vip.String()), assignment("True", vip.String()), true},
		"no load balancer":               {assignment("False"), assignment("True"), false},
		"another's load balancer":        {assignment("False", "198.51.100.1"), assignment("True", "198.51.100.1"), false},
		"programmed before":              {assignment("True", vip.String()), assignment("True", vip.String()), false},
		"only an earlier generation was": {assignment("False", vip.String()), old, false},
	} {
		if got := r.newlyOnEveryNode(event.UpdateEvent{ObjectOld: tt.before, ObjectNew: tt.after}); got != tt.want {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
}
