package controllers

import (
	"fmt"
	"net/netip"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

var _ = Describe("coverage", func() {
	It("goes to the highest priority, then the oldest policy, and follows labels and edits", func() {
		startManager(quick, nil)
		t := newTenant()
		first := t.policy("-first", nil)
		t.policy("-second", nil)
		svc := t.service("web", nil)
		Expect(t.allocated(svc).Spec.PolicyName).To(Equal(first.Name))

		high := t.policy("-high", func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.Priority, s.ProxyMode = 7, v1alpha1.ProxyModeIPVS
			s.ServiceSelector = metav1.LabelSelector{MatchLabels: map[string]string{"tier": "gold"}}
		})
		Consistently(func() string { return t.assignment("web").Spec.PolicyName }).Should(Equal(first.Name))
		Expect(k8s.Patch(ctx, svc.DeepCopy(), client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"labels":{"tier":"gold"}}}`)))).To(Succeed())
		Eventually(func() string { return t.assignment("web").Spec.PolicyName }).Should(Equal(high.Name))
		Expect(t.assignment("web").Spec.Scheduler).To(Equal(v1alpha1.SchedulerRoundRobin))

		updatePolicy(high, func(s *v1alpha1.ServiceProxyPolicySpec) { s.ProxyMode = v1alpha1.ProxyModeIPTables })
		Eventually(func() v1alpha1.ProxyMode { return t.assignment("web").Spec.ProxyMode }).Should(Equal(v1alpha1.ProxyModeIPTables))
		Expect(t.assignment("web").Spec.Scheduler).To(Equal(v1alpha1.SchedulerRandom))
		Expect(metav1.IsControlledBy(t.assignment("web"), svc)).To(BeTrue())

		By("a Service handed to another proxy")
		Expect(k8s.Patch(ctx, svc.DeepCopy(), client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"labels":{"service.kubernetes.io/service-proxy-name":"other"}}}`)))).To(Succeed())
		Eventually(func() any { return t.assignment("web") }).Should(BeNil())
	})

	It("follows the labels of namespaces and skips headless and ExternalName Services", func() {
		startManager(quick, nil)
		t := newTenant()
		t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.NamespaceSelector.MatchLabels["stage"] = "live"
		})
		svc := t.service("web", nil)
		t.service("headless", func(s *corev1.Service) { s.Spec.ClusterIP = corev1.ClusterIPNone })
		t.service("elsewhere", func(s *corev1.Service) {
			s.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "example.org"}
		})
		Consistently(func() int { return len(t.assignments()) }).Should(BeZero())
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: t.name}}
		Expect(k8s.Patch(ctx, ns, client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"labels":{"stage":"live"}}}`)))).To(Succeed())
		t.allocated(svc)
		Expect(t.assignments()).To(HaveLen(1))
	})
})

var _ = Describe("ranges", func() {
	It("are registered once, and the API server then takes addresses of them", func() {
		stop := startManager(quick, nil)
		t := newTenant()
		p := t.policy("", ranges(t.v4, t.v6))
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		Eventually(policyCondition(p, v1alpha1.PolicyReady)).Should(HavePrefix("True"))
		ours := func() (out []string) {
			var list networkingv1.ServiceCIDRList
			Expect(k8s.List(ctx, &list, client.MatchingLabels{v1alpha1.LabelPolicy: p.Name})).To(Succeed())
			for _, c := range list.Items {
				out = append(out, c.Spec.CIDRs...)
			}
			return out
		}
		Expect(ours()).To(ConsistOf(t.v4.String(), t.v6.String()))
		stop()
		startManager(quick, nil)
		Consistently(ours).Should(HaveLen(2))

		ip := t.v4.Addr().Next().Next()
		svc := t.service("web", func(s *corev1.Service) {
			s.Spec.ClusterIP = ip.String()
			s.Spec.IPFamilyPolicy = ptr.To(corev1.IPFamilyPolicySingleStack)
		})
		a := t.allocated(svc)
		Expect(a.Spec.ServiceIPs).To(ConsistOf(v1alpha1.ServiceIP{IP: ip.String(), Source: v1alpha1.ServiceIPSourceClusterIP}))
		claim := claimOn(allocator.AddrLock(ip))
		Expect(claim.Spec.Use).To(Equal(v1alpha1.ClaimUseClusterIP))
		Expect(claim.Spec.Holder.UID).To(Equal(svc.UID))
		Expect(t.reservations()).To(BeEmpty(), "the API server holds a Service's own address itself")
		Eventually(func(g Gomega) {
			g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
			g.Expect(p.Status.Families).To(ConsistOf(
				v1alpha1.FamilyStatus{Family: "IPv4", AddressCounts: v1alpha1.AddressCounts{Total: 254, Allocated: 1, Free: 253}},
				v1alpha1.FamilyStatus{Family: "IPv6", AddressCounts: v1alpha1.AddressCounts{Total: 65535, Free: 65535}}))
			g.Expect(p.Status.Services).To(Equal(v1alpha1.PolicyServicesStatus{Covered: 1, Assigned: 1}))
		}).Should(Succeed())
	})

	It("reuse a ServiceCIDR of somebody else and never delete it", func() {
		t := newTenant()
		theirs := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "theirs-" + t.name}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{t.v4.String()}}}
		Expect(k8s.Create(ctx, theirs)).To(Succeed())
		DeferCleanup(func() { Expect(k8s.Delete(ctx, theirs)).To(Succeed()) })
		startManager(quick, nil)
		p := t.policy("", ranges(t.v4))
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		Expect(p.Status.ServiceRanges[0].ServiceCIDR).To(Equal(theirs.Name))
		Expect(k8s.Delete(ctx, p)).To(Succeed())
		Eventually(func() bool { return apierrors.IsNotFound(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)) }).Should(BeTrue())
		Expect(k8s.Get(ctx, client.ObjectKeyFromObject(theirs), theirs)).To(Succeed())
		Expect(theirs.DeletionTimestamp).To(BeNil())
	})

	It("that two policies declare belong to the older one until it is gone", func() {
		startManager(quick, nil)
		t := newTenant()
		half := netip.PrefixFrom(t.v4.Addr(), 25)
		old := t.policy("-a", func(s *v1alpha1.ServiceProxyPolicySpec) {
			ranges(half)(s)
			s.ServiceSelector = metav1.LabelSelector{MatchLabels: map[string]string{"of": "old"}}
		})
		young := t.policy("-b", ranges(t.v4)) // the name decides within one second
		Eventually(policyCondition(young, v1alpha1.PolicyConflicted)).Should(And(HavePrefix("True"), ContainSubstring(half.String()), ContainSubstring(old.Name)))
		Eventually(policyCondition(old, v1alpha1.PolicyConflicted)).Should(HavePrefix("False"))
		Eventually(policyCondition(young, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		for i := range 20 {
			a := t.allocated(t.service(fmt.Sprint("web-", i), nil))
			Expect(additionalIPs(a)).To(HaveLen(1))
			Expect(half.Contains(additionalIPs(a)[0])).To(BeFalse())
		}
		Expect(k8s.Delete(ctx, old)).To(Succeed())
		Eventually(policyCondition(young, v1alpha1.PolicyConflicted)).Should(HavePrefix("False"))
	})

	It("that overlap a node's pods are not accepted and give out nothing", func() {
		startManager(quick, nil)
		t := newTenant()
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-" + t.name}, Spec: corev1.NodeSpec{PodCIDRs: []string{t.v4.String()}}}
		node.Spec.PodCIDR = t.v4.String()
		Expect(k8s.Create(ctx, node)).To(Succeed())
		DeferCleanup(func() { Expect(client.IgnoreNotFound(k8s.Delete(ctx, node))).To(Succeed()) })
		p := t.policy("", ranges(t.v4))
		Eventually(policyCondition(p, v1alpha1.PolicyAccepted)).Should(And(HavePrefix("False"), ContainSubstring(node.Name), ContainSubstring(t.v4.String())))
		svc := t.service("web", nil)
		Expect(additionalIPs(t.allocation(svc, metav1.ConditionFalse))).To(BeEmpty())
		Expect(k8s.Delete(ctx, node)).To(Succeed())
		Eventually(policyCondition(p, v1alpha1.PolicyAccepted)).Should(HavePrefix("True"))
		Expect(additionalIPs(t.allocated(svc))).To(HaveLen(1))
	})

	It("taken out of a policy drain: nothing moves, and the ServiceCIDR goes last", func() {
		startManager(quick, nil)
		t := newTenant()
		other := netip.MustParsePrefix(fmt.Sprintf("10.201.%d.0/24", tenants))
		p := t.policy("", ranges(t.v4))
		svc := t.service("web", nil)
		before := additionalIPs(t.allocated(svc))
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.ServiceRanges = []v1alpha1.ServiceRange{{CIDR: other.String()}}
		})
		Eventually(func(g Gomega) {
			g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
			g.Expect(p.Status.ServiceRanges).To(HaveLen(2))
			g.Expect(p.Status.ServiceRanges[1].CIDR).To(Equal(t.v4.String()))
			g.Expect(p.Status.ServiceRanges[1].Allocated).To(Equal(int64(1)))
		}).Should(Succeed())
		late := t.service("late", nil)
		Expect(other.Contains(additionalIPs(t.allocated(late))[0])).To(BeTrue())
		Expect(additionalIPs(t.assignment("web"))).To(Equal(before))
		Expect(k8s.Delete(ctx, svc)).To(Succeed())
		Eventually(func(g Gomega) {
			var list networkingv1.ServiceCIDRList
			g.Expect(k8s.List(ctx, &list)).To(Succeed())
			for _, c := range list.Items {
				if c.Spec.CIDRs[0] == t.v4.String() {
					g.Expect(c.DeletionTimestamp).NotTo(BeNil())
				}
			}
			g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
			g.Expect(p.Status.ServiceRanges).To(HaveLen(1))
		}).Should(Succeed())
	})
})

var _ = Describe("Services", func() {
	It("older than their policy get an additional address per family", func() {
		t := newTenant()
		single := t.service("single", nil)
		dual := t.service("dual", func(s *corev1.Service) { s.Spec.IPFamilyPolicy = ptr.To(corev1.IPFamilyPolicyRequireDualStack) })
		startManager(quick, nil)
		t.policy("", ranges(t.v4, t.v6))
		a := t.allocated(single)
		Expect(additionalIPs(a)).To(HaveLen(1))
		Expect(t.v4.Contains(additionalIPs(a)[0])).To(BeTrue())
		b := t.allocated(dual)
		Expect(additionalIPs(b)).To(HaveLen(2))
		Expect(t.v4.Contains(additionalIPs(b)[0])).To(BeTrue())
		Expect(t.v6.Contains(additionalIPs(b)[1])).To(BeTrue())
		Expect(b.Spec.ServiceIPs).To(HaveLen(4))

		By("the API server gives a reserved address to nobody")
		err := k8s.Create(ctx, t.newService("thief", func(s *corev1.Service) { s.Spec.ClusterIP = additionalIPs(a)[0].String() }))
		Expect(apierrors.IsInvalid(err)).To(BeTrue(), "%v", err)

		By("dual stack to single stack lets the second family go")
		Eventually(func(g Gomega) {
			g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(dual), dual)).To(Succeed())
			dual.Spec.IPFamilyPolicy, dual.Spec.IPFamilies, dual.Spec.ClusterIPs = ptr.To(corev1.IPFamilyPolicySingleStack), dual.Spec.IPFamilies[:1], dual.Spec.ClusterIPs[:1]
			g.Expect(k8s.Update(ctx, dual)).To(Succeed())
		}).Should(Succeed())
		Eventually(func() any { return claimOn(allocator.AddrLock(additionalIPs(b)[1])) }).Should(BeNil())
		Expect(additionalIPs(t.assignment("dual"))).To(Equal(additionalIPs(b)[:1]))
		Expect(t.reservations()).To(HaveLen(2))

		By("a reservation that somebody deletes comes back")
		Expect(k8s.Delete(ctx, &networkingv1.IPAddress{ObjectMeta: metav1.ObjectMeta{Name: additionalIPs(a)[0].String()}})).To(Succeed())
		Eventually(func() int { return len(t.reservations()) }).Should(Equal(2))
		Expect(additionalIPs(t.assignment("single"))).To(Equal(additionalIPs(a)))
	})

	It("keep their addresses under a policy without ranges", func() {
		startManager(quick, nil)
		t := newTenant()
		p := t.policy("", nil)
		svc := t.service("web", nil)
		a := t.allocated(svc)
		Expect(a.Spec.ServiceIPs).To(ConsistOf(v1alpha1.ServiceIP{IP: svc.Spec.ClusterIP, Source: v1alpha1.ServiceIPSourceClusterIP}))
		Eventually(policyCondition(p, v1alpha1.PolicyProgrammed)).Should(HavePrefix("False Programming"))
	})

	It("have their node ports recorded, and released with the port", func() {
		startManager(quick, nil)
		t := newTenant()
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.NodePortRange = &v1alpha1.NodePortRange{Start: 31000, End: 31009}
		})
		svc := t.service("web", func(s *corev1.Service) {
			s.Spec.Type = corev1.ServiceTypeLoadBalancer
			s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
			s.Spec.HealthCheckNodePort = 31002
			s.Spec.Ports = []corev1.ServicePort{{Name: "in", Port: 80, NodePort: 31001}, {Name: "out", Port: 81, NodePort: 31500}}
		})
		a := t.allocated(svc)
		Expect(a.Spec.Ports).To(HaveLen(2))
		Expect(a.Spec.HealthCheckNodePort).To(Equal(int32(31002)))
		Expect(claimOn(allocator.PortLock(31001)).Spec.Use).To(Equal(v1alpha1.ClaimUseNodePort))
		Expect(claimOn(allocator.PortLock(31002)).Spec.Use).To(Equal(v1alpha1.ClaimUseHealthCheckNodePort))
		Expect(claimOn(allocator.PortLock(31500))).To(BeNil())
		Eventually(func(g Gomega) {
			g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
			g.Expect(p.Status.NodePorts).To(Equal(&v1alpha1.NodePortStatus{Total: 10, Allocated: 2, Free: 8}))
		}).Should(Succeed())
		Eventually(func(g Gomega) {
			g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(svc), svc)).To(Succeed())
			svc.Spec.Type, svc.Spec.ExternalTrafficPolicy, svc.Spec.HealthCheckNodePort = corev1.ServiceTypeClusterIP, "", 0
			svc.Spec.Ports[0].NodePort, svc.Spec.Ports[1].NodePort = 0, 0
			svc.Spec.AllocateLoadBalancerNodePorts = nil
			g.Expect(k8s.Update(ctx, svc)).To(Succeed())
		}).Should(Succeed())
		Eventually(func() any { return claimOn(allocator.PortLock(31001)) }).Should(BeNil())
	})

	It("that come again under the same name are new holders, and what was released rests", func() {
		startManager(quick, nil)
		t := newTenant()
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			ranges(t.v4)(s)
			s.Reuse.Quarantine = &metav1.Duration{Duration: time.Hour}
		})
		svc := t.service("web", nil)
		first := additionalIPs(t.allocated(svc))[0]
		Expect(k8s.Delete(ctx, svc)).To(Succeed())
		Eventually(func(g Gomega) {
			c := claimOn(allocator.AddrLock(first))
			g.Expect(c.Spec.State).To(Equal(v1alpha1.ClaimReleased))
			g.Expect(time.Until(c.Spec.ExpiresAt.Time)).To(BeNumerically("~", time.Hour, time.Minute))
		}).Should(Succeed())
		Expect(t.reservations()).To(BeEmpty())
		again := t.service("web", nil)
		second := additionalIPs(t.allocated(again))[0]
		Expect(second).NotTo(Equal(first))
		Expect(claimOn(allocator.AddrLock(second)).Spec.Holder.UID).To(Equal(again.UID))
		Eventually(func(g Gomega) {
			g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
			g.Expect(p.Status.Families[0].AddressCounts).To(Equal(v1alpha1.AddressCounts{Total: 254, Allocated: 1, Quarantined: 1, Free: 252}))
		}).Should(Succeed())

		By("with stickyFor the address comes back to the name")
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) { s.Reuse.StickyFor = &metav1.Duration{Duration: time.Hour} })
		Expect(k8s.Delete(ctx, again)).To(Succeed())
		Eventually(func() v1alpha1.ClaimState { return claimOn(allocator.AddrLock(second)).Spec.State }).Should(Equal(v1alpha1.ClaimReleased))
		third := t.service("web", nil)
		Expect([]netip.Addr{first, second}).To(ContainElement(additionalIPs(t.allocated(third))[0]))

		By("a rest that is over")
		for _, a := range []netip.Addr{first, second} {
			if c := claimOn(allocator.AddrLock(a)); c.Spec.State == v1alpha1.ClaimReleased {
				c.Spec.ExpiresAt = &metav1.Time{Time: time.Now().Add(time.Second)}
				Expect(k8s.Update(ctx, c)).To(Succeed())
				Eventually(func() any { return claimOn(allocator.AddrLock(a)) }).Should(BeNil())
			}
		}
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.Reuse.StickyFor, s.Reuse.Quarantine = &metav1.Duration{}, &metav1.Duration{}
		})
	})

	It("wait when a range is exhausted, say so once, and are served on the next release", func() {
		startManager(quick, nil)
		t := newTenant()
		tiny := netip.PrefixFrom(t.v4.Addr(), 30)
		p := t.policy("", ranges(tiny))
		var first *corev1.Service
		for i := range 2 {
			svc := t.service(fmt.Sprint("web-", i), nil)
			t.allocated(svc)
			first = svc
		}
		late := t.service("late", nil)
		a := t.allocation(late, metav1.ConditionFalse)
		Expect(a.Spec.ServiceIPs).To(HaveLen(1), "it keeps the address that the API server gave")
		Eventually(policyCondition(p, v1alpha1.PolicyCapacityAvailable)).Should(And(HavePrefix("False RangeExhausted"), ContainSubstring("IPv4 addresses: 2 of 2")))
		Expect(p.Status.Services.Waiting).To(Equal(int32(1)))
		warnings := func() (out []string) {
			var list eventsv1.EventList
			Expect(k8s.List(ctx, &list, client.InNamespace(t.name))).To(Succeed())
			for _, e := range list.Items {
				if e.Type == corev1.EventTypeWarning && e.Regarding.Name == "late" {
					out = append(out, e.Note)
				}
			}
			return out
		}
		Eventually(warnings).Should(ConsistOf(And(ContainSubstring(p.Name), ContainSubstring("IPv4"), ContainSubstring("2 of 2"))))
		Consistently(warnings).Should(HaveLen(1))
		Expect(k8s.Delete(ctx, first)).To(Succeed())
		Expect(additionalIPs(t.allocated(late))).To(HaveLen(1))
		Eventually(policyCondition(p, v1alpha1.PolicyCapacityAvailable)).Should(HavePrefix("False RangeFull"))
	})
})

var _ = Describe("a policy that is deleted", func() {
	It("is held while in use, says by how many, covers nothing new, and takes its ServiceCIDR along", func() {
		startManager(quick, nil)
		t := newTenant()
		p := t.policy("", ranges(t.v4))
		svc := t.service("web", nil)
		before := additionalIPs(t.allocated(svc))
		Expect(k8s.Delete(ctx, p)).To(Succeed())
		Eventually(policyCondition(p, v1alpha1.PolicyReady)).Should(And(HavePrefix("False DeletionWaits"), ContainSubstring("1 claims")))
		t.service("late", nil)
		Consistently(func() any { return t.assignment("late") }).Should(BeNil())
		Expect(additionalIPs(t.assignment("web"))).To(Equal(before))
		Expect(k8s.Delete(ctx, svc)).To(Succeed())
		Eventually(func() bool { return apierrors.IsNotFound(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)) }).Should(BeTrue())
	})
})

var _ = Describe("status", func() {
	It("names the nodes that cannot do the mode, counts nodes, and is not written without need", func() {
		startManager(quick, nil)
		t := newTenant()
		for i, able := range []bool{true, false} {
			name := fmt.Sprintf("n%d-%s", i, t.name)
			node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"tenant": t.name}}}
			Expect(k8s.Create(ctx, node)).To(Succeed())
			node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
			Expect(k8s.Status().Update(ctx, node)).To(Succeed())
			nps := &v1alpha1.NodeProxyState{ObjectMeta: metav1.ObjectMeta{Name: name}}
			Expect(k8s.Create(ctx, nps)).To(Succeed())
			nps.Status.Modes = []v1alpha1.NodeProxyMode{{Mode: v1alpha1.ProxyModeUserspace, Available: true}, {Mode: v1alpha1.ProxyModeNFTables, Available: able}}
			Expect(k8s.Status().Update(ctx, nps)).To(Succeed())
			DeferCleanup(func() {
				Expect(k8s.Delete(ctx, node)).To(Succeed())
				Expect(client.IgnoreNotFound(k8s.Delete(ctx, nps))).To(Succeed())
			})
		}
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.NodeSelector = metav1.LabelSelector{MatchLabels: map[string]string{"tenant": t.name}}
		})
		Eventually(policyCondition(p, v1alpha1.PolicyProgrammed)).Should(Equal("False UnsupportedNodes: nodes that cannot do the policy's proxyMode: n1-" + t.name + " (can do Userspace)"))
		Expect(p.Status.Nodes).To(Equal(v1alpha1.PolicyNodesStatus{Selected: 2, Ready: 2, Unsupported: 1}))
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) { s.ProxyMode = v1alpha1.ProxyModeUserspace })
		Eventually(policyCondition(p, v1alpha1.PolicyReady)).Should(HavePrefix("True"))

		By("a node's kernel gives ports of the policy's range to outgoing connections, until they are reserved")
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.NodePortRange = &v1alpha1.NodePortRange{Start: 30900, End: 30909}
		})
		Eventually(policyCondition(p, v1alpha1.PolicyNodePortsExclusive)).Should(HavePrefix("True Exclusive"))
		localPorts := func(ranges ...v1alpha1.NodePortRange) {
			nps := &v1alpha1.NodeProxyState{ObjectMeta: metav1.ObjectMeta{Name: "n0-" + t.name}}
			Expect(k8s.Get(ctx, client.ObjectKeyFromObject(nps), nps)).To(Succeed())
			nps.Status.LocalPorts = ranges
			Expect(k8s.Status().Update(ctx, nps)).To(Succeed())
		}
		localPorts(v1alpha1.NodePortRange{Start: 1024, End: 30903})
		Eventually(policyCondition(p, v1alpha1.PolicyNodePortsExclusive)).Should(HavePrefix(
			"False OverlapsLocalPorts: 1 selected nodes give ports of nodePortRange 30900-30909 to outgoing connections, too, so that one may be taken when it is needed: n0-" + t.name + " (30900-30903); "))
		Expect(policyCondition(p, v1alpha1.PolicyReady)()).To(HavePrefix("True"))
		localPorts(v1alpha1.NodePortRange{Start: 1024, End: 30899}, v1alpha1.NodePortRange{Start: 30910, End: 65535})
		Eventually(policyCondition(p, v1alpha1.PolicyNodePortsExclusive)).Should(HavePrefix("True Exclusive"))

		By("another field manager's Programmed lives beside Allocated")
		svc := t.service("web", nil)
		a := t.allocated(svc)
		a.Status.Conditions = append(a.Status.Conditions, metav1.Condition{Type: v1alpha1.AssignmentProgrammed, Status: "True", Reason: "Programmed", ObservedGeneration: a.Generation, LastTransitionTime: metav1.Now()})
		Expect(k8s.Status().Update(ctx, a)).To(Succeed())
		Eventually(func(g Gomega) {
			g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
			g.Expect(p.Status.Services).To(Equal(v1alpha1.PolicyServicesStatus{Covered: 1, Assigned: 1, Programmed: 1}))
		}).Should(Succeed())
		versions := func() [2]string {
			Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
			return [2]string{p.ResourceVersion, t.assignment("web").ResourceVersion}
		}
		still := versions()
		Consistently(versions).Should(Equal(still))
		Expect(t.assignment("web").Status.Conditions).To(HaveLen(2))
	})
})

var _ = Describe("objects of others", func() {
	It("are left alone", func() {
		t := newTenant()
		p := t.policy("", ranges(t.v4))
		svc := t.service("web", nil)
		foreign := &v1alpha1.ServiceAssignment{ObjectMeta: metav1.ObjectMeta{Namespace: t.name, Name: "web"},
			Spec: v1alpha1.ServiceAssignmentSpec{PolicyName: "x", ServiceUID: "x", ProxyMode: "NFTables", Scheduler: "Random"}}
		Expect(k8s.Create(ctx, foreign)).To(Succeed())
		taken := t.v4.Addr().Next()
		ip := &networkingv1.IPAddress{ObjectMeta: metav1.ObjectMeta{Name: taken.String(), Labels: map[string]string{networkingv1.LabelManagedBy: "somebody"}},
			Spec: networkingv1.IPAddressSpec{ParentRef: &networkingv1.ParentReference{Resource: "services", Namespace: t.name, Name: "web"}}}
		Expect(k8s.Create(ctx, ip)).To(Succeed())
		startManager(quick, nil)
		Eventually(func(g Gomega) {
			g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
			g.Expect(p.Status.ServiceRanges).NotTo(BeEmpty())
			g.Expect(p.Status.ServiceRanges[0].Foreign).To(Equal(int64(1)))
		}).Should(Succeed())
		Consistently(func() string { return t.assignment("web").Spec.PolicyName }).Should(Equal("x"))
		Expect(k8s.Get(ctx, client.ObjectKeyFromObject(ip), ip)).To(Succeed())
		Expect(k8s.Delete(ctx, ip)).To(Succeed())
		Expect(k8s.Delete(ctx, foreign)).To(Succeed())
		t.allocated(svc)
	})
})
