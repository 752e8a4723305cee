package controllers

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/admission"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// steeredFor is how long a lock that was chosen for a Service which no policy gives anything is kept from others. By then the request has come to an end and its
// IPAddress, or the Service with its node port, has been seen; one of a slower request may be proposed again, and the API server refuses the second.
const steeredFor = 10 * time.Second

// steered are the locks that the API server was told to give and that no informer has shown yet.
type steered struct {
	since map[allocator.Lock]time.Time
	order []steering // oldest first; what since does not have, or later, is over
}

type steering struct {
	lock  allocator.Lock
	since time.Time
}

func (s *steered) add(lock allocator.Lock, now time.Time) {
	s.since[lock] = now
	s.order = append(s.order, steering{lock, now})
}

// forget says that the lock is shown, or gone.
func (s *steered) forget(lock allocator.Lock) { delete(s.since, lock) }

// expired removes and returns the locks that nobody has seen for too long.
func (s *steered) expired(before time.Time) (out []allocator.Lock) {
	for len(s.order) > 0 && s.order[0].since.Before(before) {
		first := s.order[0]
		s.order = s.order[1:]
		if s.since[first.lock].Equal(first.since) {
			delete(s.since, first.lock)
			out = append(out, first.lock)
		}
	}
	return out
}

// admissionLedger is the ledger as admission sees it, in a replica that leads or not.
type admissionLedger struct {
	ledger       *ledger
	cached, live client.Reader
}

var _ admission.Ledger = admissionLedger{}

// Covering implements admission.Ledger.
func (a admissionLedger) Covering(ctx context.Context, svc *corev1.Service) (*allocator.Policy, error) {
	if err := a.ledger.ready(nil); err != nil {
		return nil, err
	}
	if !allocator.Coverable(svc) {
		return nil, nil
	}
	namespace, err := a.namespace(ctx, svc.Namespace)
	if err != nil {
		return nil, err
	}
	current := ""
	if svc.UID != "" { // an update; a Service on its way in has no policy yet, whatever one of its name had
		var assignment *v1alpha1.ServiceAssignment
		found, err := get(ctx, a.cached, client.ObjectKeyFromObject(svc), &assignment)
		if err != nil {
			return nil, err
		}
		if found && assignment.Spec.ServiceUID == svc.UID {
			current = assignment.Spec.PolicyName
		}
	}
	policy, _, err := a.ledger.covering(svc, namespace.Labels, current)
	return policy, err
}

// namespace reads from the cache, and live what the cache has not seen: a Service often follows its namespace within a millisecond.
func (a admissionLedger) namespace(ctx context.Context, name string) (*corev1.Namespace, error) {
	for _, from := range []client.Reader{a.cached, a.live} {
		var namespace *corev1.Namespace
		if found, err := get(ctx, from, types.NamespacedName{Name: name}, &namespace); err != nil || found {
			return namespace, err
		}
	}
	return nil, fmt.Errorf("namespace %s does not exist", name)
}

// Families implements admission.Ledger.
func (a admissionLedger) Families() []v1alpha1.IPFamily {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	return a.ledger.families()
}

// families are those of the API server's default ServiceCIDR, or if somebody deleted that, of all that no policy made. Callers hold mu.
func (l *ledger) families() (out []v1alpha1.IPFamily) {
	add := func(c registration) {
		for _, p := range c.prefixes {
			if family := allocator.FamilyOf(p.Addr()); !c.ours && !slices.Contains(out, family) {
				out = append(out, family)
			}
		}
	}
	if add(l.cidrs[defaultServiceCIDR]); len(out) > 0 {
		return out
	}
	for _, name := range l.cidrNames() {
		add(l.cidrs[name])
	}
	return out
}

// serves says whether Services of this cluster can have addresses of the range's family, and yes while that is not known. Callers hold mu.
func (l *ledger) serves(prefix netip.Prefix) bool {
	families := l.families()
	return len(families) == 0 || slices.Contains(families, allocator.FamilyOf(prefix.Addr()))
}

// Grant implements admission.Ledger. It puts nobody on a waiting list: a request that is refused leaves nothing that could wait, and the reconciler of a Service that
// came to be without what it is owed does.
func (a admissionLedger) Grant(r allocator.Request) (allocator.Grant, error) {
	if err := a.ledger.ready(nil); err != nil {
		return allocator.Grant{}, err
	}
	l := a.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	l.refresh(now)
	if r.Policy != "" {
		return l.propose(r, now)
	}
	l.forgetSteered(now)
	r.Odd = l.serviceQueue != nil // which only the leader's is
	g, err := l.space.Grant(r)
	if err == nil {
		l.steered.add(g.Lock, now)
	}
	return g, err
}

// forgetSteered gives back what was chosen for requests that came to nothing. Callers hold mu.
func (l *ledger) forgetSteered(now time.Time) {
	for _, lock := range l.steered.expired(now.Add(-steeredFor)) {
		l.space.SetTaken(lock, false)
	}
}

// Taking implements admission.Ledger. A request proves nothing: what another's claim says stays as it is known, or its holder would be taken for one that lost it.
func (a admissionLedger) Taking(lock allocator.Lock, h allocator.Hold) {
	l := a.ledger
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pending[lock] = pending{since: time.Now()}
	if _, held := l.space.Held(lock); !held {
		l.space.Hold(lock, h)
	}
}

// Took implements admission.Ledger.
func (a admissionLedger) Took(lock allocator.Lock, h allocator.Hold) { a.ledger.took(lock, h) }

// Abandon implements admission.Ledger.
func (a admissionLedger) Abandon(lock allocator.Lock) { a.ledger.abandon(lock) }

// Claim implements admission.Ledger.
func (a admissionLedger) Claim(lock allocator.Lock) *v1alpha1.AllocationClaim {
	return a.ledger.claim(lock)
}

// Owner implements admission.Ledger.
func (a admissionLedger) Owner(lock allocator.Lock) (policy, declared string) {
	a.ledger.mu.Lock()
	defer a.ledger.mu.Unlock()
	a.ledger.refresh(time.Now())
	return a.ledger.space.Owner(lock)
}

// nowhere chooses a cluster IP, of the API server's default family, that lies in nobody's range. Not ok where the API server may choose for itself.
func (a admissionLedger) nowhere() (netip.Addr, bool) {
	families := a.Families()
	if len(families) == 0 {
		return netip.Addr{}, false
	}
	g, err := a.Grant(allocator.Request{Family: families[0], Use: v1alpha1.ClaimUseClusterIP})
	return g.Lock.Addr, err == nil
}
