package audit

import (
	"fmt"
	"slices"
	"sync"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// Trail follows claims as they change, and finds each that was let go while the Service that it was Bound to lived. Its zero value is ready.
type Trail struct {
	mu     sync.Mutex
	bound  map[string]v1alpha1.ClaimHolder // by claim
	ending map[types.UID]bool
	faults []string
}

// Ending says that a Service is about to be deleted: from now on its claims may go.
func (t *Trail) Ending(service types.UID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ending == nil {
		t.ending = map[types.UID]bool{}
	}
	t.ending[service] = true
}

// See takes what a watch of claims says, in its order.
func (t *Trail) See(event watch.EventType, claim *v1alpha1.AllocationClaim) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.bound == nil {
		t.bound = map[string]v1alpha1.ClaimHolder{}
	}
	before, wasBound := t.bound[claim.Name]
	bound := event != watch.Deleted && claim.Spec.State == v1alpha1.ClaimBound
	if wasBound && !t.ending[before.UID] && (!bound || claim.Spec.Holder.UID != before.UID) {
		t.faults = append(t.faults, fmt.Sprintf("%s: was let go (%s, %s) while %s/%s lives", claim.Name, event, says(claim), before.Namespace, before.Name))
	}
	if bound {
		t.bound[claim.Name] = claim.Spec.Holder
	} else {
		delete(t.bound, claim.Name)
	}
}

// Faults are those so far.
func (t *Trail) Faults() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.faults)
}
