package localhost

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// retryAccept is how long a listener rests after it could not accept, which is when descriptors have run out.
const retryAccept = 100 * time.Millisecond

var errFull = errors.New("too many connections")

// acceptAll serves a port until its listener is closed.
func (p *Proxy) acceptAll(v *port, listener *net.TCPListener) {
	for {
		client, err := listener.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			p.trouble("accept", err, "Cannot accept connections to node ports at ::1; trying again", "address", listener.Addr().String())
			select {
			case <-p.ctx.Done():
			case <-time.After(retryAccept):
			}
			continue
		}
		select {
		case p.connections <- struct{}{}:
			p.running.Go(func() {
				defer func() { <-p.connections }()
				p.forward(v, client)
			})
		default:
			p.trouble("full", errFull, "Refused a connection to a node port at ::1; others must end first", "service", v.service.String(), "limit", p.limits.connections)
			reset(client)
		}
	}
}

// forward connects a client to an endpoint and returns when both are through, or the Proxy ends.
func (p *Proxy) forward(v *port, client *net.TCPConn) {
	endpoint, err := p.connect(v)
	if err != nil {
		p.trouble("connect "+v.service.String(), err, "No endpoint accepted a connection to a node port at ::1", "service", v.service.String())
		reset(client)
		return
	}
	cut := context.AfterFunc(p.ctx, func() { reset(client); reset(endpoint) })
	defer cut()
	var other sync.WaitGroup
	other.Go(func() { stream(endpoint, client) })
	stream(client, endpoint)
	other.Wait()
	// Both ways ended in order, or the connections are reset already.
	_, _ = client.Close(), endpoint.Close()
}

// connect tries one endpoint after the other.
func (p *Proxy) connect(v *port) (*net.TCPConn, error) {
	order := v.targets.order()
	var failed []error
	for _, to := range order[:min(len(order), connectTries)] {
		var conn net.Conn
		dialer := net.Dialer{Timeout: connectTimeout}
		if err := p.host.do(func() (err error) { conn, err = dialer.DialContext(p.ctx, "tcp6", to.String()); return err }); err != nil {
			failed = append(failed, err)
			continue
		}
		v.targets.used(to)
		return conn.(*net.TCPConn), nil
	}
	if len(failed) == 0 {
		failed = append(failed, fmt.Errorf("the Service has no endpoint any more"))
	}
	return nil, errors.Join(failed...)
}

// stream carries one direction, its end included; the other may go on. Between two *net.TCPConn io.Copy splices: the data never comes to this process.
func stream(to, from *net.TCPConn) {
	if _, err := io.Copy(to, from); err != nil {
		reset(to)
		reset(from)
		return
	}
	_ = to.CloseWrite() // fails if that side is gone, which the other direction notices
}

// reset ends a connection so that the other side sees that something went wrong, not a proper end.
func reset(c *net.TCPConn) {
	_, _ = c.SetLinger(0), c.Close()
}
