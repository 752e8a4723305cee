package backendtest

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// frontends are all kinds of addresses at which web is reached.
var frontends = []string{toServiceIP, toExternalIP, toLoadBalancerIP, toNodePort}

// flows are the promises about connections that are open while something changes.
var flows = []Scenario{
	{"open connections outlive changes of other Services", func(l *Lab) {
		s := web(at("a", "b", "r"), nil)
		l.Program(s)
		open := l.openFlows("c node outside", "tcp", "udp")
		open.during(func() {
			for n := range 4 {
				l.Program(s, another(n, at("a", "b")))
				l.Program(s, another(n, at("b", "r")), another(n+1, nil))
				l.Program(s)
			}
		})
	}},
	{"open connections outlive endpoints that come and go beside theirs", func(l *Lab) {
		l.Program(web(at("a", "r"), nil))
		open := l.openFlows("c node outside", "tcp", "udp")
		open.during(func() {
			for _, n := range []int{1, 0, 3, 9, 20, 6, 2, 0} {
				l.Program(web(append(at("a", "r"), at(replicasOf("b", n)...)...), nil))
			}
		})
	}},
	{"open connections outlive edits of their Service", func(l *Lab) {
		l.Program(web(at("a", "b", "r"), nil))
		open := l.openFlows("c node outside", "tcp", "udp")
		open.during(func() {
			for _, edit := range []func(*spec){
				externalLocal,
				internalLocal,
				func(s *spec) { externalLocal(s); internalLocal(s) },
				clientIP(3600),
				func(s *spec) { s.LoadBalancerSourceRanges = []string{"203.0.113.0/24", "2001:db8:113::/64"} },
				func(s *spec) { s.Ports = append(s.Ports, otherPort(81, 30081)) },
				nil,
			} {
				l.Program(web(at("a", "b", "r"), edit))
			}
		})
	}},
	{"open connections outlive a restart of the proxy", func(l *Lab) {
		l.Program(web(at("a", "b", "r"), nil), another(0, at("a")))
		open := l.openFlows("c node outside", "tcp", "udp")
		open.during(func() {
			l.Restart()
			l.Restart()
		})
	}},
	{"rules that something else takes away come back, and open connections outlive it", func(l *Lab) {
		breaker := l.breaker()
		l.Program(web(at("a", "b", "r"), nil), another(0, at("a")))
		open := l.openFlows("c node outside", "tcp", "udp")
		if err := breaker.Break(); err != nil {
			l.Fatal(err)
		}
		open.check()
		for _, to := range frontends {
			l.Expect("c node outside", to, "a b r")
		}
	}},
	{"open TCP connections outlive the removal of the last Service", func(l *Lab) {
		l.Program(web(at("a", "b", "r"), nil))
		open := l.openFlows("c node outside", "tcp")
		open.during(func() {
			l.Program()
			l.Restart()
		})
		l.Program(web(at("b"), nil))
		open.check()
	}},
	{"open TCP connections to an endpoint that terminates or is removed are left alone", func(l *Lab) {
		l.Program(web(at("a", "r"), nil))
		open := l.openFlows("c node outside", "tcp")
		open.during(func() {
			for _, end := range [][]Endpoint{
				{{Place: "a", NotReady: true, Serving: true, Terminating: true}, {Place: "b"}},
				{{Place: "a", NotReady: true, Terminating: true}, {Place: "b"}},
				at("b"),
				nil,
			} {
				l.Program(web(end, nil))
			}
		})
	}},
}

func internalLocal(s *spec) { s.InternalTrafficPolicy = corev1.ServiceInternalTrafficPolicyLocal }

// openFlow is a TCP connection or a UDP conversation of a place with an endpoint.
type openFlow struct {
	name   string
	conn   net.Conn
	reader *bufio.Reader // of a TCP connection
	server string
}

// dialFlow connects from a place to what is described by to.
func (l *Lab) dialFlow(network, from, to string, family int, at netip.AddrPort) (*openFlow, error) {
	f := &openFlow{name: fmt.Sprintf("%s from %s to the %s %s", network, from, to, at)}
	var err error
	if f.conn, err = dial(l.space(from), network, find(from).addrs[family], at, patience); err != nil {
		return nil, fmt.Errorf("%s: %w", f.name, err)
	}
	l.Cleanup(func() { f.conn.Close() })
	if network == "tcp" {
		f.reader = bufio.NewReader(f.conn)
	}
	return f, nil
}

// openFlowTo connects, and learns who serves.
func (l *Lab) openFlowTo(network, from, to string, family int, at netip.AddrPort) *openFlow {
	l.Helper()
	f, err := l.dialFlow(network, from, to, family, at)
	if err == nil {
		f.server, err = f.greeting(patience)
		err = f.wrap(err)
	}
	if err != nil {
		l.Fatal(err)
	}
	return f
}

// greeting gives who serves: a TCP server says so at once, a UDP server to every datagram.
func (f *openFlow) greeting(wait time.Duration) (string, error) {
	if f.reader == nil {
		got, err := read(f.conn, "udp", wait)
		return got.server, err
	}
	if err := f.conn.SetDeadline(time.Now().Add(wait)); err != nil {
		return "", err
	}
	line, err := f.reader.ReadString(' ')
	if err != nil {
		return "", err
	}
	_, err = f.reader.ReadString('\n')
	return line[:len(line)-1], err
}

// check sends and receives, and verifies that it is still the same server that answers, and over TCP that it answers the same data.
func (f *openFlow) check() error {
	if f.reader == nil {
		server, err := f.greeting(patience)
		if err == nil && server != f.server {
			err = fmt.Errorf("moved to %s", server)
		}
		return f.wrap(err)
	}
	if err := f.conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return f.wrap(err)
	}
	sent := make([]byte, 3000) // two segments
	rand.Read(sent)            // never fails
	if _, err := f.conn.Write(sent); err != nil {
		return f.wrap(err)
	}
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(f.reader, got); err != nil {
		return f.wrap(err)
	}
	if !bytes.Equal(sent, got) {
		return f.wrap(errors.New("its data came back changed"))
	}
	return nil
}

func (f *openFlow) wrap(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s at %s: %w", f.name, f.server, err)
}

// openFlows are the flows of a scenario.
type openFlows struct {
	*Lab
	all []*openFlow
}

// openFlows opens connections from places (separated by blanks) to each kind of address in both families, several each so that every endpoint has some.
func (l *Lab) openFlows(from string, networks ...string) openFlows {
	l.Helper()
	const each = 3
	open := openFlows{Lab: l}
	for _, to := range frontends {
		for family := range 2 {
			for _, network := range networks {
				for _, place := range strings.Fields(from) {
					for range each {
						open.add(l.openFlowTo(network, place, to, family, destination(to, family)))
					}
				}
			}
		}
	}
	return open
}

func (o *openFlows) add(f *openFlow) { o.all = append(o.all, f) }

// during keeps data going over all flows while change runs and once more after it, and reports the flows that fail.
func (o openFlows) during(change func()) {
	o.Helper()
	const pause = 100 * time.Millisecond
	var running sync.WaitGroup
	stop := make(chan struct{})
	for _, f := range o.all {
		running.Go(func() {
			for ticker := time.NewTicker(pause); ; {
				if err := f.check(); err != nil {
					o.Error(err)
					return
				}
				select {
				case <-stop:
					ticker.Stop()
					return
				case <-ticker.C:
				}
			}
		})
	}
	func() {
		defer running.Wait()
		defer close(stop)
		change()
	}()
	if !o.Failed() {
		o.check()
	}
}

// check sends data over all flows once.
func (o openFlows) check() {
	o.Helper()
	for _, f := range o.all {
		if err := f.check(); err != nil {
			o.Error(err)
		}
	}
}
