package allocator

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// model is a Space beside an oracle: maps that are searched from end to end.
type model struct {
	space    *Space
	policies []*Policy // resolved
	server   Server
	holds    map[Lock]Hold
	taken    map[Lock]bool
	universe []Lock
}

// config is what a Space is told at one moment of a history.
type config struct {
	policies []*Policy
	server   Server
}

// configs are what a history may go through: overlapping ranges, a range that shrinks, one that drains, one that never was registered, node ports; an API server
// whose ranges hold those of policies, lie beside them, lie in one another, are none of the cluster's or not known.
var configs = func() []config {
	at := func(n int64) time.Time { return time.Unix(n, 0) }
	prefixes := func(cidrs ...string) (out []netip.Prefix) {
		for _, c := range cidrs {
			out = append(out, netip.MustParsePrefix(c))
		}
		return out
	}
	draining, lb := autoRange("10.0.0.0/28"), autoRange("10.0.0.24/29")
	draining.Allocation, lb.Use = v1alpha1.RangeAllocationDraining, v1alpha1.RangeUseLoadBalancer
	return []config{
		{[]*Policy{{Name: "a", Created: at(1), Ranges: []Range{autoRange("10.0.0.0/28", "10.0.0.3")}, NodePorts: PortRange{30000, 30004}},
			{Name: "b", Created: at(2), StickyFor: time.Hour, Ranges: []Range{autoRange("10.0.0.0/27"), autoRange("fd00::/125")}}},
			Server{Ranges: prefixes("10.0.0.0/27", "fd00::/125"), NodePorts: PortRange{30002, 30007}}},
		{[]*Policy{{Name: "a", Created: at(1), StickyFor: time.Hour, Ranges: []Range{autoRange("10.0.0.0/29"), autoRange("fd00::/126")}},
			{Name: "b", Created: at(2), Ranges: []Range{autoRange("10.0.0.8/29")}, NodePorts: PortRange{30002, 30006}}},
			Server{Ranges: prefixes("10.0.0.8/29", "10.0.0.0/27", "10.0.0.0/27", "10.0.0.16/29", "fd00::/125"), NodePorts: PortRange{30001, 30004}}},
		{[]*Policy{{Name: "a", Created: at(1), Ranges: []Range{draining, lb}}, {Name: "b", Created: at(2), Terminating: true, Ranges: []Range{autoRange("fd00::/125")}, NodePorts: PortRange{30000, 30001}}},
			Server{Ranges: prefixes("10.0.0.0/27"), Made: prefixes("fd00::/125"), NodePorts: PortRange{30000, 30003}}},
		{[]*Policy{{Name: "b", Created: at(2), Ranges: []Range{autoRange("10.0.0.16/28")}, NodePorts: PortRange{30000, 30003}}},
			Server{Ranges: prefixes("10.0.0.0/28", "fd00::/125"), Made: prefixes("10.0.0.8/29"), NodePorts: PortRange{30004, 30007}}},
		{nil, Server{Ranges: prefixes("10.0.0.0/28", "fd00::/125"), NodePorts: PortRange{30000, 30003}}},
		{},
	}
}()

func newModel(seed uint64) *model {
	m := &model{space: NewSpace(rand.New(rand.NewPCG(seed, 0))), holds: map[Lock]Hold{}, taken: map[Lock]bool{}}
	for i := range 32 {
		m.universe = append(m.universe, AddrLock(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})))
	}
	for i := range 8 {
		m.universe = append(m.universe, AddrLock(netip.AddrFrom16([16]byte{0: 0xfd, 15: byte(i)})), PortLock(uint16(30000+i)))
	}
	m.reconfigure(0)
	return m
}

func (m *model) reconfigure(i int) {
	m.policies, _ = Resolve(configs[i].policies)
	m.server = configs[i].server
	m.space.Configure(m.policies, m.server)
}

func (m *model) kinds() []Request {
	var out []Request
	for _, policy := range []string{"a", "b", ""} {
		for _, family := range []v1alpha1.IPFamily{v1alpha1.IPv4, v1alpha1.IPv6, ""} {
			out = append(out, request(policy, family, ""))
		}
	}
	balanced := request("a", v1alpha1.IPv4, "")
	balanced.Use = v1alpha1.ClaimUseLoadBalancerIP
	return append(out, balanced)
}

func (m *model) policy(name string) *Policy {
	for _, p := range m.policies {
		if p.Name == name {
			return p
		}
	}
	return nil
}

// offered lists what a policy would give out if nothing were held.
func (m *model) offered(r Request) map[Lock]bool {
	if r.Policy == "" {
		return m.steered(r.Family)
	}
	out := map[Lock]bool{}
	p := m.policy(r.Policy)
	if p == nil || p.Terminating {
		return out
	}
	for _, l := range m.universe {
		if l.IsPort() {
			in := r.Family == "" && p.NodePorts.Contains(l.Port) && (m.server.NodePorts == PortRange{} || m.server.NodePorts.Contains(l.Port))
			for _, e := range p.NodePortsExcluded {
				in = in && !e.Contains(l.Port)
			}
			if in {
				out[l] = true
			}
			continue
		}
		for _, rg := range p.Ranges {
			last := l.Addr.Is4() && !rg.Prefix.Contains(l.Addr.Next())
			in := (rg.Use == v1alpha1.RangeUseLoadBalancer) == (r.Use == v1alpha1.ClaimUseLoadBalancerIP) && rg.Allocation == v1alpha1.RangeAllocationAutomatic && rg.Prefix.Contains(l.Addr) && l.Addr != rg.Prefix.Addr() && !last &&
				l.Addr.Is4() == (r.Family == v1alpha1.IPv4) && r.Family != ""
			for _, e := range rg.Excluded {
				in = in && !e.Contains(l.Addr)
			}
			if in {
				out[l] = true
			}
		}
	}
	return out
}

func kindOf(l Lock) v1alpha1.IPFamily {
	switch {
	case l.IsPort():
		return ""
	case l.Addr.Is4():
		return v1alpha1.IPv4
	}
	return v1alpha1.IPv6
}

// declared says whether a policy declares the lock, and made whether a ServiceCIDR made for a policy has it.
func (m *model) declared(l Lock) bool {
	for _, p := range m.policies {
		for _, r := range p.Ranges {
			if !l.IsPort() && r.Prefix.Contains(l.Addr) {
				return true
			}
		}
		if l.IsPort() && p.NodePorts.Contains(l.Port) {
			return true
		}
	}
	return false
}

func (m *model) made(l Lock) bool {
	for _, p := range m.server.Made {
		if !l.IsPort() && p.Contains(l.Addr) {
			return true
		}
	}
	return false
}

// steered lists what a Service that no policy covers may get: what the API server gives out and nobody declares, unless the API server may choose for itself.
func (m *model) steered(kind v1alpha1.IPFamily) map[Lock]bool {
	out := map[Lock]bool{}
	for _, l := range m.universe {
		if kindOf(l) == kind && m.native(l) && !m.edge(l) && !m.declared(l) && !m.made(l) {
			out[l] = true
		}
	}
	if !m.contested(kind) {
		return nil
	}
	return out
}

// native says whether the lock lies in what the API server gives out by itself.
func (m *model) native(l Lock) bool {
	for _, p := range m.server.Ranges {
		if !l.IsPort() && p.Contains(l.Addr) {
			return true
		}
	}
	return l.IsPort() && m.server.NodePorts.Contains(l.Port)
}

// edge says whether the lock is the first or, for IPv4, the last address of every range that has it.
func (m *model) edge(l Lock) bool {
	for _, p := range m.server.Ranges {
		if !l.IsPort() && p.Contains(l.Addr) && l.Addr != p.Addr() && (l.Addr.Is6() || p.Contains(l.Addr.Next())) {
			return false
		}
	}
	return !l.IsPort()
}

func (m *model) contested(kind v1alpha1.IPFamily) bool {
	for _, l := range m.universe {
		if kindOf(l) == kind && (m.made(l) || m.native(l) && m.declared(l)) {
			return true
		}
	}
	return false
}

// owner is what Space.Owner has to say.
func (m *model) owner(l Lock) (policy, declared string) {
	first := time.Unix(1<<40, 0)
	for _, p := range m.policies {
		if !p.Created.Before(first) {
			continue
		}
		for _, r := range p.Ranges {
			if !l.IsPort() && r.Prefix.Contains(l.Addr) {
				first, policy, declared = p.Created, p.Name, r.Prefix.String()
			}
		}
		if l.IsPort() && p.NodePorts.Contains(l.Port) {
			first, policy, declared = p.Created, p.Name, fmt.Sprintf("%d-%d", p.NodePorts.First, p.NodePorts.Last)
		}
	}
	return policy, declared
}

func (m *model) grant(r Request, service string) error {
	r.Holder.Name = service
	offered := m.offered(r)
	free, resting := map[Lock]bool{}, map[Lock]bool{}
	for l := range offered {
		h, held := m.holds[l]
		if !held && !m.taken[l] {
			free[l] = true
		}
		if held && !m.taken[l] && h.State == v1alpha1.ClaimReleased && h.Holder.Name == service && h.Policy == r.Policy && m.policy(r.Policy).StickyFor > 0 {
			resting[l] = true
		}
	}
	g, err := m.space.Grant(r)
	if r.Policy == "" && errors.Is(err, ErrNoRange) != (!m.contested(r.Family) || !m.known(r.Family)) {
		return fmt.Errorf("%+v: got %v, %w; contested: %v", r, g, err, m.contested(r.Family))
	}
	switch {
	case err != nil && (len(free) > 0 || len(resting) > 0):
		return fmt.Errorf("%+v refused with %w, though free are %v and resting %v", r, err, free, resting)
	case err != nil:
		var exhausted *ExhaustedError
		if errors.As(err, &exhausted) && (exhausted.Total != int64(len(offered)) || exhausted.Used != exhausted.Total) {
			return fmt.Errorf("%w, though %d are offered", err, len(offered))
		}
		return nil
	case len(resting) > 0 && !(g.Reclaim && resting[g.Lock]):
		return fmt.Errorf("%+v got %+v, though %v rest for it", r, g, resting)
	case len(resting) == 0 && (g.Reclaim || !free[g.Lock]):
		return fmt.Errorf("%+v got %+v, free were %v", r, g, free)
	}
	if r.Policy == "" {
		m.taken[g.Lock] = true
		return nil
	}
	m.holds[g.Lock] = Hold{Policy: r.Policy, Use: r.Use, State: v1alpha1.ClaimReserved, Holder: r.Holder}
	return nil
}

// known says whether the API server has a range for the kind.
func (m *model) known(kind v1alpha1.IPFamily) bool {
	for _, l := range m.universe {
		if kindOf(l) == kind && m.native(l) {
			return true
		}
	}
	return false
}

func (m *model) take(l Lock) {
	m.taken[l] = !m.taken[l]
	m.space.SetTaken(l, m.taken[l])
}

// release lets a held lock rest, and claims one that nobody holds for a policy that may not even declare it.
func (m *model) release(l Lock) {
	h, ok := m.holds[l]
	if !ok {
		h = Hold{Policy: "a", Holder: Holder{"ns", "1", "uid"}, State: v1alpha1.ClaimBound}
	} else {
		h.State = v1alpha1.ClaimReleased
	}
	m.holds[l] = h
	m.space.Hold(l, h)
}

func (m *model) drop(l Lock) {
	delete(m.holds, l)
	m.space.Drop(l)
}

// compare checks that the Space knows what the oracle knows.
func (m *model) compare() error {
	found, byName := map[Lock]Hold{}, map[Lock]Hold{}
	for l, h := range m.space.All() {
		if h != nil {
			found[l] = *h
		}
		if m.space.Taken(l) != m.taken[l] {
			return fmt.Errorf("%v: taken is %v", l, m.space.Taken(l))
		}
	}
	for _, h := range m.holds {
		for l, held := range m.space.HeldBy(h.Holder.Namespace, h.Holder.Name) {
			byName[l] = held
		}
	}
	if !maps.Equal(found, m.holds) || !maps.Equal(byName, m.holds) {
		return fmt.Errorf("held: got %v, by name %v, want %v", found, byName, m.holds)
	}
	for _, l := range m.universe {
		policy, declared := m.owner(l)
		if gotPolicy, gotDeclared := m.space.Owner(l); gotPolicy != policy || gotDeclared != declared {
			return fmt.Errorf("%v: owner %q %q, want %q %q", l, gotPolicy, gotDeclared, policy, declared)
		}
	}
	for _, p := range m.policies {
		for _, rg := range p.Ranges {
			want := m.count(p, func(l Lock) bool { return !l.IsPort() && rg.Prefix.Contains(l.Addr) })
			got := m.space.RangeCounts(p.Name, rg.Prefix)
			got.Total, got.Free = 0, 0 // the grants check these
			if got != want {
				return fmt.Errorf("%s %v: counts %+v, want %+v", p.Name, rg.Prefix, got, want)
			}
		}
		want := m.count(p, func(l Lock) bool { return l.IsPort() && p.NodePorts.Contains(l.Port) })
		got := m.space.PortCounts(p.Name)
		got.Total, got.Free = 0, 0
		if got != want {
			return fmt.Errorf("%s node ports: counts %+v, want %+v", p.Name, got, want)
		}
	}
	return nil
}

func (m *model) count(p *Policy, in func(Lock) bool) (c Counts) {
	for _, l := range m.universe {
		h, held := m.holds[l]
		switch {
		case !in(l) || !held && !m.taken[l]:
		case !held, h.State == v1alpha1.ClaimReleased && m.taken[l]:
			c.Foreign++
		case h.State == v1alpha1.ClaimReleased:
			c.Quarantined++
		case h.Policy != p.Name:
			c.Foreign++
		default:
			c.Allocated++
		}
	}
	return c
}
