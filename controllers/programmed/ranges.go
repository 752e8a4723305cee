package programmed

import (
	"context"
	"net/netip"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/log"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// maxServiceRanges is how many ranges the schema of NodeProxyState takes.
const maxServiceRanges = 4096

// declaration is what one policy declares for nodes: ranges of service IPs of which they drop what goes to an address that no Service has.
type declaration struct {
	nodes  string // the selector, in words that compare
	ranges []netip.Prefix
	// undecided: nobody has said yet whether the policy makes sense as it is now. Nodes keep those of its ranges that they have and get no other, because a range that
	// overlaps the addresses of pods or nodes would cut them off.
	undecided bool

	selector labels.Selector
}

func (d declaration) equal(o declaration) bool {
	return d.nodes == o.nodes && d.undecided == o.undecided && slices.Equal(d.ranges, o.ranges)
}

// declarationOf gives what a policy declares: nothing if it is not accepted or on its way out. LoadBalancer ranges are left out, because their addresses may be of use outside of
// the cluster, too.
func declarationOf(p *v1alpha1.ServiceProxyPolicy) declaration {
	selector, err := metav1.LabelSelectorAsSelector(&p.Spec.NodeSelector)
	if err != nil || p.DeletionTimestamp != nil {
		return declaration{}
	}
	accepted := meta.FindStatusCondition(p.Status.Conditions, v1alpha1.PolicyAccepted)
	undecided := accepted == nil || accepted.ObservedGeneration != p.Generation
	if !undecided && accepted.Status != metav1.ConditionTrue {
		return declaration{}
	}
	d := declaration{undecided: undecided}
	for _, r := range p.Spec.ServiceRanges {
		if prefix, err := netip.ParsePrefix(r.CIDR); err == nil && r.Use != v1alpha1.RangeUseLoadBalancer {
			d.ranges = append(d.ranges, prefix.Masked())
		}
	}
	if len(d.ranges) == 0 {
		return declaration{}
	}
	slices.SortFunc(d.ranges, netip.Prefix.Compare)
	d.selector, d.nodes = selector, selector.String()
	return d
}

// declarations are what all policies declare. Its methods may be called concurrently.
type declarations struct {
	mu       sync.Mutex
	byPolicy map[string]declaration // those that declare something
}

func newDeclarations() *declarations {
	return &declarations{byPolicy: map[string]declaration{}}
}

// set takes over what a policy declares and says whether that changed.
func (d *declarations) set(policy string, to declaration) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.byPolicy[policy].equal(to) {
		return false
	}
	if len(to.ranges) == 0 {
		delete(d.byPolicy, policy)
	} else {
		d.byPolicy[policy] = to
	}
	return true
}

// forNode gives the ranges that a node with these labels should have, canonical and sorted, if it has these now.
func (d *declarations) forNode(node labels.Set, has []string) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var ranges []netip.Prefix
	for _, policy := range d.byPolicy {
		if !policy.selector.Matches(node) {
			continue
		}
		for _, r := range policy.ranges {
			if !policy.undecided || slices.Contains(has, r.String()) {
				ranges = append(ranges, r)
			}
		}
	}
	slices.SortFunc(ranges, netip.Prefix.Compare)
	ranges = slices.Compact(ranges)
	// Leaving a range out only lets its unused addresses be unreachable in another way, while one too many would keep the whole object from being written.
	ranges = ranges[:min(len(ranges), maxServiceRanges)]
	var out []string
	for _, r := range ranges {
		out = append(out, r.String())
	}
	return out
}

// policyHandler has every node looked at, after everything else, when what a policy declares has changed.
func (r *nodeStates) policyHandler() handler.EventHandler {
	look := func(ctx context.Context, policy string, now declaration, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
		if !r.declared.set(policy, now) {
			return
		}
		var nodes corev1.NodeList // from the cache, which knows a Node before anybody is told of it: none is missed
		if err := r.client.List(ctx, &nodes, client.UnsafeDisableDeepCopy); err != nil {
			log.FromContext(ctx).Error(err, "Could not list the cached Nodes; they learn of changed service ranges when they change themselves", "policy", policy)
		}
		for i := range nodes.Items {
			enqueueLast(ctx, event.GenericEvent{Object: named(nodes.Items[i].Name)}, q)
		}
	}
	changed := func(ctx context.Context, o client.Object, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
		if p, ok := o.(*v1alpha1.ServiceProxyPolicy); ok {
			look(ctx, p.Name, declarationOf(p), q)
		}
	}
	return handler.Funcs{
		CreateFunc: func(ctx context.Context, e event.CreateEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			changed(ctx, e.Object, q)
		},
		UpdateFunc: func(ctx context.Context, e event.UpdateEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			changed(ctx, e.ObjectNew, q)
		},
		DeleteFunc: func(ctx context.Context, e event.DeleteEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			look(ctx, e.Object.GetName(), declaration{}, q)
		},
	}
}
