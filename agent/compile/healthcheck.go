package compile

import (
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"
)

// HealthCheck is what a Service's health-check node port answers from on one node. The zero value: it has none there.
type HealthCheck struct {
	Port uint16
	// Addresses are the prefixes in which the node's own addresses serve the port.
	Addresses []netip.Prefix
	// Endpoints is how many ready endpoints the Service has on the node.
	Endpoints int
}

// Equal says whether two answer alike.
func (h HealthCheck) Equal(o HealthCheck) bool {
	return h.Port == o.Port && h.Endpoints == o.Endpoints && slices.Equal(h.Addresses, o.Addresses)
}

// HealthCheckOf gives the health check of a Service. As with kube-proxy only ready endpoints count: those that terminate still serve, but nobody should
// send them anything new.
func HealthCheckOf(a *Assignment, slicesOf []*Slice, node *Node) HealthCheck {
	if a.HealthCheckNodePort == 0 || a.NodeSelector != nil && !a.NodeSelector.Matches(labels.Set(node.Labels)) {
		return HealthCheck{}
	}
	here := map[netip.Addr]struct{}{}
	for _, s := range slicesOf {
		for i := range s.Endpoints {
			if e := &s.Endpoints[i]; e.Flags.Has(Local | Ready) {
				here[e.Addr] = struct{}{}
			}
		}
	}
	return HealthCheck{Port: a.HealthCheckNodePort, Addresses: a.NodePortAddresses.on(node), Endpoints: len(here)}
}
