package e2e

import (
	"fmt"
	"net/netip"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

var _ = Describe("bad input:", func() {
	It("a malformed policy is refused with what is wrong", func() {
		for _, tt := range []struct{ spec, want string }{
			{"proxyMode: Magic", `spec.proxyMode: Unsupported value: "Magic": supported values: "NFTables", "IPTables", "IPVS", "Userspace", "EBPF"`},
			{"nodePortRange: {start: 30100, end: 30000}", "start 30100 must not be greater than end 30000"},
			{"nodePortRange: {start: 30000, end: 70000}", "spec.nodePortRange.end: Invalid value: 70000: spec.nodePortRange.end in body should be less than or equal to 65535"},
			{"serviceRanges: [{cidr: 10.99.0.0/33}]", "must be a CIDR such as 10.99.0.0/16"},
			{"serviceRanges: [{cidr: 10.99.0.0/16}, {cidr: 10.99.1.0/24}]", "10.99.1.0/24 lies inside another one"},
			{"serviceRanges: [{cidr: 224.0.0.0/16}]", "must be unicast addresses that can be routed"},
			{"{proxyMode: NFTables, scheduler: Maglev}", "proxyMode NFTables does not do scheduler Maglev"},
		} {
			policy := fmt.Sprintf("apiVersion: networking.serviceproxy.io/v1alpha1\nkind: ServiceProxyPolicy\nmetadata: {name: bad}\nspec:\n  %s\n", tt.spec)
			out, err := c.Kubectl(ctx, policy, "apply", "-f", "-")
			Expect(err).To(HaveOccurred(), tt.spec)
			Expect(out).To(ContainSubstring(tt.want), tt.spec)
		}
	})

	It("a range that overlaps the pods is not accepted and gives out nothing", func() {
		t := newTenant()
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.ServiceRanges = []v1alpha1.ServiceRange{{CIDR: "10.244.1.0/24"}}
		})
		Eventually(policyCondition(p, v1alpha1.PolicyAccepted)).Should(And(
			HavePrefix("False OverlapsNodeAddresses"), ContainSubstring("10.244.1.0/24"), ContainSubstring("node1")))
		t.service("web", nil)
		Eventually(t.assignmentCondition("web", v1alpha1.AssignmentAllocated)).Should(HavePrefix("False"))
		Expect(additional(t.assignment("web"))).To(BeEmpty())
		Expect(t.serviceCIDRs()).To(BeEmpty())
	})

	It("a Service that two policies match belongs to one of them, and moves whole", func() {
		t := newTenant()
		low, high := netip.PrefixFrom(t.v4.Addr(), 25), netip.PrefixFrom(host(t.v4, 128), 25)
		of := func(r netip.Prefix, priority int32) func(*v1alpha1.ServiceProxyPolicySpec) {
			return func(s *v1alpha1.ServiceProxyPolicySpec) {
				s.ServiceRanges, s.NodePortRange, s.Priority = []v1alpha1.ServiceRange{{CIDR: r.String()}}, nil, priority
			}
		}
		lowPolicy, highPolicy := t.policy("-low", of(low, 1)), t.policy("-high", of(high, 2))
		for _, p := range []*v1alpha1.ServiceProxyPolicy{lowPolicy, highPolicy} {
			Eventually(policyCondition(p, v1alpha1.PolicyReady)).Should(HavePrefix("True"))
		}
		t.deploy("web", 1)
		svc := t.service("web", nil)
		t.awaitProgrammed("web")
		held := func(r netip.Prefix) {
			GinkgoHelper()
			ips := additional(t.assignment("web"))
			Expect(ips).To(HaveLen(1))
			Expect(r.Contains(ips[0])).To(BeTrue(), "%v", ips)
			Eventually(func() []string {
				var names []string
				for _, claim := range t.claims() {
					names = append(names, claim.Name)
				}
				return names
			}).Should(ConsistOf(ips[0].String()))
			Expect(t.reservations()).To(HaveLen(1))
			for _, from := range podCallers() {
				call(from, "tcp", ips[0], 80)
				call(from, "tcp", netip.MustParseAddr(svc.Spec.ClusterIP), 80)
			}
		}
		held(high)
		covered := func(p *v1alpha1.ServiceProxyPolicy) int32 {
			Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
			return p.Status.Services.Covered
		}
		Eventually(covered).WithArguments(highPolicy).Should(BeNumerically("==", 1))
		Expect(covered(lowPolicy)).To(BeZero())

		By("the priorities change")
		patch(lowPolicy, `{"spec":{"priority":3}}`)
		Eventually(func() string { return t.assignment("web").Spec.PolicyName }).Should(Equal(lowPolicy.Name))
		Eventually(t.assignmentCondition("web", v1alpha1.AssignmentProgrammed)).Should(HavePrefix("True"))
		held(low)
	})

	It("of two policies with one range the older keeps it", func() {
		t := newTenant()
		first := t.policy("-a", nil) // within one second the name decides
		Eventually(policyCondition(first, v1alpha1.PolicyReady)).Should(HavePrefix("True"))
		t.deploy("web", 1)
		t.service("web", nil)
		t.awaitProgrammed("web")
		// With its first Service the policy is not Ready for a moment, and that may be told late.
		Eventually(func() int32 {
			Expect(k8s.Get(ctx, client.ObjectKeyFromObject(first), first)).To(Succeed())
			return first.Status.Services.Programmed
		}).Should(BeNumerically("==", 1))
		second := t.policy("-b", func(s *v1alpha1.ServiceProxyPolicySpec) { s.NodePortRange = nil })
		Eventually(policyCondition(second, v1alpha1.PolicyConflicted)).Should(And(
			HavePrefix("True OverlapsOlderPolicy"), ContainSubstring(first.Name), ContainSubstring(t.v4.String())))
		Eventually(policyCondition(second, v1alpha1.PolicyReady)).Should(HavePrefix("False"))
		Consistently(policyCondition(first, v1alpha1.PolicyReady)).Should(HavePrefix("True"))
		Expect(t.assignment("web").Spec.PolicyName).To(Equal(first.Name))
		Expect(t.serviceCIDRs()).To(HaveLen(2), "one per range")
	})

	It("an exhausted range is told, and what waits is served when an address is released", func() {
		t := newTenant()
		p := t.readyPolicy(func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.ServiceRanges = []v1alpha1.ServiceRange{{CIDR: netip.PrefixFrom(t.v4.Addr(), 30).String()}} // two addresses
		})
		t.deploy("web", 1)
		first := t.service("first", nil)
		t.service("second", nil)
		t.awaitProgrammed("first", "second")
		t.service("third", nil)
		full := And(ContainSubstring(t.name), ContainSubstring("IPv4"), ContainSubstring("2 of 2"))
		Eventually(t.assignmentCondition("third", v1alpha1.AssignmentAllocated)).Should(And(HavePrefix("False RangeExhausted"), full))
		Eventually(policyCondition(p, v1alpha1.PolicyCapacityAvailable)).Should(And(HavePrefix("False RangeExhausted"), full))
		Expect(policyCondition(p, v1alpha1.PolicyReady)()).To(HavePrefix("False RangeExhausted"))
		Eventually(func(g Gomega) {
			var list eventsv1.EventList
			g.Expect(k8s.List(ctx, &list, client.InNamespace(t.name))).To(Succeed())
			g.Expect(list.Items).To(ContainElement(And(HaveField("Type", corev1.EventTypeWarning), HaveField("Reason", "RangeExhausted"),
				HaveField("Regarding.Name", "third"), HaveField("Note", full))))
		}).Should(Succeed())
		third := netip.MustParseAddr(t.assignment("third").Spec.ServiceIPs[0].IP)
		Eventually(func() error { return callError(podCallers()[0].ns, "tcp", netip.AddrPortFrom(third, 80)) }).
			Should(Succeed(), "the Service works at its ClusterIP meanwhile")

		released := additional(t.assignment("first"))
		Expect(k8s.Delete(ctx, first)).To(Succeed())
		Eventually(t.assignmentCondition("third", v1alpha1.AssignmentAllocated)).Should(HavePrefix("True"))
		Expect(additional(t.assignment("third"))).To(Equal(released))
		Eventually(policyCondition(p, v1alpha1.PolicyReady)).Should(HavePrefix("True"))
		t.awaitProgrammed("third")
		for _, from := range podCallers() {
			a := call(from, "tcp", released[0], 80)
			Expect(a.Namespace).To(Equal(t.name))
		}
	})

	It("a policy deleted while in use waits, and its traffic goes on", func() {
		t := newTenant()
		p := t.readyPolicy(nil)
		t.deploy("web", 2)
		inside, older := t.service("inside", t.at(30)), t.service("older", nil)
		t.awaitProgrammed("inside", "older")
		traffic := startLoad(netip.AddrPortFrom(host(t.v4, 30), 80), 20, podCallers()...)
		Expect(k8s.Delete(ctx, p)).To(Succeed())
		Eventually(policyCondition(p, v1alpha1.PolicyReady)).Should(And(HavePrefix("False DeletionWaits"), ContainSubstring("2 covered Services")))
		before := traffic.count()
		Eventually(traffic.count).Should(BeNumerically(">=", before+40))
		for _, ip := range t.assignment("older").Spec.ServiceIPs {
			call(podCallers()[1], "tcp", netip.MustParseAddr(ip.IP), 80)
		}
		Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
		Expect(p.Finalizers).To(ConsistOf(v1alpha1.FinalizerPolicy))
		traffic.expectNoFailure(40)

		Expect(k8s.Delete(ctx, older)).To(Succeed())
		Expect(k8s.Delete(ctx, inside)).To(Succeed())
		Eventually(gone(p)).Should(BeTrue())
		t.checkNothingLeft()
	})

	It("a proxy mode that the agents do not have is told with the nodes", func() {
		t := newTenant()
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) { s.ProxyMode = v1alpha1.ProxyModeIPVS })
		Eventually(policyCondition(p, v1alpha1.PolicyProgrammed)).Should(And(
			HavePrefix("False UnsupportedNodes"), ContainSubstring("node1"), ContainSubstring("node2"), ContainSubstring("node3"), ContainSubstring("can do NFTables")))
		t.deploy("web", 1)
		t.service("web", nil)
		Eventually(t.assignmentCondition("web", v1alpha1.AssignmentProgrammed)).Should(And(
			HavePrefix("False ModeUnsupported"), ContainSubstring("IPVS"), ContainSubstring("node1")))

		By("the policy is corrected")
		patch(p, `{"spec":{"proxyMode":"NFTables"}}`)
		Eventually(t.assignmentCondition("web", v1alpha1.AssignmentAllocated)).Should(HavePrefix("True"))
		t.awaitProgrammed("web")
		for _, from := range podCallers() {
			call(from, "tcp", additional(t.assignment("web"))[0], 80)
		}
		Eventually(policyCondition(p, v1alpha1.PolicyReady)).Should(HavePrefix("True"))
	})

	It("a node that cannot do nf_tables is told, and blocks only what is new", func() {
		t := newTenant()
		p := t.readyPolicy(nil)
		t.deploy("web", 3)
		t.service("before", t.at(40))
		t.awaitProgrammed("before")
		node := c.Nodes[2]
		command := agentCommand(node)
		Expect(node.Agent.Stop()).To(Succeed())
		DeferCleanup(ensureRunning, node)
		// Without the right to change the network's rules, nf_tables is as good as missing.
		stop := startOn(node, append([]string{"setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"}, command...)...)
		Eventually(func() *v1alpha1.NodeProxyMode {
			for _, m := range nodeState(node.Name).Status.Modes {
				if m.Mode == v1alpha1.ProxyModeNFTables {
					return &m
				}
			}
			return nil
		}).Should(And(HaveField("Available", false), HaveField("Message", ContainSubstring("nftables is not available"))))
		Eventually(policyCondition(p, v1alpha1.PolicyProgrammed)).Should(And(
			HavePrefix("False UnsupportedNodes"), ContainSubstring(node.Name), Not(ContainSubstring("node1")), Not(ContainSubstring("node2"))))
		t.service("after", t.at(41))
		Eventually(t.assignmentCondition("after", v1alpha1.AssignmentProgrammed)).Should(And(
			HavePrefix("False ModeUnsupported"), ContainSubstring(node.Name)))
		Expect(t.assignment("after").Status.Nodes).To(Equal(v1alpha1.AssignmentNodesStatus{Desired: 3, Programmed: 2}))
		call(podCallers()[0], "tcp", host(t.v4, 41), 80)
		call(podCallers()[2], "tcp", host(t.v4, 40), 80) // the rules that were there stay

		By("the node can again")
		stop()
		Expect(node.Agent.Start(ctx)).To(Succeed())
		t.awaitProgrammed("after")
		call(podCallers()[2], "tcp", host(t.v4, 41), 80)
		Eventually(policyCondition(p, v1alpha1.PolicyReady)).Should(HavePrefix("True"))
	})
})

var _ = Describe("a node's labels", func() {
	It("decide whether it forwards, from one moment to the next", func() {
		t := newTenant()
		label := func(name string, value string) {
			GinkgoHelper()
			patch(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, `{"metadata":{"labels":{%q:%s}}}`, "pool-"+t.name, value)
		}
		for _, n := range c.Nodes {
			DeferCleanup(func() { label(n.Name, "null") })
		}
		label("node1", `"edge"`)
		label("node2", `"edge"`)
		p := t.readyPolicy(func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.NodeSelector = metav1.LabelSelector{MatchLabels: map[string]string{"pool-" + t.name: "edge"}}
		})
		t.deploy("web", 3)
		t.service("web", t.at(50))
		t.awaitProgrammed("web")
		Expect(t.assignment("web").Status.Nodes).To(Equal(v1alpha1.AssignmentNodesStatus{Desired: 2, Programmed: 2}))
		calling := podCallers()
		forwards := func(i int) func() bool {
			return func() bool {
				listed := strings.Contains(rules(c.Nodes[i]), host(t.v4, 50).String())
				return listed && callError(calling[i].ns, "tcp", netip.AddrPortFrom(host(t.v4, 50), 80)) == nil
			}
		}
		forgot := func(i int) string { return rules(c.Nodes[i]) }
		Expect(forwards(0)()).To(BeTrue())
		Expect(forwards(1)()).To(BeTrue())
		Expect(forgot(2)).NotTo(ContainSubstring(host(t.v4, 50).String()))

		label("node3", `"edge"`)
		Eventually(forwards(2)).Should(BeTrue(), "rules must appear")
		Eventually(func() int32 {
			Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
			return p.Status.Nodes.Selected
		}).Should(BeNumerically("==", 3))

		label("node1", `"core"`)
		Eventually(forgot).WithArguments(0).ShouldNot(ContainSubstring(host(t.v4, 50).String()), "rules must disappear")
		Expect(forwards(1)()).To(BeTrue())
		Expect(t.assignmentCondition("web", v1alpha1.AssignmentProgrammed)()).To(HavePrefix("True"), "it is latched")
	})
})
