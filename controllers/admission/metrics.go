package admission

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/serviceproxy/serviceproxy-operator/controllers/instrument"
)

// Outcomes of a request.
const (
	outcomeUnchanged = "unchanged" // nothing was to be done, or the API server refuses it anyway
	outcomeAllocated = "allocated" // something was claimed
	outcomeSteered   = "steered"   // something was filled in that no policy declares, and nothing claimed
	outcomeDenied    = "denied"
	outcomeError     = "error" // the request could not be understood
)

// instruments are this package's metrics.
type instruments struct {
	duration *prometheus.HistogramVec
	requests *prometheus.CounterVec
	lost     prometheus.Counter
}

func newInstruments(r prometheus.Registerer) (*instruments, error) {
	i := &instruments{
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "serviceproxy_admission_duration_seconds",
			Help:    "Time it took to answer an admission request for a Service, by operation and outcome.",
			Buckets: []float64{.0005, .001, .002, .003, .005, .0075, .01, .015, .025, .05, .1, .25, .5, 1, 3},
		}, []string{"operation", "outcome"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "serviceproxy_admission_requests_total",
			Help: "Number of admission requests for Services, by outcome: unchanged, allocated, steered (outside all policies), denied, error.",
		}, []string{"outcome"}),
		lost: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "serviceproxy_admission_lost_races_total",
			Help: "Number of addresses and node ports that somebody else turned out to have when they were claimed at admission. The next one was tried.",
		}),
	}
	return i, errors.Join(instrument.Register(r, &i.duration), instrument.Register(r, &i.requests), instrument.Register(r, &i.lost))
}

func (i *instruments) observe(operation, outcome string, took time.Duration) {
	i.duration.WithLabelValues(operation, outcome).Observe(took.Seconds())
	i.requests.WithLabelValues(outcome).Inc()
}
