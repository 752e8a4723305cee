package backendtest

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// place is somewhere in the lab that sends and serves.
type place struct {
	addrs [2]netip.Addr // IPv4 and IPv6
	// here says that it is on the node under test.
	here bool
	// in is the node's interface by which its packets come.
	in string
}

// places of the lab. Pods a, b and c are on the node under test, q and r on another one.
//
//	outside 192.0.2.2 ─ 192.0.2.1 node 172.18.0.1 ─ 172.18.0.2 elsewhere ─ pods q 10.244.2.2, r 10.244.2.3
//	                               │
//	                               pods a 10.244.1.2, b 10.244.1.3, c 10.244.1.4
var places = map[string]place{
	"outside": {addrs: addrs("192.0.2.2", "2001:db8:1::2"), in: "outside"},
	"node":    {addrs: addrs("192.0.2.1", "2001:db8:1::1"), here: true},
	"a":       {addrs: addrs("10.244.1.2", "fd00:244:1::2"), here: true, in: "pod-a"},
	"b":       {addrs: addrs("10.244.1.3", "fd00:244:1::3"), here: true, in: "pod-b"},
	"c":       {addrs: addrs("10.244.1.4", "fd00:244:1::4"), here: true, in: "pod-c"},
	"q":       {addrs: addrs("10.244.2.2", "fd00:244:2::2"), in: "elsewhere"},
	"r":       {addrs: addrs("10.244.2.3", "fd00:244:2::3"), in: "elsewhere"},
}

// podNames are the pods, in the order in which they are made.
var podNames = []string{"a", "b", "c", "q", "r"}

// secondAddrs are addresses of the node besides its primary ones.
var secondAddrs = addrs("172.18.0.1", "fd00:18::1")

// linkAddrs are the node's on its links to pods.
var linkAddrs = addrs("169.254.1.1", "fe80::1")

// newAddrs are what Lab.addAddress gives the node.
var newAddrs = addrs("192.0.2.77", "2001:db8:1::4d")

var clusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/32")}

func addrs(v4, v6 string) [2]netip.Addr {
	return [2]netip.Addr{netip.MustParseAddr(v4), netip.MustParseAddr(v6)}
}

// Lab is a node with pods, another node with pods, and a client outside the cluster, each in a network namespace of its own.
type Lab struct {
	testing.TB
	subject Subject
	world   *World
	node    *netns.NS
	spaces  map[string]*netns.NS // by place
	// more are addresses that the node has at the moment besides those it always has.
	more *[]netip.Addr
}

// newLab makes a lab and starts the subject in it.
func newLab(t testing.TB, start Starter) *Lab {
	t.Helper()
	l := &Lab{TB: t, node: netns.NewT(t), world: &World{}, spaces: map[string]*netns.NS{}, more: &[]netip.Addr{}}
	l.spaces["node"] = l.node
	// Refusals of UDP are ICMP, of which the kernel otherwise sends one client a few a second.
	l.sh(l.node, `sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.default.accept_dad=0
		sysctl -qw net.ipv4.icmp_ratelimit=0 net.ipv4.icmp_msgs_per_sec=100000 net.ipv4.icmp_msgs_burst=100000 net.ipv6.icmp.ratelimit=0`)
	outside := l.neighbour("outside", "192.0.2.1/24", "192.0.2.2/24", "2001:db8:1::1/64", "2001:db8:1::2/64")
	l.spaces["outside"] = outside
	elsewhere := l.neighbour("elsewhere", "172.18.0.1/24", "172.18.0.2/24", "fd00:18::1/64", "fd00:18::2/64")
	l.sh(elsewhere, `sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.default.accept_dad=0`)
	l.sh(l.node, `ip route add 10.244.2.0/24 via 172.18.0.2; ip route add fd00:244:2::/64 via fd00:18::2
		ip route add default via 192.0.2.2; ip route add default via 2001:db8:1::2`)
	for _, name := range podNames {
		host := elsewhere
		if places[name].here {
			host = l.node
		}
		l.pod(host, name)
	}
	for name := range l.spaces {
		l.serve(name)
	}
	l.meet()
	subject, err := start(l.node)
	if err != nil {
		t.Fatal(err)
	}
	l.subject = subject
	t.Cleanup(func() {
		if err := subject.Close(); err != nil {
			t.Errorf("close the subject: %v", err)
		}
	})
	return l
}

// meet has every place know its neighbours, because a first packet takes longer than a refusal is waited for.
func (l *Lab) meet() {
	l.Helper()
	for from, ns := range l.spaces {
		for family, source := range places[from].addrs {
			for to, p := range places {
				_, err := ask(ns, "tcp", source, netip.AddrPortFrom(p.addrs[family], serverPort), patience)
				for deadline := time.Now().Add(5 * patience); err != nil && time.Now().Before(deadline); {
					_, err = ask(ns, "tcp", source, netip.AddrPortFrom(p.addrs[family], serverPort), patience)
				}
				if err != nil {
					l.Fatalf("the lab does not work: from %s to %s: %v", from, to, err)
				}
			}
		}
	}
}

// neighbour makes a namespace linked to the node, with the node as its router.
func (l *Lab) neighbour(name, here4, there4, here6, there6 string) *netns.NS {
	ns := netns.NewT(l)
	l.link(l.node, ns, name)
	router := func(s string) netip.Addr { return netip.MustParsePrefix(s).Addr() }
	l.sh(l.node, fmt.Sprintf(`ip addr add %s dev %s; ip addr add %s dev %s nodad`, here4, name, here6, name))
	l.sh(ns, fmt.Sprintf(`ip addr add %s dev eth0; ip addr add %s dev eth0 nodad; ip route add default via %s; ip route add default via %s`,
		there4, there6, router(here4), router(here6)))
	return ns
}

// pod makes a pod on a host: its addresses are routed to it, and it knows no neighbour but the host.
func (l *Lab) pod(host *netns.NS, name string) {
	ns := netns.NewT(l)
	l.link(host, ns, "pod-"+name)
	a := places[name].addrs
	l.sh(host, fmt.Sprintf(`ip addr add 169.254.1.1/32 dev pod-%[1]s; ip addr add fe80::1/64 dev pod-%[1]s nodad
		ip route add %[2]s dev pod-%[1]s; ip route add %[3]s dev pod-%[1]s`, name, a[0], a[1]))
	l.sh(ns, fmt.Sprintf(`sysctl -qw net.ipv6.conf.eth0.accept_dad=0; ip addr add %s/32 dev eth0; ip addr add %s/128 dev eth0 nodad
		ip route add 169.254.1.1 dev eth0; ip route add default via 169.254.1.1; ip route add default via fe80::1 dev eth0`, a[0], a[1]))
	l.spaces[name] = ns
}

// link joins two namespaces; the end in b is eth0.
func (l *Lab) link(a, b *netns.NS, name string) {
	l.sh(a, fmt.Sprintf("ip link add %s type veth peer name eth0 netns /proc/%d/fd/%d; ip link set %s up", name, os.Getpid(), b.Fd(), name))
	l.sh(b, "ip link set eth0 up")
}

func (l *Lab) sh(ns *netns.NS, script string) {
	l.Helper()
	if _, err := ns.Run("sh", "-ec", script); err != nil {
		l.Fatal(err)
	}
}

// Program makes the node forward these Services and no others.
func (l *Lab) Program(services ...*Service) {
	l.Helper()
	l.ProgramOn(labGround(), services...)
}

// ProgramOn is Program on another ground than the usual one.
func (l *Lab) ProgramOn(ground forwarding.Ground, services ...*Service) {
	l.Helper()
	l.ProgramWorld(World{Node: labNode(), Ground: ground, Services: services})
}

// ProgramWorld makes the node forward a world.
func (l *Lab) ProgramWorld(w World) {
	l.Helper()
	*l.world = w
	err := l.subject.Program(*l.world)
	if errors.Is(err, errors.ErrUnsupported) {
		l.Skipf("not applicable: %v", err)
	}
	if err != nil {
		l.Fatal(err)
	}
}

// Restart ends the subject as a crash would, and starts it again.
func (l *Lab) Restart() {
	l.Helper()
	if err := l.subject.Restart(); err != nil {
		l.Fatal(err)
	}
}

func labGround() forwarding.Ground {
	return forwarding.Ground{Pods: forwarding.PodTraffic{Sources: clusterCIDRs}}
}

// labNode is the Node object of the node under test, with other addresses than its own if there are any.
func labNode(others ...[2]netip.Addr) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName, Labels: map[string]string{corev1.LabelTopologyZone: zoneHere}}}
	if len(others) == 0 {
		others = [][2]netip.Addr{places["node"].addrs}
	}
	for _, both := range others {
		for _, a := range both {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
		}
	}
	return n
}

// addAddress gives the node one more address in each family, until the row ends or the function is called.
func (l *Lab) addAddress(device string, both [2]netip.Addr) (remove func()) {
	l.Helper()
	l.sh(l.node, fmt.Sprintf("ip addr add %s dev %s; ip addr add %s dev %s nodad", both[0], device, both[1], device))
	had := *l.more
	*l.more = append(slices.Clip(had), both[:]...)
	remove = sync.OnceFunc(func() {
		l.sh(l.node, fmt.Sprintf("ip addr del %s/32 dev %s; ip addr del %s/128 dev %s", both[0], device, both[1], device))
		*l.more = had
	})
	l.Cleanup(remove)
	// The kernel adds the routes by which it receives what is for the address a little later.
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		out, err := l.node.Run("ip", "-6", "route", "show", "table", "local", both[1].String())
		if err == nil && strings.Contains(out, "local ") {
			return remove
		}
	}
	l.Fatalf("the node does not receive what is for its address %s", both[1])
	return nil
}

// lookupNode is what State.Lookup must know of the lab's node.
func (l *Lab) lookupNode() forwarding.Node {
	n := forwarding.Node{Addrs: slices.Clone(*l.more)}
	for _, both := range [][2]netip.Addr{places["node"].addrs, secondAddrs, loopback, linkAddrs} {
		n.Addrs = append(n.Addrs, both[:]...)
	}
	return n
}
