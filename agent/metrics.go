package agent

import (
	"net/http"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/serviceproxy/serviceproxy-operator/agent/conntrack"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// metrics are the agent's, in a registry of their own. Where kube-proxy has the same one, the name is kube-proxy's with our prefix in the
// place of kubeproxy_, so that dashboards carry over. kube-proxy's label ip_family is missing, because one pass serves both families. docs/metrics.md
// has all of them.
type metrics struct {
	registry *prometheus.Registry
	traffic  trafficMetrics

	syncDuration, fullSync, partialSync prometheus.Histogram
	lastSync                            prometheus.Gauge
	networkProgramming                  prometheus.Histogram
	serviceChanges                      prometheus.Counter
	endpointChanges                     prometheus.Counter
	endpoints                           prometheus.Gauge
	services                            *prometheus.GaugeVec
	failures, cleanupFailures           *prometheus.CounterVec
	repairs                             *prometheus.CounterVec
	healthz, livez                      *prometheus.CounterVec
	conntrackDuration                   prometheus.Histogram
	conntrackDeleted                    prometheus.Counter
	conntrackFailures                   prometheus.Counter
	noLocal                             noLocalEndpoints

	counted map[*dataplane]counted // what the counters already hold; the loop's goroutine only
}

type counted struct {
	repairs  int64
	failures int
}

const metricsPrefix = "serviceproxy_agent_"

// syncBuckets are finer than kube-proxy's, whose first one ends at 1 ms: most changes take a fraction of that.
var syncBuckets = prometheus.ExponentialBuckets(0.00005, 2, 18)

func newMetrics(s *store, version string) *metrics {
	m := &metrics{registry: prometheus.NewRegistry(), counted: map[*dataplane]counted{}}
	r := registrar{m.registry}
	m.syncDuration = r.histogram("sync_proxy_rules_duration_seconds", "Time from taking changes to the kernel holding them.", syncBuckets)
	m.fullSync = r.histogram("sync_full_proxy_rules_duration_seconds",
		"Time of one backend's sync that read the kernel back: after a start, a failure, drift, or a change that concerns all Services.", syncBuckets)
	m.partialSync = r.histogram("sync_partial_proxy_rules_duration_seconds", "Time of one backend's sync of what changed only.", syncBuckets)
	m.networkProgramming = r.histogram("network_programming_duration_seconds",
		"Time from a change of a Service's pods, as its EndpointSlice tells, to this node's kernel holding it.",
		slices.Concat([]float64{0.01, 0.025, 0.05, 0.1}, prometheus.LinearBuckets(0.25, 0.25, 2),
			prometheus.LinearBuckets(1, 1, 59), prometheus.LinearBuckets(60, 5, 12), prometheus.LinearBuckets(120, 30, 7)))
	m.lastSync = r.gauge("sync_proxy_rules_last_timestamp_seconds", "When the kernel was last changed.")
	m.serviceChanges = r.counter("sync_proxy_rules_service_changes_total", "Changes of Services received and taken up.")
	m.endpointChanges = r.counter("sync_proxy_rules_endpoint_changes_total", "Changes of EndpointSlices received and taken up.")
	m.endpoints = r.gauge("endpoints", "Endpoints of all services that are forwarded.")
	m.services = r.gaugeBy("services", "Service ports that are forwarded, by proxy mode.", "mode")
	m.failures = r.counterBy("sync_proxy_rules_failures_total", "Times the kernel could not be programmed, by proxy mode.", "mode")
	m.cleanupFailures = r.counterBy("sync_proxy_rules_cleanup_failures_total", "Times the rules of a mode that is not used any more could not be removed, by proxy mode.", "mode")
	m.repairs = r.counterBy("drift_repairs_total", "Times something else changed the agent's rules and they were repaired, by proxy mode.", "mode")
	m.healthz = r.counterBy("proxy_healthz_total", "Answers of /healthz, by code.", "code")
	m.livez = r.counterBy("proxy_livez_total", "Answers of /livez, by code.", "code")
	m.conntrackDuration = r.histogram("conntrack_reconciler_sync_duration_seconds", "Time of one pass over the kernel's conntrack table.", prometheus.ExponentialBuckets(0.001, 2, 15))
	m.conntrackDeleted = r.counter("conntrack_reconciler_deleted_entries_total", "UDP flows ended because they led to endpoints which are gone.")
	m.conntrackFailures = r.counter("conntrack_reconciler_failures_total", "Passes over the kernel's conntrack table that could not do all and are tried again.")
	m.noLocal.gauge = r.gaugeBy("sync_proxy_rules_no_local_endpoints_total",
		"Service ports that have endpoints, but none on this node for traffic that a Local policy binds to it, by policy (internal, external).", "traffic_policy")
	m.noLocal.show()
	build := r.gaugeBy("build_info", "1, with the version of the agent and of Go as labels.", "version", "go_version")
	build.WithLabelValues(version, runtime.Version()).Set(1)
	r.gaugeOf("sync_proxy_rules_service_changes_pending", "Changes of Services received and not taken up.", func() float64 {
		services, _, _ := s.pending()
		return float64(services)
	})
	r.gaugeOf("sync_proxy_rules_endpoint_changes_pending", "Changes of EndpointSlices received and not taken up.", func() float64 {
		_, endpoints, _ := s.pending()
		return float64(endpoints)
	})
	r.gaugeOf("sync_proxy_rules_last_queued_timestamp_seconds",
		"When the newest change was received that has to reach the kernel. If the time of the last sync stays behind it, something hangs.", func() float64 { return unixSeconds(s.lastQueued()) })
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// registrar makes metrics and registers them.
type registrar struct{ *prometheus.Registry }

func register[C prometheus.Collector](r registrar, c C) C {
	r.MustRegister(c)
	return c
}

func (r registrar) counter(name, help string) prometheus.Counter {
	return register(r, prometheus.NewCounter(prometheus.CounterOpts{Name: metricsPrefix + name, Help: help}))
}

func (r registrar) counterBy(name, help string, labels ...string) *prometheus.CounterVec {
	return register(r, prometheus.NewCounterVec(prometheus.CounterOpts{Name: metricsPrefix + name, Help: help}, labels))
}

func (r registrar) gauge(name, help string) prometheus.Gauge {
	return register(r, prometheus.NewGauge(prometheus.GaugeOpts{Name: metricsPrefix + name, Help: help}))
}

func (r registrar) gaugeBy(name, help string, labels ...string) *prometheus.GaugeVec {
	return register(r, prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: metricsPrefix + name, Help: help}, labels))
}

func (r registrar) gaugeOf(name, help string, get func() float64) {
	r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricsPrefix + name, Help: help}, get))
}

func (r registrar) histogram(name, help string, buckets []float64) prometheus.Histogram {
	return register(r, prometheus.NewHistogram(prometheus.HistogramOpts{Name: metricsPrefix + name, Help: help, Buckets: buckets}))
}

// unixSeconds gives a time as metrics do; 0 for none.
func unixSeconds(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixNano()) / 1e9
}

// applied counts a pass that changed the kernel.
func (m *metrics) applied(at time.Time, took time.Duration) {
	m.syncDuration.Observe(took.Seconds())
	m.lastSync.Set(unixSeconds(at))
}

// synced counts one successful sync of a backend. full says that it read the kernel back.
func (m *metrics) synced(full bool, took time.Duration) {
	if full {
		m.fullSync.Observe(took.Seconds())
		return
	}
	m.partialSync.Observe(took.Seconds())
}

// programmed counts changes that the kernel holds now, by when they happened.
func (m *metrics) programmed(at time.Time, triggers []time.Time) {
	for _, t := range triggers {
		m.networkProgramming.Observe(at.Sub(t).Seconds())
	}
}

func (m *metrics) took(services, endpoints int) {
	m.serviceChanges.Add(float64(services))
	m.endpointChanges.Add(float64(endpoints))
}

func (m *metrics) forwarding(endpoints int) { m.endpoints.Set(float64(endpoints)) }

// changed takes note that the kernel holds next in the place of prev.
func (m *metrics) changed(prev, next *forwarding.Service) { m.noLocal.changed(prev, next) }

// reconciled counts a pass over the conntrack table.
func (m *metrics) reconciled(p conntrack.Pass) {
	m.conntrackDuration.Observe(p.Took.Seconds())
	m.conntrackDeleted.Add(float64(p.Ended))
	if p.Err != nil {
		m.conntrackFailures.Inc()
	}
}

func (m *metrics) cleanupFailed(mode v1alpha1.ProxyMode) {
	m.cleanupFailures.WithLabelValues(string(mode)).Inc()
}

// dataplane brings the figures of one dataplane up to date.
func (m *metrics) dataplane(d *dataplane) {
	mode := string(d.Name)
	m.services.WithLabelValues(mode).Set(float64(d.want.Len() - len(d.leaving)))
	was := m.counted[d]
	m.failures.WithLabelValues(mode).Add(float64(d.failed - was.failures))
	m.repairs.WithLabelValues(mode).Add(float64(d.repairs - was.repairs))
	m.counted[d] = counted{repairs: d.repairs, failures: d.failed}
}

// handlers gives what is served of the metrics, by path.
func (m *metrics) handlers() map[string]http.Handler {
	return map[string]http.Handler{
		"/metrics":          promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}),
		"/metrics/services": &m.traffic,
	}
}

// noLocalEndpoints counts the service ports that a Local policy leaves without an endpoint here although there are some elsewhere.
type noLocalEndpoints struct {
	gauge *prometheus.GaugeVec

	mu                 sync.Mutex
	internal, external map[forwarding.ServiceKey]struct{}
}

func (n *noLocalEndpoints) changed(prev, next *forwarding.Service) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range [2]*forwarding.Service{prev, next} { // prev is nil if next comes from another mode
		if s != nil {
			delete(n.internal, s.Key)
			delete(n.external, s.Key)
		}
	}
	if next != nil && next.Internal.Elsewhere != 0 {
		n.internal = with(n.internal, next.Key)
	}
	if next != nil && next.PreserveSource && next.External.Elsewhere != 0 {
		n.external = with(n.external, next.Key)
	}
	n.show()
}

func (n *noLocalEndpoints) show() {
	n.gauge.WithLabelValues("internal").Set(float64(len(n.internal)))
	n.gauge.WithLabelValues("external").Set(float64(len(n.external)))
}

func with(set map[forwarding.ServiceKey]struct{}, k forwarding.ServiceKey) map[forwarding.ServiceKey]struct{} {
	if set == nil {
		set = map[forwarding.ServiceKey]struct{}{}
	}
	set[k] = struct{}{}
	return set
}
