package conntrack

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// frontend is what a flow was sent to: an address and a port, or a node port if the address is the zero Addr.
type frontend struct {
	addr netip.Addr
	port uint16
}

// target is where flows to a frontend may lead.
type target struct {
	// owner is the service that has the frontend; the zero value if none has.
	owner     forwarding.ServiceKey
	endpoints map[netip.AddrPort]struct{}
	// here are the node's addresses at which a node port is served.
	here []netip.Prefix
}

// flow is what a UDP flow was sent to and who answers it.
type flow struct{ sentTo, answers netip.AddrPort }

// stale are the frontends whose flows have to be looked at.
type stale map[frontend]target

// change takes note of a change that may leave flows.
func (s stale) change(prev, next *forwarding.Service) {
	if prev != nil {
		for fe := range frontendsOf(prev) {
			// Changes come in no order: who took the frontend over may have come first.
			if owner := s[fe].owner; owner == (forwarding.ServiceKey{}) || owner == prev.Key {
				s[fe] = target{here: prev.NodePortAddresses}
			}
		}
	}
	if next != nil && next.Key.Protocol == forwarding.UDP {
		allowed := target{owner: next.Key, endpoints: allowedBy(next), here: next.NodePortAddresses}
		for fe := range frontendsOf(next) {
			s[fe] = allowed
		}
		if prev != nil && prev.NodePort == next.NodePort && next.NodePort != 0 && !slices.Equal(prev.NodePortAddresses, next.NodePortAddresses) {
			allowed.here = slices.Concat(prev.NodePortAddresses, next.NodePortAddresses)
			s[frontend{netip.Addr{}, next.NodePort}] = allowed
		}
	}
}

// update takes note of a change that leaves no flows itself, for the frontends that have to be looked at anyway.
func (s stale) update(next *forwarding.Service) {
	if next == nil || len(s) == 0 {
		return
	}
	for fe := range frontendsOf(next) {
		if t, due := s[fe]; due && t.owner == next.Key {
			t.endpoints = allowedBy(next)
			s[fe] = t
		}
	}
}

// of gives the frontends that flows of an address family can have.
func (s stale) of(family uint8) stale {
	out := stale{}
	for fe, t := range s {
		if !fe.addr.IsValid() || fe.addr.Is4() == (family == unix.AF_INET) {
			out[fe] = t
		}
	}
	return out
}

// restore takes back what was not done, but for what changed again meanwhile.
func (s stale) restore(undone stale) {
	for fe, t := range undone {
		if _, newer := s[fe]; !newer {
			s[fe] = t
		}
	}
}

// leadsNowhere says whether a flow is to a frontend that is stale and leads to none of its endpoints.
func (s stale) leadsNowhere(f flow) bool {
	t, ok := s.target(f)
	if !ok {
		return false
	}
	_, allowed := t.endpoints[f.answers]
	return !allowed
}

// allows says whether a flow is to a frontend in s and leads to one of its endpoints.
func (s stale) allows(f flow) bool {
	t, ok := s.target(f)
	if !ok {
		return false
	}
	_, allowed := t.endpoints[f.answers]
	return allowed
}

// target gives where a flow may lead, and false if it is to no frontend in s.
func (s stale) target(f flow) (target, bool) {
	if t, ok := s[frontend{f.sentTo.Addr(), f.sentTo.Port()}]; ok {
		return t, true
	}
	t, ok := s[frontend{netip.Addr{}, f.sentTo.Port()}]
	if !ok || t.isHere(f.sentTo.Addr()) {
		return t, ok
	}
	// Through this node to somebody else's port of the same number: as it was sent, or translated by something else. Where node ports are served at
	// addresses that are not listed one by one, what is translated may as well be one.
	if f.answers == f.sentTo || t.listed(f.sentTo.Addr()) {
		return target{}, false
	}
	return t, true
}

// isHere says whether a node port is served at an address. A prefix that is no single address or loopback says what would be served
// if it were the node's, and cannot tell.
func (t target) isHere(ip netip.Addr) bool {
	return slices.ContainsFunc(t.here, func(p netip.Prefix) bool {
		return (p.IsSingleIP() || p.Addr().IsLoopback()) && p.Contains(ip)
	})
}

// listed says whether the addresses of a family at which a node port is served are known one by one.
func (t target) listed(of netip.Addr) bool {
	return !slices.ContainsFunc(t.here, func(p netip.Prefix) bool {
		return p.Addr().Is4() == of.Is4() && !p.IsSingleIP() && !p.Addr().IsLoopback()
	})
}

// mayLeaveFlows says whether a change can have left flows that lead to the wrong place: an endpoint or a frontend went; or a frontend is new or has its
// first endpoint, and the flows of impatient clients pass it untranslated.
func mayLeaveFlows(prev, next *forwarding.Service) bool {
	switch {
	case prev == nil:
		return next != nil && next.Key.Protocol == forwarding.UDP
	case prev.Key.Protocol != forwarding.UDP:
		return false
	case next == nil || begins(prev, next):
		return true
	}
	is := allowedBy(next)
	for e := range allowedBy(prev) {
		if _, still := is[e]; !still {
			return true
		}
	}
	return !slices.Equal(prev.ServiceIPs, next.ServiceIPs) || !slices.Equal(prev.ExternalIPs, next.ExternalIPs) ||
		prev.NodePort != next.NodePort || !slices.Equal(prev.NodePortAddresses, next.NodePortAddresses)
}

// begins says whether some traffic was not forwarded and is now.
func begins(prev, next *forwarding.Service) bool {
	was, is := targetsOf(prev), targetsOf(next)
	for i := range is {
		for _, f := range [2]forwarding.Families{forwarding.IPv4, forwarding.IPv6} {
			if was[i].Action(f) != forwarding.Forward && is[i].Action(f) == forwarding.Forward {
				return true
			}
		}
	}
	return false
}

func targetsOf(s *forwarding.Service) [3]*forwarding.Target {
	return [3]*forwarding.Target{&s.Internal, &s.External, &s.ExternalFromHere}
}

func frontendsOf(s *forwarding.Service) map[frontend]struct{} {
	out := map[frontend]struct{}{}
	for _, ip := range slices.Concat(s.ServiceIPs, s.ExternalIPs) {
		out[frontend{ip, s.Key.Port}] = struct{}{}
	}
	if s.NodePort != 0 {
		out[frontend{netip.Addr{}, s.NodePort}] = struct{}{}
	}
	return out
}

// allowedBy gives all endpoints that a flow to s may lead to: which traffic was bound to which is not visible in a flow.
func allowedBy(s *forwarding.Service) map[netip.AddrPort]struct{} {
	out := map[netip.AddrPort]struct{}{}
	for _, t := range targetsOf(s) {
		for _, e := range t.Endpoints {
			out[e.AddrPort] = struct{}{}
		}
	}
	for _, e := range s.Lingering {
		out[e] = struct{}{}
	}
	return out
}
