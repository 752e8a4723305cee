package programmed

import (
	"context"
	"fmt"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// patience is how many heartbeats of an agent may be missing in a row.
const patience = 3

// reasonSilent is the reason of a NodeProxyState's condition Ready while it is Unknown.
const reasonSilent = "AgentSilent"

// silence tells of agents that do not report any more, by the condition Ready of their NodeProxyState: what else it says would be taken for the present. The
// agent takes the condition back with its next report. What counts is when this process saw a heartbeat change, so clocks need not agree, and an agent has all of
// the time again after a change of leaders. One request is one NodeProxyState.
type silence struct {
	client client.Client

	mu    sync.Mutex
	heard map[types.NamespacedName]heartbeat
}

// heartbeat is the last sign of life of an agent.
type heartbeat struct {
	of   types.UID
	sent metav1.Time // by the node's clock
	seen time.Time
}

func newSilence(c client.Client) *silence {
	return &silence{client: c, heard: map[types.NamespacedName]heartbeat{}}
}

// +kubebuilder:rbac:groups=networking.serviceproxy.io,resources=nodeproxystates/status,verbs=patch

func (s *silence) setupWithManager(mgr ctrl.Manager) error {
	beats := predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		before, ok := e.ObjectOld.(*v1alpha1.NodeProxyState)
		after, alsoOK := e.ObjectNew.(*v1alpha1.NodeProxyState)
		return ok && alsoOK && (before.UID != after.UID || !before.Status.HeartbeatTime.Equal(after.Status.HeartbeatTime))
	}}
	return ctrl.NewControllerManagedBy(mgr).
		Named("agentsilence").
		For(&v1alpha1.NodeProxyState{}, builder.WithPredicates(beats)).
		Complete(s)
}

// Reconcile notes a heartbeat, or its absence for too long.
func (s *silence) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	var state v1alpha1.NodeProxyState
	if err := s.client.Get(ctx, req.NamespacedName, &state); client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("get NodeProxyState: %w", err)
	}
	if state.UID == "" || !ours(&state) || state.Status.HeartbeatTime == nil { // an agent that never reported shows by an empty status
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.heard, req.NamespacedName)
		return ctrl.Result{}, nil
	}
	if left := s.left(req.NamespacedName, &state); left > 0 {
		return ctrl.Result{RequeueAfter: left}, nil
	}
	silent := state.DeepCopy()
	if !meta.SetStatusCondition(&silent.Status.Conditions, metav1.Condition{
		Type: v1alpha1.NodeProxyReady, Status: metav1.ConditionUnknown, Reason: reasonSilent,
		Message: fmt.Sprintf("the agent has not reported since %s (its node's clock): what the kernel held then still forwards, what changed since does not reach it; "+
			"is the agent's Pod running on the node, and can it reach the API server?", state.Status.HeartbeatTime.UTC().Format(time.RFC3339)),
	}) {
		return ctrl.Result{}, nil // told already; the next heartbeat comes as an event
	}
	// The lock, because a report may come at this very moment.
	if err := s.client.Status().Patch(ctx, silent, client.MergeFromWithOptions(&state, client.MergeFromWithOptimisticLock{})); client.IgnoreNotFound(err) != nil {
		return ctrl.Result{}, fmt.Errorf("set condition Ready of a silent agent: %w", err)
	}
	ctrl.LoggerFrom(ctx).Info("An agent does not report any more", "node", state.Name, "last", state.Status.HeartbeatTime)
	return ctrl.Result{}, nil
}

// left gives how long the agent may still be silent, and notes its heartbeat if it is a new one.
func (s *silence) left(name types.NamespacedName, state *v1alpha1.NodeProxyState) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.heard[name]
	if last.of != state.UID || !last.sent.Equal(state.Status.HeartbeatTime) {
		last = heartbeat{state.UID, *state.Status.HeartbeatTime, time.Now()}
		s.heard[name] = last
	}
	return patience*state.Spec.HeartbeatInterval() - time.Since(last.seen)
}
