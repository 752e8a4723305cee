package localhost

import (
	"container/list"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const maxDatagram = 64 << 10

// flow is a UDP client's way to an endpoint.
type flow struct {
	flowKey
	endpoint netip.AddrPort
	conn     *net.UDPConn

	// These belong to the mutex of flows.
	last time.Time
	at   *list.Element // nil once it has ended
}

type flowKey struct {
	port   *port
	client netip.AddrPort
}

// flows are all UDP flows there are.
type flows struct {
	limits limits

	mu  sync.Mutex
	all map[flowKey]*flow
	// byUse has all flows, those used last in front.
	byUse list.List
}

// use gives a client's flow, as one that is used just now, or nil.
func (f *flows) use(key flowKey) *flow {
	f.mu.Lock()
	defer f.mu.Unlock()
	fl := f.all[key]
	if fl != nil {
		f.touch(fl)
	}
	return fl
}

// used takes note that a flow is used just now.
func (f *flows) used(fl *flow) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if fl.at != nil {
		f.touch(fl)
	}
}

func (f *flows) touch(fl *flow) {
	fl.last = time.Now()
	f.byUse.MoveToFront(fl.at)
}

// add makes a flow one of those there are; the one idle longest makes room if there are too many.
func (f *flows) add(fl *flow) (full bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if full = len(f.all) >= f.limits.flows; full {
		f.remove(f.byUse.Back().Value.(*flow))
	}
	f.all[fl.flowKey], fl.last, fl.at = fl, time.Now(), f.byUse.PushFront(fl)
	return full
}

// end ends a flow.
func (f *flows) end(fl *flow) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.remove(fl)
}

// expired says until when a flow may wait for another datagram, and ends it if that is over.
func (f *flows) expired(fl *flow) (until time.Time, over bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	until = fl.last.Add(f.limits.idle)
	if over = fl.at == nil || !time.Now().Before(until); over {
		f.remove(fl)
	}
	return until, over
}

// keep ends the flows of a port to other endpoints than these.
func (f *flows) keep(v *port, endpoints []netip.AddrPort) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, fl := range f.all {
		if fl.port == v && !slices.Contains(endpoints, fl.endpoint) {
			f.remove(fl)
		}
	}
}

func (f *flows) remove(fl *flow) {
	if fl.at == nil {
		return
	}
	f.byUse.Remove(fl.at)
	fl.at = nil
	delete(f.all, fl.flowKey)
	_ = fl.conn.Close() // what is under way may be lost, as with every datagram
}

// receiveAll serves a port until its socket is closed.
func (p *Proxy) receiveAll(v *port, socket *net.UDPConn) {
	buf := make([]byte, maxDatagram)
	for {
		n, client, err := socket.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // of an answer that the client did not want: it says nothing about the socket
		}
		key := flowKey{v, client}
		// An endpoint's refusal shows at the next datagram: that one takes another way.
		for range 2 {
			fl := p.flows.use(key)
			if fl == nil {
				fl = p.open(key, socket)
			}
			if fl == nil {
				break
			}
			if _, err := fl.conn.Write(buf[:n]); err == nil {
				break
			}
			p.flows.end(fl)
		}
	}
}

// open makes a flow to one of the port's endpoints, or gives nil if that is not possible.
func (p *Proxy) open(key flowKey, socket *net.UDPConn) *flow {
	order := key.port.targets.order()
	if len(order) == 0 {
		return nil
	}
	fl := &flow{flowKey: key, endpoint: order[0]}
	err := p.host.do(func() (err error) {
		fl.conn, err = net.DialUDP("udp6", nil, net.UDPAddrFromAddrPort(fl.endpoint))
		return err
	})
	if err != nil {
		p.trouble("flow "+key.port.service.String(), err, "A datagram to a node port at ::1 cannot be forwarded", "service", key.port.service.String())
		return nil
	}
	key.port.targets.used(fl.endpoint)
	if p.flows.add(fl) {
		p.trouble("flows", errFull, "Ended the UDP flow to a node port at ::1 that was idle longest, to make room", "limit", p.limits.flows)
	}
	p.running.Go(func() { p.answer(fl, socket) })
	if !key.port.targets.has(fl.endpoint) {
		p.flows.end(fl) // it went away before those who end such flows could see this one
		return nil
	}
	return fl
}

// answer carries an endpoint's datagrams to the client until the flow ends.
func (p *Proxy) answer(fl *flow, socket *net.UDPConn) {
	defer p.flows.end(fl)
	raw, err := fl.conn.SyscallConn()
	if err != nil {
		return // it has ended
	}
	for {
		until, over := p.flows.expired(fl)
		if over || fl.conn.SetReadDeadline(until) != nil {
			return
		}
		var failed error
		err := raw.Read(func(fd uintptr) bool {
			failed = p.passBack(fl, int(fd), socket)
			return !errors.Is(failed, unix.EAGAIN)
		})
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue // the client may have used it since
		case err != nil, failed != nil && !errors.Is(failed, unix.EINTR):
			return // refused, or it has ended
		}
	}
}

var buffers = sync.Pool{New: func() any { return new([maxDatagram]byte) }}

// passBack carries one datagram, if there is one. Flows that wait hold no buffer, because there may be thousands.
func (p *Proxy) passBack(fl *flow, fd int, socket *net.UDPConn) error {
	buf := buffers.Get().(*[maxDatagram]byte)
	defer buffers.Put(buf)
	n, _, err := unix.Recvfrom(fd, buf[:], unix.MSG_DONTWAIT)
	if err != nil {
		return err
	}
	p.flows.used(fl)
	_, _ = socket.WriteToUDPAddrPort(buf[:n], fl.client) // a client that is gone wants no answer
	return nil
}
