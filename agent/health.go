package agent

import (
	"encoding/json"
	"net/http"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
)

const (
	// syncPeriod is how long an update may wait for the kernel without anybody worrying.
	syncPeriod = 30 * time.Second
	// healthTimeout is how long it may wait until the node counts as unhealthy.
	healthTimeout = 2 * syncPeriod
)

// health tells load balancers and the kubelet how this node's proxy is.
type health struct {
	lacks   func() string // what the first sync still waits for, "" if nothing
	leaving func() bool   // the node is going away
	metrics *metrics
	started time.Time

	mu          sync.Mutex
	inherited   bool      // the kernel holds what an earlier run left
	lastUpdated time.Time // when the kernel last held all it should
	since       time.Time // since when an update waits; zero if none does
}

func newHealth(s *store, m *metrics) *health {
	return &health{started: time.Now(), leaving: s.nodeLeaving, metrics: m, lacks: func() string {
		_, _, lacks := s.pending()
		return lacks
	}}
}

// inherits says that the kernel holds what an earlier run left.
func (h *health) inherits() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.inherited = true
}

// updated says that the kernel holds all it should.
func (h *health) updated(at time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lastUpdated, h.since = at, time.Time{}
}

// waiting says that an update is not in the kernel yet.
func (h *health) waiting(since time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.since.IsZero() {
		h.since = since
	}
}

// healthBody is the answer to a probe; kube-proxy's fields keep kube-proxy's names and meaning.
type healthBody struct {
	// LastUpdated is when the kernel last held all it should: now, as long as the answer is a good one.
	LastUpdated time.Time `json:"lastUpdated"`
	CurrentTime time.Time `json:"currentTime"`
	// NodeEligible says that the node is not about to go; only /healthz has it.
	NodeEligible *bool `json:"nodeEligible,omitempty"`
	// Healthy says that no update waits for too long, whatever the node's future.
	Healthy bool `json:"healthy"`
	// Status says the same by family, which kube-proxy programs one by one and this agent together. It is empty before the first time.
	Status map[corev1.IPFamily]familyHealth `json:"status,omitempty"`
	// Problem says what is wrong, or what is still waited for.
	Problem string `json:"problem,omitempty"`
}

type familyHealth struct {
	LastUpdated time.Time `json:"lastUpdated"`
	Healthy     bool      `json:"healthy"`
}

// live says whether the agent does its work. That it waits for the API server does not count: a restart would not help.
func (h *health) live() (healthBody, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	body := healthBody{LastUpdated: h.lastUpdated, CurrentTime: now, Healthy: true}
	if !h.since.IsZero() {
		if waited := now.Sub(h.since); waited >= healthTimeout {
			body.Problem, body.Healthy = "an update has been waiting for the kernel for "+waited.Round(time.Second).String(), false
		}
	}
	if !h.lastUpdated.IsZero() {
		family := familyHealth{h.lastUpdated, body.Healthy}
		body.Status = map[corev1.IPFamily]familyHealth{corev1.IPv4Protocol: family, corev1.IPv6Protocol: family}
	}
	return body, body.Healthy
}

// healthy says whether new traffic should be sent to this node.
func (h *health) healthy() (healthBody, bool) {
	body, ok := h.live()
	eligible := !h.leaving()
	body.NodeEligible = &eligible
	if !eligible {
		body.Problem, ok = "the node is going away", false
	}
	if body.LastUpdated.IsZero() {
		if lacks := h.lacks(); lacks != "" {
			body.Problem = "waiting for " + lacks
		}
		// What an earlier run left in the kernel forwards as well as that of an agent that has lost the API server. Without it the node forwards nothing, which
		// is no surprise just after a boot only.
		h.mu.Lock()
		ok = ok && (h.inherited || body.CurrentTime.Sub(h.started) < healthTimeout)
		h.mu.Unlock()
	}
	return body, ok
}

// ready says whether the kernel has once held all it should since the agent started.
func (h *health) ready() (healthBody, bool) {
	body, ok := h.healthy()
	h.mu.Lock()
	defer h.mu.Unlock()
	return body, ok && !h.lastUpdated.IsZero()
}

// handler serves /healthz, /livez and /readyz.
func (h *health) handler() http.Handler {
	mux := http.NewServeMux()
	serve := func(path string, check func() (healthBody, bool), count func(code string)) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
			body, ok := check()
			code, label := http.StatusOK, "200"
			if ok {
				body.LastUpdated = body.CurrentTime // as kube-proxy does: recent as long as all is well
			} else {
				code, label = http.StatusServiceUnavailable, "503"
			}
			count(label)
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("X-Content-Type-Options", "nosniff")
			w.WriteHeader(code)
			// Nothing can be done about a prober that is gone before its answer.
			_ = json.NewEncoder(w).Encode(body)
		})
	}
	serve("/healthz", h.healthy, func(code string) { h.metrics.healthz.WithLabelValues(code).Inc() })
	serve("/livez", h.live, func(code string) { h.metrics.livez.WithLabelValues(code).Inc() })
	serve("/readyz", h.ready, func(string) {})
	mux.HandleFunc("/", notThere([]string{"/healthz", "/livez", "/readyz"}))
	return mux
}
