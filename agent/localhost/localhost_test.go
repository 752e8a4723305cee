package localhost

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"
	"github.com/go-logr/logr/funcr"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/loopback"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/agent/sysctl"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

const (
	nodePort = 30080
	patience = 10 * time.Second
)

// bench is a node with endpoints at addresses of its own.
type bench struct {
	testing.TB
	*Proxy
	ns *netns.NS

	mu   sync.Mutex
	logs []string
}

func newBench(t testing.TB, change func(*limits)) *bench {
	b := &bench{TB: t, ns: netns.NewT(t)}
	for _, script := range []string{"ip addr add fd00::1/128 dev lo nodad", "ip addr add fd00::2/128 dev lo nodad"} {
		if _, err := b.ns.Run("sh", "-c", script); err != nil {
			t.Fatal(err)
		}
	}
	// The kernel adds the routes by which it receives what is for new addresses a little later.
	b.eventually("the addresses are local", func() bool {
		out, err := b.ns.Run("ip", "-6", "route", "show", "table", "local")
		return err == nil && strings.Count(out, "local ") == 3
	})
	l := limits{connections: 10, flows: 10, idle: patience, retryListen: 10 * time.Millisecond}
	if change != nil {
		change(&l)
	}
	log := funcr.New(func(_, args string) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.logs = append(b.logs, args)
	}, funcr.Options{})
	b.Proxy = newProxy(log, Host{Do: b.ns.Do, Route: func() (bool, error) { return loopback.Route(sysctl.Kernel) }}, l)
	t.Cleanup(b.Close)
	return b
}

func (b *bench) logged(what string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.ContainsFunc(b.logs, func(s string) bool { return strings.Contains(s, what) })
}

// service is one with node ports at loopback.
func service(protocol forwarding.Protocol, endpoints ...string) *forwarding.Service {
	s := &forwarding.Service{
		Key: forwarding.ServiceKey{Namespace: "default", Name: "web", Port: 80, Protocol: protocol}, NodePort: nodePort,
		NodePortAddresses: []netip.Prefix{netip.MustParsePrefix("::1/128")},
	}
	for _, e := range endpoints {
		s.ExternalFromHere.Endpoints = append(s.ExternalFromHere.Endpoints, forwarding.Endpoint{AddrPort: netip.MustParseAddrPort(e)})
	}
	return s
}

// serve greets TCP connections with its address, then echoes until the client's end, and says goodbye.
func (b *bench) serve(at string) net.Listener {
	b.Helper()
	var l net.Listener
	if err := b.ns.Do(func() (err error) { l, err = net.Listen("tcp", at); return err }); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				fmt.Fprintln(c, at)
				if _, err := io.Copy(c, c); err == nil {
					fmt.Fprintln(c, "bye")
				}
			}()
		}
	}()
	return l
}

// serveUDP answers every datagram with its address.
func (b *bench) serveUDP(at string) net.PacketConn {
	b.Helper()
	var c net.PacketConn
	if err := b.ns.Do(func() (err error) { c, err = net.ListenPacket("udp", at); return err }); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, maxDatagram)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteTo([]byte(fmt.Sprintf("%s %d", at, n)), from)
		}
	}()
	return c
}

func (b *bench) dial(network string) (net.Conn, error) {
	var c net.Conn
	err := b.ns.Do(func() (err error) {
		c, err = net.DialTimeout(network, fmt.Sprintf("[::1]:%d", nodePort), patience)
		return err
	})
	if err == nil {
		b.Cleanup(func() { c.Close() })
		err = c.SetDeadline(time.Now().Add(patience))
	}
	return c, err
}

// greeted connects and gives who answers.
func (b *bench) greeted() (*net.TCPConn, *bufio.Reader, string) {
	b.Helper()
	c, err := b.dial("tcp")
	if err != nil {
		b.Fatal(err)
	}
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	if err != nil {
		b.Fatalf("%v; logged: %v", err, b.logs)
	}
	return c.(*net.TCPConn), r, strings.TrimSpace(line)
}

// asked sends a datagram and gives the answer.
func asked(t testing.TB, c net.Conn, length int) string {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(make([]byte, length)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	n, err := c.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return string(buf[:n])
}

func (b *bench) eventually(what string, ok func() bool) {
	b.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			b.Fatalf("never: %s", what)
		}
	}
}

func (b *bench) refused(network string) bool {
	c, err := b.dial(network)
	if network == "udp" && err == nil {
		_, _ = c.Write([]byte("?"))
		_, err = c.Read(make([]byte, 1))
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}

func TestTCPKeepsHalfClosedConnections(t *testing.T) {
	b := newBench(t, nil)
	b.serve("[fd00::1]:80")
	b.Changed(nil, service(forwarding.TCP, "10.0.0.1:80", "[fd00::1]:80"))
	c, r, _ := b.greeted()
	text := strings.Repeat("x", 1<<20)
	go func() {
		_, _ = io.WriteString(c, text)
		_ = c.CloseWrite()
	}()
	if got, err := io.ReadAll(r); err != nil || string(got) != text+"bye\n" {
		t.Errorf("%d bytes, %v; want what was sent and the endpoint's goodbye", len(got), err)
	}
}

func TestARefusalGoesThrough(t *testing.T) {
	b := newBench(t, nil)
	l := b.serve("[fd00::1]:80")
	b.Changed(nil, service(forwarding.TCP, "[fd00::1]:80"))
	l.Close()
	c, err := b.dial("tcp")
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%v, want a reset", err)
	}
}

func TestAnotherEndpointIsTriedWhenOneRefuses(t *testing.T) {
	b := newBench(t, nil)
	b.serve("[fd00::2]:80")
	b.Changed(nil, service(forwarding.TCP, "[fd00::1]:80", "[fd00::2]:80"))
	for range 20 {
		if c, _, who := b.greeted(); who != "[fd00::2]:80" {
			t.Fatal(who)
		} else {
			c.Close()
		}
	}
}

func TestAllEndpointsServe(t *testing.T) {
	b := newBench(t, func(l *limits) { l.connections = 1000 })
	b.serve("[fd00::1]:80")
	b.serve("[fd00::2]:80")
	b.Changed(nil, service(forwarding.TCP, "[fd00::1]:80", "[fd00::2]:80"))
	seen := map[string]bool{}
	for range 60 {
		c, _, who := b.greeted()
		seen[who] = true
		c.Close()
	}
	if len(seen) != 2 {
		t.Errorf("only %v served", seen)
	}
}

func TestAPortFollowsItsService(t *testing.T) {
	b := newBench(t, nil)
	b.serve("[fd00::1]:80")
	b.serveUDP("[fd00::1]:80")
	for protocol, network := range map[forwarding.Protocol]string{forwarding.TCP: "tcp", forwarding.UDP: "udp"} {
		with, none := service(protocol, "[fd00::1]:80"), service(protocol, "10.0.0.1:80")
		everywhere := service(protocol, "[fd00::1]:80")
		everywhere.NodePortAddresses = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
		var prev *forwarding.Service
		for i, step := range []struct {
			next   *forwarding.Service
			served bool
		}{{none, false}, {with, true}, {with, true}, {everywhere, false}, {with, true}, {nil, false}, {with, true}, {none, false}} {
			b.Changed(prev, step.next)
			if b.refused(network) == step.served {
				t.Errorf("%s, step %d: served should be %v", network, i, step.served)
			}
			prev = step.next
		}
	}
}

func TestAPortChangesHandsInAnyOrder(t *testing.T) {
	b := newBench(t, nil)
	b.serve("[fd00::1]:80")
	b.serve("[fd00::2]:80")
	old, next := service(forwarding.TCP, "[fd00::1]:80"), service(forwarding.TCP, "[fd00::2]:80")
	next.Key.Name = "other"
	b.Changed(nil, old)
	b.Changed(nil, next)
	b.Changed(old, nil)
	if _, _, who := b.greeted(); who != "[fd00::2]:80" {
		t.Error(who)
	}
}

func TestOpenConnectionsOutliveTheirPort(t *testing.T) {
	b := newBench(t, nil)
	b.serve("[fd00::1]:80")
	s := service(forwarding.TCP, "[fd00::1]:80")
	b.Changed(nil, s)
	c, r, _ := b.greeted()
	b.Changed(s, nil)
	if !b.refused("tcp") {
		t.Error("the port is still served")
	}
	for range 1000 {
		fmt.Fprintln(c, "still here")
		if line, err := r.ReadString('\n'); err != nil || line != "still here\n" {
			t.Fatalf("%q, %v", line, err)
		}
	}
	b.Close()
	if _, err := r.ReadString('\n'); err == nil {
		t.Error("the connection outlived the Proxy")
	}
}

func TestAPortInUseIsTriedAgain(t *testing.T) {
	b := newBench(t, nil)
	b.serve("[fd00::1]:80")
	other := b.serve(fmt.Sprintf("[::1]:%d", nodePort))
	b.Changed(nil, service(forwarding.TCP, "[fd00::1]:80"))
	if !b.logged("address already in use") {
		t.Errorf("nothing is logged: %v", b.logs)
	}
	other.Close()
	b.eventually("the port is served", func() bool { return !b.refused("tcp") })
	if n := len(b.logs); n != 1 {
		t.Errorf("logged %d times: %v", n, b.logs)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	b := newBench(t, func(l *limits) { l.connections = 2 })
	b.serve("[fd00::1]:80")
	b.Changed(nil, service(forwarding.TCP, "[fd00::1]:80"))
	first, _, _ := b.greeted()
	b.greeted()
	c, err := b.dial("tcp")
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v, want a reset", err)
	}
	b.eventually("the bound is logged", func() bool { return b.logged(`"limit"=2`) })
	first.Close()
	b.eventually("there is room again", func() bool {
		c, err := b.dial("tcp")
		if err == nil {
			_, err = bufio.NewReader(c).ReadString('\n')
		}
		return err == nil
	})
}

func TestUDPFlowsStayAndMoveWhenTheirEndpointGoes(t *testing.T) {
	b := newBench(t, nil)
	b.serveUDP("[fd00::1]:80")
	b.serveUDP("[fd00::2]:80")
	both := service(forwarding.UDP, "[fd00::1]:80", "[fd00::2]:80")
	b.Changed(nil, both)
	seen := map[string]bool{}
	var clients []net.Conn
	for range 9 {
		c, err := b.dial("udp")
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
		who := asked(t, c, 3)
		for range 5 {
			if again := asked(t, c, 3); again != who {
				t.Fatalf("a flow moved from %s to %s", who, again)
			}
		}
		seen[who] = true
	}
	if len(seen) != 2 {
		t.Errorf("only %v served", seen)
	}
	b.Changed(both, service(forwarding.UDP, "[fd00::2]:80"))
	for _, c := range clients {
		if who := asked(t, c, 60000); who != "[fd00::2]:80 60000" {
			t.Errorf("%s answered after its end", who)
		}
	}
}

func TestAnEndpointThatRefusesDatagramsIsLeft(t *testing.T) {
	b := newBench(t, nil)
	b.serveUDP("[fd00::2]:80")
	b.Changed(nil, service(forwarding.UDP, "[fd00::1]:80", "[fd00::2]:80"))
	c, err := b.dial("udp")
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	b.eventually("the other endpoint answers", func() bool {
		_, _ = c.Write([]byte("?"))
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := c.Read(buf)
		return err == nil && strings.HasPrefix(string(buf[:n]), "[fd00::2]:80")
	})
}

func (b *bench) flowCount() int {
	b.flows.mu.Lock()
	defer b.flows.mu.Unlock()
	return len(b.flows.all)
}

func TestFlowsAreBoundedAndTheOldestMakesRoom(t *testing.T) {
	b := newBench(t, func(l *limits) { l.flows = 2 })
	b.serveUDP("[fd00::1]:80")
	b.Changed(nil, service(forwarding.UDP, "[fd00::1]:80"))
	for range 5 {
		c, err := b.dial("udp")
		if err != nil {
			t.Fatal(err)
		}
		asked(t, c, 1)
	}
	if n := b.flowCount(); n != 2 {
		t.Errorf("%d flows, want 2", n)
	}
	if !b.logged(`"limit"=2`) {
		t.Errorf("the bound is not logged: %v", b.logs)
	}
}

func TestIdleFlowsEnd(t *testing.T) {
	b := newBench(t, func(l *limits) { l.idle = 20 * time.Millisecond })
	b.serveUDP("[fd00::1]:80")
	b.Changed(nil, service(forwarding.UDP, "[fd00::1]:80"))
	c, err := b.dial("udp")
	if err != nil {
		t.Fatal(err)
	}
	asked(t, c, 1)
	b.eventually("the flow ends", func() bool { return b.flowCount() == 0 })
	asked(t, c, 1)
}

func TestSCTPIsToldOnce(t *testing.T) {
	b := newBench(t, nil)
	s := service(forwarding.SCTP, "[fd00::1]:80")
	b.Changed(nil, s)
	b.Changed(s, service(forwarding.SCTP, "[fd00::2]:80"))
	if len(b.logs) != 1 || !b.logged("SCTP") {
		t.Errorf("logged: %v", b.logs)
	}
}

func TestTheKernelMayRouteLoopbackOnlyWhenAServiceAsks(t *testing.T) {
	routed := 0
	p := New(logr.Discard(), Host{Route: func() (bool, error) { routed++; return true, nil }})
	defer p.Close()
	everywhere := service(forwarding.TCP, "10.0.0.1:80")
	everywhere.NodePortAddresses = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
	p.Changed(nil, everywhere)
	if routed > 0 {
		t.Error("the kernel routes loopback addresses without a Service that asks for localhost")
	}
	localhost := service(forwarding.TCP, "10.0.0.1:80")
	localhost.NodePortAddresses = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
	p.Changed(everywhere, localhost)
	p.Changed(localhost, everywhere)
	p.Changed(everywhere, localhost)
	if routed != 1 {
		t.Errorf("the kernel was told %d times to route loopback addresses for Services that ask for localhost", routed)
	}
}

// Where the parameter cannot be set, changes of Services must not make the kernel commit the same rule again and again.
func TestRoutingLoopbackIsTriedAgainInAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		p := New(logr.Discard(), Host{Route: func() (bool, error) {
			if tries++; tries < 3 {
				return false, os.ErrPermission
			}
			return true, nil
		}})
		defer p.Close()
		a, b := service(forwarding.SCTP, "10.0.0.1:80"), service(forwarding.SCTP, "10.0.0.2:80")
		a.NodePortAddresses = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
		b.NodePortAddresses = a.NodePortAddresses
		for range 300 {
			p.Changed(a, b)
			time.Sleep(time.Second)
		}
		if tries != 3 {
			t.Errorf("tried %d times in five minutes, want once a minute until it works", tries)
		}
	})
}

func TestTroubleIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := New(logr.Discard(), Host{})
		defer p.Close()
		for i := range 600 {
			p.trouble("connect "+strconv.Itoa(i), os.ErrDeadlineExceeded, "No endpoint accepted a connection")
			time.Sleep(time.Second)
		}
		if n := len(p.logged); n > 61 {
			t.Errorf("troubles of %d Services are remembered, want those of the last minute", n)
		}
	})
}

func TestAffinityLastsItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var all []netip.AddrPort
		for i := range 100 {
			all = append(all, netip.AddrPortFrom(netip.MustParseAddr("fd00::1"), uint16(i+1)))
		}
		var v targets
		v.set(all, time.Minute)
		v.used(all[7])
		for range 10 {
			time.Sleep(50 * time.Second)
			if first := v.order()[0]; first != all[7] {
				t.Fatalf("%s comes first, want %s", first, all[7])
			}
			v.used(all[7]) // each connection prolongs it
		}
		time.Sleep(time.Minute)
		first := map[netip.AddrPort]bool{}
		for range 100 {
			first[v.order()[0]] = true
		}
		if len(first) < 10 {
			t.Errorf("after its time only %d endpoints come first", len(first))
		}
		v.used(all[7])
		v.set(all[50:], time.Minute)
		if slices.Contains(v.order(), all[7]) {
			t.Error("an endpoint that is gone is tried")
		}
	})
}

// BenchmarkTCP is what a byte costs on its way to an endpoint and back.
func BenchmarkTCP(b *testing.B) {
	const chunk = 1 << 20
	t := newBench(b, nil)
	t.serve("[fd00::1]:80")
	t.Changed(nil, service(forwarding.TCP, "[fd00::1]:80"))
	c, r, _ := t.greeted()
	if err := c.SetDeadline(time.Time{}); err != nil {
		b.Fatal(err)
	}
	data := make([]byte, chunk)
	b.SetBytes(chunk)
	var before, after syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &before)
	for b.Loop() {
		go func() { _, _ = c.Write(data) }()
		if _, err := io.CopyN(io.Discard, r, chunk); err != nil {
			b.Fatal(err)
		}
	}
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &after)
	cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	b.ReportMetric(cpu.Seconds()*float64(1<<30)/float64(b.N)/chunk, "cpu-s/GiB")
}
