package forwarding

import (
	"hash/maphash"
	"iter"
	"math/bits"
)

// State is an immutable snapshot of everything a backend forwards. The zero value is empty. It is a persistent hash trie:
// With copies only the path to what it changes, so snapshots share the rest and Changes skips shared parts by comparing pointers.
type State struct {
	root   *node
	size   int
	ground *Ground // nil for the zero value
}

const (
	levelBits = 5
	levelMask = 1<<levelBits - 1
	// Below this depth all 64 bits of the hash are used up and keys that still collide share one leaf list.
	maxDepth = 12
)

// The seed differs between processes. It decides only where a key lies in the trie, never the outcome of a call except the
// order of iteration, which callers must not rely on.
var seed = maphash.MakeSeed()

func hashOf(k ServiceKey) uint64 { return maphash.Comparable(seed, k) }

// node is a bitmap-compressed inner node. Slot i holds a sub-node or a list of services whose hashes agree so far (one service,
// but for collisions at maxDepth).
type node struct {
	bitmap uint32
	slots  []slot
}

type slot struct {
	sub    *node
	leaves []*Service
}

// Ground gives what holds for all services.
func (s State) Ground() Ground {
	if s.ground == nil {
		return Ground{}
	}
	return *s.ground
}

// On gives the state with the same services on another ground. The caller must not change what g refers to afterwards.
func (s State) On(g Ground) State {
	if !s.Ground().Equal(g) {
		s.ground = &g
	}
	return s
}

// Len gives the number of services.
func (s State) Len() int { return s.size }

// Get gives the service of a key, or nil.
func (s State) Get(k ServiceKey) *Service {
	h := hashOf(k)
	for n, depth := s.root, 0; n != nil; depth++ {
		bit := uint32(1) << (h >> (depth * levelBits) & levelMask)
		if n.bitmap&bit == 0 {
			return nil
		}
		sl := n.slots[bits.OnesCount32(n.bitmap&(bit-1))]
		if sl.sub == nil {
			for _, svc := range sl.leaves {
				if svc.Key == k {
					return svc
				}
			}
			return nil
		}
		n = sl.sub
	}
	return nil
}

// All gives the services in no particular order.
func (s State) All() iter.Seq[*Service] {
	return func(yield func(*Service) bool) { s.root.each(yield) }
}

func (n *node) each(yield func(*Service) bool) bool {
	if n == nil {
		return true
	}
	for _, sl := range n.slots {
		if sl.sub != nil {
			if !sl.sub.each(yield) {
				return false
			}
			continue
		}
		for _, svc := range sl.leaves {
			if !yield(svc) {
				return false
			}
		}
	}
	return true
}

// With gives the state that has svc in the place of what had its key. The caller must not change svc afterwards.
func (s State) With(svc *Service) State {
	root, grown := s.root.with(hashOf(svc.Key), 0, svc)
	s.root = root
	if grown {
		s.size++
	}
	return s
}

func (n *node) with(h uint64, depth int, svc *Service) (*node, bool) {
	bit := uint32(1) << (h >> (depth * levelBits) & levelMask)
	if n == nil {
		return &node{bit, []slot{{leaves: []*Service{svc}}}}, true
	}
	i := bits.OnesCount32(n.bitmap & (bit - 1))
	if n.bitmap&bit == 0 {
		slots := make([]slot, len(n.slots)+1)
		copy(slots, n.slots[:i])
		slots[i] = slot{leaves: []*Service{svc}}
		copy(slots[i+1:], n.slots[i:])
		return &node{n.bitmap | bit, slots}, true
	}
	changed, grown := n.slots[i].with(h, depth, svc)
	slots := make([]slot, len(n.slots))
	copy(slots, n.slots)
	slots[i] = changed
	return &node{n.bitmap, slots}, grown
}

func (sl slot) with(h uint64, depth int, svc *Service) (slot, bool) {
	if sl.sub != nil {
		sub, grown := sl.sub.with(h, depth+1, svc)
		return slot{sub: sub}, grown
	}
	for i, old := range sl.leaves {
		if old.Key == svc.Key {
			leaves := make([]*Service, len(sl.leaves))
			copy(leaves, sl.leaves)
			leaves[i] = svc
			return slot{leaves: leaves}, false
		}
	}
	if depth == maxDepth {
		return slot{leaves: append(sl.leaves[:len(sl.leaves):len(sl.leaves)], svc)}, true
	}
	var sub *node
	for _, old := range sl.leaves {
		sub, _ = sub.with(hashOf(old.Key), depth+1, old)
	}
	sub, _ = sub.with(h, depth+1, svc)
	return slot{sub: sub}, true
}

// Without gives the state that lacks the key.
func (s State) Without(k ServiceKey) State {
	root, shrunk := s.root.without(hashOf(k), 0, k)
	if shrunk {
		s.root, s.size = root, s.size-1
	}
	return s
}

func (n *node) without(h uint64, depth int, k ServiceKey) (*node, bool) {
	if n == nil {
		return nil, false
	}
	bit := uint32(1) << (h >> (depth * levelBits) & levelMask)
	if n.bitmap&bit == 0 {
		return n, false
	}
	i := bits.OnesCount32(n.bitmap & (bit - 1))
	changed, shrunk := n.slots[i].without(h, depth, k)
	if !shrunk {
		return n, false
	}
	if changed.sub == nil && len(changed.leaves) == 0 {
		if len(n.slots) == 1 {
			return nil, true
		}
		slots := make([]slot, 0, len(n.slots)-1)
		slots = append(append(slots, n.slots[:i]...), n.slots[i+1:]...)
		return &node{n.bitmap &^ bit, slots}, true
	}
	slots := make([]slot, len(n.slots))
	copy(slots, n.slots)
	slots[i] = changed
	return &node{n.bitmap, slots}, true
}

func (sl slot) without(h uint64, depth int, k ServiceKey) (slot, bool) {
	if sl.sub != nil {
		sub, shrunk := sl.sub.without(h, depth+1, k)
		return slot{sub: sub}, shrunk
	}
	for i, old := range sl.leaves {
		if old.Key == k {
			leaves := make([]*Service, 0, len(sl.leaves)-1)
			leaves = append(append(leaves, sl.leaves[:i]...), sl.leaves[i+1:]...)
			return slot{leaves: leaves}, true
		}
	}
	return sl, false
}

// Change is one service that differs between two states. Prev is nil if it was added, Next is nil if it was removed.
type Change struct {
	Prev, Next *Service
}

// Changes gives which services differ from prev to next, in no particular order; the ground is not looked at. Its cost is proportional to the number of differences for states
// that derive from one another, and to their size otherwise.
func Changes(prev, next State) iter.Seq[Change] {
	return func(yield func(Change) bool) { diffNodes(prev.root, next.root, yield) }
}

func diffNodes(a, b *node, yield func(Change) bool) bool {
	if a == b {
		return true
	}
	var both uint32
	if a != nil {
		both |= a.bitmap
	}
	if b != nil {
		both |= b.bitmap
	}
	for ; both != 0; both &= both - 1 {
		bit := both & -both
		sa, sb := a.at(bit), b.at(bit)
		if sa.sub != nil && sb.sub != nil {
			if !diffNodes(sa.sub, sb.sub, yield) {
				return false
			}
			continue
		}
		if !diffSlots(sa, sb, yield) {
			return false
		}
	}
	return true
}

func (n *node) at(bit uint32) slot {
	if n == nil || n.bitmap&bit == 0 {
		return slot{}
	}
	return n.slots[bits.OnesCount32(n.bitmap&(bit-1))]
}

// diffSlots compares two slots of which at most one has a sub-node, so at least one is a short list.
func diffSlots(a, b slot, yield func(Change) bool) bool {
	ok := a.each(func(old *Service) bool {
		cur := b.find(old.Key)
		if cur == old || (cur != nil && old.Equal(cur)) {
			return true
		}
		return yield(Change{old, cur})
	})
	if !ok {
		return false
	}
	return b.each(func(cur *Service) bool {
		if a.find(cur.Key) != nil {
			return true
		}
		return yield(Change{nil, cur})
	})
}

func (sl slot) each(yield func(*Service) bool) bool {
	if sl.sub != nil {
		return sl.sub.each(yield)
	}
	for _, svc := range sl.leaves {
		if !yield(svc) {
			return false
		}
	}
	return true
}

func (sl slot) find(k ServiceKey) *Service {
	var found *Service
	sl.each(func(svc *Service) bool {
		if svc.Key == k {
			found = svc
		}
		return found == nil
	})
	return found
}
