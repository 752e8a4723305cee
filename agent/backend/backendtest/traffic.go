package backendtest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

const (
	// patience is how long an answer may take on a busy machine, silence how long is waited for one that must not come.
	patience = 2 * time.Second
	silence  = 150 * time.Millisecond
)

var networks = map[forwarding.Protocol]string{forwarding.TCP: "tcp", forwarding.UDP: "udp", forwarding.SCTP: "sctp"}

// serve answers at a place, on each of its addresses by itself: a wildcard UDP server with several addresses would answer from the wrong one.
func (l *Lab) serve(name string) {
	l.Helper()
	for _, a := range places[name].addrs {
		l.answer(l.spaces[name], name, netip.AddrPortFrom(a, serverPort))
	}
}

// listener is the name of servers that are no endpoint of anything.
const listener = "host's listener"

// listen serves at a port of the node as some program of the node would, until the row ends.
func (l *Lab) listen(port uint16, addresses ...[2]netip.Addr) {
	l.Helper()
	for _, both := range addresses {
		for _, a := range both {
			l.answer(l.node, listener, netip.AddrPortFrom(a, port))
		}
	}
}

// answer serves TCP, UDP and SCTP at an address. Every answer is "NAME remote-address"; TCP connections then echo, and so do UDP servers the rest of what is
// longer than a question.
func (l *Lab) answer(ns *netns.NS, name string, at netip.AddrPort) {
	l.Helper()
	err := ns.Do(func() error {
		tcp, err := net.Listen("tcp", at.String())
		if err != nil {
			return err
		}
		l.Cleanup(func() { tcp.Close() })
		udp, err := net.ListenPacket("udp", at.String())
		if err != nil {
			return err
		}
		l.Cleanup(func() { udp.Close() })
		go acceptAll(tcp, name)
		go answerAll(udp, name)
		return l.serveSCTP(name, at)
	})
	if err != nil {
		l.Fatal(err)
	}
}

func acceptAll(listener net.Listener, name string) {
	for {
		c, err := listener.Accept()
		if err != nil {
			return // closed
		}
		go func() {
			defer c.Close()
			fmt.Fprintf(c, "%s %s\n", name, c.RemoteAddr())
			_, _ = io.Copy(c, c) // until the client hangs up
		}()
	}
}

// question is what asks a server who it is.
const question = "who\n"

func answerAll(conn net.PacketConn, name string) {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return // closed
		}
		answer := fmt.Appendf(nil, "%s %s\n", name, from)
		if n > len(question) {
			answer = append(answer, buf[len(question):n]...)
		}
		_, _ = conn.WriteTo(answer, from) // the client asks again if it is lost
	}
}

// answer is who served a connection, and which source address it saw.
type answer struct {
	server string
	seen   netip.AddrPort
}

var lastPort atomic.Uint32

// freshPort gives always another port: one that is used again would go on with the flow that conntrack still has of it.
func freshPort() uint16 { return uint16(10000 + lastPort.Add(1)%50000) }

// dial connects from an address in a namespace.
func dial(ns *netns.NS, network string, from netip.Addr, to netip.AddrPort, wait time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: wait, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
	switch network {
	case "sctp":
		return dialSCTP(ns, netip.AddrPortFrom(from, freshPort()), to)
	case "udp":
		d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, freshPort()))
	}
	var c net.Conn
	// Happy eyeballs would dial in another goroutine, so in another namespace; one literal address is dialled in this one.
	err := ns.Do(func() (err error) { c, err = d.Dial(network, to.String()); return err })
	return c, err
}

// ask connects and reads who answers.
func ask(ns *netns.NS, network string, from netip.Addr, to netip.AddrPort, wait time.Duration) (answer, error) {
	c, err := dial(ns, network, from, to, wait)
	if err != nil {
		return answer{}, err
	}
	defer c.Close()
	return read(c, network, wait)
}

func read(c net.Conn, network string, wait time.Duration) (answer, error) {
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return answer{}, err
	}
	if network != "tcp" {
		if _, err := c.Write([]byte(question)); err != nil {
			return answer{}, err
		}
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return answer{}, err
	}
	line = strings.TrimSpace(line)
	end := strings.LastIndex(line, " ")
	seen, err := netip.ParseAddrPort(line[end+1:])
	return answer{line[:max(end, 0)], seen}, err
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}
