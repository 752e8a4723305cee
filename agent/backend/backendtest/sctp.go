package backendtest

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"os"
	"syscall"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// As much of SCTP (RFC 9260) as it takes to see where an association goes, over raw sockets: a kernel translates SCTP without having sockets for it. A
// client sends INIT; the server answers with INIT ACK, which carries "PLACE remote-address" as its state cookie. It never comes to an association.

const (
	protocolSCTP = "132"

	chunkInit    = 1
	chunkInitAck = 2
	chunkAbort   = 6

	sctpHeaderLen  = 12
	initLen        = 20 // chunk header, tag, window, numbers of streams, TSN
	paramHeaderLen = 4
	paramCookie    = 7
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sctpPacket is a packet with one chunk of INIT's or INIT ACK's form.
type sctpPacket struct {
	source, destination uint16
	// tag is the receiver's, 0 in INIT; own is the one by which the sender wants to be known.
	tag, own uint32
	chunk    byte
	cookie   string
}

// marshal gives the packet with its checksum, without which conntrack would take it for no part of anything.
func (p sctpPacket) marshal() []byte {
	b := binary.BigEndian.AppendUint16(nil, p.source)
	b = binary.BigEndian.AppendUint16(b, p.destination)
	b = binary.BigEndian.AppendUint32(b, p.tag)
	b = binary.BigEndian.AppendUint32(b, 0) // checksum
	length := initLen
	if p.cookie != "" {
		length += paramHeaderLen + len(p.cookie)
	}
	b = append(b, p.chunk, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(length))
	b = binary.BigEndian.AppendUint32(b, p.own)
	b = binary.BigEndian.AppendUint32(b, 1<<16) // window
	b = append(b, 0, 1, 0, 1)                   // one stream each way
	b = binary.BigEndian.AppendUint32(b, p.own) // first TSN
	if p.cookie != "" {
		b = binary.BigEndian.AppendUint16(b, paramCookie)
		b = binary.BigEndian.AppendUint16(b, uint16(paramHeaderLen+len(p.cookie)))
		b = append(b, p.cookie...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, castagnoli))
	return b
}

// parseSCTP reads what marshal writes, and ABORT; ok is false for everything else.
func parseSCTP(b []byte) (p sctpPacket, ok bool) {
	if len(b) < sctpHeaderLen+4 {
		return p, false
	}
	sum := binary.LittleEndian.Uint32(b[8:])
	clear(b[8:12])
	if crc32.Checksum(b, castagnoli) != sum {
		return p, false
	}
	p.source, p.destination, p.tag = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:]), binary.BigEndian.Uint32(b[4:])
	chunk := b[sctpHeaderLen:]
	p.chunk = chunk[0]
	length := int(binary.BigEndian.Uint16(chunk[2:]))
	if p.chunk == chunkAbort {
		return p, true
	}
	if length < initLen || length > len(chunk) {
		return p, false
	}
	p.own = binary.BigEndian.Uint32(chunk[4:])
	if param := chunk[initLen:length]; len(param) >= paramHeaderLen && binary.BigEndian.Uint16(param) == paramCookie {
		p.cookie = string(param[paramHeaderLen:])
	}
	return p, true
}

// serveSCTP answers at a port of an address of a place, as serve does.
func (l *Lab) serveSCTP(name string, at netip.AddrPort) error {
	conn, err := net.ListenIP(ipNetwork(at.Addr()), &net.IPAddr{IP: at.Addr().AsSlice()})
	if err != nil {
		return err
	}
	l.Cleanup(func() { conn.Close() })
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := conn.ReadFromIP(buf)
			if err != nil {
				return // closed
			}
			in, ok := parseSCTP(buf[:n])
			if !ok || in.chunk != chunkInit || in.destination != at.Port() {
				continue // a raw socket gets all that comes to the address
			}
			client := netip.AddrPortFrom(netip.MustParseAddr(from.String()), in.source)
			out := sctpPacket{source: in.destination, destination: in.source, tag: in.own, own: 1, chunk: chunkInitAck, cookie: fmt.Sprintf("%s %s\n", name, client)}
			_, _ = conn.WriteToIP(out.marshal(), from) // the client asks again if it is lost
		}
	}()
	return nil
}

func ipNetwork(a netip.Addr) string {
	if a.Is4() {
		return "ip4:" + protocolSCTP
	}
	return "ip6:" + protocolSCTP
}

// sctpConn is a connection of which every Write is an INIT, whatever is written, and every Read what the server's INIT ACK says.
type sctpConn struct {
	*net.IPConn
	from, to netip.AddrPort
}

// dialSCTP does not talk to the other side yet. Sockets of one address that talk to the same one at a time share refusals, because the kernel tells every
// connected raw socket of them.
func dialSCTP(ns *netns.NS, from, to netip.AddrPort) (net.Conn, error) {
	c := &sctpConn{from: from, to: to}
	err := ns.Do(func() (err error) {
		c.IPConn, err = net.DialIP(ipNetwork(from.Addr()), &net.IPAddr{IP: from.Addr().AsSlice()}, &net.IPAddr{IP: to.Addr().AsSlice()})
		return err
	})
	return c, err
}

// ownTag tells the answers to a connection's INIT from others'.
func (c *sctpConn) ownTag() uint32 { return uint32(c.from.Port())<<16 | uint32(c.to.Port()) }

func (c *sctpConn) Write(b []byte) (int, error) {
	p := sctpPacket{source: c.from.Port(), destination: c.to.Port(), own: c.ownTag(), chunk: chunkInit}
	if _, err := c.IPConn.Write(p.marshal()); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (c *sctpConn) Read(b []byte) (int, error) {
	buf := make([]byte, 2048)
	for {
		n, _, err := c.ReadFromIP(buf)
		if err != nil {
			return 0, err
		}
		p, ok := parseSCTP(buf[:n])
		switch {
		case !ok || p.source != c.to.Port() || p.destination != c.from.Port() || p.tag != c.ownTag():
		case p.chunk == chunkAbort:
			return 0, os.NewSyscallError("read", syscall.ECONNREFUSED)
		case p.chunk == chunkInitAck:
			return copy(b, p.cookie), nil
		}
	}
}

func (c *sctpConn) LocalAddr() net.Addr  { return net.UDPAddrFromAddrPort(c.from) }
func (c *sctpConn) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(c.to) }
