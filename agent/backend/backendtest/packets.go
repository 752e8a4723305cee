package backendtest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// packets are the promises about traffic that is not a plain small connection through a Service.
var packets = []Scenario{
	{"a ping to a service IP is refused, and others are left alone", func(l *Lab) {
		ips := [2]netip.Addr{destination(toExternalIP, 0).Addr(), destination(toExternalIP, 1).Addr()}
		l.addAddress("lo", ips) // the node answers for an external IP that is its own
		l.ProgramOn(declared(), web(at("a"), nil))
		l.Ping("a c node q outside", toServiceIP, refused)
		l.Ping("a c node q outside", toUnallocated, silent)
		l.Ping("a c node q outside", toExternalIP, passed)
		l.Ping("a c node q outside", toNodePort, passed)
	}},
	{"connections that go directly to an endpoint keep their source port", func(l *Lab) {
		l.Program(web(at("a", "node", "r"), nil))
		for _, c := range [][2]string{{"node", "node"}, {"a", "a"}, {"c", "a"}, {"node", "a"}, {"c", "r"}, {"q", "a"}, {"outside", "node"}} {
			l.direct(c[0], c[1])
		}
	}},
	{"the node reaches an endpoint of its own through the Service", func(l *Lab) {
		l.Program(web(at("node"), nil))
		l.Expect("node", toServiceIP, "node=")
		l.Expect("node", toExternalIP, "node=")
		l.Expect("node", toNodePort, "node=")
	}},
	{"datagrams larger than the links' MTU come through", func(l *Lab) {
		l.Program(web(at("a", "r"), nil))
		for _, c := range [][2]string{{"c", toServiceIP}, {"outside", toServiceIP}, {"outside", toNodePort}, {"node", toExternalIP}} {
			l.exchange("udp", c[0], c[1], 20_000)
		}
	}},
	{"large transfers come through", func(l *Lab) {
		l.Program(web(at("a", "r"), nil))
		for _, c := range [][2]string{{"c", toServiceIP}, {"outside", toServiceIP}, {"outside", toNodePort}, {"node", toExternalIP}} {
			l.exchange("tcp", c[0], c[1], 2<<20)
		}
	}},
	{"packets that are part of no connection do not end translated connections", func(l *Lab) {
		ground := labGround()
		ground.DropInvalid = true
		l.ProgramOn(ground, web(at("a"), nil))
		for family := range 2 {
			if err := l.survivesInvalid(family); err != nil {
				l.Errorf("to the service IP %s: %v", destination(toServiceIP, family), err)
			}
		}
	}},
}

// Ping checks what becomes of ICMP echo requests to the address of a destination: refused, silent or passed, which is answered.
func (l *Lab) Ping(from, to, want string) {
	l.Helper()
	state := l.world.State()
	var asking failures
	for _, name := range strings.Fields(from) {
		for family, source := range places[name].addrs {
			a := destination(to, family).Addr()
			p := forwarding.Packet{Protocol: icmp[family], Source: source, Destination: netip.AddrPortFrom(a, 0), In: places[name].in}
			wait := patience
			if want == silent {
				wait = silence
			}
			asking.Go(func() error {
				if err := judge(state.Lookup(l.lookupNode(), p), family, want); err != nil {
					return fmt.Errorf("ping from %s to the %s %s: by State.Lookup: %w", name, to, a, err)
				}
				if err := met(want, name, ping(l.spaces[name], source, a, wait)); err != nil {
					return fmt.Errorf("ping from %s to the %s %s: %w", name, to, a, err)
				}
				return nil
			})
		}
	}
	asking.report(l)
}

// icmp is the protocol of either family.
var icmp = [2]forwarding.Protocol{unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6}

// ping sends an echo request and waits for the answer.
func ping(ns *netns.NS, source, to netip.Addr, wait time.Duration) error {
	family := familyOf(source)
	var c *net.IPConn
	err := ns.Do(func() (err error) {
		network := []string{"ip4:icmp", "ip6:ipv6-icmp"}[family]
		c, err = net.DialIP(network, &net.IPAddr{IP: source.AsSlice()}, &net.IPAddr{IP: to.AsSlice()})
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	request := []byte{[]byte{8, 128}[family], 0, 0, 0, 0, 0, 0, 1}
	binary.BigEndian.PutUint16(request[4:], uint16(rand.Uint32()))
	if family == 0 { // the kernel does it for IPv6
		binary.BigEndian.PutUint16(request[2:], ^checksum(0, request))
	}
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	if _, err := c.Write(request); err != nil {
		return err
	}
	buf := make([]byte, 1500)
	for {
		n, _, err := c.ReadFromIP(buf)
		if err != nil {
			return err
		}
		if n >= 8 && buf[0] == []byte{0, 129}[family] && bytes.Equal(buf[4:8], request[4:]) {
			return nil
		}
	}
}

// checksum is the Internet's, not yet complemented.
func checksum(sum uint32, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) > 0 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// direct checks that a connection from one place to another, past all Services, is seen there as it left.
func (l *Lab) direct(from, to string) {
	l.Helper()
	for family, source := range places[from].addrs {
		for _, network := range networks {
			c, err := dial(l.spaces[from], network, source, netip.AddrPortFrom(places[to].addrs[family], serverPort), patience)
			if err != nil {
				l.Errorf("%s from %s to %s: %v", network, from, to, err)
				continue
			}
			if got, err := read(c, network, patience); err != nil || got.seen.String() != c.LocalAddr().String() {
				l.Errorf("%s from %s to %s: %s saw %s, %v; want %s", network, from, to, got.server, got.seen, err, c.LocalAddr())
			}
			c.Close()
		}
	}
}

// exchange sends so many bytes from a place to a destination, in both families, and checks that the same come back.
func (l *Lab) exchange(network, from, to string, size int) {
	l.Helper()
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	for family, source := range places[from].addrs {
		for range 3 { // so that it comes to several endpoints
			if err := l.exchangeOnce(network, from, source, destination(to, family), data); err != nil {
				l.Errorf("%d bytes by %s from %s to the %s: %v", size, network, from, to, err)
			}
		}
	}
}

func (l *Lab) exchangeOnce(network, from string, source netip.Addr, to netip.AddrPort, data []byte) error {
	c, err := dial(l.spaces[from], network, source, to, patience)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * patience)); err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(append([]byte(question), data...))
		sent <- err
	}()
	// Before what comes back there is one line, and in a stream the question.
	want := append([]byte("\n"), data...)
	if network == "tcp" {
		want = append([]byte("\n"+question), data...)
	}
	got := make([]byte, 0, len(data)+200)
	for !bytes.HasSuffix(got, want[len(want)-min(len(want), 64):]) || len(got) < len(want) {
		n, err := c.Read(got[len(got):cap(got)])
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", len(got), err)
		}
		got = got[:len(got)+n]
	}
	if !bytes.HasSuffix(got, want) {
		return fmt.Errorf("other bytes came back")
	}
	return <-sent
}

// survivesInvalid has the endpoint a send what connection tracking takes for no part of c's connection to it, and looks whether the connection goes on. Without
// help c would get that packet untranslated, from somebody it does not know, and its reset would end the connection at a.
func (l *Lab) survivesInvalid(family int) error {
	client, server := places["c"].addrs[family], netip.AddrPortFrom(places["a"].addrs[family], serverPort)
	conn, err := dial(l.spaces["c"], "tcp", client, destination(toServiceIP, family), patience)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := read(conn, "tcp", patience); err != nil {
		return err
	}
	tcp := conn.(*net.TCPConn)
	sent, received, err := sequenceNumbers(tcp)
	if err != nil {
		return fmt.Errorf("read sequence numbers: %w", err)
	}
	before, err := l.invalidPackets()
	if err != nil {
		return err
	}
	to := tcp.LocalAddr().(*net.TCPAddr).AddrPort()
	if err := l.forge(server, netip.AddrPortFrom(client, to.Port()), received+1<<30, sent); err != nil {
		return fmt.Errorf("send a segment from outside the window: %w", err)
	}
	for deadline := time.Now().Add(patience); ; {
		now, err := l.invalidPackets()
		if err != nil {
			return err
		}
		if now > before {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("connection tracking does not call the segment INVALID")
		}
	}
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	for range 5 {
		if _, err := conn.Write([]byte(question)); err != nil {
			return err
		}
		if _, err := io.ReadFull(conn, make([]byte, len(question))); err != nil {
			return err
		}
	}
	return nil
}

// sequenceNumbers gives the next ones that a connection will send and expects.
func sequenceNumbers(c *net.TCPConn) (sent, received uint32, err error) {
	const (
		receiveQueue, sendQueue = 1, 2
		offWithoutProbe         = -1
	)
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, 0, err
	}
	queue := func(fd, which int) (uint32, error) {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, which); err != nil {
			return 0, err
		}
		n, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ)
		return uint32(n), err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		if failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1); failed != nil {
			return
		}
		if sent, failed = queue(int(fd), sendQueue); failed == nil {
			received, failed = queue(int(fd), receiveQueue)
		}
		if err := unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, offWithoutProbe); failed == nil {
			failed = err
		}
	})
	if err == nil {
		err = failed
	}
	return sent, received, err
}

// forge sends a TCP segment with one byte from a's address.
func (l *Lab) forge(from, to netip.AddrPort, sequence, acknowledged uint32) error {
	const ack = 0x10
	b := binary.BigEndian.AppendUint16(nil, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = binary.BigEndian.AppendUint32(b, sequence)
	b = binary.BigEndian.AppendUint32(b, acknowledged)
	b = append(b, 5<<4, ack, 4, 0, 0, 0, 0, 0, 'x')
	pseudo := append(from.Addr().AsSlice(), to.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, unix.IPPROTO_TCP, 0, byte(len(b)))
	binary.BigEndian.PutUint16(b[16:], ^checksum(uint32(checksum(0, pseudo)), b))
	return l.spaces["a"].Do(func() error {
		c, err := net.DialIP([]string{"ip4:tcp", "ip6:tcp"}[familyOf(from.Addr())], &net.IPAddr{IP: from.Addr().AsSlice()}, &net.IPAddr{IP: to.Addr().AsSlice()})
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(b)
		return err
	})
}

// invalidPackets gives how many packets the node's connection tracking has called INVALID.
func (l *Lab) invalidPackets() (total uint64, err error) {
	err = l.node.Do(func() error {
		text, err := os.ReadFile("/proc/thread-self/net/stat/nf_conntrack")
		if err != nil {
			return err
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		column := -1
		for i, name := range strings.Fields(lines[0]) {
			if name == "invalid" {
				column = i
			}
		}
		for _, perCPU := range lines[1:] {
			fields := strings.Fields(perCPU)
			if column < 0 || column >= len(fields) {
				return fmt.Errorf("connection tracking does not count INVALID packets")
			}
			n, err := strconv.ParseUint(fields[column], 16, 64)
			if err != nil {
				return err
			}
			total += n
		}
		return nil
	})
	return total, err
}
