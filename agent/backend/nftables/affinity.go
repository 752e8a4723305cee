package nftables

import (
	"encoding/binary"
	"maps"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// pin is how many milliseconds a client's pin outlives its last connection. The zero value: no affinity.
type pin uint32

func pinOf(s *forwarding.Service) pin { return pin(max(min(s.Affinity.Milliseconds(), 1<<32-1), 1)) }

func (p pin) suffix() string {
	if p == 0 {
		return ""
	}
	return "-" + strconv.FormatUint(uint64(p), 10) + "ms"
}

func cutPin(name string) (rest string, p pin) {
	rest, timeout, _ := cutLast(strings.TrimSuffix(name, "ms"), "-")
	ms, err := strconv.ParseUint(timeout, 10, 32)
	if p = pin(ms); err != nil || p == 0 || rest+p.suffix() != name {
		return name, 0
	}
	return rest, p
}

const (
	mapPins = "pins"
	// maxPins bounds the memory of pins. When it is reached, further clients are forwarded without a pin.
	maxPins = 1 << 22

	pinSuffix    = "-pin"
	drawsSuffix  = "-draws"
	pinnedSuffix = "-pinned"
)

// kind says what a balancer's chain is for.
type kind uint8

const (
	balancing kind = iota
	// drawing only draws an endpoint's number, and translating only translates to the endpoint of that number, for the balancers that pin. All services of a
	// shard share them, because adding an element costs in proportion to the rules that use its map.
	drawing
	translating
)

var kindSuffix = [...]string{"", "-draw", "-translate"}

// pinSet describes the map from Service port and client to the number of the client's endpoint. The kernel fills it; we never read it.
func (f *family) pinSet() *nfnl.Set {
	s := f.newSet(mapPins, typeClassID, f.addrType)
	s.Map, s.DataType, s.DataLen, s.Dynamic, s.Size = true, typeClassID, 4, true, maxPins
	s.Userdata = nfnl.Typeof([]nfnl.Field{nfnl.Priority, f.source}, []nfnl.Field{nfnl.Priority})
	return s
}

// pinningMaps describe what a shard has for frontends that pin: from door key and slot to the number of the endpoint, and from door
// key and number to the endpoint. A pin holds a number, because that does not change when slots do.
func (f *family) pinningMaps(d door, shard int) (draws, pinned *nfnl.Set) {
	key := []nfnl.Field{nfnl.L4Proto, nfnl.TCPPort}
	if d.class == 0 {
		key = slices.Insert(key, 0, f.destination)
	}
	name := shardName(d, shard)
	draws = f.newSet(name+drawsSuffix, append(f.keyTypes(d), typeInteger)...)
	draws.Map, draws.DataType, draws.DataLen = true, typeClassID, 4
	draws.Userdata = nfnl.Typeof(append(slices.Clone(key), nfnl.Number), []nfnl.Field{nfnl.Priority})
	pinned = f.newSet(name+pinnedSuffix, append(f.keyTypes(d), typeClassID)...)
	pinned.Map, pinned.DataType, pinned.DataLen = true, f.addrType<<6|typeService, f.addrLen+4
	pinned.Userdata = nfnl.Typeof(append(slices.Clone(key), nfnl.Priority), []nfnl.Field{f.destination, nfnl.TCPPort})
	return draws, pinned
}

// parsePinning reads the name of one of a shard's pinning maps; which is its suffix.
func parsePinning(name string) (d door, index int, which string, ok bool) {
	for _, which := range []string{drawsSuffix, pinnedSuffix} {
		if base, found := strings.CutSuffix(name, which); found {
			d, index, ok = parseShard(base)
			return d, index, which, ok
		}
	}
	return d, 0, "", false
}

// helpers are the balancers that one that pins jumps to.
func (b balancer) helpers() []balancer {
	if b.pin == 0 {
		return nil
	}
	draw, translate := b.helper(drawing), b.helper(translating)
	return []balancer{draw, translate}
}

func (b balancer) helper(k kind) balancer {
	if k == translating {
		return balancer{door: b.door, shard: b.shard, size: 1, kind: k}
	}
	return balancer{door: b.door, shard: b.shard, hash: b.hash, size: b.size, kind: k}
}

// drawRules put the number of an endpoint into the packet's priority and return.
//
// A rule cannot use what one map says as a key for another (nft 1.0.6 aborts when it lists that), so the number has to go through the packet. Its priority
// is free for that between here and postrouting, which clears it: nothing routes or filters by it, as it would by the mark, and queueing comes later.
func (b balancer) drawRules(f *family) []*nfnl.Rule {
	return b.attempts(f, func(_ *family, r *nfnl.Rule) *nfnl.Rule {
		return r.Map(shardName(b.door, b.shard)+drawsSuffix, nfnl.R0, nfnl.R0).SetMeta(unix.NFT_META_PRIORITY, nfnl.R0).
			Verdict(nfnl.Verdict{Code: nfnl.Return})
	})
}

// pinRules forward to the endpoint that the client is pinned to, if this frontend still has it; else they draw one and pin it.
func (b balancer) pinRules(f *family) []*nfnl.Rule {
	const number = nfnl.R0 + 8 // the key takes at most five registers
	// Whose pin it is tell the bits of any number of the Service port.
	pinKey := func(r *nfnl.Rule) *nfnl.Rule {
		return r.Meta(nfnl.R0, unix.NFT_META_PRIORITY).Bitwise(nfnl.R0, nfnl.Host32(numberOwner), nfnl.Host32(0)).
			Payload(nfnl.R0+1, unix.NFT_PAYLOAD_NETWORK_HEADER, f.saddrOffset, f.addrLen)
	}
	remember := func(r *nfnl.Rule) *nfnl.Rule {
		return pinKey(r).Meta(number, unix.NFT_META_PRIORITY).Remember(mapPins, nfnl.R0, number, uint64(b.pin))
	}
	draw, translate := b.helper(drawing).name(), b.helper(translating).name()
	var rules []*nfnl.Rule
	// Twice, as all that looks something up that always is there: a lookup can miss an element that is replaced at that very moment.
	for range 2 {
		r := nfnl.NewRule()
		r.Random(f.loadKey(r, b.door), 1) // the number in slot 0
		rules = append(rules, r.Map(shardName(b.door, b.shard)+drawsSuffix, nfnl.R0, nfnl.R0).SetMeta(unix.NFT_META_PRIORITY, nfnl.R0))
	}
	pinned := pinKey(nfnl.NewRule()).Map(mapPins, nfnl.R0, nfnl.R0).SetMeta(unix.NFT_META_PRIORITY, nfnl.R0)
	rules = append(rules, jump(remember(pinned), translate))
	for range 2 {
		rules = append(rules, jump(nfnl.NewRule(), draw),
			// An element that exists would keep its number. If the map is full, the rule ends here and the next one forwards.
			remember(pinKey(nfnl.NewRule()).Meta(number, unix.NFT_META_PRIORITY).Forget(mapPins, nfnl.R0, number)),
			jump(nfnl.NewRule(), translate))
	}
	return append(rules, nfnl.NewRule().Verdict(nfnl.Verdict{Code: nfnl.Drop}))
}

// translatePinned translates to the endpoint whose number is in the packet's priority, if the frontend has it.
func (b balancer) translatePinned(f *family) *nfnl.Rule {
	r := nfnl.NewRule()
	r.Meta(f.loadKey(r, b.door), unix.NFT_META_PRIORITY)
	return r.Map(shardName(b.door, b.shard)+pinnedSuffix, nfnl.R0, nfnl.R0).DNAT(f.proto, nfnl.R0, nfnl.R0+f.words())
}

// providePins makes the map of pins be there. It stays for good, because pins outlive their service's rules. It is not made before it is needed, because the
// kernel looks sets up by name one after the other, in every transaction.
func (m *mirror) providePins(p pin) {
	if p != 0 && !m.pins {
		m.pins = true
		m.tx.addSet(m.pinSet())
	}
}

// providePinning makes a shard have maps for frontends that pin.
func (m *mirror) providePinning(d door, s *shard) {
	if s.draws == nil {
		s.draws, s.pinned = m.pinningMaps(d, s.index)
		m.tx.addSet(s.draws)
		m.tx.addSet(s.pinned)
	}
}

// numberedSlots are slots with the numbers of the endpoints in them.
type numberedSlots struct {
	slots   slots
	numbers []uint32
}

// endpointsOf gives the endpoints by number.
func (f *family) endpointsOf(s numberedSlots) map[uint32]string {
	set := make(map[uint32]string, len(s.numbers))
	for i, n := range s.numbers {
		if n != 0 {
			set[n] = string(f.slot(s.slots, i))
		}
	}
	return set
}

// changePinned changes the endpoints of a frontend that pins. Numbers are there before and as long as slots lead to them.
func (m *mirror) changePinned(key frontKey, s *shard, old, next numberedSlots) {
	before, after := old.numbers, next.numbers
	gone, come := m.endpointsOf(old), m.endpointsOf(next)
	at := func(list []uint32, i int) uint32 {
		if i < len(list) {
			return list[i]
		}
		return 0
	}
	for _, n := range slices.Sorted(maps.Keys(gone)) {
		if come[n] != gone[n] {
			m.tx.deleteElement(s.pinned, m.slotKey(key, int(n)))
		}
	}
	for _, n := range slices.Sorted(maps.Keys(come)) {
		if come[n] != gone[n] {
			m.tx.addElement(s.pinned, m.slotKey(key, int(n)), m.slotData([]byte(come[n])))
		}
	}
	for i := range max(len(before), len(after)) {
		was, is := at(before, i), at(after, i)
		if was == is {
			continue
		}
		if was != 0 {
			m.tx.deleteElement(s.draws, m.slotKey(key, i))
			s.elements--
		}
		if is != 0 {
			m.tx.addElement(s.draws, m.slotKey(key, i), binary.NativeEndian.AppendUint32(nil, is))
			s.elements++
		}
	}
}

// pinning is what was read back of a frontend that pins.
type pinning struct {
	shard  *shard
	draws  map[int]uint32
	pinned map[uint32]string
}

// readPinning adopts the endpoints of frontends that pin.
func (r reader) readPinning(m *mirror, sets map[string]*nfnl.Set) error {
	read := map[frontKey]*pinning{}
	for _, name := range slices.Sorted(maps.Keys(sets)) {
		d, index, which, ok := parsePinning(name)
		if !ok {
			continue
		}
		var s *shard
		if ds := m.doors[d]; ds != nil {
			s = ds.shards[index]
		}
		if s == nil {
			m.foreign = append(m.foreign, sets[name])
			continue
		}
		if s.draws == nil {
			s.draws, s.pinned = m.pinningMaps(d, index)
			for _, set := range []*nfnl.Set{s.draws, s.pinned} {
				if sets[set.Name] == nil {
					m.tx.addSet(set)
				}
			}
		}
		set := s.draws
		if which == pinnedSuffix {
			set = s.pinned
		}
		if err := r.check(r.conn.Elements(set, func(e nfnl.Element) { m.adoptPinning(d, s, set, e, read) })); err != nil {
			return err
		}
	}
	for key, p := range read {
		m.resolve(key, p)
	}
	return nil
}

func (m *mirror) adoptPinning(d door, s *shard, set *nfnl.Set, e nfnl.Element, read map[frontKey]*pinning) {
	k, rest, ok := m.parseKey(d, e.Key)
	if !ok || len(rest) < 4 {
		return
	}
	n := binary.NativeEndian.Uint32(rest)
	p := read[k]
	if p == nil {
		p = &pinning{s, map[int]uint32{}, map[uint32]string{}}
		read[k] = p
	}
	switch {
	case p.shard != s:
		m.strays = append(m.strays, stray{set, string(e.Key)})
	case set == s.draws && len(e.Data) >= 4:
		p.draws[int(n)] = binary.NativeEndian.Uint32(e.Data)
	case set == s.pinned && len(e.Data) >= m.slotLen():
		p.pinned[n] = string(e.Data[:m.slotLen()])
	}
}

// resolve makes slots of what was read back of a frontend, and deletes what does not fit together.
func (m *mirror) resolve(key frontKey, p *pinning) {
	f := m.adopted(key)
	var have numberedSlots
	if f.shard == nil {
		have = m.consistent(p)
		f.shard, f.slots, f.numbers, f.pins = p.shard, have.slots, have.numbers, true
		p.shard.fronts++
	}
	fits := m.endpointsOf(have)
	p.shard.elements += len(fits)
	for _, i := range slices.Sorted(maps.Keys(p.draws)) {
		if i >= len(have.numbers) || have.numbers[i] == 0 {
			m.tx.deleteElement(p.shard.draws, m.slotKey(key, i))
		}
	}
	for _, n := range slices.Sorted(maps.Keys(p.pinned)) {
		if fits[n] != p.pinned[n] {
			m.tx.deleteElement(p.shard.pinned, m.slotKey(key, int(n)))
		}
	}
}

// consistent gives the slots whose numbers are in both maps, of one owner, and no endpoint nor number twice.
func (m *mirror) consistent(p *pinning) numberedSlots {
	var (
		f     frontend
		owner uint32
		used  = map[any]bool{}
	)
	for _, i := range slices.Sorted(maps.Keys(p.draws)) {
		n := p.draws[i]
		endpoint, exists := p.pinned[n]
		if i >= maxSlot || !exists || used[n] || used[endpoint] || empty([]byte(endpoint)) || n&numberMark == 0 || owner != 0 && ownerOf(n) != owner {
			continue
		}
		used[n], used[endpoint], owner = true, true, ownerOf(n)
		m.grow(&f, i+1)
		copy(m.slot(f.slots, i), endpoint)
		for len(f.numbers) < m.slotCount(f.slots) {
			f.numbers = append(f.numbers, 0)
		}
		f.numbers[i] = n
	}
	return numberedSlots{f.slots, f.numbers}
}
