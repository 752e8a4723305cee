package controllers

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// address is the n-th address of the tenant's IPv4 range.
func (t *tenant) address(n int) netip.Addr {
	a := t.v4.Addr()
	for range n {
		a = a.Next()
	}
	return a
}

// left makes a Bound claim and its reservation, as a controller that died left them. labelled says whether they carry our labels.
func (t *tenant) left(addr netip.Addr, service string, uid types.UID, labelled bool) (*v1alpha1.AllocationClaim, *networkingv1.IPAddress) {
	GinkgoHelper()
	hold := allocator.Hold{Policy: t.name, Use: v1alpha1.ClaimUseAdditionalIP, State: v1alpha1.ClaimBound,
		Holder: allocator.Holder{Namespace: t.name, Name: service, UID: string(uid)}}
	claim := allocator.NewClaim(allocator.AddrLock(addr), hold)
	ip := &networkingv1.IPAddress{ObjectMeta: metav1.ObjectMeta{Name: addr.String(), Labels: map[string]string{networkingv1.LabelManagedBy: v1alpha1.ManagedBy}},
		Spec: networkingv1.IPAddressSpec{ParentRef: &networkingv1.ParentReference{Resource: "services", Namespace: t.name, Name: service}}}
	if !labelled {
		claim.Labels, ip.Labels = nil, map[string]string{networkingv1.LabelManagedBy: "somebody"}
	}
	Expect(k8s.Create(ctx, claim)).To(Succeed())
	Expect(k8s.Create(ctx, ip)).To(Succeed())
	return claim, ip
}

func gone(obj client.Object) func() bool {
	return func() bool { return apierrors.IsNotFound(k8s.Get(ctx, client.ObjectKeyFromObject(obj), obj)) }
}

var _ = Describe("garbage", func() {
	It("is collected once it is older than any request, and what is not ours is not", func() {
		t := newTenant()
		t.policy("", nil) // whose claims need no rest
		const age = 3 * time.Second
		options := quick
		options.LeakAge = age
		start := time.Now()
		claim, ip := t.left(t.address(1), "ghost", "an-earlier-life", true)
		claimless, orphan := t.left(t.address(2), "ghost", "an-earlier-life", true)
		Expect(k8s.Delete(ctx, claimless)).To(Succeed())
		foreignClaim, foreignIP := t.left(t.address(3), "ghost", "an-earlier-life", false)
		startManager(options, nil)
		Eventually(gone(claim)).Should(BeTrue())
		Expect(time.Since(start)).To(BeNumerically(">", age-time.Second), "creation times are whole seconds")
		Eventually(gone(ip)).Should(BeTrue())
		Eventually(gone(orphan)).Should(BeTrue())
		Expect(time.Since(start)).To(BeNumerically(">", age-time.Second))
		Consistently(func(g Gomega) {
			g.Expect(gone(foreignClaim)()).To(BeFalse())
			g.Expect(gone(foreignIP)()).To(BeFalse())
		}).WithTimeout(time.Second).Should(Succeed())
		Expect(foreignClaim.Spec.State).To(Equal(v1alpha1.ClaimBound))
		Expect(k8s.Delete(ctx, foreignClaim)).To(Succeed())
		Expect(k8s.Delete(ctx, foreignIP)).To(Succeed())
	})

	It("of an earlier Service of the name goes, and the present one has its own", func() {
		t := newTenant()
		svc := t.service("web", nil)
		old, _ := t.left(t.address(1), "web", "an-earlier-life", true)
		p := t.policy("", ranges(t.v4))
		startManager(quick, nil)
		t.allocated(svc)
		Eventually(func(g Gomega) { t.consistent(g, p.Name, []*corev1.Service{svc}, 1) }).Should(Succeed())
		if !gone(old)() {
			Expect(old.Spec.Holder.UID).To(Equal(svc.UID))
		}
	})

	It("is not what somebody else has taken meanwhile", func() {
		t := newTenant()
		r := &serviceReconciler{client: k8s, live: k8s}
		claim, ip := t.left(t.address(1), "web", "present", true)
		DeferCleanup(func() {
			Expect(k8s.Delete(ctx, claim)).To(Succeed())
			Expect(client.IgnoreNotFound(k8s.Delete(ctx, ip))).To(Succeed())
		})

		By("forgetting a claim that was ours before a long pause")
		former := allocator.Holder{Namespace: t.name, Name: "web", UID: "former"}
		Expect(r.forget(ctx, allocator.AddrLock(t.address(1)), former)).To(Succeed())
		Expect(gone(claim)()).To(BeFalse())

		By("releasing, by a stale cache, what a later Service of the name has taken over")
		stale := claim.DeepCopy()
		stale.Spec.Holder.UID = "former"
		stale.ResourceVersion = "1"
		Expect(apierrors.IsConflict(release(ctx, k8s, k8s, stale, time.Minute))).To(BeTrue())
		Expect(gone(ip)()).To(BeFalse(), "its reservation")
		Expect(gone(claim)()).To(BeFalse())
		Expect(claim.Spec.State).To(Equal(v1alpha1.ClaimBound))
	})
})

var _ = Describe("the waiting list", func() {
	It("has a Service from the moment in which it got nothing, until it is served", func() {
		l := newLedger(quick.withDefaults())
		q := workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[reconcile.Request]())
		defer q.ShutDown()
		l.serviceQueue = q
		policy := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: "p", UID: "p"}}
		policy.Spec.ServiceRanges = []v1alpha1.ServiceRange{{CIDR: "10.1.0.0/30"}}
		l.onPolicy(nil, policy)
		ready := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "c"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.1.0.0/30"}}}
		ready.Status.Conditions = []metav1.Condition{{Type: "Ready", Status: "True", LastTransitionTime: metav1.NewTime(time.Now().Add(-time.Hour))}}
		l.onServiceCIDR(nil, ready)
		ask := func(name string) (allocator.Grant, error) {
			return l.grant(allocator.Request{Policy: "p", Family: v1alpha1.IPv4, Use: v1alpha1.ClaimUseAdditionalIP, Holder: allocator.Holder{Namespace: "n", Name: name}})
		}
		held, err := ask("a")
		Expect(err).NotTo(HaveOccurred())
		_, err = ask("b")
		Expect(err).NotTo(HaveOccurred())
		for _, name := range []string{"gone", "late", "later", "last"} {
			_, err = ask(name)
			Expect(err).To(MatchError(allocator.ErrExhausted))
		}
		Expect(q.Len()).To(BeZero())
		l.served(types.NamespacedName{Namespace: "n", Name: "gone"})
		l.abandon(held.Lock)
		Expect(q.Len()).To(Equal(1))
		next, _ := q.Get()
		Expect(next.Name).To(Equal("late"))

		By("who was woken and needs nothing any more leaves it to the next, once")
		for range 2 {
			l.served(next.NamespacedName)
			Expect(q.Len()).To(Equal(1))
		}
		next, _ = q.Get()
		Expect(next.Name).To(Equal("later"))

		By("who was woken and got it does not")
		_, err = ask("later")
		Expect(err).NotTo(HaveOccurred())
		l.served(next.NamespacedName)
		Expect(q.Len()).To(BeZero())

		By("what was taken and has not been shown for long is forgotten")
		l.sweep(time.Now().Add(-time.Minute))
		Expect(q.Len()).To(BeZero())
		l.sweep(time.Now().Add(time.Second))
		Expect(q.Len()).To(Equal(1))
		next, _ = q.Get()
		Expect(next.Name).To(Equal("last"))
	})
})

var _ = Describe("existing traffic goes on", func() {
	It("when a Service moves to a policy that has nothing left", func() {
		startManager(quick, nil)
		t := newTenant()
		t.policy("-a", ranges(t.v4))
		svc := t.service("web", nil)
		before := additionalIPs(t.allocated(svc))
		tiny := netip.MustParsePrefix(fmt.Sprintf("10.202.%d.0/30", tenants))
		next := t.policy("-b", func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.Priority = 1
			s.ServiceRanges = []v1alpha1.ServiceRange{{CIDR: tiny.String(), Reserved: []string{tiny.String()}}}
		})
		Eventually(func() string { return t.assignment("web").Spec.PolicyName }).Should(Equal(next.Name))
		t.allocation(svc, metav1.ConditionFalse)
		Expect(additionalIPs(t.assignment("web"))).To(Equal(before))
		Expect(claimOn(allocator.AddrLock(before[0])).Spec.State).To(Equal(v1alpha1.ClaimBound))

		updatePolicy(next, func(s *v1alpha1.ServiceProxyPolicySpec) { s.ServiceRanges[0].Reserved = nil })
		Eventually(func(g Gomega) {
			ips := additionalIPs(t.assignment("web"))
			g.Expect(ips).To(HaveLen(1))
			g.Expect(tiny.Contains(ips[0])).To(BeTrue())
		}).Should(Succeed())
		Eventually(func() any { return claimOn(allocator.AddrLock(before[0])) }).Should(BeNil())
	})

	It("when an edit leaves a policy with a selector that cannot be parsed", func() {
		stop := startManager(quick, nil)
		t, other := newTenant(), newTenant()
		p := t.policy("", ranges(t.v4))
		svc := t.service("web", nil)
		before := t.allocated(svc)
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.ServiceSelector = metav1.LabelSelector{MatchLabels: map[string]string{"not a label!": "x"}}
		})
		Eventually(policyCondition(p, v1alpha1.PolicyAccepted)).Should(And(HavePrefix("False"), ContainSubstring("spec.serviceSelector"), ContainSubstring("not a label!")))
		stop()
		startManager(quick, nil) // whatever was remembered of the time when it could be parsed is gone
		other.policy("", ranges(other.v4))
		Expect(additionalIPs(other.allocated(other.service("web", nil)))).To(HaveLen(1))
		Expect(t.assignment("web").Spec).To(Equal(before.Spec))
		Expect(claimOn(allocator.AddrLock(additionalIPs(before)[0])).Spec.State).To(Equal(v1alpha1.ClaimBound))
		Expect(t.reservations()).To(HaveLen(1))

		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) { s.ServiceSelector = metav1.LabelSelector{} })
		Eventually(policyCondition(p, v1alpha1.PolicyAccepted)).Should(HavePrefix("True"))
		Expect(t.allocated(svc).UID).To(Equal(before.UID))
	})

	It("when a new leader's cache has the assignment before the Service", func() {
		t := newTenant()
		t.policy("", ranges(t.v4))
		svc := t.service("web", nil)
		stop := startManager(quick, nil)
		before := t.allocated(svc)
		stop()
		startManager(quick, func(inner client.Client) client.Client {
			return interceptor.NewClient(watchless{inner}, interceptor.Funcs{
				Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, obj client.Object, opts ...client.GetOption) error {
					if _, ok := obj.(*corev1.Service); ok {
						return apierrors.NewNotFound(corev1.Resource("services"), key.Name)
					}
					return c.Get(ctx, key, obj, opts...)
				},
			})
		})
		Consistently(func(g Gomega) {
			a := t.assignment("web")
			g.Expect(a).NotTo(BeNil())
			g.Expect(a.UID).To(Equal(before.UID))
		}).WithTimeout(2 * time.Second).Should(Succeed())
		Expect(t.reservations()).To(HaveLen(1))
	})
})

var _ = Describe("a range that the API server refuses", func() {
	It("is told in RangesReady, and Services are assigned without it", func() {
		var allowed atomic.Bool
		startManager(quick, func(inner client.Client) client.Client {
			return interceptor.NewClient(watchless{inner}, interceptor.Funcs{
				Create: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.CreateOption) error {
					if cidr, ok := obj.(*networkingv1.ServiceCIDR); ok && !allowed.Load() {
						return apierrors.NewForbidden(networkingv1.Resource("servicecidrs"), cidr.GenerateName+"x7k2p", fmt.Errorf("not on this cluster"))
					}
					return c.Create(ctx, obj, opts...)
				},
			})
		})
		t := newTenant()
		p := t.policy("", ranges(t.v4))
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(And(HavePrefix("False RegistrationRefused"),
			ContainSubstring(t.v4.String()), ContainSubstring("not on this cluster"), Not(ContainSubstring("x7k2p"))))
		svc := t.service("web", nil)
		a := t.allocation(svc, metav1.ConditionFalse)
		Expect(a.Spec.ServiceIPs).To(HaveLen(1))
		allowed.Store(true)
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		Expect(additionalIPs(t.allocated(svc))).To(HaveLen(1))
	})
})

var _ = Describe("LoadBalancer ranges", func() {
	It("are counted, never registered, and give nothing to a Service of another class", func() {
		startManager(quick, nil)
		t := newTenant()
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.ServiceRanges = []v1alpha1.ServiceRange{{CIDR: t.v4.String(), Use: v1alpha1.RangeUseLoadBalancer}}
		})
		svc := t.service("web", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeLoadBalancer })
		a := t.allocated(svc)
		Expect(a.Spec.ServiceIPs).To(HaveLen(1))
		Expect(a.Spec.LoadBalancerIPs).To(BeEmpty())
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		Expect(p.Status.ServiceRanges).To(ConsistOf(v1alpha1.ServiceRangeStatus{CIDR: t.v4.String(), Ready: true, AddressCounts: v1alpha1.AddressCounts{Total: 254, Free: 254}}))
		var cidrs networkingv1.ServiceCIDRList
		Expect(k8s.List(ctx, &cidrs, client.MatchingLabels{v1alpha1.LabelPolicy: p.Name})).To(Succeed())
		Expect(cidrs.Items).To(BeEmpty())
		Expect(t.reservations()).To(BeEmpty())
	})
})

var _ = Describe("a policy that was applied just now", func() {
	It("is not Ready before its Services have been looked at, and one Service that cannot be assigned keeps only its own policy from being Ready", func() {
		var held atomic.Bool
		held.Store(true)
		t, other := newTenant(), newTenant()
		startManager(quick, func(inner client.Client) client.Client {
			return interceptor.NewClient(watchless{inner}, interceptor.Funcs{
				Create: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.CreateOption) error {
					if _, ok := obj.(*v1alpha1.ServiceAssignment); ok && obj.GetNamespace() == t.name && held.Load() {
						return apierrors.NewInternalError(fmt.Errorf("disk full"))
					}
					return c.Create(ctx, obj, opts...)
				},
			})
		})
		svc := t.service("web", nil)
		p := t.policy("", nil)
		Eventually(policyCondition(p, v1alpha1.PolicyReady)).Should(HavePrefix("False Programming"))
		Consistently(policyCondition(p, v1alpha1.PolicyReady)).Should(HavePrefix("False Programming"))
		Eventually(policyCondition(other.policy("", nil), v1alpha1.PolicyReady)).Should(HavePrefix("True"))
		held.Store(false)
		t.allocated(svc)
		Eventually(policyCondition(p, v1alpha1.PolicyProgrammed)).Should(HavePrefix("False Programming: 0 of 1 covered"))
		Expect(k8s.Delete(ctx, svc)).To(Succeed())
		Eventually(policyCondition(p, v1alpha1.PolicyReady)).Should(HavePrefix("True"))
	})
})

var _ = Describe("Services older than a range that becomes ready", func() {
	It("have their assignment at once and are never told that they wait", func() {
		var told, waits atomic.Int64
		t := newTenant()
		services := []*corev1.Service{t.service("a", nil), t.service("b", nil), t.service("c", nil)}
		options := quick
		options.RangeGrace = 4 * time.Second
		startManager(options, func(inner client.Client) client.Client {
			return interceptor.NewClient(watchless{inner}, interceptor.Funcs{
				SubResourceApply: func(ctx context.Context, c client.Client, sub string, obj runtime.ApplyConfiguration, opts ...client.SubResourceApplyOption) error {
					b, err := json.Marshal(obj)
					if err != nil {
						return err
					}
					told.Add(int64(strings.Count(string(b), `"status":"True"`)))
					if strings.Contains(string(b), `"status":"False"`) {
						waits.Add(1)
					}
					return c.SubResource(sub).Apply(ctx, obj, opts...)
				},
			})
		})
		p := t.policy("", ranges(t.v4))
		Eventually(func() int { return len(t.assignments()) }).Should(Equal(len(services)))
		Expect(policyCondition(p, v1alpha1.PolicyRangesReady)()).NotTo(HavePrefix("True"))
		for _, svc := range services {
			Expect(additionalIPs(t.allocated(svc))).To(HaveLen(1))
		}
		Expect(told.Load()).To(BeNumerically(">=", len(services)), "told that they have all they are owed")
		Expect(waits.Load()).To(BeZero())
	})
})
