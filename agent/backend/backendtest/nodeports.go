package backendtest

import (
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// nodePorts are the promises about the addresses at which node ports are served, and about what else listens there.
var nodePorts = []Scenario{
	{"node ports are served at the node's primary addresses and at no others", func(l *Lab) {
		l.listen(30080, secondAddrs, loopback)
		l.Program(web(at("a", "r"), nil))
		l.Expect(everybody, toNodePort, "a r")
		l.Expect(everybody, toSecondNodePort, passed)
		l.Expect("node", toLocalhostPort, passed)
	}},
	{"node ports follow the addresses of the Node", func(l *Lab) {
		l.listen(30080, places["node"].addrs)
		l.ProgramWorld(World{Node: labNode(secondAddrs), Ground: labGround(), Services: []*Service{web(at("a", "r"), nil)}})
		l.Expect(everybody, toSecondNodePort, "a r")
		l.Expect(everybody, toNodePort, passed)
	}},
	{"node ports at All are served at every address but loopback, also at one that comes later", func(l *Lab) {
		l.listen(30080, loopback)
		l.Program(web(at("a", "r"), nodePortAddresses(v1alpha1.NodePortAddressesAll)))
		l.Expect(everybody, toNodePort, "a r")
		l.Expect(everybody, toSecondNodePort, "a r")
		l.Expect("node", toLocalhostPort, passed)
		remove := l.addAddress("outside", newAddrs)
		l.Expect(everybody, toNewNodePort, "a r")
		remove()
		l.Expect("c q outside", toNodePort, "a* r*")
	}},
	{"node ports at chosen CIDRs are served at the addresses in them, as they come", func(l *Lab) {
		l.listen(30080, places["node"].addrs)
		l.Program(web(at("a", "r"), nodePortAddresses("192.0.2.64/26", "172.18.0.0/16", "2001:db8:1::40/122", "fd00:18::/64")))
		l.Expect(everybody, toSecondNodePort, "a r")
		l.Expect(everybody, toNodePort, passed)
		l.addAddress("outside", newAddrs)
		l.Expect(everybody, toNewNodePort, "a r")
	}},
	{"node ports at Localhost are reached from the node itself, at 127.0.0.1 and ::1, and by nobody else", func(l *Lab) {
		l.listen(30080, places["node"].addrs)
		l.Program(web(at("a", "node", "r"), nodePortAddresses(v1alpha1.NodePortAddressesLocalhost)))
		l.Expect("node", toLocalhostPort, "a node r")
		l.Expect(everybody, toNodePort, passed)
		l.sendLoopback("outside")
		l.Expect("outside", toLocalhostPort, silent+" | "+unasked)
	}},
	{"node ports at Localhost refuse without endpoints, and follow the endpoints", func(l *Lab) {
		local := nodePortAddresses(v1alpha1.NodePortAddressesLocalhost, v1alpha1.NodePortAddressesPrimary)
		l.Program(web(nil, local))
		l.Expect("node", toLocalhostPort, refused)
		l.Program(web(at("a"), local))
		l.Expect("node", toLocalhostPort, "a")
		l.Expect(everybody, toNodePort, "a")
		l.Program(web(at("r"), local))
		l.Expect("node", toLocalhostPort, "r")
		l.Program(web(at("r"), nil))
		l.listen(30080, loopback)
		l.Expect("node", toLocalhostPort, passed)
	}},
	{"session affinity holds at localhost too", func(l *Lab) {
		l.Program(web(at("a", "b", "r"), func(s *spec) {
			s.SessionAffinitySeconds = 60
			nodePortAddresses(v1alpha1.NodePortAddressesLocalhost)(s)
		}))
		for family, source := range loopback {
			for _, network := range []string{"tcp", "udp"} {
				l.sameServer(network, source, destination(toLocalhostPort, family))
			}
		}
	}},
	{"what others listen at at loopback is not reached from outside", func(l *Lab) {
		l.listen(30081, [2]netip.Addr{loopback[0], loopback[0].Next()}) // 127.0.0.1 and 127.0.0.2
		l.Program(web(at("a"), nodePortAddresses(v1alpha1.NodePortAddressesLocalhost)))
		l.sendLoopback("outside")
		for _, a := range []netip.Addr{loopback[0], loopback[0].Next()} {
			for _, network := range networks {
				if got, err := ask(l.spaces["outside"], network, places["outside"].addrs[0], netip.AddrPortFrom(a, 30081), silence); err == nil {
					l.Errorf("%s from outside to %s: %s answered", network, a, got.server)
				}
			}
		}
	}},
	{"a program that listens on the node never gets what is for a node port", func(l *Lab) {
		l.listen(30080, places["node"].addrs, secondAddrs)
		l.Program(web(nil, nodePortAddresses(v1alpha1.NodePortAddressesAll)))
		l.Expect(everybody, toNodePort, refused)
		l.Expect(everybody, toSecondNodePort, refused)
		l.Program(web(at("r"), externalLocal))
		l.Expect("outside", toNodePort, silent)
		l.Expect("c node", toNodePort, "r")
		l.Expect(everybody, toSecondNodePort, passed)
		l.Program(web(at("a"), nil))
		l.Expect(everybody, toNodePort, "a")
	}},
	{"a program that listens on the node never gets what is for a service IP", func(l *Lab) {
		ips := [2]netip.Addr{destination(toServiceIP, 0).Addr(), destination(toServiceIP, 1).Addr()}
		l.addAddress("lo", ips) // as a proxy that uses IPVS leaves it behind
		l.listen(80, ips)
		l.listen(81, ips)
		l.Program(web(at("a"), nil))
		l.Expect("a c q outside", toServiceIP, "a")
		l.Expect("a c q outside", toUnusedPort, refused)
		l.Program(web(nil, nil))
		l.Expect(everybody, toServiceIP, refused)
		l.Program(web(at("r"), internalLocal))
		l.Expect("c outside", toServiceIP, silent)
	}},
	{"two Services share the number of a node port between protocols", func(l *Lab) {
		dns := another(1, at("b"))
		dns.Spec.Ports = []v1alpha1.AssignmentPort{{Name: "dns", Protocol: corev1.ProtocolUDP, Port: 53, NodePort: 30080}}
		l.Program(dns, web(at("a"), func(s *spec) { s.Ports = append(s.Ports[:1:1], s.Ports[2]) })) // without UDP
		l.ExpectOf(forwarding.TCP, everybody, toNodePort, "a")
		l.ExpectOf(forwarding.SCTP, everybody, toNodePort, "a")
		l.ExpectOf(forwarding.UDP, everybody, toNodePort, "b")
	}},
}

func nodePortAddresses(list ...string) func(*spec) {
	return func(s *spec) { s.NodePortAddresses = list }
}

// sameServer checks that connections of one client, the node, go to one server.
func (l *Lab) sameServer(network string, source netip.Addr, to netip.AddrPort) {
	l.Helper()
	first := ""
	for range 20 {
		got, err := ask(l.node, network, source, to, patience)
		if err != nil {
			l.Errorf("%s to %s: %v", network, to, err)
			return
		}
		if first == "" {
			first = got.server
		}
		if got.server != first {
			l.Errorf("%s to %s: %s served, then %s", network, to, first, got.server)
			return
		}
	}
}

// sendLoopback lets a neighbour of the node send packets for 127.0.0.0/8 to it, as an attacker would, until the row ends. (What is for ::1 no kernel takes
// from a neighbour.)
func (l *Lab) sendLoopback(place string) {
	l.Helper()
	l.Cleanup(func() {
		l.sh(l.spaces[place], `ip rule add pref 0 lookup local; ip rule del pref 20; ip rule del pref 10; ip route flush table 99; sysctl -qw net.ipv4.conf.all.route_localnet=0`)
	})
	// What is local comes first of all, so that is looked up later for as long as the row lasts.
	l.sh(l.spaces[place], fmt.Sprintf(`sysctl -qw net.ipv4.conf.all.route_localnet=1; ip route add 127.0.0.0/8 via %s dev eth0 table 99
		ip rule add pref 10 to 127.0.0.0/8 lookup 99; ip rule add pref 20 lookup local; ip rule del pref 0`, places["node"].addrs[0]))
}
