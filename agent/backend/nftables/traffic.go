package nftables

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// Traffic is counted where each packet of a translated connection passes once: on its way out by a real interface, or in to a socket of the node. What was
// translated knows the address and port that its connection was for, in both directions; the counters of a frontend are set elements with that key.
// Connections are counted by the same key in nat chains, which only the first packet of a connection passes.

// tallyKind is a kind of set whose elements count.
type tallyKind string

const (
	tallyTraffic     tallyKind = "traffic"
	tallyConnections tallyKind = "connections"
)

// typeDirection is nft's number of the type of ct direction.
const typeDirection = 27

// Directions of a packet in its connection.
const (
	original byte = 0
	reply    byte = 1
)

// priorityTraffic is behind all that may still drop a packet.
const priorityTraffic = 300

// tallySet names a set whose elements count: for a class of node-port addresses, or with class 0 for service and external IPs.
type tallySet struct {
	kind  tallyKind
	class uint64
}

func (s tallySet) name() string {
	if s.class == 0 {
		return string(s.kind)
	}
	return fmt.Sprintf("%s-%s-%016x", s.kind, mapNodePorts, s.class)
}

func parseTallySet(name string) (s tallySet, ok bool) {
	kind, hex, ofClass := strings.Cut(name, "-"+mapNodePorts+"-")
	s.kind = tallyKind(kind)
	if s.kind != tallyTraffic && s.kind != tallyConnections {
		return s, false
	}
	if !ofClass {
		return s, true
	}
	class, err := strconv.ParseUint(hex, 16, 64)
	s.class = class
	return s, err == nil && len(hex) == 16 && class != 0
}

// tallySet describes a set whose elements count.
func (f *family) tallySet(s tallySet) *nfnl.Set {
	types := append([]uint32{typeDirection}, f.keyTypes(door{class: s.class})...)
	set := f.newSet(s.name(), types...)
	set.Counted = true
	return set
}

// counter is one of the counters of a frontend.
type counter uint8

const (
	countsOriginal counter = iota
	countsReply
	countsConnections
	counters
)

func (c counter) set(class uint64) tallySet {
	if c == countsConnections {
		return tallySet{tallyConnections, class}
	}
	return tallySet{tallyTraffic, class}
}

func (c counter) direction() byte {
	if c == countsReply {
		return reply
	}
	return original
}

// counterOf gives the counter that an element of a set is.
func counterOf(s tallySet, direction byte) (counter, bool) {
	for c := range counters {
		if c.set(s.class) == s && c.direction() == direction {
			return c, true
		}
	}
	return 0, false
}

// tallyBases are the chains in which packets come by to be counted.
func (f *family) tallyBases() []chain {
	base := func(name, typ string, num uint32, priority int32, kind tallyKind) chain {
		zero := nfnl.Host32(0)
		r := nfnl.NewRule().CtStatus(nfnl.R0).Bitwise(nfnl.R0, nfnl.Host32(ctStatusDNAT), zero).NotEqual(nfnl.R0, zero)
		if num == unix.NF_INET_POST_ROUTING && kind == tallyTraffic {
			// What goes out by lo comes in again. In output it would be too early to tell: translated packets are not routed yet.
			const loopbackIndex = 1 // in every network namespace
			r.Meta(nfnl.R0, unix.NFT_META_OIF).NotEqual(nfnl.R0, nfnl.Host32(loopbackIndex))
		}
		return chain{name, &nfnl.Hook{Type: typ, Num: num, Priority: priority}, []*nfnl.Rule{jump(r, string(kind))}}
	}
	return []chain{
		base("traffic-in", "filter", unix.NF_INET_LOCAL_IN, priorityTraffic, tallyTraffic),
		base("traffic-out", "filter", unix.NF_INET_POST_ROUTING, priorityTraffic, tallyTraffic),
		// Before anything translates the source: no further nat chain is asked after that.
		base("connections-in", "nat", unix.NF_INET_LOCAL_IN, prioritySource-1, tallyConnections),
		base("connections-out", "nat", unix.NF_INET_POST_ROUTING, prioritySource-1, tallyConnections),
	}
}

// tallyChains are all chains that count, those that others lead to first.
func (f *family) tallyChains(classes []class) []chain {
	slices.SortFunc(classes, func(a, b class) int { return cmp.Compare(a.id, b.id) })
	var chains []chain
	for _, kind := range []tallyKind{tallyTraffic, tallyConnections} {
		rules := f.tallyRules(tallySet{kind, 0})
		for _, cl := range classes {
			s := tallySet{kind, cl.id}
			chains = append(chains, chain{name: s.name(), rules: f.tallyRules(s)})
			for _, p := range cl.prefixes {
				r := nfnl.NewRule()
				if p.Bits() > 0 {
					r.CtDestination(nfnl.R0, f.proto)
					f.mask(r, p)
					r.Equal(nfnl.R0, p.Masked().Addr().AsSlice())
				}
				rules = append(rules, jump(r, s.name()))
			}
		}
		chains = append(chains, chain{name: string(kind), rules: rules})
	}
	return append(chains, f.tallyBases()...)
}

// tallyRules count a packet by what its connection was for: a rule for each protocol, because nft knows the type of a port only behind one.
func (f *family) tallyRules(s tallySet) []*nfnl.Rule {
	var rules []*nfnl.Rule
	for _, proto := range []forwarding.Protocol{forwarding.TCP, forwarding.UDP, forwarding.SCTP} {
		r := nfnl.NewRule().Meta(nfnl.R0, unix.NFT_META_L4PROTO).Equal(nfnl.R0, []byte{byte(proto)})
		next := nfnl.R0
		r.CtDirection(next)
		next++
		if s.class == 0 {
			r.CtDestination(next, f.proto)
			next += f.words()
		}
		r.Meta(next, unix.NFT_META_L4PROTO).CtDestinationPort(next + 1)
		rules = append(rules, r.InSet(s.name(), nfnl.R0).Verdict(nfnl.Verdict{Code: nfnl.Return}))
	}
	return rules
}

// tallies is what a mirror holds of counters.
type tallies struct {
	sets map[tallySet]*nfnl.Set // that there are
	// found are the counters that were read back and that no frontend has claimed yet.
	found map[frontKey]foundTally
	// ledger is told whose the counters are; nil while the mirror only verifies.
	ledger *ledger
}

type foundTally struct {
	tally tally
	is    [counters]bool
}

// readTallies takes note of the counters that the kernel holds.
func (r reader) readTallies(m *mirror, sets map[string]*nfnl.Set) error {
	m.tallies.sets, m.tallies.found = map[tallySet]*nfnl.Set{}, map[frontKey]foundTally{}
	for _, name := range slices.Sorted(maps.Keys(sets)) {
		s, ok := parseTallySet(name)
		if !ok || m.describe(name) == nil {
			continue
		}
		set := m.family.tallySet(s)
		m.tallies.sets[s] = set
		err := r.conn.Elements(set, func(e nfnl.Element) {
			if k, c, ok := m.parseTally(s, e.Key); ok {
				f := m.tallies.found[k]
				f.is[c] = true
				f.tally.set(c, e)
				m.tallies.found[k] = f
			} else {
				m.strays = append(m.strays, stray{set, string(e.Key)})
			}
		})
		if err := r.check(err); err != nil {
			return err
		}
	}
	return nil
}

// parseTally says what an element counts.
func (f *family) parseTally(s tallySet, key []byte) (k frontKey, c counter, ok bool) {
	if len(key) < 4 {
		return k, 0, false
	}
	if c, ok = counterOf(s, key[0]); !ok {
		return k, 0, false
	}
	k, _, ok = f.parseKey(door{class: s.class}, key[4:])
	return k, c, ok
}

// count makes the counters of a frontend be there and count for its owner.
func (m *mirror) count(k frontKey, f *frontend) {
	if !m.plot.countTraffic || k.door.here { // traffic from here has the same keys
		return
	}
	var made [counters]bool
	if !f.counted {
		f.counted = true
		found := m.tallies.found[k]
		delete(m.tallies.found, k)
		for c := range counters {
			if made[c] = !found.is[c]; made[c] {
				m.tx.addElement(m.provideTally(c.set(k.door.class)), m.tallyKey(c, k), nil)
			}
		}
	}
	if m.tallies.ledger != nil {
		m.tallies.ledger.open(k, f.owner, made)
	}
}

// uncount takes the counters of a frontend away.
func (m *mirror) uncount(k frontKey, f *frontend) {
	if !f.counted {
		return
	}
	f.counted = false
	for c := range counters {
		m.tx.deleteElement(m.provideTally(c.set(k.door.class)), m.tallyKey(c, k))
	}
	if m.tallies.ledger != nil {
		m.tallies.ledger.close(k)
	}
}

// uncountService ends the account of a service that is gone.
func (m *mirror) uncountService(k forwarding.ServiceKey) {
	if m.tallies.ledger != nil {
		m.tallies.ledger.drop(k)
	}
}

// provideTally makes a set be there.
func (m *mirror) provideTally(s tallySet) *nfnl.Set {
	set := m.tallies.sets[s]
	if set == nil {
		if m.tallies.sets == nil {
			m.tallies.sets = map[tallySet]*nfnl.Set{}
		}
		set = m.family.tallySet(s)
		m.tallies.sets[s] = set
		m.tx.addSet(set)
	}
	return set
}

// sweepTallies takes away the counters that were read back and belong to nothing.
func (m *mirror) sweepTallies() {
	for k, f := range m.tallies.found {
		for c := range counters {
			if f.is[c] {
				m.tx.deleteElement(m.provideTally(c.set(k.door.class)), m.tallyKey(c, k))
			}
		}
	}
	m.tallies.found = nil
}

// finishTallies makes the chains that count lead to the sets of the classes.
func (m *mirror) finishTallies(classes []class) {
	if !m.plot.countTraffic {
		return
	}
	for _, id := range append([]uint64{0}, ids(classes)...) {
		m.provideTally(tallySet{tallyTraffic, id})
		m.provideTally(tallySet{tallyConnections, id})
	}
	for _, c := range m.tallyChains(classes) {
		m.provideChain(c)
	}
}

func ids(classes []class) []uint64 {
	var out []uint64
	for _, c := range classes {
		out = append(out, c.id)
	}
	return out
}

// collectTallies gives up the sets of classes that there are no more, and says which chains count.
func (m *mirror) collectTallies(used map[string]bool) {
	if !m.plot.countTraffic {
		return
	}
	for _, c := range m.tallyBases() {
		used[c.name] = true
	}
	for s, set := range m.tallies.sets {
		if s.class != 0 && m.doors[door{class: s.class}] == nil {
			m.foreign = append(m.foreign, set)
			delete(m.tallies.sets, s)
			continue
		}
		used[s.name()] = true
	}
}

// tallyKey gives the key of a counter, valid until the next call of a key method.
func (m *mirror) tallyKey(c counter, k frontKey) []byte {
	m.key = append(m.key[:0], c.direction(), 0, 0, 0)
	if k.door.class == 0 {
		m.key = append(m.key, k.addr[:m.addrLen]...)
	}
	m.key = appendPort(m.key, k.proto, k.port)
	return m.key
}
