package nftables

import (
	"encoding/binary"
	"errors"
	"maps"
	"math/bits"
	"slices"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// maxSlot bounds what is believed of a slot number that was read back.
const maxSlot = 1 << 20

// reader reads tables back. A lenient one takes a dump during which the rule set changed.
type reader struct {
	conn    *nfnl.Conn
	lenient bool
}

func (r reader) check(err error) error {
	if r.lenient && errors.Is(err, nfnl.ErrChanged) {
		return nil
	}
	return err
}

// read gives the mirror of what the kernel holds in one family, with tx holding what completes its static part.
func (r reader) read(f *family, ground forwarding.Ground, tx *transaction) (*mirror, error) {
	m := newMirror(f, ground)
	m.tx = tx
	chains, exists, err := r.conn.Chains(m.table())
	if err := r.check(err); err != nil {
		return nil, err
	}
	if !exists {
		m.ensureStatic(nil)
		return m, nil
	}
	sets, err := r.conn.Sets(m.table())
	if err := r.check(err); err != nil {
		return nil, err
	}
	if !m.fits(chains, sets) {
		// No change of a set or base chain is possible in place. Both tables change over in one transaction, and flows that
		// are already translated need neither.
		tx.replaceTable(m.table())
		m.exists = true
		m.ensureStatic(nil)
		return m, nil
	}
	m.exists = true
	for name, c := range chains {
		m.chains[name] = c.Rules
	}
	if err := r.readElements(m, sets); err != nil {
		return nil, err
	}
	m.ensureStatic(sets)
	return m, nil
}

// fits says whether what exists under our names could be made into ours.
func (m *mirror) fits(chains map[string]*nfnl.Chain, sets map[string]*nfnl.Set) bool {
	for _, c := range slices.Concat(m.staticChains(m.plot), []chain{m.loopbackGuard()}, m.tallyBases()) {
		have := chains[c.name]
		if have != nil && ((have.Hook == nil) != (c.hook == nil) || (c.hook != nil && *have.Hook != *c.hook)) {
			return false
		}
	}
	for _, s := range sets {
		if want := m.describe(s.Name); want != nil && !want.SameShape(s) {
			return false
		}
	}
	return true
}

// describe gives what a set of that name should be, or nil if the name is none of ours.
func (m *mirror) describe(name string) *nfnl.Set {
	switch name {
	case setServiceIPs:
		return m.serviceIPs.set
	case setHairpin:
		return m.hairpin.set
	case mapPins:
		return m.pinSet()
	case setRanges:
		if len(m.plot.ranges) == 0 {
			return nil
		}
		return m.ranges
	}
	if d, index, which, ok := parsePinning(name); ok {
		draws, pinned := m.pinningMaps(d, index)
		if which == drawsSuffix {
			return draws
		}
		return pinned
	}
	if d, index, ok := parseShard(name); ok {
		return m.endpointMap(d, index)
	}
	if d, ok := parseDoor(name); ok {
		return m.doorMap(d)
	}
	if d, bits, ok := m.parseFromSet(name); ok {
		return m.fromSet(d, bits)
	}
	if s, ok := parseTallySet(name); ok && m.plot.countTraffic {
		return m.family.tallySet(s)
	}
	return nil
}

// readElements adopts the layout that the kernel holds: which frontend is in which shard, which endpoint in which slot. Endpoint maps
// come first, because a frontend whose verdict is gone still has its endpoints there.
func (r reader) readElements(m *mirror, sets map[string]*nfnl.Set) error {
	names := slices.Sorted(maps.Keys(sets))
	for _, name := range names {
		if d, ok := parseDoor(name); ok {
			m.doors[d] = m.newDoor(d)
		}
	}
	for _, name := range names {
		d, index, ok := parseShard(name)
		switch {
		case ok && m.doors[d] != nil:
			s := &shard{set: m.endpointMap(d, index), index: index}
			m.doors[d].shards[index] = s
			if err := r.check(r.conn.Elements(s.set, func(e nfnl.Element) { m.adoptEndpoint(d, s, e) })); err != nil {
				return err
			}
		case m.describe(name) == nil || ok: // ok: a shard without a door is no use
			m.foreign = append(m.foreign, sets[name])
		}
	}
	if err := r.readSources(m, sets); err != nil {
		return err
	}
	if err := r.readPinning(m, sets); err != nil {
		return err
	}
	if err := r.readTallies(m, sets); err != nil {
		return err
	}
	for _, ds := range m.doors {
		d, _ := parseDoor(ds.set.Name)
		if err := r.check(r.conn.Elements(ds.set, func(e nfnl.Element) { m.adoptVerdict(d, e) })); err != nil {
			return err
		}
	}
	if m.describe(setRanges) != nil && sets[setRanges] != nil {
		if err := r.check(r.conn.Elements(m.ranges, m.adoptBound)); err != nil {
			return err
		}
	}
	for _, s := range []*memberSet{&m.serviceIPs, &m.hairpin} {
		if sets[s.set.Name] == nil {
			continue
		}
		if err := r.check(r.conn.Elements(s.set, func(e nfnl.Element) { m.adoptMember(s, e.Key) })); err != nil {
			return err
		}
	}
	return nil
}

// parseKey reads a door's key and gives what follows it.
func (f *family) parseKey(d door, key []byte) (k frontKey, rest []byte, ok bool) {
	k.door = d
	if d.class == 0 {
		if len(key) < int(f.addrLen) {
			return k, nil, false
		}
		copy(k.addr[:f.addrLen], key)
		key = key[f.addrLen:]
	}
	if len(key) < 8 {
		return k, nil, false
	}
	k.proto, k.port = forwarding.Protocol(key[0]), binary.BigEndian.Uint16(key[4:])
	return k, key[8:], true
}

// adopted gives the frontend of a key, as yet claimed by no service.
func (m *mirror) adopted(k frontKey) *frontend {
	f := m.fronts[k]
	if f == nil {
		f = &frontend{}
		m.fronts[k] = f
		m.doors[k.door].fronts++
	}
	return f
}

func (m *mirror) adoptEndpoint(d door, s *shard, e nfnl.Element) {
	k, rest, ok := m.parseKey(d, e.Key)
	slotLen := m.slotLen()
	if !ok || len(rest) < 4 || len(e.Data) < slotLen {
		return
	}
	i := int(binary.NativeEndian.Uint32(rest))
	f := m.adopted(k)
	if i >= maxSlot || (f.shard != nil && f.shard != s) || empty(e.Data[:slotLen]) {
		m.strays = append(m.strays, stray{s.set, string(e.Key)})
		return
	}
	if f.shard == nil {
		f.shard = s
		s.fronts++
	}
	m.grow(f, i+1)
	copy(m.slot(f.slots, i), e.Data)
	s.elements++
}

// grow gives a frontend room for at least n slots.
func (m *mirror) grow(f *frontend, n int) {
	if n > m.slotCount(f.slots) {
		f.slots = append(make(slots, 0, m.slotLen()<<bits.Len(uint(n-1))), f.slots...)
		f.slots = f.slots[:cap(f.slots)]
	}
}

func (m *mirror) adoptVerdict(d door, e nfnl.Element) {
	k, _, ok := m.parseKey(d, e.Key)
	if !ok {
		return
	}
	f := m.adopted(k)
	target := e.Verdict.Chain
	g, isGate := parseGate(target)
	if isGate = isGate && g.door == d; isGate {
		target = g.target()
	}
	b, isBalancer := parseBalancer(target)
	switch {
	case e.Verdict.Code == nfnl.Drop:
		f.action = drop
	case e.Verdict.Code == nfnl.Goto && target == chainRefuse:
		f.action = refuse
	case e.Verdict.Code == nfnl.Goto && isBalancer && b.door == d && b.kind == balancing && b.size <= maxSlot:
		f.action, f.balancer = balance, b
		m.ref(b)
		m.grow(f, b.size)
	default:
		f.action = unknown
		return
	}
	if isGate {
		f.guarded = true
		m.gates[g]++
	}
}

func (m *mirror) adoptMember(s *memberSet, key []byte) {
	var e member
	n := int(m.addrLen)
	if len(key) < n {
		return
	}
	copy(e.addr[:n], key)
	if s == &m.hairpin {
		if len(key) < 2*n+8 || string(key[:n]) != string(key[n:2*n]) {
			m.strays = append(m.strays, stray{s.set, string(key)})
			return
		}
		e.proto, e.port = forwarding.Protocol(key[2*n]), binary.BigEndian.Uint16(key[2*n+4:])
	}
	s.uses[e] = 0
}
