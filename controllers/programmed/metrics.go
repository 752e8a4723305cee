package programmed

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
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
	return i, errors.Join(register(r, &i.programmed), register(r, &i.pending), register(r, &i.duration))
}

// register registers c, or sets it to what is registered under that name: the metrics belong to the process, of which a
// second manager may be part.
func register[C prometheus.Collector](r prometheus.Registerer, c *C) error {
	err := r.Register(*c)
	if already, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); ok {
		if existing, ok := already.ExistingCollector.(C); ok {
			*c = existing
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("register metrics: %w", err)
	}
	return nil
}
