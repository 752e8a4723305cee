package controllers

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
	"github.com/serviceproxy/serviceproxy-operator/controllers/instrument"
)

// claimReconciler collects garbage: released claims that have rested, claims of requests that came to nothing, claims whose Service is gone, reservations without
// a claim. It never believes the cache that something is gone, and leaves alone what is younger than any request that may still be under way.
type claimReconciler struct {
	client    client.Client
	live      client.Reader
	ledger    *ledger
	options   Options
	reclaimed *prometheus.CounterVec // by kind, one of those below
}

// Kinds of what is reclaimed.
const (
	reclaimedReservation = "reservation" // a claim of a request that came to nothing
	reclaimedLeak        = "leak"        // a claim whose Service is gone
	reclaimedOrphan      = "orphan"      // an IPAddress of ours without a claim
)

// newReclaimed makes the counter, or finds it if another manager of the process made it.
func newReclaimed(r prometheus.Registerer) (*prometheus.CounterVec, error) {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "serviceproxy_reclaimed_total",
		Help: "What was left behind and has been collected: reservation (a claim of a request that came to nothing), leak (a claim whose Service is gone), orphan (an IPAddress without a claim).",
	}, []string{"kind"})
	if err := instrument.Register(r, &c); err != nil {
		return nil, err
	}
	for _, kind := range []string{reclaimedReservation, reclaimedLeak, reclaimedOrphan} {
		c.WithLabelValues(kind) // a rate can be computed of the first one only if there was a zero before it
	}
	return c, nil
}

func (r *claimReconciler) setup(mgr ctrl.Manager) error {
	var err error
	if r.reclaimed, err = newReclaimed(metrics.Registry); err != nil {
		return err
	}
	return ctrl.NewControllerManagedBy(mgr).Named("claim").
		For(&v1alpha1.AllocationClaim{}).
		Watches(&networkingv1.IPAddress{}, handler.EnqueueRequestsFromMapFunc(claimOfReservation)).
		WatchesRawSource(wakeups{r.ledger, nil}).
		Complete(retryConflicts{r})
}

// claimOfReservation names the claim that a reservation of ours belongs to.
func claimOfReservation(_ context.Context, obj client.Object) []reconcile.Request {
	if _, ours := ourReservation(obj.(*networkingv1.IPAddress)); !ours {
		return nil
	}
	addr, err := netip.ParseAddr(obj.GetName())
	if err != nil {
		return nil
	}
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Name: allocator.AddrLock(addr).Name()}}}
}

// Reconcile looks at one claim and at the reservation of the same address.
func (r *claimReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	var claim *v1alpha1.AllocationClaim
	found, err := get(ctx, r.client, req.NamespacedName, &claim)
	if err != nil {
		return ctrl.Result{}, err
	}
	switch {
	case !found:
		return r.orphan(ctx, req.Name)
	case claim.DeletionTimestamp != nil, !isOurs(claim.Labels):
		return ctrl.Result{}, nil
	case claim.Spec.State == v1alpha1.ClaimReleased:
		return r.expire(ctx, claim)
	case claim.Spec.State == v1alpha1.ClaimReserved:
		return r.settle(ctx, claim)
	}
	return r.leak(ctx, claim)
}

// expire deletes a claim that has rested long enough.
func (r *claimReconciler) expire(ctx context.Context, claim *v1alpha1.AllocationClaim) (ctrl.Result, error) {
	if left := time.Until(claim.Spec.ExpiresAt.Time); left > 0 {
		return ctrl.Result{RequeueAfter: left}, nil
	}
	return ctrl.Result{}, client.IgnoreNotFound(r.client.Delete(ctx, claim, exactly(claim)))
}

// settle ends a reservation that its Service's reconciler has not bound: once its request must be over, it is bound to the Service that has what it locks if the policy covers
// that one, and deleted otherwise. What a Service has of a policy that does not cover it, because the API server chose it, is foreign, and nobody's record.
func (r *claimReconciler) settle(ctx context.Context, claim *v1alpha1.AllocationClaim) (ctrl.Result, error) {
	if left := r.options.LeakAge - time.Since(claim.CreationTimestamp.Time); left > 0 {
		return ctrl.Result{RequeueAfter: left}, nil
	}
	svc, err := r.user(ctx, claim)
	if err != nil {
		return ctrl.Result{}, err
	}
	if svc != nil {
		policy, err := admissionLedger{r.ledger, r.client, r.live}.Covering(ctx, svc)
		if errors.Is(err, errPolicyInvalid) {
			return ctrl.Result{RequeueAfter: r.options.LeakAge}, nil // nothing is decided until it can be understood
		}
		if err != nil {
			return ctrl.Result{}, err
		}
		if policy != nil && policy.Name == claim.Spec.PolicyName {
			hold := allocator.HoldOf(claim)
			hold.State, hold.Holder = v1alpha1.ClaimBound, holderOf(svc)
			bound := claim.DeepCopy()
			allocator.SetHold(bound, hold)
			return ctrl.Result{}, client.IgnoreNotFound(r.client.Update(ctx, bound))
		}
	}
	if err := r.client.Delete(ctx, claim, exactly(claim)); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	r.reclaimed.WithLabelValues(reclaimedReservation).Inc()
	ctrl.LoggerFrom(ctx).Info("Reclaimed what was reserved for a request that came to nothing", "namespace", claim.Spec.Holder.Namespace, "service", claim.Spec.Holder.Name)
	return ctrl.Result{}, nil
}

// user finds, by live reads, the Service to which the API server gave what the claim locks, nil if there is none: the one the claim names, the one that the IPAddress
// names, or one that the informer shows with the node port.
func (r *claimReconciler) user(ctx context.Context, claim *v1alpha1.AllocationClaim) (*corev1.Service, error) {
	lock, err := allocator.ParseName(claim.Name)
	if err != nil {
		return nil, err
	}
	var names []types.NamespacedName
	if h := claim.Spec.Holder; h.Name != "" { // else the request had generateName
		names = append(names, types.NamespacedName{Namespace: h.Namespace, Name: h.Name})
	}
	if lock.IsPort() {
		names = append(names, r.ledger.usersOf(lock)...)
	} else {
		var ip *networkingv1.IPAddress
		found, err := get(ctx, r.live, types.NamespacedName{Name: lock.Addr.String()}, &ip)
		if err != nil {
			return nil, err
		}
		if found && ip.Spec.ParentRef != nil && ip.Spec.ParentRef.Resource == "services" {
			names = append(names, types.NamespacedName{Namespace: ip.Spec.ParentRef.Namespace, Name: ip.Spec.ParentRef.Name})
		}
	}
	for _, name := range names {
		var svc *corev1.Service
		if found, err := get(ctx, r.live, name, &svc); err != nil {
			return nil, err
		} else if found && slices.Contains(locksOf(svc), lock) {
			return svc, nil
		}
	}
	return nil, nil
}

// leak releases a claim whose Service does not exist. Normally the reconciler of Services does; this is for what a crash left.
func (r *claimReconciler) leak(ctx context.Context, claim *v1alpha1.AllocationClaim) (ctrl.Result, error) {
	holder := types.NamespacedName{Namespace: claim.Spec.Holder.Namespace, Name: claim.Spec.Holder.Name}
	exists := func(from client.Reader) (bool, error) {
		var svc *corev1.Service
		found, err := get(ctx, from, holder, &svc)
		if err != nil || !found {
			return false, err
		}
		return svc.UID == claim.Spec.Holder.UID, nil
	}
	if ok, err := exists(r.client); err != nil || ok {
		return ctrl.Result{}, err
	}
	if left := r.options.LeakAge - time.Since(claim.CreationTimestamp.Time); left > 0 {
		return ctrl.Result{RequeueAfter: left}, nil
	}
	if ok, err := exists(r.live); err != nil || ok {
		return ctrl.Result{}, err
	}
	var assignment *v1alpha1.ServiceAssignment
	if found, err := get(ctx, r.live, holder, &assignment); err != nil {
		return ctrl.Result{}, err
	} else if found && isOurs(assignment.Labels) && assignment.Spec.ServiceUID == claim.Spec.Holder.UID {
		return ctrl.Result{RequeueAfter: time.Second}, nil // nodes may still forward the address, so nobody else may get it before this is gone
	}
	if err := r.ledger.release(ctx, r.client, r.live, claim, r.ledger.restFor(claim.Spec.PolicyName)); err != nil {
		return ctrl.Result{}, err
	}
	r.reclaimed.WithLabelValues(reclaimedLeak).Inc()
	return ctrl.Result{}, nil
}

// addrLock is the lock on an address that the name stands for; not ok if it stands for anything else.
func addrLock(claimName string) (lock allocator.Lock, ok bool) {
	lock, err := allocator.ParseName(claimName)
	return lock, err == nil && !lock.IsPort()
}

// orphan deletes a reservation of ours that no claim stands behind.
func (r *claimReconciler) orphan(ctx context.Context, claimName string) (ctrl.Result, error) {
	lock, ok := addrLock(claimName)
	if !ok {
		return ctrl.Result{}, nil
	}
	var ip *networkingv1.IPAddress
	found, err := get(ctx, r.client, types.NamespacedName{Name: lock.Addr.String()}, &ip)
	if err != nil {
		return ctrl.Result{}, err
	}
	if _, ours := ourReservationIf(found, ip); !ours {
		return ctrl.Result{}, nil
	}
	if left := r.options.LeakAge - time.Since(ip.CreationTimestamp.Time); left > 0 {
		return ctrl.Result{RequeueAfter: left}, nil
	}
	var claim *v1alpha1.AllocationClaim
	if found, err := get(ctx, r.live, types.NamespacedName{Name: claimName}, &claim); err != nil || found {
		return ctrl.Result{}, err
	}
	if err := r.client.Delete(ctx, ip, exactly(ip)); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	r.reclaimed.WithLabelValues(reclaimedOrphan).Inc()
	return ctrl.Result{}, nil
}
