package nftables

import (
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
)

// sources identifies a set of source ranges of one family by what is in it. The zero value is everybody. It is a cryptographic hash, because
// those who choose ranges must not be able to find others that pass for another tenant's.
type sources [16]byte

// sourcesOf identifies those of the ranges that are of the family; without any, nobody may pass.
func (f *family) sourcesOf(ranges []netip.Prefix) (id sources) {
	var all []byte
	for _, p := range f.reduce(ranges) {
		b, _ := p.MarshalBinary() // never fails
		all = append(all, b...)
	}
	sum := sha256.Sum256(all)
	copy(id[:], sum[:])
	return id
}

// reduce gives the ranges of the family without those that lie in another one, sorted.
func (f *family) reduce(ranges []netip.Prefix) []netip.Prefix {
	var list []netip.Prefix
	for _, p := range ranges {
		if f.is(p.Addr()) {
			list = append(list, p.Masked())
		}
	}
	slices.SortFunc(list, netip.Prefix.Compare) // what contains a prefix comes before it
	n := 0
	for _, p := range list {
		if n == 0 || !list[n-1].Contains(p.Addr()) {
			list[n] = p
			n++
		}
	}
	return list[:n]
}

// gate is a chain before another one that lets only some sources through, and drops the rest. It is part of the verdict rather than a
// lookup of its own, so that no packet sees a frontend without its gate, and traffic to other frontends does not pay for it.
type gate struct {
	sources sources
	// to is where it leads; the zero value refuses.
	to balancer
}

const gatePrefix = "from-"

func (g gate) target() string {
	if g.to == (balancer{}) {
		return chainRefuse
	}
	return g.to.name()
}

func (g gate) name() string { return gatePrefix + hex.EncodeToString(g.sources[:]) + "-" + g.target() }

func parseGate(name string) (g gate, ok bool) {
	name, ok = strings.CutPrefix(name, gatePrefix)
	digits, target, dash := strings.Cut(name, "-")
	id, err := hex.DecodeString(digits)
	if !ok || !dash || err != nil || len(id) != len(g.sources) {
		return g, false
	}
	copy(g.sources[:], id)
	if target != chainRefuse {
		g.to, ok = parseBalancer(target)
	}
	return g, ok && g.sources != sources{} && g.name() == gatePrefix+name
}

func (g gate) rules(f *family, ranges []netip.Prefix) []*nfnl.Rule {
	var rules []*nfnl.Rule
	for _, p := range f.reduce(ranges) {
		rules = append(rules, f.match(nfnl.NewRule(), f.saddrOffset, p).Verdict(nfnl.Verdict{Code: nfnl.Goto, Chain: g.target()}))
	}
	return append(rules, nfnl.NewRule().Verdict(nfnl.Verdict{Code: nfnl.Drop}))
}

// gateState is a gate as the mirror knows it.
type gateState struct {
	gate
	uses int
	// built says that its chain is known to have the right rules: after a read-back that takes a service that has the ranges.
	built bool
}

// gate gives the state of a gate, creating it if it is new.
func (m *mirror) gate(g gate) *gateState {
	gs := m.gates[g]
	if gs == nil {
		gs = &gateState{gate: g}
		m.gates[g] = gs
	}
	return gs
}

// build makes a gate's chain be right. What it leads to must be there.
func (m *mirror) build(gs *gateState, ranges []netip.Prefix) {
	if !gs.built {
		gs.built = true
		m.provideChain(chain{name: gs.name(), rules: gs.rules(m.family, ranges)})
	}
}
