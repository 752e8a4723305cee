// Package conntrack ends the UDP flows that still lead to endpoints which are gone.
//
// The kernel translates a flow by what was decided for its first packet. TCP notices when its peer is gone; a UDP client that
// keeps sending keeps its flow alive, so a resolver would ask a dead endpoint for hours, or, if there was no endpoint when it first asked,
// nobody at all. TCP flows are left alone: an endpoint that terminates may finish them.
//
// It works for every backend that translates in the kernel, beside the path that programs it: what changed is collected, and one
// pass over the kernel's table serves all of it.
package conntrack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/go-logr/logr"
	"github.com/vishvananda/netlink"
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
	endpoints map[netip.AddrPort]struct{}
	// here are the node's addresses at which a node port is served.
	here []netip.Prefix
}

// Cleaner collects changes of services and ends the flows that they leave behind.
type Cleaner struct {
	log  logr.Logger
	wake chan struct{}

	mu    sync.Mutex
	stale map[frontend]target
	ended uint64
}

// New makes a Cleaner. Run does its work.
func New(log logr.Logger) *Cleaner {
	return &Cleaner{log: log, wake: make(chan struct{}, 1), stale: map[frontend]target{}}
}

// Changed takes note that the kernel holds next in the place of prev; either may be nil. prev being nil means a Service that was
// not forwarded before as far as is known, which after a restart of the agent says nothing about the flows. It costs next to nothing.
func (c *Cleaner) Changed(prev, next *forwarding.Service) {
	if !mayLeaveFlows(prev, next) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if prev != nil {
		for fe := range frontendsOf(prev) {
			c.stale[fe] = target{here: prev.NodePortAddresses}
		}
	}
	if next != nil {
		allowed := target{endpoints: endpointsOf(next), here: next.NodePortAddresses}
		for fe := range frontendsOf(next) {
			c.stale[fe] = allowed
		}
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Ended gives how many flows have been ended since the start.
func (c *Cleaner) Ended() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

// Run works until ctx ends, in the network namespace of table.
func (c *Cleaner) Run(ctx context.Context, table *netlink.Handle) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.wake:
		}
		ended, err := c.pass(table)
		if err != nil {
			// Part of the flows may be left. They end by themselves when their clients rest, or with the next change.
			c.log.Error(err, "Could not end all UDP flows that lead nowhere", "ended", ended)
		}
		if ended > 0 {
			c.log.V(1).Info("Ended UDP flows that led to endpoints which are gone", "flows", ended)
		}
	}
}

// pass ends what is stale now and says how many flows that were.
func (c *Cleaner) pass(table *netlink.Handle) (uint, error) {
	c.mu.Lock()
	f := filter(c.stale)
	c.stale = map[frontend]target{}
	c.mu.Unlock()
	var (
		ended  uint
		failed []error
	)
	for i, family := range [2]netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		if !f.concerns(i == 0) {
			continue
		}
		n, err := table.ConntrackDeleteFilters(netlink.ConntrackTable, family, f)
		ended += n
		failed = append(failed, err)
	}
	c.mu.Lock()
	c.ended += uint64(ended)
	c.mu.Unlock()
	return ended, errors.Join(failed...)
}

// mayLeaveFlows says whether a change can have left flows that lead to the wrong place: an endpoint or a frontend went, or a
// frontend without endpoints, which the flows of impatient clients pass untranslated, got its first.
func mayLeaveFlows(prev, next *forwarding.Service) bool {
	switch {
	case prev == nil:
		return next != nil && next.Key.Protocol == forwarding.UDP
	case prev.Key.Protocol != forwarding.UDP:
		return false
	case next == nil:
		return true
	}
	was, is := endpointsOf(prev), endpointsOf(next)
	if len(was) == 0 && len(is) > 0 {
		return true
	}
	for e := range was {
		if _, still := is[e]; !still {
			return true
		}
	}
	now := frontendsOf(next)
	for fe := range frontendsOf(prev) {
		if _, still := now[fe]; !still {
			return true
		}
	}
	return false
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

// endpointsOf gives all endpoints that any traffic to s may reach: which traffic was bound to which is not visible in a flow.
func endpointsOf(s *forwarding.Service) map[netip.AddrPort]struct{} {
	out := map[netip.AddrPort]struct{}{}
	for _, t := range [3]*forwarding.Target{&s.Internal, &s.External, &s.ExternalFromHere} {
		for _, e := range t.Endpoints {
			out[e.AddrPort] = struct{}{}
		}
	}
	return out
}

// filter finds the flows that lead to a wrong place.
type filter map[frontend]target

// concerns says whether there can be such flows in a family.
func (f filter) concerns(v4 bool) bool {
	for fe := range f {
		if !fe.addr.IsValid() || fe.addr.Is4() == v4 {
			return true
		}
	}
	return false
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (f filter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	if flow.Forward.Protocol != uint8(forwarding.UDP) {
		return false
	}
	sentTo := netip.AddrPortFrom(addrOf(flow.Forward.DstIP), flow.Forward.DstPort)
	answers := netip.AddrPortFrom(addrOf(flow.Reverse.SrcIP), flow.Reverse.SrcPort)
	if t, ok := f[frontend{sentTo.Addr(), sentTo.Port()}]; ok {
		_, allowed := t.endpoints[answers]
		return !allowed
	}
	t, ok := f[frontend{netip.Addr{}, sentTo.Port()}]
	if !ok {
		return false
	}
	if answers == sentTo && !t.isHere(sentTo.Addr()) {
		return false // through this node to somebody else's port of the same number
	}
	_, allowed := t.endpoints[answers]
	return !allowed
}

// isHere says whether a node port is served at an address. A prefix that is no single address or loopback says what would be served
// if it were the node's, and cannot tell.
func (t target) isHere(ip netip.Addr) bool {
	return slices.ContainsFunc(t.here, func(p netip.Prefix) bool {
		return (p.IsSingleIP() || p.Addr().IsLoopback()) && p.Contains(ip)
	})
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
