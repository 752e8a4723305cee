package allocator

import (
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// Holder is the Service that holds a lock. UID is empty while a request is under way whose Service does not exist yet.
type Holder struct{ Namespace, Name, UID string }

// Hold is what a claim says about the lock it is named after.
type Hold struct {
	Policy string
	Use    v1alpha1.ClaimUse
	State  v1alpha1.ClaimState
	Holder Holder
}

// Request asks for one lock.
type Request struct {
	// Policy is whose ranges it is taken from. Empty: of what the API server gives out and no policy declares; such a lock is the API server's to record.
	Policy string
	// Family is the family of the wanted address, empty for a node port.
	Family v1alpha1.IPFamily
	Use    v1alpha1.ClaimUse
	Holder Holder
	// Odd says, of a request without a policy, which half of what there is comes first. No claim keeps two replicas from choosing the same for two such requests,
	// so each has a half of its own.
	Odd bool
}

// prefers says whether an offset is of the half that comes first for the request.
func (r Request) prefers(offset uint64) bool { return r.Policy != "" || r.Odd == (offset%2 == 1) }

// Grant is a lock that nobody held when it was given.
type Grant struct {
	Lock Lock
	// Reclaim says that a Released claim on it, kept for this Service's name, must be taken over; else the claim is to be created.
	Reclaim bool
}

// Errors of Space.Grant.
var (
	// ErrExhausted is matched by an *ExhaustedError.
	ErrExhausted = errors.New("range exhausted")
	// ErrNotUsable says that the policy has ranges of the family, none of which can be used yet.
	ErrNotUsable = errors.New("range not ready")
	// ErrNoRange says that the policy gives out nothing of that kind automatically.
	ErrNoRange = errors.New("no range with automatic allocation")
)

// ExhaustedError says that a policy has nothing left to give out.
type ExhaustedError struct {
	Policy string
	// Family is empty for node ports.
	Family v1alpha1.IPFamily
	// Use is what the addresses are for, empty for node ports.
	Use         v1alpha1.RangeUse
	Used, Total int64
}

func (e *ExhaustedError) Error() string {
	what := string(e.Family) + " addresses"
	switch {
	case e.Family == "":
		what = "node ports"
	case e.Use == v1alpha1.RangeUseLoadBalancer:
		what += " for load balancers"
	}
	if e.Policy == "" {
		return fmt.Sprintf("the API server's own ranges have no free %s outside of all policies' ranges: %d of %d in use", what, e.Used, e.Total)
	}
	return fmt.Sprintf("policy %s has no free %s: %d of %d in use", e.Policy, what, e.Used, e.Total)
}

// Is makes errors.Is(err, ErrExhausted) true.
func (e *ExhaustedError) Is(target error) bool { return target == ErrExhausted }

// occupant is all that is known about a lock that is not free.
type occupant struct {
	hold  *Hold
	taken bool // the API server's own lock on it exists
}

// Space is what can be given out, and who holds what. The cost of every method but Configure is independent of how much is held. It is
// not safe for concurrent use.
type Space struct {
	random    *rand.Rand
	policies  map[string]*Policy
	pools     map[string][]*pool // by policy, in the order of the spec, the pool of node ports last; those of Server by the empty name
	contested map[v1alpha1.IPFamily]bool
	byPrefix  map[netip.Prefix][]*pool
	bits      map[bool][]int // the prefix lengths in byPrefix, by "is IPv4"
	ports     []*pool
	occupants map[Lock]occupant
	byName    map[[2]string]map[Lock]struct{} // the locks of a Service by its namespace and name
}

// NewSpace makes an empty Space that draws from random.
func NewSpace(random *rand.Rand) *Space {
	return &Space{
		random: random, policies: map[string]*Policy{}, pools: map[string][]*pool{},
		occupants: map[Lock]occupant{}, byName: map[[2]string]map[Lock]struct{}{},
	}
}

// Configure replaces the policies, which Resolve returned, and what the API server gives out. What is held stays held, inside the new ranges or not. Node ports
// that the API server refuses are not given out.
func (s *Space) Configure(policies []*Policy, server Server) {
	old := map[poolID][]*pool{}
	for _, pools := range s.pools {
		for _, p := range pools {
			old[p.poolID] = append(old[p.poolID], p)
		}
	}
	s.policies, s.pools, s.byPrefix, s.ports = map[string]*Policy{}, map[string][]*pool{}, map[netip.Prefix][]*pool{}, nil
	s.bits = map[bool][]int{}
	var fresh []*pool
	add := func(p *pool) {
		i := slices.IndexFunc(old[p.poolID], func(o *pool) bool { return slices.Equal(o.excluded, p.excluded) })
		if i >= 0 {
			o := old[p.poolID][i]
			o.use, o.allocation, o.usable = p.use, p.allocation, p.usable
			p = o
		} else {
			p.fill()
			fresh = append(fresh, p)
		}
		s.index(p)
	}
	for _, policy := range policies {
		s.policies[policy.Name] = policy
		for i := range policy.Ranges {
			r := &policy.Ranges[i]
			p := newAddrPool(policy.Name, r)
			p.use, p.allocation, p.usable = r.Use, r.Allocation, r.Usable && !policy.Terminating
			add(p)
		}
		if policy.NodePorts.Size() > 0 {
			p := newPortPool(policy.Name, policy.NodePorts, append(server.beyond(policy.NodePorts), policy.NodePortsExcluded...))
			p.usable = !policy.Terminating
			add(p)
		}
	}
	s.contested = server.contested(policies)
	for _, p := range server.pools(policies) {
		p.usable = true
		add(p)
	}
	if len(fresh) == 0 {
		return
	}
	for l, o := range s.occupants {
		for _, p := range fresh {
			if p.contains(l) {
				p.count(l, free, p.classify(o))
			}
		}
	}
}

// index makes a pool findable.
func (s *Space) index(p *pool) {
	s.pools[p.policy] = append(s.pools[p.policy], p)
	if p.ports.First != 0 {
		s.ports = append(s.ports, p)
		return
	}
	s.byPrefix[p.prefix] = append(s.byPrefix[p.prefix], p)
	if is4 := p.prefix.Addr().Is4(); !slices.Contains(s.bits[is4], p.prefix.Bits()) {
		s.bits[is4] = append(s.bits[is4], p.prefix.Bits())
	}
}

// Hold records that a claim exists, in place of what was recorded for the lock before.
func (s *Space) Hold(l Lock, h Hold) {
	o := s.occupants[l]
	s.unname(l, o)
	s.set(l, occupant{hold: &h, taken: o.taken})
	key := [2]string{h.Holder.Namespace, h.Holder.Name}
	if s.byName[key] == nil {
		s.byName[key] = map[Lock]struct{}{}
	}
	s.byName[key][l] = struct{}{}
}

// Drop records that no claim exists on the lock.
func (s *Space) Drop(l Lock) {
	o := s.occupants[l]
	s.unname(l, o)
	s.set(l, occupant{taken: o.taken})
}

// SetTaken records whether the API server's own lock exists: an IPAddress object, or a Service with the node port. What is taken is never given out,
// claim or no claim.
func (s *Space) SetTaken(l Lock, taken bool) {
	s.set(l, occupant{hold: s.occupants[l].hold, taken: taken})
}

// Taken says whether the API server's own lock exists.
func (s *Space) Taken(l Lock) bool { return s.occupants[l].taken }

// Held tells what the claim on the lock says, if there is one.
func (s *Space) Held(l Lock) (Hold, bool) {
	if h := s.occupants[l].hold; h != nil {
		return *h, true
	}
	return Hold{}, false
}

// HeldBy yields the locks of the Services, past and present, of a namespace and name.
func (s *Space) HeldBy(namespace, name string) iter.Seq2[Lock, Hold] {
	return func(yield func(Lock, Hold) bool) {
		for l := range s.byName[[2]string{namespace, name}] {
			if !yield(l, *s.occupants[l].hold) {
				return
			}
		}
	}
}

// All yields every lock that is held or taken; the Hold is nil if no claim exists.
func (s *Space) All() iter.Seq2[Lock, *Hold] {
	return func(yield func(Lock, *Hold) bool) {
		for l, o := range s.occupants {
			if !yield(l, o.hold) {
				return
			}
		}
	}
}

// Grant picks a free lock and holds it as Reserved, so that the next Grant picks another. The caller makes the claim and then calls Hold, or
// Drop if it could not. A lock that rests for a Service of the same name comes first.
//
// Without a policy the lock is Taken instead, for the API server is about to give it; if it does not, the caller says so with SetTaken. Such a request fails with
// ErrNoRange where the API server's own choice can do no harm, or its ranges are not known.
func (s *Space) Grant(r Request) (Grant, error) {
	if r.Policy == "" && !s.contested[r.Family] {
		return Grant{}, fmt.Errorf("%s of no policy: %w", r.kind(), ErrNoRange)
	}
	hold := Hold{Policy: r.Policy, Use: r.Use, State: v1alpha1.ClaimReserved, Holder: r.Holder}
	if l, ok := s.sticky(r); ok {
		s.Hold(l, hold)
		return Grant{Lock: l, Reclaim: true}, nil
	}
	exhausted := &ExhaustedError{Policy: r.Policy, Family: r.Family, Use: r.rangeUse()}
	var candidates []*pool
	notUsable := false
	var sum Counts
	for _, p := range s.pools[r.Policy] {
		if !p.serves(r) {
			continue
		}
		sum = sum.add(p.stats())
		if p.usable {
			candidates = append(candidates, p)
		} else {
			notUsable = true
		}
	}
	// The static bands of all ranges are left alone while any upper band has room.
	for _, upper := range []bool{true, false} {
		for _, p := range candidates {
			l, ok := p.pick(upper, s.uint64n, r.prefers)
			if !ok {
				continue
			}
			if r.Policy == "" {
				s.SetTaken(l, true)
			} else {
				s.Hold(l, hold)
			}
			return Grant{Lock: l}, nil
		}
	}
	switch {
	case notUsable:
		return Grant{}, fmt.Errorf("policy %s, %s: %w", r.Policy, r.kind(), ErrNotUsable)
	case len(candidates) == 0:
		return Grant{}, fmt.Errorf("policy %s, %s: %w", r.Policy, r.kind(), ErrNoRange)
	}
	exhausted.Total, exhausted.Used = sum.Total, sum.Total-sum.Free
	return Grant{}, exhausted
}

func (r Request) kind() string {
	if r.Family == "" {
		return "node ports"
	}
	return string(r.Family)
}

// serves says whether the pool gives out what is asked for.
func (p *pool) serves(r Request) bool {
	if p.allocation != v1alpha1.RangeAllocationAutomatic {
		return false
	}
	if p.ports.First != 0 {
		return r.Family == ""
	}
	return r.Family == p.family() && p.use == r.rangeUse()
}

// rangeUse is the use of the ranges that serve the request, empty for node ports.
func (r Request) rangeUse() v1alpha1.RangeUse {
	switch {
	case r.Family == "":
		return ""
	case r.Use == v1alpha1.ClaimUseLoadBalancerIP:
		return v1alpha1.RangeUseLoadBalancer
	}
	return v1alpha1.RangeUseClusterIP
}

// sticky finds a lock that rests for a Service of this name and that the policy still gives out. If the API server's lock still exists the
// address cannot be used again yet.
func (s *Space) sticky(r Request) (best Lock, found bool) {
	policy := s.policies[r.Policy]
	if policy == nil || policy.StickyFor <= 0 || r.Holder.Name == "" {
		return Lock{}, false
	}
	for l, h := range s.HeldBy(r.Holder.Namespace, r.Holder.Name) {
		if h.State != v1alpha1.ClaimReleased || h.Policy != r.Policy || s.Taken(l) || l.IsPort() != (r.Family == "") {
			continue
		}
		ok := slices.ContainsFunc(s.pools[r.Policy], func(p *pool) bool {
			return p.usable && p.serves(r) && p.contains(l) && p.available(l)
		})
		if ok && (!found || l.Name() < best.Name()) {
			best, found = l, true
		}
	}
	return best, found
}

// uint64n draws from [0, n); n = 0 stands for 2^64.
func (s *Space) uint64n(n uint64) uint64 {
	if n == 0 {
		return s.random.Uint64()
	}
	return s.random.Uint64N(n)
}

// RangeCounts counts one range of a policy.
func (s *Space) RangeCounts(policy string, prefix netip.Prefix) Counts {
	for _, p := range s.pools[policy] {
		if p.prefix == prefix {
			return p.stats()
		}
	}
	return Counts{}
}

// FamilyCounts counts the addresses of a family over all ranges of a policy.
func (s *Space) FamilyCounts(policy string, family v1alpha1.IPFamily) Counts {
	var sum Counts
	for _, p := range s.pools[policy] {
		if p.ports.First == 0 && p.family() == family {
			sum = sum.add(p.stats())
		}
	}
	return sum
}

// PortCounts counts the node ports of a policy.
func (s *Space) PortCounts(policy string) Counts {
	for _, p := range s.pools[policy] {
		if p.ports.First != 0 {
			return p.stats()
		}
	}
	return Counts{}
}

// PoliciesOf yields the policies that declare the lock.
func (s *Space) PoliciesOf(l Lock) iter.Seq[string] {
	return func(yield func(string) bool) {
		for p := range s.poolsOf(l) {
			if p.policy != "" && !yield(p.policy) {
				return
			}
		}
	}
}

// Owner names the policy that declares the lock, for whatever use, and the range as it does; the oldest policy (then the first by name) if several do. It is empty if
// none does.
func (s *Space) Owner(l Lock) (policy, declared string) {
	var owner *Policy
	for p := range s.poolsOf(l) {
		if mine := s.policies[p.policy]; mine != nil && (owner == nil || byAge(mine, owner) < 0) {
			owner, policy, declared = mine, p.policy, p.String()
		}
	}
	return policy, declared
}

func (s *Space) poolsOf(l Lock) iter.Seq[*pool] {
	return func(yield func(*pool) bool) {
		if l.IsPort() {
			for _, p := range s.ports {
				if p.contains(l) && !yield(p) {
					return
				}
			}
			return
		}
		for _, bits := range s.bits[l.Addr.Is4()] {
			prefix := netip.PrefixFrom(l.Addr, bits).Masked()
			for _, p := range s.byPrefix[prefix] {
				if !yield(p) {
					return
				}
			}
		}
	}
}

// set replaces what is known about a lock and moves the counts of the pools that hold it.
func (s *Space) set(l Lock, now occupant) {
	was := s.occupants[l]
	if now.hold == nil && !now.taken {
		delete(s.occupants, l)
	} else {
		s.occupants[l] = now
	}
	for p := range s.poolsOf(l) {
		p.count(l, p.classify(was), p.classify(now))
	}
}

func (s *Space) unname(l Lock, o occupant) {
	if o.hold == nil {
		return
	}
	key := [2]string{o.hold.Holder.Namespace, o.hold.Holder.Name}
	delete(s.byName[key], l)
	if len(s.byName[key]) == 0 {
		delete(s.byName, key)
	}
}

// classify says what a lock counts as in this pool.
func (p *pool) classify(o occupant) class {
	switch {
	case o.hold == nil && !o.taken:
		return free
	case o.hold == nil, o.hold.State == v1alpha1.ClaimReleased && o.taken: // who asks for it by name need not let it rest
		return foreign
	case o.hold.State == v1alpha1.ClaimReleased:
		return quarantined
	case o.hold.Policy != p.policy:
		return foreign
	}
	return allocated
}
