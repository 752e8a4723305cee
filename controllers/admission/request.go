package admission

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// request is one admission request being served.
type request struct {
	*Handler
	svc, old *corev1.Service // as they arrived; old is nil on CREATE
	dryRun   bool
	holder   allocator.Holder
	policy   *allocator.Policy // nil if none covers the Service, or if that cannot be told
	plan     plan
	steps    []step // one for each want of the plan
	// token is what ties the request to its claims. again says that the request came by before, with it.
	token string
	again bool
	// degraded says why the Service does without its second family, empty if it does not.
	degraded string
	warnings []string
}

// step is one want on its way.
type step struct {
	want
	route
	// lock is what it got. Without one, the API server takes what is named, or chooses itself.
	lock allocator.Lock
	// claim is the claim made for this request, now or, if found, when it came by before; nil if none.
	claim *v1alpha1.AllocationClaim
	found bool
	// err is why nothing could be claimed.
	err error
}

// serve does all that the request needs. It returns the outcome, and the reason if it is a denial.
func (r *request) serve(ctx context.Context) (string, *metav1.Status) {
	ready, denied := r.prepare(ctx)
	if !ready || denied != nil {
		return r.outcome(denied), denied
	}
	for i := range r.steps {
		s := &r.steps[i]
		s.route = routeOf(s.want, r.policy, r.ledger.Owner)
		if s.denial != "" && denied == nil {
			denied = deny(http.StatusForbidden, "%s", s.denial)
		}
	}
	if r.dryRun {
		r.tell()
		r.steps = nil
		return r.outcome(denied), denied
	}
	// undo has time of its own.
	claiming, cancel := context.WithTimeout(ctx, claimTimeout)
	defer cancel()
	r.identify(claiming)
	if denied != nil {
		r.undo(ctx) // what it got when it came by before
		return outcomeDenied, denied
	}
	if r.claimAll(claiming) {
		r.undo(ctx)
		r.steps = nil
		return outcomeUnchanged, nil // the API server answers that it exists
	}
	if denied := r.settle(); denied != nil {
		r.undo(ctx)
		return outcomeDenied, denied
	}
	r.steer(ctx)
	r.tell()
	return r.outcome(nil), nil
}

// prepare finds out which policy covers the Service and what the request wants. It says false if there is nothing to do.
func (r *request) prepare(ctx context.Context) (bool, *metav1.Status) {
	served := r.ledger.Families()
	if len(served) > 0 {
		// Most updates want nothing, whatever the policy says.
		if p, ok := newPlan(r.svc, r.old, served, served[0]); !ok || len(p.wants) == 0 {
			return false, nil
		}
	}
	policy, err := r.ledger.Covering(ctx, r.svc)
	if err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "Which policy covers a Service cannot be told", "namespace", r.holder.Namespace, "name", r.holder.Name)
		r.warn("which policy covers the Service cannot be told now (%v), so it gets nothing that a policy declares", err)
	}
	r.policy = policy
	if len(served) == 0 {
		const unknown = "the API server's own ranges are not known yet"
		if policy != nil && policy.Strict {
			return false, deny(http.StatusServiceUnavailable, "%s, and policy %s is Strict: try again in a few seconds", unknown, policy.Name)
		}
		r.warn("%s, so it chooses the Service's addresses itself", unknown)
		return false, nil
	}
	r.plan, _ = newPlan(r.svc, r.old, served, firstFamily(policy, served))
	for _, w := range r.plan.wants {
		r.steps = append(r.steps, step{want: w})
	}
	return true, nil
}

// identify gives the request its token: the one it came with if that is of a claim reserved for this very request, a new one otherwise. It finds the claims that the
// request got when it came by before.
func (r *request) identify(ctx context.Context) {
	r.token = rand.Text()
	stamped := r.strangeToken()
	if stamped == "" {
		return
	}
	var wg sync.WaitGroup
	for i := range r.steps {
		if s := &r.steps[i]; s.isNamed() {
			wg.Go(func() { r.recall(ctx, s, stamped) })
		}
	}
	wg.Wait()
	if slices.ContainsFunc(r.steps, func(s step) bool { return s.found }) {
		r.token, r.again = stamped, true
	}
}

// recall finds the claim on what is named if it was made for this request. One in the cache that was is as good as one that is read: only this request made one with
// its token. One that was not may be out of date: another replica made the claim a moment ago.
func (r *request) recall(ctx context.Context, s *step, token string) {
	have := r.ledger.Claim(s.named)
	if have == nil || !r.isOurs(have, token) {
		have = &v1alpha1.AllocationClaim{}
		if err := r.live.Get(ctx, client.ObjectKey{Name: s.named.Name()}, have); err != nil {
			return // if it is there, recording it finds it
		}
	}
	if r.isOurs(have, token) {
		s.lock, s.claim, s.found = s.named, have, true
	}
}

// strangeToken is the token that came with the request, unless it is the one that the Service has from when it was created.
func (r *request) strangeToken() string {
	stamped := r.svc.Annotations[v1alpha1.AnnotationReservation]
	if r.old != nil && r.old.Annotations[v1alpha1.AnnotationReservation] == stamped {
		return ""
	}
	return stamped
}

// settle decides about every step that came to nothing: it is steered, dropped, or the request denied.
func (r *request) settle() *metav1.Status {
	for i := range r.steps {
		s := &r.steps[i]
		if s.err == nil {
			continue
		}
		if reserved, ok := errors.AsType[*reservedError](s.err); ok {
			return deny(http.StatusUnprocessableEntity, "%s", reserved.Error())
		}
		remedy := "try again"
		switch {
		case errors.Is(s.err, allocator.ErrNotUsable):
			remedy = "try again in a few seconds, or see the policy's condition RangesReady"
		case errors.Is(s.err, allocator.ErrExhausted) && s.family == "":
			remedy = "widen spec.nodePortRange of the policy, or delete Services that nobody needs"
		case errors.Is(s.err, allocator.ErrExhausted):
			remedy = "add a range to spec.serviceRanges of the policy, or delete Services that nobody needs"
		}
		switch {
		case s.source == recorded && !r.policy.Strict:
			// The record is made when the Service is there.
			s.route = route{warning: fmt.Sprintf("%s: %s could not be reserved: %v", s.field(), s.named, s.err)}
		case isShortage(s.err):
			s.route = fallback(s.want, r.policy, s.err.Error(), remedy)
		case r.policy.Strict:
			return deny(http.StatusServiceUnavailable, "%s: policy %s is Strict, and nothing can be reserved now: %v; try again", s.field(), r.policy.Name, s.err)
		default:
			s.route = route{source: steered, warning: fmt.Sprintf("policy %s: %v", r.policy.Name, s.err)}
		}
		if s.denial != "" {
			return deny(http.StatusForbidden, "%s", s.denial)
		}
	}
	return nil
}

// steer fills in what no policy declares. Where the ledger has nothing to propose the API server chooses.
func (r *request) steer(ctx context.Context) {
	unfilled := false
	for i := range r.steps {
		s := &r.steps[i]
		if s.source == steered {
			grant, err := r.ledger.Grant(allocator.Request{Family: s.family, Use: s.use, Holder: r.holder})
			if err == nil {
				s.lock = grant.Lock
			} else if !errors.Is(err, allocator.ErrNoRange) {
				ctrl.LoggerFrom(ctx).Error(err, "Nothing to steer a Service to", "namespace", r.holder.Namespace, "name", r.holder.Name, "field", s.field())
			}
		}
		if unfilled && s.family != "" && s.lock != (allocator.Lock{}) { // clusterIPs has no gaps: if the API server chooses the first, it chooses both
			if s.claim != nil {
				s.route = route{source: steered, warning: fmt.Sprintf("policy %s has no say in the Service's first family", r.policy.Name)}
				r.undoStep(ctx, s)
			}
			s.lock = allocator.Lock{}
		}
		unfilled = unfilled || s.family != "" && !s.isNamed() && s.lock == allocator.Lock{} && s.source != dropped
	}
}

// tell warns whoever made the request of what did not go as declared.
func (r *request) tell() {
	for _, s := range r.steps {
		switch {
		case s.warning == "":
		case s.source == dropped:
			r.degraded = s.warning
			r.warn("%s: ipFamilyPolicy PreferDualStack falls back to SingleStack", s.warning)
		case s.source != steered || r.dryRun:
			r.warn("%s", s.warning)
		case s.lock == allocator.Lock{}:
			r.warn("%s; the API server chooses %s", s.warning, s.field())
		default:
			r.warn("%s; the Service gets %s, which no policy declares", s.warning, s.lock)
		}
	}
}

func (r *request) warn(format string, args ...any) {
	r.warnings = append(r.warnings, fmt.Sprintf(format, args...))
}

// outcome is what the request came to, for the metrics.
func (r *request) outcome(denied *metav1.Status) string {
	switch {
	case denied != nil:
		return outcomeDenied
	case slices.ContainsFunc(r.steps, func(s step) bool { return s.claim != nil && !s.found }):
		return outcomeAllocated
	case slices.ContainsFunc(r.steps, func(s step) bool { return s.source == steered && s.lock != allocator.Lock{} }):
		return outcomeSteered
	}
	return outcomeUnchanged
}
