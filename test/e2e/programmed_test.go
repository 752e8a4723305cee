package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
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
				Expect(firstCall(from, netip.AddrPortFrom(ip, 80))).To(Succeed())
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

var _ = Describe("Programmed", func() {
	It("holds for each of many Services made at once, while agents stall now and then", func() {
		const services = 40
		t := newTenant()
		t.readyPolicy(nil)
		t.deploy("web", 3)
		watching, err := client.NewWithWatch(c.RESTConfig(), client.Options{Scheme: k8s.Scheme()})
		Expect(err).NotTo(HaveOccurred())
		assignments, err := watching.Watch(ctx, &v1alpha1.ServiceAssignmentList{}, client.InNamespace(t.name))
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(assignments.Stop)
		DeferCleanup(stallAgents(300 * time.Millisecond))
		for i := range services {
			t.service(fmt.Sprintf("web-%02d", i), t.at(byte(100+i)))
		}

		calling := podCallers()
		errs := make(chan error, services*len(calling))
		var calls sync.WaitGroup
		seen := map[string]bool{}
		timeout := time.After(patience)
		for len(seen) < services {
			select {
			case <-timeout:
				Fail(fmt.Sprintf("%d of %d Services are Programmed", len(seen), services))
			case e := <-assignments.ResultChan():
				a, ok := e.Object.(*v1alpha1.ServiceAssignment)
				Expect(ok).To(BeTrue(), "%v", e)
				if seen[a.Name] || !strings.HasPrefix(conditionText(a.Status.Conditions, v1alpha1.AssignmentProgrammed, a.Generation), "True") {
					continue
				}
				seen[a.Name] = true
				for _, from := range calling {
					calls.Go(func() { errs <- firstCall(from, netip.AddrPortFrom(netip.MustParseAddr(a.Spec.ServiceIPs[0].IP), 80)) })
				}
			}
		}
		calls.Wait()
		close(errs)
		for err := range errs {
			Expect(err).NotTo(HaveOccurred())
		}
	})
})

// firstCall calls once, and gives up before TCP would try a second time.
func firstCall(from caller, to netip.AddrPort) error {
	calling, cancel := context.WithTimeout(ctx, 900*time.Millisecond)
	defer cancel()
	if _, err := cluster.Call(calling, from.ns, "tcp", to); err != nil {
		return fmt.Errorf("the first connection from %s to %s: %w", from.name, to, err)
	}
	return nil
}

// stallAgents pauses one agent after the other, each for so long, until stop is called.
func stallAgents(each time.Duration) (stop func() error) {
	stalling, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		for i := 0; ; i++ {
			agent := c.Nodes[i%len(c.Nodes)].Agent
			if err := agent.Pause(); err != nil {
				done <- err
				return
			}
			select {
			case <-stalling.Done():
			case <-time.After(each):
			}
			if err := agent.Resume(); err != nil || stalling.Err() != nil {
				done <- err
				return
			}
		}
	}()
	return func() error {
		cancel()
		return <-done
	}
}

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
