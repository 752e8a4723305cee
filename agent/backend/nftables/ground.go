package nftables

import (
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

const (
	setRanges = "ranges"

	chainFilterInput   = "filter-input"
	chainFilterForward = "filter-forward"
	chainFilterOutput  = "filter-output"
	// priorityFilter is behind the filter chains of other proxies (0): what they refuse of their own addresses in our ranges is not ours to drop.
	priorityFilter = 10
)

// plot is the part of the ground that concerns one family.
type plot struct {
	// sources and interfaces tell pods' traffic, as in forwarding.PodTraffic.
	sources    []netip.Prefix
	interfaces []string
	// ranges are the declared ranges, none in another.
	ranges                     []netip.Prefix
	masqueradeAll, dropInvalid bool
	countTraffic               bool
}

func (f *family) plot(g forwarding.Ground) plot {
	p := plot{interfaces: g.Pods.Interfaces, ranges: f.reduce(g.Ranges), masqueradeAll: g.MasqueradeAll, dropInvalid: g.DropInvalid, countTraffic: g.CountTraffic}
	for _, s := range g.Pods.Sources {
		if f.is(s.Addr()) {
			p.sources = append(p.sources, s.Masked())
		}
	}
	return p
}

// knowsPods says whether traffic of pods can be told from other traffic. If not, nothing counts as coming from outside.
func (p plot) knowsPods() bool { return len(p.sources)+len(p.interfaces) > 0 }

// serviceIPs says who is masqueraded on the way through a service IP.
func (p plot) serviceIPs() masquerade {
	switch {
	case p.masqueradeAll:
		return masqueradeAll
	case p.knowsPods():
		return masqueradeOffCluster
	}
	return 0
}

// fromPods gives a rule for each way of telling that a packet is a pod's, each ending with the verdict.
func (f *family) fromPods(p plot, v nfnl.Verdict) []*nfnl.Rule {
	var rules []*nfnl.Rule
	for _, s := range p.sources {
		rules = append(rules, f.match(nfnl.NewRule(), f.saddrOffset, s).Verdict(v))
	}
	for _, name := range p.interfaces {
		rules = append(rules, matchInput(nfnl.NewRule(), name).Verdict(v))
	}
	return rules
}

// matchInput goes on if the packet came by an interface of that name; a "*" at its end stands for anything. What this node itself sends came by none: its
// interface has the empty name.
func matchInput(r *nfnl.Rule, name string) *nfnl.Rule {
	prefix, open := strings.CutSuffix(name, "*")
	switch {
	case open && prefix == "":
		return r.Meta(nfnl.R0, unix.NFT_META_IIF).NotEqual(nfnl.R0, nfnl.Host32(0))
	case open:
		return r.Meta(nfnl.R0, unix.NFT_META_IIFNAME).Equal(nfnl.R0, []byte(prefix))
	}
	return r.Meta(nfnl.R0, unix.NFT_META_IIFNAME).Equal(nfnl.R0, interfaceName(name))
}

// interfaceName is a name as registers hold it.
func interfaceName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// filterChains are the filter chains that the ground asks for.
func (f *family) filterChains(p plot) []chain {
	var forward, output []*nfnl.Rule
	if p.dropInvalid {
		forward = append(forward, ctState(nfnl.NewRule(), nfnl.StateInvalid).Verdict(nfnl.Verdict{Code: nfnl.Drop}))
	}
	if len(p.ranges) > 0 {
		// What has a service was translated or refused before routing; an address of the node itself is nobody's to drop.
		forward = append(forward, f.inRanges(nfnl.NewRule()).Verdict(nfnl.Verdict{Code: nfnl.Drop}))
		output = append(output, f.inRanges(nfnl.NewRule()).FibType(nfnl.R0, unix.NFTA_FIB_F_DADDR).NotEqual(nfnl.R0, nfnl.Host32(unix.RTN_LOCAL)).
			Verdict(nfnl.Verdict{Code: nfnl.Drop}))
	}
	var chains []chain
	if len(forward) > 0 {
		chains = append(chains, filterChain(chainFilterForward, unix.NF_INET_FORWARD, forward...))
	}
	if len(output) > 0 {
		chains = append(chains, filterChain(chainFilterOutput, unix.NF_INET_LOCAL_OUT, output...))
	}
	return chains
}

func filterChain(name string, hook uint32, rules ...*nfnl.Rule) chain {
	return chain{name, &nfnl.Hook{Type: "filter", Num: hook, Priority: priorityFilter}, rules}
}

// inRanges goes on for the first packets of connections to addresses in the declared ranges.
func (f *family) inRanges(r *nfnl.Rule) *nfnl.Rule {
	return ctState(r, nfnl.StateNew).Payload(nfnl.R0, unix.NFT_PAYLOAD_NETWORK_HEADER, f.daddrOffset, f.addrLen).InSet(setRanges, nfnl.R0)
}

func ctState(r *nfnl.Rule, state uint32) *nfnl.Rule {
	zero := nfnl.Host32(0)
	return r.CtState(nfnl.R0).Bitwise(nfnl.R0, nfnl.Host32(state), zero).NotEqual(nfnl.R0, zero)
}

// loopbackGuard is the chain that keeps others out of loopback while node ports are served there: for that the node must let packets between loopback and
// other interfaces (route_localnet), and would let its neighbours reach what only listens at loopback (CVE-2020-8558). What comes back of translated
// connections passes.
func (f *family) loopbackGuard() chain {
	r := f.match(nfnl.NewRule(), f.daddrOffset, f.loopback)
	r.Meta(nfnl.R0, unix.NFT_META_IIFNAME).NotEqual(nfnl.R0, interfaceName("lo"))
	r.CtStatus(nfnl.R0).Bitwise(nfnl.R0, nfnl.Host32(ctStatusDNAT), nfnl.Host32(0)).Equal(nfnl.R0, nfnl.Host32(0))
	return filterChain(chainFilterInput, unix.NF_INET_LOCAL_IN, r.Verdict(nfnl.Verdict{Code: nfnl.Drop}))
}

// loopbackPrefix says whether a prefix of node addresses asks for loopback, rather than for all addresses.
func (f *family) loopbackPrefix(p netip.Prefix) bool {
	return p.Bits() >= f.loopback.Bits() && f.loopback.Contains(p.Addr())
}

// rangeSet describes the set of the declared ranges.
func (f *family) rangeSet() *nfnl.Set {
	s := f.newSet(setRanges, f.addrType)
	s.Interval = true
	return s
}

// bound is where an interval of the declared ranges begins, or ends: the first address behind it.
type bound struct {
	addr netip.Addr
	end  bool
}

// bounds gives the ranges as intervals, those that touch as one.
func (p plot) bounds() []bound {
	var list []bound
	for _, r := range p.ranges {
		begin := r.Masked().Addr()
		if n := len(list); n > 0 && list[n-1] == (bound{begin, true}) {
			list = list[:n-1]
		} else {
			list = append(list, bound{begin, false})
		}
		if next := lastOf(r).Next(); next.IsValid() {
			list = append(list, bound{next, true})
		}
	}
	return list
}

// lastOf gives the last address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b) // its length is right
	return a
}

// ensureRanges makes the set of the declared ranges hold what the ground says. have are the sets that exist.
func (m *mirror) ensureRanges(have map[string]*nfnl.Set) {
	if len(m.plot.ranges) == 0 {
		return
	}
	if have[setRanges] == nil {
		m.tx.addSet(m.ranges)
	}
	if want := m.plot.bounds(); !slices.Equal(m.bounds, want) {
		m.tx.setRanges(m.ranges, want)
		m.bounds = want
	}
}

// adoptBound takes note of a bound that was read back.
func (m *mirror) adoptBound(e nfnl.Element) {
	if a, ok := netip.AddrFromSlice(e.Key[:min(len(e.Key), int(m.addrLen))]); ok {
		b := bound{a, e.End}
		at, _ := slices.BinarySearchFunc(m.bounds, b, func(x, y bound) int { return x.addr.Compare(y.addr) })
		m.bounds = slices.Insert(m.bounds, at, b)
	}
}
