package nftables

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// topology is a node between a client outside the cluster and two pods:
//
//	client 192.0.2.2 ─ 192.0.2.1 node 10.244.0.1 ─ pods, each with ten addresses from 10.244.N.10
//
// and the like in IPv6.
type topology struct {
	client, node *netns.NS
	pods         [2]*netns.NS
}

var (
	clientAddr   = both{"192.0.2.2", "2001:db8:1::2"}
	nodeAddr     = both{"192.0.2.1", "2001:db8:1::1"}
	serviceIP    = both{"10.99.0.1", "fd00:99::1"}
	externalIP   = both{"198.51.100.7", "2001:db8:7::7"}
	clusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")}
	ground       = forwarding.Ground{Pods: forwarding.PodTraffic{Sources: clusterCIDRs}}
)

// both is an address in each family.
type both [2]string

func (b both) addr(family int) netip.Addr { return netip.MustParseAddr(b[family]) }

func podAddr(family, pod, i int) netip.Addr {
	if family == 0 {
		return netip.MustParseAddr(fmt.Sprintf("10.244.%d.%d", pod+1, 10+i))
	}
	return netip.MustParseAddr(fmt.Sprintf("fd00:244:%d::%d", pod+1, 10+i))
}

func newTopology(t testing.TB) *topology {
	t.Helper()
	top := &topology{client: netns.NewT(t), node: netns.NewT(t)}
	sh(t, top.node, `sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.default.accept_dad=0`)
	link(t, top.node, top.client, "client")
	sh(t, top.node, `ip addr add 192.0.2.1/24 dev client; ip addr add 2001:db8:1::1/64 dev client nodad`)
	sh(t, top.client, `ip addr add 192.0.2.2/24 dev eth0; ip addr add 2001:db8:1::2/64 dev eth0 nodad
		ip route add default via 192.0.2.1; ip route add default via 2001:db8:1::1`)
	for i := range top.pods {
		top.pods[i] = netns.NewT(t)
		link(t, top.node, top.pods[i], fmt.Sprintf("pod%d", i))
		n := i + 1
		sh(t, top.node, fmt.Sprintf(`ip addr add 10.244.%d.1/24 dev pod%d; ip addr add fd00:244:%d::1/64 dev pod%d nodad`, n, i, n, i))
		script := ""
		for j := range 10 {
			script += fmt.Sprintf("ip addr add %s/24 dev eth0; ip addr add %s/64 dev eth0 nodad\n", podAddr(0, i, j), podAddr(1, i, j))
		}
		sh(t, top.pods[i], script+fmt.Sprintf(`ip route add default via 10.244.%d.1; ip route add default via fd00:244:%d::1 src fd00:244:%d::10`, n, n, n))
	}
	// A router needs a way to service addresses to send to them itself.
	sh(t, top.node, `ip route add default via 192.0.2.2; ip route add default via 2001:db8:1::2`)
	return top
}

func sh(t testing.TB, ns *netns.NS, script string) {
	t.Helper()
	if _, err := ns.Run("sh", "-ec", script); err != nil {
		t.Fatal(err)
	}
}

func link(t testing.TB, a, b *netns.NS, name string) {
	t.Helper()
	sh(t, a, fmt.Sprintf("ip link add %s type veth peer name eth0 netns /proc/%d/fd/%d; ip link set %s up", name, os.Getpid(), b.Fd(), name))
	sh(t, b, "ip link set eth0 up")
}

// newBackend makes a backend in the node.
func newBackend(t testing.TB, ns *netns.NS) *Backend {
	t.Helper()
	var b *Backend
	if err := ns.Do(func() (err error) { b, err = New(); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return b
}

func apply(t testing.TB, b *Backend, prev *forwarding.State, next forwarding.State) {
	t.Helper()
	if err := b.Apply(context.Background(), prev, next); err != nil {
		t.Fatal(err)
	}
}

// serve answers every connection or datagram at an address with "local remote". TCP connections then echo lines.
func serve(t testing.TB, ns *netns.NS, network string, at netip.AddrPort) {
	t.Helper()
	err := ns.Do(func() error {
		if network == "udp" {
			conn, err := net.ListenPacket(network, at.String())
			if err != nil {
				return err
			}
			t.Cleanup(func() { conn.Close() })
			go func() {
				buf := make([]byte, 2048)
				for {
					_, from, err := conn.ReadFrom(buf)
					if err != nil {
						return
					}
					fmt.Fprintf(to{conn, from}, "%s %s\n", conn.LocalAddr(), from)
				}
			}()
			return nil
		}
		l, err := net.Listen(network, at.String())
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					fmt.Fprintf(c, "%s %s\n", c.LocalAddr(), c.RemoteAddr())
					io.Copy(c, c)
				}()
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

type to struct {
	net.PacketConn
	addr net.Addr
}

func (t to) Write(p []byte) (int, error) { return t.WriteTo(p, t.addr) }

// dial connects from a namespace, with the source address from unless it is the zero value.
func dial(ns *netns.NS, network string, at netip.AddrPort, from netip.Addr) (net.Conn, error) {
	return dialWithin(patience, ns, network, at, from)
}

var udpPort atomic.Uint32

// patience is how long an answer may take on a busy machine.
const patience = 2 * time.Second

func dialWithin(patience time.Duration, ns *netns.NS, network string, at netip.AddrPort, from netip.Addr) (net.Conn, error) {
	d := net.Dialer{Timeout: patience}
	switch {
	case network == "udp":
		// Always another port: one that is used again would go on with the flow that conntrack still has of it.
		if !from.IsValid() {
			from = netip.IPv4Unspecified()
			if at.Addr().Is6() {
				from = netip.IPv6Unspecified()
			}
		}
		d.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, uint16(10000+udpPort.Add(1)%50000)))
	case from.IsValid():
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	var c net.Conn
	// Happy eyeballs would dial in another goroutine; one literal address is dialled in this one.
	err := ns.Do(func() (err error) { c, err = d.Dial(network, at.String()); return err })
	return c, err
}

// ask gives who answered and whom that one saw.
func ask(ns *netns.NS, network string, at netip.AddrPort, from netip.Addr) (server, seen netip.AddrPort, err error) {
	return askWithin(patience, ns, network, at, from)
}

func askWithin(patience time.Duration, ns *netns.NS, network string, at netip.AddrPort, from netip.Addr) (server, seen netip.AddrPort, err error) {
	c, err := dialWithin(patience, ns, network, at, from)
	if err != nil {
		return server, seen, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return server, seen, err
	}
	if network == "udp" {
		if _, err := c.Write([]byte("who\n")); err != nil {
			return server, seen, err
		}
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return server, seen, err
	}
	s, r, _ := strings.Cut(strings.TrimSpace(line), " ")
	server, err1 := netip.ParseAddrPort(s)
	seen, err2 := netip.ParseAddrPort(r)
	return server, seen, errors.Join(err1, err2)
}

// endpoints are n endpoints of one family at the pods' addresses, ten to a pod.
func endpoints(family, n int, port uint16) []forwarding.Endpoint {
	var list []forwarding.Endpoint
	for i := range n {
		list = append(list, forwarding.Endpoint{AddrPort: netip.AddrPortFrom(podAddr(family, i/10, i%10), port), Local: true})
	}
	return list
}

func forward(list ...forwarding.Endpoint) forwarding.Target {
	return forwarding.Target{Endpoints: list}
}
