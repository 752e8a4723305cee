package kubelet

import (
	"fmt"
	"net/netip"
)

// firstHost leaves 0 for the network and 1 for the node's end of the pods' wires.
const firstHost = 2

// ipam hands out host numbers in a node's pod ranges, the same one in each family, in turn: an address rests as long as possible
// before it comes back, as with a real network plugin, so that a stale rule does not soon hit another pod.
type ipam struct {
	ranges []netip.Prefix
	next   int
	taken  map[int]bool
}

func newIPAM(ranges []netip.Prefix) *ipam {
	return &ipam{ranges: ranges, next: firstHost, taken: map[int]bool{}}
}

// take gives a free host number and its addresses.
func (m *ipam) take() (host int, addresses []netip.Addr, err error) {
	size := m.size()
	for range size - firstHost {
		host = m.next
		if m.next++; m.next >= size {
			m.next = firstHost
		}
		if !m.taken[host] {
			m.taken[host] = true
			return host, m.addresses(host), nil
		}
	}
	return 0, nil, fmt.Errorf("no free address in %v", m.ranges)
}

func (m *ipam) release(host int) { delete(m.taken, host) }

// gateways are the node's addresses towards its pods.
func (m *ipam) gateways() []netip.Addr { return m.addresses(1) }

// size is the number of host numbers that every range has, the last of which is IPv4's broadcast address.
func (m *ipam) size() int {
	bits := 16 // more pods than any node has
	for _, r := range m.ranges {
		bits = min(bits, r.Addr().BitLen()-r.Bits())
	}
	return 1<<bits - 1
}

func (m *ipam) addresses(host int) []netip.Addr {
	as := make([]netip.Addr, len(m.ranges))
	for i, r := range m.ranges {
		b := r.Masked().Addr().AsSlice()
		b[len(b)-1] |= byte(host)
		b[len(b)-2] |= byte(host >> 8)
		as[i], _ = netip.AddrFromSlice(b) // of a valid length
	}
	return as
}
