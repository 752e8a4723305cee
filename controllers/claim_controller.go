package controllers

import (
	"context"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// claimReconciler collects garbage: released claims that have rested, claims whose Service is gone, reservations without a claim. It never believes
// the cache that something is gone, and leaves alone what is younger than any request that may still be under way.
type claimReconciler struct {
	client  client.Client
	live    client.Reader
	ledger  *ledger
	options Options
}

func (r *claimReconciler) setup(mgr ctrl.Manager) error {
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

// leak releases a claim whose Service does not exist. Normally the reconciler of Services does; this is for what a crash left.
func (r *claimReconciler) leak(ctx context.Context, claim *v1alpha1.AllocationClaim) (ctrl.Result, error) {
	holder := types.NamespacedName{Namespace: claim.Spec.Holder.Namespace, Name: claim.Spec.Holder.Name}
	exists := func(from client.Reader) (bool, error) {
		if holder.Name == "" {
			return false, nil // reserved for a request with generateName that never came through
		}
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
	return ctrl.Result{}, r.ledger.release(ctx, r.client, r.live, claim)
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
	return ctrl.Result{}, client.IgnoreNotFound(r.client.Delete(ctx, ip, exactly(ip)))
}
