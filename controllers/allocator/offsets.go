package allocator

import (
	"math/bits"
)

// offsets is the set of free offsets of a pool. Implementations differ in the size they are good for.
type offsets interface {
	// take removes an offset, give puts it back. Both are idempotent.
	take(o uint64)
	give(o uint64)
	// next finds the first free offset in [from, to], both included.
	next(from, to uint64) (uint64, bool)
}

// denseLimit is the largest pool kept as a bitmap: 2^24 offsets, a /8 of IPv4, cost 2 MiB. Larger pools are sparse.
const denseLimit = 1 << 24

// bitmap is a set of offsets below a limit as a tree of 64-bit words: bit i of level n+1 says whether word i of level n has any bit.
// A search thus reads at most two words per level, however full the pool is.
type bitmap struct{ levels [][]uint64 }

func newBitmap(size uint64) *bitmap {
	b := &bitmap{}
	for n := size; ; {
		words := (n + 63) / 64
		b.levels = append(b.levels, make([]uint64, words))
		if words <= 1 {
			return b
		}
		n = words
	}
}

func (b *bitmap) give(o uint64) {
	for _, level := range b.levels {
		word := &level[o/64]
		was := *word
		*word |= 1 << (o % 64)
		if was != 0 {
			return
		}
		o /= 64
	}
}

// giveAll puts the offsets in [from, to) back, at a cost of one step for 64 of them.
func (b *bitmap) giveAll(from, to uint64) {
	for _, level := range b.levels {
		if from >= to {
			return
		}
		for word := from / 64; word*64 < to; word++ {
			ones := ^uint64(0)
			if low := word * 64; low < from {
				ones <<= from - low
			}
			if high := word*64 + 64; high > to {
				ones &= ^uint64(0) >> (high - to)
			}
			level[word] |= ones
		}
		from, to = from/64, (to+63)/64
	}
}

func (b *bitmap) take(o uint64) {
	for _, level := range b.levels {
		word := &level[o/64]
		*word &^= 1 << (o % 64)
		if *word != 0 {
			return
		}
		o /= 64
	}
}

func (b *bitmap) next(from, to uint64) (uint64, bool) {
	if from > to {
		return 0, false
	}
	o := from
	for n := 0; n < len(b.levels); n++ {
		level := b.levels[n]
		if o/64 >= uint64(len(level)) {
			return 0, false
		}
		if rest := level[o/64] >> (o % 64); rest != 0 {
			o += uint64(bits.TrailingZeros64(rest))
			for ; n > 0; n-- { // down again: the first bit of each word below
				o = o*64 + uint64(bits.TrailingZeros64(b.levels[n-1][o]))
			}
			return o, o <= to
		}
		o = o/64 + 1 // the rest of this word is empty: look among the words after it
	}
	return 0, false
}

// span is an interval of offsets, both ends included.
type span struct{ first, last uint64 }

// sparse is a set of offsets as the few that are missing: single ones and whole spans. A search steps over neighbours one by one, so it
// is meant for pools so large that a random start is almost always free.
type sparse struct {
	taken    map[uint64]struct{}
	excluded []span // sorted, disjoint
}

func (s *sparse) take(o uint64) { s.taken[o] = struct{}{} }
func (s *sparse) give(o uint64) { delete(s.taken, o) }

func (s *sparse) next(from, to uint64) (uint64, bool) {
	for o := from; o <= to; {
		if end, in := spanOf(s.excluded, o); in {
			if end >= to { // also when end+1 would overflow
				return 0, false
			}
			o = end + 1
			continue
		}
		if _, taken := s.taken[o]; !taken {
			return o, true
		}
		if o == to {
			break
		}
		o++
	}
	return 0, false
}

// spanOf tells whether one of the sorted spans holds o, and where that span ends.
func spanOf(spans []span, o uint64) (last uint64, in bool) {
	lo, hi := 0, len(spans)
	for lo < hi {
		if mid := (lo + hi) / 2; spans[mid].last < o {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo < len(spans) && spans[lo].first <= o {
		return spans[lo].last, true
	}
	return 0, false
}
