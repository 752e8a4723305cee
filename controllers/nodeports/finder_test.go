package nodeports

import (
	"context"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr/funcr"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

const namespace = "proxy"

// startAPIServer runs an API server whose range of node ports is as given, with an empty namespace.
func startAPIServer(t *testing.T, ports string) (*rest.Config, client.WithWatch) {
	t.Helper()
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		t.Fatal("KUBEBUILDER_ASSETS is not set: export KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)")
	}
	g := NewWithT(t)
	env := &envtest.Environment{ControlPlaneStopTimeout: time.Minute}
	env.ControlPlane.GetAPIServer().Configure().Set("service-node-port-range", ports)
	config, err := env.Start()
	g.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() { g.Expect(env.Stop()).To(Succeed()) })
	c, err := client.NewWithWatch(config, client.Options{Scheme: scheme.Scheme})
	g.Expect(err).NotTo(HaveOccurred())
	g.Expect(c.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}})).To(Succeed())
	return config, c
}

// finding is a Finder at work.
type finding struct {
	wanted  atomic.Bool
	changed chan struct{}
	mu      sync.Mutex
	found   []allocator.PortRange
	lines   []string
}

func (f *finding) ranges() []allocator.PortRange {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.found
}

func (f *finding) logged() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.lines
}

func (f *finding) finder(writes client.Client, live client.Reader) *Finder {
	return &Finder{
		Client: writes, Live: live, Namespace: namespace, Wanted: f.wanted.Load, Changed: f.changed,
		Address: func() (netip.Addr, bool) { return netip.Addr{}, false },
		Found: func(r allocator.PortRange) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.found = append(f.found, r)
		},
		Log: funcr.New(func(_, args string) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.lines = append(f.lines, args)
		}, funcr.Options{}),
	}
}

func nothingLeft(g Gomega, c client.Client) {
	var services corev1.ServiceList
	g.Expect(c.List(context.Background(), &services, client.InNamespace(namespace))).To(Succeed())
	g.Expect(services.Items).To(BeEmpty())
	var addresses networkingv1.IPAddressList
	g.Expect(c.List(context.Background(), &addresses)).To(Succeed())
	for _, a := range addresses.Items {
		g.Expect(a.Spec.ParentRef.Namespace).NotTo(Equal(namespace), a.Name)
	}
}

func TestFindsARangeWithoutLeavingAnything(t *testing.T) {
	g := NewWithT(t)
	config, c := startAPIServer(t, "31000-31999")
	f := &finding{changed: make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	counting := &atomic.Int32{}
	counted := interceptor.NewClient(c, interceptor.Funcs{Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
		counting.Add(1)
		return c.Create(ctx, o, opts...)
	}})
	go func() { done <- f.finder(counted, c).Start(ctx) }()
	f.changed <- struct{}{} // twice, because the first may be read before the Finder looked whether anybody wants to know
	f.changed <- struct{}{}
	g.Expect(counting.Load()).To(BeZero(), "nobody wants to know")

	f.wanted.Store(true)
	f.changed <- struct{}{}
	g.Eventually(f.ranges).Should(Equal([]allocator.PortRange{{First: 31000, Last: 31999}}))
	nothingLeft(g, c)
	for range 3 { // known: asked again only after a while
		f.changed <- struct{}{}
	}
	cancel()
	g.Eventually(done).Should(Receive(BeNil()))
	g.Expect(counting.Load()).To(Equal(int32(1)))
	g.Expect(f.logged()).To(BeEmpty())

	t.Run("with an address that nobody else is given", func(t *testing.T) {
		g := NewWithT(t)
		var asked string
		spy := interceptor.NewClient(c, interceptor.Funcs{Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			asked = o.(*corev1.Service).Spec.ClusterIP
			return c.Create(ctx, o, opts...)
		}})
		finder := (&finding{}).finder(spy, c)
		finder.Address = func() (netip.Addr, bool) { return netip.MustParseAddr("10.0.0.77"), true }
		g.Expect(finder.find(t.Context())).To(Equal(allocator.PortRange{First: 31000, Last: 31999}))
		g.Expect(asked).To(Equal("10.0.0.77"))
		nothingLeft(g, c)
	})

	t.Run("and goes on without the right to create Services, or the namespace", func(t *testing.T) {
		g := NewWithT(t)
		nobody := rest.CopyConfig(config)
		nobody.Impersonate = rest.ImpersonationConfig{UserName: "nobody"}
		restricted, err := client.New(nobody, client.Options{Scheme: scheme.Scheme})
		g.Expect(err).NotTo(HaveOccurred())
		f := &finding{}
		finder := f.finder(restricted, c)
		g.Expect(finder.look(t.Context())).To(Equal(again))
		g.Expect(finder.look(t.Context())).To(Equal(again))
		g.Expect(f.ranges()).To(BeEmpty())
		g.Expect(f.logged()).To(ConsistOf(And(ContainSubstring("nobody"), ContainSubstring("cannot create resource"))), "once")

		finder = f.finder(c, c)
		finder.Namespace = "absent"
		g.Expect(finder.look(t.Context())).To(Equal(again))
		g.Expect(f.ranges()).To(BeEmpty())
		g.Expect(f.logged()).To(HaveLen(2))
		g.Expect(f.logged()[1]).To(ContainSubstring(`namespaces \"absent\" not found`))
	})
}

// An API server that has the probe's port in its range takes the probe: it is removed, and another port tells.
func TestFindsARangeThatHasTheProbesPort(t *testing.T) {
	g := NewWithT(t)
	_, c := startAPIServer(t, "1-2000")
	f := &finding{}
	g.Expect(f.finder(c, c).look(t.Context())).To(Equal(again))
	g.Expect(f.ranges()).To(Equal([]allocator.PortRange{{First: 1, Last: 2000}}))
	nothingLeft(g, c)

	// A crash leaves the probe. Another process finds the port in use, and removes the probe once it is old enough to be nobody's.
	crashed := interceptor.NewClient(c, interceptor.Funcs{Delete: func(context.Context, client.WithWatch, client.Object, ...client.DeleteOption) error {
		return context.Canceled
	}})
	g.Expect((&finding{}).finder(crashed, c).look(t.Context())).To(Equal(retry))
	other := &finding{}
	g.Expect(other.finder(c, c).look(t.Context())).To(Equal(again))
	g.Expect(other.ranges()).To(Equal([]allocator.PortRange{{First: 1, Last: 2000}}))
	var probes corev1.ServiceList
	g.Expect(c.List(t.Context(), &probes, client.InNamespace(namespace))).To(Succeed())
	g.Expect(probes.Items).To(HaveLen(1), "a young one may be another replica's")
	g.Expect(c.Create(t.Context(), &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "anybody"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 1}}}})).To(Succeed())
	old := interceptor.NewClient(c, interceptor.Funcs{List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
		err := c.List(ctx, list, opts...)
		for i := range list.(*corev1.ServiceList).Items {
			list.(*corev1.ServiceList).Items[i].CreationTimestamp = metav1.NewTime(time.Now().Add(-2 * abandoned))
		}
		return err
	}})
	g.Expect(other.finder(c, old).look(t.Context())).To(Equal(again))
	g.Expect(c.List(t.Context(), &probes, client.InNamespace(namespace), client.MatchingLabels{v1alpha1.LabelManagedBy: v1alpha1.ManagedBy})).To(Succeed())
	g.Expect(probes.Items).To(BeEmpty())
	g.Expect(c.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "anybody"}, &corev1.Service{})).To(Succeed(), "what is not ours stays")
}
