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
	// Endpoints is how many ready endpoints the Service has on the node, in the family in which it has more.
	Endpoints int
}

// Equal says whether two answer alike.
func (h HealthCheck) Equal(o HealthCheck) bool {
	return h.Port == o.Port && h.Endpoints == o.Endpoints && slices.Equal(h.Addresses, o.Addresses)
}

// HealthCheckOf gives the health check of a Service. As with kube-proxy only ready endpoints count: those that terminate still serve, but nobody should
// send them anything new. A pod with an address of each family counts once.
func HealthCheckOf(a *Assignment, slicesOf []*Slice, node *Node) HealthCheck {
	if a.HealthCheckNodePort == 0 || a.NodeSelector != nil && !a.NodeSelector.Matches(labels.Set(node.Labels)) {
		return HealthCheck{}
	}
	var here [2]map[netip.Addr]struct{} // by family
	for _, p := range portNames(slicesOf) {
		for _, c := range candidates(&p, slicesOf) {
			if !c.Flags.Has(Local | Ready) {
				continue
			}
			f := family(c.addr.Addr())
			if here[f] == nil {
				here[f] = map[netip.Addr]struct{}{}
			}
			here[f][c.addr.Addr()] = struct{}{}
		}
	}
	return HealthCheck{Port: a.HealthCheckNodePort, Addresses: a.NodePortAddresses.on(node), Endpoints: max(len(here[0]), len(here[1]))}
}

// portNames gives each port that slices have, by what tells it from others of its Service.
func portNames(slicesOf []*Slice) (out []Port) {
	for _, s := range slicesOf {
		for _, sp := range s.Ports {
			if p := (Port{Name: sp.Name, Protocol: sp.Protocol}); !slices.Contains(out, p) {
				out = append(out, p)
			}
		}
	}
	return out
}
