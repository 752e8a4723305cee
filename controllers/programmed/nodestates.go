package programmed

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/ptr"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/priorityqueue"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

const (
	managedByLabel = "app.kubernetes.io/managed-by"
	// nodeStateWrites is how many NodeProxyStates are created or rewritten per second at most: when the report interval
	// changes its step, or a policy its ranges, all 5 000 of a large cluster are rewritten within 50 s.
	nodeStateWrites = 100
)

// nodeStates keeps one NodeProxyState per Node, with the present report interval and the ranges that policies declare for the node. One request is one Node's name.
type nodeStates struct {
	client   client.Client
	live     client.Reader
	limiter  *rate.Limiter
	interval atomic.Int64 // nanoseconds; 0 until the feed knows how many nodes there are
	rewrite  chan event.GenericEvent
	declared *declarations
}

// ours reports whether this operator created a NodeProxyState. Others are never changed or deleted.
func ours(s *v1alpha1.NodeProxyState) bool { return s.Labels[managedByLabel] == v1alpha1.ManagedBy }

func newNodeStates(mgr ctrl.Manager) *nodeStates {
	return &nodeStates{
		client:   mgr.GetClient(),
		live:     mgr.GetAPIReader(),
		limiter:  rate.NewLimiter(nodeStateWrites, nodeStateWrites),
		rewrite:  make(chan event.GenericEvent),
		declared: newDeclarations(),
	}
}

func (r *nodeStates) setupWithManager(mgr ctrl.Manager) error {
	// A Node matters here only by being there and by its labels, and heartbeats update it all the time. The same holds for reports.
	comesOrGoes := predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		return e.ObjectOld.GetUID() != e.ObjectNew.GetUID()
	}}
	return ctrl.NewControllerManagedBy(mgr).
		Named("nodeproxystate").
		For(&v1alpha1.NodeProxyState{}, builder.WithPredicates(predicate.Or(comesOrGoes, predicate.GenerationChangedPredicate{}, predicate.LabelChangedPredicate{}))).
		Watches(&corev1.Node{}, &handler.EnqueueRequestForObject{}, builder.WithPredicates(predicate.Or(comesOrGoes, predicate.LabelChangedPredicate{}))).
		Watches(&v1alpha1.ServiceProxyPolicy{}, r.policyHandler()).
		WatchesRawSource(source.Channel(r.rewrite, handler.Funcs{GenericFunc: enqueueLast})).
		Complete(r)
}

// enqueueLast lets a new Node go before the rewriting of all others.
func enqueueLast(_ context.Context, e event.GenericEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
	req := reconcile.Request{NamespacedName: client.ObjectKeyFromObject(e.Object)}
	if pq, ok := q.(priorityqueue.PriorityQueue[reconcile.Request]); ok {
		pq.AddWithOpts(priorityqueue.AddOpts{Priority: ptr.To(handler.LowPriority)}, req)
		return
	}
	q.Add(req)
}

// +kubebuilder:rbac:groups="",resources=nodes,verbs=get;list;watch
// +kubebuilder:rbac:groups=networking.serviceproxy.io,resources=nodeproxystates,verbs=get;list;watch;create;patch;delete
// +kubebuilder:rbac:groups=networking.serviceproxy.io,resources=serviceproxypolicies,verbs=get;list;watch

// Reconcile creates, corrects or deletes the NodeProxyState of one Node.
func (r *nodeStates) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	interval := time.Duration(r.interval.Load())
	if interval == 0 {
		return ctrl.Result{RequeueAfter: time.Second}, nil
	}
	var node corev1.Node
	if err := r.client.Get(ctx, req.NamespacedName, &node); client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("get node: %w", err)
	}
	var state v1alpha1.NodeProxyState
	if err := r.client.Get(ctx, req.NamespacedName, &state); client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("get NodeProxyState: %w", err)
	}
	switch exists := state.UID != ""; {
	case !exists && node.UID == "", exists && !ours(&state), !state.DeletionTimestamp.IsZero():
		return ctrl.Result{}, nil
	case exists && (node.UID == "" || !ownedBy(&state, &node)):
		return ctrl.Result{}, r.remove(ctx, &state)
	}
	spec := v1alpha1.NodeProxyStateSpec{ReportInterval: &metav1.Duration{Duration: interval}, ServiceRanges: r.declared.forNode(node.Labels, state.Spec.ServiceRanges)}
	switch {
	case state.UID == "":
		return ctrl.Result{}, r.create(ctx, &node, spec)
	case !equality.Semantic.DeepEqual(state.Spec, spec):
		return ctrl.Result{}, r.tell(ctx, &state, spec)
	}
	return ctrl.Result{}, nil
}

func ownedBy(s *v1alpha1.NodeProxyState, n *corev1.Node) bool {
	for _, o := range s.OwnerReferences {
		if o.UID == n.UID {
			return true
		}
	}
	return false
}

func (r *nodeStates) create(ctx context.Context, n *corev1.Node, spec v1alpha1.NodeProxyStateSpec) error {
	if err := r.limiter.Wait(ctx); err != nil {
		return err
	}
	err := r.client.Create(ctx, &v1alpha1.NodeProxyState{
		ObjectMeta: metav1.ObjectMeta{
			Name:            n.Name,
			Labels:          map[string]string{managedByLabel: v1alpha1.ManagedBy},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: n.Name, UID: n.UID}},
		},
		Spec: spec,
	})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create NodeProxyState: %w", err)
	}
	return nil // if it exists, the cache is about to tell
}

// tell tells a node's agent what is new for it.
func (r *nodeStates) tell(ctx context.Context, s *v1alpha1.NodeProxyState, spec v1alpha1.NodeProxyStateSpec) error {
	if err := r.limiter.Wait(ctx); err != nil {
		return err
	}
	changed := s.DeepCopy()
	changed.Spec = spec
	if err := r.client.Patch(ctx, changed, client.MergeFrom(s)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("set report interval and service ranges: %w", err)
	}
	return nil
}

// remove deletes a NodeProxyState whose Node is gone. It asks the API server, because a cache that lags may not know the Node
// yet, and deletes only the very object that was looked at.
func (r *nodeStates) remove(ctx context.Context, s *v1alpha1.NodeProxyState) error {
	var n corev1.Node
	if err := r.live.Get(ctx, client.ObjectKeyFromObject(s), &n); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("get node: %w", err)
	} else if err == nil && ownedBy(s, &n) {
		return nil
	}
	err := r.client.Delete(ctx, s, client.Preconditions{UID: &s.UID, ResourceVersion: &s.ResourceVersion})
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete NodeProxyState: %w", err)
	}
	return nil
}

// pace sets the interval for all nodes and has those rewritten that have another.
func (r *nodeStates) pace(ctx context.Context, interval time.Duration, names func() []string) {
	if old := time.Duration(r.interval.Swap(int64(interval))); old == interval || old == 0 {
		return // the first time, every Node is in the queue already
	}
	for _, name := range names() {
		select {
		case r.rewrite <- event.GenericEvent{Object: named(name)}:
		case <-ctx.Done():
			return
		}
	}
}

func named(name string) client.Object {
	return &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Name: name}}
}
