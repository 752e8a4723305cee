package programmed

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/utils/ptr"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// servicePort is how an EndpointSlice refers to a port of a Service.
type servicePort struct {
	name     string
	protocol corev1.Protocol
}

func (p servicePort) String() string {
	if p.name == "" {
		return fmt.Sprintf("port %s", p.protocol)
	}
	return fmt.Sprintf("port %s %s", p.protocol, p.name)
}

// endpointSlice is what is kept of an EndpointSlice: who is ready, for which ports.
type endpointSlice struct {
	revision revision
	ports    []servicePort
	ready    []string // first addresses of the ready endpoints
}

func newEndpointSlice(s *discoveryv1.EndpointSlice) endpointSlice {
	e := endpointSlice{revision: parseRevision(s.ResourceVersion)}
	if s.AddressType == discoveryv1.AddressTypeFQDN {
		return e // no proxy forwards to names
	}
	for _, p := range s.Ports {
		e.ports = append(e.ports, servicePort{ptr.Deref(p.Name, ""), ptr.Deref(p.Protocol, corev1.ProtocolTCP)})
	}
	for i := range s.Endpoints {
		// Because the API defines an absent ready as true.
		if ptr.Deref(s.Endpoints[i].Conditions.Ready, true) && len(s.Endpoints[i].Addresses) > 0 {
			e.ready = append(e.ready, s.Endpoints[i].Addresses[0])
		}
	}
	return e
}

// service is the EndpointSlices of one Service by name.
type service map[string]endpointSlice

// newest is the newest revision of the Service's slices.
func (s service) newest() revision {
	var r revision
	for _, slice := range s {
		r = newer(r, slice.revision)
	}
	return r
}

// ready returns the addresses of the endpoints that are ready for port.
func (s service) ready(port servicePort) map[string]struct{} {
	addresses := map[string]struct{}{}
	for _, slice := range s {
		if !slices.Contains(slice.ports, port) {
			continue
		}
		for _, a := range slice.ready {
			addresses[a] = struct{}{}
		}
	}
	return addresses
}

// readiness is which endpoints of a Service were ready at one revision of its slices.
type readiness struct {
	revision revision
	ports    map[servicePort]map[string]struct{}
	lacking  string // the first port without a ready endpoint
}

// observe returns the present readiness of the ports.
func (s service) observe(ports []v1alpha1.AssignmentPort) readiness {
	r := readiness{revision: s.newest(), ports: make(map[servicePort]map[string]struct{}, len(ports))}
	if len(ports) == 0 {
		r.lacking = "any port"
	}
	for _, p := range ports {
		port := servicePort{p.Name, p.Protocol}
		r.ports[port] = s.ready(port)
		if len(r.ports[port]) == 0 && r.lacking == "" {
			r.lacking = port.String()
		}
	}
	return r
}

// stillServes reports whether each port has an endpoint that was ready in r and is ready now: then a kernel that holds
// r's revision forwards to at least one endpoint that answers.
func (r readiness) stillServes(now readiness) bool {
	if r.lacking != "" || now.lacking != "" {
		return false
	}
	for port, then := range r.ports {
		if !overlap(then, now.ports[port]) {
			return false
		}
	}
	return len(r.ports) > 0
}

func overlap(a, b map[string]struct{}) bool {
	for k := range a {
		if _, ok := b[k]; ok {
			return true
		}
	}
	return false
}
