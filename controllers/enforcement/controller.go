package enforcement

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// Options say where the operator lives.
type Options struct {
	// Namespace is the operator's own. Its Services are not judged, and what is made here goes with it: deleting the namespace uninstalls.
	// Without one, or if it does not exist, the objects stay until the last policy goes.
	Namespace string
}

// SetupWithManager adds the controller that keeps the admission policies what the ServiceProxyPolicies say. It runs on the leader only. The manager's scheme must know
// v1alpha1, core/v1 and admissionregistration/v1.
func SetupWithManager(mgr ctrl.Manager, options Options) error {
	exempt := []string{metav1.NamespaceSystem}
	if options.Namespace != "" {
		exempt = append(exempt, options.Namespace)
	}
	r := &reconciler{client: mgr.GetClient(), namespace: options.Namespace, exempt: exempt}
	// Everything is compiled anew from everything: there is one thing to reconcile.
	all := handler.EnqueueRequestsFromMapFunc(func(context.Context, client.Object) []reconcile.Request {
		return []reconcile.Request{{NamespacedName: client.ObjectKey{Name: "all"}}}
	})
	named := func(names ...string) builder.Predicates {
		return builder.WithPredicates(predicate.NewPredicateFuncs(func(o client.Object) bool { return slices.Contains(names, o.GetName()) }))
	}
	err := ctrl.NewControllerManagedBy(mgr).Named("enforcement").
		// A deletion raises the generation too.
		Watches(&v1alpha1.ServiceProxyPolicy{}, all, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&admissionv1.ValidatingAdmissionPolicy{}, all, named(StrictName, ForeignName)).
		Watches(&admissionv1.ValidatingAdmissionPolicyBinding{}, all, named(StrictName, ForeignName)).
		Watches(&corev1.Namespace{}, all, named(options.Namespace)).
		Complete(r)
	if err != nil {
		return fmt.Errorf("set up the reconciler of admission policies: %w", err)
	}
	return nil
}

const conflictRetry = 50 * time.Millisecond

// reconciler writes what Compile says.
type reconciler struct {
	client    client.Client
	namespace string
	exempt    []string
}

// +kubebuilder:rbac:groups=networking.serviceproxy.io,resources=serviceproxypolicies,verbs=get;list;watch
// +kubebuilder:rbac:groups="",resources=namespaces,verbs=get;list;watch
// +kubebuilder:rbac:groups=admissionregistration.k8s.io,resources=validatingadmissionpolicies;validatingadmissionpolicybindings,verbs=get;list;watch;create
// +kubebuilder:rbac:groups=admissionregistration.k8s.io,resources=validatingadmissionpolicies;validatingadmissionpolicybindings,resourceNames=serviceproxy-strict;serviceproxy-foreign,verbs=update;delete

// errNotOurs is about an object that has the name of one of ours. Only its owner can resolve that.
var errNotOurs = fmt.Errorf("it exists without the label %s=%s: delete it, or label it to have it replaced", v1alpha1.LabelManagedBy, v1alpha1.ManagedBy)

// Reconcile makes the two admission policies and their bindings, repairs them, or deletes them if no policy needs them.
func (r *reconciler) Reconcile(ctx context.Context, _ ctrl.Request) (ctrl.Result, error) {
	var policies v1alpha1.ServiceProxyPolicyList
	if err := r.client.List(ctx, &policies); err != nil {
		return ctrl.Result{}, fmt.Errorf("list policies: %w", err)
	}
	owners, err := r.owners(ctx)
	if err != nil {
		return ctrl.Result{}, err
	}
	wanted := map[string]Rule{}
	for _, rule := range Compile(policies.Items, r.exempt) {
		rule.Policy.OwnerReferences, rule.Binding.OwnerReferences = owners, owners
		wanted[rule.Policy.Name] = rule
	}
	var errs []error
	for _, name := range []string{StrictName, ForeignName} {
		if rule, ok := wanted[name]; ok {
			// A binding without its policy does nothing, so the policy comes first and goes last.
			errs = append(errs, r.keepPolicy(ctx, rule.Policy), r.keepBinding(ctx, rule.Binding))
			continue
		}
		errs = append(errs,
			r.remove(ctx, &admissionv1.ValidatingAdmissionPolicyBinding{ObjectMeta: metav1.ObjectMeta{Name: name}}),
			r.remove(ctx, &admissionv1.ValidatingAdmissionPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}}))
	}
	err = errors.Join(errs...)
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) { // the cache lagged: an event is on its way
		ctrl.LoggerFrom(ctx).V(1).Info("The cache lagged, trying again", "conflict", err.Error())
		return ctrl.Result{RequeueAfter: conflictRetry}, nil
	}
	if err != nil && !slices.ContainsFunc(errs, func(e error) bool { return e != nil && !errors.Is(e, errNotOurs) }) {
		err = reconcile.TerminalError(err) // trying again helps against everything else
	}
	return ctrl.Result{}, err
}

// owners is the reference to our namespace, if there is one.
func (r *reconciler) owners(ctx context.Context) ([]metav1.OwnerReference, error) {
	if r.namespace == "" {
		return nil, nil
	}
	var ns corev1.Namespace
	err := r.client.Get(ctx, client.ObjectKey{Name: r.namespace}, &ns)
	if apierrors.IsNotFound(err) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("read namespace %s: %w", r.namespace, err)
	}
	return []metav1.OwnerReference{{APIVersion: "v1", Kind: "Namespace", Name: ns.Name, UID: ns.UID}}, nil
}

func (r *reconciler) keepPolicy(ctx context.Context, want *admissionv1.ValidatingAdmissionPolicy) error {
	have := &admissionv1.ValidatingAdmissionPolicy{}
	return r.keep(ctx, have, want, func() bool { return equality.Semantic.DeepEqual(have.Spec, want.Spec) }, func() { have.Spec = want.Spec })
}

func (r *reconciler) keepBinding(ctx context.Context, want *admissionv1.ValidatingAdmissionPolicyBinding) error {
	have := &admissionv1.ValidatingAdmissionPolicyBinding{}
	return r.keep(ctx, have, want, func() bool { return equality.Semantic.DeepEqual(have.Spec, want.Spec) }, func() { have.Spec = want.Spec })
}

// keep creates want or makes have, which is read into, like it. What others added to the metadata stays.
func (r *reconciler) keep(ctx context.Context, have, want client.Object, same func() bool, assign func()) error {
	what := fmt.Sprintf("%T %s", want, want.GetName())
	err := r.client.Get(ctx, client.ObjectKeyFromObject(want), have)
	if apierrors.IsNotFound(err) {
		if err := r.client.Create(ctx, want); err != nil {
			return fmt.Errorf("create %s: %w", what, err)
		}
		ctrl.LoggerFrom(ctx).Info("Created an admission policy or its binding", "object", what)
		return nil
	} else if err != nil {
		return fmt.Errorf("read %s: %w", what, err)
	}
	if !ours(have) {
		return fmt.Errorf("%s: %w", what, errNotOurs)
	}
	if same() && equality.Semantic.DeepEqual(have.GetOwnerReferences(), want.GetOwnerReferences()) {
		return nil
	}
	assign()
	have.SetOwnerReferences(want.GetOwnerReferences())
	if err := r.client.Update(ctx, have); err != nil {
		return fmt.Errorf("update %s: %w", what, err)
	}
	ctrl.LoggerFrom(ctx).Info("Updated an admission policy or its binding", "object", what)
	return nil
}

// remove deletes an object of ours, if it exists.
func (r *reconciler) remove(ctx context.Context, o client.Object) error {
	what := fmt.Sprintf("%T %s", o, o.GetName())
	err := r.client.Get(ctx, client.ObjectKeyFromObject(o), o)
	if apierrors.IsNotFound(err) || err == nil && (!ours(o) || o.GetDeletionTimestamp() != nil) {
		return nil
	} else if err != nil {
		return fmt.Errorf("read %s: %w", what, err)
	}
	exactly := client.Preconditions{UID: new(o.GetUID()), ResourceVersion: new(o.GetResourceVersion())}
	if err := client.IgnoreNotFound(r.client.Delete(ctx, o, exactly)); err != nil {
		return fmt.Errorf("delete %s: %w", what, err)
	}
	ctrl.LoggerFrom(ctx).Info("Deleted an admission policy or its binding, no policy needs it", "object", what)
	return nil
}

func ours(o client.Object) bool { return o.GetLabels()[v1alpha1.LabelManagedBy] == v1alpha1.ManagedBy }
