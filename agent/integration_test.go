package agent_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr/testr"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/serviceproxy/serviceproxy-operator/agent"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/nftables"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// startAPIServer gives the configuration of a real API server that knows our types.
func startAPIServer(t *testing.T) *rest.Config {
	t.Helper()
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		t.Fatal("KUBEBUILDER_ASSETS is not set: export KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)")
	}
	env := &envtest.Environment{CRDDirectoryPaths: []string{filepath.Join("..", "config", "crd", "bases")}, ErrorIfCRDPathMissing: true}
	config, err := env.Start()
	if err != nil {
		t.Fatalf("start an API server: %v", err)
	}
	t.Cleanup(func() {
		if err := env.Stop(); err != nil {
			t.Errorf("stop the API server: %v", err)
		}
	})
	return config
}

// line is the network between the agent and the API server: it can be cut.
type line struct {
	address, to string

	mu    sync.Mutex
	ln    net.Listener
	conns map[net.Conn]struct{}
}

func newLine(t *testing.T, to string) *line {
	l := &line{address: "127.0.0.1:0", to: to, conns: map[net.Conn]struct{}{}}
	l.mend(t)
	t.Cleanup(l.cut)
	return l
}

func (l *line) mend(t *testing.T) {
	t.Helper()
	ln, err := net.Listen("tcp", l.address)
	if err != nil {
		t.Fatal(err)
	}
	l.mu.Lock()
	l.ln, l.address = ln, ln.Addr().String()
	l.mu.Unlock()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go l.carry(c)
		}
	}()
}

func (l *line) carry(c net.Conn) {
	s, err := net.Dial("tcp", l.to)
	if err != nil {
		c.Close()
		return
	}
	l.mu.Lock()
	l.conns[c], l.conns[s] = struct{}{}, struct{}{}
	l.mu.Unlock()
	go func() {
		io.Copy(s, c)
		s.Close()
	}()
	io.Copy(c, s)
	c.Close()
}

func (l *line) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ln.Close()
	for c := range l.conns {
		c.Close()
	}
	clear(l.conns)
}

// inside makes a table of backends work in a network namespace.
func inside(ns *netns.NS, table []agent.Mode) []agent.Mode {
	out := make([]agent.Mode, len(table))
	for i, m := range table {
		out[i] = agent.Mode{
			Name:    m.Name,
			Probe:   func(ctx context.Context) error { return ns.Do(func() error { return m.Probe(ctx) }) },
			Cleanup: func(ctx context.Context) error { return ns.Do(func() error { return m.Cleanup(ctx) }) },
			Anchor: &agent.Anchor{
				Release: func(ctx context.Context) (gone bool, err error) {
					err = ns.Do(func() (err error) { gone, err = m.Anchor.Release(ctx); return err })
					return gone, err
				},
				Remove: func(ctx context.Context) error { return ns.Do(func() error { return m.Anchor.Remove(ctx) }) },
			},
			New: func() (b backend.Backend, err error) {
				err = ns.Do(func() (err error) {
					b, err = m.New()
					return err
				})
				return b, err
			},
		}
	}
	return out
}

// kernelLacks says how the kernel of a namespace differs from these services: each "ADDRESS ENDPOINT...", port 80 to 8080.
func kernelLacks(t *testing.T, ns *netns.NS, services ...string) []backend.Drift {
	t.Helper()
	want := forwarding.State{}.On(forwarding.Ground{Pods: settings.Pods})
	for _, line := range services {
		words := strings.Fields(line)
		var target forwarding.Target
		for _, w := range words[2:] {
			target.Endpoints = append(target.Endpoints, forwarding.Endpoint{AddrPort: netip.AddrPortFrom(netip.MustParseAddr(w), 8080)})
		}
		want = want.With(&forwarding.Service{
			Key:        forwarding.ServiceKey{Namespace: "shop", Name: words[0], Port: 80, Protocol: forwarding.TCP},
			ServiceIPs: []netip.Addr{netip.MustParseAddr(words[1])}, Internal: target,
		})
	}
	var b *nftables.Backend
	if err := ns.Do(func() (err error) {
		b, err = nftables.New()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	drifts, err := b.Verify(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	return drifts
}

var settings = agent.Settings{Pods: forwarding.PodTraffic{Sources: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}}}

// world is what the test plays besides the agent: the control plane and the controller.
type world struct {
	*WithT
	t *testing.T
	client.Client
}

func newWorld(t *testing.T, config *rest.Config) *world {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	c, err := client.New(config, client.Options{Scheme: scheme})
	if err != nil {
		t.Fatal(err)
	}
	return &world{WithT: NewWithT(t), t: t, Client: c}
}

func (w *world) make(o client.Object) {
	w.t.Helper()
	w.Expect(w.Create(w.t.Context(), o)).To(Succeed())
}

func (w *world) addNode() {
	w.t.Helper()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node1"}}
	w.make(node)
	node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.168.0.1"}}
	w.Expect(w.Status().Update(w.t.Context(), node)).To(Succeed())
}

func (w *world) addState() {
	w.t.Helper()
	state := &v1alpha1.NodeProxyState{ObjectMeta: metav1.ObjectMeta{Name: "node1"}}
	state.Spec.ReportInterval = &metav1.Duration{Duration: 200 * time.Millisecond}
	w.make(state)
}

func (w *world) addService(name, ip string, endpoints ...string) (*v1alpha1.ServiceAssignment, *discoveryv1.EndpointSlice) {
	w.t.Helper()
	port, portName, tcp := int32(8080), "http", corev1.ProtocolTCP
	a := &v1alpha1.ServiceAssignment{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name},
		Spec: v1alpha1.ServiceAssignmentSpec{
			PolicyName: "orange", ServiceUID: "1", ProxyMode: v1alpha1.ProxyModeNFTables, Scheduler: v1alpha1.SchedulerRandom,
			ServiceIPs: []v1alpha1.ServiceIP{{IP: ip, Source: v1alpha1.ServiceIPSourceClusterIP}},
			Ports:      []v1alpha1.AssignmentPort{{Name: portName, Protocol: tcp, Port: 80}},
		},
	}
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "shop", Name: name + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &portName, Port: &port, Protocol: &tcp}},
		Endpoints:   endpointsAt(endpoints...),
	}
	w.make(a)
	w.make(s)
	return a, s
}

func endpointsAt(ips ...string) []discoveryv1.Endpoint {
	out := []discoveryv1.Endpoint{}
	for _, ip := range ips {
		out = append(out, discoveryv1.Endpoint{Addresses: []string{ip}})
	}
	return out
}

// heldBy says whether the node's marks cover both resourceVersions.
func (w *world) heldBy(assignment, slice string) func(Gomega) {
	return func(g Gomega) {
		var state v1alpha1.NodeProxyState
		g.Expect(w.Get(w.t.Context(), client.ObjectKey{Name: "node1"}, &state)).To(Succeed())
		for mark, target := range map[string]string{state.Status.AssignmentRevision: assignment, state.Status.EndpointSliceRevision: slice} {
			order, err := resourceversion.CompareResourceVersion(mark, target)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(order).To(BeNumerically(">=", 0), "mark %s, target %s", mark, target)
		}
	}
}

// TestAgainstAPIServerAndKernel runs an agent between a real API server and a real kernel, through an outage, a flush and a stop.
func TestAgainstAPIServerAndKernel(t *testing.T) {
	ns := netns.NewT(t)
	config := startAPIServer(t)
	w := newWorld(t, config)
	w.SetDefaultEventuallyTimeout(30 * time.Second)
	wire := newLine(t, strings.Trim(strings.TrimPrefix(config.Host, "https:"), "/"))
	config = rest.CopyConfig(config)
	config.Host = "https://" + wire.address
	health, err := net.Listen("tcp", "127.0.0.1:0")
	w.Expect(err).NotTo(HaveOccurred())

	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- agent.Run(ctx, agent.Config{NodeName: "node1", Version: "test", API: config, Health: health, Log: testr.New(t),
			Modes: inside(ns, agent.Modes()), Settings: settings})
	}()
	stopAgent := sync.OnceFunc(func() {
		stop()
		w.Expect(<-ended).To(Succeed())
	})
	defer stopAgent()

	// The agent is there before everything else.
	w.make(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}})
	w.addState()
	web, webSlice := w.addService("web", "10.99.0.1", "10.1.0.1", "10.1.0.2")
	_, goneSlice := w.addService("gone", "10.99.0.2", "10.1.0.3")
	w.addNode()
	w.Eventually(w.heldBy(web.ResourceVersion, goneSlice.ResourceVersion)).Should(Succeed())
	w.Expect(kernelLacks(t, ns, "web 10.99.0.1 10.1.0.1 10.1.0.2", "gone 10.99.0.2 10.1.0.3")).To(BeEmpty())
	w.Expect(statusOf("http://" + health.Addr().String() + "/healthz")).To(Equal(http.StatusOK))

	// A change: once the marks cover it, the kernel holds it.
	webSlice.Endpoints = endpointsAt("10.1.0.2", "10.1.0.4")
	w.Expect(w.Update(ctx, webSlice)).To(Succeed())
	w.Eventually(w.heldBy(web.ResourceVersion, webSlice.ResourceVersion)).Should(Succeed())
	w.Expect(kernelLacks(t, ns, "web 10.99.0.1 10.1.0.2 10.1.0.4", "gone 10.99.0.2 10.1.0.3")).To(BeEmpty())

	// The API server is gone; the cluster changes; the kernel stays as it is until the API server is back.
	wire.cut()
	w.Expect(w.Delete(ctx, goneSlice)).To(Succeed())
	w.Expect(w.Delete(ctx, &v1alpha1.ServiceAssignment{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "gone"}})).To(Succeed())
	newest, newestSlice := w.addService("new", "10.99.0.3", "10.1.0.5")
	w.Consistently(func() []backend.Drift {
		return kernelLacks(t, ns, "web 10.99.0.1 10.1.0.2 10.1.0.4", "gone 10.99.0.2 10.1.0.3")
	}, 3*time.Second, 500*time.Millisecond).Should(BeEmpty())
	wire.mend(t)
	w.Eventually(w.heldBy(newest.ResourceVersion, newestSlice.ResourceVersion)).Should(Succeed())
	now := []string{"web 10.99.0.1 10.1.0.2 10.1.0.4", "new 10.99.0.3 10.1.0.5"}
	w.Expect(kernelLacks(t, ns, now...)).To(BeEmpty())

	// Somebody deletes our table.
	w.Expect(ns.Do(func() error { return nftables.Cleanup(ctx) })).To(Succeed())
	w.Eventually(func() []backend.Drift { return kernelLacks(t, ns, now...) }, time.Second, 10*time.Millisecond).Should(BeEmpty())
	w.Eventually(func(g Gomega) {
		var state v1alpha1.NodeProxyState
		g.Expect(w.Get(ctx, client.ObjectKey{Name: "node1"}, &state)).To(Succeed())
		g.Expect(state.Status.DriftRepairs).To(BeNumerically(">=", 1)) // the table of each family goes in a transaction of its own
		g.Expect(state.Status.Services).To(BeEquivalentTo(2))
		g.Expect(state.Status.Endpoints).To(BeEquivalentTo(3))
		g.Expect(state.Status.AgentVersion).To(Equal("test"))
	}).Should(Succeed())

	// The object is made anew, as when its Node was: the agent tells it all again.
	w.Expect(w.Delete(ctx, &v1alpha1.NodeProxyState{ObjectMeta: metav1.ObjectMeta{Name: "node1"}})).To(Succeed())
	w.addState()
	w.Eventually(w.heldBy(newest.ResourceVersion, newestSlice.ResourceVersion)).Should(Succeed())

	stopAgent()
	w.Expect(kernelLacks(t, ns, now...)).To(BeEmpty(), "stopping the agent changed the kernel")
	w.Expect(agent.Cleanup(context.Background(), testr.New(t), inside(ns, agent.Modes()))).To(Succeed())
	out, err := ns.Run("nft", "list", "ruleset")
	w.Expect(err).NotTo(HaveOccurred())
	w.Expect(strings.TrimSpace(out)).To(BeEmpty(), "clean-up left something")
}

func statusOf(url string) int {
	resp, err := http.Get(url)
	if err != nil {
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}
