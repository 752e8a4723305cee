package compile

import (
	"net/netip"
	"slices"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// lingering gives the endpoints that serve and that none of the service's targets has. Traffic policies, topology and termination decide about new traffic
// only: a TCP connection to such an endpoint goes on by itself, and kube-proxy lets a UDP flow do the same (pkg/proxy/conntrack, CleanStaleEntries).
func lingering(list []candidate, s *forwarding.Service) []netip.AddrPort {
	var out []netip.AddrPort
	for _, c := range list {
		used := func(t *forwarding.Target) bool {
			_, found := slices.BinarySearchFunc(t.Endpoints, c.addr, func(e forwarding.Endpoint, a netip.AddrPort) int { return e.AddrPort.Compare(a) })
			return found
		}
		if c.Flags.Has(Serving) && !used(&s.Internal) && !used(&s.External) && !used(&s.ExternalFromHere) {
			out = append(out, c.addr)
		}
	}
	return out
}
