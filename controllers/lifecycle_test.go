package controllers

import (
	"context"
	"fmt"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// reserve makes a claim as admission does for a request of the Service name, empty under generateName.
func (t *tenant) reserve(policy string, lock allocator.Lock, name string) *v1alpha1.AllocationClaim {
	GinkgoHelper()
	use := v1alpha1.ClaimUseClusterIP
	if lock.IsPort() {
		use = v1alpha1.ClaimUseNodePort
	}
	c := allocator.NewClaim(lock, allocator.Hold{Policy: policy, Use: use, State: v1alpha1.ClaimReserved, Holder: allocator.Holder{Namespace: t.name, Name: name}})
	c.Spec.ReservationToken = "token-" + name
	Expect(k8s.Create(ctx, c)).To(Succeed())
	return c
}

// holder of a claim and its state, empty if there is no claim.
func holderAndState(lock allocator.Lock) func() string {
	return func() string {
		c := claimOn(lock)
		if c == nil {
			return ""
		}
		return c.Spec.Holder.Name + " " + string(c.Spec.State)
	}
}

// at gives the Service a cluster IP.
func at(ip fmt.Stringer) func(*corev1.Service) {
	return func(s *corev1.Service) { s.Spec.ClusterIP = ip.String() }
}

func reclaimed(kind string) float64 {
	GinkgoHelper()
	c, err := newReclaimed(metrics.Registry)
	Expect(err).NotTo(HaveOccurred())
	var m dto.Metric
	Expect(c.WithLabelValues(kind).Write(&m)).To(Succeed())
	return m.GetCounter().GetValue()
}

// dead fails every read.
type dead struct{}

func (dead) Get(context.Context, client.ObjectKey, client.Object, ...client.GetOption) error {
	return fmt.Errorf("read past the cache")
}

func (dead) List(context.Context, client.ObjectList, ...client.ListOption) error {
	return fmt.Errorf("read past the cache")
}

var _ = Describe("what admission reserved", func() {
	It("is bound to the Service that has it, whatever the request was called", func() {
		startManager(quick, nil)
		t := newTenant()
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			ranges(t.v4)(s)
			s.NodePortRange = &v1alpha1.NodePortRange{Start: 31010, End: 31019}
		})
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		for i, reservedFor := range []string{"web-0", "", "other"} {
			ip, port := allocator.AddrLock(t.address(20+i)), allocator.PortLock(uint16(31010+i))
			t.reserve(p.Name, ip, reservedFor)
			t.reserve(p.Name, port, reservedFor)
			svc := t.service(fmt.Sprint("web-", i), func(s *corev1.Service) {
				at(t.address(20 + i))(s)
				s.Spec.Type, s.Spec.Ports[0].NodePort = corev1.ServiceTypeNodePort, int32(port.Port)
			})
			t.allocated(svc)
			for _, lock := range []allocator.Lock{ip, port} {
				Eventually(holderAndState(lock)).Should(Equal(svc.Name + " Bound"))
				Expect(claimOn(lock).Spec.Holder.UID).To(Equal(svc.UID))
				Expect(claimOn(lock).Spec.ReservationToken).To(BeEmpty())
			}
		}
	})

	It("is bound at the cost of one write", func() {
		t := newTenant()
		svc := t.newService("web", at(t.address(5)))
		svc.UID = "uid"
		lock := allocator.AddrLock(t.address(5))
		claim := t.reserve(t.name, lock, "web")
		l := newLedger(quick.withDefaults())
		l.onClaim(nil, claim)
		r := &serviceReconciler{client: k8s, live: dead{}, ledger: l}
		Expect(r.adopt(ctx, svc, lock, v1alpha1.ClaimUseClusterIP, t.name)).To(Succeed())
		Expect(holderAndState(lock)()).To(Equal("web Bound"))
		Expect(r.adopt(ctx, svc, lock, v1alpha1.ClaimUseClusterIP, t.name)).To(Succeed(), "again, before the informer shows it")

		By("a claim that changed since")
		l.abandon(lock)
		Expect(apierrors.IsConflict(r.adopt(ctx, svc, lock, v1alpha1.ClaimUseClusterIP, t.name))).To(BeTrue())
		Expect(k8s.Delete(ctx, claim)).To(Succeed())
	})

	It("for requests that came to nothing is deleted without a rest, and not before they must be over", func() {
		t := newTenant()
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			ranges(t.v4)(s)
			s.NodePortRange = &v1alpha1.NodePortRange{Start: 31020, End: 31029}
			s.Reuse.Quarantine = &metav1.Duration{Duration: time.Hour}
		})
		options := quick
		options.LeakAge = 3 * time.Second
		before, start := reclaimed(reclaimedReservation), time.Now()
		claims := []*v1alpha1.AllocationClaim{
			t.reserve(p.Name, allocator.AddrLock(t.address(1)), "rejected"),
			t.reserve(p.Name, allocator.AddrLock(t.address(2)), ""),
			t.reserve(p.Name, allocator.PortLock(31020), "rejected"),
			t.reserve(p.Name, allocator.AddrLock(t.address(3)), "elsewhere"),
		}
		t.service("elsewhere", nil) // exists, and has another address
		startManager(options, nil)
		for _, c := range claims {
			Eventually(gone(c)).Should(BeTrue(), c.Name)
			Expect(time.Since(start)).To(BeNumerically(">", options.LeakAge-time.Second), "creation times are whole seconds")
		}
		Expect(reclaimed(reclaimedReservation) - before).To(Equal(float64(len(claims))))
	})

	It("is not reclaimed from the Service that has it, nor by what was read before it was bound", func() {
		t := newTenant()
		p := t.policy("", nil)
		svc := t.service("web", nil)
		lock := allocator.AddrLock(clusterAddrs(svc)[0])
		c, err := newReclaimed(prometheus.NewRegistry())
		Expect(err).NotTo(HaveOccurred())
		l := newLedger(quick)
		l.onPolicy(nil, p)
		close(l.synced)
		r := &claimReconciler{client: k8s, live: k8s, ledger: l, reclaimed: c, options: Options{LeakAge: time.Nanosecond}}
		for _, reservedFor := range []string{"web", "", "other"} {
			read := t.reserve(p.Name, lock, reservedFor)
			_, err := r.settle(ctx, read.DeepCopy())
			Expect(err).NotTo(HaveOccurred())
			Expect(holderAndState(lock)()).To(Equal("web Bound"))
			Expect(apierrors.IsConflict(k8s.Delete(ctx, read, exactly(read)))).To(BeTrue())
			Expect(k8s.Delete(ctx, read)).To(Succeed())
		}

		By("a policy that does not cover the Service: it must never look as if it held a claim")
		read := t.reserve(t.name+"-stranger", lock, "")
		_, err = r.settle(ctx, read.DeepCopy())
		Expect(err).NotTo(HaveOccurred())
		Expect(holderAndState(lock)()).To(BeEmpty())
	})

	It("and that a Service has which the policy does not cover is deleted, without a rest because it is in use", func() {
		t := newTenant()
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			ranges(t.v4)(s)
			s.ServiceSelector = metav1.LabelSelector{MatchLabels: map[string]string{"tier": "gold"}}
			s.NodePortRange = &v1alpha1.NodePortRange{Start: 31030, End: 31039}
			s.Reuse.Quarantine = &metav1.Duration{Duration: time.Hour}
		})
		startManager(quick, nil)
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		ip, port := allocator.AddrLock(t.address(7)), allocator.PortLock(31030)
		t.service("web", func(s *corev1.Service) {
			at(t.address(7))(s)
			s.Spec.Type, s.Spec.Ports[0].NodePort = corev1.ServiceTypeNodePort, int32(port.Port)
		})
		t.reserve(p.Name, ip, "")
		t.reserve(p.Name, port, "")
		Eventually(holderAndState(ip)).Should(BeEmpty())
		Eventually(holderAndState(port)).Should(BeEmpty())
		Eventually(func(g Gomega) {
			g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
			g.Expect(p.Status.ServiceRanges[0].Foreign).To(Equal(int64(1)))
		}).Should(Succeed())
	})
})

var _ = Describe("an address that rests", func() {
	It("and that a Service of no policy asks for by name is foreign from then on, and no longer rests", func() {
		startManager(quick, nil)
		t := newTenant()
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			ranges(t.v4)(s)
			s.ServiceSelector = metav1.LabelSelector{MatchLabels: map[string]string{"tier": "gold"}}
			s.Reuse.Quarantine = &metav1.Duration{Duration: time.Hour}
		})
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		lock := allocator.AddrLock(t.address(60))
		svc := t.service("web", func(s *corev1.Service) {
			at(t.address(60))(s)
			s.Labels = map[string]string{"tier": "gold"}
		})
		t.allocated(svc)
		Expect(k8s.Delete(ctx, svc)).To(Succeed())
		Eventually(holderAndState(lock)).Should(Equal("web Released"))
		Eventually(rangeStatus(p, t.v4)).Should(And(HaveField("Quarantined", int64(1)), HaveField("Foreign", int64(0))))
		t.service("stray", at(t.address(60)))
		foreign := And(HaveField("Quarantined", int64(0)), HaveField("Foreign", int64(1)), HaveField("Allocated", int64(1)), HaveField("Free", int64(253)))
		Eventually(rangeStatus(p, t.v4)).Should(foreign)
		claim := claimOn(lock)
		claim.Spec.ExpiresAt = &metav1.Time{Time: time.Now()}
		Expect(k8s.Update(ctx, claim)).To(Succeed())
		Eventually(holderAndState(lock)).Should(BeEmpty())
		Consistently(rangeStatus(p, t.v4)).Should(foreign)
	})
})

var _ = Describe("records that were lost", func() {
	It("are rebuilt from the Services alone, before anything is given to others", func() {
		t := newTenant()
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			ranges(t.v4, t.v6)(s)
			s.NodePortRange = &v1alpha1.NodePortRange{Start: 31040, End: 31049}
		})
		stop := startManager(quick, nil)
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		inside := t.service("inside", func(s *corev1.Service) {
			s.Spec.ClusterIP, s.Spec.ClusterIPs = t.address(30).String(), []string{t.address(30).String(), t.v6.Addr().Next().String()}
			s.Spec.IPFamilyPolicy = ptr.To(corev1.IPFamilyPolicyRequireDualStack)
			s.Spec.Type, s.Spec.Ports[0].NodePort = corev1.ServiceTypeNodePort, 31040
		})
		locks := locksOf(inside)
		Expect(locks).To(HaveLen(3))
		before := t.allocated(inside).Spec
		stop()
		Expect(k8s.DeleteAllOf(ctx, &v1alpha1.AllocationClaim{}, client.MatchingLabels{v1alpha1.LabelPolicy: p.Name})).To(Succeed())
		Expect(k8s.DeleteAllOf(ctx, &v1alpha1.ServiceAssignment{}, client.InNamespace(t.name))).To(Succeed())
		// A record of a Service that the restored cluster never had, and one that gives an address of ours to it.
		t.left(t.address(31), "ghost", "of-another-cluster", true)
		stray := allocator.NewClaim(locks[0], allocator.Hold{Policy: p.Name, Use: v1alpha1.ClaimUseNodePort, State: v1alpha1.ClaimBound,
			Holder: allocator.Holder{Namespace: t.name, Name: "ghost", UID: "of-another-cluster"}})
		Expect(k8s.Create(ctx, stray)).To(Succeed())
		startManager(quick, nil)
		Expect(t.allocated(inside).Spec).To(Equal(before))
		for _, lock := range locks {
			Eventually(holderAndState(lock)).Should(Equal("inside Bound"))
			Expect(claimOn(lock).Spec.Holder.UID).To(Equal(inside.UID))
		}
		Eventually(holderAndState(allocator.AddrLock(t.address(31)))).Should(BeEmpty())
	})

	DescribeTable("of an additional address are rebuilt for that very address from", func(lose func(t *tenant, claim *v1alpha1.AllocationClaim)) {
		t := newTenant()
		p := t.policy("", ranges(t.v4))
		svc := t.service("web", nil)
		stop := startManager(quick, nil)
		before := additionalIPs(t.allocated(svc))
		Expect(before).To(HaveLen(1))
		stop()
		lose(t, claimOn(allocator.AddrLock(before[0])))
		startManager(quick, nil)
		Eventually(func(g Gomega) { t.consistent(g, p.Name, []*corev1.Service{svc}, 1) }).Should(Succeed())
		Consistently(func() any { return additionalIPs(t.assignment("web")) }).Should(Equal(before))
	},
		Entry("the assignment and the reservation", func(_ *tenant, c *v1alpha1.AllocationClaim) { Expect(k8s.Delete(ctx, c)).To(Succeed()) }),
		Entry("the assignment", func(t *tenant, c *v1alpha1.AllocationClaim) {
			Expect(k8s.Delete(ctx, c)).To(Succeed())
			Expect(k8s.Delete(ctx, &t.reservations()[0])).To(Succeed())
		}),
		Entry("the reservation", func(t *tenant, c *v1alpha1.AllocationClaim) {
			Expect(k8s.Delete(ctx, c)).To(Succeed())
			Expect(k8s.Delete(ctx, t.assignment("web"))).To(Succeed())
		}),
		Entry("the assignment, though a claim says that the address rests", func(_ *tenant, c *v1alpha1.AllocationClaim) {
			allocator.Release(c, time.Now().Add(time.Hour))
			Expect(k8s.Update(ctx, c)).To(Succeed())
		}),
	)

	It("because somebody deleted them come back as they were", func() {
		startManager(quick, nil)
		t := newTenant()
		p := t.policy("", ranges(t.v4))
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		inside, older := t.service("inside", at(t.address(3))), t.service("older", nil)
		t.allocated(inside)
		had := additionalIPs(t.allocated(older))
		Expect(k8s.DeleteAllOf(ctx, &v1alpha1.AllocationClaim{}, client.MatchingLabels{v1alpha1.LabelPolicy: p.Name})).To(Succeed())
		Eventually(holderAndState(allocator.AddrLock(t.address(3)))).Should(Equal("inside Bound"))
		Eventually(holderAndState(allocator.AddrLock(had[0]))).Should(Equal("older Bound"))
		Consistently(func() any { return additionalIPs(t.assignment("older")) }).Should(Equal(had))
	})

	It("of an additional address that another Service has by now are not: the loser gets a fresh one", func() {
		t := newTenant()
		t.policy("", ranges(t.v4))
		svc := t.service("web", nil)
		stop := startManager(quick, nil)
		lost := additionalIPs(t.allocated(svc))[0]
		stop()
		Expect(k8s.Delete(ctx, claimOn(allocator.AddrLock(lost)))).To(Succeed())
		Expect(k8s.Delete(ctx, &networkingv1.IPAddress{ObjectMeta: metav1.ObjectMeta{Name: lost.String()}})).To(Succeed())
		t.service("taker", at(lost))
		startManager(quick, nil)
		Eventually(func() any { return additionalIPs(t.assignment("web")) }).Should(And(HaveLen(1), Not(ContainElement(lost))))
		Eventually(holderAndState(allocator.AddrLock(lost))).Should(Equal("taker Bound"))
	})
})
