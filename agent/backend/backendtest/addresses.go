package backendtest

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

type spec = v1alpha1.ServiceAssignmentSpec

// everybody are all places that call: a pod that is an endpoint, one that is none, the node, a pod of another node, and a client outside.
const everybody = "a c node q outside"

// addresses are the promises about who reaches what by which address.
var addresses = []Scenario{
	{"a service IP is reached from pods, the node, other nodes' pods and outside", func(l *Lab) {
		l.Program(web(at("a", "b", "r"), nil))
		l.Expect("c", toServiceIP, "a= b= r=")
		l.Expect("node outside", toServiceIP, "a* b* r*")
		l.Program(web(at("a", "b"), nil)) // what r answers to q directly would not pass this node
		l.Expect("q", toServiceIP, "a= b=")
	}},
	{"a pod reaches itself through its Service", func(l *Lab) {
		l.Program(web(at("a"), nil))
		l.Expect("a", toServiceIP, "a*")
		l.Expect("a", toExternalIP, "a*")
		l.Expect("a", toNodePort, "a*")
	}},
	{"external and load-balancer IPs and node ports are reached from everywhere", func(l *Lab) {
		l.Program(web(at("a", "b", "r"), nil))
		for _, to := range []string{toExternalIP, toLoadBalancerIP, toNodePort} {
			l.Expect("c node q outside", to, "a* b* r*")
		}
	}},
	{"an endpoint on the node's own network is reached", func(l *Lab) {
		l.Program(web(at("node", "r"), nil))
		l.Expect("c outside", toServiceIP, "node= r")
		l.Expect("c outside", toNodePort, "node= r*")
	}},
	{"without endpoints connections are refused at once", func(l *Lab) {
		l.Program(web(nil, nil))
		for _, to := range []string{toServiceIP, toExternalIP, toLoadBalancerIP, toNodePort} {
			l.Expect(everybody, to, refused)
		}
	}},
	{"an unused port of a service IP refuses", func(l *Lab) {
		l.Program(web(at("a"), nil))
		l.Expect(everybody, toUnusedPort, refused)
	}},
	{"node ports are served at the chosen addresses only", func(l *Lab) {
		l.Program(web(at("a", "r"), func(s *spec) { s.NodePortAddresses = []string{"172.18.0.0/16", "fd00:18::/64"} }))
		l.Expect("c q outside", toSecondNodePort, "a* r*")
	}},
	{"external traffic policy Local keeps the client's address and uses local endpoints", func(l *Lab) {
		l.Program(web(at("a", "r"), externalLocal))
		for _, to := range []string{toExternalIP, toLoadBalancerIP, toNodePort} {
			l.Expect("outside", to, "a=")
			l.Expect("c", to, "a= r=")
			l.Expect("node", to, "a* r*")
		}
		l.Expect("outside", toServiceIP, "a* r*")
	}},
	{"external traffic policy Local without a local endpoint drops", func(l *Lab) {
		l.Program(web(at("r"), externalLocal))
		for _, to := range []string{toExternalIP, toLoadBalancerIP, toNodePort} {
			l.Expect("outside", to, silent)
			l.Expect("c", to, "r=")
			l.Expect("node", to, "r*")
		}
	}},
	{"internal traffic policy Local uses local endpoints, or drops", func(l *Lab) {
		local := func(s *spec) { s.InternalTrafficPolicy = corev1.ServiceInternalTrafficPolicyLocal }
		l.Program(web(at("a", "r"), local))
		l.Expect("c node", toServiceIP, "a")
		l.Expect("outside", toNodePort, "a* r*")
		l.Program(web(at("r"), local))
		l.Expect("c node", toServiceIP, silent)
		l.Expect("outside", toNodePort, "r*")
	}},
	{"each family follows a Local policy by its own endpoints", func(l *Lab) {
		apart := []Endpoint{{Place: "a", Only: forwarding.IPv4}, {Place: "r", Only: forwarding.IPv6}}
		l.Program(web(apart, externalLocal))
		for _, to := range []string{toExternalIP, toLoadBalancerIP, toNodePort} {
			l.Expect("outside", to, "a= | silent")
			l.Expect("c", to, "a= | r=")
			l.Expect("node", to, "a* | r*")
		}
		l.Program(web(apart, internalLocal))
		l.Expect("c node", toServiceIP, "a | silent")
		l.Program(web(apart[:1], externalLocal))
		l.Expect("c node outside", toServiceIP, "a | refused")
		l.Expect("c node outside", toNodePort, "a | refused")
	}},
	{"source ranges guard load-balancer IPs and nothing else", func(l *Lab) {
		l.Program(web(at("a", "r"), func(s *spec) { s.LoadBalancerSourceRanges = []string{"10.244.2.0/24", "fd00:244:2::/64"} }))
		l.Expect("q", toLoadBalancerIP, "a* r*")
		l.Expect("c outside", toLoadBalancerIP, silent)
		l.Expect("outside", toExternalIP, "a* r*")
		l.Expect("outside", toNodePort, "a* r*")
	}},
	{"source ranges allow each family by itself, and everything by a range of everything", func(l *Lab) {
		ranges := func(list ...string) func(*spec) { return func(s *spec) { s.LoadBalancerSourceRanges = list } }
		l.Program(web(at("a"), ranges("10.244.2.0/24")))
		l.Expect("q", toLoadBalancerIP, "a*")
		l.Expect("c outside", toLoadBalancerIP, "silent | a*")
		l.Program(web(at("a"), ranges("192.0.2.2/32", "2001:db8:1::2/128")))
		l.Expect("outside", toLoadBalancerIP, "a*")
		l.Expect("c node q", toLoadBalancerIP, silent)
		l.Program(web(at("a"), ranges("192.0.2.2/32", "0.0.0.0/0", "2001:db8:1::2/128", "::/0")))
		l.Expect("c q outside", toLoadBalancerIP, "a*")
	}},
	{"source ranges that hold the node's own address let the node in, also by the load-balancer IP itself", func(l *Lab) {
		l.Program(web(at("a"), func(s *spec) { s.LoadBalancerSourceRanges = []string{"192.0.2.1/32", "2001:db8:1::1/128"} }))
		l.Expect("node", toLoadBalancerIP, "a*")
		l.Expect("c q outside", toLoadBalancerIP, silent)
		vips := [2]netip.Addr{destination(toLoadBalancerIP, 0).Addr(), destination(toLoadBalancerIP, 1).Addr()}
		l.addAddress("lo", vips) // some load balancers want it there; the node then takes it for its own end of the connection
		for family, vip := range vips {
			for _, network := range networks {
				if got, err := ask(l.node, network, vip, destination(toLoadBalancerIP, family), patience); err != nil || got.server != "a" {
					l.Errorf("%s from the node by %s: %q, %v", network, vip, got.server, err)
				}
			}
		}
	}},
	{"Services that share source ranges are guarded each by itself", func(l *Lab) {
		ranges := func(s *spec) { s.LoadBalancerSourceRanges = []string{"10.244.2.0/24", "fd00:244:2::/64"} }
		second := another(1, at("b"))
		second.Spec.LoadBalancerIPs = []string{"198.51.100.9", "2001:db8:7::9"}
		ranges(&second.Spec)
		l.Program(web(at("a"), ranges), second)
		l.Expect("q", toOtherIP, "b*")
		l.Expect("outside", toOtherIP, silent)
		l.Program(web(at("a"), nil), second)
		l.Expect("outside", toLoadBalancerIP, "a*")
		l.Expect("outside", toOtherIP, silent)
		l.Program(second)
		l.Expect("q", toOtherIP, "b*")
		l.Expect("outside", toOtherIP, silent)
	}},
	{"source ranges hold together with external traffic policy Local", func(l *Lab) {
		guarded := func(s *spec) {
			externalLocal(s)
			s.LoadBalancerSourceRanges = []string{"192.0.2.2/32", "2001:db8:1::2/128"}
		}
		l.Program(web(at("a", "r"), guarded))
		l.Expect("outside", toLoadBalancerIP, "a=")
		l.Expect("c node q", toLoadBalancerIP, silent)
		l.Expect("c", toExternalIP, "a= r=")
		l.Program(web(at("r"), guarded))
		l.Expect("outside", toLoadBalancerIP, silent)
		l.Program(web(nil, guarded))
		l.Expect("outside", toLoadBalancerIP, refused)
	}},
	{"endpoints that terminate serve when no other is ready", func(l *Lab) {
		leaving := func(place string) Endpoint {
			return Endpoint{Place: place, NotReady: true, Serving: true, Terminating: true}
		}
		l.Program(web([]Endpoint{leaving("a"), {Place: "b"}, {Place: "r", NotReady: true}}, nil))
		l.Expect("c outside", toServiceIP, "b")
		l.Program(web([]Endpoint{leaving("a"), {Place: "b", NotReady: true, Terminating: true}, leaving("r")}, nil))
		l.Expect("c outside", toServiceIP, "a r")
		l.Program(web([]Endpoint{leaving("a"), {Place: "r"}}, externalLocal))
		l.Expect("outside", toNodePort, "a=")
	}},
	{"an endpoint that is said to be ready is used, whatever else is said of it (publishNotReadyAddresses)", func(l *Lab) {
		// The control plane keeps the promise by calling every endpoint of such a Service ready.
		l.Program(web([]Endpoint{{Place: "a", Terminating: true}, {Place: "b"}, {Place: "r", NotReady: true}}, nil))
		l.Expect("c outside", toServiceIP, "a b")
	}},
	{"every port of a Service leads to its own target port", func(l *Lab) {
		for _, place := range []string{"a", "r"} {
			for _, a := range places[place].addrs {
				l.answer(l.spaces[place], place+":9443", netip.AddrPortFrom(a, 9443))
			}
		}
		s := web(at("a", "r"), func(s *spec) {
			for _, p := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP} {
				s.Ports = append(s.Ports, v1alpha1.AssignmentPort{Name: "secure-" + string(p), Protocol: p, Port: 443, NodePort: 30443})
			}
		})
		s.TargetPorts = map[string]int32{"secure-TCP": 9443, "secure-UDP": 9443, "secure-SCTP": 9443}
		l.Program(s)
		l.Expect("c node outside", toServiceIP, "a r")
		l.Expect("c node outside", toSecureIP, "a:9443 r:9443")
		l.Expect("c node outside", toNodePort, "a r")
		l.Expect("c node outside", toSecurePort, "a:9443 r:9443")
		s.TargetPorts["secure-UDP"] = serverPort
		l.Program(s)
		l.ExpectOf(forwarding.TCP, "c", toSecureIP, "a:9443 r:9443")
		l.ExpectOf(forwarding.UDP, "c", toSecureIP, "a r")
	}},
	{"an external IP that is the node's own address takes its ports and no others", func(l *Lab) {
		l.listen(30080, places["node"].addrs)
		l.Program(web(at("a", "r"), func(s *spec) {
			s.ExternalIPs = []string{places["node"].addrs[0].String(), places["node"].addrs[1].String()}
			for i := range s.Ports {
				s.Ports[i].NodePort = 0
			}
		}))
		l.Expect(everybody, toOwnAddress, "a r")
		l.Expect(everybody, toNodePort, passed)
		l.Ping(everybody, toNodePort, passed)
	}},
	{"hints for the node, then for its zone, choose endpoints if every endpoint has them", func(l *Lab) {
		hinted := func(zones, nodes []string, place string) Endpoint {
			return Endpoint{Place: place, Zones: zones, Nodes: nodes}
		}
		l.Program(web([]Endpoint{hinted([]string{zoneHere}, nil, "a"), hinted([]string{"zone-b"}, nil, "r")}, nil))
		l.Expect("c", toServiceIP, "a")
		l.Program(web([]Endpoint{hinted([]string{zoneHere}, nil, "a"), {Place: "r"}}, nil))
		l.Expect("c", toServiceIP, "a r")
		l.Program(web([]Endpoint{hinted([]string{zoneHere}, []string{remoteNode}, "r"), hinted([]string{zoneHere}, []string{nodeName}, "a")}, nil))
		l.Expect("c", toServiceIP, "a")
	}},
}

func externalLocal(s *spec) { s.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal }
