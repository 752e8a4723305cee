package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/echo"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// callTimeout bounds a Call whose context has no deadline.
const callTimeout = 3 * time.Second

// Answer is what a pod says when called: who it is, whom it saw asking, and at which address.
type Answer = echo.Answer

// Dial opens a TCP or UDP connection from a namespace, be it a pod's, a node's or the outside host's.
func Dial(ctx context.Context, from *netns.NS, network string, to netip.AddrPort) (net.Conn, error) {
	var conn net.Conn
	err := from.Do(func() (err error) {
		// The address is not a name, so the socket is made right here, on the thread that is in the namespace.
		var d net.Dialer
		d.SetMultipathTCP(false)
		conn, err = d.DialContext(ctx, network, to.String())
		return err
	})
	return conn, err
}

// Call opens a connection from a namespace, asks once, and gives the answer. Without a deadline it gives up after 3 seconds.
func Call(ctx context.Context, from *netns.NS, network string, to netip.AddrPort) (Answer, error) {
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	conn, err := Dial(ctx, from, network, to)
	if err != nil {
		return Answer{}, err
	}
	defer conn.Close()
	return Ask(ctx, conn)
}

// Ask asks over an open connection to a pod, by the context's deadline, and gives the answer.
func Ask(ctx context.Context, conn net.Conn) (Answer, error) {
	deadline, _ := ctx.Deadline() // zero: none
	if err := conn.SetDeadline(deadline); err != nil {
		return Answer{}, err
	}
	if _, err := conn.Write([]byte("who are you?\n")); err != nil {
		return Answer{}, err
	}
	line, err := bufio.NewReader(conn).ReadBytes('\n')
	if err != nil {
		return Answer{}, fmt.Errorf("read the answer: %w", err)
	}
	var a Answer
	if err := json.Unmarshal(line, &a); err != nil {
		return Answer{}, fmt.Errorf("not an answer of a pod: %q: %w", line, err)
	}
	return a, nil
}
