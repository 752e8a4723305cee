package controllers

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/format"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
	"github.com/serviceproxy/serviceproxy-operator/test/kubeapi"
)

var (
	ctx        = context.Background()
	restConfig *rest.Config
	k8s        client.Client
	scheme     = runtime.NewScheme()
)

func TestControllers(t *testing.T) {
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		t.Fatal("KUBEBUILDER_ASSETS is not set: export KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)")
	}
	format.MaxLength = 3000
	RegisterFailHandler(Fail)
	RunSpecs(t, "controllers")
}

// One API server serves the whole suite, with the parts of kube-controller-manager that make ServiceCIDRs ready and collect
// garbage. Specs keep apart by namespace and by ranges.
var _ = BeforeSuite(func() {
	ctrl.SetLogger(GinkgoLogr)
	Expect(clientgoscheme.AddToScheme(scheme)).To(Succeed())
	Expect(v1alpha1.AddToScheme(scheme)).To(Succeed())
	env := &envtest.Environment{CRDDirectoryPaths: []string{filepath.Join("..", "config", "crd", "bases")}, ErrorIfCRDPathMissing: true,
		ControlPlaneStopTimeout: time.Minute}
	env.ControlPlane.GetAPIServer().Configure().Set("service-cluster-ip-range", "10.96.0.0/16,fd00:96::/112")
	var err error
	restConfig, err = env.Start()
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(env.Stop)
	restConfig.QPS, restConfig.Burst = 1000, 2000
	k8s, err = client.New(restConfig, client.Options{Scheme: scheme})
	Expect(err).NotTo(HaveOccurred())

	stop, err := kubeapi.StartControllers(env, "service-cidr-controller", "garbage-collector-controller")
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(stop)
	Eventually(func(g Gomega) {
		var def networkingv1.ServiceCIDR
		g.Expect(k8s.Get(ctx, client.ObjectKey{Name: "kubernetes"}, &def)).To(Succeed())
		g.Expect(apimeta.IsStatusConditionTrue(def.Status.Conditions, "Ready")).To(BeTrue())
	}).WithTimeout(30 * time.Second).Should(Succeed())
	SetDefaultEventuallyTimeout(20 * time.Second)
	SetDefaultEventuallyPollingInterval(20 * time.Millisecond)
	SetDefaultConsistentlyDuration(500 * time.Millisecond)
})

// quick are the options of most specs.
var quick = Options{RangeGrace: time.Millisecond, StatusInterval: 20 * time.Millisecond, LeakAge: time.Second, RetryWaiting: time.Minute}

// startManager runs the reconcilers until the spec ends or stop is called. intercept may be nil.
func startManager(options Options, intercept func(client.Client) client.Client) (stop func()) {
	GinkgoHelper()
	stop = runManager(options, intercept)
	DeferCleanup(stop)
	return stop
}

func runManager(options Options, intercept func(client.Client) client.Client) (stop func()) {
	GinkgoHelper()
	return runManagerWith(options, func(o *ctrl.Options) {
		if intercept != nil {
			o.NewClient = func(c *rest.Config, o client.Options) (client.Client, error) {
				inner, err := client.New(c, o)
				return intercept(inner), err
			}
		}
	})
}

// runManagerWith is runManager for what change makes of the manager's options.
func runManagerWith(options Options, change func(*ctrl.Options)) (stop func()) {
	GinkgoHelper()
	managerOptions := ctrl.Options{
		Scheme: scheme, Metrics: metricsserver.Options{BindAddress: "0"},
		Controller:              config.Controller{SkipNameValidation: new(true)}, // several in one process
		GracefulShutdownTimeout: new(5 * time.Second),
	}
	change(&managerOptions)
	mgr, err := ctrl.NewManager(rest.CopyConfig(restConfig), managerOptions)
	Expect(err).NotTo(HaveOccurred())
	Expect(SetupWithManager(mgr, options)).To(Succeed())
	runCtx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- mgr.Start(runCtx) }()
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			cancel()
			Eventually(done).WithTimeout(20 * time.Second).Should(Receive())
		}
	}
	return stop
}

// tenant is the namespace, the label and the ranges of one spec.
type tenant struct {
	name   string
	v4, v6 netip.Prefix // a /24 and a /112 that no other spec has
}

var tenants = 0

func newTenant() *tenant {
	GinkgoHelper()
	tenants++
	t := &tenant{
		name: fmt.Sprintf("t%d-%d", tenants, rand.IntN(1e6)),
		v4:   netip.MustParsePrefix(fmt.Sprintf("10.200.%d.0/24", tenants)),
		v6:   netip.MustParsePrefix(fmt.Sprintf("fd00:200:0:%x::/112", tenants)),
	}
	Expect(k8s.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: t.name, Labels: map[string]string{"tenant": t.name}}})).To(Succeed())
	DeferCleanup(t.clean)
	return t
}

// clean deletes what the spec made, and checks that nothing is left that nobody holds: no claim, reservation, assignment or policy.
func (t *tenant) clean() {
	var claims v1alpha1.AllocationClaimList
	defer runManager(quick, nil)()
	Expect(k8s.DeleteAllOf(ctx, &corev1.Service{}, client.InNamespace(t.name))).To(Succeed())
	var policies v1alpha1.ServiceProxyPolicyList
	Expect(k8s.List(ctx, &policies)).To(Succeed())
	for i := range policies.Items {
		if strings.HasPrefix(policies.Items[i].Name, t.name) {
			Expect(client.IgnoreNotFound(k8s.Delete(ctx, &policies.Items[i]))).To(Succeed())
		}
	}
	mine := func(policy string) bool { return strings.HasPrefix(policy, t.name) }
	Eventually(func(g Gomega) {
		left := 0
		g.Expect(k8s.List(ctx, &claims)).To(Succeed())
		for i := range claims.Items {
			c := &claims.Items[i]
			if !mine(c.Spec.PolicyName) {
				continue
			}
			left++
			if c.Spec.State == v1alpha1.ClaimReleased && time.Until(c.Spec.ExpiresAt.Time) > time.Second { // a long rest that a spec asked for
				c.Spec.ExpiresAt = &metav1.Time{Time: time.Now()}
				g.Expect(k8s.Update(ctx, c)).To(Succeed())
			}
		}
		g.Expect(left).To(BeZero(), "claims")
		g.Expect(t.reservations()).To(BeEmpty(), "reservations")
		g.Expect(t.assignments()).To(BeEmpty(), "assignments")
		g.Expect(k8s.List(ctx, &policies)).To(Succeed())
		g.Expect(slices.DeleteFunc(policies.Items, func(p v1alpha1.ServiceProxyPolicy) bool { return !mine(p.Name) })).To(BeEmpty(), "policies")
		var cidrs networkingv1.ServiceCIDRList
		g.Expect(k8s.List(ctx, &cidrs, client.MatchingLabels{v1alpha1.LabelManagedBy: v1alpha1.ManagedBy})).To(Succeed())
		for _, c := range cidrs.Items {
			if mine(c.Name) {
				g.Expect(c.DeletionTimestamp).NotTo(BeNil(), "ServiceCIDR %s %v", c.Name, c.Spec.CIDRs)
			}
		}
	}).WithTimeout(40 * time.Second).WithPolling(100 * time.Millisecond).Should(Succeed())
}

// wide is a /16 that no other spec has.
func (t *tenant) wide() netip.Prefix {
	return netip.MustParsePrefix(fmt.Sprintf("10.%d.0.0/16", 210+tenants%40))
}

func (t *tenant) reservations() []networkingv1.IPAddress {
	GinkgoHelper()
	var list networkingv1.IPAddressList
	Expect(k8s.List(ctx, &list, client.MatchingLabels{networkingv1.LabelManagedBy: v1alpha1.ManagedBy})).To(Succeed())
	return slices.DeleteFunc(list.Items, func(ip networkingv1.IPAddress) bool { return ip.Spec.ParentRef.Namespace != t.name })
}

func (t *tenant) assignments() []v1alpha1.ServiceAssignment {
	GinkgoHelper()
	var list v1alpha1.ServiceAssignmentList
	Expect(k8s.List(ctx, &list, client.InNamespace(t.name))).To(Succeed())
	return list.Items
}

// policy makes a policy for the tenant's namespace, without quarantine unless change says otherwise.
func (t *tenant) policy(suffix string, change func(*v1alpha1.ServiceProxyPolicySpec)) *v1alpha1.ServiceProxyPolicy {
	GinkgoHelper()
	p := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: t.name + suffix}}
	p.Spec.NamespaceSelector = metav1.LabelSelector{MatchLabels: map[string]string{"tenant": t.name}}
	p.Spec.Reuse.Quarantine = &metav1.Duration{}
	if change != nil {
		change(&p.Spec)
	}
	Expect(k8s.Create(ctx, p)).To(Succeed())
	return p
}

func ranges(prefixes ...netip.Prefix) func(*v1alpha1.ServiceProxyPolicySpec) {
	return func(s *v1alpha1.ServiceProxyPolicySpec) {
		for _, p := range prefixes {
			s.ServiceRanges = append(s.ServiceRanges, v1alpha1.ServiceRange{CIDR: p.String()})
		}
	}
}

func (t *tenant) service(name string, change func(*corev1.Service)) *corev1.Service {
	GinkgoHelper()
	svc := t.newService(name, change)
	Expect(k8s.Create(ctx, svc)).To(Succeed())
	return svc
}

// newService makes a Service whose ClusterIP lies outside of every policy, unless change says otherwise: left alone, the API server picks from any
// ServiceCIDR, those of policies included.
func (t *tenant) newService(name string, change func(*corev1.Service)) *corev1.Service {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: t.name, Name: name},
		Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}}
	if change != nil {
		change(svc)
	}
	if svc.Spec.ClusterIP == "" && svc.Spec.Type != corev1.ServiceTypeExternalName {
		services++
		svc.Spec.ClusterIP = fmt.Sprintf("10.96.%d.%d", 1+services/250, 1+services%250)
		svc.Spec.ClusterIPs = []string{svc.Spec.ClusterIP}
		if svc.Spec.IPFamilyPolicy != nil && *svc.Spec.IPFamilyPolicy == corev1.IPFamilyPolicyRequireDualStack {
			svc.Spec.ClusterIPs = append(svc.Spec.ClusterIPs, fmt.Sprintf("fd00:96::%x", 0x1000+services))
		}
	}
	return svc
}

var services = 0

// updatePolicy changes a policy's spec against conflicts.
func updatePolicy(p *v1alpha1.ServiceProxyPolicy, change func(*v1alpha1.ServiceProxyPolicySpec)) {
	GinkgoHelper()
	Eventually(func(g Gomega) {
		g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(p), p)).To(Succeed())
		change(&p.Spec)
		g.Expect(k8s.Update(ctx, p)).To(Succeed())
	}).Should(Succeed())
}

// assignment reads the assignment of a Service, nil if there is none.
func (t *tenant) assignment(name string) *v1alpha1.ServiceAssignment {
	GinkgoHelper()
	var a v1alpha1.ServiceAssignment
	err := k8s.Get(ctx, client.ObjectKey{Namespace: t.name, Name: name}, &a)
	if apierrors.IsNotFound(err) {
		return nil
	}
	Expect(err).NotTo(HaveOccurred())
	return &a
}

// allocated waits until the current assignment of the Service is Allocated, and returns it.
func (t *tenant) allocated(svc *corev1.Service) *v1alpha1.ServiceAssignment {
	GinkgoHelper()
	return t.allocation(svc, metav1.ConditionTrue)
}

func (t *tenant) allocation(svc *corev1.Service, status metav1.ConditionStatus) *v1alpha1.ServiceAssignment {
	GinkgoHelper()
	var a *v1alpha1.ServiceAssignment
	Eventually(func(g Gomega) {
		a = t.assignment(svc.Name)
		g.Expect(a).NotTo(BeNil())
		g.Expect(a.Spec.ServiceUID).To(Equal(svc.UID))
		c := apimeta.FindStatusCondition(a.Status.Conditions, v1alpha1.AssignmentAllocated)
		g.Expect(c).NotTo(BeNil())
		g.Expect(c.Status).To(Equal(status), c.Message)
		g.Expect(c.ObservedGeneration).To(Equal(a.Generation))
	}).Should(Succeed())
	return a
}

// additional lists the additional addresses of an assignment.
func additionalIPs(a *v1alpha1.ServiceAssignment) []netip.Addr {
	var out []netip.Addr
	for _, ip := range a.Spec.ServiceIPs {
		if ip.Source == v1alpha1.ServiceIPSourceAdditional {
			out = append(out, netip.MustParseAddr(ip.IP))
		}
	}
	return out
}

// claim reads a claim, nil if there is none.
func claimOn(lock allocator.Lock) *v1alpha1.AllocationClaim {
	GinkgoHelper()
	var c v1alpha1.AllocationClaim
	err := k8s.Get(ctx, client.ObjectKey{Name: lock.Name()}, &c)
	if apierrors.IsNotFound(err) {
		return nil
	}
	Expect(err).NotTo(HaveOccurred())
	return &c
}

// policyCondition reads a condition of the policy's current generation.
func policyCondition(p *v1alpha1.ServiceProxyPolicy, kind string) func() string {
	return func() string {
		if err := k8s.Get(ctx, client.ObjectKeyFromObject(p), p); err != nil {
			return err.Error()
		}
		c := apimeta.FindStatusCondition(p.Status.Conditions, kind)
		if c == nil || c.ObservedGeneration != p.Generation {
			return "unknown"
		}
		return string(c.Status) + " " + c.Reason + ": " + c.Message
	}
}
