package compile

import (
	"cmp"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// Services gives what a node forwards of one Service, one entry per port that can be reached, sorted by key: nothing if the node is not selected. The
// outcome depends on the arguments' content only, never on the order of slices, endpoints or ports.
func Services(a *Assignment, slicesOf []*Slice, node *Node) []*forwarding.Service {
	if a.NodeSelector != nil && !a.NodeSelector.Matches(labels.Set(node.Labels)) {
		return nil
	}
	out := make([]*forwarding.Service, 0, len(a.Ports))
	for i := range a.Ports {
		if len(a.ServiceIPs) == 0 && len(a.ExternalIPs) == 0 && a.Ports[i].NodePort == 0 {
			continue
		}
		out = append(out, service(a, &a.Ports[i], slicesOf, node))
	}
	slices.SortFunc(out, func(x, y *forwarding.Service) int { return x.Key.Compare(y.Key) })
	return out
}

func service(a *Assignment, p *Port, slicesOf []*Slice, node *Node) *forwarding.Service {
	s := &forwarding.Service{
		Key:         forwarding.ServiceKey{Namespace: a.Namespace, Name: a.Name, Port: p.Port, Protocol: p.Protocol},
		Scheduler:   a.Scheduler,
		ServiceIPs:  a.ServiceIPs,
		ExternalIPs: a.ExternalIPs,
		NodePort:    p.NodePort,
		Affinity:    a.Affinity,
	}
	if p.NodePort != 0 {
		s.NodePortAddresses = inFamilies(a.NodePortAddresses.on(node), a.Families)
	}
	if len(a.LoadBalancerIPs) > 0 {
		s.LoadBalancerIPs, s.SourceRanges = a.LoadBalancerIPs, a.sourceRangesOn(node)
	}
	all := candidates(p, slicesOf)
	cluster, local := targets(all, node.Zone)
	s.Internal = cluster
	if a.InternalLocal {
		s.Internal = local
	}
	if len(a.ExternalIPs) > 0 || p.NodePort != 0 { // else nothing outside reaches it: the external targets stay empty
		s.External, s.ExternalFromHere = cluster, cluster
		if a.ExternalLocal {
			// Traffic from this node and its pods does not come from outside, whichever address it uses: it is never
			// bound to local endpoints.
			s.External, s.PreserveSource = local, true
		}
	}
	if p.Protocol == forwarding.UDP {
		s.Lingering = lingering(all, s)
	}
	return s
}

// sourceRangesOn gives the source ranges as a node uses them. If the node itself is in range, so are the load-balancer addresses of that family: where such an
// address is one of the node's own too, the node's connections to it come from it. kube-proxy does the same.
func (a *Assignment) sourceRangesOn(node *Node) []netip.Prefix {
	var own [2]bool
	for _, n := range node.Addresses {
		if slices.ContainsFunc(a.SourceRanges, func(p netip.Prefix) bool { return p.Contains(n.Addr()) }) {
			own[family(n.Addr())] = true
		}
	}
	ranges := a.SourceRanges
	for _, ip := range a.LoadBalancerIPs {
		if own[family(ip)] {
			ranges = append(ranges[:len(ranges):len(ranges)], netip.PrefixFrom(ip, ip.BitLen()))
		}
	}
	if len(ranges) > len(a.SourceRanges) {
		ranges = sorted(ranges, netip.Prefix.Compare)
	}
	return ranges
}

// candidate is an endpoint of one Service port with all that decides about it.
type candidate struct {
	addr netip.AddrPort
	*SliceEndpoint
}

// candidates gives the endpoints of one port, sorted and without duplicates: IPv4 first.
func candidates(p *Port, slicesOf []*Slice) []candidate {
	n := 0
	for _, s := range slicesOf {
		n += len(s.Endpoints)
	}
	list := make([]candidate, 0, n)
	for _, s := range slicesOf {
		for _, sp := range s.Ports {
			if sp.Name != p.Name || sp.Protocol != p.Protocol {
				continue
			}
			for i := range s.Endpoints {
				list = append(list, candidate{netip.AddrPortFrom(s.Endpoints[i].Addr, sp.Port), &s.Endpoints[i]})
			}
		}
	}
	slices.SortFunc(list, func(x, y candidate) int {
		return cmp.Or(x.addr.Compare(y.addr), cmp.Compare(y.rank(), x.rank()), cmp.Compare(y.Flags, x.Flags), cmp.Compare(x.ZoneHints, y.ZoneHints))
	})
	// An endpoint that moves between slices is in both for a while, and a new pod may get the address of one that is still
	// terminating: the one that is furthest from its end counts.
	return slices.CompactFunc(list, func(x, y candidate) bool { return x.addr == y.addr })
}

// rank orders what is known of one address: not terminating before terminating, then ready, then serving.
func (c candidate) rank() int {
	rank := 0
	if !c.Flags.Has(Terminating) {
		rank += 4
	}
	if c.Flags.Has(Ready) {
		rank += 2
	}
	if c.Flags.Has(Serving) {
		rank++
	}
	return rank
}

// targets gives where traffic goes that may use any endpoint, and where traffic goes that is bound to endpoints of this node.
//
// Each family decides by itself, as if the other did not exist: a Service may well have ready endpoints in one of them only.
func targets(list []candidate, zone string) (cluster, local forwarding.Target) {
	firstV6, _ := slices.BinarySearchFunc(list, 0, func(c candidate, _ int) int {
		if c.addr.Addr().Is4() {
			return -1
		}
		return 1
	})
	for _, family := range [2][]candidate{list[:firstV6], list[firstV6:]} {
		everywhere, here := choose(family, zone)
		cluster.Endpoints = appendEndpoints(cluster.Endpoints, everywhere)
		local.Endpoints = appendEndpoints(local.Endpoints, here)
		if len(everywhere) > 0 && len(here) == 0 {
			local.Elsewhere |= forwarding.FamilyOf(everywhere[0].addr.Addr())
		}
	}
	return cluster, local
}

func appendEndpoints(out []forwarding.Endpoint, list []candidate) []forwarding.Endpoint {
	out = slices.Grow(out, len(list))
	for _, c := range list {
		out = append(out, forwarding.Endpoint{AddrPort: c.addr, Local: c.Flags.Has(Local)})
	}
	return out
}
