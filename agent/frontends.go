package agent

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// program is what the loop holds of one Service.
type program struct {
	service    types.NamespacedName
	assignment *compile.Assignment
	// full is what the Service compiles to, live what of it is forwarded: full without the frontends that other Services hold.
	full, live []*forwarding.Service
	// lost are those frontends, with their holders; nil for nearly every Service.
	lost map[frontend]types.NamespacedName
	// mode is the dataplane that live is in, "" for none. It differs from the assignment's while this node cannot do that one.
	mode v1alpha1.ProxyMode
	// check is the Service's health check, the zero value for nearly every one.
	check compile.HealthCheck
}

// frontend is what a packet is recognised by: an address and a port, or a node port if the address is the zero Addr.
type frontend struct {
	addr     netip.Addr
	port     uint16
	protocol forwarding.Protocol
}

func frontendsOf(list []*forwarding.Service) iter.Seq[frontend] {
	return func(yield func(frontend) bool) {
		for _, s := range list {
			for _, addrs := range [2][]netip.Addr{s.ServiceIPs, s.ExternalIPs} {
				for _, ip := range addrs {
					if !yield(frontend{ip, s.Key.Port, s.Key.Protocol}) {
						return
					}
				}
			}
			if s.NodePort != 0 && !yield(frontend{netip.Addr{}, s.NodePort, s.Key.Protocol}) {
				return
			}
		}
	}
}

// frontends decides which Service has a frontend that several claim: external IPs are free text, and the API server checks them
// against nothing. A service IP beats an external one, so that nobody can take traffic away from a ClusterIP; then the older
// Service wins, then the first by namespace and name. The order is total, so the outcome does not depend on who came first.
type frontends struct {
	holder map[frontend]*program
	// rivals are the programs that claim a frontend without holding it.
	rivals map[frontend][]*program
}

func newFrontends() frontends {
	return frontends{holder: map[frontend]*program{}, rivals: map[frontend][]*program{}}
}

// update replaces what p claims: old, which it claimed until now, by p.full. It gives the other programs that won or lost a frontend by that.
func (f *frontends) update(p *program, old []*forwarding.Service) []*program {
	if len(f.rivals) == 0 && sameFrontends(old, p.full) {
		return nil // nearly every change: endpoints only
	}
	var others []*program
	for fe := range frontendsOf(old) {
		if other := f.release(fe, p); other != nil {
			others = append(others, other)
		}
	}
	for fe := range frontendsOf(p.full) {
		if other := f.claim(fe, p); other != nil {
			others = append(others, other)
		}
	}
	return others
}

func sameFrontends(a, b []*forwarding.Service) bool {
	return slices.EqualFunc(a, b, func(x, y *forwarding.Service) bool {
		return x.Key == y.Key && x.NodePort == y.NodePort && slices.Equal(x.ServiceIPs, y.ServiceIPs) && slices.Equal(x.ExternalIPs, y.ExternalIPs)
	})
}

// release gives the program that takes over, if any.
func (f *frontends) release(fe frontend, p *program) *program {
	rivals := f.rivals[fe]
	if f.holder[fe] != p {
		f.setRivals(fe, slices.DeleteFunc(rivals, func(r *program) bool { return r == p }))
		return nil
	}
	if len(rivals) == 0 {
		delete(f.holder, fe)
		return nil
	}
	next := slices.MinFunc(rivals, func(a, b *program) int { return precedence(fe, a, b) })
	f.holder[fe] = next
	f.setRivals(fe, slices.DeleteFunc(rivals, func(r *program) bool { return r == next }))
	return next
}

// claim gives the program that loses the frontend by it, if any.
func (f *frontends) claim(fe frontend, p *program) *program {
	held := f.holder[fe]
	switch {
	case held == nil:
		f.holder[fe] = p
		return nil
	case held == p: // two ports of one Service with one node port
		return nil
	case precedence(fe, p, held) < 0:
		f.holder[fe] = p
		f.rivals[fe] = append(f.rivals[fe], held)
		return held
	}
	if !slices.Contains(f.rivals[fe], p) {
		f.rivals[fe] = append(f.rivals[fe], p)
	}
	return nil
}

func (f *frontends) setRivals(fe frontend, list []*program) {
	if len(list) == 0 {
		delete(f.rivals, fe)
		return
	}
	f.rivals[fe] = list
}

func precedence(fe frontend, a, b *program) int {
	external := func(p *program) int {
		if slices.Contains(p.assignment.ServiceIPs, fe.addr) {
			return 0
		}
		return 1
	}
	return cmp.Or(cmp.Compare(external(a), external(b)), a.assignment.Created.Compare(b.assignment.Created),
		cmp.Compare(a.service.Namespace, b.service.Namespace), cmp.Compare(a.service.Name, b.service.Name))
}

// cut gives what p forwards of its services: all but the frontends that others hold, which it gives too (nil if there are none).
func (f *frontends) cut(p *program) ([]*forwarding.Service, map[frontend]types.NamespacedName) {
	var lost map[frontend]types.NamespacedName
	if len(f.rivals) > 0 {
		for fe := range frontendsOf(p.full) {
			if held := f.holder[fe]; held != p {
				if lost == nil {
					lost = map[frontend]types.NamespacedName{}
				}
				lost[fe] = held.service
			}
		}
	}
	if lost == nil {
		return p.full, nil
	}
	live := make([]*forwarding.Service, 0, len(p.full))
	for _, s := range p.full {
		if rest := without(s, lost); rest != nil {
			live = append(live, rest)
		}
	}
	return live, lost
}

// without gives a service without some of its frontends: itself if it has none of them, nil if it has no others.
func without(s *forwarding.Service, lost map[frontend]types.NamespacedName) *forwarding.Service {
	keep := func(list []netip.Addr) []netip.Addr {
		var out []netip.Addr
		for _, ip := range list {
			if _, gone := lost[frontend{ip, s.Key.Port, s.Key.Protocol}]; !gone {
				out = append(out, ip)
			}
		}
		return out
	}
	rest := *s
	rest.ServiceIPs, rest.ExternalIPs, rest.LoadBalancerIPs = keep(s.ServiceIPs), keep(s.ExternalIPs), keep(s.LoadBalancerIPs)
	if _, gone := lost[frontend{netip.Addr{}, s.NodePort, s.Key.Protocol}]; gone {
		rest.NodePort, rest.NodePortAddresses = 0, nil
	}
	if len(rest.ServiceIPs) == len(s.ServiceIPs) && len(rest.ExternalIPs) == len(s.ExternalIPs) && rest.NodePort == s.NodePort {
		return s
	}
	if len(rest.ServiceIPs) == 0 && len(rest.ExternalIPs) == 0 && rest.NodePort == 0 {
		return nil
	}
	if len(rest.LoadBalancerIPs) == 0 {
		rest.SourceRanges = nil
	}
	return &rest
}
