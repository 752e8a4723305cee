// Package localhost lets the node's own programs reach node ports at loopback addresses, for those Services whose node-port addresses say so.
//
// At 127.0.0.1 the kernel does it, once it is allowed to route loopback addresses (route_localnet). For IPv6 there is no such thing: what is translated from ::1
// to an endpoint finds no way back. So this package listens at [::1]:nodePort and connects to the endpoints itself, TCP without copying through this process
// (splice), UDP by a flow per client. SCTP is not served at ::1.
//
// As for every node port, endpoints see an address of the node. Unlike what the kernel forwards, connections end with this process.
package localhost

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/go-logr/logr"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/loopback"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// limits are what a Proxy keeps to.
type limits struct {
	// connections is how many TCP connections there may be at a time. Each takes six file descriptors: two sockets, and a pipe each way.
	connections int
	// flows is how many UDP flows there may be at a time; those idle longest make room.
	flows int
	// idle is how long a UDP flow lasts without a datagram either way.
	idle time.Duration
	// retryListen is how long a port that is in use is left alone before it is tried again.
	retryListen time.Duration
}

// The idle time is connection tracking's.
var usual = limits{connections: 2048, flows: 4096, idle: 2 * time.Minute, retryListen: 5 * time.Second}

const (
	// connectTimeout is how long one endpoint may take to accept a connection; connectTries is how many are asked.
	connectTimeout = 3 * time.Second
	connectTries   = 4
	// rest is how long it takes until the same trouble is logged again, or run into again if only that shows that it is over.
	rest = time.Minute
)

var address = netip.IPv6Loopback()

// Host is the node as its own programs see it.
type Host struct {
	// Do calls f in the node's network namespace. nil: this process is in it.
	Do func(f func() error) error
	// Route lets the kernel route loopback addresses, without letting in the node's neighbours, and says whether it did not before (loopback.Route).
	Route func() (raised bool, err error)
}

func (h Host) do(f func() error) error {
	if h.Do == nil {
		return f()
	}
	return h.Do(f)
}

// Proxy serves node ports at loopback. Its methods may be called concurrently.
type Proxy struct {
	log     logr.Logger
	host    Host
	limits  limits
	ctx     context.Context // ends with Close
	end     context.CancelFunc
	running sync.WaitGroup

	connections chan struct{} // a slot for each
	flows       flows

	mu     sync.Mutex
	routed bool // the kernel routes loopback addresses
	// routeAfter is when it may be tried again to have it do that.
	routeAfter time.Time
	ports      map[portKey]*port
	logged     map[string]time.Time // when each kind of trouble was logged last
}

// portKey is what is listened at.
type portKey struct {
	protocol forwarding.Protocol
	number   uint16
}

// port is a node port at ::1.
type port struct {
	key     portKey
	service forwarding.ServiceKey
	targets targets

	// These belong to the Proxy's mutex.
	closed   bool
	listener interface{ Close() error } // nil while the port is in use by something else
	retry    *time.Timer
}

// New makes a Proxy that serves nothing yet.
func New(log logr.Logger, host Host) *Proxy { return newProxy(log, host, usual) }

func newProxy(log logr.Logger, host Host, l limits) *Proxy {
	p := &Proxy{log: log, host: host, limits: l, connections: make(chan struct{}, l.connections), flows: flows{limits: l, all: map[flowKey]*flow{}}, ports: map[portKey]*port{}, logged: map[string]time.Time{}}
	p.ctx, p.end = context.WithCancel(context.Background())
	return p
}

// Changed takes note that the kernel holds next in the place of prev; either may be nil. It does not wait for anything. Connections that are open go on; UDP
// flows to endpoints that are gone end.
func (p *Proxy) Changed(prev, next *forwarding.Service) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil {
		return
	}
	var key portKey
	var endpoints []netip.AddrPort
	if next != nil {
		if servedAt(next, netip.AddrFrom4([4]byte{127, 0, 0, 1})) {
			p.route()
		}
		key, endpoints = p.wanted(next)
	}
	if prev != nil {
		if old := (portKey{prev.Key.Protocol, prev.NodePort}); old != key || len(endpoints) == 0 {
			p.stop(old, prev.Key)
		}
	}
	if next == nil {
		return
	}
	if len(endpoints) == 0 {
		p.stop(portKey{next.Key.Protocol, next.NodePort}, next.Key)
		return
	}
	v := p.ports[key]
	if v == nil || v.service != next.Key {
		if v != nil {
			p.stop(key, v.service) // it has changed hands; that the other lost it may be told later
		}
		v = &port{key: key, service: next.Key}
		p.ports[key] = v
	}
	v.targets.set(endpoints, next.Affinity)
	p.flows.keep(v, endpoints)
	if v.listener == nil && v.retry == nil {
		p.listen(v)
	}
}

// wanted gives where a service is to be served at ::1 and where to; nowhere without endpoints, so that connections are refused. Callers hold mu.
func (p *Proxy) wanted(s *forwarding.Service) (portKey, []netip.AddrPort) {
	if !servedAt(s, address) {
		return portKey{}, nil
	}
	var endpoints []netip.AddrPort
	for _, e := range s.ExternalFromHere.Endpoints {
		if e.AddrPort.Addr().Is6() {
			endpoints = append(endpoints, e.AddrPort)
		}
	}
	if s.Key.Protocol == forwarding.SCTP && len(endpoints) > 0 {
		p.complain("SCTP", nil, "SCTP node ports are not served at ::1, only at 127.0.0.1 and the node's other addresses", "service", s.Key.String())
		return portKey{}, nil
	}
	return portKey{s.Key.Protocol, s.NodePort}, endpoints
}

// servedAt says whether a service's node port is served at a loopback address.
func servedAt(s *forwarding.Service, a netip.Addr) bool {
	return s.NodePort != 0 && forwarding.NodePortAt(s.NodePortAddresses, a)
}

// route lets the kernel translate connections to 127.0.0.0/8. It is not taken back as long as the agent is on the node: that would cut connections, and others
// may rely on it by now. Callers hold mu.
func (p *Proxy) route() {
	now := time.Now()
	if p.routed || now.Before(p.routeAfter) {
		return
	}
	p.routeAfter = now.Add(rest)
	var raised bool
	err := p.host.do(func() (err error) { raised, err = p.host.Route(); return err })
	if err != nil {
		p.complain("route", err, "Node ports are not served at 127.0.0.1: the kernel may not route loopback addresses; set the parameter, or let the agent", "sysctl", loopback.Parameter.String())
		return
	}
	p.routed = true
	if raised {
		p.log.Info("Allowed the kernel to route loopback addresses, for node ports at 127.0.0.1", "sysctl", loopback.Parameter.String())
	}
}

// listen serves a port, or sees to it that it is tried again. Callers hold mu.
func (p *Proxy) listen(v *port) {
	v.retry = nil
	at := netip.AddrPortFrom(address, v.key.number)
	var serve func()
	err := p.host.do(func() error {
		if v.key.protocol == forwarding.TCP {
			l, err := net.ListenTCP("tcp6", net.TCPAddrFromAddrPort(at))
			if err == nil {
				v.listener, serve = l, func() { p.acceptAll(v, l) }
			}
			return err
		}
		c, err := net.ListenUDP("udp6", net.UDPAddrFromAddrPort(at))
		if err == nil {
			v.listener, serve = c, func() { p.receiveAll(v, c) }
		}
		return err
	})
	if err != nil {
		p.complain("listen "+v.service.String(), err, "A node port cannot be served at ::1; trying again",
			"service", v.service.String(), "address", at.String(), "protocol", v.key.protocol.String(), "every", p.limits.retryListen)
		v.retry = time.AfterFunc(p.limits.retryListen, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			if !v.closed {
				p.listen(v)
			}
		})
		return
	}
	p.running.Go(serve)
}

// stop ends listening at a port if it is the service's. Callers hold mu.
func (p *Proxy) stop(key portKey, service forwarding.ServiceKey) {
	v := p.ports[key]
	if v == nil || v.service != service {
		return
	}
	delete(p.ports, key)
	v.closed = true
	if v.retry != nil {
		v.retry.Stop()
	}
	if v.listener != nil {
		_ = v.listener.Close() // nothing is lost: it only listened
	}
	v.targets.set(nil, 0)
	p.flows.keep(v, nil)
}

// Close ends everything, open connections too, and returns when it has.
func (p *Proxy) Close() {
	p.mu.Lock()
	p.end()
	for key, v := range p.ports {
		p.stop(key, v.service)
	}
	p.mu.Unlock()
	p.running.Wait()
}

// complain logs a kind of trouble unless it did lately: with an error as one, without as information. Callers hold mu.
func (p *Proxy) complain(kind string, err error, message string, keysAndValues ...any) {
	now := time.Now()
	if last, ok := p.logged[kind]; ok && now.Sub(last) < rest {
		return
	}
	maps.DeleteFunc(p.logged, func(_ string, last time.Time) bool { return now.Sub(last) >= rest }) // of Services that may be gone by now
	p.logged[kind] = now
	if err == nil {
		p.log.Info(message, keysAndValues...)
		return
	}
	p.log.Error(err, message, keysAndValues...)
}

// trouble is complain for those who do not hold mu.
func (p *Proxy) trouble(kind string, err error, message string, keysAndValues ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
		p.complain(kind, err, message, keysAndValues...)
	}
}

// targets are the endpoints of a port, and which of them its clients are pinned to. All clients have one address, so one pin is all of affinity.
type targets struct {
	mu        sync.Mutex
	endpoints []netip.AddrPort
	affinity  time.Duration
	pin       netip.AddrPort
	until     time.Time
}

func (t *targets) set(endpoints []netip.AddrPort, affinity time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.endpoints, t.affinity = endpoints, affinity
}

func (t *targets) has(endpoint netip.AddrPort) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Contains(t.endpoints, endpoint)
}

// order gives the endpoints in the order in which they are to be tried for a new connection.
func (t *targets) order() []netip.AddrPort {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := slices.Clone(t.endpoints)
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	if t.affinity > 0 && time.Now().Before(t.until) {
		if i := slices.Index(out, t.pin); i > 0 {
			out[0], out[i] = out[i], out[0]
		}
	}
	return out
}

// used takes note of where a new connection went.
func (t *targets) used(endpoint netip.AddrPort) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pin, t.until = endpoint, time.Now().Add(t.affinity)
}
