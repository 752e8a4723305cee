package instrument

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestRegister(t *testing.T) {
	r := prometheus.NewRegistry()
	gauge := func() prometheus.Gauge { return prometheus.NewGauge(prometheus.GaugeOpts{Name: "one", Help: "h"}) }
	first := gauge()
	second := gauge()
	if err := Register(r, &first); err != nil {
		t.Fatal(err)
	}
	if err := Register(r, &second); err != nil || second != first {
		t.Errorf("the second manager has %v (%v), want the first one's %v", second, err, first)
	}
	other := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "one", Help: "h"}, []string{"label"})
	if err := Register(r, &other); err == nil {
		t.Error("another kind of metric took the same name")
	}
}
