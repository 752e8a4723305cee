package programmed

import (
	"context"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// fieldManager owns the condition Programmed, nodes and observedGeneration of every assignment's status, and nothing else.
const fieldManager = "serviceproxy-programmed"

// statusWriter writes the tracker's verdicts. One request is one assignment.
type statusWriter struct {
	client  client.Client
	tracker *tracker
	metrics *instruments
}

// +kubebuilder:rbac:groups=networking.serviceproxy.io,resources=serviceassignments,verbs=get;list;watch
// +kubebuilder:rbac:groups=networking.serviceproxy.io,resources=serviceassignments/status,verbs=patch
// +kubebuilder:rbac:groups=discovery.k8s.io,resources=endpointslices,verbs=get;list;watch

// Reconcile brings the status of one assignment to what the tracker wants by now.
func (s *statusWriter) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	w, ok := s.tracker.toWrite(req.NamespacedName)
	if !ok {
		return ctrl.Result{}, nil
	}
	if w.transition.IsZero() {
		w.transition = metav1.Now()
	}
	o := statusApplyConfiguration(w)
	// Forced, because whoever else set these fields has no say in them.
	err := s.client.Status().Apply(ctx, client.ApplyConfigurationFromUnstructured(o), client.FieldOwner(fieldManager), client.ForceOwnership)
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		// Deleted, or deleted and created again with another UID: the feed brings that, and with it a new verdict.
		return ctrl.Result{}, nil
	}
	if err != nil {
		return ctrl.Result{}, fmt.Errorf("apply status: %w", err)
	}
	s.tracker.wrote(w, parseRevision(o.GetResourceVersion()))
	if w.verdict.reason == ReasonProgrammed && !w.since.IsZero() {
		s.metrics.duration.Observe(time.Since(w.since).Seconds())
	}
	return ctrl.Result{}, nil
}

// statusApplyConfiguration is the fields that fieldManager owns. The UID makes the API server refuse them for another
// assignment of the same name.
func statusApplyConfiguration(w statusWrite) *unstructured.Unstructured {
	o := &unstructured.Unstructured{Object: map[string]any{
		"status": map[string]any{
			"observedGeneration": w.generation,
			"nodes":              map[string]any{"desired": int64(w.verdict.desired), "programmed": int64(w.verdict.programmed)},
			"conditions": []any{map[string]any{
				"type":               v1alpha1.AssignmentProgrammed,
				"status":             string(w.verdict.status()),
				"reason":             w.verdict.reason,
				"message":            w.verdict.message,
				"observedGeneration": w.generation,
				"lastTransitionTime": w.transition.UTC().Format(time.RFC3339),
			}},
		},
	}}
	o.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind("ServiceAssignment"))
	o.SetNamespace(w.key.Namespace)
	o.SetName(w.key.Name)
	o.SetUID(w.uid)
	return o
}
