package controllers

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// policyReconciler registers ranges with the API server, holds policies that are in use, and keeps their status true.
type policyReconciler struct {
	client   client.Client
	live     client.Reader
	ledger   *ledger
	recorder events.EventRecorder
	options  Options
}

// +kubebuilder:rbac:groups=networking.serviceproxy.io,resources=serviceproxypolicies,verbs=get;list;watch;patch
// +kubebuilder:rbac:groups=networking.serviceproxy.io,resources=serviceproxypolicies/status,verbs=update
// +kubebuilder:rbac:groups=networking.k8s.io,resources=servicecidrs,verbs=get;list;watch;create;patch;delete

func (r *policyReconciler) setup(mgr ctrl.Manager) error {
	// A deletion raises the generation too. Everything else that matters comes through the ledger, which waits StatusInterval.
	return ctrl.NewControllerManagedBy(mgr).Named("policy").
		For(&v1alpha1.ServiceProxyPolicy{}, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		WatchesRawSource(wakeups{r.ledger, func(q queue) { r.ledger.policyQueue = q }}).
		Complete(retryConflicts{r})
}

// Reconcile registers what the policy declares, gives up what it no longer declares, and writes its status.
func (r *policyReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	var policy *v1alpha1.ServiceProxyPolicy
	if found, err := get(ctx, r.client, req.NamespacedName, &policy); err != nil || !found {
		return ctrl.Result{}, err
	}
	now := time.Now()
	view, ok := r.ledger.view(policy, now)
	if !ok { // the ledger has not seen this version yet and will call again when it has
		return ctrl.Result{RequeueAfter: r.options.StatusInterval}, nil
	}
	r.ledger.announce(policy.Name)
	if !policy.DeletionTimestamp.IsZero() {
		waits, err := r.finalize(ctx, policy, view)
		if err != nil || !waits {
			return ctrl.Result{}, err
		}
		// What is left is counted by live reads, too, of which no event needs to tell: a claim may come and go while the informer's watch is broken.
		return ctrl.Result{RequeueAfter: deletionRetry}, nil
	}
	if !controllerutil.ContainsFinalizer(policy, v1alpha1.FinalizerPolicy) {
		held := policy.DeepCopy()
		controllerutil.AddFinalizer(held, v1alpha1.FinalizerPolicy)
		if err := r.client.Patch(ctx, held, client.MergeFromWithOptions(policy, client.MergeFromWithOptimisticLock{})); err != nil {
			return ctrl.Result{}, fmt.Errorf("add finalizer: %w", err)
		}
		policy = held
	}
	drained, err := r.register(ctx, policy, view)
	if apierrors.IsInvalid(err) || apierrors.IsForbidden(err) {
		// Somebody has to see it; what else fails passes. The generated name is another one at each attempt, and must not make the status another.
		view.refused = regexp.MustCompile(`"`+regexp.QuoteMeta(policy.Name)+`-[^"]*"`).ReplaceAllString(err.Error(), strconv.Quote(policy.Name+"-*"))
	} else if err != nil {
		return ctrl.Result{}, err
	}
	if err := errors.Join(err, r.writeStatus(ctx, policy, policyStatus(policy, view, drained))); err != nil {
		return ctrl.Result{}, err
	}
	if !view.nextReady.IsZero() {
		return ctrl.Result{RequeueAfter: view.nextReady.Sub(now)}, nil
	}
	return ctrl.Result{}, nil
}

func (r *policyReconciler) writeStatus(ctx context.Context, policy *v1alpha1.ServiceProxyPolicy, status v1alpha1.ServiceProxyPolicyStatus) error {
	if equality.Semantic.DeepEqual(policy.Status, status) {
		return nil
	}
	updated := policy.DeepCopy()
	updated.Status = status
	if err := client.IgnoreNotFound(r.client.Status().Update(ctx, updated)); err != nil {
		return fmt.Errorf("write status: %w", err)
	}
	r.tellTakeOver(policy, status)
	return nil
}

// tellTakeOver makes an event of a take-over, or of its return, that begins or ends. A Service that comes later begins none.
func (r *policyReconciler) tellTakeOver(policy *v1alpha1.ServiceProxyPolicy, status v1alpha1.ServiceProxyPolicyStatus) {
	was := ""
	if c := apimeta.FindStatusCondition(policy.Status.Conditions, v1alpha1.PolicyTakenOver); c != nil {
		was = c.Reason
	}
	c := apimeta.FindStatusCondition(status.Conditions, v1alpha1.PolicyTakenOver)
	if c == nil || c.Reason == was {
		return
	}
	first := policy.Status.Services.TakenOver == 0
	switch now := c.Reason; {
	case now == reasonHandingBack, now == reasonTakingOver && first, now == reasonTakenOver && (was == reasonTakingOver || was == reasonNotEverywhere && first):
		r.recorder.Eventf(policy, nil, corev1.EventTypeNormal, now, "TakeOver", "%s", note(c.Message))
	case was == reasonHandingBack:
		r.recorder.Eventf(policy, nil, corev1.EventTypeNormal, reasonHandedBack, "TakeOver", "%s", note("the Services that left are kube-proxy's; "+c.Message))
	case now == reasonNodesNotSelected, now == reasonKubeProxyMissing:
		r.recorder.Eventf(policy, nil, corev1.EventTypeWarning, now, "TakeOver", "%s", note(c.Message))
	}
}

// drainedRange is a range that the policy declared once and that cannot be given up yet.
type drainedRange struct {
	prefix          netip.Prefix
	serviceCIDR     string
	claims, foreign int
}

// register makes a ServiceCIDR for each ClusterIP range that has none, and gives up those of ours that the policy does not declare any more and that
// nothing uses. It returns those still in use.
func (r *policyReconciler) register(ctx context.Context, policy *v1alpha1.ServiceProxyPolicy, view policyView) ([]drainedRange, error) {
	var cached networkingv1.ServiceCIDRList
	if err := r.client.List(ctx, &cached); err != nil {
		return nil, fmt.Errorf("list ServiceCIDRs: %w", err)
	}
	all := cached.Items
	for _, prefix := range view.toRegister() {
		if registeredBy(all, prefix) != nil {
			continue
		}
		// The cache may lag behind what this or an earlier process created a moment ago: names are generated, so only a live read can tell.
		var live networkingv1.ServiceCIDRList
		if err := r.live.List(ctx, &live); err != nil {
			return nil, fmt.Errorf("list ServiceCIDRs: %w", err)
		}
		all = live.Items
		if registeredBy(all, prefix) != nil {
			continue
		}
		created := networkingv1.ServiceCIDR{
			ObjectMeta: metav1.ObjectMeta{GenerateName: policy.Name + "-", Labels: ourLabels(policy.Name)},
			Spec:       networkingv1.ServiceCIDRSpec{CIDRs: []string{prefix.String()}},
		}
		if err := r.client.Create(ctx, &created); err != nil {
			return nil, fmt.Errorf("register range %s as ServiceCIDR: %w", prefix, err)
		}
		ctrl.LoggerFrom(ctx).Info("Registered a range with the API server", "cidr", prefix, "serviceCIDR", created.Name)
		all = append(all, created)
	}
	var drained []drainedRange
	for i := range all {
		c := &all[i]
		if !isOurs(c.Labels) || c.Labels[v1alpha1.LabelPolicy] != policy.Name || c.DeletionTimestamp != nil {
			continue
		}
		prefixes := registrationOf(c).prefixes
		if len(prefixes) != 1 || view.declares(prefixes[0]) {
			continue
		}
		d, err := r.giveUp(ctx, policy.Name, c, prefixes[0], all, view)
		if err != nil {
			return nil, err
		}
		if d.claims+d.foreign > 0 {
			drained = append(drained, d)
		}
	}
	return drained, nil
}

// registeredBy finds a ServiceCIDR that has precisely this range, whoever made it.
func registeredBy(all []networkingv1.ServiceCIDR, prefix netip.Prefix) *networkingv1.ServiceCIDR {
	for i := range all {
		if all[i].DeletionTimestamp == nil && slices.Contains(registrationOf(&all[i]).prefixes, prefix) {
			return &all[i]
		}
	}
	return nil
}

// giveUp deletes a ServiceCIDR of ours if nothing needs it, hands it to another policy that declares the same range, or tells what still uses it. A
// deletion cannot be undone and our reservations do not hold it back, so the claims are read live.
func (r *policyReconciler) giveUp(ctx context.Context, policy string, c *networkingv1.ServiceCIDR, prefix netip.Prefix, all []networkingv1.ServiceCIDR, view policyView) (drainedRange, error) {
	out := drainedRange{prefix: prefix, serviceCIDR: c.Name}
	if heir := view.heirs[prefix]; heir != "" {
		updated := c.DeepCopy()
		updated.Labels[v1alpha1.LabelPolicy] = heir
		if err := client.IgnoreNotFound(r.client.Patch(ctx, updated, client.MergeFromWithOptions(c, client.MergeFromWithOptimisticLock{}))); err != nil {
			return out, fmt.Errorf("hand ServiceCIDR %s to policy %s: %w", c.Name, heir, err)
		}
		return out, nil
	}
	var kept, others []netip.Prefix
	if !view.terminating {
		kept = view.declared()
	}
	for i := range all {
		if all[i].Name != c.Name && all[i].DeletionTimestamp == nil {
			others = append(others, registrationOf(&all[i]).prefixes...)
		}
	}
	out.claims, _ = r.ledger.inUse(policy, prefix, kept)
	_, out.foreign = r.ledger.inUse(policy, prefix, others) // the API server, too, needs the range only for what lies in no other
	if out.claims+out.foreign > 0 {
		return out, nil
	}
	var live v1alpha1.AllocationClaimList
	if err := r.live.List(ctx, &live, client.MatchingLabels{v1alpha1.LabelPolicy: policy}); err != nil {
		return out, fmt.Errorf("list claims: %w", err)
	}
	for _, claim := range live.Items {
		lock, err := allocator.ParseName(claim.Name)
		if err == nil && !lock.IsPort() && prefix.Contains(lock.Addr) && !slices.ContainsFunc(kept, func(p netip.Prefix) bool { return p.Contains(lock.Addr) }) {
			out.claims++
		}
	}
	if out.claims > 0 {
		return out, nil
	}
	if err := client.IgnoreNotFound(r.client.Delete(ctx, c, exactly(c))); err != nil {
		return out, fmt.Errorf("delete ServiceCIDR %s: %w", c.Name, err)
	}
	ctrl.LoggerFrom(ctx).Info("Gave a range up", "cidr", prefix, "serviceCIDR", c.Name)
	return out, nil
}

// deletionRetry is how often a policy whose deletion waits is looked at even if nothing happens.
const deletionRetry = 10 * time.Second

// finalize lets a deleted policy go once nothing that it gave out is held any more, and says whether that still waits for something.
func (r *policyReconciler) finalize(ctx context.Context, policy *v1alpha1.ServiceProxyPolicy, view policyView) (waits bool, err error) {
	if !controllerutil.ContainsFinalizer(policy, v1alpha1.FinalizerPolicy) {
		return false, nil
	}
	claims, _ := r.ledger.inUse(policy.Name, netip.Prefix{}, nil)
	if claims == 0 {
		var live v1alpha1.AllocationClaimList
		if err := r.live.List(ctx, &live, client.MatchingLabels{v1alpha1.LabelPolicy: policy.Name}, client.Limit(500)); err != nil {
			return false, fmt.Errorf("list claims: %w", err)
		}
		claims = len(live.Items)
	}
	left := claims
	var drained []drainedRange
	if claims == 0 {
		if drained, err = r.register(ctx, policy, view); err != nil {
			return false, err
		}
		for _, d := range drained {
			left += d.claims + d.foreign
		}
	}
	if left+int(view.tally.covered) > 0 {
		status := policyStatus(policy, view, drained)
		setDeleting(&status, policy, claims, left-claims, view)
		return true, r.writeStatus(ctx, policy, status)
	}
	released := policy.DeepCopy()
	controllerutil.RemoveFinalizer(released, v1alpha1.FinalizerPolicy)
	if err := client.IgnoreNotFound(r.client.Patch(ctx, released, client.MergeFromWithOptions(policy, client.MergeFromWithOptimisticLock{}))); err != nil {
		return false, fmt.Errorf("remove finalizer: %w", err)
	}
	return false, nil
}
