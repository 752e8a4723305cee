package controllers

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/utils/ptr"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// allocatedOwner is the field manager of the condition Allocated. The rest of an assignment's status belongs to another one.
const allocatedOwner = "serviceproxy-allocation"

// Reasons of the condition Allocated.
const (
	reasonAllocated     = "Allocated"
	reasonNothingOwed   = "NothingOwed"
	reasonExhausted     = "RangeExhausted"
	reasonRangeNotReady = "RangeNotReady"
)

// serviceReconciler gives each covered Service what its policy owes it and compiles its assignment.
type serviceReconciler struct {
	client   client.Client
	live     client.Reader // past the cache
	ledger   *ledger
	warner   *warner
	recorder events.EventRecorder
	pace     *pace
	// relabelled says of a Service that was labelled when it may be again.
	relabelled *flowcontrol.Backoff
	options    Options
}

// +kubebuilder:rbac:groups="",resources=services;namespaces;nodes,verbs=get;list;watch
// +kubebuilder:rbac:groups="",resources=services/status,verbs=patch
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch
// +kubebuilder:rbac:groups=networking.k8s.io,resources=ipaddresses,verbs=get;list;watch;create;delete
// +kubebuilder:rbac:groups=networking.serviceproxy.io,resources=serviceassignments,verbs=get;list;watch;create;update;delete
// +kubebuilder:rbac:groups=networking.serviceproxy.io,resources=serviceassignments/status,verbs=patch
// +kubebuilder:rbac:groups=networking.serviceproxy.io,resources=allocationclaims,verbs=get;list;watch;create;update;delete
// +kubebuilder:rbac:groups=networking.serviceproxy.io,resources=nodeproxystates,verbs=get;list;watch
// The owner reference of an assignment blocks its Service's foreground deletion, which needs the right to set finalizers on Services where the
// OwnerReferencesPermissionEnforcement admission plugin is on.
// +kubebuilder:rbac:groups="",resources=services/finalizers,verbs=update

func (r *serviceReconciler) setup(mgr ctrl.Manager) error {
	r.warner = newWarner(r.recorder, r.ledger)
	// What others write into an assignment's status is none of this reconciler's business, or every Programmed would cost a reconcile:
	// only that of a Service with VIPs does.
	changed := predicate.Or[client.Object](predicate.GenerationChangedPredicate{}, predicate.Not[client.Object](predicate.ResourceVersionChangedPredicate{}),
		predicate.Funcs{UpdateFunc: r.newlyOnEveryNode})
	return ctrl.NewControllerManagedBy(mgr).Named("service").
		For(&corev1.Service{}).
		Watches(&v1alpha1.ServiceAssignment{}, &handler.EnqueueRequestForObject{}, builder.WithPredicates(changed)). // it has its Service's name
		Watches(&corev1.Namespace{}, handler.EnqueueRequestsFromMapFunc(r.servicesOf), builder.WithPredicates(predicate.LabelChangedPredicate{})).
		WatchesRawSource(wakeups{r.ledger, func(q queue) { r.ledger.serviceQueue = q }}).
		WithOptions(controller.Options{MaxConcurrentReconciles: r.options.Workers}).
		Complete(retryConflicts{r})
}

func (r *serviceReconciler) servicesOf(ctx context.Context, namespace client.Object) (out []reconcile.Request) {
	var list corev1.ServiceList
	if err := r.client.List(ctx, &list, client.InNamespace(namespace.GetName()), client.UnsafeDisableDeepCopy); err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "List the Services of a namespace whose labels changed")
	}
	for i := range list.Items {
		out = append(out, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
	}
	return out
}

// Reconcile brings claims, reservations and the assignment of one Service up to date.
func (r *serviceReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	var svc *corev1.Service
	if found, err := get(ctx, r.client, req.NamespacedName, &svc); err != nil {
		return ctrl.Result{}, err
	} else if !found {
		r.pace.forget(req.NamespacedName)
		r.relabelled.DeleteEntry(req.String())
		return ctrl.Result{}, r.letGo(ctx, req.NamespacedName, nil)
	}
	var assignment *v1alpha1.ServiceAssignment
	if _, err := get(ctx, r.client, req.NamespacedName, &assignment); err != nil {
		return ctrl.Result{}, err
	}
	epoch := r.ledger.epoch()
	policy, spec, err := r.covering(ctx, svc, assignment)
	if errors.Is(err, errPolicyInvalid) {
		r.ledger.covered(req.NamespacedName, "", epoch)
		ctrl.LoggerFrom(ctx).Info("The Service stays as it is", "because", err.Error())
		return ctrl.Result{}, nil // an edit of the policy has it looked at again
	}
	if err != nil {
		return ctrl.Result{}, err
	}
	r.warner.warn(svc, policy)
	name := ""
	if policy != nil {
		name = policy.Name
	}
	r.ledger.covered(req.NamespacedName, name, epoch)
	if wait, err := r.handBack(ctx, svc, policy, assignment); err != nil {
		return ctrl.Result{}, err
	} else if wait > 0 {
		return ctrl.Result{RequeueAfter: wait}, r.follow(ctx, svc, assignment)
	}
	if policy == nil {
		return ctrl.Result{}, r.letGo(ctx, req.NamespacedName, svc)
	}
	additional, shortage, err := r.allocate(ctx, svc, policy, assignment)
	if err != nil {
		return ctrl.Result{}, err
	}
	vips, short, err := r.allocateVIPs(ctx, svc, policy, assignment)
	if err != nil {
		return ctrl.Result{}, err
	}
	shortage = errors.Join(shortage, short)
	assignment, err = r.assign(ctx, svc, assignment, CompileAssignment(svc, spec, additional, vips.forwarded))
	if err != nil {
		return ctrl.Result{}, err
	}
	if err := r.showVIPs(ctx, svc, assignment, vips); err != nil {
		return ctrl.Result{}, err
	}
	if err := r.releaseSurplus(ctx, req.NamespacedName); err != nil {
		return ctrl.Result{}, err
	}
	r.ledger.settled(req.NamespacedName, epoch, assignment.Generation)
	again, err := r.takeOver(ctx, svc, policy, assignment)
	if err != nil {
		return ctrl.Result{}, err
	}
	if shortage == nil {
		r.ledger.served(req.NamespacedName)
	}
	if ready := r.unreported(assignment, shortage); ready > 0 {
		return ctrl.Result{RequeueAfter: ready}, nil
	}
	if err := r.report(ctx, svc, assignment, policy, shortage); err != nil {
		return ctrl.Result{}, err
	}
	if shortage != nil && (again == 0 || again > r.options.RetryWaiting) {
		again = r.options.RetryWaiting
	}
	return ctrl.Result{RequeueAfter: again}, nil
}

// unreported is for how long a new assignment goes without the condition Allocated because a range that was declared just now becomes ready any
// moment: every Service of a new policy is in that state, and every agent would be told twice. The assignment itself does not wait, because traffic
// to the ClusterIP works without the additional address.
func (r *serviceReconciler) unreported(a *v1alpha1.ServiceAssignment, shortage error) time.Duration {
	if !errors.Is(shortage, allocator.ErrNotUsable) || errors.Is(shortage, allocator.ErrExhausted) || apimeta.FindStatusCondition(a.Status.Conditions, v1alpha1.AssignmentAllocated) != nil {
		return 0
	}
	return 5*r.options.RangeGrace - time.Since(a.CreationTimestamp.Time)
}

// covering finds the policy that covers a Service, given its assignment so far.
func (r *serviceReconciler) covering(ctx context.Context, svc *corev1.Service, assignment *v1alpha1.ServiceAssignment) (*allocator.Policy, *v1alpha1.ServiceProxyPolicy, error) {
	var namespace *corev1.Namespace
	if found, err := get(ctx, r.client, types.NamespacedName{Name: svc.Namespace}, &namespace); err != nil {
		return nil, nil, err
	} else if !found {
		return nil, nil, fmt.Errorf("namespace %s is not in the cache yet", svc.Namespace)
	}
	current := ""
	if assignment != nil && assignment.Spec.ServiceUID == svc.UID {
		current = assignment.Spec.PolicyName
	}
	return r.ledger.covering(svc, namespace.Labels, current)
}

// assign creates or updates the assignment. It returns what the API server now has.
func (r *serviceReconciler) assign(ctx context.Context, svc *corev1.Service, have *v1alpha1.ServiceAssignment, want v1alpha1.ServiceAssignmentSpec) (*v1alpha1.ServiceAssignment, error) {
	if have != nil && !metav1.IsControlledBy(have, svc) {
		if !isOurs(have.Labels) {
			r.recorder.Eventf(svc, nil, corev1.EventTypeWarning, "AssignmentNotOurs", "Assign",
				"ServiceAssignment %s exists and does not carry the label %s=%s, so it is left alone; delete it to let the Service be assigned", svc.Name, v1alpha1.LabelManagedBy, v1alpha1.ManagedBy)
			return nil, reconcile.TerminalError(fmt.Errorf("ServiceAssignment %s/%s exists and is not ours; delete it to let the Service be assigned", have.Namespace, have.Name))
		}
		// It is of an earlier Service of this name. What that one held is not this one's.
		if err := client.IgnoreNotFound(r.client.Delete(ctx, have, exactly(have))); err != nil {
			return nil, fmt.Errorf("delete the assignment of an earlier Service: %w", err)
		}
		have = nil
	}
	if have == nil {
		created := &v1alpha1.ServiceAssignment{
			ObjectMeta: metav1.ObjectMeta{Namespace: svc.Namespace, Name: svc.Name, Labels: ourLabels(want.PolicyName)},
			Spec:       want,
		}
		if err := controllerutil.SetControllerReference(svc, created, r.client.Scheme()); err != nil {
			return nil, err
		}
		if err := r.client.Create(ctx, created); err != nil {
			return nil, fmt.Errorf("create assignment: %w", err)
		}
		return created, nil
	}
	if equality.Semantic.DeepEqual(have.Spec, want) && have.Labels[v1alpha1.LabelPolicy] == want.PolicyName && !isHandingBack(have) {
		return have, nil
	}
	updated := have.DeepCopy()
	updated.Spec = want
	delete(updated.Annotations, v1alpha1.AnnotationHandingBack)
	if updated.Labels == nil {
		updated.Labels = map[string]string{}
	}
	for k, v := range ourLabels(want.PolicyName) {
		updated.Labels[k] = v
	}
	if err := r.client.Update(ctx, updated); err != nil {
		return nil, fmt.Errorf("update assignment: %w", err)
	}
	return updated, nil
}

// report writes the condition Allocated if it changed, and a Warning when a Service begins to wait.
func (r *serviceReconciler) report(ctx context.Context, svc *corev1.Service, a *v1alpha1.ServiceAssignment, policy *allocator.Policy, shortage error) error {
	want := metav1.Condition{Type: v1alpha1.AssignmentAllocated, Status: metav1.ConditionTrue, ObservedGeneration: a.Generation, Reason: reasonAllocated,
		Message: "the Service has every address that policy " + policy.Name + " owes it"}
	var refused *refusal
	switch {
	case shortage != nil:
		want.Status, want.Reason, want.Message = metav1.ConditionFalse, reasonRangeNotReady, strings.ReplaceAll(shortage.Error(), "\n", "; ")
		if errors.Is(shortage, allocator.ErrExhausted) {
			want.Reason = reasonExhausted
		} else if errors.As(shortage, &refused) {
			want.Reason = refused.reason
		}
	case len(policy.Ranges) == 0:
		want.Reason, want.Message = reasonNothingOwed, "policy "+policy.Name+" declares no ranges: the Service keeps the addresses that the API server gave it"
	}
	have := apimeta.FindStatusCondition(a.Status.Conditions, want.Type)
	if have != nil && have.Status == want.Status && have.Reason == want.Reason && have.ObservedGeneration == want.ObservedGeneration &&
		(have.Message == want.Message || want.Reason == reasonExhausted) { // the counts in the message are worth no write per Service
		return nil
	}
	want.LastTransitionTime = metav1.Now()
	if have != nil && have.Status == want.Status {
		want.LastTransitionTime = have.LastTransitionTime
	}
	if err := r.applyAllocated(ctx, a, want); err != nil {
		return client.IgnoreNotFound(err) // deleted meanwhile
	}
	switch {
	case want.Reason == reasonExhausted && (have == nil || have.Reason != reasonExhausted):
		r.recorder.Eventf(svc, nil, corev1.EventTypeWarning, reasonExhausted, "Allocate", "%s; the Service keeps %v and gets an address of the policy as soon as one is released",
			want.Message, clusterIPs(svc))
	case refused != nil && (have == nil || have.Reason != want.Reason || have.Message != want.Message):
		r.recorder.Eventf(svc, nil, corev1.EventTypeWarning, want.Reason, "Allocate", "%s", note(want.Message))
	}
	return nil
}

// applyAllocated writes the condition by server-side apply, so that it is the only field this reconciler owns in the status.
func (r *serviceReconciler) applyAllocated(ctx context.Context, a *v1alpha1.ServiceAssignment, c metav1.Condition) error {
	patch := &unstructured.Unstructured{Object: map[string]any{
		"status": map[string]any{"conditions": []any{map[string]any{
			"type": c.Type, "status": string(c.Status), "reason": c.Reason, "message": c.Message,
			"observedGeneration": c.ObservedGeneration, "lastTransitionTime": c.LastTransitionTime.UTC().Format(time.RFC3339),
		}}},
	}}
	patch.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind("ServiceAssignment"))
	patch.SetNamespace(a.Namespace)
	patch.SetName(a.Name)
	patch.SetUID(a.UID)
	err := r.client.Status().Apply(ctx, client.ApplyConfigurationFromUnstructured(patch), client.FieldOwner(allocatedOwner), client.ForceOwnership)
	if err != nil {
		return fmt.Errorf("write condition %s: %w", c.Type, err)
	}
	return nil
}

// letGo removes the assignment of a Service that no policy covers any more, or that is gone (svc is nil), and releases what it held.
func (r *serviceReconciler) letGo(ctx context.Context, key types.NamespacedName, svc *corev1.Service) error {
	r.ledger.served(key)
	var assignment *v1alpha1.ServiceAssignment
	found, err := get(ctx, r.client, key, &assignment)
	if err != nil {
		return err
	}
	if svc != nil {
		if err := r.showVIPs(ctx, svc, nil, vips{}); err != nil {
			return err
		}
	}
	if found && isOurs(assignment.Labels) {
		if svc == nil {
			// The caches of Services and assignments are not of the same moment: a new leader may know another's assignment before the Service.
			var live *corev1.Service
			if exists, err := get(ctx, r.live, key, &live); err != nil {
				return err
			} else if exists && live.UID == assignment.Spec.ServiceUID {
				return nil // its event is on its way
			}
		}
		if err := client.IgnoreNotFound(r.client.Delete(ctx, assignment, exactly(assignment))); err != nil {
			return fmt.Errorf("delete assignment: %w", err)
		}
	}
	return r.releaseSurplus(ctx, key)
}

// get reads an object, and says whether it exists.
func get[T any, P interface {
	*T
	client.Object
}](ctx context.Context, from client.Reader, key types.NamespacedName, into *P) (bool, error) {
	obj := P(new(T))
	if err := from.Get(ctx, key, obj); err != nil {
		if apierrors.IsNotFound(err) {
			return false, nil
		}
		return false, fmt.Errorf("read %T %s: %w", obj, key, err)
	}
	*into = obj
	return true, nil
}

// exactly makes a deletion hit this very object in this very version, or fail.
func exactly(obj client.Object) client.Preconditions {
	return client.Preconditions{UID: ptr.To(obj.GetUID()), ResourceVersion: ptr.To(obj.GetResourceVersion())}
}

func ourLabels(policy string) map[string]string {
	return map[string]string{v1alpha1.LabelManagedBy: v1alpha1.ManagedBy, v1alpha1.LabelPolicy: policy}
}

func sortedAddrs(in []netip.Addr) []netip.Addr {
	slices.SortFunc(in, netip.Addr.Compare)
	return in
}
