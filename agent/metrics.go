package agent

import (
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are the agent's, in a registry of their own. Where kube-proxy has the same one, the name is kube-proxy's with our prefix in the
// place of kubeproxy_, so that dashboards carry over.
type metrics struct {
	registry *prometheus.Registry

	syncDuration       prometheus.Histogram
	lastSync           prometheus.Gauge
	networkProgramming prometheus.Histogram
	serviceChanges     prometheus.Counter
	endpointChanges    prometheus.Counter
	endpoints          prometheus.Gauge
	services           *prometheus.GaugeVec
	failures           *prometheus.CounterVec
	repairs            *prometheus.CounterVec
	healthz, livez     *prometheus.CounterVec

	counted map[*dataplane]counted // what the counters already hold; the loop's goroutine only
}

type counted struct {
	repairs  int64
	failures int
}

const metricsPrefix = "serviceproxy_agent_"

func newMetrics(s *store, flowsEnded func() uint64) *metrics {
	m := &metrics{registry: prometheus.NewRegistry(), counted: map[*dataplane]counted{}}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: metricsPrefix + name, Help: help})
	}
	counterBy := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: metricsPrefix + name, Help: help}, []string{label})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: metricsPrefix + name, Help: help})
	}
	pending := func(name, help string, get func() int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: metricsPrefix + name, Help: help}, func() float64 { return float64(get()) })
	}
	m.syncDuration = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: metricsPrefix + "sync_proxy_rules_duration_seconds",
		Help: "Time from taking changes to the kernel holding them.",
		// Finer than kube-proxy's, whose first bucket ends at 1 ms: most changes take a fraction of that.
		Buckets: prometheus.ExponentialBuckets(0.00005, 2, 18),
	})
	m.networkProgramming = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: metricsPrefix + "network_programming_duration_seconds",
		Help: "Time from a change of a Service's pods, as its EndpointSlice tells, to this node's kernel holding it.",
		Buckets: slices.Concat([]float64{0.01, 0.025, 0.05, 0.1}, prometheus.LinearBuckets(0.25, 0.25, 2),
			prometheus.LinearBuckets(1, 1, 59), prometheus.LinearBuckets(60, 5, 12), prometheus.LinearBuckets(120, 30, 7)),
	})
	m.lastSync = gauge("sync_proxy_rules_last_timestamp_seconds", "When the kernel was last changed.")
	m.serviceChanges = counter("sync_proxy_rules_service_changes_total", "Changes of Services received and taken up.")
	m.endpointChanges = counter("sync_proxy_rules_endpoint_changes_total", "Changes of EndpointSlices received and taken up.")
	m.endpoints = gauge("endpoints", "Endpoints of all services that are forwarded.")
	m.services = prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: metricsPrefix + "services", Help: "Service ports that are forwarded, by proxy mode."}, []string{"mode"})
	m.failures = counterBy("sync_proxy_rules_failures_total", "Times the kernel could not be programmed, by proxy mode.", "mode")
	m.repairs = counterBy("drift_repairs_total", "Times something else changed the agent's rules and they were repaired, by proxy mode.", "mode")
	m.healthz = counterBy("proxy_healthz_total", "Answers of /healthz, by code.", "code")
	m.livez = counterBy("proxy_livez_total", "Answers of /livez, by code.", "code")
	m.registry.MustRegister(m.syncDuration, m.networkProgramming, m.lastSync, m.serviceChanges, m.endpointChanges, m.endpoints, m.services,
		m.failures, m.repairs, m.healthz, m.livez, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		pending("sync_proxy_rules_service_changes_pending", "Changes of Services received and not taken up.", func() int {
			services, _, _ := s.pending()
			return services
		}),
		pending("sync_proxy_rules_endpoint_changes_pending", "Changes of EndpointSlices received and not taken up.", func() int {
			_, endpoints, _ := s.pending()
			return endpoints
		}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: metricsPrefix + "conntrack_reconciler_deleted_entries_total",
			Help: "UDP flows ended because they led to endpoints which are gone.",
		}, func() float64 { return float64(flowsEnded()) }))
	return m
}

// applied counts a pass that changed the kernel.
func (m *metrics) applied(at time.Time, took time.Duration) {
	m.syncDuration.Observe(took.Seconds())
	m.lastSync.Set(float64(at.UnixNano()) / 1e9)
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

// dataplane brings the figures of one dataplane up to date.
func (m *metrics) dataplane(d *dataplane) {
	mode := string(d.Name)
	m.services.WithLabelValues(mode).Set(float64(d.want.Len() - len(d.leaving)))
	was := m.counted[d]
	if n := d.failed - was.failures; n > 0 {
		m.failures.WithLabelValues(mode).Add(float64(n))
	}
	if n := d.repairs - was.repairs; n > 0 {
		m.repairs.WithLabelValues(mode).Add(float64(n))
	}
	m.counted[d] = counted{repairs: d.repairs, failures: d.failed}
}

// handlers gives what is served of the metrics, by path.
func (m *metrics) handlers() map[string]http.Handler {
	return map[string]http.Handler{"/metrics": promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})}
}
