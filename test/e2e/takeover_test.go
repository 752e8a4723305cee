package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// TestTakeOver moves Services from a real kube-proxy to us and back, under load, in a cluster of its own.
func TestTakeOver(t *testing.T) {
	for _, mode := range []string{"nftables", "iptables"} {
		t.Run(mode, func(t *testing.T) { newHandover(t, mode).run() })
	}
}

// handover is a cluster of two nodes with kube-proxy and us.
type handover struct {
	*WithT
	t    *testing.T
	mode string
	c    *cluster.Cluster
	k8s  client.Client
	pod  *netns.NS // a client on the first node
}

const (
	shop            = "shop"
	openThroughMove = 200
	// movePerSecond is how many connections per second are opened while Services move. Each costs its client, the server and the kernel in between, all on this machine.
	movePerSecond = 1000
	// moveGrace is kube-proxy's time when it gets a Service back. Its sync here takes well below a second.
	moveGrace = 4 * time.Second
)

func newHandover(t *testing.T, mode string) *handover {
	ctrllog.SetLogger(logr.Discard()) // the client's library would warn that nobody had set one
	h := &handover{WithT: NewWithT(t), t: t, mode: mode}
	h.SetDefaultEventuallyTimeout(patience)
	h.SetDefaultEventuallyPollingInterval(50 * time.Millisecond)
	var crashed crashLog
	h.c = cluster.StartT(t, cluster.Options{Nodes: 2, Proxy: true, KubeProxy: mode, Crashed: crashed.add,
		ControllerArgs: []string{"--hand-back-grace-period=" + moveGrace.String()}})
	t.Cleanup(func() {
		if err := crashed.take(); err != nil {
			t.Error("a program ended by itself:", err)
		}
	})
	h.k8s = h.c.Client()
	for _, n := range h.c.Nodes {
		h.Expect(n.KubeProxy.Start(t.Context())).To(Succeed())
	}
	h.Expect(h.k8s.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: shop}})).To(Succeed())
	h.deploy()
	return h
}

// deploy starts a client on the first node, and servers.
func (h *handover) deploy() {
	caller := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: shop, Name: "client"},
		Spec: corev1.PodSpec{NodeName: h.c.Nodes[0].Name, Containers: []corev1.Container{{Name: "client", Image: "client"}}}}
	h.Expect(h.k8s.Create(ctx, caller)).To(Succeed())
	labels := map[string]string{"app": "web"}
	h.Expect(h.k8s.Create(ctx, &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: shop, Name: "web"}, Spec: appsv1.DeploymentSpec{
		Replicas: ptr.To(int32(4)), Selector: &metav1.LabelSelector{MatchLabels: labels},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{Containers: []corev1.Container{{
			Name: "echo", Image: "echo", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: podHTTP}}}}}},
	}})).To(Succeed())
	h.Eventually(func(g Gomega) {
		var pods corev1.PodList
		g.Expect(h.k8s.List(ctx, &pods, client.InNamespace(shop))).To(Succeed())
		g.Expect(pods.Items).To(HaveLen(5))
		for _, p := range pods.Items {
			g.Expect(p.Status.Conditions).To(ContainElement(And(HaveField("Type", corev1.PodReady), HaveField("Status", corev1.ConditionTrue))), p.Name)
		}
	}).Should(Succeed())
	h.pod = h.c.Pod(shop, caller.Name)
}

func (h *handover) run() {
	h.nodePort("web", 30180)
	h.nodePort("other", 30181)
	h.local("local", 30182)
	h.carried("web", 30180)
	h.Expect(h.rules("web")).To(ContainSubstring("shop/web"), "kube-proxy's")

	policy := h.coexist()
	h.takeOver(policy)
	h.handBack(policy)
}

// coexist: only the Service that is labelled moves.
func (h *handover) coexist() *v1alpha1.ServiceProxyPolicy {
	policy := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: shop}, Spec: v1alpha1.ServiceProxyPolicySpec{
		NamespaceSelector: metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: shop}}, KubeProxy: v1alpha1.KubeProxyCoexist,
	}}
	h.Expect(h.k8s.Create(ctx, policy)).To(Succeed())
	h.patch("other", fmt.Sprintf(`{"metadata":{"labels":{%q:%q}}}`, v1alpha1.LabelServiceProxyName, v1alpha1.ServiceProxyName))
	h.Eventually(h.assigned).Should(HaveExactElements("other"))
	h.Eventually(h.rules).WithArguments("other").Should(BeEmpty())
	h.carried("other", 30181)
	h.carried("web", 30180)
	h.Expect(h.assigned()).To(HaveExactElements("other"))
	return policy
}

// takeOver: with an agent dead nothing is labelled; then all is, and no connection notices.
func (h *handover) takeOver(policy *v1alpha1.ServiceProxyPolicy) {
	dead := h.c.Nodes[1].Agent
	h.Expect(dead.Kill()).To(Succeed())
	h.Expect(h.k8s.Patch(ctx, policy, client.RawPatch(types.MergePatchType, []byte(`{"spec":{"kubeProxy":"TakeOver"}}`)))).To(Succeed())
	h.Eventually(h.condition).WithArguments(policy).Should(HavePrefix("False WaitingForProgrammed: kube-proxy leaves 1 of 3 covered Services to us"))
	h.Consistently(h.label).WithArguments("web").WithTimeout(time.Second).Should(BeEmpty())
	h.Expect(h.rules("web")).NotTo(BeEmpty())

	moving := h.traffic()
	h.Expect(dead.Start(h.t.Context())).To(Succeed())
	h.Eventually(h.label).WithArguments("web").Should(Equal(v1alpha1.ServiceProxyName))
	h.Eventually(h.condition).WithArguments(policy).Should(HavePrefix("True TakenOver: kube-proxy leaves all 3 covered Services to us"))
	h.Expect(policy.Status.Services.TakenOver).To(BeEquivalentTo(2))
	h.Eventually(h.rules).WithArguments("web").Should(BeEmpty(), "kube-proxy's")
	moving.end("to us")
	h.nodePort("late", 30183)
	h.Eventually(h.label).WithArguments("late").Should(Equal(v1alpha1.ServiceProxyName))
}

// handBack: the policy is deleted, and no connection notices.
func (h *handover) handBack(policy *v1alpha1.ServiceProxyPolicy) {
	h.patch("other", fmt.Sprintf(`{"metadata":{"labels":{%q:null}}}`, v1alpha1.LabelServiceProxyName))
	h.Eventually(h.label).WithArguments("other").Should(Equal(v1alpha1.ServiceProxyName), "it is taken over like any other now")
	moving := h.traffic()
	h.Expect(h.k8s.Delete(ctx, policy)).To(Succeed())
	h.Eventually(h.label).WithArguments("web").Should(BeEmpty())
	h.Eventually(h.rules).WithArguments("web").Should(ContainSubstring("shop/web"), "kube-proxy's")
	h.Eventually(h.assigned).Should(BeEmpty())
	h.Eventually(func() bool { return apierrors.IsNotFound(h.k8s.Get(ctx, client.ObjectKeyFromObject(policy), policy)) }).Should(BeTrue())
	for _, n := range h.c.Nodes {
		h.Eventually(func() string {
			out, err := n.NS.Run("nft", "list", "tables")
			h.Expect(err).NotTo(HaveOccurred(), out)
			if !strings.Contains(out, "ip serviceproxy") {
				return ""
			}
			out, err = n.NS.Run("nft", "list", "table", "ip", "serviceproxy")
			h.Expect(err).NotTo(HaveOccurred(), out)
			return out
		}).ShouldNot(ContainSubstring("30180"), "our rules on %s", n.Name)
	}
	moving.end("back to kube-proxy")
	h.carried("web", 30180)
}

// nodePort makes a Service of the servers.
func (h *handover) nodePort(name string, port int32) {
	h.Expect(h.k8s.Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: shop, Name: name}, Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeNodePort, Selector: map[string]string{"app": "web"},
		Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("http"), NodePort: port}},
	}})).To(Succeed())
}

// local makes one with a health-check node port, which kube-proxy and agents hand to each other.
func (h *handover) local(name string, port int32) {
	h.Expect(h.k8s.Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: shop, Name: name}, Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeLoadBalancer, Selector: map[string]string{"app": "web"}, ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyLocal,
		Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("http"), NodePort: port}},
	}})).To(Succeed())
}

func (h *handover) service(name string) *corev1.Service {
	var svc corev1.Service
	h.Expect(h.k8s.Get(ctx, client.ObjectKey{Namespace: shop, Name: name}, &svc)).To(Succeed())
	return &svc
}

func (h *handover) label(name string) string {
	return h.service(name).Labels[v1alpha1.LabelServiceProxyName]
}

func (h *handover) patch(name, body string) {
	h.Expect(h.k8s.Patch(ctx, h.service(name), client.RawPatch(types.MergePatchType, []byte(body)))).To(Succeed())
}

// assigned names the Services that are ours.
func (h *handover) assigned() (out []string) {
	var list v1alpha1.ServiceAssignmentList
	h.Expect(h.k8s.List(ctx, &list, client.InNamespace(shop))).To(Succeed())
	for _, a := range list.Items {
		out = append(out, a.Name)
	}
	return out
}

func (h *handover) condition(policy *v1alpha1.ServiceProxyPolicy) string {
	h.Expect(h.k8s.Get(ctx, client.ObjectKeyFromObject(policy), policy)).To(Succeed())
	c := apimeta.FindStatusCondition(policy.Status.Conditions, v1alpha1.PolicyTakenOver)
	if c == nil || c.ObservedGeneration != policy.Generation {
		return "none"
	}
	return fmt.Sprintf("%s %s: %s", c.Status, c.Reason, c.Message)
}

// rules are what leads to a Service in kube-proxy's tables, on all nodes. Chains that nothing leads to it deletes with a later change.
func (h *handover) rules(service string) string {
	command := []string{"nft", "list", "table", "ip", "kube-proxy"}
	if h.mode == "iptables" {
		command = []string{"iptables-save", "-t", "nat"}
	}
	var about []string
	for _, n := range h.c.Nodes {
		out, err := n.NS.Run(command[0], command[1:]...)
		h.Expect(err).NotTo(HaveOccurred(), out)
		for line := range strings.Lines(out) {
			if text := strings.TrimSpace(line); strings.HasPrefix(text, "chain ") || strings.HasPrefix(text, ":KUBE-") {
				continue
			}
			if strings.Contains(line, shop+"/"+service+"/") || strings.Contains(line, shop+"/"+service+":") {
				about = append(about, n.Name+" "+line)
			}
		}
	}
	return strings.Join(about, "")
}

// ways are the ways to a Service: from a pod to its own address, and from outside to a node port of each node.
func (h *handover) ways(service string, port uint16) []way {
	own := netip.AddrPortFrom(netip.MustParseAddr(h.service(service).Spec.ClusterIP), 80)
	out := []way{{h.pod, own}}
	for _, n := range h.c.Nodes {
		out = append(out, way{h.c.Outside(), netip.AddrPortFrom(n.Addresses[0], port)})
	}
	return out
}

type way struct {
	from *netns.NS
	to   netip.AddrPort
}

func (h *handover) carried(service string, port uint16) {
	for _, w := range h.ways(service, port) {
		h.Eventually(func() error { return callError(w.from, "tcp", w.to) }).Should(Succeed(), "%v", w.to)
	}
}

// moving is the traffic to a Service while it moves.
type moving struct {
	*handover
	cancel   context.CancelFunc
	running  sync.WaitGroup
	opened   atomic.Int64
	asked    atomic.Int64
	begun    time.Time
	mu       sync.Mutex
	failures []error
	unprobed time.Duration // the longest time without an answer of a health-check node port
}

// traffic opens connections, and asks over those that stay open, until its end.
func (h *handover) traffic() *moving {
	running, cancel := context.WithCancel(ctx)
	m := &moving{handover: h, cancel: cancel, begun: time.Now()}
	h.t.Cleanup(m.stop)
	ways := h.ways("web", 30180)
	const askers = 10
	for i := range askers {
		var conns []net.Conn
		for n := range openThroughMove / askers {
			w := ways[(i+n)%len(ways)]
			conn, err := cluster.Dial(running, w.from, "tcp", w.to)
			h.Expect(err).NotTo(HaveOccurred())
			conns = append(conns, conn)
		}
		m.running.Go(func() { m.ask(running, conns) })
	}
	const openers = 20
	for i := range openers {
		m.running.Go(func() { m.open(running, ways, i, openers*time.Second/movePerSecond) })
	}
	m.running.Go(func() { m.probe(running) })
	return m
}

// ask asks over each connection again and again; each must go on being answered by the same pod.
func (m *moving) ask(running context.Context, conns []net.Conn) {
	pods := make([]string, len(conns))
	for running.Err() == nil {
		for i, conn := range conns {
			asking, cancel := context.WithTimeout(ctx, loadTimeout)
			a, err := cluster.Ask(asking, conn)
			cancel()
			if err == nil && pods[i] != "" && a.Pod != pods[i] {
				err = fmt.Errorf("answered by %s, before by %s", a.Pod, pods[i])
			}
			if err != nil {
				m.fail(fmt.Errorf("open connection to %s: %w", conn.RemoteAddr(), err))
				return
			}
			pods[i] = a.Pod
			m.asked.Add(1)
		}
		wait(running, 200*time.Millisecond)
	}
	for _, conn := range conns {
		if err := conn.Close(); err != nil {
			m.fail(err)
		}
	}
}

// open opens a connection per interval, asks once, and closes it.
func (m *moving) open(running context.Context, ways []way, i int, interval time.Duration) {
	next := time.Now().Add(time.Duration(i) * interval / 20)
	for ; running.Err() == nil; i++ {
		wait(running, time.Until(next))
		next = next.Add(interval)
		if late := time.Since(next); late > interval { // the machine cannot; what was missed is not made up for, or it never could
			next = next.Add(late)
		}
		w := ways[i%len(ways)]
		calling, cancel := context.WithTimeout(ctx, loadTimeout)
		_, err := cluster.Call(calling, w.from, "tcp", w.to)
		cancel()
		if err != nil {
			m.fail(fmt.Errorf("%s new connection to %s: %w", time.Now().Format("15:04:05.000"), w.to, err))
		}
		m.opened.Add(1)
	}
}

// probe asks as a load balancer does whether the first node has endpoints.
func (m *moving) probe(running context.Context) {
	node := m.c.Nodes[0]
	url := fmt.Sprintf("http://%s/", netip.AddrPortFrom(node.Addresses[0], uint16(m.service("local").Spec.HealthCheckNodePort)))
	prober := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		return cluster.Dial(ctx, m.c.Outside(), network, netip.MustParseAddrPort(address))
	}}}
	answered := time.Now()
	for ; running.Err() == nil; wait(running, 50*time.Millisecond) {
		response, err := prober.Get(url)
		if err == nil {
			var body struct{ LocalEndpoints int }
			if err := json.NewDecoder(response.Body).Decode(&body); err == nil && body.LocalEndpoints > 0 {
				answered = time.Now()
			}
			if err := response.Body.Close(); err != nil {
				m.fail(err)
			}
		}
		m.mu.Lock()
		m.unprobed = max(m.unprobed, time.Since(answered))
		m.mu.Unlock()
	}
}

func wait(running context.Context, d time.Duration) {
	select {
	case <-running.Done():
	case <-time.After(d):
	}
}

func (m *moving) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failures = append(m.failures, err)
}

func (m *moving) stop() {
	m.cancel()
	m.running.Wait()
}

// end expects that nothing failed.
func (m *moving) end(what string) {
	m.t.Helper()
	wait(ctx, time.Second) // also some time after
	m.stop()
	took := time.Since(m.begun)
	m.t.Logf("%s: %d connections stayed open and were asked %d times; %d new ones, %.0f a second; the health-check node port was silent for %v at most",
		what, openThroughMove, m.asked.Load(), m.opened.Load(), float64(m.opened.Load())/took.Seconds(), m.unprobed.Round(10*time.Millisecond))
	m.Expect(m.failures[:min(len(m.failures), 5)]).To(BeEmpty(), "%d failed", len(m.failures))
	m.Expect(m.asked.Load()).To(BeNumerically(">", 5*openThroughMove), "with fewer, nothing is shown")
	m.Expect(m.opened.Load()).To(BeNumerically(">", 500), "with fewer, nothing is shown")
	m.Expect(m.unprobed).To(BeNumerically("<", 5*time.Second), "load balancers give a node up after some 10 seconds")
}
