package nftables

import (
	"fmt"
	"hash/fnv"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// A number stands for an endpoint of a Service port with affinity, in pins and on the way through the packet. It has three parts, and the rules take the second
// out of it, because a packet has room for one number only and a pin needs both: whose it is, and which endpoint.
const (
	// numberMark is set in every number.
	numberMark = 1 << 31
	// numberService are the bits that tell the Service port, and numberOwner is what they are with the mark.
	numberService = 0x7fff << 16
	numberOwner   = numberMark | numberService
	// numberEndpoints is how many endpoints can have numbers of their own. With one more a number could have all bits set, which nft lists as a word.
	numberEndpoints = 0xffff
)

// numbering gives the endpoints of one Service port with affinity numbers: the same for all its frontends, whatever slots they have, for as long as any of them
// has the endpoint. They are read back after a restart. An endpoint that comes back gets the number that it had, unless another one has taken it.
type numbering struct {
	owner uint32 // what numberOwner takes out of the numbers
	// endpoints are numbered by their form in slots.
	endpoints map[string]*numbered
	taken     map[uint32]struct{}
	fronts    int
}

type numbered struct {
	number uint32
	fronts int
}

func newNumbering(owner uint32) *numbering {
	return &numbering{owner: owner, endpoints: map[string]*numbered{}, taken: map[uint32]struct{}{}}
}

func ownerOf(number uint32) uint32 { return number & numberOwner }

// take gives the numbers of the endpoints in slots, 0 for a hole, and counts one frontend more that has them.
func (n *numbering) take(f *family, s slots) []uint32 {
	n.fronts++
	list := make([]uint32, f.slotCount(s))
	for i := range list {
		slot := f.slot(s, i)
		if empty(slot) {
			continue
		}
		e := n.endpoints[string(slot)]
		if e == nil {
			e = &numbered{number: n.free(slot)}
			n.endpoints[string(slot)] = e
			n.taken[e.number] = struct{}{}
		}
		e.fronts++
		list[i] = e.number
	}
	return list
}

// free gives a number that no endpoint has: the one that a hash of the endpoint says, or the next one.
func (n *numbering) free(slot []byte) uint32 {
	h := fnv.New32a()
	h.Write(slot) // a hash.Hash never fails
	sum := h.Sum32() % numberEndpoints
	for range numberEndpoints {
		number := n.owner | sum
		if _, taken := n.taken[number]; !taken {
			return number
		}
		sum = (sum + 1) % numberEndpoints
	}
	return n.owner | sum // shared, which only makes some clients move with others
}

// adopt counts a frontend that was read back with these slots and numbers, and gives those of the numbers that stay: they agree with what is
// known and are of its endpoints.
func (n *numbering) adopt(f *family, s slots, numbers []uint32, endpoints []byte) []uint32 {
	n.fronts++
	held := make([]uint32, len(numbers))
	for i, number := range numbers {
		if number == 0 {
			continue
		}
		slot := f.slot(s, i)
		if _, wanted := f.search(endpoints, slot); !wanted {
			continue
		}
		e := n.endpoints[string(slot)]
		if _, taken := n.taken[number]; e == nil && !taken {
			e = &numbered{number: number}
			n.endpoints[string(slot)] = e
			n.taken[number] = struct{}{}
		}
		if e != nil && e.number == number {
			e.fronts++
			held[i] = number
		}
	}
	return held
}

// give counts a frontend less that take or adopt counted with these numbers.
func (n *numbering) give(f *family, s slots, numbers []uint32) {
	n.fronts--
	for i, number := range numbers {
		if number == 0 {
			continue
		}
		slot := f.slot(s, i)
		e := n.endpoints[string(slot)]
		if e.fronts--; e.fronts == 0 {
			delete(n.endpoints, string(slot))
			delete(n.taken, number)
		}
	}
}

// numberings are those of a table's Service ports.
type numberings struct {
	of    map[forwarding.ServiceKey]*numbering
	owned map[uint32]forwarding.ServiceKey
}

func newNumberings() numberings {
	return numberings{map[forwarding.ServiceKey]*numbering{}, map[uint32]forwarding.ServiceKey{}}
}

// provide gives the numbering of a Service port, making one if it has none.
func (n numberings) provide(k forwarding.ServiceKey) *numbering {
	if have := n.of[k]; have != nil {
		return have
	}
	return n.begin(k, n.free(k))
}

func (n numberings) begin(k forwarding.ServiceKey, owner uint32) *numbering {
	made := newNumbering(owner)
	n.of[k] = made
	if _, shared := n.owned[owner]; !shared {
		n.owned[owner] = k
	}
	return made
}

// free gives an owner that is no other's. If there are more Service ports with affinity than owners, two share one, and take each other's pins for outdated.
func (n numberings) free(k forwarding.ServiceKey) uint32 {
	h := fnv.New32a()
	fmt.Fprint(h, k) // a hash.Hash never fails
	owner := h.Sum32() & numberService
	for range numberService>>16 + 1 {
		if _, taken := n.owned[numberMark|owner]; !taken {
			break
		}
		owner = (owner + 1<<16) & numberService
	}
	return numberMark | owner
}

// adopt takes a frontend that was read back as the Service port's, if no other has its numbers. It gives nil if they cannot stay. endpoints are those that it is
// to have.
func (n numberings) adopt(k forwarding.ServiceKey, f *family, s slots, numbers []uint32, endpoints []byte) (have *numbering, held []uint32) {
	var owner uint32
	for _, number := range numbers {
		owner |= ownerOf(number) // all of one frontend have the same
	}
	if have = n.of[k]; have == nil {
		if _, taken := n.owned[owner]; taken || owner == 0 {
			return nil, nil
		}
		have = n.begin(k, owner)
	}
	if have.owner != owner {
		return nil, nil
	}
	held = have.adopt(f, s, numbers, endpoints)
	return have, held
}

// drop forgets a numbering that no frontend has any more.
func (n numberings) drop(have *numbering) {
	if have.fronts > 0 {
		return
	}
	// An owner that is shared belongs to who had it first.
	if k := n.owned[have.owner]; n.of[k] == have {
		delete(n.owned, have.owner)
		delete(n.of, k)
		return
	}
	for k, other := range n.of {
		if other == have {
			delete(n.of, k)
		}
	}
}
