package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// Table is the kernel's connection tracking table of one network namespace. It is for one goroutine at a time.
type Table struct {
	fd  int
	seq uint32
	buf []byte
	// unfiltered says that the kernel cannot choose what it shows (before Linux 5.8).
	unfiltered bool
	// doomed are the requests that end the flows which were found, as messages one after the other.
	doomed []byte
}

// Numbers of linux/netfilter/nfnetlink_conntrack.h that golang.org/x/sys/unix has not.
const (
	msgNew    = unix.NFNL_SUBSYS_CTNETLINK << 8   // IPCTNL_MSG_CT_NEW
	msgGet    = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1 // IPCTNL_MSG_CT_GET
	msgDelete = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2 // IPCTNL_MSG_CT_DELETE

	attrTupleOrig  = 1
	attrTupleReply = 2
	attrID         = 12
	attrZone       = 18
	attrFilter     = 25

	tupleIP       = 1
	tupleProto    = 2
	ipv4Source    = 1
	ipv4Dest      = 2
	ipv6Source    = 3
	ipv6Dest      = 4
	protoNumber   = 1
	protoSrcPort  = 2
	protoDestPort = 3

	filterOrigFlags = 1
	// Which parts of the original tuple the kernel compares.
	compareDest     = 1 << 1
	compareProto    = 1 << 3
	compareDestPort = 1 << 5
)

const (
	// fewQueries is up to how many frontends the kernel is asked for the flows of each; for more it shows all UDP flows at once.
	fewQueries = 4
	// reads is how often a table that could not be read whole is read again.
	reads = 3
	// batch bounds how many flows end with one system call.
	batch = 256
	// answerTime is how long the kernel, which answers at once, may take. It guards against a lost end of a dump.
	answerTime = 10
)

// Open opens the table of the network namespace that the calling thread is in. It needs CAP_NET_ADMIN.
func Open() (*Table, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open conntrack socket: %w", err)
	}
	err = errors.Join(
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		// A batch of requests that all fail is answered by as many messages before the first can be read.
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20),
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: answerTime}))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("set up conntrack socket: %w", err), unix.Close(fd))
	}
	return &Table{fd: fd, buf: make([]byte, 64<<10)}, nil
}

// Close lets go of the socket.
func (t *Table) Close() error { return unix.Close(t.fd) }

// end ends the UDP flows of an address family that lead nowhere and are not spared, in all conntrack zones, and says how many that were. With an error, flows
// may be left.
func (t *Table) end(family uint8, s stale, spare func(flow) bool) (ended uint, err error) {
	for range reads {
		t.doomed = t.doomed[:0]
		if err = t.find(family, s, spare); err != nil && !errors.Is(err, errIncomplete) {
			break
		}
		// What is known to lead nowhere ends, even if it is not all.
		n, failed := t.delete()
		ended += n
		if failed != nil {
			err = failed
			break
		}
		if err == nil {
			break
		}
	}
	if cap(t.doomed) > 1<<20 {
		t.doomed = nil // one great pass must not hold its memory for good
	}
	if err != nil {
		return ended, fmt.Errorf("conntrack: %w", err)
	}
	return ended, nil
}

// errIncomplete says that the kernel did not show all that was asked for.
var errIncomplete = errors.New("the table was not shown whole")

// errIgnored says that the kernel showed more than was asked for.
var errIgnored = errors.New("the kernel does not filter")

// query is which UDP flows the kernel is to show: those sent to an address, if it is valid, and a port, if it is not 0.
type query frontend

// queries gives what together shows all flows to the stale frontends of one family.
func (s stale) queries() map[query]struct{} {
	out := map[query]struct{}{}
	for fe := range s {
		q := query(fe)
		if q.addr.Is6() {
			// Asked for an IPv6 address, the kernel shows the flows to all others (seen with Linux 6.18: the comparison in ctnetlink_filter_match_tuple is the
			// wrong way round).
			q.addr = netip.Addr{}
		}
		out[q] = struct{}{}
	}
	if len(out) > fewQueries {
		return map[query]struct{}{{}: {}}
	}
	return out
}

// find collects the requests that end the flows which lead nowhere.
func (t *Table) find(family uint8, s stale, spare func(flow) bool) error {
	doom := func(f flow, e entry) {
		if s.leadsNowhere(f) && !spare(f) {
			t.doom(family, e)
		}
	}
	var incomplete error
	if !t.unfiltered {
		for q := range s.queries() {
			switch err := t.dump(request(family, &q), &q, doom); {
			case errors.Is(err, errIncomplete):
				incomplete = err
			case errors.Is(err, errIgnored), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
				t.unfiltered = true
			case err != nil:
				return err
			}
			if t.unfiltered {
				break
			}
		}
	}
	if t.unfiltered {
		// What was found already is found again; a second request to end it says that there is none, which is no failure.
		return t.dump(request(family, nil), nil, doom)
	}
	return incomplete
}

// request asks for the UDP flows of a family that match a query; without a query, for all flows.
func request(family uint8, q *query) []byte {
	req := appendHeader(nil, msgGet, unix.NLM_F_DUMP, 0, family)
	if q != nil {
		req = q.append(req)
	}
	finish(req, 0)
	return req
}

// dump sends a request and gives the UDP flows that the kernel shows to each. If there is a query, it tells flows that do not match.
func (t *Table) dump(req []byte, q *query, each func(flow, entry)) error {
	t.seq++
	binary.NativeEndian.PutUint32(req[8:], t.seq)
	if err := t.send(req); err != nil {
		return err
	}
	incomplete, ignored := false, false
	for {
		p, err := t.receive(0)
		if errors.Is(err, unix.ENOBUFS) {
			incomplete = true // something was lost, but the dump goes on
			continue
		}
		if err != nil {
			return err
		}
		for m := range messages(p) {
			if m.seq != t.seq {
				continue
			}
			incomplete = incomplete || m.flags&unix.NLM_F_DUMP_INTR != 0
			switch {
			case m.typ == unix.NLMSG_ERROR || m.typ == unix.NLMSG_DONE:
				switch errno := m.errno(); {
				case errno == unix.EINTR || errno == 0 && incomplete:
					return errIncomplete
				case errno != 0:
					return errno
				case ignored:
					return errIgnored
				}
				return nil
			case m.typ == msgNew:
				f, entry, ok := parse(m.body)
				ignored = ignored || q != nil && (!ok || !q.match(f))
				if ok {
					each(f, entry)
				}
			}
		}
	}
}

func (q query) match(f flow) bool {
	return (!q.addr.IsValid() || q.addr == f.sentTo.Addr()) && (q.port == 0 || q.port == f.sentTo.Port())
}

// append appends the attributes that make the kernel show what matches.
func (q query) append(req []byte) []byte {
	compare := uint32(compareProto)
	req, tuple := open(req, attrTupleOrig)
	if q.addr.IsValid() {
		var ip int
		compare |= compareDest
		req, ip = open(req, tupleIP)
		attr := uint16(ipv4Dest)
		if q.addr.Is6() {
			attr = ipv6Dest
		}
		req = appendAttr(req, attr, q.addr.AsSlice())
		finish16(req, ip)
	}
	req, proto := open(req, tupleProto)
	req = appendAttr(req, protoNumber, []byte{byte(forwarding.UDP)})
	if q.port != 0 {
		compare |= compareDestPort
		req = appendAttr(req, protoDestPort, binary.BigEndian.AppendUint16(nil, q.port))
	}
	finish16(req, proto)
	finish16(req, tuple)
	req, filter := open(req, attrFilter)
	req = appendAttr(req, filterOrigFlags, binary.NativeEndian.AppendUint32(nil, compare))
	finish16(req, filter)
	return req
}

// entry is what the kernel finds an entry by: attributes as it gave them, valid until the next read.
type entry struct{ tuple, zone, id []byte }

// doom appends the request that ends a flow. The ID makes sure that it ends none that has taken the place of this one since; the zone, if there is one, is
// part of what tells flows apart, as in the tuple itself.
func (t *Table) doom(family uint8, e entry) {
	at := len(t.doomed)
	t.doomed = appendHeader(t.doomed, msgDelete, 0, 0, family)
	t.doomed = appendAttr(t.doomed, attrTupleOrig|unix.NLA_F_NESTED, e.tuple)
	t.doomed = appendAttr(t.doomed, attrID, e.id)
	if e.zone != nil {
		t.doomed = appendAttr(t.doomed, attrZone, e.zone)
	}
	finish(t.doomed, at)
}

// delete ends the flows that were found and gives how many of them there still were.
func (t *Table) delete() (ended uint, err error) {
	for rest := t.doomed; len(rest) > 0; {
		first := t.seq + 1
		end, last := 0, 0
		for n := 0; n < batch && end < len(rest); n++ {
			last = end
			t.seq++
			binary.NativeEndian.PutUint32(rest[end+8:], t.seq)
			end += int(binary.NativeEndian.Uint32(rest[end:]))
		}
		flags := binary.NativeEndian.Uint16(rest[last+6:])
		binary.NativeEndian.PutUint16(rest[last+6:], flags|unix.NLM_F_ACK)
		if err := t.send(rest[:end]); err != nil {
			return ended, err
		}
		gone, err := t.failures(first)
		if err != nil {
			return ended, err
		}
		ended += uint(t.seq-first+1) - gone
		rest = rest[end:]
	}
	return ended, nil
}

// failures reads the answers to the requests from first to t.seq, of which the kernel answers those that failed and the last one, and gives how many
// flows had ended by themselves.
func (t *Table) failures(first uint32) (gone uint, err error) {
	for {
		// The kernel has answered everything by the time that send returns.
		p, err := t.receive(unix.MSG_DONTWAIT)
		if err != nil {
			return 0, fmt.Errorf("the answer was lost: %w", err)
		}
		for m := range messages(p) {
			if m.typ != unix.NLMSG_ERROR || m.seq-first > t.seq-first {
				continue
			}
			switch errno := m.errno(); errno {
			case 0:
			case unix.ENOENT:
				gone++
			default:
				return 0, fmt.Errorf("end a flow: %w", errno)
			}
			if m.seq == t.seq {
				return gone, nil
			}
		}
	}
}

func (t *Table) send(p []byte) error {
	for {
		err := unix.Sendto(t.fd, p, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err != unix.EINTR {
			return err
		}
	}
}

func (t *Table) receive(flags int) ([]byte, error) {
	for {
		n, _, err := unix.Recvfrom(t.fd, t.buf, flags|unix.MSG_TRUNC)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, err
		case n > len(t.buf):
			return nil, fmt.Errorf("netlink message of %d bytes exceeds the buffer", n)
		}
		return t.buf[:n], nil
	}
}

// parse reads an entry of the table; ok is false for what is no UDP flow.
func parse(body []byte) (f flow, e entry, ok bool) {
	if len(body) < 4 {
		return f, e, false
	}
	for attr, v := range attributes(body[4:]) {
		switch attr {
		case attrTupleOrig:
			e.tuple = v
			var udp bool
			if _, f.sentTo, udp = parseTuple(v); !udp {
				return f, e, false
			}
		case attrTupleReply:
			f.answers, _, _ = parseTuple(v)
		case attrID:
			e.id = v
		case attrZone:
			e.zone = v
		}
	}
	return f, e, e.tuple != nil && e.id != nil
}

func parseTuple(p []byte) (source, dest netip.AddrPort, udp bool) {
	var from, to netip.Addr
	var fromPort, toPort uint16
	for attr, v := range attributes(p) {
		switch attr {
		case tupleIP:
			for a, ip := range attributes(v) {
				switch a {
				case ipv4Source, ipv6Source:
					from, _ = netip.AddrFromSlice(ip)
				case ipv4Dest, ipv6Dest:
					to, _ = netip.AddrFromSlice(ip)
				}
			}
		case tupleProto:
			for a, n := range attributes(v) {
				switch {
				case a == protoNumber && len(n) == 1:
					udp = forwarding.Protocol(n[0]) == forwarding.UDP
				case a == protoSrcPort && len(n) == 2:
					fromPort = binary.BigEndian.Uint16(n)
				case a == protoDestPort && len(n) == 2:
					toPort = binary.BigEndian.Uint16(n)
				}
			}
		}
	}
	return netip.AddrPortFrom(from, fromPort), netip.AddrPortFrom(to, toPort), udp
}

// message is one netlink message.
type message struct {
	typ, flags uint16
	seq        uint32
	body       []byte
}

// errno gives what the body of NLMSG_ERROR or NLMSG_DONE begins with.
func (m message) errno() syscall.Errno {
	if len(m.body) < 4 {
		return 0
	}
	return syscall.Errno(-int32(binary.NativeEndian.Uint32(m.body)))
}

// messages walks the messages of a datagram.
func messages(p []byte) iter.Seq[message] {
	return func(yield func(message) bool) {
		for len(p) >= unix.SizeofNlMsghdr {
			size := int(binary.NativeEndian.Uint32(p))
			if size < unix.SizeofNlMsghdr || size > len(p) || !yield(message{
				typ: binary.NativeEndian.Uint16(p[4:]), flags: binary.NativeEndian.Uint16(p[6:]),
				seq: binary.NativeEndian.Uint32(p[8:]), body: p[unix.SizeofNlMsghdr:size],
			}) {
				return
			}
			p = p[min((size+3)&^3, len(p)):]
		}
	}
}

// attributes walks netlink attributes; flags are taken off their types.
func attributes(p []byte) iter.Seq2[uint16, []byte] {
	const typeMask = 0x3fff
	return func(yield func(uint16, []byte) bool) {
		for len(p) >= unix.SizeofNlAttr {
			size := int(binary.NativeEndian.Uint16(p))
			if size < unix.SizeofNlAttr || size > len(p) || !yield(binary.NativeEndian.Uint16(p[2:])&typeMask, p[unix.SizeofNlAttr:size]) {
				return
			}
			p = p[min((size+3)&^3, len(p)):]
		}
	}
}

// appendHeader appends the headers of a message, whose length finish sets.
func appendHeader(buf []byte, typ, flags uint16, seq uint32, family uint8) []byte {
	buf = append(buf, 0, 0, 0, 0)
	buf = binary.NativeEndian.AppendUint16(buf, typ)
	buf = binary.NativeEndian.AppendUint16(buf, flags|unix.NLM_F_REQUEST)
	buf = binary.NativeEndian.AppendUint32(buf, seq)
	return append(buf, 0, 0, 0, 0, family, unix.NFNETLINK_V0, 0, 0)
}

func finish(buf []byte, at int) { binary.NativeEndian.PutUint32(buf[at:], uint32(len(buf)-at)) }

// open opens a nested attribute, whose length finish16 sets.
func open(buf []byte, attr uint16) ([]byte, int) {
	return appendAttr(buf, attr|unix.NLA_F_NESTED, nil), len(buf)
}

func finish16(buf []byte, at int) { binary.NativeEndian.PutUint16(buf[at:], uint16(len(buf)-at)) }

func appendAttr(buf []byte, attr uint16, v []byte) []byte {
	buf = binary.NativeEndian.AppendUint16(buf, uint16(unix.SizeofNlAttr+len(v)))
	buf = append(binary.NativeEndian.AppendUint16(buf, attr), v...)
	const zero = "\x00\x00\x00"
	return append(buf, zero[:-len(v)&3]...)
}
