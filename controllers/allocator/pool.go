package allocator

import (
	"cmp"
	"encoding/binary"
	"math"
	"net/netip"
	"slices"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// class is what an offset of a pool counts as.
type class uint8

const (
	free        class = iota
	allocated         // a claim of the pool's policy holds it
	quarantined       // a released claim rests on it, and nobody has it
	foreign           // held by a Service that the pool's policy does not cover
)

// Counts counts the addresses or ports of a pool. Numbers beyond the int64 range are math.MaxInt64.
type Counts struct {
	Total       int64 // can be given out at all
	Allocated   int64
	Quarantined int64
	Foreign     int64
	Free        int64 // can be given out now
}

func (c Counts) add(o Counts) Counts {
	sum := func(a, b int64) int64 {
		if a > math.MaxInt64-b {
			return math.MaxInt64
		}
		return a + b
	}
	return Counts{sum(c.Total, o.Total), sum(c.Allocated, o.Allocated), sum(c.Quarantined, o.Quarantined), sum(c.Foreign, o.Foreign), sum(c.Free, o.Free)}
}

// poolID tells what a pool was made from; a pool whose ID stays the same is kept when policies change.
type poolID struct {
	policy string
	prefix netip.Prefix
	ports  PortRange
}

// pool is one range of one policy: which of its offsets are free, and how many are what.
type pool struct {
	poolID
	allocation  v1alpha1.RangeAllocation
	use         v1alpha1.RangeUse
	usable      bool
	first, last uint64 // the offsets that can be given out, both included
	band        uint64 // where the upper band begins; what lies below it is left for Services that ask for a particular address
	excluded    []span // sorted, disjoint, within first and last
	free        offsets
	used        uint64 // offsets not excluded and not free
	counts      [4]int64
}

// bandSize is how many addresses or ports at the bottom of a range automatic picks leave alone while there are others: the API
// server's own formula (k8s.io/kubernetes pkg/registry/core/service, calculateRangeOffset), so that static addresses are as safe
// in our ranges as in its own.
func bandSize(size, step, most uint64) uint64 {
	const least = 16
	if size <= least {
		return 0
	}
	return min(max(least, size/step), most)
}

// newAddrPool makes a pool of addresses; it must be filled before use.
func newAddrPool(policy string, r *Range) *pool {
	p := &pool{poolID: poolID{policy: policy, prefix: r.Prefix}}
	hostBits := r.Prefix.Addr().BitLen() - r.Prefix.Bits()
	p.last = math.MaxUint64 >> (64 - hostBits)
	size := max(p.last, p.last+1) // one too few where it would be 2^64; the band's formula does not mind
	if r.Prefix.Addr().Is4() {
		p.last-- // the broadcast address
	}
	p.first = 1 // the network address, in IPv6 the subnet router's anycast address
	p.band = p.first + bandSize(size, 16, 256)
	for _, e := range r.Excluded {
		if e.Overlaps(r.Prefix) {
			p.exclude(p.spanOfPrefix(e))
		}
	}
	p.mergeExcluded()
	return p
}

// newPortPool makes a pool of node ports; it must be filled before use.
func newPortPool(policy string, r PortRange, excluded []PortRange) *pool {
	p := &pool{poolID: poolID{policy: policy, ports: r}, usable: true, allocation: v1alpha1.RangeAllocationAutomatic}
	p.last = uint64(r.Size() - 1)
	p.band = bandSize(uint64(r.Size()), 32, 128)
	for _, e := range excluded {
		p.exclude(span{uint64(e.First - r.First), uint64(e.Last - r.First)})
	}
	p.mergeExcluded()
	return p
}

func (p *pool) spanOfPrefix(e netip.Prefix) span {
	if e.Bits() <= p.prefix.Bits() {
		return span{0, math.MaxUint64}
	}
	first := p.offset(AddrLock(e.Addr()))
	return span{first, first | math.MaxUint64>>(64-(e.Addr().BitLen()-e.Bits()))}
}

func (p *pool) exclude(s span) {
	s = span{max(s.first, p.first), min(s.last, p.last)}
	if s.first <= s.last {
		p.excluded = append(p.excluded, s)
	}
}

func (p *pool) mergeExcluded() {
	slices.SortFunc(p.excluded, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	merged := p.excluded[:0]
	for _, s := range p.excluded {
		if n := len(merged); n > 0 && s.first <= merged[n-1].last {
			merged[n-1].last = max(merged[n-1].last, s.last)
		} else {
			merged = append(merged, s)
		}
	}
	p.excluded = merged
}

// fill makes the set of free offsets of a new pool, in which nothing is held.
func (p *pool) fill() {
	if p.last >= denseLimit {
		p.free = &sparse{taken: map[uint64]struct{}{}, excluded: p.excluded}
		return
	}
	b := newBitmap(p.last + 1)
	from := p.first
	for _, s := range p.excluded {
		b.giveAll(from, s.first)
		from = s.last + 1
	}
	b.giveAll(from, p.last+1)
	p.free = b
}

func (p *pool) family() v1alpha1.IPFamily { return FamilyOf(p.prefix.Addr()) }

// String is the range as its policy declares it.
func (p *pool) String() string {
	if p.ports.First != 0 {
		return p.ports.String()
	}
	return p.prefix.String()
}

// contains says whether the lock lies in the pool's range, given out or not.
func (p *pool) contains(l Lock) bool {
	if l.IsPort() {
		return p.ports.Contains(l.Port)
	}
	return p.prefix.Contains(l.Addr)
}

// available says whether the lock can be given out when nobody holds it.
func (p *pool) available(l Lock) bool {
	o := p.offset(l)
	_, excluded := spanOf(p.excluded, o)
	return p.first <= o && o <= p.last && !excluded
}

func (p *pool) offset(l Lock) uint64 {
	if l.IsPort() {
		return uint64(l.Port - p.ports.First)
	}
	return lowBits(l.Addr) - lowBits(p.prefix.Addr())
}

func (p *pool) lock(o uint64) Lock {
	if p.ports.First != 0 {
		return PortLock(p.ports.First + uint16(o))
	}
	if base := p.prefix.Addr(); base.Is4() {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(lowBits(base)+o))
		return Lock{Addr: netip.AddrFrom4(b)}
	}
	b := p.prefix.Addr().As16()
	binary.BigEndian.PutUint64(b[8:], lowBits(p.prefix.Addr())+o)
	return Lock{Addr: netip.AddrFrom16(b)}
}

// lowBits is the address as a number, for IPv6 its lower half: a range is at most a /64.
func lowBits(a netip.Addr) uint64 {
	if a.Is4() {
		b := a.As4()
		return uint64(binary.BigEndian.Uint32(b[:]))
	}
	b := a.As16()
	return binary.BigEndian.Uint64(b[8:])
}

// count moves one lock from one class to another.
func (p *pool) count(l Lock, from, to class) {
	if from == to {
		return
	}
	p.counts[from]--
	p.counts[to]++
	if !p.available(l) {
		return
	}
	switch o := p.offset(l); {
	case to == free:
		p.free.give(o)
		p.used--
	case from == free:
		p.free.take(o)
		p.used++
	}
}

func (p *pool) total() uint64 {
	total := p.last - p.first + 1 // at most 2^64-1, since first is 1 where last is the largest
	for _, s := range p.excluded {
		total -= s.last - s.first + 1
	}
	return total
}

func (p *pool) stats() Counts {
	total := p.total()
	return Counts{
		Total: clamp(total), Free: clamp(total - p.used),
		Allocated: p.counts[allocated], Quarantined: p.counts[quarantined], Foreign: p.counts[foreign],
	}
}

func clamp(n uint64) int64 { return int64(min(n, math.MaxInt64)) }

// probes is how many random offsets pick tries. While a quarter of a band is free, one of them almost surely is.
const probes = 32

// pick finds a free offset of the upper band or of the lower one, if it can one that is preferred.
//
// Any free one is as likely as any other while there are some, because other replicas pick at the same time and know of this pick only later: the first free one
// after a random start would often be the one after a long stretch that is excluded or full, for all of them.
func (p *pool) pick(upper bool, random func(uint64) uint64, preferred func(offset uint64) bool) (Lock, bool) {
	from, to := p.band, p.last
	if !upper {
		if p.band <= p.first {
			return Lock{}, false
		}
		from, to = p.first, min(p.band-1, p.last)
	}
	if from > to {
		return Lock{}, false
	}
	room := to - from + 1
	for _, e := range p.excluded {
		if e.last >= from && e.first <= to {
			room -= min(e.last, to) - max(e.first, from) + 1
		}
	}
	if room == 0 {
		return Lock{}, false
	}
	start := from
	for range probes {
		start = p.nth(from, random(room))
		if _, ok := p.free.next(start, start); ok && preferred(start) {
			return p.lock(start), true
		}
	}
	o, ok := p.free.next(start, to)
	if !ok && start > from {
		o, ok = p.free.next(from, start-1)
	}
	if !ok {
		return Lock{}, false
	}
	return p.lock(o), true
}

// nth is the n-th offset from from on that is not excluded.
func (p *pool) nth(from, n uint64) uint64 {
	o := from + n
	for _, e := range p.excluded {
		if e.last < from {
			continue
		}
		if e.first > o {
			break
		}
		o += e.last - max(e.first, from) + 1
	}
	return o
}
