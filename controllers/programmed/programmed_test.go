package programmed_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

func (c *cluster) state(name string) (*v1alpha1.NodeProxyState, error) {
	s := &v1alpha1.NodeProxyState{}
	return s, c.Get(c.ctx, client.ObjectKey{Name: name}, s)
}

func TestOneNodeProxyStatePerNode(t *testing.T) {
	c := newCluster(t)
	foreign := &v1alpha1.NodeProxyState{ObjectMeta: metav1.ObjectMeta{Name: "foreign"}}
	c.Expect(c.Create(c.ctx, foreign)).To(Succeed())
	c.addNode("a", nil)
	c.addNode("b", nil)
	s, err := c.state("a")
	c.Expect(err).NotTo(HaveOccurred())
	n := &corev1.Node{}
	c.Expect(c.Get(c.ctx, client.ObjectKey{Name: "a"}, n)).To(Succeed())
	c.Expect(s.OwnerReferences).To(ConsistOf(metav1.OwnerReference{APIVersion: "v1", Kind: "Node", Name: "a", UID: n.UID}))
	c.Expect(s.Labels).To(HaveKeyWithValue("app.kubernetes.io/managed-by", v1alpha1.ManagedBy))
	c.Expect(s.Spec.ReportInterval.Duration).To(Equal(200 * time.Millisecond))

	// A Node of the same name is another Node: what its predecessor held is gone.
	c.Expect(c.Delete(c.ctx, n)).To(Succeed())
	c.Eventually(func() bool { _, err := c.state("a"); return apierrors.IsNotFound(err) }).Should(BeTrue())
	c.addNode("a", nil)
	again, err := c.state("a")
	c.Expect(err).NotTo(HaveOccurred())
	c.Expect(again.UID).NotTo(Equal(s.UID))

	// Deleted by hand, or while the controller was away: made good.
	c.Expect(c.Delete(c.ctx, again)).To(Succeed())
	c.Eventually(func() error { _, err := c.state("a"); return err }).Should(Succeed())
	c.stop()
	c.Expect(c.Delete(c.ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "b"}})).To(Succeed())
	c.start()
	c.Eventually(func() bool { _, err := c.state("b"); return apierrors.IsNotFound(err) }).Should(BeTrue())
	_, err = c.state("foreign")
	c.Expect(err).NotTo(HaveOccurred())
}

func TestReportIntervalFollowsTheNumberOfNodes(t *testing.T) {
	c := newCluster(t)
	for i := range 41 {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("n%d", i)}}
		c.Expect(c.Create(c.ctx, n)).To(Succeed())
	}
	intervals := func() map[time.Duration]int {
		var l v1alpha1.NodeProxyStateList
		c.Expect(c.List(c.ctx, &l)).To(Succeed())
		m := map[time.Duration]int{}
		for _, s := range l.Items {
			m[s.Spec.ReportInterval.Duration]++
		}
		return m
	}
	c.Eventually(intervals).Should(Equal(map[time.Duration]int{400 * time.Millisecond: 41}))

	// One node fewer rewrites nothing, not even by a controller that has just started.
	s, err := c.state("n7")
	c.Expect(err).NotTo(HaveOccurred())
	c.stop()
	c.Expect(c.Delete(c.ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n0"}})).To(Succeed())
	c.start()
	c.Eventually(intervals).Should(Equal(map[time.Duration]int{400 * time.Millisecond: 40}))
	c.addNode("later", nil)
	again, err := c.state("n7")
	c.Expect(err).NotTo(HaveOccurred())
	c.Expect(again.ResourceVersion).To(Equal(s.ResourceVersion))

	for i := range 20 {
		c.Expect(c.Delete(c.ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("n%d", i+1)}})).To(Succeed())
	}
	c.Eventually(intervals).Should(Equal(map[time.Duration]int{200 * time.Millisecond: 21}))
}

func TestProgrammedWhenTheLastAgentHoldsIt(t *testing.T) {
	c := newCluster(t)
	c.addNode("a", nil)
	c.addNode("b", nil)
	c.addNode("c", nil)
	c.serve("web", "10.244.1.2")
	c.report("b")
	c.assign("web")
	c.report("a")
	c.Eventually(c.story("web")).Should(Equal("False WaitingForNodes 1/3"))
	c.Expect(c.message("web")).To(Equal("1 of 3 nodes hold this generation; waiting for b (behind), c (its agent does not report)"))
	c.report("b", "c")
	c.Eventually(c.story("web")).Should(Equal("True Programmed 3/3"))
}

func TestDeadNodeDoesNotBlock(t *testing.T) {
	c := newCluster(t)
	c.addNode("a", nil)
	c.addNode("dead", nil)
	c.serve("web", "10.244.1.2")
	c.assign("web")
	c.report("a")
	c.Eventually(c.story("web")).Should(Equal("False WaitingForNodes 1/2"))
	c.setReady("dead", false)
	c.Eventually(c.story("web")).Should(Equal("True Programmed 1/1"))
}

func TestNoReadyEndpointsAndNoNodes(t *testing.T) {
	c := newCluster(t)
	c.assign("web")
	c.Eventually(c.story("web")).Should(Equal("False NoNodes 0/0"))
	c.addNode("a", nil)
	c.report("a")
	c.Eventually(c.story("web")).Should(Equal("False NoReadyEndpoints 1/1"))
	c.serve("web")
	c.serve("web", "10.244.1.2")
	c.Eventually(c.story("web")).Should(Equal("False WaitingForNodes 0/1"))
	c.report("a")
	c.Eventually(c.story("web")).Should(Equal("True Programmed 1/1"))
}

func TestModeThatANodeCannotDo(t *testing.T) {
	c := newCluster(t)
	c.addNode("a", nil)
	c.serve("web", "10.244.1.2")
	c.assign("web", func(s *v1alpha1.ServiceAssignmentSpec) { s.ProxyMode = v1alpha1.ProxyModeEBPF })
	status := c.marks()
	status.Modes = []v1alpha1.NodeProxyMode{
		{Mode: v1alpha1.ProxyModeNFTables, Available: true},
		{Mode: v1alpha1.ProxyModeEBPF, Message: "the kernel has no BTF"},
	}
	c.reportStatus("a", status)
	c.Eventually(c.story("web")).Should(Equal("False ModeUnsupported 0/1"))
	c.Expect(c.message("web")).To(Equal("Proxy mode EBPF is not available on a (the kernel has no BTF; it can do NFTables)"))
	status.Modes[1] = v1alpha1.NodeProxyMode{Mode: v1alpha1.ProxyModeEBPF, Available: true}
	c.reportStatus("a", status)
	c.Eventually(c.story("web")).Should(Equal("True Programmed 1/1"))
}

func TestLatchedAcrossChurnAndRestart(t *testing.T) {
	c := newCluster(t)
	c.addNode("a", nil)
	c.serve("web", "10.244.1.2")
	c.assign("web")
	c.report("a")
	c.Eventually(c.story("web")).Should(Equal("True Programmed 1/1"))
	before := c.assignment("web")

	c.serve("web", "10.244.1.3")
	c.serve("web")
	c.addNode("b", nil)
	c.caughtUp("a", "b")
	c.stop()
	c.reportStatus("a", v1alpha1.NodeProxyStateStatus{AssignmentRevision: "1", EndpointSliceRevision: "1", AgentVersion: "test"})
	c.start()
	c.caughtUp("a", "b")
	c.Expect(c.assignment("web").ResourceVersion).To(Equal(before.ResourceVersion))

	// Another generation, and another assignment of the same name, start anew.
	c.serve("web", "10.244.1.4")
	c.reassign("web")
	c.report("a")
	c.Eventually(c.story("web")).Should(Equal("False WaitingForNodes 1/2"))
	c.report("b")
	c.Eventually(c.story("web")).Should(Equal("True Programmed 2/2"))
	c.Expect(c.Delete(c.ctx, c.assignment("web"))).To(Succeed())
	c.assign("web")
	c.Eventually(c.story("web")).Should(Equal("False WaitingForNodes 0/2"))
}

func TestPendingAcrossRestart(t *testing.T) {
	c := newCluster(t)
	c.addNode("a", nil)
	c.addNode("b", nil)
	c.serve("web", "10.244.1.2")
	c.assign("web")
	c.report("a")
	c.Eventually(c.story("web")).Should(Equal("False WaitingForNodes 1/2"))
	c.stop()
	c.report("a", "b")
	c.start()
	c.Eventually(c.story("web")).Should(Equal("True Programmed 2/2"))
}

// The condition Allocated on the same status belongs to another controller, which applies it as this test does.
func TestOtherConditionsStay(t *testing.T) {
	c := newCluster(t)
	c.addNode("a", nil)
	c.serve("web", "10.244.1.2")
	c.assign("web")
	allocated := func(status metav1.ConditionStatus) {
		o := &unstructured.Unstructured{Object: map[string]any{"status": map[string]any{"conditions": []any{map[string]any{
			"type": v1alpha1.AssignmentAllocated, "status": string(status), "reason": "Test", "message": "",
			"lastTransitionTime": metav1.Now().UTC().Format(time.RFC3339),
		}}}}}
		o.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind("ServiceAssignment"))
		o.SetNamespace("default")
		o.SetName("web")
		c.Expect(c.Status().Apply(c.ctx, client.ApplyConfigurationFromUnstructured(o), client.FieldOwner("allocator"))).To(Succeed())
	}
	allocated(metav1.ConditionFalse)
	c.report("a")
	c.Eventually(c.story("web")).Should(HavePrefix("True"))
	a := c.assignment("web")
	c.Expect(meta.IsStatusConditionFalse(a.Status.Conditions, v1alpha1.AssignmentAllocated)).To(BeTrue())
	allocated(metav1.ConditionTrue)
	a = c.assignment("web")
	c.Expect(meta.IsStatusConditionTrue(a.Status.Conditions, v1alpha1.AssignmentAllocated)).To(BeTrue())
	c.Expect(meta.IsStatusConditionTrue(a.Status.Conditions, v1alpha1.AssignmentProgrammed)).To(BeTrue())
	c.Expect(a.Status.Nodes).To(Equal(v1alpha1.AssignmentNodesStatus{Desired: 1, Programmed: 1}))

	owned := map[string]string{}
	for _, m := range a.ManagedFields {
		owned[m.Manager] = string(m.FieldsV1.GetRawBytes())
	}
	c.Expect(owned).To(HaveKeyWithValue("serviceproxy-programmed", And(
		ContainSubstring("Programmed"), ContainSubstring("f:nodes"), Not(ContainSubstring("Allocated")), Not(ContainSubstring("f:spec")))))

	// Someone who wipes the whole status loses: ours comes back.
	a.Status = v1alpha1.ServiceAssignmentStatus{}
	c.Expect(c.Status().Update(c.ctx, a)).To(Succeed())
	c.Eventually(c.story("web")).Should(Equal("True Programmed 1/1"))
}

// kubectl wait is the interface of this package: it must return when, and only when, all agents hold the generation.
func TestKubectlWait(t *testing.T) {
	c := newCluster(t)
	c.addNode("a", nil)
	c.addNode("b", nil)
	c.serve("web", "10.244.1.2")
	c.assign("web")
	c.report("a")
	wait := func(timeout string) *exec.Cmd {
		return exec.CommandContext(c.ctx, filepath.Join(os.Getenv("KUBEBUILDER_ASSETS"), "kubectl"), "--kubeconfig", apiServer.kubeconfig,
			"wait", "--for=condition=Programmed", "serviceassignment/web", "--timeout", timeout)
	}
	type result struct {
		out string
		err error
	}
	done := make(chan result, 1)
	go func() {
		out, err := wait("60s").CombinedOutput()
		done <- result{string(out), err}
	}()
	c.Eventually(c.story("web")).Should(Equal("False WaitingForNodes 1/2"))
	c.Consistently(done, "1s").ShouldNot(Receive())
	c.report("b")
	var r result
	c.Eventually(done).Should(Receive(&r))
	c.Expect(r.err).NotTo(HaveOccurred(), r.out)
	c.Expect(c.story("web")()).To(Equal("True Programmed 2/2"))

	// A new generation of which no controller has said anything yet: the old True does not count.
	c.stop()
	c.reassign("web")
	out, err := wait("1s").CombinedOutput()
	c.Expect(err).To(HaveOccurred(), string(out))
	c.Expect(string(out)).To(ContainSubstring("timed out"))
}

// Each status write reaches every agent, so there must be few: a False, a True, and for who waits for long a False that names other
// nodes after 10 s, 30 s, 70 s.
func TestStatusWritesAreFew(t *testing.T) {
	const nodes, assignments, rounds = 50, 1000, 5
	c := newCluster(t)
	c.stop()
	var names []string
	for i := range nodes {
		names = append(names, fmt.Sprintf("n%02d", i))
		c.Expect(c.Create(c.ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: names[i]}})).To(Succeed())
		c.setReady(names[i], true)
	}
	registry := c.start()
	for _, n := range names {
		c.Eventually(func() error { _, err := c.state(n); return err }).Should(Succeed())
	}
	watching, err := client.NewWithWatch(apiServer.config, client.Options{Scheme: scheme()})
	c.Expect(err).NotTo(HaveOccurred())
	versions := c.versions(watching)
	start := time.Now()
	for round := range rounds {
		var creating sync.WaitGroup
		for worker := range 10 {
			creating.Go(func() {
				for i := worker; i < assignments/rounds; i += 10 {
					name := fmt.Sprintf("svc-%d-%d", round, i)
					c.serve(name, "10.244.1.2")
					c.assign(name)
				}
			})
		}
		creating.Wait()
		c.report(names[:nodes-1]...) // one agent is held back, so that none is programmed yet
	}
	c.Eventually(func() float64 { return gauge(c, registry, "serviceproxy_assignments_pending") }).Should(BeNumerically("==", assignments))
	c.report(names...)
	c.Eventually(func() float64 { return gauge(c, registry, "serviceproxy_assignments_programmed") }).Should(BeNumerically("==", assignments))
	// The histogram counts what is written.
	c.Eventually(func() int { return written(c, registry) }).Should(Equal(assignments))
	took := time.Since(start)

	c.caughtUp(names...)
	allowed := 2
	for refresh := 10 * time.Second; refresh < took; refresh = 2*refresh + 10*time.Second {
		allowed++
	}
	most, all := 0, 0
	for name, n := range versions() {
		if strings.HasPrefix(name, "svc-") {
			most, all = max(most, n-1), all+n-1
		}
	}
	t.Logf("%d status writes for %d assignments in %v, at most %d for one; %d allowed", all, assignments, took, most, allowed)
	c.Expect(all).To(BeNumerically(">=", assignments))
	c.Expect(most).To(BeNumerically("<=", allowed))
}

// versions counts how many versions of each assignment there are from now until one of them is deleted.
func (c *cluster) versions(watching client.WithWatch) func() map[string]int {
	c.t.Helper()
	w, err := watching.Watch(c.ctx, &v1alpha1.ServiceAssignmentList{})
	c.Expect(err).NotTo(HaveOccurred())
	seen := make(chan map[string]int, 1)
	go func() {
		defer w.Stop()
		counts := map[string]int{}
		for e := range w.ResultChan() {
			if e.Type == watch.Deleted {
				break
			}
			if o, ok := e.Object.(*v1alpha1.ServiceAssignment); ok {
				counts[o.Name]++
			}
		}
		seen <- counts
	}()
	return func() map[string]int { return <-seen }
}

func gauge(c *cluster, r prometheus.Gatherer, name string) float64 {
	return metric(c, r, name).GetGauge().GetValue()
}

func written(c *cluster, r prometheus.Gatherer) int {
	return int(metric(c, r, "serviceproxy_assignment_programming_duration_seconds").GetHistogram().GetSampleCount())
}

func metric(c *cluster, r prometheus.Gatherer, name string) *dto.Metric {
	families, err := r.Gather()
	c.Expect(err).NotTo(HaveOccurred())
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0]
		}
	}
	c.t.Fatalf("no metric %s", name)
	return nil
}
