package admission

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/utils/ptr"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

const (
	// maxAtOnce bounds how many claims of one request are made at a time: a Service may have thousands of ports, and others want to be served too.
	maxAtOnce = 16
	// maxAttempts bounds how many locks are tried for one want while others keep getting there first.
	maxAttempts = 32
	// claimTimeout bounds the claiming, undoTimeout what follows if it came to nothing. Together they stay below the 3 s that the API server waits for an answer.
	claimTimeout, undoTimeout = 2 * time.Second, 500 * time.Millisecond
)

// errOutrun says that others were faster, maxAttempts times in a row.
var errOutrun = fmt.Errorf("others took %d in a row first", maxAttempts)

// reservedError says that what a request names is being given to somebody else right now.
type reservedError struct {
	field string
	lock  allocator.Lock
	by    v1alpha1.ClaimHolder
}

func (e *reservedError) Error() string {
	name := e.by.Name
	if name == "" {
		name = "(a name to be generated)"
	}
	return fmt.Sprintf("%s: %s is reserved for Service %s/%s, whose request is under way: name another, or none", e.field, e.lock, e.by.Namespace, name)
}

// claimAll claims whatever the steps of the request are to get claimed, several at a time, and leaves in each step what came of it. It says whether a Service of
// the request's name exists already, which only a read past the cache can tell.
func (r *request) claimAll(ctx context.Context) (exists bool) {
	var wg sync.WaitGroup
	free := make(chan struct{}, maxAtOnce)
	claiming := false
	for i := range r.steps {
		s := &r.steps[i]
		if s.found {
			continue
		}
		claim := r.take
		switch s.source {
		case fromPolicy:
		case recorded:
			claim = r.record
		default:
			continue
		}
		claiming = true
		wg.Go(func() {
			free <- struct{}{}
			defer func() { <-free }()
			s.err = claim(ctx, s)
		})
	}
	// A name to be generated is nobody's yet, and of a request that came by before this was asked then.
	if claiming && r.old == nil && r.svc.Name != "" && !r.again {
		wg.Go(func() {
			err := r.live.Get(ctx, client.ObjectKey{Namespace: r.holder.Namespace, Name: r.holder.Name}, &corev1.Service{})
			exists = err == nil // otherwise the API server will know: it only answers 422 where 409 would be clearer
		})
	}
	wg.Wait()
	return exists
}

func (r *request) hold(w want) allocator.Hold {
	return allocator.Hold{Policy: r.policy.Name, Use: w.use, State: v1alpha1.ClaimReserved, Holder: r.holder}
}

// take claims a free lock of the policy: whoever gets there first has it, and the next one is tried.
func (r *request) take(ctx context.Context, s *step) error {
	var lost []allocator.Lock
	defer func() {
		for _, lock := range lost { // kept pending until now, so that the same one is not proposed twice
			r.ledger.Abandon(lock)
		}
	}()
	hold := r.hold(s.want)
	for range maxAttempts {
		grant, err := r.ledger.Grant(allocator.Request{Policy: hold.Policy, Family: s.family, Use: s.use, Holder: hold.Holder})
		if err != nil {
			return err
		}
		claim, err := r.create(ctx, grant, hold)
		switch {
		case err == nil:
			r.ledger.Took(grant.Lock, hold)
			s.lock, s.claim = grant.Lock, claim
			return nil
		case apierrors.IsAlreadyExists(err), apierrors.IsConflict(err), apierrors.IsNotFound(err):
			lost = append(lost, grant.Lock)
			r.metrics.lost.Inc()
		default:
			// Perhaps only the answer was lost, and the claim is there. Then it belongs to nothing, and the claims reconciler deletes it.
			r.ledger.Abandon(grant.Lock)
			return fmt.Errorf("claim %s: %w", grant.Lock, err)
		}
	}
	return errOutrun
}

// create makes the claim. One that rests for a Service of this name is deleted first, so that the new one is as old as this request: a reservation that comes to
// nothing is told by its age. AlreadyExists, Conflict and NotFound mean that somebody else was faster, or that the lock is not free yet.
func (r *request) create(ctx context.Context, grant allocator.Grant, hold allocator.Hold) (*v1alpha1.AllocationClaim, error) {
	if grant.Reclaim {
		if err := r.clear(ctx, grant.Lock); err != nil {
			return nil, err
		}
	}
	claim := allocator.NewClaim(grant.Lock, hold)
	claim.Spec.ReservationToken = r.token
	return claim, r.client.Create(ctx, claim)
}

// clear deletes the claim that rests on a lock, if the API server let go of it.
func (r *request) clear(ctx context.Context, lock allocator.Lock) error {
	resting := r.ledger.Claim(lock)
	if resting == nil {
		return apierrors.NewNotFound(v1alpha1.GroupVersion.WithResource("allocationclaims").GroupResource(), lock.Name())
	}
	if !lock.IsPort() {
		// An IPAddress is deleted some time after its Service, and until then the API server gives the address to nobody. (A node port is free once the
		// deletion of its Service has returned.)
		err := r.live.Get(ctx, client.ObjectKey{Name: lock.Addr.String()}, &networkingv1.IPAddress{})
		if err == nil {
			return apierrors.NewAlreadyExists(networkingv1.Resource("ipaddresses"), lock.Addr.String())
		} else if !apierrors.IsNotFound(err) {
			return err
		}
	}
	return r.client.Delete(ctx, resting, exactly(resting))
}

// record claims the very lock that the request names. Nothing is claimed, and nothing said, if a Service holds it: the API server will say so, or the holder is
// this very Service. It fails with a *reservedError while it is being given to another.
func (r *request) record(ctx context.Context, s *step) error {
	hold := r.hold(s.want)
	r.ledger.Taking(s.named, hold)
	claim, err := r.recordLive(ctx, s, hold)
	if claim == nil || err != nil {
		r.ledger.Abandon(s.named)
		return err
	}
	r.ledger.Took(s.named, hold)
	s.lock, s.claim = s.named, claim
	return nil
}

// recordLive makes the claim, or finds the one that was made for this request before. It returns nil if there is to be none.
func (r *request) recordLive(ctx context.Context, s *step, hold allocator.Hold) (*v1alpha1.AllocationClaim, error) {
	for range maxAttempts {
		claim, err := r.create(ctx, allocator.Grant{Lock: s.named}, hold)
		if err == nil {
			return claim, nil
		} else if !apierrors.IsAlreadyExists(err) {
			return nil, fmt.Errorf("claim %s: %w", s.named, err)
		}
		var have v1alpha1.AllocationClaim
		if err := r.live.Get(ctx, client.ObjectKey{Name: s.named.Name()}, &have); apierrors.IsNotFound(err) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("read claim %s: %w", s.named, err)
		}
		by := have.Spec.Holder
		switch {
		case r.isOurs(&have, r.token):
			s.found = true
			return &have, nil
		case have.Labels[v1alpha1.LabelManagedBy] != v1alpha1.ManagedBy, have.Spec.State == v1alpha1.ClaimBound:
			return nil, nil // the API server's own lock decides
		case have.Spec.State == v1alpha1.ClaimReserved && !(by.Namespace == r.holder.Namespace && by.Name == r.holder.Name && by.Name != ""):
			return nil, &reservedError{s.field(), s.named, by}
		}
		// It rests, and rest binds only those who take anything; or an earlier request for this Service came to nothing.
		if err := r.client.Delete(ctx, &have, exactly(&have)); err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			return nil, fmt.Errorf("delete claim %s: %w", s.named, err)
		}
	}
	return nil, errOutrun
}

// isOurs says whether the claim was made for this very request, which came by before.
func (r *request) isOurs(c *v1alpha1.AllocationClaim, token string) bool {
	return c.Spec.State == v1alpha1.ClaimReserved && c.Spec.ReservationToken == token && token != "" &&
		c.Spec.Holder.Namespace == r.holder.Namespace && c.Spec.Holder.Name == r.holder.Name
}

// undo deletes the claims of the request. What cannot be deleted now is left to the claims reconciler.
func (r *request) undo(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for i := range r.steps {
		if s := &r.steps[i]; s.claim != nil {
			wg.Go(func() { r.undoStep(ctx, s) })
		}
	}
	wg.Wait()
}

func (r *request) undoStep(ctx context.Context, s *step) {
	if err := r.client.Delete(ctx, s.claim, exactly(s.claim)); client.IgnoreNotFound(err) != nil && !apierrors.IsConflict(err) {
		ctrl.LoggerFrom(ctx).Error(err, "A reservation that came to nothing could not be deleted, and is left to the claims reconciler", "claim", s.claim.Name)
	}
	r.ledger.Abandon(s.lock)
	s.lock, s.claim = allocator.Lock{}, nil
}

// exactly makes a deletion hit this very object in this very version, or fail.
func exactly(obj client.Object) client.Preconditions {
	return client.Preconditions{UID: ptr.To(obj.GetUID()), ResourceVersion: ptr.To(obj.GetResourceVersion())}
}

// isShortage says whether an error of Grant tells that the policy has nothing to give, rather than that something broke.
func isShortage(err error) bool {
	return errors.Is(err, allocator.ErrExhausted) || errors.Is(err, allocator.ErrNotUsable) || errors.Is(err, allocator.ErrNoRange)
}
