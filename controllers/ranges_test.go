package controllers

import (
	"fmt"
	"net/netip"
	"slices"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// serviceCIDRs lists the ranges that the API server knows and that are not being deleted, of those in the tenant's /24.
func (t *tenant) serviceCIDRs() (out []string) {
	GinkgoHelper()
	var list networkingv1.ServiceCIDRList
	Expect(k8s.List(ctx, &list)).To(Succeed())
	for _, c := range list.Items {
		if p := netip.MustParsePrefix(c.Spec.CIDRs[0]); c.DeletionTimestamp == nil && t.v4.Contains(p.Addr()) {
			out = append(out, p.String())
		}
	}
	slices.Sort(out)
	return out
}

// rangeStatus is a policy's status of one range.
func rangeStatus(p *v1alpha1.ServiceProxyPolicy, prefix netip.Prefix) func() v1alpha1.ServiceRangeStatus {
	return func() v1alpha1.ServiceRangeStatus {
		GinkgoHelper()
		Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
		for _, r := range p.Status.ServiceRanges {
			if r.CIDR == prefix.String() {
				return r
			}
		}
		return v1alpha1.ServiceRangeStatus{}
	}
}

var _ = Describe("a range that is edited while in use", func() {
	It("gives out nothing of itself under Manual, all of it under Automatic, and nothing new under Draining", func() {
		startManager(quick, nil)
		t := newTenant()
		allocation := func(a v1alpha1.RangeAllocation) func(*v1alpha1.ServiceProxyPolicySpec) {
			return func(s *v1alpha1.ServiceProxyPolicySpec) {
				s.ServiceRanges = []v1alpha1.ServiceRange{{CIDR: t.v4.String(), Allocation: a}}
			}
		}
		p := t.policy("", allocation(v1alpha1.RangeAllocationManual))
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		older := t.service("older", nil)
		Expect(additionalIPs(t.allocated(older))).To(BeEmpty())
		asked := t.service("asked", at(t.address(50)))
		t.allocated(asked)
		Expect(holderAndState(allocator.AddrLock(t.address(50)))()).To(Equal("asked Bound"))

		updatePolicy(p, allocation(v1alpha1.RangeAllocationAutomatic))
		Eventually(func() any { return additionalIPs(t.assignment("older")) }).Should(HaveLen(1))
		had := additionalIPs(t.assignment("older"))

		updatePolicy(p, allocation(v1alpha1.RangeAllocationDraining))
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		Expect(additionalIPs(t.allocated(t.service("late", nil)))).To(BeEmpty())
		Expect(additionalIPs(t.assignment("older"))).To(Equal(had))
		Eventually(rangeStatus(p, t.v4)).Should(HaveField("Allocated", int64(2)))
	})

	It("keeps what is reserved from being given, not from being asked for", func() {
		startManager(quick, nil)
		t := newTenant()
		small := netip.PrefixFrom(t.v4.Addr(), 29)
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.ServiceRanges = []v1alpha1.ServiceRange{{CIDR: small.String(), Reserved: []string{t.address(1).String(), netip.PrefixFrom(t.address(2), 31).String(), t.address(4).String(), t.address(5).String()}}}
		})
		Expect(additionalIPs(t.allocated(t.service("first", nil)))).To(Equal([]netip.Addr{t.address(6)}))
		t.allocation(t.service("second", nil), metav1.ConditionFalse)
		t.allocated(t.service("asked", at(t.address(3))))
		Expect(holderAndState(allocator.AddrLock(t.address(3)))()).To(Equal("asked Bound"))
		Eventually(rangeStatus(p, small)).Should(HaveField("Total", int64(1)))

		By("taking one off the list serves who waits")
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.ServiceRanges[0].Reserved = s.ServiceRanges[0].Reserved[:3]
		})
		Eventually(func() any { return additionalIPs(t.assignment("second")) }).Should(Equal([]netip.Addr{t.address(5)}))
	})

	It("shrinks around what is in use: nothing moves, all is still on record, and the rest goes last", func() {
		startManager(quick, nil)
		t := newTenant()
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			ranges(t.v4)(s)
			s.NodePortRange = &v1alpha1.NodePortRange{Start: 31050, End: 31059}
		})
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		older := t.service("older", nil)
		inside := t.service("inside", func(s *corev1.Service) {
			at(t.address(200))(s)
			s.Spec.Type, s.Spec.Ports[0].NodePort = corev1.ServiceTypeNodePort, 31059
		})
		had := additionalIPs(t.allocated(older))
		t.allocated(inside)
		locks := append(locksOf(inside), allocator.AddrLock(had[0]))

		small := netip.PrefixFrom(t.v4.Addr(), 28) // the static band: nothing that was given by itself lies in it
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.ServiceRanges[0].CIDR = small.String()
			s.NodePortRange.End = 31054
		})
		Eventually(rangeStatus(p, t.v4)).Should(And(HaveField("Allocated", int64(2)), HaveField("Total", int64(0))))
		late := t.service("late", nil)
		Expect(small.Contains(additionalIPs(t.allocated(late))[0])).To(BeTrue())
		Consistently(func(g Gomega) {
			for _, lock := range locks {
				g.Expect(holderAndState(lock)()).To(HaveSuffix(" Bound"))
			}
			g.Expect(additionalIPs(t.assignment("older"))).To(Equal(had))
		}).Should(Succeed())
		Expect(t.serviceCIDRs()).To(ConsistOf(t.v4.String(), small.String()))

		Expect(k8s.Delete(ctx, older)).To(Succeed())
		Expect(k8s.Delete(ctx, inside)).To(Succeed())
		Eventually(t.serviceCIDRs).Should(ConsistOf(small.String()))
		Eventually(func() []v1alpha1.ServiceRangeStatus { rangeStatus(p, small)(); return p.Status.ServiceRanges }).Should(HaveLen(1))
	})

	It("is replaced by a wider one in one edit, and nothing moves", func() {
		startManager(quick, nil)
		t := newTenant()
		half := netip.PrefixFrom(t.v4.Addr(), 25)
		p := t.policy("", ranges(half))
		older := t.service("older", nil)
		had := additionalIPs(t.allocated(older))
		inside := t.service("inside", at(t.address(9)))
		t.allocated(inside)
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) { s.ServiceRanges[0].CIDR = t.v4.String() })
		Eventually(t.serviceCIDRs).Should(ConsistOf(t.v4.String()), "the narrow one, of which the API server needs nothing any more, goes")
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		Eventually(rangeStatus(p, t.v4)).Should(And(HaveField("Allocated", int64(2)), HaveField("Total", int64(254))))
		Expect(additionalIPs(t.allocated(older))).To(Equal(had))
		Expect(holderAndState(allocator.AddrLock(had[0]))()).To(Equal("older Bound"))
		Expect(k8s.Get(ctx, client.ObjectKeyFromObject(inside), inside)).To(Succeed())
		Expect(inside.Spec.ClusterIP).To(Equal(t.address(9).String()))
		for i := range 3 {
			Expect(additionalIPs(t.allocated(t.service(fmt.Sprint("new-", i), nil)))).To(HaveLen(1))
		}
	})
})

var _ = Describe("a policy that selects everything", func() {
	It("covers default/kubernetes, and its deletion tells what lets it end", func() {
		startManager(quick, nil)
		t := newTenant()
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) { s.NamespaceSelector = metav1.LabelSelector{} })
		covered := func() bool {
			var a v1alpha1.ServiceAssignment
			return k8s.Get(ctx, client.ObjectKey{Namespace: "default", Name: "kubernetes"}, &a) == nil && a.Spec.PolicyName == p.Name
		}
		Eventually(covered).Should(BeTrue())
		Eventually(policyCondition(p, v1alpha1.PolicyAccepted)).Should(HavePrefix("True")) // it has its finalizer
		Expect(k8s.Delete(ctx, p)).To(Succeed())
		Eventually(policyCondition(p, v1alpha1.PolicyReady)).Should(And(HavePrefix("False DeletionWaits"), ContainSubstring("default/kubernetes"), ContainSubstring("narrow")))
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.NamespaceSelector = metav1.LabelSelector{MatchLabels: map[string]string{"tenant": "nobody"}}
		})
		Eventually(gone(p)).Should(BeTrue())
		Expect(covered()).To(BeFalse())
	})
})
