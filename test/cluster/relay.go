package cluster

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// relayPort is where the API server is reached on a node's loopback address.
const relayPort = 6443

// relay carries connections from a node's loopback address to the API server on the machine's: a node is a network of its own and
// has no way there. While the API server is down, connections are accepted and closed at once.
type relay struct {
	listener net.Listener
	to       string
	wg       sync.WaitGroup
	ctx      context.Context // its end closes every connection
	cancel   context.CancelFunc
}

func newRelay(node *netns.NS, apiServerPort int) (*relay, error) {
	r := &relay{to: net.JoinHostPort("127.0.0.1", strconv.Itoa(apiServerPort))}
	err := node.Do(func() (err error) {
		r.listener, err = net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(relayPort)))
		return err
	})
	if err != nil {
		return nil, err
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.wg.Go(func() {
		for {
			conn, err := r.listener.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue
			}
			r.wg.Go(func() { r.carry(conn) })
		}
	})
	return r, nil
}

func (r *relay) carry(near net.Conn) {
	defer near.Close()
	var d net.Dialer
	far, err := d.DialContext(r.ctx, "tcp", r.to)
	if err != nil {
		return // the API server is down: the client sees the connection end
	}
	defer far.Close()
	stop := context.AfterFunc(r.ctx, func() { near.Close(); far.Close() })
	defer stop()
	var wg sync.WaitGroup
	for _, d := range []struct{ to, from net.Conn }{{far, near}, {near, far}} {
		wg.Go(func() {
			// However it ends, the other direction must learn of it; errors are the ends' own to see.
			io.Copy(d.to, d.from)            //nolint:errcheck // either side may end the connection
			d.to.(*net.TCPConn).CloseWrite() //nolint:errcheck // likewise
		})
	}
	wg.Wait()
}

func (r *relay) close() error {
	r.cancel()
	err := r.listener.Close()
	r.wg.Wait()
	return err
}
