package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// asController in the environment makes this test binary the controller, so that a test can run and kill real processes.
const asController = "TEST_RUN_CONTROLLER"

func TestMain(m *testing.M) {
	if os.Getenv(asController) != "" {
		if err := run(ctrl.SetupSignalHandler(), os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "controller:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// cluster is an API server, with what the rest of a cluster does played by the test.
type cluster struct {
	*GomegaWithT
	client.Client
	ctx        context.Context
	kubeconfig string
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		t.Fatal("KUBEBUILDER_ASSETS is not set: export KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)")
	}
	c := &cluster{GomegaWithT: NewWithT(t), ctx: t.Context()}
	c.SetDefaultEventuallyTimeout(60 * time.Second)
	c.SetDefaultEventuallyPollingInterval(50 * time.Millisecond)
	env := &envtest.Environment{CRDDirectoryPaths: []string{filepath.Join("..", "..", "config", "crd", "bases")}, ErrorIfCRDPathMissing: true}
	config, err := env.Start()
	c.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() { NewWithT(t).Expect(env.Stop()).To(Succeed()) })
	c.kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	c.Expect(os.WriteFile(c.kubeconfig, env.KubeConfig, 0o600)).To(Succeed())
	scheme := runtime.NewScheme()
	c.Expect(clientgoscheme.AddToScheme(scheme)).To(Succeed())
	c.Expect(v1alpha1.AddToScheme(scheme)).To(Succeed())
	c.Client, err = client.New(config, client.Options{Scheme: scheme})
	c.Expect(err).NotTo(HaveOccurred())
	return c
}

// startController starts a controller's process, and returns what kills it.
func (c *cluster) startController(t *testing.T) (kill func()) {
	t.Helper()
	process := exec.Command(os.Args[0], "--kubeconfig="+c.kubeconfig, "--leader-elect", "--namespace=default",
		"--webhook-bind-address=0", "--metrics-bind-address=0", "--health-probe-bind-address=0")
	process.Env = append(os.Environ(), asController+"=1")
	log := &strings.Builder{}
	process.Stdout, process.Stderr = log, log
	c.Expect(process.Start()).To(Succeed())
	killed := false
	kill = func() {
		if !killed {
			killed = true
			_ = process.Process.Kill() // unless it ended by itself, which the test has noticed then
			_ = process.Wait()
			if t.Failed() {
				t.Logf("controller %d:\n%s", process.Process.Pid, log)
			}
		}
	}
	t.Cleanup(kill)
	return kill
}

func (c *cluster) leader() string {
	var lease coordinationv1.Lease
	if err := c.Get(c.ctx, client.ObjectKey{Namespace: "default", Name: "serviceproxy-controller"}, &lease); err != nil || lease.Spec.HolderIdentity == nil {
		return ""
	}
	return *lease.Spec.HolderIdentity
}

// addNode makes a Node that is Ready.
func (c *cluster) addNode(name string) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	c.Expect(c.Create(c.ctx, node)).To(Succeed())
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	c.Expect(c.Status().Update(c.ctx, node)).To(Succeed())
}

// report plays a node's agent, whose kernel holds everything up to the newest assignment and slice.
func (c *cluster) report(node string, available bool) {
	var assignments v1alpha1.ServiceAssignmentList
	c.Expect(c.List(c.ctx, &assignments)).To(Succeed())
	var slices discoveryv1.EndpointSliceList
	c.Expect(c.List(c.ctx, &slices)).To(Succeed())
	c.Eventually(func(g Gomega) {
		var state v1alpha1.NodeProxyState
		g.Expect(c.Get(c.ctx, client.ObjectKey{Name: node}, &state)).To(Succeed())
		state.Status.AssignmentRevision, state.Status.EndpointSliceRevision = assignments.ResourceVersion, slices.ResourceVersion
		state.Status.Modes = []v1alpha1.NodeProxyMode{{Mode: v1alpha1.ProxyModeNFTables, Available: available}}
		g.Expect(c.Status().Update(c.ctx, &state)).To(Succeed())
	}).Should(Succeed())
}

// service makes a Service with an endpoint. Its ClusterIP is chosen, because the API server might pick one of the policy's range.
func (c *cluster) service(name, clusterIP string, ready bool) *corev1.Service {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{"covered": "yes"}},
		Spec: corev1.ServiceSpec{ClusterIP: clusterIP, Ports: []corev1.ServicePort{{Port: 80}}}}
	c.Expect(c.Create(c.ctx, svc)).To(Succeed())
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: new(""), Port: new(int32(8080)), Protocol: new(corev1.ProtocolTCP)}},
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{"10.244.0.7"}, Conditions: discoveryv1.EndpointConditions{Ready: new(ready)}}},
	}
	c.Expect(c.Create(c.ctx, slice)).To(Succeed())
	return svc
}

func (c *cluster) policy(change func(*v1alpha1.ServiceProxyPolicySpec)) *v1alpha1.ServiceProxyPolicy {
	p := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: "tenant"}}
	p.Spec.ServiceSelector = metav1.LabelSelector{MatchLabels: map[string]string{"covered": "yes"}}
	change(&p.Spec)
	c.Expect(c.Create(c.ctx, p)).To(Succeed())
	return p
}

// is waits for a condition of the policy's present generation.
func (c *cluster) is(p *v1alpha1.ServiceProxyPolicy, kind, status string) {
	c.Eventually(func() string {
		if err := c.Get(c.ctx, client.ObjectKeyFromObject(p), p); err != nil {
			return err.Error()
		}
		cond := apimeta.FindStatusCondition(p.Status.Conditions, kind)
		if cond == nil || cond.ObservedGeneration != p.Generation {
			return "unknown"
		}
		return string(cond.Status) + " " + cond.Reason + ": " + cond.Message
	}).Should(HavePrefix(status))
}

// registered plays the kube-controller-manager that finds a new ServiceCIDR ready.
func (c *cluster) registered(prefix netip.Prefix) {
	c.Eventually(func(g Gomega) {
		var list networkingv1.ServiceCIDRList
		g.Expect(c.List(c.ctx, &list, client.MatchingLabels{v1alpha1.LabelPolicy: "tenant"})).To(Succeed())
		g.Expect(list.Items).To(HaveLen(1))
		g.Expect(list.Items[0].Spec.CIDRs).To(Equal([]string{prefix.String()}))
		apimeta.SetStatusCondition(&list.Items[0].Status.Conditions, metav1.Condition{Type: networkingv1.ServiceCIDRConditionReady, Status: "True", Reason: "Test"})
		g.Expect(c.Status().Update(c.ctx, &list.Items[0])).To(Succeed())
	}).Should(Succeed())
}

func (c *cluster) additional(svc *corev1.Service) (out netip.Addr) {
	c.Eventually(func(g Gomega) {
		var a v1alpha1.ServiceAssignment
		g.Expect(c.Get(c.ctx, client.ObjectKeyFromObject(svc), &a)).To(Succeed())
		g.Expect(a.Spec.ServiceUID).To(Equal(svc.UID))
		g.Expect(a.Spec.ServiceIPs).To(HaveLen(2))
		g.Expect(a.Spec.ServiceIPs[1].Source).To(Equal(v1alpha1.ServiceIPSourceAdditional))
		out = netip.MustParseAddr(a.Spec.ServiceIPs[1].IP)
	}).Should(Succeed())
	return out
}

// The whole controller as it runs in a cluster: what is allocated and what is programmed meet in the policy's status, and a leader that is killed is
// replaced by one that goes on where it was.
func TestTwoControllersOneKilled(t *testing.T) {
	c := newCluster(t)
	kill := c.startController(t)
	c.Eventually(c.leader).ShouldNot(BeEmpty())
	first := c.leader()
	c.startController(t)

	c.addNode("node1")
	c.addNode("node2")
	prefix := netip.MustParsePrefix("10.99.0.0/24")
	before := c.service("web", "10.0.0.11", true)
	p := c.policy(func(s *v1alpha1.ServiceProxyPolicySpec) {
		s.ServiceRanges = []v1alpha1.ServiceRange{{CIDR: prefix.String()}}
	})
	c.registered(prefix)
	held := c.additional(before)
	c.Expect(prefix.Contains(held)).To(BeTrue())
	c.is(p, v1alpha1.PolicyProgrammed, "False Programming")
	c.report("node1", true)
	c.Expect(c.leader()).To(Equal(first))

	kill()
	later := c.service("later", "10.0.0.12", true)
	unserved := c.service("unserved", "10.0.0.13", false)
	addrs := map[netip.Addr]bool{held: true, c.additional(later): true, c.additional(unserved): true}
	c.Expect(addrs).To(HaveLen(3))
	c.Expect(c.leader()).NotTo(Equal(first))
	c.Expect(c.additional(before)).To(Equal(held))

	c.report("node1", true)
	c.is(p, v1alpha1.PolicyProgrammed, "False Programming") // node2 has not reported
	c.is(p, v1alpha1.PolicyReady, "False Programming")
	c.report("node2", true)
	c.is(p, v1alpha1.PolicyProgrammed, "True Programmed") // that nobody serves a Service is not the nodes' fault
	c.is(p, v1alpha1.PolicyReady, "True")
	c.Expect(p.Status.Services).To(Equal(v1alpha1.PolicyServicesStatus{Covered: 3, Assigned: 3, Programmed: 3}))

	c.report("node2", false)
	c.is(p, v1alpha1.PolicyReady, "False UnsupportedNodes")
}
