package compile

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

func TestLingering(t *testing.T) {
	for _, tc := range []struct {
		name      string
		protocol  corev1.Protocol
		change    func(*v1alpha1.ServiceAssignmentSpec)
		endpoints []string
		want      string
	}{
		{name: "one that terminates and serves", protocol: corev1.ProtocolUDP,
			endpoints: []string{"10.1.0.1", "10.1.0.2 notready serving terminating"}, want: "[10.1.0.2:8080]"},
		{name: "not one that serves no more", protocol: corev1.ProtocolUDP, endpoints: []string{"10.1.0.1", "10.1.0.2 notready terminating"}, want: "[]"},
		{name: "not one that gets new traffic for want of others", protocol: corev1.ProtocolUDP, endpoints: []string{"10.1.0.2 notready serving terminating"}, want: "[]"},
		{name: "one elsewhere under a Local policy", protocol: corev1.ProtocolUDP,
			change: func(s *v1alpha1.ServiceAssignmentSpec) {
				s.InternalTrafficPolicy = corev1.ServiceInternalTrafficPolicyLocal
			},
			endpoints: []string{"10.1.0.1 on=node1", "10.1.0.2 on=node2"}, want: "[10.1.0.2:8080]"},
		{name: "one in another zone", protocol: corev1.ProtocolUDP, endpoints: []string{"10.1.0.1 forzone=a", "10.1.0.2 forzone=b"}, want: "[10.1.0.2:8080]"},
		{name: "TCP needs none of it", protocol: corev1.ProtocolTCP, endpoints: []string{"10.1.0.1", "10.1.0.2 notready serving terminating"}, want: "[]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := assignment(tc.change)
			a.Spec.Ports[0].Protocol = tc.protocol
			s := endpointSlice(t, 8080, tc.endpoints...)
			s.Ports[0].Protocol = &tc.protocol
			got := Services(parsedAssignment(t, a), []*Slice{parsedSlice(t, s)}, node("a"))
			if len(got) != 1 {
				t.Fatalf("%d service ports, want 1", len(got))
			}
			if have := fmt.Sprint(got[0].Lingering); have != tc.want {
				t.Errorf("%s, want %s", have, tc.want)
			}
		})
	}
}
