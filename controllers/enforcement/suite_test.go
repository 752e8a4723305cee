package enforcement

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/format"
	admissionv1 "k8s.io/api/admissionregistration/v1"
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
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/kubeapi"
)

var (
	ctx        = context.Background()
	restConfig *rest.Config
	kubeconfig string
	k8s        client.Client
	scheme     = runtime.NewScheme()
)

func TestEnforcement(t *testing.T) {
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		t.Fatal("KUBEBUILDER_ASSETS is not set: export KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)")
	}
	format.MaxLength = 3000
	format.UseStringerRepresentation = true
	RegisterFailHandler(Fail)
	RunSpecs(t, "enforcement")
}

// No webhook runs here and, but for the specs about it, no controller: what is refused is refused by the API server alone. The ranges of policies are parts of the API
// server's own, so that what it picks may lie in them.
var _ = BeforeSuite(func() {
	ctrl.SetLogger(GinkgoLogr)
	Expect(clientgoscheme.AddToScheme(scheme)).To(Succeed())
	Expect(v1alpha1.AddToScheme(scheme)).To(Succeed())
	env := &envtest.Environment{CRDDirectoryPaths: []string{filepath.Join("..", "..", "config", "crd", "bases")}, ErrorIfCRDPathMissing: true,
		ControlPlaneStopTimeout: time.Minute}
	env.ControlPlane.GetAPIServer().Configure().Set("service-cluster-ip-range", "10.96.0.0/16,fd00:96::/112")
	var err error
	restConfig, err = env.Start()
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(env.Stop)
	restConfig.QPS = -1
	k8s, err = client.New(restConfig, client.Options{Scheme: scheme})
	Expect(err).NotTo(HaveOccurred())

	admin, err := env.AddUser(envtest.User{Name: "admin", Groups: []string{"system:masters"}}, nil)
	Expect(err).NotTo(HaveOccurred())
	config, err := admin.KubeConfig()
	Expect(err).NotTo(HaveOccurred())
	kubeconfig = filepath.Join(GinkgoT().TempDir(), "kubeconfig")
	Expect(os.WriteFile(kubeconfig, config, 0o600)).To(Succeed())
	stop, err := kubeapi.StartControllers(env, "service-cidr-controller", "namespace-controller", "garbage-collector-controller", "validatingadmissionpolicy-status-controller")
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(stop)
	Eventually(func(g Gomega) {
		var def networkingv1.ServiceCIDR
		g.Expect(k8s.Get(ctx, client.ObjectKey{Name: "kubernetes"}, &def)).To(Succeed())
		g.Expect(apimeta.IsStatusConditionTrue(def.Status.Conditions, "Ready")).To(BeTrue())
	}).WithTimeout(30 * time.Second).Should(Succeed())
	SetDefaultEventuallyTimeout(20 * time.Second)
	SetDefaultEventuallyPollingInterval(20 * time.Millisecond)
})

// newNamespace makes a namespace with a label "tenant" of that value and whatever else is given.
func newNamespace(tenant string, labels ...string) string {
	GinkgoHelper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "ns-", Labels: map[string]string{}}}
	if tenant != "" {
		ns.Labels["tenant"] = tenant
	}
	for i := 0; i < len(labels); i += 2 {
		ns.Labels[labels[i]] = labels[i+1]
	}
	Expect(k8s.Create(ctx, ns)).To(Succeed())
	DeferCleanup(func() {
		Expect(k8s.DeleteAllOf(ctx, &corev1.Service{}, client.InNamespace(ns.Name))).To(Succeed())
		Expect(client.IgnoreNotFound(k8s.Delete(ctx, ns))).To(Succeed())
	})
	return ns.Name
}

// policy makes a policy for namespaces labelled tenant=NAME, as old as the order of the calls says.
func policy(name string, change func(*v1alpha1.ServiceProxyPolicySpec)) v1alpha1.ServiceProxyPolicy {
	made++
	p := v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.Unix(1e9+int64(made), 0)}}
	p.Spec.NamespaceSelector.MatchLabels = map[string]string{"tenant": name}
	if change != nil {
		change(&p.Spec)
	}
	return p
}

var made = 0

func strict(cidrs ...string) func(*v1alpha1.ServiceProxyPolicySpec) {
	return func(s *v1alpha1.ServiceProxyPolicySpec) {
		s.Enforcement = v1alpha1.EnforcementStrict
		bestEffort(cidrs...)(s)
	}
}

func bestEffort(cidrs ...string) func(*v1alpha1.ServiceProxyPolicySpec) {
	return func(s *v1alpha1.ServiceProxyPolicySpec) {
		for _, c := range cidrs {
			s.ServiceRanges = append(s.ServiceRanges, v1alpha1.ServiceRange{CIDR: c})
		}
	}
}

func withPorts(first, last int32, change func(*v1alpha1.ServiceProxyPolicySpec)) func(*v1alpha1.ServiceProxyPolicySpec) {
	return func(s *v1alpha1.ServiceProxyPolicySpec) {
		change(s)
		s.NodePortRange = &v1alpha1.NodePortRange{Start: first, End: last}
	}
}

// enforce puts these policies, and nothing else, in force until the spec ends, and returns when the API server has taken notice: then it refuses what a policy that only this
// call has refuses, strictly and as foreign.
func enforce(policies ...v1alpha1.ServiceProxyPolicy) {
	GinkgoHelper()
	marker := fmt.Sprintf("marker-%d", made)
	mark := policy(marker, func(s *v1alpha1.ServiceProxyPolicySpec) {
		s.Priority = 1e6 // before all others, for the Services that carry its label only
		s.NamespaceSelector, s.ServiceSelector.MatchLabels = metav1.LabelSelector{}, map[string]string{"marker": marker}
		withPorts(32760, 32767, strict("10.96.254.252/30"))(s)
	})
	mark.CreationTimestamp = metav1.Unix(1, 0) // the oldest, so that it has its range even from a policy that declares everything
	apply(Compile(append(policies, mark), []string{"kube-system", "operator"}))
	probes := map[string]*corev1.Service{
		// Left to the API server, whose choice only the Strict policy minds.
		marker + " (Strict)":          service("default", func(s *corev1.Service) { s.Labels = map[string]string{"marker": marker} }),
		"a range of policy " + marker: service("default", ips("10.96.254.253")),
	}
	for message, probe := range probes {
		Eventually(func() error {
			svc := probe.DeepCopy()
			err := k8s.Create(ctx, svc)
			if err == nil {
				Expect(k8s.Delete(ctx, svc)).To(Succeed())
			}
			return err
		}).WithPolling(50 * time.Millisecond).Should(MatchError(ContainSubstring(message)))
	}
}

// apply makes the API server have these rules only.
func apply(rules []Rule) {
	GinkgoHelper()
	removeRules()
	for _, r := range rules {
		Expect(k8s.Create(ctx, r.Policy)).To(Succeed())
		Expect(k8s.Create(ctx, r.Binding)).To(Succeed())
	}
	DeferCleanup(removeRules)
}

func removeRules() {
	Expect(k8s.DeleteAllOf(ctx, &admissionv1.ValidatingAdmissionPolicyBinding{})).To(Succeed())
	Expect(k8s.DeleteAllOf(ctx, &admissionv1.ValidatingAdmissionPolicy{})).To(Succeed())
}

func service(namespace string, change func(*corev1.Service)) *corev1.Service {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("s%d", rand.Uint64())},
		Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}}
	if change != nil {
		change(svc)
	}
	return svc
}

func ips(addresses ...string) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.ClusterIPs = addresses
		if len(addresses) > 0 {
			s.Spec.ClusterIP = addresses[0]
		}
		if len(addresses) > 1 {
			s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack)
		}
	}
}

func nodePorts(ports ...int32) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.Type, s.Spec.Ports = corev1.ServiceTypeNodePort, nil
		for i, p := range ports {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: fmt.Sprintf("p%d", i), Port: int32(80 + i), NodePort: p})
		}
	}
}

// create creates a Service that must be taken, under dry run too.
func create(svc *corev1.Service) *corev1.Service {
	GinkgoHelper()
	Expect(k8s.Create(ctx, svc.DeepCopy(), client.DryRunAll)).To(Succeed(), "dry run")
	Expect(k8s.Create(ctx, svc)).To(Succeed())
	return svc
}

// refused creates a Service that must be refused with a message that has all these parts. Each such request has its twin: under dry run it must pass.
func refused(svc *corev1.Service, parts ...string) {
	GinkgoHelper()
	Expect(k8s.Create(ctx, svc.DeepCopy(), client.DryRunAll)).To(Succeed(), "dry run")
	expectDenial(k8s.Create(ctx, svc), parts...)
}

func expectDenial(err error, parts ...string) {
	GinkgoHelper()
	Expect(err).To(HaveOccurred())
	Expect(apierrors.IsForbidden(err)).To(BeTrue(), err.Error())
	for _, part := range parts {
		Expect(err.Error()).To(ContainSubstring(part))
	}
}

// update changes a Service, which must be taken, under dry run too.
func update(svc *corev1.Service, change func(*corev1.Service)) {
	GinkgoHelper()
	change(svc)
	Expect(k8s.Update(ctx, svc.DeepCopy(), client.DryRunAll)).To(Succeed(), "dry run")
	Expect(k8s.Update(ctx, svc)).To(Succeed())
}

// refuseUpdate changes a copy of a Service, which must be refused, but not under dry run.
func refuseUpdate(svc *corev1.Service, change func(*corev1.Service), parts ...string) {
	GinkgoHelper()
	changed := svc.DeepCopy()
	change(changed)
	Expect(k8s.Update(ctx, changed.DeepCopy(), client.DryRunAll)).To(Succeed(), "dry run")
	expectDenial(k8s.Update(ctx, changed), parts...)
}
