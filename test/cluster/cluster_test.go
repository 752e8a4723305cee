package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// patience is how long a condition may take on a busy machine.
const patience = 60 * time.Second

// victimName, in the environment, makes this test program start a cluster of that name, say so, and wait to be killed.
const victimName = "CLUSTER_TEST_VICTIM"

func TestMain(m *testing.M) {
	ctrllog.SetLogger(logr.Discard()) // the client's library would warn that nobody had set one
	if name := os.Getenv(victimName); name != "" {
		if _, err := StartInterruptible(context.Background(), Options{Name: name}); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("up")
		select {}
	}
	os.Exit(m.Run())
}

func TestCluster(t *testing.T) {
	netns.RequireRoot(t)
	before := machine(t)
	c := StartT(t, Options{Nodes: 2, NodeMonitorGracePeriod: 15 * time.Second})
	g := NewWithT(t)
	g.Expect(machine(t)).To(Equal(before), "the cluster changed the machine's own network")
	web := newWeb()
	for _, o := range web.objects() {
		g.Expect(c.Client().Create(t.Context(), o)).To(Succeed())
	}
	for _, s := range []struct {
		what string
		test func(*testing.T, *Cluster, workload)
	}{
		{"Pods run on both nodes and are endpoints", testEndpoints},
		{"Pods reach each other directly, the outside host reaches nodes only", testConnections},
		{"readiness is toggled by an annotation", testReadiness},
		{"a deleted Pod lets its connections finish", testDeletion},
		{"a Pod deleted by force is gone at once", testForcedDeletion},
		{"Pods with hostNetwork are at the node's addresses", testHostNetwork},
		{"the API server comes back with its data", testAPIServer},
		{"a node turns NotReady and back", testNodeReady},
		{"a killed run is cleaned up by the next and beside this one", testKilledRun},
		{"a terminated run leaves nothing", testTerminatedRun},
		{"a node loses its power", testPowerOff},
	} {
		t.Run(s.what, func(t *testing.T) { s.test(t, c, web) })
	}
	if t.Failed() {
		return
	}
	g.Expect(c.Close()).To(Succeed())
	nothingLeft(t, c.options.Name)
	g.Expect(machine(t)).To(Equal(before), "the cluster changed the machine's own network")
}

func TestInterruptedStartLeavesNothing(t *testing.T) {
	netns.RequireRoot(t)
	for _, until := range []string{"network", "control plane"} {
		t.Run(until, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			name := "interrupted-" + strconv.Itoa(os.Getpid())
			_, err := Start(ctx, Options{Name: name, Nodes: 2, Progress: writerFunc(func(line string) {
				if strings.HasPrefix(line, until) {
					// In the middle of the next step, the control plane's start, or right before the one after it.
					time.AfterFunc(200*time.Millisecond, cancel)
				}
			})})
			if err == nil {
				t.Fatal("an interrupted start must fail")
			}
			nothingLeft(t, name)
		})
	}
}

func TestBadOptions(t *testing.T) {
	netns.RequireRoot(t)
	for _, tt := range []struct {
		options Options
		want    string
	}{
		{Options{Name: "No Good"}, `cluster name "No Good": must be lower-case`},
		{Options{Nodes: 81}, "81 nodes: must be 1 to 80"},
		{Options{Nodes: -1}, "-1 nodes: must be 1 to 80"},
	} {
		_, err := Start(t.Context(), tt.options)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Start(%+v): %v, want %q", tt.options, err, tt.want)
		}
	}
}

func testEndpoints(t *testing.T, c *Cluster, w workload) {
	g := NewWithT(t)
	pods := w.running(t, c, 4)
	nodes := map[string]int{}
	addresses := map[string]bool{}
	for _, p := range pods {
		nodes[p.Spec.NodeName]++
		addresses[p.Status.PodIP] = true
		g.Expect(p.Status.PodIPs).To(HaveLen(2))
	}
	g.Expect(nodes).To(Equal(map[string]int{"node1": 2, "node2": 2}), "pods must be spread")
	g.Expect(addresses).To(HaveKey("10.244.1.2"), "the first pod's address")
	for _, family := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		g.Eventually(func() map[string]bool { return w.endpoints(t, c, family) }).WithTimeout(patience).
			Should(And(HaveLen(4), HaveEach(true)), "ready endpoints of "+string(family))
	}
}

func testConnections(t *testing.T, c *Cluster, w workload) {
	g := NewWithT(t)
	pods := w.running(t, c, 4)
	for _, from := range pods[:2] {
		ns := c.Pod(from.Namespace, from.Name)
		g.Expect(ns).NotTo(BeNil())
		for _, to := range pods {
			for i, ip := range to.Status.PodIPs {
				for _, network := range []string{"tcp", "udp"} {
					a, err := Call(t.Context(), ns, network, netip.AddrPortFrom(netip.MustParseAddr(ip.IP), 8080))
					g.Expect(err).NotTo(HaveOccurred())
					g.Expect(a.Pod).To(Equal(to.Name))
					g.Expect(a.Node).To(Equal(to.Spec.NodeName))
					g.Expect(a.Client.Addr().String()).To(Equal(from.Status.PodIPs[i].IP), "a direct connection must not be translated")
					g.Expect(a.Message).To(Equal("who are you?"))
				}
			}
		}
	}
	pod := netip.AddrPortFrom(netip.MustParseAddr(pods[0].Status.PodIP), 8080)
	_, err := Call(t.Context(), c.Nodes[0].NS, "tcp", pod)
	g.Expect(err).NotTo(HaveOccurred(), "a node must reach pods")
	_, err = Call(t.Context(), c.Outside(), "tcp", pod)
	g.Expect(err).To(MatchError(syscall.ENETUNREACH), "the outside host must have no way to pods")
	for _, n := range c.Nodes {
		for _, a := range n.Addresses {
			_, err = Call(t.Context(), c.Outside(), "tcp", netip.AddrPortFrom(a, 9))
			g.Expect(err).To(MatchError(syscall.ECONNREFUSED), "the outside host must reach nodes")
		}
	}
	// People ask by curl, and enter namespaces by name.
	out, err := exec.Command("ip", "netns", "exec", c.Exec(pods[0].Namespace+"."+pods[0].Name), "ip", "-br", "addr", "show", "eth0").CombinedOutput()
	g.Expect(err).NotTo(HaveOccurred(), string(out))
	g.Expect(string(out)).To(ContainSubstring(pods[0].Status.PodIP + "/32"))
	conn, err := Dial(t.Context(), c.Nodes[0].NS, "tcp", pod)
	g.Expect(err).NotTo(HaveOccurred())
	defer conn.Close()
	_, err = conn.Write([]byte("GET /path HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n"))
	g.Expect(err).NotTo(HaveOccurred())
	line, err := bufio.NewReader(conn).ReadString('\n')
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(line).To(Equal("HTTP/1.1 200 OK\r\n"))
}

func testReadiness(t *testing.T, c *Cluster, w workload) {
	g := NewWithT(t)
	pod := w.running(t, c, 4)[0]
	for _, ready := range []bool{false, true} {
		w.setReady(t, c, &pod, ready)
		g.Eventually(func() map[string]bool { return w.endpoints(t, c, discoveryv1.AddressTypeIPv4) }).WithTimeout(patience).
			Should(HaveKeyWithValue(pod.Status.PodIP, ready))
	}
}

func testDeletion(t *testing.T, c *Cluster, w workload) {
	g := NewWithT(t)
	pod := w.running(t, c, 4)[0]
	at := netip.AddrPortFrom(netip.MustParseAddr(pod.Status.PodIP), 8080)
	conn, err := Dial(t.Context(), c.Nodes[1].NS, "tcp", at)
	g.Expect(err).NotTo(HaveOccurred())
	defer conn.Close()
	_, err = Ask(t.Context(), conn)
	g.Expect(err).NotTo(HaveOccurred())

	g.Expect(c.Client().Delete(t.Context(), &pod, client.GracePeriodSeconds(50))).To(Succeed())
	g.Eventually(func() bool { return w.terminating(t, c, pod.Status.PodIP) }).WithTimeout(patience).Should(BeTrue(), "the endpoint must be terminating")
	g.Eventually(func() error {
		_, err := Call(t.Context(), c.Nodes[1].NS, "tcp", at)
		return err
	}).WithTimeout(patience).Should(MatchError(syscall.ECONNREFUSED), "new connections must be refused")
	a, err := Ask(t.Context(), conn)
	g.Expect(err).NotTo(HaveOccurred(), "an open connection must go on")
	g.Expect(a.Pod).To(Equal(pod.Name))
	g.Expect(conn.Close()).To(Succeed())

	g.Eventually(func() error { return c.Client().Get(t.Context(), client.ObjectKeyFromObject(&pod), &corev1.Pod{}) }).
		WithTimeout(patience).Should(Satisfy(apierrors.IsNotFound), "with its last connection the pod must go, long before the grace period ends")
	g.Expect(c.Pod(pod.Namespace, pod.Name)).To(BeNil())
	g.Expect(filepath.Join(pinRoot, c.Exec(pod.Namespace+"."+pod.Name))).NotTo(BeAnExistingFile())
	routes, err := c.Node(pod.Spec.NodeName).NS.Run("ip", "route")
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(routes).NotTo(ContainSubstring(pod.Status.PodIP + " "))
	w.running(t, c, 4) // its replacement
}

func testForcedDeletion(t *testing.T, c *Cluster, w workload) {
	g := NewWithT(t)
	pod := w.running(t, c, 4)[0]
	g.Expect(c.Client().Delete(t.Context(), &pod, client.GracePeriodSeconds(0))).To(Succeed())
	g.Eventually(func() any { return c.Pod(pod.Namespace, pod.Name) }).WithTimeout(patience).Should(BeNil())
	w.running(t, c, 4)
}

func testHostNetwork(t *testing.T, c *Cluster, _ workload) {
	g := NewWithT(t)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "on-host"},
		Spec:       corev1.PodSpec{HostNetwork: true, NodeName: "node2", Containers: []corev1.Container{webContainer(8081)}},
	}
	g.Expect(c.Client().Create(t.Context(), pod)).To(Succeed())
	g.Eventually(func() (Answer, error) {
		return Call(t.Context(), c.Outside(), "tcp", netip.AddrPortFrom(c.Nodes[1].Addresses[0], 8081))
	}).WithTimeout(patience).Should(HaveField("Pod", "on-host"))
	g.Expect(c.Client().Delete(t.Context(), pod, client.GracePeriodSeconds(0))).To(Succeed())
	g.Eventually(func() error {
		_, err := Call(t.Context(), c.Outside(), "tcp", netip.AddrPortFrom(c.Nodes[1].Addresses[0], 8081))
		return err
	}).WithTimeout(patience).Should(MatchError(syscall.ECONNREFUSED))
}

func testAPIServer(t *testing.T, c *Cluster, w workload) {
	g := NewWithT(t)
	pods := w.running(t, c, 4)
	get := []string{"--kubeconfig=" + c.Nodes[0].Kubeconfig, "get", "--raw=/readyz", "--request-timeout=5s"}
	kubectl := filepath.Join(c.Assets, "kubectl")
	out, err := c.Nodes[0].NS.Run(kubectl, get...)
	g.Expect(err).NotTo(HaveOccurred(), "from a node, with the agent's credentials")
	g.Expect(out).To(Equal("ok"))

	g.Expect(c.APIServer.Stop()).To(Succeed())
	_, err = c.Nodes[0].NS.Run(kubectl, get...)
	g.Expect(err).To(HaveOccurred())
	a, err := Call(t.Context(), c.Nodes[0].NS, "tcp", netip.AddrPortFrom(netip.MustParseAddr(pods[3].Status.PodIP), 8080))
	g.Expect(err).NotTo(HaveOccurred(), "pods must go on")
	g.Expect(a.Pod).To(Equal(pods[3].Name))

	g.Expect(c.APIServer.Start(t.Context())).To(Succeed())
	_, err = c.Nodes[0].NS.Run(kubectl, get...)
	g.Expect(err).NotTo(HaveOccurred())
	w.setReady(t, c, &pods[0], false)
	g.Eventually(func() map[string]bool { return w.endpoints(t, c, discoveryv1.AddressTypeIPv4) }).WithTimeout(patience).
		Should(HaveKeyWithValue(pods[0].Status.PodIP, false), "kubelet and controllers must find their way back")
	w.setReady(t, c, &pods[0], true)
	w.running(t, c, 4)
}

func testNodeReady(t *testing.T, c *Cluster, w workload) {
	g := NewWithT(t)
	for _, ready := range []corev1.ConditionStatus{corev1.ConditionFalse, corev1.ConditionTrue} {
		g.Expect(c.Node("node2").SetReady(t.Context(), ready == corev1.ConditionTrue)).To(Succeed())
		g.Eventually(func() corev1.ConditionStatus { return nodeReady(t, c, "node2") }).WithTimeout(patience).Should(Equal(ready))
	}
	w.running(t, c, 4) // the controller manager may have marked them not ready meanwhile
}

func testPowerOff(t *testing.T, c *Cluster, w workload) {
	g := NewWithT(t)
	var pod corev1.Pod
	for _, p := range w.running(t, c, 4) {
		if p.Spec.NodeName == "node2" {
			pod = p
		}
	}
	g.Expect(c.Node("node2").PowerOff()).To(Succeed())
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := Call(ctx, c.Nodes[0].NS, "tcp", netip.AddrPortFrom(netip.MustParseAddr(pod.Status.PodIP), 8080))
	var timeout net.Error
	g.Expect(errors.As(err, &timeout) && timeout.Timeout()).To(BeTrue(), "a dead node's pods must not even refuse: %v", err)
	g.Eventually(func() corev1.ConditionStatus { return nodeReady(t, c, "node2") }).WithTimeout(patience).
		Should(Equal(corev1.ConditionUnknown))
	g.Expect(nodeReady(t, c, "node1")).To(Equal(corev1.ConditionTrue))
}

func testKilledRun(t *testing.T, c *Cluster, w workload) {
	g := NewWithT(t)
	foreign, err := netns.New()
	g.Expect(err).NotTo(HaveOccurred())
	defer foreign.Close()
	name := "victim-" + strconv.Itoa(os.Getpid())
	g.Expect(foreign.Pin(name + "-of-someone-else")).To(Succeed())

	victim, children := startVictim(t, name)
	g.Expect(victim.Process.Kill()).To(Succeed())
	g.Expect(victim.Wait()).NotTo(Succeed())
	for _, pid := range children {
		g.Eventually(func() bool { return alive(pid) }).WithTimeout(patience).Should(BeFalse(), "a child outlived its killed parent")
	}
	g.Expect(filepath.Join(stateRoot, name)).To(BeADirectory(), "the test is pointless if a killed run leaves nothing")
	g.Expect(Sweep()).To(Succeed())
	g.Expect(filepath.Join(stateRoot, name)).NotTo(BeAnExistingFile())
	g.Expect(filepath.Join(stateRoot, name+lockSuffix)).NotTo(BeAnExistingFile())
	g.Expect(pins(t, name)).To(ConsistOf(name+"-of-someone-else"), "only what the victim left may go")
	// This cluster, up all the time, is as it was.
	w.running(t, c, 4)
	out, err := exec.Command("ip", "netns", "exec", c.Exec("node1"), "true").CombinedOutput()
	g.Expect(err).NotTo(HaveOccurred(), string(out))
	_, err = Start(t.Context(), Options{Name: c.options.Name})
	g.Expect(err).To(MatchError(ContainSubstring("is up already (process %d)", os.Getpid())))
}

func testTerminatedRun(t *testing.T, _ *Cluster, _ workload) {
	g := NewWithT(t)
	name := "victim-" + strconv.Itoa(os.Getpid())
	victim, children := startVictim(t, name)
	g.Expect(victim.Process.Signal(syscall.SIGTERM)).To(Succeed())
	g.Expect(victim.Wait()).To(MatchError("signal: terminated"))
	for _, pid := range children {
		g.Expect(alive(pid)).To(BeFalse())
	}
	g.Expect(filepath.Join(stateRoot, name)).NotTo(BeAnExistingFile())
	g.Expect(pins(t, name)).To(BeEmpty())
}

// startVictim starts this test program with a cluster of its own, beside the one of this process, and gives its children.
func startVictim(t *testing.T, name string) (*exec.Cmd, []int) {
	t.Helper()
	g := NewWithT(t)
	victim := exec.Command("/proc/self/exe")
	victim.Env = append(os.Environ(), victimName+"="+name)
	victim.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdout, err := victim.StdoutPipe()
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(victim.Start()).To(Succeed())
	t.Cleanup(func() {
		if victim.ProcessState == nil {
			victim.Process.Kill() // the test has failed already
			victim.Wait()
		}
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(line).To(Equal("up\n"))
	pid, err := Owner(name)
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(pid).To(Equal(victim.Process.Pid))
	g.Expect(pins(t, name)).To(ContainElements(name+"-node1", name+"-outside"))
	children := childrenOf(t, pid)
	g.Expect(children).To(HaveLen(3), "etcd, kube-apiserver, kube-controller-manager")
	return victim, children
}
