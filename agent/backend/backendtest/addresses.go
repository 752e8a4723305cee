package backendtest

import (
	corev1 "k8s.io/api/core/v1"

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
	{"source ranges guard load-balancer IPs and nothing else", func(l *Lab) {
		l.Program(web(at("a", "r"), func(s *spec) { s.LoadBalancerSourceRanges = []string{"10.244.2.0/24", "fd00:244:2::/64"} }))
		l.Expect("q", toLoadBalancerIP, "a* r*")
		l.Expect("c outside", toLoadBalancerIP, silent)
		l.Expect("outside", toExternalIP, "a* r*")
		l.Expect("outside", toNodePort, "a* r*")
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
