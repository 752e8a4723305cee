package admission

import (
	"context"

	corev1 "k8s.io/api/core/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// Ledger is what admission needs of this process's view of policies and locks. It is a cache: it proposes, and the claim that is created decides.
// All methods may be called concurrently.
type Ledger interface {
	// Covering finds the policy that covers the Service, nil if none does. It fails while that cannot be known.
	Covering(ctx context.Context, svc *corev1.Service) (*allocator.Policy, error)
	// Families are the address families of which the API server gives Services addresses, its default first. Empty while unknown.
	Families() []v1alpha1.IPFamily
	// Grant proposes a free lock, and proposes it to nobody else until Took or Abandon is called or a minute has passed.
	//
	// A request without a policy is for a Service that no policy covers, or that its policy cannot serve: the lock lies outside everything that any policy declares.
	// No claim is to be made on it, and neither Took nor Abandon called. Such a request fails with ErrNoRange if the API server
	// may choose for itself, because it cannot choose what a policy declares, or because its own ranges are not known yet.
	Grant(allocator.Request) (allocator.Grant, error)
	// Taking says that the process is about to claim a lock that the request itself names.
	Taking(allocator.Lock, allocator.Hold)
	// Took says that the claim was made, Abandon that it was not or is not there any more.
	Took(allocator.Lock, allocator.Hold)
	Abandon(allocator.Lock)
	// Claim is the claim on a lock as last seen, nil if none was. It must not be changed.
	Claim(allocator.Lock) *v1alpha1.AllocationClaim
	// Owner names the policy that declares a lock, the oldest if several do, and the range as the policy has it. Empty if none does.
	Owner(allocator.Lock) (policy, declared string)
}
