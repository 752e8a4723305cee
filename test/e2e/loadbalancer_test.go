package e2e

import (
	"fmt"
	"net/netip"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/utils/ptr"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

var _ = Describe("a load balancer of our class", func() {
	It("shows its address once every node forwards it, and keeps it when a node goes away", func() {
		t := newTenant()
		vips := netip.MustParsePrefix(fmt.Sprintf("10.97.%d.0/24", tenants))
		t.readyPolicy(func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.ServiceRanges = append(s.ServiceRanges, v1alpha1.ServiceRange{CIDR: vips.String(), Use: v1alpha1.RangeUseLoadBalancer})
		})
		t.deploy("web", 3)
		held := c.Nodes[1]
		Expect(held.Agent.Pause()).To(Succeed())
		DeferCleanup(func() { Expect(held.Agent.Resume()).To(Succeed()) })
		Expect(k8s.Create(ctx, t.plainService("web", func(s *corev1.Service) {
			s.Spec.Type = corev1.ServiceTypeLoadBalancer
			s.Spec.LoadBalancerClass = ptr.To(v1alpha1.LoadBalancerClass)
		}))).To(Succeed())
		shown := func() []corev1.LoadBalancerIngress { return t.read("web").Status.LoadBalancer.Ingress }
		Eventually(t.assignmentCondition("web", v1alpha1.AssignmentProgrammed)).Should(HavePrefix("False WaitingForNodes"))
		Consistently(shown, 2*time.Second).Should(BeEmpty(), "%s does not forward it yet", held.Name)

		Expect(held.Agent.Resume()).To(Succeed())
		Eventually(shown).Should(HaveLen(1))
		vip := netip.MustParseAddr(shown()[0].IP)
		Expect(vips.Contains(vip)).To(BeTrue(), "%s", vip)
		// The very first connections, with no second try.
		for _, from := range append(podCallers(), nodeCallers()...) {
			Expect(firstCall(from, netip.AddrPortFrom(vip, 80))).To(Succeed())
		}
		for _, n := range c.Nodes {
			_, err := c.Outside().Run("ip", "route", "replace", vip.String()+"/32", "via", n.Addresses[0].String())
			Expect(err).NotTo(HaveOccurred())
			call(outsideCaller(), "tcp", vip, 80)
		}
		Expect(kubectl("-n", t.name, "get", "svc", "web")).To(ContainSubstring(vip.String()))

		By("a node is not Ready any more, and comes back")
		setNodeReady(held, false)
		DeferCleanup(setNodeReady, held, true)
		Consistently(shown).Should(HaveExactElements(HaveField("IP", vip.String())))
		setNodeReady(held, true)
		Consistently(shown).Should(HaveExactElements(HaveField("IP", vip.String())))
	})
})
