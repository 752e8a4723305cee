// Package relay stands between a client and the processes that serve it, as a Service of Kubernetes does, so that a test can take one of them away.
package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// Relay carries TCP connections from one loopback address to its targets in turn. A target that refuses a connection is passed over; one that
// does not answer is not, because only a probe can tell that from slowness: see Target.SetReady.
type Relay struct {
	listener net.Listener
	targets  []*Target
	turn     atomic.Uint64
	wg       sync.WaitGroup
	ctx      context.Context // its end closes every connection
	cancel   context.CancelFunc
}

// Target is one process behind a relay.
type Target struct {
	address string
	unready atomic.Bool
	carried atomic.Int64

	mu   sync.Mutex
	open chan struct{} // closed while bytes pass
}

// New listens at a free port of the loopback address. Nobody needs to serve at the targets yet.
func New(targets ...string) (*Relay, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return On(listener, targets...), nil
}

// On carries what a listener accepts, which may be in another network namespace than the targets: they are dialled from this process's own. Close closes the
// listener.
func On(listener net.Listener, targets ...string) *Relay {
	r := &Relay{listener: listener}
	for _, address := range targets {
		open := make(chan struct{})
		close(open)
		r.targets = append(r.targets, &Target{address: address, open: open})
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.wg.Go(r.accept)
	return r
}

// Address is HOST:PORT, where clients connect to.
func (r *Relay) Address() string { return r.listener.Addr().String() }

// Target is the i-th of those that New was given.
func (r *Relay) Target(i int) *Target { return r.targets[i] }

// Close ends all connections.
func (r *Relay) Close() error {
	r.cancel()
	err := r.listener.Close()
	r.wg.Wait()
	return err
}

// SetReady says whether the target gets new connections, as a readiness probe would. Those that it has stay.
func (t *Target) SetReady(ready bool) { t.unready.Store(!ready) }

// Carried is how many connections were made to the target.
func (t *Target) Carried() int64 { return t.carried.Load() }

// Hold cuts the target off, as a broken network does: nothing arrives on either side, not even that the other side has hung up.
func (t *Target) Hold() {
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-t.open:
		t.open = make(chan struct{})
	default: // it is held already
	}
}

// Resume heals what Hold broke. What was sent meanwhile arrives now, as it does with TCP.
func (t *Target) Resume() {
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-t.open:
	default:
		close(t.open)
	}
}

// passable waits until bytes pass. It says false if the relay was closed first.
func (t *Target) passable(ctx context.Context) bool {
	t.mu.Lock()
	open := t.open
	t.mu.Unlock()
	select {
	case <-open:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

func (r *Relay) accept() {
	for {
		conn, err := r.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			r.wg.Go(func() { r.serve(conn) })
		}
	}
}

// serve carries one connection to the target whose turn it is, or to the next that takes it. If none does, the client sees it end.
func (r *Relay) serve(near net.Conn) {
	defer near.Close()
	first := r.turn.Add(1)
	for i := range uint64(len(r.targets)) {
		t := r.targets[(first+i)%uint64(len(r.targets))]
		if t.unready.Load() {
			continue
		}
		if !t.passable(r.ctx) {
			return
		}
		far, err := (&net.Dialer{}).DialContext(r.ctx, "tcp", t.address)
		if err != nil {
			continue
		}
		t.carried.Add(1)
		r.carry(t, near, far)
		return
	}
}

func (r *Relay) carry(t *Target, near, far net.Conn) {
	defer far.Close()
	stop := context.AfterFunc(r.ctx, func() { near.Close(); far.Close() })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { r.copy(t, far, near) })
	wg.Go(func() { r.copy(t, near, far) })
	wg.Wait()
}

// copy carries one direction. However it ends, the other side must learn of it; errors are the ends' own to see.
func (r *Relay) copy(t *Target, to, from net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if !t.passable(r.ctx) {
			return
		}
		if n > 0 {
			if _, writeErr := to.Write(buf[:n]); writeErr != nil {
				from.Close()
				return
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			to.(*net.TCPConn).CloseWrite() //nolint:errcheck // it may be closed already
			return
		case err != nil:
			to.Close()
			return
		}
	}
}
