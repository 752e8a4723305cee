package kubeproxy

import (
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"
)

// ports are where kube-proxy listens unless it is told otherwise: for health probes and for metrics.
var ports = []uint16{10256, 10249}

// answerTimeout is plenty for a connection that does not leave the node.
const answerTimeout = time.Second

// Answers says whether somebody who may be kube-proxy listens on this node. The listeners are this process's own, nil for none.
func Answers(own ...net.Listener) bool {
	return slices.ContainsFunc(ports, func(port uint16) bool {
		if slices.ContainsFunc(own, func(l net.Listener) bool { return portOf(l) == port }) {
			return false
		}
		c, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))), answerTimeout)
		if err != nil {
			return false
		}
		_ = c.Close() // it has said what was to be known
		return true
	})
}

func portOf(l net.Listener) uint16 {
	if l == nil {
		return 0
	}
	at, err := netip.ParseAddrPort(l.Addr().String())
	if err != nil {
		return 0 // no port at all
	}
	return at.Port()
}
