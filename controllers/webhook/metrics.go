package webhook

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/serviceproxy/serviceproxy-operator/controllers/instrument"
)

// newExpiry makes the metric by which people are warned of a certificate that nobody renews. It belongs to the process, of which a second manager may be part.
func newExpiry(r prometheus.Registerer) (prometheus.Gauge, error) {
	expiry := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "serviceproxy_webhook_certificate_expiry_timestamp_seconds",
		Help: "When the certificate that this replica serves its admission webhook with expires. It is renewed a third of its life before.",
	})
	err := instrument.Register(r, &expiry)
	return expiry, err
}
