package admission

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// operation is one operation of a JSON patch (RFC 6902). "add" replaces what is there.
type operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// patch is the JSON patch with what was found for the request, nil if it stays as it is.
func (r *request) patch() ([]byte, error) {
	if r.dryRun {
		return nil, nil
	}
	var ops []operation
	set := func(value any, path string, args ...any) {
		ops = append(ops, operation{"add", fmt.Sprintf(path, args...), value})
	}
	had := r.plan.clusterIPs()
	ips := slices.Clone(had)
	for _, s := range r.steps {
		switch {
		case s.isNamed() || s.lock == allocator.Lock{}:
		case s.family != "":
			ips = append(ips, s.lock.Addr.String())
		case s.use == v1alpha1.ClaimUseHealthCheckNodePort:
			set(s.lock.Port, "/spec/healthCheckNodePort")
		default:
			for _, i := range s.ports {
				set(s.lock.Port, "/spec/ports/%d/nodePort", i)
			}
		}
	}
	if len(ips) > len(had) {
		set(ips, "/spec/clusterIPs")
		if r.svc.Spec.ClusterIP != ips[0] {
			set(ips[0], "/spec/clusterIP")
		}
	}
	if r.degraded != "" {
		set(corev1.IPFamilyPolicySingleStack, "/spec/ipFamilyPolicy")
		if len(r.svc.Spec.IPFamilies) > 1 {
			set(r.svc.Spec.IPFamilies[:1], "/spec/ipFamilies")
		}
	}
	ops = append(ops, r.annotate()...)
	if len(ops) == 0 {
		return nil, nil
	}
	return json.Marshal(ops)
}

// annotate puts on the Service what a later look at this request, or a reader, must know, and takes off what came with a copy of another Service.
func (r *request) annotate() (ops []operation) {
	have := r.svc.Annotations
	put, remove := map[string]string{}, []string{}
	claimed := slices.ContainsFunc(r.steps, func(s step) bool { return s.claim != nil })
	if claimed && have[v1alpha1.AnnotationReservation] != r.token {
		put[v1alpha1.AnnotationReservation] = r.token
	} else if !claimed && r.strangeToken() != "" {
		remove = append(remove, v1alpha1.AnnotationReservation)
	}
	dual := slices.ContainsFunc(r.steps, func(s step) bool { return s.family != "" && s.index == 1 && s.source != dropped })
	if r.degraded != "" {
		put[v1alpha1.AnnotationSingleStack] = r.degraded
	} else if _, ok := have[v1alpha1.AnnotationSingleStack]; ok && (dual || r.old == nil && !r.again) {
		remove = append(remove, v1alpha1.AnnotationSingleStack)
	}
	if len(have) == 0 && len(put) > 0 {
		return []operation{{"add", "/metadata/annotations", put}}
	}
	path := func(key string) string { return "/metadata/annotations/" + strings.ReplaceAll(key, "/", "~1") }
	for key, value := range put {
		ops = append(ops, operation{"add", path(key), value})
	}
	for _, key := range remove {
		ops = append(ops, operation{Op: "remove", Path: path(key)})
	}
	return ops
}

// clusterIPs are those that the Service has or asks for.
func (p plan) clusterIPs() []string {
	if p.service == nil {
		return nil
	}
	return p.service.Spec.ClusterIPs
}

// deny makes the status that a denied request is answered with.
func deny(code int32, format string, args ...any) *metav1.Status {
	reason := metav1.StatusReasonForbidden
	switch code {
	case http.StatusUnprocessableEntity:
		reason = metav1.StatusReasonInvalid
	case http.StatusServiceUnavailable:
		reason = metav1.StatusReasonServiceUnavailable
	}
	return &metav1.Status{Status: metav1.StatusFailure, Code: code, Reason: reason, Message: fmt.Sprintf(format, args...)}
}
