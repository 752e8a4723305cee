package programmed_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/gomega"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/programmed"
)

// apiServer is the one API server of this package's tests; they run one after the other and leave it empty.
var apiServer = &struct {
	once       sync.Once
	env        *envtest.Environment
	config     *rest.Config
	kubeconfig string
	err        error
}{}

func TestMain(m *testing.M) {
	ctrl.SetLogger(logr.Discard())
	code := m.Run()
	if apiServer.env != nil {
		if err := apiServer.env.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, "stop the API server:", err)
			code = 1
		}
		os.Remove(apiServer.kubeconfig)
	}
	os.Exit(code)
}

func scheme() *runtime.Scheme {
	s := runtime.NewScheme()
	utilruntime.Must(clientgoscheme.AddToScheme(s))
	utilruntime.Must(v1alpha1.AddToScheme(s))
	return s
}

// cluster is an API server, agents that a test plays, and this package's controllers.
type cluster struct {
	t *testing.T
	*GomegaWithT
	client.Client
	ctx  context.Context
	stop func()
}

// newCluster returns an empty cluster whose controllers run, and clears it at the end of the test.
func newCluster(t *testing.T) *cluster {
	t.Helper()
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		t.Fatal("KUBEBUILDER_ASSETS is not set: export KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)")
	}
	apiServer.once.Do(func() {
		apiServer.env = &envtest.Environment{
			CRDDirectoryPaths:     []string{filepath.Join("..", "..", "config", "crd", "bases")},
			ErrorIfCRDPathMissing: true,
		}
		if apiServer.config, apiServer.err = apiServer.env.Start(); apiServer.err != nil {
			return
		}
		apiServer.config.QPS = -1
		var f *os.File
		if f, apiServer.err = os.CreateTemp("", "kubeconfig-"); apiServer.err == nil {
			apiServer.kubeconfig = f.Name()
			_, apiServer.err = f.Write(apiServer.env.KubeConfig)
			f.Close()
		}
	})
	if apiServer.err != nil {
		t.Fatal("start the API server: ", apiServer.err)
	}
	c := &cluster{t: t, GomegaWithT: NewWithT(t), ctx: t.Context()}
	c.SetDefaultEventuallyTimeout(30 * time.Second)
	c.SetDefaultEventuallyPollingInterval(20 * time.Millisecond)
	var err error
	c.Client, err = client.New(apiServer.config, client.Options{Scheme: scheme()})
	c.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(c.clear)
	c.start()
	return c
}

// start starts the controllers; stop ends them.
func (c *cluster) start() *prometheus.Registry {
	c.t.Helper()
	mgr, err := ctrl.NewManager(apiServer.config, ctrl.Options{
		Scheme:     scheme(),
		Metrics:    metricsserver.Options{BindAddress: "0"},
		Controller: config.Controller{SkipNameValidation: ptr.To(true)}, // each start has the same names
	})
	c.Expect(err).NotTo(HaveOccurred())
	registry := prometheus.NewRegistry()
	c.Expect(programmed.SetupWithManager(mgr, programmed.Options{Registerer: registry})).To(Succeed())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- mgr.Start(ctx) }()
	c.stop = sync.OnceFunc(func() {
		cancel()
		c.Expect(<-done).To(Succeed())
	})
	return registry
}

func (c *cluster) clear() {
	c.stop()
	c.ctx = context.Background() // the test's own has ended
	for _, o := range []client.Object{&v1alpha1.ServiceAssignment{}, &discoveryv1.EndpointSlice{}} {
		c.Expect(c.DeleteAllOf(c.ctx, o, client.InNamespace("default"))).To(Succeed())
	}
	for _, o := range []client.Object{&corev1.Node{}, &v1alpha1.NodeProxyState{}, &v1alpha1.ServiceProxyPolicy{}} {
		c.Expect(c.DeleteAllOf(c.ctx, o)).To(Succeed())
	}
}

// addNode creates a Node that is Ready, and waits for its NodeProxyState.
func (c *cluster) addNode(name string, labels map[string]string) {
	c.t.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
	c.Expect(c.Create(c.ctx, n)).To(Succeed())
	c.setReady(name, true)
	c.Eventually(func() error { return c.Get(c.ctx, client.ObjectKey{Name: name}, &v1alpha1.NodeProxyState{}) }).Should(Succeed())
}

func (c *cluster) setReady(name string, ready bool) {
	c.t.Helper()
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	n := &corev1.Node{}
	c.Expect(c.Get(c.ctx, client.ObjectKey{Name: name}, n)).To(Succeed())
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}}
	c.Expect(c.Status().Update(c.ctx, n)).To(Succeed())
}

// marks are the newest revisions that an agent would see now.
func (c *cluster) marks() (m v1alpha1.NodeProxyStateStatus) {
	c.t.Helper()
	var assignments v1alpha1.ServiceAssignmentList
	c.Expect(c.List(c.ctx, &assignments)).To(Succeed())
	var slices discoveryv1.EndpointSliceList
	c.Expect(c.List(c.ctx, &slices)).To(Succeed())
	return v1alpha1.NodeProxyStateStatus{
		AssignmentRevision: assignments.ResourceVersion, EndpointSliceRevision: slices.ResourceVersion, AgentVersion: "test",
	}
}

// report plays the agents of nodes: their kernel holds everything that there is now.
func (c *cluster) report(nodes ...string) {
	c.t.Helper()
	now := c.marks()
	for _, n := range nodes {
		c.reportStatus(n, now)
	}
}

func (c *cluster) reportStatus(node string, status v1alpha1.NodeProxyStateStatus) {
	c.t.Helper()
	s := &v1alpha1.NodeProxyState{ObjectMeta: metav1.ObjectMeta{Name: node}}
	c.Expect(c.Get(c.ctx, client.ObjectKeyFromObject(s), s)).To(Succeed())
	before := s.DeepCopy()
	s.Status = status
	c.Expect(c.Status().Patch(c.ctx, s, client.MergeFrom(before))).To(Succeed())
}

// serve sets the EndpointSlice of a Service to these ready addresses.
func (c *cluster) serve(service string, addresses ...string) {
	c.t.Helper()
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: service + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: ptr.To(""), Port: ptr.To[int32](8080), Protocol: ptr.To(corev1.ProtocolTCP)}},
		Endpoints:   []discoveryv1.Endpoint{},
	}
	for _, a := range addresses {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}, Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(true)}})
	}
	err := c.Create(c.ctx, s.DeepCopy())
	if apierrors.IsAlreadyExists(err) {
		err = c.Update(c.ctx, s)
	}
	c.Expect(err).NotTo(HaveOccurred())
}

// assign creates the assignment of a Service.
func (c *cluster) assign(name string, change ...func(*v1alpha1.ServiceAssignmentSpec)) {
	c.t.Helper()
	a := &v1alpha1.ServiceAssignment{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: v1alpha1.ServiceAssignmentSpec{
			PolicyName: "tenant", ServiceUID: "uid", ProxyMode: v1alpha1.ProxyModeNFTables, Scheduler: v1alpha1.SchedulerRandom,
			Ports: []v1alpha1.AssignmentPort{{Protocol: corev1.ProtocolTCP, Port: 80}},
		},
	}
	for _, f := range change {
		f(&a.Spec)
	}
	c.Expect(c.Create(c.ctx, a)).To(Succeed())
}

// reassign makes another generation of an assignment.
func (c *cluster) reassign(name string) {
	c.t.Helper()
	a := c.assignment(name)
	a.Spec.SessionAffinitySeconds++
	c.Expect(c.Update(c.ctx, a)).To(Succeed())
}

func (c *cluster) assignment(name string) *v1alpha1.ServiceAssignment {
	c.t.Helper()
	a := &v1alpha1.ServiceAssignment{}
	c.Expect(c.Get(c.ctx, client.ObjectKey{Namespace: "default", Name: name}, a)).To(Succeed())
	return a
}

// story is "STATUS REASON PROGRAMMED/DESIRED" of the present generation; "outdated" before there is any.
func (c *cluster) story(name string) func() string {
	return func() string {
		a := c.assignment(name)
		p := meta.FindStatusCondition(a.Status.Conditions, v1alpha1.AssignmentProgrammed)
		if p == nil || p.ObservedGeneration < a.Generation || a.Status.ObservedGeneration < a.Generation {
			return "outdated"
		}
		return fmt.Sprintf("%s %s %d/%d", p.Status, p.Reason, a.Status.Nodes.Programmed, a.Status.Nodes.Desired)
	}
}

func (c *cluster) message(name string) string {
	return strings.TrimSpace(meta.FindStatusCondition(c.assignment(name).Status.Conditions, v1alpha1.AssignmentProgrammed).Message)
}

// caughtUp returns when the controllers have dealt with all that happened before: another assignment that waits for the same
// events has got its status.
func (c *cluster) caughtUp(nodes ...string) {
	c.t.Helper()
	c.serve("canary", "10.244.0.99")
	c.assign("canary")
	c.report(nodes...)
	c.Eventually(c.story("canary")).Should(HavePrefix("True"))
	c.Expect(c.Delete(c.ctx, c.assignment("canary"))).To(Succeed())
}
