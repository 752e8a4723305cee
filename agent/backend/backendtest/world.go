package backendtest

import (
	"cmp"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// World is all that a node is to forward.
type World struct {
	Node     *corev1.Node
	Ground   forwarding.Ground
	Services []*Service
}

// Service is a Service and its endpoints.
type Service struct {
	v1alpha1.ServiceAssignment
	Endpoints []Endpoint
	// TargetPorts are where endpoints serve a port, by the port's name; 8080 for those that are not in it.
	TargetPorts map[string]int32
}

// Endpoint is one place of the lab as an endpoint of a Service. The zero value of the conditions is a ready endpoint.
type Endpoint struct {
	// Place is the name of a place of the lab: a pod, or the node itself (host network).
	Place string
	// NotReady endpoints are not ready, and serving only if Terminating and Serving are set.
	NotReady, Serving, Terminating bool
	// Zones and Nodes are its hints.
	Zones, Nodes []string
	// Only has the one family of which it has an address; 0 if it has one of each.
	Only forwarding.Families
}

const (
	// serverPort is where every place serves.
	serverPort = 8080
	nodeName   = "node-here"
	remoteNode = "node-elsewhere"
	zoneHere   = "zone-a"
)

// State compiles the world for its node, as the agent does.
func (w World) State() forwarding.State {
	node, problems := compile.ParseNode(w.Node)
	state := forwarding.State{}.On(w.Ground)
	for _, s := range w.Services {
		assignment, p := compile.ParseAssignment(&s.ServiceAssignment)
		problems = append(problems, p...)
		var slices []*compile.Slice
		for _, in := range s.Slices() {
			slice, p := compile.ParseSlice(in, w.Node.Name)
			problems = append(problems, p...)
			slices = append(slices, slice)
		}
		for _, svc := range compile.Services(assignment, slices, node) {
			state = state.With(svc)
		}
	}
	if len(problems) > 0 {
		panic(fmt.Sprintf("a scenario has an invalid world: %v", problems))
	}
	return state
}

// Slices are the Service's EndpointSlices, one per family.
func (s *Service) Slices() []*discoveryv1.EndpointSlice {
	var out []*discoveryv1.EndpointSlice
	for family, kind := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		slice := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: s.Namespace, Name: fmt.Sprintf("%s-%d", s.Name, family), Labels: map[string]string{discoveryv1.LabelServiceName: s.Name}},
			AddressType: kind,
		}
		for _, p := range s.Spec.Ports {
			slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: new(p.Name), Protocol: new(p.Protocol), Port: new(cmp.Or(s.TargetPorts[p.Name], serverPort))})
		}
		for _, e := range s.Endpoints {
			if e.Only != 0 && e.Only != forwarding.IPv4<<family {
				continue
			}
			slice.Endpoints = append(slice.Endpoints, e.object(family))
		}
		out = append(out, slice)
	}
	return out
}

func (e Endpoint) object(family int) discoveryv1.Endpoint {
	place := find(e.Place)
	out := discoveryv1.Endpoint{Addresses: []string{place.addrs[family].String()}, NodeName: new(remoteNode)}
	if place.here {
		out.NodeName = new(nodeName)
	}
	out.Conditions = discoveryv1.EndpointConditions{Ready: new(!e.NotReady), Serving: new(!e.NotReady || e.Serving), Terminating: new(e.Terminating)}
	if len(e.Zones)+len(e.Nodes) > 0 {
		out.Hints = &discoveryv1.EndpointHints{}
		for _, z := range e.Zones {
			out.Hints.ForZones = append(out.Hints.ForZones, discoveryv1.ForZone{Name: z})
		}
		for _, n := range e.Nodes {
			out.Hints.ForNodes = append(out.Hints.ForNodes, discoveryv1.ForNode{Name: n})
		}
	}
	return out
}

// at gives ready endpoints at places.
func at(names ...string) (out []Endpoint) {
	for _, n := range names {
		out = append(out, Endpoint{Place: n})
	}
	return out
}

// web is a Service with an address of every kind in both families, of TCP, UDP and SCTP. change makes it what a scenario needs.
func web(endpoints []Endpoint, change func(*v1alpha1.ServiceAssignmentSpec)) *Service {
	s := &Service{Endpoints: endpoints}
	s.Namespace, s.Name, s.UID = "default", "web", "web-uid"
	s.Spec = v1alpha1.ServiceAssignmentSpec{
		PolicyName: "lab", ServiceUID: s.UID,
		ExternalIPs: []string{"198.51.100.7", "2001:db8:7::7"}, LoadBalancerIPs: []string{"198.51.100.8", "2001:db8:7::8"},
		NodePortAddresses: []string{v1alpha1.NodePortAddressesPrimary},
	}
	for _, ip := range []string{"10.99.0.1", "fd00:99::1"} {
		s.Spec.ServiceIPs = append(s.Spec.ServiceIPs, v1alpha1.ServiceIP{IP: ip, Source: v1alpha1.ServiceIPSourceClusterIP})
	}
	for _, p := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP} {
		s.Spec.Ports = append(s.Spec.Ports, v1alpha1.AssignmentPort{Name: string(p), Protocol: p, Port: 80, NodePort: 30080})
	}
	if change != nil {
		change(&s.Spec)
	}
	return s
}
