package programmed

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	toolscache "k8s.io/client-go/tools/cache"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

const (
	// evaluationInterval is the shortest time between two evaluations: reports of many nodes are looked at together.
	evaluationInterval = 100 * time.Millisecond
	// statusWriters is how many assignments' status are written at the same time.
	statusWriters = 8
)

// Options changes what SetupWithManager does. Its zero value is what a controller in a cluster needs.
type Options struct {
	// Registerer takes the metrics. Default: controller-runtime's registry.
	Registerer prometheus.Registerer
}

// SetupWithManager adds the controllers of this package to mgr, whose scheme must know core/v1, discovery/v1 and v1alpha1. They
// run on the leader only. The caches of Nodes, EndpointSlices, ServiceAssignments, ServiceProxyPolicies and NodeProxyStates are the manager's;
// managedFields may be stripped from them.
func SetupWithManager(mgr ctrl.Manager, opts Options) error {
	if opts.Registerer == nil {
		opts.Registerer = metrics.Registry
	}
	instruments, err := newInstruments(opts.Registerer)
	if err != nil {
		return err
	}
	states := newNodeStates(mgr)
	if err := states.setupWithManager(mgr); err != nil {
		return fmt.Errorf("set up NodeProxyState controller: %w", err)
	}
	if err := newSilence(mgr.GetClient()).setupWithManager(mgr); err != nil {
		return fmt.Errorf("set up controller of silent agents: %w", err)
	}
	f := &feed{
		cache:   mgr.GetCache(),
		tracker: newTracker(),
		states:  states,
		metrics: instruments,
		writes:  make(chan event.GenericEvent),
		wake:    make(chan struct{}, 1),
	}
	err = ctrl.NewControllerManagedBy(mgr).
		Named("programmed").
		WithOptions(controller.Options{MaxConcurrentReconciles: statusWriters}).
		WatchesRawSource(source.Channel(f.writes, &handler.EnqueueRequestForObject{})).
		Complete(&statusWriter{client: mgr.GetClient(), tracker: f.tracker, metrics: instruments})
	if err != nil {
		return fmt.Errorf("set up Programmed controller: %w", err)
	}
	return mgr.Add(f)
}

// feed brings what happens in the cluster and the time to the tracker, and its verdicts to the controllers.
type feed struct {
	cache   cache.Cache
	tracker *tracker
	states  *nodeStates
	metrics *instruments
	writes  chan event.GenericEvent
	wake    chan struct{}
}

// Start runs until ctx ends. It evaluates nothing before every object that exists is known: with half of the nodes, an
// assignment would look programmed.
func (f *feed) Start(ctx context.Context) error {
	synced, err := f.watch(ctx)
	if err != nil {
		return err
	}
	if !toolscache.WaitForCacheSync(ctx.Done(), synced...) {
		return nil // ctx ended
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-f.wake:
		case <-timer.C:
		}
		next := f.evaluate(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(evaluationInterval):
		}
		if !next.IsZero() {
			timer.Reset(time.Until(next))
		}
	}
}

// evaluate passes on what the tracker decides now, and returns when to do so again at the latest (zero: any time).
func (f *feed) evaluate(ctx context.Context) time.Time {
	nodes, longest := f.tracker.counts()
	current := time.Duration(f.states.interval.Load())
	if current == 0 {
		current = longest // the step of the controller's earlier life
	}
	f.states.pace(ctx, nextInterval(current, nodes), f.tracker.nodeNames)

	due, next := f.tracker.evaluate(time.Now())
	for _, key := range due {
		f.write(ctx, key)
	}
	pending, latched := f.tracker.waiting()
	f.metrics.pending.Set(float64(pending))
	f.metrics.programmed.Set(float64(latched))
	return next
}

func (f *feed) write(ctx context.Context, key types.NamespacedName) {
	o := &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name}}
	select {
	case f.writes <- event.GenericEvent{Object: o}:
	case <-ctx.Done():
	}
}

// watch feeds the tracker with all Nodes, NodeProxyStates, EndpointSlices and ServiceAssignments from now on. The functions
// that it returns tell whether those that exist have been fed.
func (f *feed) watch(ctx context.Context) ([]toolscache.InformerSynced, error) {
	t := f.tracker
	var synced []toolscache.InformerSynced
	var errs error
	add := func(o client.Object, h toolscache.ResourceEventHandler) {
		informer, err := f.cache.GetInformer(ctx, o)
		if err != nil {
			errs = errors.Join(errs, fmt.Errorf("watch %T: %w", o, err))
			return
		}
		registration, err := informer.AddEventHandler(h)
		if err != nil {
			errs = errors.Join(errs, fmt.Errorf("watch %T: %w", o, err))
			return
		}
		synced = append(synced, registration.HasSynced)
	}
	add(&corev1.Node{}, feeding(f,
		func(n *corev1.Node, _ bool) { t.setNode(n) },
		func(n *corev1.Node) { t.deleteNode(n.Name) }))
	add(&v1alpha1.NodeProxyState{}, feeding(f,
		func(s *v1alpha1.NodeProxyState, _ bool) { t.setState(s) },
		func(s *v1alpha1.NodeProxyState) { t.deleteState(s.Name) }))
	add(&discoveryv1.EndpointSlice{}, feeding(f,
		func(s *discoveryv1.EndpointSlice, _ bool) { t.setSlice(s) },
		func(s *discoveryv1.EndpointSlice) { t.deleteSlice(s) }))
	add(&v1alpha1.ServiceAssignment{}, feeding(f,
		func(a *v1alpha1.ServiceAssignment, initial bool) {
			if t.setAssignment(a, time.Now(), !initial) {
				f.write(ctx, client.ObjectKeyFromObject(a))
			}
		},
		func(a *v1alpha1.ServiceAssignment) { t.deleteAssignment(client.ObjectKeyFromObject(a)) }))
	return synced, errs
}

// feeding returns a handler that passes on objects and wakes the feed.
func feeding[T client.Object](f *feed, set func(o T, initial bool), remove func(T)) toolscache.ResourceEventHandler {
	wake := func() {
		select {
		case f.wake <- struct{}{}:
		default:
		}
	}
	return toolscache.ResourceEventHandlerDetailedFuncs{
		AddFunc: func(obj any, initial bool) {
			if o, ok := obj.(T); ok {
				set(o, initial)
				wake()
			}
		},
		UpdateFunc: func(_, obj any) {
			if o, ok := obj.(T); ok {
				set(o, false)
				wake()
			}
		},
		DeleteFunc: func(obj any) {
			if unknown, ok := obj.(toolscache.DeletedFinalStateUnknown); ok {
				obj = unknown.Obj
			}
			if o, ok := obj.(T); ok {
				remove(o)
				wake()
			}
		},
	}
}
