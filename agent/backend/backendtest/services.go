package backendtest

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// another is the nth Service besides web, with addresses and node ports of its own.
func another(n int, endpoints []Endpoint) *Service {
	return web(endpoints, func(s *spec) {
		s.ServiceUID = types.UID(fmt.Sprintf("other-uid-%d", n))
		s.ServiceIPs = nil
		for _, format := range []string{"10.99.1.%d", "fd00:99::1:%d"} {
			s.ServiceIPs = append(s.ServiceIPs, v1alpha1.ServiceIP{IP: fmt.Sprintf(format, n+1), Source: v1alpha1.ServiceIPSourceClusterIP})
		}
		s.ExternalIPs, s.LoadBalancerIPs = nil, nil
		for i := range s.Ports {
			s.Ports[i].NodePort += int32(n + 100)
		}
	}).named(fmt.Sprintf("other-%d", n))
}

func (s *Service) named(name string) *Service {
	s.Name, s.UID = name, s.Spec.ServiceUID
	return s
}

// otherPort is one more TCP port of a Service.
func otherPort(port, nodePort int32) v1alpha1.AssignmentPort {
	return v1alpha1.AssignmentPort{Name: fmt.Sprintf("tcp-%d", port), Protocol: corev1.ProtocolTCP, Port: port, NodePort: nodePort}
}

// clientIP is session affinity with a timeout in seconds.
func clientIP(seconds int32) func(*spec) {
	return func(s *spec) { s.SessionAffinitySeconds = seconds }
}
