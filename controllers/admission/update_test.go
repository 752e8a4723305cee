package admission_test

import (
	"fmt"
	"net/netip"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

func mustMask(p netip.Prefix, bits int) netip.Prefix {
	return netip.PrefixFrom(p.Addr(), bits).Masked()
}

var _ = Describe("UPDATE", func() {
	It("of a PUT that leaves out what was allocated keeps it", func() {
		t := newTenant(nil)
		svc := t.create("web", func(svc *corev1.Service) {
			loadBalancer(svc)
			svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
			families(corev1.IPFamilyPolicyRequireDualStack)(svc)
		})
		t.expectBound(svc)
		put := t.service("web", func(put *corev1.Service) {
			loadBalancer(put)
			put.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
			put.Labels = map[string]string{"new": "label"}
		})
		Expect(k8s.Update(ctx, put)).To(Succeed())
		Expect(put.Labels).To(HaveKey("new"))
		Expect(put.Spec.ClusterIPs).To(Equal(svc.Spec.ClusterIPs))
		Expect(portsOf(put)).To(Equal(portsOf(svc)))
		Expect(put.Spec.HealthCheckNodePort).To(Equal(svc.Spec.HealthCheckNodePort))
		t.expectBound(svc)
	})

	It("claims what each change of the Service newly needs, and no more", func() {
		t := newTenant(nil)
		svc := t.create("web", func(svc *corev1.Service) {
			svc.Spec.Type, svc.Spec.ExternalName = corev1.ServiceTypeExternalName, "example.org"
		})
		Expect(t.claims()).To(BeEmpty())

		By("ExternalName to ClusterIP")
		update(svc, func(svc *corev1.Service) { svc.Spec.Type, svc.Spec.ExternalName = corev1.ServiceTypeClusterIP, "" })
		Expect(svc.Spec.ClusterIPs).To(HaveExactElements(inside(t.v4)))
		t.expectBound(svc)

		By("one family to two, by a PUT that names neither address")
		first := svc.Spec.ClusterIP
		update(svc, func(svc *corev1.Service) {
			svc.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack)
			svc.Spec.ClusterIP, svc.Spec.ClusterIPs, svc.Spec.IPFamilies = "", nil, nil
		})
		Expect(svc.Spec.ClusterIPs).To(HaveExactElements(Equal(first), inside(t.v6)))
		t.expectBound(svc)

		By("to NodePort")
		update(svc, nodePort)
		Expect(portsOf(svc)).To(HaveExactElements(t.ofTenant()))
		t.expectBound(svc)

		By("another port, and one that names its node port")
		was := svc.Spec.Ports[0].NodePort
		named := int32(t.ports.First) + 7
		if was == named {
			named++
		}
		update(svc, func(svc *corev1.Service) {
			svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: "b", Port: 81}, corev1.ServicePort{Name: "c", Port: 82, NodePort: named})
		})
		Expect(portsOf(svc)).To(HaveExactElements(Equal(was), t.ofTenant(), Equal(named)))
		t.expectBound(svc)

		By("to LoadBalancer with traffic to local endpoints only")
		ports := portsOf(svc)
		update(svc, func(svc *corev1.Service) {
			loadBalancer(svc)
			svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		})
		Expect(portsOf(svc)).To(Equal(ports))
		Expect(svc.Spec.HealthCheckNodePort).To(And(t.ofTenant(), Not(BeElementOf(ports))))
		t.expectBound(svc)

		By("back to ClusterIP with one family, which releases")
		update(svc, func(svc *corev1.Service) {
			svc.Spec.Type, svc.Spec.IPFamilyPolicy = corev1.ServiceTypeClusterIP, new(corev1.IPFamilyPolicySingleStack)
		})
		Expect(svc.Spec.ClusterIPs).To(HaveExactElements(first))
		t.expectBound(svc)

		By("and to ExternalName")
		update(svc, func(svc *corev1.Service) {
			svc.Spec.Type, svc.Spec.ExternalName = corev1.ServiceTypeExternalName, "example.org"
		})
		Eventually(t.claims).Should(BeEmpty())
	})

	It("gives node ports once a load balancer wants them", func() {
		t := newTenant(nil)
		svc := t.create("lb", func(svc *corev1.Service) { loadBalancer(svc); svc.Spec.AllocateLoadBalancerNodePorts = new(false) })
		Expect(portsOf(svc)).To(Equal([]int32{0}))
		update(svc, func(svc *corev1.Service) { svc.Spec.AllocateLoadBalancerNodePorts = new(true) })
		Expect(portsOf(svc)).To(HaveExactElements(t.ofTenant()))
		t.expectBound(svc)
	})

	It("of an existing Service that gets a second family works under dry run, too, and takes nothing", func() {
		t := newTenant(nil)
		svc := t.create("web", nil)
		t.expectBound(svc)
		dual := svc.DeepCopy()
		dual.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack)
		nodePort(dual)
		Expect(k8s.Update(ctx, dual, client.DryRunAll)).To(Succeed())
		Expect(dual.Annotations).To(Equal(svc.Annotations))
		t.expectBound(svc)
	})

	It("that is denied leaves the Service as it is, and keeps nothing", func() {
		t := newTenant(func(t *tenant, s *v1alpha1.ServiceProxyPolicySpec) {
			strict(t, s)
			t.ports = allocator.PortRange{First: 30020, Last: 30020}
			s.NodePortRange = &v1alpha1.NodePortRange{Start: 30020, End: 30020}
		})
		a, b := t.create("a", nodePort), t.create("b", nil)
		t.expectBound(a, b)
		changed := b.DeepCopy()
		nodePort(changed)
		changed.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack)
		err := k8s.Update(ctx, changed)
		Expect(err).To(MatchError(And(ContainSubstring("spec.ports[0].nodePort: policy %s has no free node ports: 1 of 1 in use", t.name), ContainSubstring("spec.nodePortRange"))))
		t.expectBound(a, b)
	})
})

var _ = Describe("A request that the API server refuses after it was admitted", func() {
	It("leaves no leak", func() {
		t := newTenant(nil)
		rule := &admissionv1.ValidatingAdmissionPolicy{ObjectMeta: metav1.ObjectMeta{Name: t.name}, Spec: admissionv1.ValidatingAdmissionPolicySpec{
			MatchConstraints: &admissionv1.MatchResources{ResourceRules: []admissionv1.NamedRuleWithOperations{{RuleWithOperations: admissionv1.RuleWithOperations{
				Operations: []admissionv1.OperationType{admissionv1.Create},
				Rule:       admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"services"}}}}}},
			Validations: []admissionv1.Validation{{Expression: fmt.Sprintf("object.metadata.namespace != '%s' || !has(object.metadata.labels)", t.name), Message: "no labels here"}}}}
		Expect(k8s.Create(ctx, rule)).To(Succeed())
		Expect(k8s.Create(ctx, &admissionv1.ValidatingAdmissionPolicyBinding{ObjectMeta: metav1.ObjectMeta{Name: t.name}, Spec: admissionv1.ValidatingAdmissionPolicyBindingSpec{
			PolicyName: t.name, ValidationActions: []admissionv1.ValidationAction{admissionv1.Deny}}})).To(Succeed())
		DeferCleanup(func() { Expect(k8s.Delete(ctx, rule)).To(Succeed()) })
		labelled := func(svc *corev1.Service) { nodePort(svc); svc.Labels = map[string]string{"a": "b"} }
		Eventually(func() string { // the rule takes a moment to be in force
			err := k8s.Create(ctx, t.service("refused", labelled), client.DryRunAll)
			return fmt.Sprint(err)
		}).Should(ContainSubstring("no labels here"))

		err := k8s.Create(ctx, t.service("refused", labelled))
		Expect(err).To(MatchError(ContainSubstring("no labels here")))
		Expect(t.claims()).To(HaveLen(2)) // reserved by then
		generated := t.service("", func(svc *corev1.Service) { labelled(svc); svc.GenerateName = "refused-" })
		Expect(k8s.Create(ctx, generated)).To(MatchError(ContainSubstring("no labels here")))

		By("a later request of the name is served meanwhile")
		svc := t.create("refused", nodePort)
		t.expectBound(svc)
	})

	It("leaves no leak with a ResourceQuota, either", func() {
		t := newTenant(nil)
		quota := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: t.name, Name: "q"},
			Spec: corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{corev1.ResourceServices: resource.MustParse("1")}}}
		Expect(k8s.Create(ctx, quota)).To(Succeed())
		Eventually(func() corev1.ResourceList {
			Expect(k8s.Get(ctx, client.ObjectKeyFromObject(quota), quota)).To(Succeed())
			return quota.Status.Used
		}).Should(HaveKey(corev1.ResourceServices))
		svc := t.create("web", nil)
		err := k8s.Create(ctx, t.service("second", nil))
		Expect(err).To(MatchError(ContainSubstring("exceeded quota")))
		Expect(apierrors.IsForbidden(err)).To(BeTrue())
		t.expectBound(svc)
	})
})

var _ = Describe("Re-creation", func() {
	sticky := func(_ *tenant, s *v1alpha1.ServiceProxyPolicySpec) {
		s.Reuse.StickyFor = &metav1.Duration{Duration: time.Hour}
	}

	It("gives a Service of the same name what it had, once its IPAddress is gone", func() {
		t := newTenant(sticky)
		svc := t.create("web", nodePort)
		t.expectBound(svc)
		Expect(k8s.Delete(ctx, svc)).To(Succeed())
		Eventually(func(g Gomega) {
			for _, c := range t.claims() {
				g.Expect(c.Spec.State).To(Equal(v1alpha1.ClaimReleased))
			}
			err := k8s.Get(ctx, client.ObjectKey{Name: svc.Spec.ClusterIP}, &networkingv1.IPAddress{})
			g.Expect(apierrors.IsNotFound(err)).To(BeTrue(), "%v", err)
		}).Should(Succeed())
		other := t.create("other", nodePort)
		Expect(other.Spec.ClusterIP).NotTo(Equal(svc.Spec.ClusterIP))
		var again *corev1.Service
		// The informer may show the end of the IPAddress a moment later; then the Service gets a fresh address, which is deleted again here.
		Eventually(func() string {
			again = t.create("web", nodePort)
			if again.Spec.ClusterIP != svc.Spec.ClusterIP {
				Expect(k8s.Delete(ctx, again)).To(Succeed())
			}
			return again.Spec.ClusterIP
		}).Should(Equal(svc.Spec.ClusterIP))
		Expect(portsOf(again)).To(HaveEach(t.ofTenant()))
	})

	DescribeTable("never collides, however quick", func(times int, change func(*tenant, *v1alpha1.ServiceProxyPolicySpec)) {
		t := newTenant(change)
		for i := range times {
			svc := t.service("web", nodePort)
			Expect(k8s.Create(ctx, svc)).To(Succeed(), "%d", i)
			Expect(svc.Spec.ClusterIP).To(inside(t.v4), "%d", i)
			Expect(svc.Spec.Ports[0].NodePort).To(t.ofTenant(), "%d", i)
			Expect(k8s.Delete(ctx, svc)).To(Succeed())
		}
	},
		Entry("without quarantine", 30, nil),
		Entry("sticky", 100, sticky),
	)
})
