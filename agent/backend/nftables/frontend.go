package nftables

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// frontKey is what a packet is looked up by: one address (or, behind a class, any address of that class), protocol and port.
type frontKey struct {
	door  door
	addr  [16]byte // an IPv4 address takes the first four bytes; zero behind a class
	proto forwarding.Protocol
	port  uint16
}

// want is a frontend as a service wants it.
type want struct {
	key    frontKey
	target *forwarding.Target
	hash   bool
	masq   masquerade
	// nodePorts are the addresses of the door's class, of both families.
	nodePorts []netip.Prefix
	// pin is how clients keep their endpoint.
	pin pin
	// guarded says that only those in ranges, which are of both families, may use it.
	guarded bool
	ranges  []netip.Prefix
}

// member is an entry of a plain set: a service IP, or a hairpin entry of an endpoint.
type member struct {
	addr  [16]byte
	proto forwarding.Protocol
	port  uint16
}

func addr16(a netip.Addr) (b [16]byte) {
	copy(b[:], a.AsSlice())
	return b
}

// wants appends the frontends that a service has in one family. internal says who is masqueraded on the way through service IPs.
func (f *family) wants(to []want, s *forwarding.Service, internal masquerade) []want {
	w := want{hash: s.Scheduler == forwarding.SourceHash}
	w.key.proto, w.key.port = s.Key.Protocol, s.Key.Port
	if s.Affinity > 0 {
		w.pin = pinOf(s)
	}
	w.target, w.masq = &s.Internal, internal
	for _, a := range s.ServiceIPs {
		if f.is(a) {
			w.key.addr = addr16(a)
			to = append(to, w)
		}
	}
	w.masq = masqueradeAll
	if s.PreserveSource {
		w.masq = masqueradeNode
	}
	w.target = &s.External
	w.ranges = s.SourceRanges
	for _, a := range s.ExternalIPs {
		if f.is(a) && !slices.Contains(s.ServiceIPs, a) {
			w.key.addr, w.guarded = addr16(a), len(s.SourceRanges) > 0 && slices.Contains(s.LoadBalancerIPs, a)
			to = appendBoth(to, w, s)
		}
	}
	w.guarded = false
	if s.NodePort == 0 {
		return to
	}
	w.key.door.class = classOf(f, s.NodePortAddresses)
	if w.key.door.class != 0 {
		w.key.addr, w.key.port, w.nodePorts = [16]byte{}, s.NodePort, s.NodePortAddresses
		to = appendBoth(to, w, s)
	}
	return to
}

// appendBoth appends an external frontend, and one for traffic from here if that goes elsewhere.
func appendBoth(to []want, w want, s *forwarding.Service) []want {
	to = append(to, w)
	if !s.ExternalFromHere.Equal(s.External) {
		w.key.door.here = true
		w.target = &s.ExternalFromHere
		to = append(to, w)
	}
	return to
}

// serviceIPs appends a service's addresses of the family at which unused ports are refused.
func (f *family) serviceIPs(to []member, s *forwarding.Service) []member {
	for _, a := range s.ServiceIPs {
		if f.is(a) {
			to = append(to, member{addr: addr16(a)})
		}
	}
	return to
}

// hairpins appends an entry for each endpoint here: what it sends to a service may come back to itself.
func (f *family) hairpins(to []member, s *forwarding.Service) []member {
	for _, t := range [...]*forwarding.Target{&s.Internal, &s.External, &s.ExternalFromHere} {
		for _, e := range t.Endpoints {
			if e.Local && f.is(e.AddrPort.Addr()) {
				to = append(to, member{addr16(e.AddrPort.Addr()), s.Key.Protocol, e.AddrPort.Port()})
			}
		}
	}
	return to
}

// slots are the endpoints of a frontend as its endpoint map holds them: entry i is slot i, an address and a port in network byte
// order, or zeros for a hole. The array is flat because there is one for every frontend on the node.
type slots []byte

func (f *family) slotLen() int { return int(f.addrLen) + 2 }

func (f *family) slot(s slots, i int) []byte { n := f.slotLen(); return s[i*n : (i+1)*n] }

func (f *family) slotCount(s slots) int { return len(s) / f.slotLen() }

var noSlot [18]byte

func empty(slot []byte) bool { return bytes.Equal(slot, noSlot[:len(slot)]) }

// endpoints appends the target's endpoints of this family in the form of slots; they stay sorted.
func (f *family) endpoints(to []byte, t *forwarding.Target) []byte {
	for _, e := range t.Endpoints {
		if a := e.AddrPort.Addr(); f.is(a) {
			b := a.As16()
			to = append(to, b[16-f.addrLen:]...)
			to = binary.BigEndian.AppendUint16(to, e.AddrPort.Port())
		}
	}
	return to
}

// arrange gives slots for sorted endpoints, keeping each in the slot that it has in old. Holes are filled from below; slot 0 is never left empty.
func (f *family) arrange(old slots, endpoints []byte, size int) slots {
	n := f.slotLen()
	next := make(slots, size*n)
	placed := make([]bool, len(endpoints)/n)
	for i := range min(f.slotCount(old), size) {
		if at, found := f.search(endpoints, f.slot(old, i)); found && !placed[at] {
			placed[at] = true
			copy(f.slot(next, i), f.slot(old, i))
		}
	}
	hole := 0
	for i, done := range placed {
		if done {
			continue
		}
		for !empty(f.slot(next, hole)) {
			hole++
		}
		copy(f.slot(next, hole), endpoints[i*n:(i+1)*n])
	}
	if len(endpoints) > 0 && empty(f.slot(next, 0)) {
		last := size - 1
		for empty(f.slot(next, last)) {
			last--
		}
		copy(f.slot(next, 0), f.slot(next, last))
		clear(f.slot(next, last))
	}
	return next
}

func (f *family) search(endpoints []byte, slot []byte) (int, bool) {
	n := f.slotLen()
	lo, hi := 0, len(endpoints)/n
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		switch c := bytes.Compare(endpoints[mid*n:(mid+1)*n], slot); {
		case c == 0:
			return mid, true
		case c < 0:
			lo = mid + 1
		default:
			hi = mid
		}
	}
	return 0, false
}
