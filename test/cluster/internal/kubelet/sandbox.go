package kubelet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/echo"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/fabric"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// sandbox is what a running Pod consists of: a namespace, a wire to the node and a server. A Pod with hostNetwork has the node's
// namespace and addresses.
type sandbox struct {
	uid       types.UID
	ns        *netns.NS
	addresses []netip.Addr
	server    *echo.Server

	host  int    // number in the node's ranges; 0: hostNetwork
	iface string // the node's end of the wire

	stopping bool
	exited   chan struct{} // closed when the server has ended after stop
	cancel   context.CancelFunc
}

// newSandbox makes a Pod's sandbox. The caller serialises the calls: they share the ipam.
func newSandbox(pod *corev1.Pod, node Node, pool *ipam) (_ *sandbox, err error) {
	ports, err := ports(pod)
	if err != nil {
		return nil, err
	}
	s := &sandbox{uid: pod.UID, ns: node.NS, addresses: node.Addresses, exited: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close(node, pool))
		}
	}()
	if !pod.Spec.HostNetwork {
		if s.host, s.addresses, err = pool.take(); err != nil {
			return nil, err
		}
		s.iface = fmt.Sprintf("pod%d", s.host)
		s.ns, err = fabric.NewPod(node.NS, fabric.PodLink{Interface: s.iface, Addresses: s.addresses, Gateways: pool.gateways()})
		if err != nil {
			return nil, err
		}
	}
	who := echo.Identity{Namespace: pod.Namespace, Pod: pod.Name, Node: node.Name}
	s.server, err = echo.Serve(s.ns, who, s.addresses, ports)
	return s, err
}

// stop lets the server end as a well-behaved program does after SIGTERM: it goes on for as long as the Pod's preStop hook sleeps,
// then refuses new connections and lets the open ones finish, until the grace period is over. finished is called at the end.
func (s *sandbox) stop(pod *corev1.Pod, finished func()) {
	if s.stopping {
		return
	}
	s.stopping = true
	ctx, cancel := context.WithDeadline(context.Background(), pod.DeletionTimestamp.Time)
	s.cancel = cancel
	go func() {
		defer cancel()
		defer finished()
		defer close(s.exited)
		if linger := preStop(pod); linger > 0 {
			select {
			case <-time.After(linger):
			case <-ctx.Done():
			}
		}
		select {
		case <-s.server.Refuse():
		case <-ctx.Done():
		}
		s.server.Close()
	}()
}

// hasExited tells whether the server has ended after stop.
func (s *sandbox) hasExited() bool {
	select {
	case <-s.exited:
		return true
	default:
		return false
	}
}

// close removes everything at once, stopped or not.
func (s *sandbox) close(node Node, pool *ipam) error {
	if s.cancel != nil {
		s.cancel()
	}
	if s.server != nil {
		s.server.Close()
	}
	if s.host == 0 {
		return nil
	}
	// The wire is removed explicitly, because with the namespace alone it would go some time later, and its name is needed again.
	err := fabric.Unwire(node.NS, s.iface)
	if s.ns != nil {
		err = errors.Join(err, s.ns.Close())
	}
	pool.release(s.host)
	return err
}

// ports are the Pod's container ports, each once.
func ports(pod *corev1.Pod) ([]echo.Port, error) {
	var ps []echo.Port
	for _, c := range pod.Spec.Containers {
		for _, p := range c.Ports {
			if p.Protocol == corev1.ProtocolSCTP {
				return nil, fmt.Errorf("container %s: port %d: this cluster's pods speak TCP and UDP, not SCTP", c.Name, p.ContainerPort)
			}
			port := echo.Port{Network: strings.ToLower(string(p.Protocol)), Number: uint16(p.ContainerPort)}
			if !slices.Contains(ps, port) {
				ps = append(ps, port)
			}
		}
	}
	return ps, nil
}

// preStop is how long the Pod's preStop hooks sleep; other hooks than sleep take no time.
func preStop(pod *corev1.Pod) time.Duration {
	var longest int64
	for _, c := range pod.Spec.Containers {
		if c.Lifecycle != nil && c.Lifecycle.PreStop != nil && c.Lifecycle.PreStop.Sleep != nil {
			longest = max(longest, c.Lifecycle.PreStop.Sleep.Seconds)
		}
	}
	return time.Duration(longest) * time.Second
}
