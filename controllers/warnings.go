package controllers

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// Reasons of Warning events.
const (
	reasonSingleStack    = "DegradedToSingleStack"
	reasonForeignAddress = "ForeignAddress"
)

// freshService is for how long after its creation a Service is warned about. A restart thus repeats no old warning.
const freshService = 10 * time.Minute

// maxForeign is how many of a Service's foreign addresses and ports a Warning lists.
const maxForeign = 3

// warner tells of what a new Service got that nobody may have wanted, once per Service.
type warner struct {
	recorder events.EventRecorder
	ledger   *ledger

	mu   sync.Mutex
	told map[types.UID]time.Time // when; forgotten when the Service is not fresh any more
}

func newWarner(recorder events.EventRecorder, l *ledger) *warner {
	return &warner{recorder: recorder, ledger: l, told: map[types.UID]time.Time{}}
}

// warn looks at a Service that policy, nil for none, covers.
func (w *warner) warn(svc *corev1.Service, policy *allocator.Policy) {
	now := time.Now()
	if now.Sub(svc.CreationTimestamp.Time) > freshService {
		return
	}
	degraded := policy != nil && svc.Annotations[v1alpha1.AnnotationSingleStack] != "" && len(clusterAddrs(svc)) == 1
	foreign := w.foreign(svc, policy)
	if !degraded && len(foreign) == 0 || !w.first(svc.UID, now) {
		return
	}
	if degraded {
		w.recorder.Eventf(svc, nil, corev1.EventTypeWarning, reasonSingleStack, "Allocate", "%s",
			note("the Service prefers two families and got one: "+svc.Annotations[v1alpha1.AnnotationSingleStack]))
	}
	if more := len(foreign) - maxForeign; more > 0 {
		foreign = append(foreign[:maxForeign:maxForeign], fmt.Sprintf("and %d more", more))
	}
	if len(foreign) > 0 { // one event, because the recorder takes a second one of the same reason for a repetition
		w.recorder.Eventf(svc, nil, corev1.EventTypeWarning, reasonForeignAddress, "Allocate", "%s", note(strings.Join(foreign, "; ")))
	}
}

// note cuts what is too long for an event, because the API server would refuse it.
func note(text string) string {
	const limit, rest = 1024, "..."
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(text[:limit-len(rest)], "") + rest
}

// first says whether the Service has not been told of yet.
func (w *warner) first(uid types.UID, now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for other, at := range w.told {
		if now.Sub(at) > freshService {
			delete(w.told, other)
		}
	}
	_, told := w.told[uid]
	w.told[uid] = now
	return !told
}

// foreign says which of the Service's cluster IPs and node ports another policy declares, or lie outside what its own, Strict policy declares. What a Service had before
// the policy it keeps rightly.
func (w *warner) foreign(svc *corev1.Service, policy *allocator.Policy) (out []string) {
	locks := locksOf(svc)
	slices.SortFunc(locks, func(a, b allocator.Lock) int { return a.Addr.Compare(b.Addr) })
	for _, lock := range locks {
		what := "cluster IP " + lock.String()
		if lock.IsPort() {
			what = lock.String()
		}
		owner, declared, since := w.ledger.ownerOf(lock)
		switch {
		case policy != nil && declares(policy, lock):
		case owner != "" && !since.After(svc.CreationTimestamp.Time):
			by := "no policy covers the Service"
			if policy != nil {
				by = "policy " + policy.Name + " covers the Service"
			}
			out = append(out, fmt.Sprintf("%s lies in %s of policy %s, and %s; it stays, and that policy counts it as foreign", what, declared, owner, by))
		case policy != nil && policy.Strict && declaresAny(policy, lock) && !policy.Created.After(svc.CreationTimestamp.Time):
			out = append(out, fmt.Sprintf("%s lies outside what policy %s, whose enforcement is Strict, declares; it stays", what, policy.Name))
		}
	}
	return out
}

// declares says whether a lock lies in what the policy declares for cluster IPs or node ports.
func declares(policy *allocator.Policy, lock allocator.Lock) bool {
	if lock.IsPort() {
		return policy.NodePorts.Contains(lock.Port)
	}
	r := policy.RangeOf(lock.Addr)
	return r != nil && r.Use == v1alpha1.RangeUseClusterIP
}

// declaresAny says whether the policy declares anything of the lock's kind.
func declaresAny(policy *allocator.Policy, lock allocator.Lock) bool {
	if lock.IsPort() {
		return policy.NodePorts.Size() > 0
	}
	return slices.ContainsFunc(policy.Ranges, func(r allocator.Range) bool {
		return r.Use == v1alpha1.RangeUseClusterIP && allocator.FamilyOf(r.Prefix.Addr()) == allocator.FamilyOf(lock.Addr)
	})
}

// ownerOf names the policy that declares a lock, what it declares, and since when the policy exists. Empty if none does.
func (l *ledger) ownerOf(lock allocator.Lock) (policy, declared string, since time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refresh(time.Now())
	if policy, declared = l.space.Owner(lock); policy != "" {
		since = l.policies[policy].parsed.Created
	}
	return policy, declared, since
}
