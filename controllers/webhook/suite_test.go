package webhook

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
	webhookadmission "sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/admission"
	"github.com/serviceproxy/serviceproxy-operator/test/kubeapi"
)

var (
	ctx        = context.Background()
	restConfig *rest.Config
	k8s        client.Client
	scheme     = runtime.NewScheme()
	crds       = []string{filepath.Join("..", "..", "config", "crd", "bases")}
)

func TestWebhook(t *testing.T) {
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		t.Fatal("KUBEBUILDER_ASSETS is not set: export KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)")
	}
	RegisterFailHandler(Fail)
	RunSpecs(t, "controllers/webhook")
}

// One API server serves the whole suite, with the parts of kube-controller-manager that delete what is in a namespace and what lost its owner.
var _ = BeforeSuite(func() {
	ctrl.SetLogger(GinkgoLogr)
	Expect(clientgoscheme.AddToScheme(scheme)).To(Succeed())
	Expect(v1alpha1.AddToScheme(scheme)).To(Succeed())
	env := &envtest.Environment{CRDDirectoryPaths: crds, ErrorIfCRDPathMissing: true, ControlPlaneStopTimeout: time.Minute}
	var err error
	restConfig, err = env.Start()
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(env.Stop)
	restConfig.QPS = -1
	k8s, err = client.New(restConfig, client.Options{Scheme: scheme})
	Expect(err).NotTo(HaveOccurred())

	stop, err := kubeapi.StartControllers(env, "namespace-controller", "garbage-collector-controller")
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(stop)
	SetDefaultEventuallyTimeout(20 * time.Second)
	SetDefaultEventuallyPollingInterval(20 * time.Millisecond)
	SetDefaultConsistentlyDuration(500 * time.Millisecond)
})

// call is a request that reached the webhook.
type call struct {
	name      string // namespace/name
	operation string
	dryRun    bool
}

// stub is a webhook that lets everything pass.
type stub struct {
	mu    sync.Mutex
	calls []call
}

func (s *stub) Handle(_ context.Context, r webhookadmission.Request) webhookadmission.Response {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, call{r.Namespace + "/" + r.Name, string(r.Operation), r.DryRun != nil && *r.DryRun})
	return webhookadmission.Allowed("")
}

// take returns the calls since it was asked last.
func (s *stub) take() []call {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.calls
	s.calls = nil
	return out
}

// operator is a namespace in which replicas of the operator run, and the address that API servers reach them at.
type operator struct {
	namespace, address string
	stub               *stub
}

var operators = 0

func newOperator() *operator {
	GinkgoHelper()
	operators++
	o := &operator{namespace: fmt.Sprintf("operator-%d", operators), address: freeAddress(), stub: &stub{}}
	makeNamespace(o.namespace, nil)
	DeferCleanup(func() {
		Expect(k8s.DeleteAllOf(ctx, &v1alpha1.ServiceProxyPolicy{})).To(Succeed())
		Expect(client.IgnoreNotFound(k8s.Delete(ctx, &admissionregistrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: ConfigurationName}}))).To(Succeed())
	})
	return o
}

// freeAddress is one that nobody listens at.
func freeAddress() string {
	GinkgoHelper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	Expect(err).NotTo(HaveOccurred())
	defer l.Close()
	return l.Addr().String()
}

// start runs a replica at the operator's address until the spec ends or stop is called.
func (o *operator) start() (*Certificate, func()) {
	GinkgoHelper()
	return o.startAt(restConfig, o.address, true)
}

func (o *operator) startAt(config *rest.Config, address string, serve bool) (*Certificate, func()) {
	GinkgoHelper()
	certificate := &Certificate{}
	mgr := o.newManager(config, address, certificate)
	mgr.GetWebhookServer().Register(admission.Path, &webhook.Admission{Handler: o.stub})
	options := Options{Namespace: o.namespace, URL: "https://" + o.address, Certificate: certificate, Grace: 2 * time.Second}
	if !serve {
		options.Certificate = nil
	}
	Expect(SetupWithManager(mgr, options)).To(Succeed())
	return certificate, run(mgr)
}

func (o *operator) newManager(c *rest.Config, address string, certificate *Certificate) ctrl.Manager {
	GinkgoHelper()
	at, err := net.ResolveTCPAddr("tcp", address)
	Expect(err).NotTo(HaveOccurred())
	mgr, err := ctrl.NewManager(rest.CopyConfig(c), ctrl.Options{
		Scheme: scheme, Metrics: metricsserver.Options{BindAddress: "0"}, Cache: cache.Options{ByObject: Cache(o.namespace)},
		WebhookServer:           webhook.NewServer(webhook.Options{Host: at.IP.String(), Port: at.Port, TLSOpts: []func(*tls.Config){certificate.Configure}}),
		Controller:              config.Controller{SkipNameValidation: new(true)}, // several in one process
		GracefulShutdownTimeout: new(5 * time.Second),
	})
	Expect(err).NotTo(HaveOccurred())
	return mgr
}

func run(mgr ctrl.Manager) (stop func()) {
	runCtx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- mgr.Start(runCtx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		Eventually(done).Should(Receive(BeNil()))
	})
	DeferCleanup(stop)
	return stop
}

func makeNamespace(name string, labels map[string]string) {
	GinkgoHelper()
	Expect(k8s.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}})).To(Succeed())
}

// tenant makes a namespace with the label tenant=NAME.
func tenant(name string) string {
	GinkgoHelper()
	name = fmt.Sprintf("%s-%d", name, operators)
	makeNamespace(name, map[string]string{"tenant": name})
	return name
}

// makePolicy makes one for a tenant's namespace.
func makePolicy(name, tenant string, enforcement v1alpha1.Enforcement) *v1alpha1.ServiceProxyPolicy {
	GinkgoHelper()
	p := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}}
	p.Spec.NamespaceSelector.MatchLabels = map[string]string{"tenant": tenant}
	p.Spec.Enforcement = enforcement
	Expect(k8s.Create(ctx, p)).To(Succeed())
	return p
}

func newService(namespace, name string, changes ...func(*corev1.Service)) *corev1.Service {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 80}}}}
	for _, change := range changes {
		change(svc)
	}
	return svc
}

// configuration reads it, nil if there is none.
func configuration() *admissionregistrationv1.MutatingWebhookConfiguration {
	GinkgoHelper()
	var c admissionregistrationv1.MutatingWebhookConfiguration
	err := k8s.Get(ctx, client.ObjectKey{Name: ConfigurationName}, &c)
	if apierrors.IsNotFound(err) {
		return nil
	}
	Expect(err).NotTo(HaveOccurred())
	return &c
}

// entryNames are those of the configuration, with their failure policies.
func entryNames() string {
	GinkgoHelper()
	c := configuration()
	if c == nil {
		return "none"
	}
	var out []string
	for _, w := range c.Webhooks {
		out = append(out, w.Name+" "+string(*w.FailurePolicy))
	}
	return strings.Join(out, ", ")
}

// enforced waits until the API server asks for the namespace's Services: until then it has not read the configuration.
func (o *operator) enforced(namespace string) {
	GinkgoHelper()
	Eventually(func(g Gomega) {
		o.stub.take()
		g.Expect(k8s.Create(ctx, newService(namespace, "probe"), client.DryRunAll)).To(Succeed())
		g.Expect(o.stub.take()).NotTo(BeEmpty())
	}).Should(Succeed())
}
