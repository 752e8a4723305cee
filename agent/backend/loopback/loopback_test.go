package loopback

import (
	"errors"
	"io/fs"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/agent/sysctl"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// link is a node, and a neighbour that sends it what is for 127.0.0.1, as an attacker would.
type link struct {
	*testing.T
	node, neighbour *netns.NS
}

func newLink(t *testing.T) *link {
	l := &link{t, netns.NewT(t), netns.NewT(t)}
	name := "loopback-" + strings.ReplaceAll(t.Name(), "/", "-")
	if err := l.neighbour.Pin(name); err != nil {
		t.Fatal(err)
	}
	l.sh(l.node, `ip link set lo up; ip link add eth0 type veth peer name eth0 netns `+name+`; ip link set eth0 up; ip address add 10.0.0.1/24 dev eth0`)
	// What is local comes first of all, so that is looked up later.
	l.sh(l.neighbour, `ip link set lo up; ip link set eth0 up; ip address add 10.0.0.2/24 dev eth0; sysctl -qw net.ipv4.conf.all.route_localnet=1
		ip route add 127.0.0.0/8 via 10.0.0.1 dev eth0 table 99; ip rule add pref 10 to 127.0.0.0/8 lookup 99; ip rule add pref 20 lookup local; ip rule del pref 0`)
	if err := l.node.Do(func() error {
		listener, err := net.Listen("tcp", "127.0.0.1:80")
		if err == nil {
			t.Cleanup(func() { listener.Close() })
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *link) sh(ns *netns.NS, script string) string {
	l.Helper()
	out, err := ns.Run("sh", "-ec", script)
	if err != nil {
		l.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}

// reached says whether something listens at 127.0.0.1 as one of both sees it.
func (l *link) reached(from *netns.NS, patience time.Duration) bool {
	return from.Do(func() error {
		conn, err := net.DialTimeout("tcp4", "127.0.0.1:80", patience)
		if err == nil {
			conn.Close()
		}
		return err
	}) == nil
}

func (l *link) routed() string {
	return strings.TrimSpace(l.sh(l.node, `cat /proc/sys/net/ipv4/conf/all/route_localnet`))
}

// do calls Route or Unroute at the node.
func (l *link) do(f func(sysctl.Proc) (bool, error)) (did bool) {
	l.Helper()
	if err := l.node.Do(func() (err error) { did, err = f(sysctl.Kernel); return err }); err != nil {
		l.Fatal(err)
	}
	return did
}

func TestNeighboursAreKeptOut(t *testing.T) {
	l := newLink(t)
	l.sh(l.node, `sysctl -qw net.ipv4.conf.all.route_localnet=1`)
	if !l.reached(l.neighbour, 10*time.Second) {
		t.Fatal("the neighbour does not reach 127.0.0.1 without a guard, so this test tells nothing")
	}
	l.sh(l.node, `sysctl -qw net.ipv4.conf.all.route_localnet=0`)

	if !l.do(Route) || l.routed() != "1" {
		t.Error("the kernel may not route loopback addresses")
	}
	if l.reached(l.neighbour, 500*time.Millisecond) {
		t.Error("the neighbour reaches what listens at 127.0.0.1 only")
	}
	if !l.reached(l.node, 10*time.Second) {
		t.Error("the node does not reach its own loopback")
	}
	// As after a restart of the agent, and after somebody emptied the chain meanwhile.
	l.sh(l.node, `nft flush chain ip `+TableName+` input`)
	if l.do(Route) {
		t.Error("the parameter was raised again")
	}
	if rules := strings.Count(l.sh(l.node, `nft list table ip `+TableName), "drop"); rules != 1 || l.reached(l.neighbour, 500*time.Millisecond) {
		t.Errorf("%d rules", rules)
	}
	l.sh(l.node, `nft list ruleset | nft -c -f -`)
}

func TestUnrouteTakesBackWhatRouteDid(t *testing.T) {
	for _, before := range []string{"0", "1"} {
		t.Run(before, func(t *testing.T) {
			l := newLink(t)
			l.sh(l.node, `sysctl -qw net.ipv4.conf.all.route_localnet=`+before)
			if lowered := l.do(Unroute); lowered || l.routed() != before {
				t.Errorf("without Route: lowered %t, to %s", lowered, l.routed())
			}
			l.do(Route)
			l.do(Route)
			if lowered := l.do(Unroute); lowered != (before == "0") || l.routed() != before {
				t.Errorf("lowered %t, to %s", lowered, l.routed())
			}
			if left := l.sh(l.node, `nft list ruleset`); left != "" {
				t.Errorf("left behind: %s", left)
			}
		})
	}
}

// Where the parameter cannot be read, nothing is changed.
func TestRouteWithoutTheParameter(t *testing.T) {
	l := newLink(t)
	if err := l.node.Do(func() error { _, err := Route(sysctl.Proc(t.TempDir())); return err }); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if left := l.sh(l.node, `nft list ruleset`); left != "" {
		t.Errorf("left behind: %s", left)
	}
}
