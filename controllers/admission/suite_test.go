package admission_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/format"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/webhook"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers"
	"github.com/serviceproxy/serviceproxy-operator/controllers/admission"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
	"github.com/serviceproxy/serviceproxy-operator/test/kubeapi"
)

var (
	ctx    = context.Background()
	k8s    client.Client
	heard  = &warnings{}
	scheme = runtime.NewScheme()
)

// operatorNamespace is excluded from the webhook, as a real one is.
const operatorNamespace = "operator"

func TestAdmission(t *testing.T) {
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		t.Fatal("KUBEBUILDER_ASSETS is not set: export KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)")
	}
	format.MaxLength = 3000
	RegisterFailHandler(Fail)
	RunSpecs(t, "admission")
}

// One API server and one manager with all reconcilers serve the suite. The webhook is registered twice, as it is for the namespaces of Strict policies, so every request
// comes by twice. The API server's own range holds some of the policies' ranges, as kubeadm's default does.
var _ = BeforeSuite(func() {
	ctrl.SetLogger(GinkgoLogr)
	Expect(clientgoscheme.AddToScheme(scheme)).To(Succeed())
	Expect(v1alpha1.AddToScheme(scheme)).To(Succeed())
	env := &envtest.Environment{CRDDirectoryPaths: []string{filepath.Join("..", "..", "config", "crd", "bases")}, ErrorIfCRDPathMissing: true,
		ControlPlaneStopTimeout: time.Minute,
		WebhookInstallOptions:   envtest.WebhookInstallOptions{MutatingWebhooks: []*admissionv1.MutatingWebhookConfiguration{configuration()}}}
	env.ControlPlane.GetAPIServer().Configure().Set("service-cluster-ip-range", "10.96.0.0/12,fd00:96::/108")
	config, err := env.Start()
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(env.Stop)
	config.QPS = -1
	stop, err := kubeapi.StartControllers(env, "service-cidr-controller", "garbage-collector-controller", "resourcequota-controller")
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(stop)
	startOperator(config, env.WebhookInstallOptions)

	users := rest.CopyConfig(config)
	users.WarningHandlerWithContext = heard
	k8s, err = client.New(users, client.Options{Scheme: scheme})
	Expect(err).NotTo(HaveOccurred())
	SetDefaultEventuallyTimeout(20 * time.Second)
	SetDefaultEventuallyPollingInterval(20 * time.Millisecond)
	Eventually(func(g Gomega) {
		var def networkingv1.ServiceCIDR
		g.Expect(k8s.Get(ctx, client.ObjectKey{Name: "kubernetes"}, &def)).To(Succeed())
		g.Expect(apimeta.IsStatusConditionTrue(def.Status.Conditions, "Ready")).To(BeTrue())
	}).WithTimeout(30 * time.Second).Should(Succeed())
})

func configuration() *admissionv1.MutatingWebhookConfiguration {
	c := &admissionv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "serviceproxy-webhook"}}
	for _, name := range []string{"services.networking.serviceproxy.io", "strict.networking.serviceproxy.io"} {
		c.Webhooks = append(c.Webhooks, admissionv1.MutatingWebhook{
			Name: name, FailurePolicy: new(admissionv1.Fail), SideEffects: new(admissionv1.SideEffectClassNoneOnDryRun), TimeoutSeconds: new(int32(3)),
			ReinvocationPolicy: new(admissionv1.IfNeededReinvocationPolicy), AdmissionReviewVersions: []string{"v1"},
			ClientConfig: admissionv1.WebhookClientConfig{Service: &admissionv1.ServiceReference{Name: "x", Namespace: "x", Path: new(strings.TrimPrefix(admission.Path, "/"))}},
			NamespaceSelector: &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{
				{Key: corev1.LabelMetadataName, Operator: metav1.LabelSelectorOpNotIn, Values: []string{operatorNamespace, "default"}}}},
			Rules: []admissionv1.RuleWithOperations{{Operations: []admissionv1.OperationType{admissionv1.Create, admissionv1.Update},
				Rule: admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"services"}}}},
		})
	}
	return c
}

func startOperator(config *rest.Config, installed envtest.WebhookInstallOptions) {
	GinkgoHelper()
	mgr, err := ctrl.NewManager(config, ctrl.Options{Scheme: scheme, Metrics: metricsserver.Options{BindAddress: "0"}, GracefulShutdownTimeout: new(5 * time.Second),
		WebhookServer: webhook.NewServer(webhook.Options{Host: installed.LocalServingHost, Port: installed.LocalServingPort, CertDir: installed.LocalServingCertDir})})
	Expect(err).NotTo(HaveOccurred())
	Expect(controllers.SetupWithManager(mgr, controllers.Options{Admission: true, Namespace: operatorNamespace,
		RangeGrace: 200 * time.Millisecond, StatusInterval: 20 * time.Millisecond, LeakAge: 2 * time.Second})).To(Succeed())
	writer, err := client.New(config, client.Options{Scheme: scheme})
	Expect(err).NotTo(HaveOccurred())
	Expect(writer.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: operatorNamespace}})).To(Succeed())
	runCtx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- mgr.Start(runCtx) }()
	DeferCleanup(func() {
		cancel()
		Eventually(done).WithTimeout(20 * time.Second).Should(Receive())
	})
	Eventually(func() error { return mgr.GetWebhookServer().StartedChecker()(nil) }).WithTimeout(30 * time.Second).Should(Succeed())
	Expect(mgr.GetCache().WaitForCacheSync(runCtx)).To(BeTrue())
}

// warnings collects the API server's warnings.
type warnings struct {
	mu    sync.Mutex
	texts []string
}

func (w *warnings) HandleWarningHeaderWithContext(_ context.Context, _ int, _, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.texts = append(w.texts, text)
}

// take returns the warnings since it was last called.
func (w *warnings) take() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	texts := w.texts
	w.texts = nil
	return strings.Join(texts, "\n")
}

// tenant is a namespace with a policy of its own.
type tenant struct {
	name   string
	v4, v6 netip.Prefix
	ports  allocator.PortRange
	policy *v1alpha1.ServiceProxyPolicy
}

var (
	tenants = 0
	// declaredPorts and declaredRanges are those of all policies.
	declaredPorts  []allocator.PortRange
	declaredRanges []netip.Prefix
)

// portsEach is how many node ports a tenant has. The first hundred of the API server's belong to specs that need very few: they lie in the band that is left
// alone while there are others, so that no steered Service has them.
const portsEach, staticPorts = 40, 30100

// newTenant makes a namespace and, unless change sets its ranges otherwise, a policy with a /24, a /112 and a range of node ports that no other spec has. It returns when
// all ranges can be used.
func newTenant(change func(*tenant, *v1alpha1.ServiceProxyPolicySpec)) *tenant {
	GinkgoHelper()
	t := newNamespace()
	t.v4 = netip.MustParsePrefix(fmt.Sprintf("10.200.%d.0/24", tenants))
	if tenants%2 == 0 { // within the API server's own range
		t.v4 = netip.MustParsePrefix(fmt.Sprintf("10.99.%d.0/24", tenants))
	}
	t.v6 = netip.MustParsePrefix(fmt.Sprintf("fd00:200:0:%x::/112", tenants))
	t.ports.First = uint16(staticPorts + portsEach*tenants)
	t.ports.Last = t.ports.First + portsEach - 1
	p := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: t.name}}
	p.Spec.NamespaceSelector = metav1.LabelSelector{MatchLabels: map[string]string{"tenant": t.name}}
	p.Spec.Reuse.Quarantine = &metav1.Duration{}
	p.Spec.ServiceRanges = []v1alpha1.ServiceRange{{CIDR: t.v4.String()}, {CIDR: t.v6.String()}}
	p.Spec.NodePortRange = &v1alpha1.NodePortRange{Start: int32(t.ports.First), End: int32(t.ports.Last)}
	if change != nil {
		change(t, &p.Spec)
	}
	Expect(k8s.Create(ctx, p)).To(Succeed())
	t.policy = p
	declaredPorts = append(declaredPorts, t.ports)
	for _, r := range p.Spec.ServiceRanges {
		declaredRanges = append(declaredRanges, netip.MustParsePrefix(r.CIDR))
	}
	t.awaitRanges()
	return t
}

// forgetPolicy deletes the tenant's policy: what it declared may be given to others again.
func (t *tenant) forgetPolicy() {
	Expect(k8s.Delete(ctx, t.policy)).To(Succeed())
	declaredPorts = slices.DeleteFunc(declaredPorts, func(r allocator.PortRange) bool { return r == t.ports })
	for _, r := range t.policy.Spec.ServiceRanges {
		declaredRanges = slices.DeleteFunc(declaredRanges, func(p netip.Prefix) bool { return p.String() == r.CIDR })
	}
}

// newNamespace is a tenant without a policy.
func newNamespace() *tenant {
	GinkgoHelper()
	tenants++
	t := &tenant{name: fmt.Sprintf("t%d", tenants)}
	Expect(k8s.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: t.name, Labels: map[string]string{"tenant": t.name}}})).To(Succeed())
	DeferCleanup(heard.take)
	return t
}

func (t *tenant) awaitRanges() {
	GinkgoHelper()
	Eventually(func(g Gomega) {
		g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(t.policy), t.policy)).To(Succeed())
		g.Expect(t.policy.Status.ObservedGeneration).To(Equal(t.policy.Generation))
		g.Expect(t.policy.Status.ServiceRanges).To(HaveLen(len(t.policy.Spec.ServiceRanges)))
		for _, r := range t.policy.Status.ServiceRanges {
			g.Expect(r.Ready).To(BeTrue(), "%s", r.CIDR)
		}
	}).Should(Succeed())
}

// strict makes the tenant's policy Strict.
func strict(_ *tenant, s *v1alpha1.ServiceProxyPolicySpec) {
	s.Enforcement = v1alpha1.EnforcementStrict
}

// service makes a Service object; change completes it.
func (t *tenant) service(name string, change func(*corev1.Service)) *corev1.Service {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: t.name, Name: name}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 80}}}}
	if change != nil {
		change(svc)
	}
	return svc
}

func (t *tenant) create(name string, change func(*corev1.Service)) *corev1.Service {
	GinkgoHelper()
	svc := t.service(name, change)
	Expect(k8s.Create(ctx, svc)).To(Succeed())
	return svc
}

// update changes a Service as the API server has it.
func update(svc *corev1.Service, change func(*corev1.Service)) {
	GinkgoHelper()
	Eventually(func() error { // the reconciler writes, too
		Expect(k8s.Get(ctx, client.ObjectKeyFromObject(svc), svc)).To(Succeed())
		change(svc)
		return k8s.Update(ctx, svc)
	}).Should(Succeed())
}

// claims are those of the tenant's Services.
func (t *tenant) claims() map[string]v1alpha1.AllocationClaim {
	GinkgoHelper()
	var list v1alpha1.AllocationClaimList
	Expect(k8s.List(ctx, &list)).To(Succeed())
	out := map[string]v1alpha1.AllocationClaim{}
	for _, c := range list.Items {
		if c.Spec.Holder.Namespace == t.name {
			out[c.Name] = c
		}
	}
	return out
}

func names(claims map[string]v1alpha1.AllocationClaim) []string {
	out := []string{}
	for name := range claims {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// locksOf are the names of the claims on all that a Service has of the tenant's policy.
func (t *tenant) locksOf(svcs ...*corev1.Service) []string {
	out := []string{}
	for _, svc := range svcs {
		for _, ip := range svc.Spec.ClusterIPs {
			if a, err := netip.ParseAddr(ip); err == nil && (t.v4.Contains(a) || t.v6.Contains(a)) {
				out = append(out, allocator.AddrLock(a).Name())
			}
		}
		for _, p := range append(portsOf(svc), svc.Spec.HealthCheckNodePort) {
			if lock := allocator.PortLock(uint16(p)); t.ports.Contains(lock.Port) && !slices.Contains(out, lock.Name()) {
				out = append(out, lock.Name())
			}
		}
	}
	slices.Sort(out)
	return out
}

func portsOf(svc *corev1.Service) (out []int32) {
	for _, p := range svc.Spec.Ports {
		out = append(out, p.NodePort)
	}
	return out
}

// expectBound waits until exactly what the Services have of the policy is claimed, and bound to them.
func (t *tenant) expectBound(svcs ...*corev1.Service) {
	GinkgoHelper()
	Eventually(func(g Gomega) {
		claims := t.claims()
		g.Expect(names(claims)).To(Equal(t.locksOf(svcs...)))
		for _, svc := range svcs {
			for _, name := range t.locksOf(svc) {
				g.Expect(claims[name].Spec.State).To(Equal(v1alpha1.ClaimBound), name)
				g.Expect(claims[name].Spec.Holder.UID).To(Equal(svc.UID), name)
			}
		}
	}).Should(Succeed())
}

// inside matches an address in a range.
func inside(p netip.Prefix) OmegaMatcher {
	return WithTransform(func(ip string) bool { return p.Contains(netip.MustParseAddr(ip)) }, BeTrue())
}

// ofTenant matches a node port of the tenant.
func (t *tenant) ofTenant() OmegaMatcher {
	return And(BeNumerically(">=", t.ports.First), BeNumerically("<=", t.ports.Last))
}

// steeredAddr matches an address that the API server could have given and no policy declares.
func steeredAddr() OmegaMatcher {
	own := []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("fd00:96::/108")}
	return WithTransform(func(ip string) bool {
		holds := func(p netip.Prefix) bool { return p.Contains(netip.MustParseAddr(ip)) }
		return slices.ContainsFunc(own, holds) && !slices.ContainsFunc(declaredRanges, holds)
	}, BeTrue())
}

// steeredPort matches a node port that no policy declares.
func steeredPort() OmegaMatcher {
	return WithTransform(func(port int32) bool {
		return !slices.ContainsFunc(declaredPorts, func(r allocator.PortRange) bool { return r.Contains(uint16(port)) })
	}, BeTrue())
}
