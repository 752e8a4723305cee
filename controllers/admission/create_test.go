package admission_test

import (
	"fmt"
	"net/http"
	"sync"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	corev1apply "k8s.io/client-go/applyconfigurations/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

func nodePort(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeNodePort }

func loadBalancer(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeLoadBalancer }

func families(policy corev1.IPFamilyPolicy, families ...corev1.IPFamily) func(*corev1.Service) {
	return func(svc *corev1.Service) {
		svc.Spec.IPFamilyPolicy, svc.Spec.IPFamilies = &policy, families
	}
}

var _ = Describe("CREATE", func() {
	It("gives the cluster IP and the node port from the policy's ranges, once", func() {
		t := newTenant(nil)
		svc := t.create("web", nodePort)
		Expect(svc.Spec.ClusterIPs).To(ConsistOf(svc.Spec.ClusterIP))
		Expect(svc.Spec.ClusterIP).To(inside(t.v4))
		Expect(svc.Spec.Ports[0].NodePort).To(t.ofTenant())
		Expect(svc.Annotations).To(HaveKey(v1alpha1.AnnotationReservation))
		Expect(svc.Spec.IPFamilies).To(Equal([]corev1.IPFamily{"IPv4"}))
		Expect(heard.take()).To(BeEmpty())
		t.expectBound(svc) // and nothing else was claimed, although two webhooks saw the request
	})

	It("gives a Service with a generated name its own", func() {
		t := newTenant(nil)
		var svcs []*corev1.Service
		for range 3 {
			svcs = append(svcs, t.create("", func(svc *corev1.Service) { svc.GenerateName = "web-"; nodePort(svc) }))
		}
		for _, svc := range svcs {
			Expect(svc.Spec.ClusterIP).To(inside(t.v4))
		}
		t.expectBound(svcs...)
	})

	It("lets the API server answer 409 when the name exists, and keeps nothing", func() {
		t := newTenant(func(_ *tenant, s *v1alpha1.ServiceProxyPolicySpec) {
			s.Reuse.StickyFor = &metav1.Duration{Duration: 1e12}
		})
		svc := t.create("web", nodePort)
		t.expectBound(svc)
		err := k8s.Create(ctx, t.service("web", nodePort))
		Expect(apierrors.IsAlreadyExists(err)).To(BeTrue(), "%v", err)
		Expect(names(t.claims())).To(Equal(t.locksOf(svc)))
	})

	It("takes and shows nothing under dry run", func() {
		t := newTenant(nil)
		svc := t.service("web", nodePort)
		Expect(k8s.Create(ctx, svc, client.DryRunAll)).To(Succeed())
		Expect(svc.Annotations).To(BeEmpty())

		apply := func(options ...client.ApplyOption) error {
			c := corev1apply.Service("applied", t.name).WithSpec(corev1apply.ServiceSpec().WithType(corev1.ServiceTypeNodePort).
				WithPorts(corev1apply.ServicePort().WithPort(80).WithProtocol(corev1.ProtocolTCP)))
			return k8s.Apply(ctx, c, append(options, client.FieldOwner("test"))...)
		}
		Expect(apply(client.DryRunAll)).To(Succeed())
		Expect(t.claims()).To(BeEmpty())
		Expect(heard.take()).To(BeEmpty())

		By("and server-side apply for real, of a new Service and again")
		Expect(apply()).To(Succeed())
		var applied corev1.Service
		Expect(k8s.Get(ctx, client.ObjectKey{Namespace: t.name, Name: "applied"}, &applied)).To(Succeed())
		Expect(applied.Spec.ClusterIP).To(inside(t.v4))
		for _, options := range [][]client.ApplyOption{{client.DryRunAll}, {}} {
			Expect(apply(options...)).To(Succeed())
			var now corev1.Service
			Expect(k8s.Get(ctx, client.ObjectKeyFromObject(&applied), &now)).To(Succeed())
			Expect(now.Spec.ClusterIP).To(Equal(applied.Spec.ClusterIP))
			Expect(now.Spec.Ports[0].NodePort).To(Equal(applied.Spec.Ports[0].NodePort))
		}
		t.expectBound(&applied)
	})

	It("says under dry run what is certain to be denied", func() {
		t := newTenant(func(t *tenant, s *v1alpha1.ServiceProxyPolicySpec) {
			strict(t, s)
			s.ServiceRanges[0].Reserved = []string{t.v4.Addr().Next().String()}
		})
		err := k8s.Create(ctx, t.service("web", func(svc *corev1.Service) { svc.Spec.ClusterIP = t.v4.Addr().Next().String() }), client.DryRunAll)
		Expect(err).To(MatchError(ContainSubstring("is reserved in range %s of policy %s", t.v4, t.name)))
	})

	It("leaves ExternalName and headless Services alone", func() {
		t := newTenant(nil)
		external := t.create("external", func(svc *corev1.Service) {
			svc.Spec.Type, svc.Spec.ExternalName = corev1.ServiceTypeExternalName, "example.org"
		})
		headless := t.create("headless", func(svc *corev1.Service) { svc.Spec.ClusterIP = corev1.ClusterIPNone })
		Expect(external.Spec.ClusterIP).To(BeEmpty())
		Expect(headless.Spec.ClusterIPs).To(Equal([]string{corev1.ClusterIPNone}))
		Expect(external.Annotations).To(BeEmpty())
		Expect(headless.Annotations).To(BeEmpty())
		Expect(t.claims()).To(BeEmpty())
	})

	It("gives one node port to TCP and UDP of one number, and a health check its own", func() {
		t := newTenant(nil)
		svc := t.create("dns", func(svc *corev1.Service) {
			loadBalancer(svc)
			svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
			svc.Spec.Ports = []corev1.ServicePort{{Name: "tcp", Port: 53, Protocol: "TCP"}, {Name: "udp", Port: 53, Protocol: "UDP"}, {Name: "metrics", Port: 9153}}
		})
		Expect(svc.Spec.Ports[0].NodePort).To(Equal(svc.Spec.Ports[1].NodePort))
		Expect(svc.Spec.Ports[2].NodePort).NotTo(Equal(svc.Spec.Ports[1].NodePort))
		Expect(portsOf(svc)).To(HaveEach(t.ofTenant()))
		Expect(svc.Spec.HealthCheckNodePort).To(And(t.ofTenant(), Not(BeElementOf(portsOf(svc)))))
		t.expectBound(svc)
		Expect(t.claims()[fmt.Sprintf("nodeport-%d", svc.Spec.HealthCheckNodePort)].Spec.Use).To(Equal(v1alpha1.ClaimUseHealthCheckNodePort))
	})

	It("gives a load balancer that wants no node ports none, but those it names", func() {
		t := newTenant(nil)
		svc := t.create("lb", func(svc *corev1.Service) {
			loadBalancer(svc)
			svc.Spec.AllocateLoadBalancerNodePorts = new(false)
			svc.Spec.Ports = []corev1.ServicePort{{Name: "a", Port: 80}, {Name: "b", Port: 81, NodePort: int32(t.ports.First) + 5}}
		})
		Expect(portsOf(svc)).To(Equal([]int32{0, int32(t.ports.First) + 5}))
		t.expectBound(svc)
	})

	It("never gives one address or port to two of many Services at once", func() {
		t := newTenant(nil)
		svcs := make([]*corev1.Service, portsEach/2)
		errs := make([]error, len(svcs))
		var wg sync.WaitGroup
		for i := range svcs {
			svcs[i] = t.service(fmt.Sprintf("web-%d", i), nodePort)
			wg.Go(func() { errs[i] = k8s.Create(ctx, svcs[i]) })
		}
		wg.Wait()
		seen := map[any]bool{}
		for i, svc := range svcs {
			Expect(errs[i]).NotTo(HaveOccurred())
			Expect(svc.Spec.ClusterIP).To(inside(t.v4))
			Expect(svc.Spec.Ports[0].NodePort).To(t.ofTenant())
			Expect(seen).NotTo(Or(HaveKey(svc.Spec.ClusterIP), HaveKey(svc.Spec.Ports[0].NodePort)))
			seen[svc.Spec.ClusterIP], seen[svc.Spec.Ports[0].NodePort] = true, true
		}
		t.expectBound(svcs...)
	})

	It("gives a request that another webhook or the client sends again what it has already", func() {
		t := newTenant(nil)
		svc := t.create("web", nil)
		t.expectBound(svc)

		By("a token copied with the address of a Service that has it means nothing")
		copied := t.service("copy", func(c *corev1.Service) {
			c.Annotations = map[string]string{v1alpha1.AnnotationReservation: svc.Annotations[v1alpha1.AnnotationReservation]}
			c.Spec.ClusterIP = svc.Spec.ClusterIP
		})
		err := k8s.Create(ctx, copied)
		Expect(apierrors.IsInvalid(err)).To(BeTrue(), "%v", err)
		Expect(err).To(MatchError(ContainSubstring("already allocated")))

		By("a token copied without it is replaced")
		fresh := t.create("fresh", func(c *corev1.Service) { c.Annotations = copied.Annotations })
		Expect(fresh.Spec.ClusterIP).To(And(inside(t.v4), Not(Equal(svc.Spec.ClusterIP))))
		Expect(fresh.Annotations[v1alpha1.AnnotationReservation]).NotTo(Equal(svc.Annotations[v1alpha1.AnnotationReservation]))

		By("a token copied to where nothing is claimed is taken off")
		other := newNamespace()
		plain := other.create("plain", func(c *corev1.Service) { c.Annotations = copied.Annotations })
		Expect(plain.Annotations).NotTo(HaveKey(v1alpha1.AnnotationReservation))
		t.expectBound(svc, fresh)
	})
})

var _ = Describe("What a request names", func() {
	It("is honoured and recorded", func() {
		t := newTenant(nil)
		addr := t.v4.Addr().Next().Next().String()
		svc := t.create("static", func(svc *corev1.Service) {
			nodePort(svc)
			svc.Spec.ClusterIP = addr
			svc.Spec.Ports[0].NodePort = int32(t.ports.First)
		})
		Expect(svc.Spec.ClusterIP).To(Equal(addr))
		Expect(svc.Annotations).To(HaveKey(v1alpha1.AnnotationReservation))
		t.expectBound(svc)
		Expect(heard.take()).To(BeEmpty())

		By("and whoever names it after that hears from the API server who allocated it")
		err := k8s.Create(ctx, t.service("late", func(svc *corev1.Service) { svc.Spec.ClusterIP = addr }))
		Expect(apierrors.IsInvalid(err)).To(BeTrue(), "%v", err)
		t.expectBound(svc)
	})

	It("is denied while it is reserved for another request, and taken over from what rests or came to nothing", func() {
		t := newTenant(nil)
		addr := t.v4.Addr().Next()
		named := func(svc *corev1.Service) { svc.Spec.ClusterIP = addr.String() }
		claim := &v1alpha1.AllocationClaim{ObjectMeta: metav1.ObjectMeta{Name: addr.String(), Labels: map[string]string{v1alpha1.LabelManagedBy: v1alpha1.ManagedBy}},
			Spec: v1alpha1.AllocationClaimSpec{Address: addr.String(), Use: v1alpha1.ClaimUseClusterIP, PolicyName: t.name, State: v1alpha1.ClaimReserved,
				ReservationToken: "x", Holder: v1alpha1.ClaimHolder{Namespace: t.name, Name: "first"}}}
		Expect(k8s.Create(ctx, claim.DeepCopy())).To(Succeed())
		err := k8s.Create(ctx, t.service("second", named))
		Expect(err).To(MatchError(And(ContainSubstring("spec.clusterIPs[0]: %s is reserved for Service %s/first", addr, t.name))))
		Expect(apierrors.ReasonForError(err)).To(Equal(metav1.StatusReasonInvalid))

		first := t.create("first", named)
		t.expectBound(first)

		Expect(k8s.Delete(ctx, first)).To(Succeed())
		Eventually(t.claims).Should(BeEmpty())
		claim.Spec.State, claim.Spec.ReservationToken, claim.Spec.ExpiresAt = v1alpha1.ClaimReleased, "", &metav1.Time{Time: metav1.Now().Add(3600e9)}
		Expect(k8s.Create(ctx, claim.DeepCopy())).To(Succeed())
		var third *corev1.Service
		Eventually(func() error { // the API server deletes the IPAddress some time after the Service
			third = t.service("third", named)
			return k8s.Create(ctx, third)
		}).Should(Succeed())
		t.expectBound(third)
	})

	It("is served from Manual ranges, with a warning from what is reserved or drains, and only with a warning in others' ranges", func() {
		t := newTenant(func(t *tenant, s *v1alpha1.ServiceProxyPolicySpec) {
			s.ServiceRanges = []v1alpha1.ServiceRange{
				{CIDR: t.v4.String(), Allocation: v1alpha1.RangeAllocationManual, Reserved: []string{t.v4.Addr().Next().String()}},
				{CIDR: t.v6.String(), Allocation: v1alpha1.RangeAllocationDraining}}
		})
		first := t.v4.Addr().Next()
		manual := t.create("manual", func(svc *corev1.Service) { svc.Spec.ClusterIP = first.Next().String() })
		Expect(heard.take()).To(BeEmpty())
		reserved := t.create("reserved", func(svc *corev1.Service) { svc.Spec.ClusterIP = first.String() })
		Expect(heard.take()).To(ContainSubstring("%s is reserved in range %s of policy %s", first, t.v4, t.name))
		draining := t.create("draining", func(svc *corev1.Service) { svc.Spec.ClusterIP = t.v6.Addr().Next().String() })
		Expect(heard.take()).To(ContainSubstring("lies in %s, which policy %s drains", t.v6, t.name))
		t.expectBound(manual, reserved, draining)

		By("a Service that names nothing gets nothing of them")
		plain := t.create("plain", nil)
		Expect(plain.Spec.ClusterIP).To(steeredAddr())
		Expect(heard.take()).To(And(ContainSubstring("policy %s gives out no IPv4 addresses", t.name), ContainSubstring(plain.Spec.ClusterIP)))

		other := newNamespace()
		other.create("intruder", func(svc *corev1.Service) {
			nodePort(svc)
			svc.Spec.ClusterIP = first.Next().Next().String()
			svc.Spec.Ports[0].NodePort = int32(t.ports.Last)
		})
		Expect(heard.take()).To(And(ContainSubstring("lies in %s, which policy %s declares", t.v4, t.name),
			ContainSubstring("node port %d lies in %d-%d, which policy %s declares", t.ports.Last, t.ports.First, t.ports.Last, t.name)))
		Expect(other.claims()).To(BeEmpty())
	})

	It("is denied outside of what a Strict policy has", func() {
		t := newTenant(strict)
		other := newTenant(nil)
		for what, change := range map[string]func(*corev1.Service){
			"belongs to no policy":                               func(svc *corev1.Service) { svc.Spec.ClusterIP = "10.97.1.1" },
			fmt.Sprintf("belongs to policy %s (", other.name):    func(svc *corev1.Service) { svc.Spec.ClusterIP = other.v4.Addr().Next().String() },
			fmt.Sprintf("and has node ports %d-", t.ports.First): func(svc *corev1.Service) { nodePort(svc); svc.Spec.Ports[0].NodePort = int32(other.ports.First) },
		} {
			err := k8s.Create(ctx, t.service("web", change))
			Expect(err).To(MatchError(And(ContainSubstring(what), ContainSubstring("policy %s is Strict", t.name))))
			Expect(apierrors.ReasonForError(err)).To(Equal(metav1.StatusReasonForbidden))
		}
		Expect(t.claims()).To(BeEmpty())
	})
})

var _ = Describe("Families", func() {
	single, prefer, require := corev1.IPFamilyPolicySingleStack, corev1.IPFamilyPolicyPreferDualStack, corev1.IPFamilyPolicyRequireDualStack
	only := func(i int, enforcement v1alpha1.Enforcement) func(*tenant, *v1alpha1.ServiceProxyPolicySpec) {
		return func(_ *tenant, s *v1alpha1.ServiceProxyPolicySpec) {
			s.ServiceRanges, s.Enforcement = s.ServiceRanges[i:i+1], enforcement
		}
	}

	It("come both from the policy, in the order that is asked for", func() {
		t := newTenant(nil)
		a := t.create("a", families(require))
		Expect(a.Spec.ClusterIPs).To(HaveExactElements(inside(t.v4), inside(t.v6)))
		b := t.create("b", families(prefer, "IPv6"))
		Expect(b.Spec.ClusterIPs).To(HaveExactElements(inside(t.v6), inside(t.v4)))
		c := t.create("c", families(single, "IPv6"))
		Expect(c.Spec.ClusterIPs).To(HaveExactElements(inside(t.v6)))
		t.expectBound(a, b, c)
	})

	It("are the policy's where the request does not say", func() {
		t := newTenant(only(1, v1alpha1.EnforcementStrict))
		svc := t.create("web", nil)
		Expect(svc.Spec.ClusterIPs).To(HaveExactElements(inside(t.v6)))
		Expect(svc.Spec.IPFamilies).To(HaveExactElements(corev1.IPv6Protocol))
		t.expectBound(svc)
	})

	It("fall back to one under Strict if a second is only preferred, and are all or nothing if it is required", func() {
		t := newTenant(only(0, v1alpha1.EnforcementStrict))
		svc := t.create("prefer", families(prefer, "IPv4", "IPv6"))
		Expect(svc.Spec.ClusterIPs).To(HaveExactElements(inside(t.v4)))
		Expect(*svc.Spec.IPFamilyPolicy).To(Equal(single))
		Expect(svc.Spec.IPFamilies).To(HaveExactElements(corev1.IPv4Protocol))
		Expect(svc.Annotations[v1alpha1.AnnotationSingleStack]).To(ContainSubstring("policy %s gives out no IPv6 addresses", t.name))
		Expect(heard.take()).To(ContainSubstring("falls back to SingleStack"))
		t.expectBound(svc)

		err := k8s.Create(ctx, t.service("require", families(require)))
		Expect(err).To(MatchError(And(ContainSubstring("spec.clusterIPs[1]: policy %s gives out no IPv6 addresses", t.name), ContainSubstring("Strict"))))
		t.expectBound(svc)

		By("an update to dual stack falls back in the same way")
		plain := t.create("plain", nil)
		update(plain, func(svc *corev1.Service) { svc.Spec.IPFamilyPolicy = new(prefer) })
		Expect(plain.Spec.ClusterIPs).To(HaveLen(1))
		Expect(*plain.Spec.IPFamilyPolicy).To(Equal(single))
		t.expectBound(svc, plain)
	})

	It("that run out are dropped, denied or steered", func() {
		tiny := func(t *tenant, s *v1alpha1.ServiceProxyPolicySpec) {
			t.v6 = mustMask(t.v6, 126)
			s.ServiceRanges[1].CIDR = t.v6.String()
		}
		t := newTenant(func(t *tenant, s *v1alpha1.ServiceProxyPolicySpec) { tiny(t, s); strict(t, s) })
		var svcs []*corev1.Service
		for i := range 3 {
			svcs = append(svcs, t.create(fmt.Sprintf("fill-%d", i), families(require)))
		}
		last := t.create("prefer", families(prefer))
		Expect(last.Spec.ClusterIPs).To(HaveExactElements(inside(t.v4)))
		Expect(last.Annotations[v1alpha1.AnnotationSingleStack]).To(ContainSubstring("no free IPv6 addresses: 3 of 3 in use"))
		t.expectBound(append(svcs, last)...)
		err := k8s.Create(ctx, t.service("require", families(require)))
		Expect(err).To(MatchError(ContainSubstring("no free IPv6 addresses: 3 of 3 in use")))
		t.expectBound(append(svcs, last)...) // the IPv4 address that it had is gone again

		effort := newTenant(tiny)
		for i := range 3 {
			effort.create(fmt.Sprintf("fill-%d", i), families(require))
		}
		heard.take()
		both := effort.create("require", families(require))
		Expect(both.Spec.ClusterIPs).To(HaveExactElements(inside(effort.v4), steeredAddr()))
		Expect(heard.take()).To(ContainSubstring("no free IPv6 addresses: 3 of 3 in use; the Service gets %s", both.Spec.ClusterIPs[1]))
	})

	It("of which the policy has none are steered under BestEffort", func() {
		t := newTenant(only(0, v1alpha1.EnforcementBestEffort))
		svc := t.create("prefer", families(prefer))
		Expect(svc.Spec.ClusterIPs).To(HaveExactElements(inside(t.v4), steeredAddr()))
		Expect(heard.take()).To(ContainSubstring("policy %s gives out no IPv6 addresses", t.name))
		t.expectBound(svc)
	})
})

var _ = Describe("Exhaustion", func() {
	small := func(t *tenant, s *v1alpha1.ServiceProxyPolicySpec) {
		t.v4 = mustMask(t.v4, 30)
		s.ServiceRanges = []v1alpha1.ServiceRange{{CIDR: t.v4.String()}}
	}

	It("steers under BestEffort, with a warning", func() {
		t := newTenant(func(t *tenant, s *v1alpha1.ServiceProxyPolicySpec) {
			small(t, s)
			t.ports = allocator.PortRange{First: 30010, Last: 30011}
			s.NodePortRange = &v1alpha1.NodePortRange{Start: 30010, End: 30011}
		})
		for i := range 2 {
			svc := t.create(fmt.Sprintf("fill-%d", i), nodePort)
			Expect(svc.Spec.ClusterIP).To(inside(t.v4))
		}
		Expect(heard.take()).To(BeEmpty())
		svc := t.create("late", nodePort)
		Expect(svc.Spec.ClusterIP).To(steeredAddr())
		Expect(svc.Spec.Ports[0].NodePort).To(steeredPort())
		Expect(svc.Annotations).NotTo(HaveKey(v1alpha1.AnnotationReservation))
		Expect(heard.take()).To(And(
			ContainSubstring("policy %s has no free IPv4 addresses: 2 of 2 in use; the Service gets %s", t.name, svc.Spec.ClusterIP),
			ContainSubstring("policy %s has no free node ports: 2 of 2 in use; the Service gets node port %d", t.name, svc.Spec.Ports[0].NodePort)))
	})

	It("is denied under Strict, keeps nothing, and ends with the next release", func() {
		t := newTenant(func(t *tenant, s *v1alpha1.ServiceProxyPolicySpec) {
			small(t, s)
			strict(t, s)
		})
		a, b := t.create("a", nodePort), t.create("b", nodePort)
		err := k8s.Create(ctx, t.service("late", nodePort))
		Expect(err).To(MatchError(And(ContainSubstring("policy %s has no free IPv4 addresses: 2 of 2 in use", t.name), ContainSubstring("spec.serviceRanges"))))
		Expect(apierrors.ReasonForError(err)).To(Equal(metav1.StatusReasonForbidden))
		Expect(err.(apierrors.APIStatus).Status().Code).To(BeEquivalentTo(http.StatusForbidden))
		t.expectBound(a, b)
		Expect(k8s.Delete(ctx, b)).To(Succeed())
		late := t.service("late", nodePort)
		Eventually(func() error { return k8s.Create(ctx, late) }).Should(Succeed())
		Expect(late.Spec.ClusterIP).To(Equal(b.Spec.ClusterIP))
		t.expectBound(a, late)
	})
})

var _ = Describe("A Service that no policy covers", func() {
	It("is steered out of all that policies declare", func() {
		// The API server left alone would draw from these, too: most of its own range, most of its node ports, and a range of the policy's own.
		t := newTenant(func(t *tenant, s *v1alpha1.ServiceProxyPolicySpec) {
			s.ServiceRanges = append(s.ServiceRanges, v1alpha1.ServiceRange{CIDR: "10.104.0.0/13"}, v1alpha1.ServiceRange{CIDR: "10.201.0.0/16"})
			t.ports = allocator.PortRange{First: 31700, Last: 32767}
			s.NodePortRange = &v1alpha1.NodePortRange{Start: 31700, End: 32767}
		})
		DeferCleanup(t.forgetPolicy)
		other := newNamespace()
		var wg sync.WaitGroup
		svcs, errs := make([]*corev1.Service, 100), make([]error, 100)
		for i := range svcs {
			svcs[i] = other.service(fmt.Sprintf("web-%d", i), func(svc *corev1.Service) {
				nodePort(svc)
				families(corev1.IPFamilyPolicyRequireDualStack)(svc)
				svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: "b", Port: 81, TargetPort: intstr.FromInt32(81)})
			})
			wg.Go(func() { errs[i] = k8s.Create(ctx, svcs[i]) })
		}
		wg.Wait()
		seen := map[any]bool{}
		for i, svc := range svcs {
			Expect(errs[i]).NotTo(HaveOccurred())
			Expect(svc.Spec.ClusterIPs).To(HaveEach(steeredAddr()))
			Expect(portsOf(svc)).To(HaveEach(steeredPort()))
			Expect(svc.Annotations).To(BeEmpty())
			for _, p := range portsOf(svc) {
				Expect(seen).NotTo(HaveKey(p))
				seen[p] = true
			}
		}
		Expect(other.claims()).To(BeEmpty())
		Expect(heard.take()).To(BeEmpty())
		Expect(k8s.DeleteAllOf(ctx, &corev1.Service{}, client.InNamespace(other.name))).To(Succeed())
	})
})
