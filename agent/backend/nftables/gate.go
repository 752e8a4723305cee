package nftables

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

const (
	guardedPrefix = "guarded-"
	// fromSuffix is behind a door's name in that of the chain that asks where packets come from; its sets have the prefix length besides.
	fromSuffix = "-from"
)

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

// admits gives the sources that a frontend lets in, reduced; none for everybody. closed says that it lets nobody in.
func (f *family) admits(w *want) (from []netip.Prefix, closed bool) {
	if !w.guarded {
		return nil, false
	}
	switch from = f.reduce(w.ranges); {
	case len(from) == 0:
		return nil, true
	case from[0].Bits() == 0:
		return nil, false
	}
	return from, false
}

// gate is a chain before another one that lets only some sources through, and drops the rest. It is part of the verdict rather than a
// lookup of its own, so that no packet sees a frontend without its gate, and traffic to other frontends does not pay for it. Which sources
// that are say sets, by frontend; so all frontends with the same balancer share a gate.
type gate struct {
	door door
	// to is where it leads; the zero value refuses.
	to balancer
}

func (g gate) target() string {
	if g.to == (balancer{}) {
		return chainRefuse
	}
	return g.to.name()
}

func (g gate) name() string {
	if g.to == (balancer{}) {
		return guardedPrefix + g.door.name() + "-" + chainRefuse
	}
	return guardedPrefix + g.to.name()
}

func parseGate(name string) (g gate, ok bool) {
	target, ok := strings.CutPrefix(name, guardedPrefix)
	if !ok {
		return g, false
	}
	if base, refuses := strings.CutSuffix(target, "-"+chainRefuse); refuses {
		g.door, ok = parseDoor(base)
	} else {
		g.to, ok = parseBalancer(target)
		g.door = g.to.door
	}
	return g, ok && g.name() == name
}

func (g gate) rules() []*nfnl.Rule {
	return []*nfnl.Rule{jump(nfnl.NewRule(), fromChain(g.door)), nfnl.NewRule().Verdict(nfnl.Verdict{Code: nfnl.Goto, Chain: g.target()})}
}

// fromChain is the chain of a door that returns if the packet's source may use the frontend that it is for, and else drops.
func fromChain(d door) string { return d.name() + fromSuffix }

func fromSetName(d door, bits int) string { return fromChain(d) + "-" + strconv.Itoa(bits) }

// parseFromSet reads the name of a set of sources.
func (f *family) parseFromSet(name string) (d door, bits int, ok bool) {
	base, number, _ := cutLast(name, "-")
	base, ok = strings.CutSuffix(base, fromSuffix)
	if !ok {
		return d, 0, false
	}
	d, ok = parseDoor(base)
	bits, err := strconv.Atoi(number)
	return d, bits, ok && err == nil && d.class == 0 && bits >= 1 && bits <= int(f.addrLen)*8 && fromSetName(d, bits) == name
}

// fromSet describes the set of the sources, all of one prefix length, that may use the frontends behind a door.
func (f *family) fromSet(d door, bits int) *nfnl.Set {
	return f.newSet(fromSetName(d, bits), append(f.keyTypes(d), f.addrType)...)
}

// fromRules has a rule for each prefix length in use. Its key is the frontend's with the source, of which it takes as many bits.
func (f *family) fromRules(d door, lengths []int) []*nfnl.Rule {
	var rules []*nfnl.Rule
	for _, bits := range lengths {
		r := nfnl.NewRule()
		source := f.loadKey(r, d)
		r.Payload(source, unix.NFT_PAYLOAD_NETWORK_HEADER, f.saddrOffset, f.addrLen)
		f.maskBits(r, source, bits)
		rules = append(rules, r.InSet(fromSetName(d, bits), nfnl.R0).Verdict(nfnl.Verdict{Code: nfnl.Return}))
	}
	return append(rules, nfnl.NewRule().Verdict(nfnl.Verdict{Code: nfnl.Drop}))
}

// sourceSet is a set of sources as the mirror knows it.
type sourceSet struct {
	set      *nfnl.Set
	elements int
}

// sources are those that the kernel lets in to a frontend, sorted; between transactions, none in another.
type sources struct {
	// owner is the service whose they are, zero if they were read back.
	owner forwarding.ServiceKey
	list  []netip.Prefix
}

func find(list []netip.Prefix, p netip.Prefix) (at int, found bool) {
	return slices.BinarySearchFunc(list, p, netip.Prefix.Compare)
}

// admit makes a frontend let these sources in, or without any be no gate's. A packet in flight may look for a source before and after a change, so
// what goes does so only after what comes is there: who may come in before and after is let in meanwhile. But those of another service go at once.
func (m *mirror) admit(key frontKey, f *frontend, from []netip.Prefix) {
	delete(m.narrowing, key)
	if f.sources == nil {
		if len(from) == 0 {
			return
		}
		f.sources = &sources{}
	}
	s := f.sources
	if s.owner != f.owner && s.owner != (forwarding.ServiceKey{}) {
		m.expel(key, f, from, m.tx.deleteElement)
	}
	s.owner = f.owner
	ds := m.doors[key.door]
	for _, p := range from {
		at, found := find(s.list, p)
		if found {
			continue
		}
		s.list = slices.Insert(s.list, at, p)
		set := ds.sources[p.Bits()]
		if set == nil {
			set = &sourceSet{set: m.fromSet(key.door, p.Bits())}
			ds.sources[p.Bits()] = set
			m.tx.addSet(set.set)
		}
		ds.widened = ds.widened || set.elements == 0
		set.elements++
		m.tx.addElement(set.set, m.sourceKey(key, p), nil)
	}
	switch {
	case len(s.list) > len(from):
		m.narrowing[key] = from
	case len(from) == 0:
		f.sources = nil
	}
}

// expel takes away what a frontend lets in but for those sources.
func (m *mirror) expel(key frontKey, f *frontend, but []netip.Prefix, deleteElement func(*nfnl.Set, []byte)) {
	if f.sources == nil {
		return
	}
	kept := f.sources.list[:0]
	for _, p := range f.sources.list {
		if _, stays := find(but, p); stays {
			kept = append(kept, p)
			continue
		}
		set := m.doors[key.door].sources[p.Bits()]
		set.elements--
		m.garbage = m.garbage || set.elements == 0
		deleteElement(set.set, m.sourceKey(key, p))
	}
	f.sources.list = kept
}

// narrow completes what admit began.
func (m *mirror) narrow() {
	for key, from := range m.narrowing {
		f := m.fronts[key]
		m.expel(key, f, from, m.tx.retireElement)
		if len(from) == 0 {
			f.sources = nil
		}
	}
	clear(m.narrowing)
}

// widen makes the chains that ask for sources have a rule for each prefix length in use, before any source of that length is there.
func (m *mirror) widen() {
	for d, ds := range m.doors {
		if ds.widened {
			ds.widened = false
			m.setChain(chain{name: fromChain(d), rules: m.fromRules(d, ds.lengths())}, &m.tx.new)
		}
	}
}

// lengths gives the prefix lengths of the sources in use.
func (ds *doorState) lengths() []int {
	var list []int
	for bits, s := range ds.sources {
		if s.elements > 0 {
			list = append(list, bits)
		}
	}
	slices.Sort(list)
	return list
}

// collectSources deletes sets of sources that nothing uses, and with them their rules.
func (m *mirror) collectSources() {
	for d, ds := range m.doors {
		for bits, s := range ds.sources {
			if s.elements == 0 {
				m.foreign = append(m.foreign, s.set)
				delete(ds.sources, bits)
			}
		}
		if _, exists := m.chains[fromChain(d)]; exists && d.class == 0 {
			m.setChain(chain{name: fromChain(d), rules: m.fromRules(d, ds.lengths())}, &m.tx.late)
		}
	}
}

// provideGate makes a gate's chain be there. What it leads to must be there.
func (m *mirror) provideGate(g gate) {
	m.provideFrom(g.door)
	m.provideChain(chain{name: g.name(), rules: g.rules()})
}

// provideFrom makes the chain be there that asks for a door's sources. Its rules come with the next widen.
func (m *mirror) provideFrom(d door) {
	name := fromChain(d)
	if _, exists := m.chains[name]; !exists {
		m.tx.addChain(m.table(), chain{name: name})
		m.chains[name] = nil
		m.doors[d].widened = true
	}
}

// adoptGates gives the chains of the gates that were read back, and completes what they jump to.
func (m *mirror) adoptGates() []chain {
	var chains []chain
	for g := range m.gates {
		if g.to == (balancer{}) || m.shardOf(g.to) != nil {
			m.provideFrom(g.door)
			chains = append(chains, chain{name: g.name(), rules: g.rules()})
		}
	}
	for d, ds := range m.doors {
		_, exists := m.chains[fromChain(d)]
		ds.widened = exists && d.class == 0
	}
	return chains
}

// guarded says whether a frontend lets in only some sources, those aside that are about to go.
func (m *mirror) guarded(key frontKey, f *frontend) bool {
	from, narrowing := m.narrowing[key]
	return f.sources != nil && !(narrowing && len(from) == 0)
}

// readSources adopts who may use guarded frontends.
func (r reader) readSources(m *mirror, sets map[string]*nfnl.Set) error {
	for _, name := range slices.Sorted(maps.Keys(sets)) {
		d, bits, ok := m.parseFromSet(name)
		if !ok {
			continue
		}
		if m.doors[d] == nil {
			m.foreign = append(m.foreign, sets[name])
			continue
		}
		s := &sourceSet{set: m.fromSet(d, bits)}
		m.doors[d].sources[bits] = s
		if err := r.check(r.conn.Elements(s.set, func(e nfnl.Element) { m.adoptSource(d, bits, s, e) })); err != nil {
			return err
		}
	}
	return nil
}

// adoptSource takes note of a source that was read back.
func (m *mirror) adoptSource(d door, bits int, s *sourceSet, e nfnl.Element) {
	k, rest, ok := m.parseKey(d, e.Key)
	if !ok || len(rest) < int(m.addrLen) {
		return
	}
	a, _ := netip.AddrFromSlice(rest[:m.addrLen]) // its length is right
	p := netip.PrefixFrom(a, bits)
	f := m.adopted(k)
	if f.sources == nil {
		f.sources = &sources{}
	}
	at, _ := find(f.sources.list, p)
	f.sources.list = slices.Insert(f.sources.list, at, p)
	s.elements++
}

// sourceKey gives the key of a source of a frontend, valid until the next call of a key method.
func (m *mirror) sourceKey(k frontKey, p netip.Prefix) []byte {
	m.key = append(m.doorKey(k), p.Addr().AsSlice()...)
	return m.key
}
