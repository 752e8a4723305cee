package controllers

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"sync"

	"golang.org/x/time/rate"
	"k8s.io/apimachinery/pkg/types"
)

// pace lets Services be labelled and unlabelled one after the other, at a bounded rate and in order of namespace and name: every node's kube-proxy and Kubernetes' EndpointSlice
// controller have work with each of them.
type pace struct {
	limit *rate.Limiter
	// turn has a Service reconciled.
	turn func(types.NamespacedName)

	mu      sync.Mutex
	waiting []types.NamespacedName // sorted
	passed  map[types.NamespacedName]bool
	news    chan struct{} // something waits
}

func newPace(perSecond float64, turn func(types.NamespacedName)) *pace {
	return &pace{limit: rate.NewLimiter(rate.Limit(perSecond), max(1, int(perSecond))), turn: turn, passed: map[types.NamespacedName]bool{}, news: make(chan struct{}, 1)}
}

// pass says whether it is the Service's turn. If not, turn is called for it when it is, and then pass says yes, once.
func (p *pace) pass(key types.NamespacedName) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.passed[key] {
		delete(p.passed, key)
		return true
	}
	if i, waits := slices.BinarySearchFunc(p.waiting, key, byNamespace); !waits {
		p.waiting = slices.Insert(p.waiting, i, key)
	}
	select {
	case p.news <- struct{}{}:
	default:
	}
	return false
}

// forget takes back what a Service that is gone asked for.
func (p *pace) forget(key types.NamespacedName) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.passed, key)
	if i, waits := slices.BinarySearchFunc(p.waiting, key, byNamespace); waits {
		p.waiting = slices.Delete(p.waiting, i, i+1)
	}
}

// Start gives turns until ctx ends. It is a manager's Runnable, for the leader.
func (p *pace) Start(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-p.news:
		}
		for key, more := p.next(ctx); more; key, more = p.next(ctx) {
			p.turn(key)
		}
	}
}

// next waits as the rate demands and gives the first of those that wait by then.
func (p *pace) next(ctx context.Context) (types.NamespacedName, bool) {
	if p.idle() || p.limit.Wait(ctx) != nil { // it fails only because ctx ended
		return types.NamespacedName{}, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.waiting) == 0 {
		return types.NamespacedName{}, false
	}
	key := p.waiting[0]
	p.waiting = slices.Delete(p.waiting, 0, 1)
	p.passed[key] = true
	return key, true
}

func (p *pace) idle() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.waiting) == 0
}

func byNamespace(a, b types.NamespacedName) int {
	return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
}
