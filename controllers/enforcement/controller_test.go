package enforcement

import (
	"context"
	"errors"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/config"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// startManager runs the controller until the spec ends or stop is called.
func startManager(namespace string) (stop func()) {
	GinkgoHelper()
	mgr, err := ctrl.NewManager(restConfig, ctrl.Options{Scheme: scheme, Metrics: metricsserver.Options{BindAddress: "0"},
		Cache:                   cache.Options{DefaultTransform: cache.TransformStripManagedFields()},
		Controller:              config.Controller{SkipNameValidation: new(true)}, // several in one process
		GracefulShutdownTimeout: new(5 * time.Second)})
	Expect(err).NotTo(HaveOccurred())
	Expect(SetupWithManager(mgr, Options{Namespace: namespace})).To(Succeed())
	runCtx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- mgr.Start(runCtx) }()
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			cancel()
			Eventually(done).Should(Receive(BeNil()))
		}
	}
	DeferCleanup(stop)
	return stop
}

var _ = Describe("The controller", func() {
	BeforeEach(func() {
		removeRules()
		DeferCleanup(removeRules)
	})
	// stored creates a policy in the API server.
	stored := func(name string, change func(*v1alpha1.ServiceProxyPolicySpec)) *v1alpha1.ServiceProxyPolicy {
		GinkgoHelper()
		p := policy(name, change)
		Expect(k8s.Create(ctx, &p)).To(Succeed())
		DeferCleanup(func() { Expect(client.IgnoreNotFound(k8s.Delete(ctx, &p))).To(Succeed()) })
		return &p
	}
	read := func(name string) (policy *admissionv1.ValidatingAdmissionPolicy, binding *admissionv1.ValidatingAdmissionPolicyBinding) {
		GinkgoHelper()
		policy, binding = &admissionv1.ValidatingAdmissionPolicy{}, &admissionv1.ValidatingAdmissionPolicyBinding{}
		if err := k8s.Get(ctx, client.ObjectKey{Name: name}, policy); apierrors.IsNotFound(err) {
			policy = nil
		} else {
			Expect(err).NotTo(HaveOccurred())
		}
		if err := k8s.Get(ctx, client.ObjectKey{Name: name}, binding); apierrors.IsNotFound(err) {
			binding = nil
		} else {
			Expect(err).NotTo(HaveOccurred())
		}
		return policy, binding
	}
	// complete says whether the policy and its binding exist, gone whether neither does.
	complete := func(name string) func() bool {
		return func() bool { p, b := read(name); return p != nil && b != nil }
	}
	gone := func(name string) func() bool {
		return func() bool { p, b := read(name); return p == nil && b == nil }
	}

	It("makes what the policies need, repairs it, and deletes it with the last", func() {
		ns := newNamespace("")
		startManager(ns)
		a := stored("ctl-a", bestEffort("10.96.80.0/24"))
		Eventually(complete(ForeignName)).Should(BeTrue())
		Expect(gone(StrictName)()).To(BeTrue(), "no policy is Strict")
		b := stored("ctl-b", strict("10.96.81.0/24"))
		Eventually(complete(StrictName)).Should(BeTrue())

		By("what it names")
		p, binding := read(StrictName)
		Expect(p.Labels).To(HaveKeyWithValue(v1alpha1.LabelManagedBy, v1alpha1.ManagedBy))
		Expect(p.Spec.MatchConstraints.NamespaceSelector.MatchExpressions).To(ConsistOf(metav1.LabelSelectorRequirement{
			Key: "kubernetes.io/metadata.name", Operator: metav1.LabelSelectorOpNotIn, Values: []string{"kube-system", ns}}))
		for _, o := range []client.Object{p, binding} {
			Expect(o.GetOwnerReferences()).To(HaveLen(1))
			Expect(o.GetOwnerReferences()[0].Kind + "/" + o.GetOwnerReferences()[0].Name).To(Equal("Namespace/" + ns))
		}

		By("drift")
		Eventually(func() error { // the API server's own controller writes its status at the same time
			p, _ = read(StrictName)
			p.Spec.Validations, p.OwnerReferences = p.Spec.Validations[:1], nil
			p.Spec.Validations[0].Expression = "true"
			p.Labels["theirs"] = "stays"
			return k8s.Update(ctx, p)
		}).Should(Succeed())
		binding.Spec.ValidationActions = []admissionv1.ValidationAction{admissionv1.Warn}
		Expect(k8s.Update(ctx, binding)).To(Succeed())
		Eventually(func(g Gomega) {
			p, binding := read(StrictName)
			g.Expect(p.Spec.Validations[0].Expression).NotTo(Equal("true"))
			g.Expect(p.OwnerReferences).To(HaveLen(1))
			g.Expect(p.Labels).To(HaveKey("theirs"))
			g.Expect(binding.Spec.ValidationActions).To(ConsistOf(admissionv1.Deny))
		}).Should(Succeed())
		_, binding = read(StrictName)
		Expect(k8s.Delete(ctx, binding)).To(Succeed())
		Eventually(complete(StrictName)).Should(BeTrue())

		By("a change of a policy")
		p, _ = read(ForeignName)
		a.Spec.ServiceRanges = append(a.Spec.ServiceRanges, v1alpha1.ServiceRange{CIDR: "10.96.82.0/24"})
		Expect(k8s.Update(ctx, a)).To(Succeed())
		Eventually(func() string {
			p, _ := read(ForeignName)
			return variable(p, "ranges0")
		}).Should(ContainSubstring("10.96.82.0/24"))

		By("no change, no write")
		p, binding = read(ForeignName)
		generations := func(p *admissionv1.ValidatingAdmissionPolicy, b *admissionv1.ValidatingAdmissionPolicyBinding) []int64 {
			return []int64{p.Generation, b.Generation}
		}
		Consistently(func() []int64 { return generations(read(ForeignName)) }).WithTimeout(300 * time.Millisecond).Should(Equal(generations(p, binding)))

		By("the end")
		Expect(k8s.Delete(ctx, b)).To(Succeed())
		Eventually(gone(StrictName)).Should(BeTrue())
		Expect(complete(ForeignName)()).To(BeTrue())
		Expect(k8s.Delete(ctx, a)).To(Succeed())
		Eventually(gone(ForeignName)).Should(BeTrue())
	})

	It("deletes what nothing needs any more when it starts", func() {
		apply(Compile([]v1alpha1.ServiceProxyPolicy{policy("past", strict("10.96.83.0/24"))}, nil))
		startManager("")
		Eventually(gone(StrictName)).Should(BeTrue())
		Eventually(gone(ForeignName)).Should(BeTrue())
	})

	It("never touches what is not ours", func() {
		for _, r := range Compile([]v1alpha1.ServiceProxyPolicy{policy("theirs", strict("10.96.83.0/24"))}, nil) {
			r.Policy.Labels = nil
			r.Policy.Spec.MatchConditions = []admissionv1.MatchCondition{{Name: "never", Expression: "false"}}
			Expect(k8s.Create(ctx, r.Policy)).To(Succeed())
		}
		p, _ := read(StrictName)
		stop := startManager("")
		mine := stored("ctl-mine", strict("10.96.84.0/24"))
		Eventually(func() *admissionv1.ValidatingAdmissionPolicyBinding { _, b := read(StrictName); return b }).ShouldNot(BeNil())
		Expect(k8s.Delete(ctx, mine)).To(Succeed())
		Eventually(func() *admissionv1.ValidatingAdmissionPolicyBinding { _, b := read(StrictName); return b }).Should(BeNil())
		stop()
		now, _ := read(StrictName)
		Expect(now).NotTo(BeNil())
		// Kubernetes' own controller writes the status, so the resourceVersion changes.
		Expect(now.UID).To(Equal(p.UID))
		Expect(now.Generation).To(Equal(p.Generation))
		Expect(now.Labels).To(Equal(p.Labels))
		Expect(now.OwnerReferences).To(Equal(p.OwnerReferences))
	})

	It("tries again what the API server could not do, also beside an object that is not ours", func() {
		theirs := Compile([]v1alpha1.ServiceProxyPolicy{policy("theirs", strict("10.96.83.0/24"))}, nil)[0].Policy
		theirs.Labels = nil
		theirs.Spec.MatchConditions = []admissionv1.MatchCondition{{Name: "never", Expression: "false"}}
		Expect(k8s.Create(ctx, theirs)).To(Succeed())
		stored("ctl-beside", strict("10.96.85.0/24"))
		well, err := client.NewWithWatch(restConfig, client.Options{Scheme: scheme})
		Expect(err).NotTo(HaveOccurred())
		ill := interceptor.NewClient(well, interceptor.Funcs{Create: func(ctx context.Context, c client.WithWatch, o client.Object, options ...client.CreateOption) error {
			if o.GetName() == ForeignName {
				return apierrors.NewInternalError(errors.New("etcd is busy"))
			}
			return c.Create(ctx, o, options...)
		}})
		terminal := MatchError(reconcile.TerminalError(nil))
		_, err = (&reconciler{client: ill}).Reconcile(ctx, reconcile.Request{})
		Expect(err).To(And(MatchError(errNotOurs), Not(terminal)))
		_, err = (&reconciler{client: well}).Reconcile(ctx, reconcile.Request{})
		Expect(err).To(And(MatchError(errNotOurs), terminal))
		_, binding := read(ForeignName)
		Expect(binding).NotTo(BeNil())
	})

	It("goes with its namespace", func() {
		ns := newNamespace("")
		stop := startManager(ns)
		stored("ctl-uninstall", strict("10.96.85.0/24"))
		Eventually(complete(StrictName)).Should(BeTrue())
		Eventually(complete(ForeignName)).Should(BeTrue())
		stop()
		Expect(k8s.Delete(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}})).To(Succeed())
		Eventually(gone(StrictName)).WithTimeout(40 * time.Second).Should(BeTrue())
		Eventually(gone(ForeignName)).WithTimeout(40 * time.Second).Should(BeTrue())
	})

	It("writes CEL that the API server finds nothing wrong with", func() {
		startManager("")
		stored("ctl-types", func(s *v1alpha1.ServiceProxyPolicySpec) {
			withPorts(30100, 30199, strict("10.96.86.0/24", "fd00:96::4000/116"))(s)
			s.ServiceRanges[0].Reserved = []string{"10.96.86.1"}
			s.ServiceSelector.MatchLabels = map[string]string{"a": "b"}
		})
		for _, name := range []string{StrictName, ForeignName} {
			Eventually(func(g Gomega) {
				p, _ := read(name)
				g.Expect(p).NotTo(BeNil())
				g.Expect(p.Status.ObservedGeneration).To(Equal(p.Generation))
				g.Expect(p.Status.TypeChecking).NotTo(BeNil())
				g.Expect(p.Status.TypeChecking.ExpressionWarnings).To(BeEmpty())
			}).Should(Succeed())
		}
	})
})

func variable(p *admissionv1.ValidatingAdmissionPolicy, name string) string {
	for _, v := range p.Spec.Variables {
		if v.Name == name {
			return v.Expression
		}
	}
	return ""
}
