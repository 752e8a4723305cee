package backendtest

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// grounds are the promises that hold for all Services alike: declared ranges, and who counts as a pod.
var grounds = []Scenario{
	{"what no Service has of a declared range is silent", func(l *Lab) {
		l.ProgramOn(declared(), web(at("a"), nil))
		l.Expect("c node q outside", toUnallocated, silent)
		l.listenOutside(80, toUnallocated)
		l.listenOutside(80, toUndeclared)
		l.Expect("c node q", toUnallocated, silent)
		l.Expect("c node q", toUndeclared, passed)
		l.Expect(everybody, toServiceIP, "a")
		l.Expect("c outside", toUnusedPort, refused)
		l.ProgramOn(labGround(), web(at("a"), nil))
		l.Expect("c node q", toUnallocated, passed)
	}},
	{"an address of the node itself in a declared range stays the node's", func(l *Lab) {
		l.ProgramOn(declared(), web(at("a"), nil))
		l.addAddress("outside", [2]netip.Addr{destination(toUnallocated, 0).Addr(), destination(toUnallocated, 1).Addr()})
		l.listen(80, [2]netip.Addr{destination(toUnallocated, 0).Addr(), destination(toUnallocated, 1).Addr()})
		l.Expect("c node q outside", toUnallocated, passed)
		l.Ping("c node q outside", toUnallocated, passed)
	}},
	{"what another proxy translates in a declared range stays the other's", func(l *Lab) {
		l.ProgramOn(declared(), web(at("b"), nil))
		l.translateOtherwise(toUnallocated, "a")
		for _, from := range strings.Fields("c node q outside") {
			for family, source := range places[from].addrs {
				for _, network := range networks {
					got, err := ask(l.spaces[from], network, source, destination(toUnallocated, family), patience)
					if err != nil || got.server != "a" {
						l.Errorf("%s from %s to another proxy's %s: %q, %v", network, from, destination(toUnallocated, family), got.server, err)
					}
				}
			}
		}
		l.Expect("c node q outside", toServiceIP, "b")
	}},
	{"pods are told by the interface they come by", func(l *Lab) {
		l.ProgramOn(pods("pod-c"), web(at("b", "r"), externalLocal))
		l.Expect("c", toServiceIP, "b= r=")
		l.Expect("a outside", toServiceIP, "b* r*")
		l.Expect("c", toNodePort, "b= r=") // as if its policy were Cluster
		l.Expect("a outside", toNodePort, "b=")
	}},
	{"pods are told by the prefix of the interfaces they come by", func(l *Lab) {
		l.ProgramOn(pods("pod-*"), web(at("b", "r"), externalLocal))
		l.Expect("a c", toServiceIP, "b= r=")
		l.Expect("q outside", toServiceIP, "b* r*")
		l.Expect("a c", toNodePort, "b= r=")
		l.Expect("q outside", toNodePort, "b=")
		l.Expect("node", toNodePort, "b* r*")
	}},
	{"where pods cannot be told nobody counts as being outside", func(l *Lab) {
		l.ProgramOn(pods(), web(at("b", "r"), nil))
		l.Expect("a c outside", toServiceIP, "b= r=")
		l.Expect("c outside", toNodePort, "b* r*")
		l.ProgramOn(pods(), web(at("b", "r"), externalLocal))
		l.Expect("c outside", toNodePort, "b=")
	}},
	{"all traffic through service IPs is masqueraded if that is wanted", func(l *Lab) {
		all := labGround()
		all.MasqueradeAll = true
		l.ProgramOn(all, web(at("a", "b", "r"), externalLocal))
		l.Expect("c node q outside", toServiceIP, "a* b* r*")
		l.Expect("outside", toNodePort, "a= b=")
		l.Program(web(at("a", "b", "r"), externalLocal))
		l.Expect("c", toServiceIP, "a= b= r=")
	}},
}

// declared is the usual ground with service IP ranges.
func declared() forwarding.Ground {
	g := labGround()
	g.Ranges = []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16"), netip.MustParsePrefix("fd00:99::/64")}
	return g
}

// pods is a ground on which pods are told by these interfaces only.
func pods(interfaces ...string) forwarding.Ground {
	return forwarding.Ground{Pods: forwarding.PodTraffic{Interfaces: interfaces}}
}

// listenOutside serves at a destination behind the node's default route, until the row ends.
func (l *Lab) listenOutside(port uint16, to string) {
	l.Helper()
	outside := l.spaces["outside"]
	for family := range 2 {
		a := destination(to, family).Addr()
		l.sh(outside, fmt.Sprintf("ip addr add %s/%d dev eth0 %s", a, a.BitLen(), []string{"", "nodad"}[family]))
		l.Cleanup(func() { l.sh(outside, fmt.Sprintf("ip addr del %s/%d dev eth0", a, a.BitLen())) })
		l.answer(outside, listener, netip.AddrPortFrom(a, port))
	}
}

// translateOtherwise translates a destination to a place as another proxy on the node would, until the row ends.
func (l *Lab) translateOtherwise(to, place string) {
	l.Helper()
	for family, name := range []string{"ip", "ip6"} {
		server := netip.AddrPortFrom(places[place].addrs[family], serverPort)
		l.Cleanup(func() { l.sh(l.node, "nft delete table "+name+" other-proxy") })
		rule := fmt.Sprintf("%s daddr %s meta l4proto { tcp, udp, sctp } dnat to %s", name, destination(to, family).Addr(), server)
		l.sh(l.node, fmt.Sprintf(`nft 'table %s other-proxy {
			chain prerouting { type nat hook prerouting priority -100; %[2]s; }
			chain output { type nat hook output priority -100; %[2]s; }
		}'`, name, rule))
	}
}
