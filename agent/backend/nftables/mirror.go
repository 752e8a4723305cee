package nftables

import (
	"bytes"
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// shardLimit is from where on an endpoint map takes no further frontends: the kernel lists a map in time quadratic in its size. A
// frontend with more endpoints has a shard for itself. One that grows stays where it is: to move it would take a moment at
// which neither map serves every packet.
const shardLimit = 8192

// mirror is what the kernel's table of one family holds, and computes what must change for it to hold something else. Its methods
// write that to tx and to the mirror at once; so a mirror is only good for as long as the kernel accepts what is in tx.
type mirror struct {
	*family
	plot plot
	tx   *transaction

	exists    bool
	chains    map[string][]string // name → fingerprints of its rules
	foreign   []*nfnl.Set         // sets in our table that this version does not have
	strays    []stray
	doors     map[door]*doorState
	balancers map[balancer]int // → frontends that use it
	gates     map[gate]int     // likewise
	pins      bool             // there is the map of pins
	numberings
	fronts map[frontKey]*frontend
	// rivals are services that want a frontend that another one has: the first by key has it.
	rivals     map[frontKey][]forwarding.ServiceKey
	serviceIPs memberSet
	hairpin    memberSet
	// narrowing are the frontends that let in more sources than they are to, and those that they are to.
	narrowing map[frontKey][]netip.Prefix
	// ranges are the declared ranges, and bounds what is in the set.
	ranges  *nfnl.Set
	bounds  []bound
	tallies tallies
	// loopback says that node ports are served at loopback.
	loopback bool

	// dirtyClasses says that the node-port chains may have to change; garbage that something may be unused.
	dirtyClasses, garbage bool

	wanted    []want // scratch, as are the following
	previous  []want
	members   []member
	endpoints []byte
	key, data []byte
}

type stray struct {
	set *nfnl.Set
	key string
}

type doorState struct {
	set      *nfnl.Set
	prefixes []netip.Prefix // of a class, once a service wants it
	fronts   int
	shards   map[int]*shard
	newest   int // where the next frontend probably fits
	// sources are the sets of sources of guarded frontends, by prefix length; widened says that the chain that asks may lack one.
	sources map[int]*sourceSet
	widened bool
}

type shard struct {
	set                     *nfnl.Set
	index, elements, fronts int
	// draws and pinned are what the shard has for frontends that pin, nil if there never was one.
	draws, pinned *nfnl.Set
}

// memberSet is a plain set whose entries several services may share.
type memberSet struct {
	set  *nfnl.Set
	uses map[member]int
	key  func(m *mirror, e member) []byte
}

// action is what a frontend's verdict is.
type action uint8

const (
	absent  action = iota // it has none
	unknown               // one that we did not write
	refuse
	drop
	balance
)

type frontend struct {
	owner    forwarding.ServiceKey
	claimed  bool
	action   action
	balancer balancer // if action is balance
	guarded  bool     // a gate comes first
	sources  *sources // nil if there are none
	shard    *shard   // nil if slots is empty
	slots    slots
	// pins says that the slots are in the shard's draws and pinned rather than in the endpoint map, where their endpoints have numbers: by slot, 0 for a hole, as
	// numbering says. That is nil for what was read back and does not fit; held are the numbers that it counts.
	pins          bool
	numbers, held []uint32
	numbering     *numbering
	// counted says that its counters are there.
	counted bool
}

func newMirror(f *family, ground forwarding.Ground) *mirror {
	m := &mirror{
		family: f, plot: f.plot(ground), ranges: f.rangeSet(), chains: map[string][]string{}, doors: map[door]*doorState{}, balancers: map[balancer]int{}, gates: map[gate]int{}, narrowing: map[frontKey][]netip.Prefix{}, numberings: newNumberings(),
		fronts: map[frontKey]*frontend{}, rivals: map[frontKey][]forwarding.ServiceKey{},
	}
	sets := f.staticSets()
	m.serviceIPs = memberSet{sets[0], map[member]int{}, (*mirror).serviceIPKey}
	m.hairpin = memberSet{sets[1], map[member]int{}, (*mirror).hairpinKey}
	return m
}

func (f *family) newDoor(d door) *doorState {
	return &doorState{set: f.doorMap(d), shards: map[int]*shard{}, sources: map[int]*sourceSet{}}
}

// door gives the state of a door, creating its map in the kernel if it is new.
func (m *mirror) door(d door) *doorState {
	ds := m.doors[d]
	if ds == nil {
		ds = m.newDoor(d)
		m.doors[d] = ds
		m.tx.addSet(ds.set)
	}
	return ds
}

// ensureChain makes a chain be there with exactly these rules.
func (m *mirror) ensureChain(c chain) {
	batch := &m.tx.new
	if len(m.chains[c.name]) > 0 {
		batch = &m.tx.now // packets pass it already
	}
	m.setChain(c, batch)
}

// setChain makes a chain that is there have exactly these rules.
func (m *mirror) setChain(c chain, batch *nfnl.Batch) {
	want := make([]string, len(c.rules))
	for i, r := range c.rules {
		want[i] = r.Fingerprint()
	}
	if !slices.Equal(m.chains[c.name], want) {
		m.tx.setRules(m.table(), c, batch)
		m.chains[c.name] = want
	}
}

// ensureStatic makes everything be there that does not depend on services, and completes what is there of balancers.
func (m *mirror) ensureStatic(sets map[string]*nfnl.Set) {
	if !m.exists {
		m.tx.addTable(m.table())
		m.exists = true
	}
	for _, s := range m.staticSets() {
		if sets[s.Name] == nil {
			m.tx.addSet(s)
		}
	}
	m.ensureRanges(sets)
	for _, d := range []door{{}, {here: true}} {
		if m.doors[d] == nil {
			m.doors[d] = m.newDoor(d)
		}
	}
	chains := append(m.staticChains(m.plot), chain{name: chainNodePorts}, chain{name: chainNodePorts + hereSuffix})
	m.pins = sets[mapPins] != nil
	for b := range m.balancers {
		if s := m.shardOf(b); s != nil {
			m.providePins(b.pin)
			if b.kind != balancing {
				m.providePinning(b.door, s)
			}
			chains = append(chains, chain{name: b.name(), rules: b.rules(m.family)})
		}
	}
	chains = append(chains, m.adoptGates()...)
	// All chains before any rule: rules jump to them.
	for _, c := range chains {
		if _, exists := m.chains[c.name]; !exists {
			m.tx.addChain(m.table(), c)
			m.chains[c.name] = nil
		}
	}
	for _, c := range chains {
		if c.name != chainNodePorts && c.name != chainNodePorts+hereSuffix { // classes are not known yet
			m.ensureChain(c)
		}
	}
	m.dirtyClasses, m.garbage = true, true
}

func (m *mirror) shardOf(b balancer) *shard {
	if ds := m.doors[b.door]; ds != nil {
		return ds.shards[b.shard]
	}
	return nil
}

// prepare makes the doors that a service needs, before any of its traffic is to pass them.
func (m *mirror) prepare(s *forwarding.Service) {
	if s.NodePort == 0 {
		return
	}
	id := classOf(m.family, s.NodePortAddresses)
	if id == 0 {
		return
	}
	for _, here := range []bool{false, true} {
		ds := m.door(door{id, here})
		if ds.prefixes == nil {
			for _, p := range s.NodePortAddresses {
				if m.is(p.Addr()) {
					ds.prefixes = append(ds.prefixes, p.Masked())
				}
			}
			m.dirtyClasses = true
		}
	}
}

// claim makes a service the owner of the frontends that it wants, or a rival of who owns them.
func (m *mirror) claim(svc *forwarding.Service) {
	m.prepare(svc)
	m.wanted = m.wants(m.wanted[:0], svc, m.plot.serviceIPs())
	for i := range m.wanted {
		w := &m.wanted[i]
		f := m.adopted(w.key)
		if f.claimed && f.owner != svc.Key {
			if svc.Key.Compare(f.owner) > 0 {
				m.addRival(w.key, svc.Key)
				continue
			}
			m.addRival(w.key, f.owner)
			m.removeRival(w.key, svc.Key)
		}
		f.owner, f.claimed = svc.Key, true
		m.count(w.key, f)
	}
}

// adoptNumbers lets a service go on with the numbers that were read back of its frontends. Every service must have claimed its frontends before.
func (m *mirror) adoptNumbers(svc *forwarding.Service) {
	if svc.Affinity == 0 {
		return
	}
	m.wanted = m.wants(m.wanted[:0], svc, m.plot.serviceIPs())
	for i := range m.wanted {
		if f := m.fronts[m.wanted[i].key]; f.owner == svc.Key && f.pins && f.numbering == nil {
			m.endpoints = m.family.endpoints(m.endpoints[:0], m.wanted[i].target)
			f.numbering, f.held = m.numberings.adopt(svc.Key, m.family, f.slots, f.numbers, m.endpoints)
		}
	}
}

// fill makes the frontends that a service owns forward as it wants. prev is the service before, or nil.
func (m *mirror) fill(prev, svc *forwarding.Service) {
	m.wanted = m.wants(m.wanted[:0], svc, m.plot.serviceIPs())
	for i := range m.wanted {
		w := &m.wanted[i]
		if f := m.fronts[w.key]; f.owner == svc.Key {
			m.place(f, w)
		}
	}
	if prev != nil && slices.Equal(prev.ServiceIPs, svc.ServiceIPs) && sameHairpins(prev, svc) {
		return
	}
	m.eachMember(svc, m.acquire)
	if prev != nil {
		m.eachMember(prev, m.release)
	}
}

// sameHairpins says cheaply that two versions of a service have the same endpoints here; false may be wrong.
func sameHairpins(a, b *forwarding.Service) bool {
	local := func(s *forwarding.Service) bool {
		for _, t := range [...]*forwarding.Target{&s.Internal, &s.External, &s.ExternalFromHere} {
			for i := range t.Endpoints {
				if t.Endpoints[i].Local {
					return true
				}
			}
		}
		return false
	}
	return !local(a) && !local(b)
}

// eachMember calls f for every entry of a plain set that a service needs.
func (m *mirror) eachMember(s *forwarding.Service, f func(*memberSet, member)) {
	m.members = m.family.serviceIPs(m.members[:0], s)
	for _, e := range m.members {
		f(&m.serviceIPs, e)
	}
	m.members = m.hairpins(m.members[:0], s)
	for _, e := range m.members {
		f(&m.hairpin, e)
	}
}

func (m *mirror) acquire(s *memberSet, e member) {
	n, exists := s.uses[e]
	if !exists {
		m.tx.addElement(s.set, s.key(m, e), nil)
	}
	s.uses[e] = n + 1
}

func (m *mirror) release(s *memberSet, e member) {
	if s.uses[e]--; s.uses[e] == 0 {
		m.tx.deleteElement(s.set, s.key(m, e))
		delete(s.uses, e)
	}
}

// forget takes away what prev had and svc (nil if the service is gone) has not. Another service that wants it gets it.
func (m *mirror) forget(prev, svc *forwarding.Service, next forwarding.State) {
	m.previous = m.wants(m.previous[:0], prev, m.plot.serviceIPs())
	m.wanted = m.wanted[:0]
	if svc != nil {
		m.wanted = m.wants(m.wanted, svc, m.plot.serviceIPs())
	} else {
		m.eachMember(prev, m.release)
		m.uncountService(prev.Key)
	}
	for i := range m.previous {
		key := m.previous[i].key
		if slices.ContainsFunc(m.wanted, func(w want) bool { return w.key == key }) {
			continue
		}
		f := m.fronts[key]
		if f == nil || !f.claimed || f.owner != prev.Key {
			m.removeRival(key, prev.Key)
			continue
		}
		if !m.inherit(f, key, next) {
			m.remove(key, f)
		}
	}
}

// inherit gives a frontend that its owner let go of to the first of its rivals.
func (m *mirror) inherit(f *frontend, key frontKey, next forwarding.State) bool {
	for len(m.rivals[key]) > 0 {
		heir := m.rivals[key][0]
		m.removeRival(key, heir)
		svc := next.Get(heir)
		if svc == nil {
			continue
		}
		wants := m.wants(nil, svc, m.plot.serviceIPs())
		if i := slices.IndexFunc(wants, func(w want) bool { return w.key == key }); i >= 0 {
			f.owner = heir
			m.count(key, f)
			m.place(f, &wants[i])
			return true
		}
	}
	return false
}

func (m *mirror) addRival(key frontKey, k forwarding.ServiceKey) {
	list := m.rivals[key]
	if i, found := slices.BinarySearchFunc(list, k, forwarding.ServiceKey.Compare); !found {
		m.rivals[key] = slices.Insert(list, i, k)
	}
}

func (m *mirror) removeRival(key frontKey, k forwarding.ServiceKey) {
	list := m.rivals[key]
	i, found := slices.BinarySearchFunc(list, k, forwarding.ServiceKey.Compare)
	if !found {
		return
	}
	if list = slices.Delete(list, i, i+1); len(list) == 0 {
		delete(m.rivals, key)
		return
	}
	m.rivals[key] = list
}

// place makes a frontend be as w wants it.
func (m *mirror) place(f *frontend, w *want) {
	m.endpoints = m.family.endpoints(m.endpoints[:0], w.target)
	n := len(m.endpoints) / m.slotLen()
	from, closed := m.admits(w)
	if n == 0 || closed {
		a := refuse
		if closed || w.target.Action(m.bit) == forwarding.Drop {
			a, from = drop, nil
		}
		m.admit(w.key, f, from)
		m.setVerdict(w.key, f, a, balancer{})
		m.setSlots(w.key, f, nil, nil)
		m.leaveShard(f)
		return
	}
	size := slotsFor(n, m.slotCount(f.slots))
	if f.shard == nil {
		m.enterShard(f, w.key.door, n)
	}
	var pinning *numbering
	if w.pin != 0 {
		m.providePinning(w.key.door, f.shard)
		pinning = m.numberings.provide(f.owner)
	}
	m.setSlots(w.key, f, m.arrange(f.slots, m.endpoints, size), pinning)
	m.admit(w.key, f, from)
	m.setVerdict(w.key, f, balance, balancer{door: w.key.door, shard: f.shard.index, hash: w.hash, size: size, masq: w.masq, pin: w.pin})
}

// remove takes a frontend away.
func (m *mirror) remove(key frontKey, f *frontend) {
	ds := m.doors[key.door]
	if f.action != absent {
		m.tx.deleteElement(ds.set, m.doorKey(key))
	}
	m.unref(key.door, f)
	delete(m.narrowing, key)
	m.expel(key, f, nil, m.tx.deleteElement)
	m.setSlots(key, f, nil, nil)
	m.leaveShard(f)
	m.uncount(key, f)
	delete(m.fronts, key)
	ds.fronts--
	m.garbage = true
}

// setSlots changes the endpoints of a frontend element by element. n gives them numbers if it pins, else it is nil.
func (m *mirror) setSlots(key frontKey, f *frontend, next slots, n *numbering) {
	var numbers []uint32
	if n != nil {
		numbers = n.take(m.family, next)
	}
	change := func(pins bool, old, next numberedSlots) {
		if pins {
			m.changePinned(key, f.shard, old, next)
		} else {
			m.changeSlots(key, f.shard, old.slots, next.slots)
		}
	}
	from, to := numberedSlots{f.slots, f.numbers}, numberedSlots{next, numbers}
	if f.pins == (n != nil) {
		change(f.pins, from, to)
	} else {
		change(n != nil, numberedSlots{}, to)
		change(f.pins, from, numberedSlots{})
	}
	if f.numbering != nil {
		f.numbering.give(m.family, f.slots, f.held)
		m.numberings.drop(f.numbering)
	}
	f.slots, f.numbers, f.held, f.pins, f.numbering = next, numbers, numbers, n != nil, n
}

func (m *mirror) changeSlots(key frontKey, s *shard, old, next slots) {
	same := func(i int) bool {
		return i < m.slotCount(old) && i < m.slotCount(next) && bytes.Equal(m.slot(old, i), m.slot(next, i))
	}
	for i := range m.slotCount(old) {
		if !empty(m.slot(old, i)) && !same(i) {
			m.tx.deleteElement(s.set, m.slotKey(key, i))
			s.elements--
		}
	}
	for i := range m.slotCount(next) {
		if !empty(m.slot(next, i)) && !same(i) {
			m.tx.addElement(s.set, m.slotKey(key, i), m.slotData(m.slot(next, i)))
			s.elements++
		}
	}
}

// setVerdict gives a frontend its verdict and makes the chains that it leads to. A gate comes first if it has sources to let in, or will have no more only
// once the verdict has changed.
func (m *mirror) setVerdict(key frontKey, f *frontend, a action, b balancer) {
	if a == balance && m.balancers[b] == 0 {
		m.providePins(b.pin)
		for _, h := range b.helpers() {
			if m.balancers[h] == 0 {
				m.provideChain(chain{name: h.name(), rules: h.rules(m.family)})
			}
		}
		m.provideChain(chain{name: b.name(), rules: b.rules(m.family)})
	}
	g, guarded := gate{key.door, b}, m.guarded(key, f)
	if guarded && m.gates[g] == 0 {
		m.provideGate(g)
	}
	if f.action == a && f.balancer == b && f.guarded == guarded {
		return
	}
	v := nfnl.Verdict{Code: nfnl.Goto, Chain: chainRefuse}
	switch {
	case guarded:
		v.Chain = g.name()
	case a == drop:
		v = nfnl.Verdict{Code: nfnl.Drop}
	case a == balance:
		v.Chain = b.name()
	}
	if a == balance {
		m.ref(b)
	}
	if guarded {
		m.gates[g]++
	}
	m.tx.setVerdict(m.doors[key.door].set, m.doorKey(key), v, f.action != absent)
	m.unref(key.door, f)
	f.action, f.balancer, f.guarded = a, b, guarded
}

// provideChain makes a chain that may be new be there with exactly these rules.
func (m *mirror) provideChain(c chain) {
	if _, exists := m.chains[c.name]; !exists {
		m.tx.addChain(m.table(), c)
		m.chains[c.name] = nil
	}
	m.ensureChain(c)
}

// ref counts a frontend that uses a balancer.
func (m *mirror) ref(b balancer) {
	m.balancers[b]++
	for _, h := range b.helpers() {
		m.balancers[h]++
	}
}

// unref lets go of the chains that a frontend's verdict used.
func (m *mirror) unref(d door, f *frontend) {
	if f.action == balance {
		m.balancers[f.balancer]--
		m.garbage = m.garbage || m.balancers[f.balancer] == 0
		for _, h := range f.balancer.helpers() {
			m.balancers[h]--
			m.garbage = m.garbage || m.balancers[h] == 0
		}
	}
	if f.guarded {
		g := gate{d, f.balancer}
		m.gates[g]--
		m.garbage = m.garbage || m.gates[g] == 0
	}
}

func (m *mirror) enterShard(f *frontend, d door, n int) {
	ds := m.doors[d]
	fits := func(s *shard) bool { return s != nil && (s.elements+n <= shardLimit || s.elements == 0) }
	if !fits(ds.shards[ds.newest]) {
		ds.newest = -1
		for _, i := range slices.Sorted(maps.Keys(ds.shards)) {
			if fits(ds.shards[i]) {
				ds.newest = i
				break
			}
		}
	}
	if ds.newest < 0 || ds.shards[ds.newest] == nil {
		ds.newest = 0
		for ds.shards[ds.newest] != nil {
			ds.newest++
		}
		s := &shard{set: m.endpointMap(d, ds.newest), index: ds.newest}
		ds.shards[s.index] = s
		m.tx.addSet(s.set)
	}
	f.shard = ds.shards[ds.newest]
	f.shard.fronts++
}

func (m *mirror) leaveShard(f *frontend) {
	if f.shard != nil {
		f.shard.fronts--
		m.garbage = m.garbage || f.shard.fronts == 0
		f.shard = nil
	}
}

// unclaimed gives the frontends that no service wants.
func (m *mirror) unclaimed() []frontKey {
	var keys []frontKey
	for key, f := range m.fronts {
		if !f.claimed {
			keys = append(keys, key)
		}
	}
	return keys
}

// sweep takes away what was read back and fits nowhere.
func (m *mirror) sweep() {
	for _, s := range m.strays {
		m.tx.deleteElement(s.set, []byte(s.key))
	}
	m.strays = nil
	m.sweepTallies()
	for _, s := range []*memberSet{&m.serviceIPs, &m.hairpin} {
		for e, uses := range s.uses {
			if uses == 0 {
				m.tx.deleteElement(s.set, s.key(m, e))
				delete(s.uses, e)
			}
		}
	}
}

// finish completes a transaction: sources that are gone are no longer let in, and node-port chains match the classes that are wanted by now.
func (m *mirror) finish() {
	m.widen()
	m.narrow()
	if !m.dirtyClasses {
		return
	}
	m.dirtyClasses = false
	var classes []class
	for d, ds := range m.doors {
		if d.class != 0 && !d.here && len(ds.prefixes) > 0 {
			classes = append(classes, class{d.class, ds.prefixes})
		}
	}
	m.loopback = m.localhost && slices.ContainsFunc(classes, func(c class) bool { return slices.ContainsFunc(c.prefixes, m.loopbackPrefix) })
	if m.loopback {
		m.provideChain(m.loopbackGuard())
	}
	for _, c := range m.nodePortChains(classes) {
		m.ensureChain(c)
	}
	m.finishTallies(classes)
}

// collect deletes chains and maps that nothing uses any more.
func (m *mirror) collect() {
	if !m.garbage {
		return
	}
	m.garbage = false
	for b, uses := range m.balancers {
		if uses == 0 {
			delete(m.balancers, b)
		}
	}
	for g, uses := range m.gates {
		if uses == 0 {
			delete(m.gates, g)
		}
	}
	m.collectSources()
	for d, ds := range m.doors {
		for i, s := range ds.shards {
			if s.fronts == 0 {
				m.foreign = append(m.foreign, s.set)
				if s.draws != nil {
					m.foreign = append(m.foreign, s.draws, s.pinned)
				}
				delete(ds.shards, i)
			}
		}
		if twin := m.doors[door{d.class, !d.here}]; d.class != 0 && ds.fronts == 0 && (twin == nil || twin.fronts == 0) {
			ds.prefixes = nil
			m.dirtyClasses = true
		}
	}
	for d, ds := range m.doors {
		if d.class != 0 && ds.prefixes == nil {
			m.foreign = append(m.foreign, ds.set)
			delete(m.doors, d)
		}
	}
	m.finish()
	m.collectChains()
	for _, s := range m.foreign {
		m.tx.deleteSet(s)
	}
	m.foreign = nil
}

func (m *mirror) collectChains() {
	used := map[string]bool{chainNodePorts: true, chainNodePorts + hereSuffix: true, chainFilterInput: m.loopback}
	for _, c := range m.staticChains(m.plot) {
		used[c.name] = true
	}
	for b := range m.balancers {
		used[b.name()] = true
	}
	for g := range m.gates {
		used[g.name()], used[fromChain(g.door)] = true, true
	}
	m.collectTallies(used)
	var unused []string
	for name := range m.chains {
		if !used[name] {
			unused = append(unused, name)
			delete(m.chains, name)
		}
	}
	slices.Sort(unused)
	m.tx.deleteChains(m.table(), unused)
}

// doorKey gives the key of a frontend in its door's map, valid until the next call of a key method.
func (m *mirror) doorKey(k frontKey) []byte {
	m.key = m.key[:0]
	if k.door.class == 0 {
		m.key = append(m.key, k.addr[:m.addrLen]...)
	}
	m.key = appendPort(m.key, k.proto, k.port)
	return m.key
}

func (m *mirror) slotKey(k frontKey, slot int) []byte {
	// The kernel computes the slot in a register, so it is in the machine's byte order.
	m.key = binary.NativeEndian.AppendUint32(m.doorKey(k), uint32(slot))
	return m.key
}

func (m *mirror) slotData(slot []byte) []byte {
	m.data = append(append(m.data[:0], slot...), 0, 0)
	return m.data
}

func (m *mirror) serviceIPKey(e member) []byte {
	m.key = append(m.key[:0], e.addr[:m.addrLen]...)
	return m.key
}

func (m *mirror) hairpinKey(e member) []byte {
	m.key = append(m.key[:0], e.addr[:m.addrLen]...)
	m.key = append(m.key, e.addr[:m.addrLen]...)
	m.key = appendPort(m.key, e.proto, e.port)
	return m.key
}

func appendPort(key []byte, proto forwarding.Protocol, port uint16) []byte {
	key = append(key, byte(proto), 0, 0, 0)
	return append(key, byte(port>>8), byte(port), 0, 0)
}
