package allocator

import (
	"net/netip"
	"slices"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// Server is what the API server gives out by itself. Nothing keeps it from giving a Service that no policy covers what belongs to a policy, so somebody else has to
// choose for such a Service: a Request without a policy is served from Ranges and NodePorts minus all that any policy declares.
type Server struct {
	// Ranges are the ServiceCIDRs that nobody made for a policy.
	Ranges []netip.Prefix
	// Made are the ServiceCIDRs made for policies, also those that no policy declares any more. The API server chooses from them, a Space does not.
	Made []netip.Prefix
	// NodePorts is the range of node ports, the zero value while it is not known.
	NodePorts PortRange
}

// pools makes the pools of what is left, which belong to the policy with the empty name. They must be filled before use.
func (s Server) pools(policies []*Policy) []*pool {
	var out []*pool
	for _, prefix := range s.distinct() {
		r := &Range{Prefix: prefix, Excluded: s.Made}
		for _, policy := range policies {
			for _, theirs := range policy.Ranges {
				r.Excluded = append(r.Excluded, theirs.Prefix)
			}
		}
		p := newAddrPool("", r)
		p.use, p.allocation = v1alpha1.RangeUseClusterIP, v1alpha1.RangeAllocationAutomatic
		out = append(out, p)
	}
	if s.NodePorts.Size() > 0 {
		var excluded []PortRange
		for _, policy := range policies {
			if both := s.NodePorts.Intersect(policy.NodePorts); both.Size() > 0 {
				excluded = append(excluded, both)
			}
		}
		out = append(out, newPortPool("", s.NodePorts, excluded))
	}
	return out
}

// distinct are the ranges, in their order, without those that lie inside another, cut to what a pool can hold.
func (s Server) distinct() []netip.Prefix {
	var out []netip.Prefix
	for _, p := range s.Ranges {
		if p.Addr().Is4In6() || p.Addr().Is4() && p.Bits() > 30 {
			continue // no pool can hold these; the API server itself gives out next to nothing of them
		}
		if p.Addr().Is6() && p.Bits() < 64 {
			p = netip.PrefixFrom(p.Addr(), 64)
		}
		p = p.Masked()
		if slices.ContainsFunc(out, func(o netip.Prefix) bool { return o.Bits() <= p.Bits() && o.Overlaps(p) }) {
			continue
		}
		out = append(slices.DeleteFunc(out, p.Overlaps), p)
	}
	return out
}

// contested lists the kinds (a family, or empty for node ports) of which the API server, left alone, may choose something that a policy declares or declared.
func (s Server) contested(policies []*Policy) map[v1alpha1.IPFamily]bool {
	out := map[v1alpha1.IPFamily]bool{}
	for _, p := range s.Made {
		out[FamilyOf(p.Addr())] = true
	}
	for _, policy := range policies {
		for _, r := range policy.Ranges {
			if slices.ContainsFunc(s.Ranges, r.Prefix.Overlaps) {
				out[FamilyOf(r.Prefix.Addr())] = true
			}
		}
		if s.NodePorts.Intersect(policy.NodePorts).Size() > 0 {
			out[""] = true
		}
	}
	return out
}

// beyond are the ports of r that the API server refuses, none while its range is not known.
func (s Server) beyond(r PortRange) (out []PortRange) {
	if s.NodePorts.Size() == 0 || r.Size() == 0 {
		return nil
	}
	if first := s.NodePorts.First; r.First < first {
		out = append(out, PortRange{r.First, min(r.Last, first-1)})
	}
	if last := s.NodePorts.Last; r.Last > last {
		out = append(out, PortRange{max(r.First, last+1), r.Last})
	}
	return out
}
