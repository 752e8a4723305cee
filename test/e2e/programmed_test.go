package e2e

import (
	"net/netip"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster"
)

// heldBack is how long kubectl must not return: several times what the agents need to report.
const heldBack = 4 * time.Second

var _ = Describe("kubectl wait --for=condition=Programmed", func() {
	// wait runs it in the background.
	wait := func(t *tenant, name string) <-chan error {
		kubectl("-n", t.name, "wait", "--for=create", "serviceassignment/"+name, "--timeout=60s")
		done := make(chan error, 1)
		go func() {
			_, err := c.Kubectl(ctx, "", "-n", t.name, "wait", "--for=condition=Programmed", "serviceassignment/"+name, "--timeout=120s")
			done <- err
		}()
		return done
	}

	It("returns only when traffic works from every node, and then it does", func() {
		t := newTenant()
		t.readyPolicy(nil)
		t.deploy("web", 3)
		held := c.Nodes[1]
		Expect(held.Agent.Pause()).To(Succeed())
		DeferCleanup(func() { Expect(held.Agent.Resume()).To(Succeed()) })
		t.service("web", t.at(20))
		done := wait(t, "web")

		By("an agent held back")
		Eventually(t.assignmentCondition("web", v1alpha1.AssignmentProgrammed)).Should(And(
			HavePrefix("False WaitingForNodes"), ContainSubstring("2 of 3 nodes"), ContainSubstring(held.Name)))
		Consistently(done, heldBack).ShouldNot(Receive(), "kubectl returned although %s does not forward the Service", held.Name)
		calling := podCallers()
		Expect(callError(calling[0].ns, "tcp", netip.AddrPortFrom(host(t.v4, 20), 80))).To(Succeed(), "the other nodes do not wait for it")

		By("the agent goes on")
		Expect(held.Agent.Resume()).To(Succeed())
		Eventually(done).Should(Receive(BeNil()))
		// The very first connections, with no second try.
		for _, from := range append(calling, nodeCallers()...) {
			for _, ip := range []netip.Addr{host(t.v4, 20), host(t.v6, 20)} {
				_, err := cluster.Call(ctx, from.ns, "tcp", netip.AddrPortFrom(ip, 80))
				Expect(err).NotTo(HaveOccurred(), "the first connection from %s to %s", from.name, ip)
			}
		}
		Expect(t.assignment("web").Status.Nodes).To(Equal(v1alpha1.AssignmentNodesStatus{Desired: 3, Programmed: 3}))
	})

	It("does not return before a pod is ready", func() {
		t := newTenant()
		t.readyPolicy(nil)
		t.service("web", t.at(21))
		done := wait(t, "web")
		Eventually(t.assignmentCondition("web", v1alpha1.AssignmentProgrammed)).Should(HavePrefix("False NoReadyEndpoints"))
		Consistently(done).ShouldNot(Receive())
		t.deploy("web", 1)
		Eventually(done).Should(Receive(BeNil()))
		for _, from := range podCallers() {
			call(from, "tcp", host(t.v4, 21), 80)
		}
	})

	It("is not held up by a node that is not Ready", func() {
		t := newTenant()
		t.readyPolicy(nil)
		t.deploy("web", 2)
		dead := c.Nodes[2]
		Expect(dead.Agent.Pause()).To(Succeed())
		DeferCleanup(func() { Expect(dead.Agent.Resume()).To(Succeed()) })
		t.service("web", t.at(22))
		done := wait(t, "web")
		Eventually(t.assignmentCondition("web", v1alpha1.AssignmentProgrammed)).Should(HavePrefix("False WaitingForNodes"))

		setNodeReady(dead, false)
		DeferCleanup(setNodeReady, dead, true)
		Eventually(done).Should(Receive(BeNil()))
		Expect(t.assignment("web").Status.Nodes).To(Equal(v1alpha1.AssignmentNodesStatus{Desired: 2, Programmed: 2}))
		for _, from := range podCallers()[:2] {
			call(from, "tcp", host(t.v4, 22), 80)
		}

		By("the node comes back, late")
		setNodeReady(dead, true)
		Consistently(t.assignmentCondition("web", v1alpha1.AssignmentProgrammed)).Should(HavePrefix("True"), "it is latched")
		Expect(dead.Agent.Resume()).To(Succeed())
		Eventually(func() error {
			return callError(podCallers()[2].ns, "tcp", netip.AddrPortFrom(host(t.v4, 22), 80))
		}).Should(Succeed())
	})

	It("stays true while endpoints come and go", func() {
		t := newTenant()
		t.readyPolicy(nil)
		t.deploy("web", 3)
		t.service("web", t.at(23))
		t.awaitProgrammed("web")
		version := t.assignment("web").ResourceVersion
		deployment := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: t.name, Name: "web"}}
		scale := func(n int) {
			GinkgoHelper()
			patch(deployment, `{"spec":{"replicas":%d}}`, n)
			t.pods("web", n)
			Expect(t.assignment("web").ResourceVersion).To(Equal(version), "the assignment must not be written: every agent watches it")
		}
		scale(6)
		scale(1)
		Expect(k8s.DeleteAllOf(ctx, &corev1.Pod{}, client.InNamespace(t.name), client.GracePeriodSeconds(0))).To(Succeed())
		t.pods("web", 1)
		Expect(t.assignmentCondition("web", v1alpha1.AssignmentProgrammed)()).To(HavePrefix("True"))
		Expect(t.assignment("web").ResourceVersion).To(Equal(version))
		for _, from := range podCallers() {
			Eventually(func() error { return callError(from.ns, "tcp", netip.AddrPortFrom(host(t.v4, 23), 80)) }).Should(Succeed())
		}
	})
})

// setNodeReady makes a node Ready or not and waits until everybody can see it.
func setNodeReady(n *cluster.Node, ready bool) {
	GinkgoHelper()
	Expect(n.SetReady(ctx, ready)).To(Succeed())
	Eventually(func(g Gomega) {
		var node corev1.Node
		g.Expect(k8s.Get(ctx, client.ObjectKey{Name: n.Name}, &node)).To(Succeed())
		want := corev1.ConditionFalse
		if ready {
			want = corev1.ConditionTrue
		}
		g.Expect(node.Status.Conditions).To(ContainElement(And(HaveField("Type", corev1.NodeReady), HaveField("Status", want))))
	}).Should(Succeed())
}
