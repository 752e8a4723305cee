package webhook

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// newExpiry makes the metric by which people are warned of a certificate that nobody renews. It belongs to the process, of which a second manager may be part.
func newExpiry(r prometheus.Registerer) (prometheus.Gauge, error) {
	expiry := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "serviceproxy_webhook_certificate_expiry_timestamp_seconds",
		Help: "When the certificate that this replica serves its admission webhook with expires. It is renewed a third of its life before.",
	})
	err := r.Register(expiry)
	if already, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); ok {
		if existing, ok := already.ExistingCollector.(prometheus.Gauge); ok {
			return existing, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	return expiry, nil
}
