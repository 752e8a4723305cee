package admission

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	webhook "sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// Path is where the handler is served.
const Path = "/mutate-services"

// Options are what a Handler works with.
type Options struct {
	Ledger Ledger
	// Client writes claims. Every request waits for it, so it should have no rate limit of its own: the API server has one.
	Client client.Client
	// Live reads past every cache.
	Live client.Reader
}

// Handler answers the API server's admission requests for Services. It may be called concurrently.
type Handler struct {
	ledger  Ledger
	client  client.Client
	live    client.Reader
	metrics *instruments
}

var _ webhook.Handler = &Handler{}

// New makes a Handler. Its metrics belong to the process.
func New(o Options) (*Handler, error) {
	instruments, err := newInstruments(metrics.Registry)
	return &Handler{ledger: o.Ledger, client: o.Client, live: o.Live, metrics: instruments}, err
}

// Handle answers one admission request.
func (h *Handler) Handle(ctx context.Context, req webhook.Request) webhook.Response {
	began := time.Now()
	outcome, response := h.answer(ctx, req)
	h.metrics.observe(string(req.Operation), outcome, time.Since(began))
	return response
}

func (h *Handler) answer(ctx context.Context, req webhook.Request) (string, webhook.Response) {
	if req.Resource.Resource != "services" || req.SubResource != "" || req.Operation != admissionv1.Create && req.Operation != admissionv1.Update {
		return outcomeUnchanged, webhook.Allowed("")
	}
	r := &request{Handler: h, svc: &corev1.Service{}, dryRun: req.DryRun != nil && *req.DryRun}
	if err := json.Unmarshal(req.Object.Raw, r.svc); err != nil {
		return outcomeError, webhook.Errored(http.StatusBadRequest, fmt.Errorf("read the Service: %w", err))
	}
	if req.Operation == admissionv1.Update {
		r.old = &corev1.Service{}
		if err := json.Unmarshal(req.OldObject.Raw, r.old); err != nil {
			return outcomeError, webhook.Errored(http.StatusBadRequest, fmt.Errorf("read the Service as it was: %w", err))
		}
	}
	r.svc.Namespace = req.Namespace
	if r.svc.DeletionTimestamp != nil {
		return outcomeUnchanged, webhook.Allowed("")
	}
	r.holder = allocator.Holder{Namespace: r.svc.Namespace, Name: r.svc.Name}
	if r.old != nil {
		r.svc.UID, r.holder.UID = r.old.UID, string(r.old.UID) // a PUT need not say which it is
	}
	outcome, denied := r.serve(ctx)
	if denied != nil {
		ctrl.LoggerFrom(ctx).V(1).Info("Denied a Service", "namespace", r.holder.Namespace, "name", r.holder.Name, "because", denied.Message)
		return outcome, respond(denied, nil, r.warnings)
	}
	patch, err := r.patch()
	if err != nil {
		r.undo(ctx)
		return outcomeError, webhook.Errored(http.StatusInternalServerError, err)
	}
	return outcome, respond(nil, patch, r.warnings)
}

// respond makes the response: denied if denial is not nil.
func respond(denial *metav1.Status, patch []byte, warnings []string) webhook.Response {
	r := webhook.Response{AdmissionResponse: admissionv1.AdmissionResponse{Allowed: denial == nil, Result: denial, Warnings: warnings}}
	if patch != nil {
		kind := admissionv1.PatchTypeJSONPatch
		r.Patch, r.PatchType = patch, &kind
	}
	return r
}
