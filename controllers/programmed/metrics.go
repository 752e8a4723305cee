package programmed

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/serviceproxy/serviceproxy-operator/controllers/instrument"
)

// instruments are this package's metrics.
type instruments struct {
	programmed prometheus.Gauge
	pending    prometheus.Gauge
	duration   prometheus.Histogram
}

func newInstruments(r prometheus.Registerer) (*instruments, error) {
	i := &instruments{
		programmed: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "serviceproxy_assignments_programmed",
			Help: "Number of ServiceAssignments whose present generation is programmed on every node that counts.",
		}),
		pending: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "serviceproxy_assignments_pending",
			Help: "Number of ServiceAssignments whose present generation is not programmed yet.",
		}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "serviceproxy_assignment_programming_duration_seconds",
			Help:    "Time from when the controller saw a generation of a ServiceAssignment until it was programmed and the status said so.",
			Buckets: prometheus.ExponentialBuckets(0.05, 2, 14), // 50 ms to 7 min
		}),
	}
	return i, errors.Join(instrument.Register(r, &i.programmed), instrument.Register(r, &i.pending), instrument.Register(r, &i.duration))
}
