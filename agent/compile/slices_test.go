package compile

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// ported gives a slice with other ports: "NAME/PROTOCOL:NUMBER", or "*" for one without a number.
func ported(t *testing.T, ports string, endpoints ...string) *discoveryv1.EndpointSlice {
	t.Helper()
	s := endpointSlice(t, 0, endpoints...)
	s.Ports = nil
	for _, word := range strings.Fields(ports) {
		if word == "*" {
			s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: new("http"), Protocol: new(corev1.ProtocolTCP)})
			continue
		}
		name, at, _ := strings.Cut(word, "/")
		protocol, number, _ := strings.Cut(at, ":")
		port := netip.MustParseAddrPort("0.0.0.0:" + number).Port()
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &name, Protocol: new(corev1.Protocol(protocol)), Port: new(int32(port))})
	}
	return s
}

// endpointsOf writes a target's endpoints with their ports.
func endpointsOf(t forwarding.Target) string {
	var words []string
	for _, e := range t.Endpoints {
		words = append(words, e.AddrPort.String())
	}
	return strings.Join(words, " ")
}

// A Service's endpoints may be in any number of slices, whose ports are found by name and protocol: a named target port has another number in other pods, and
// these are in another slice.
func TestPortsOfSlices(t *testing.T) {
	a := parsedAssignment(t, assignment(func(s *v1alpha1.ServiceAssignmentSpec) {
		s.Ports = []v1alpha1.AssignmentPort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}, {Name: "dns", Protocol: corev1.ProtocolUDP, Port: 53}}
	}))
	for _, tc := range []struct {
		name      string
		slices    []*discoveryv1.EndpointSlice
		http, dns string
	}{
		{"several ports in a slice", []*discoveryv1.EndpointSlice{ported(t, "http/TCP:8080 dns/UDP:5353 admin/TCP:9090", "10.1.0.1")}, "10.1.0.1:8080", "10.1.0.1:5353"},
		{"each slice its own number", []*discoveryv1.EndpointSlice{ported(t, "http/TCP:8080", "10.1.0.1"), ported(t, "http/TCP:9090", "10.1.0.2")}, "10.1.0.1:8080 10.1.0.2:9090", ""},
		{"one pod with two numbers", []*discoveryv1.EndpointSlice{ported(t, "http/TCP:8080", "10.1.0.1"), ported(t, "http/TCP:9090", "10.1.0.1")}, "10.1.0.1:8080 10.1.0.1:9090", ""},
		{"the same in two slices, while it moves", []*discoveryv1.EndpointSlice{ported(t, "http/TCP:8080", "10.1.0.1"), ported(t, "http/TCP:8080", "10.1.0.1")}, "10.1.0.1:8080", ""},
		{"the name with another protocol", []*discoveryv1.EndpointSlice{ported(t, "http/UDP:8080 dns/TCP:5353", "10.1.0.1")}, "", ""},
		{"a slice without ports", []*discoveryv1.EndpointSlice{ported(t, "", "10.1.0.1")}, "", ""},
		{"a port without a number, which is for others than Services", []*discoveryv1.EndpointSlice{ported(t, "*", "10.1.0.1")}, "", ""},
	} {
		var list []*Slice
		for _, s := range tc.slices {
			list = append(list, parsedSlice(t, s))
		}
		got := Services(a, list, node(""))
		i := slices.IndexFunc(got, func(s *forwarding.Service) bool { return s.Key.Port == 53 })
		if http, dns := endpointsOf(got[1-i].Internal), endpointsOf(got[i].Internal); http != tc.http || dns != tc.dns {
			t.Errorf("%s: http goes to %q, dns to %q, want %q and %q", tc.name, http, dns, tc.http, tc.dns)
		}
	}
}

// All addresses of an endpoint are the same pod, so the first is enough; a slice of host names has none.
func TestAddressesOfEndpoints(t *testing.T) {
	in := endpointSlice(t, 8080, "10.1.0.1")
	in.Endpoints[0].Addresses = append(in.Endpoints[0].Addresses, "10.1.0.2", "10.1.0.3")
	names := endpointSlice(t, 8080, "web.example.org")
	names.AddressType = discoveryv1.AddressTypeFQDN
	got := Services(parsedAssignment(t, assignment(nil)), []*Slice{parsedSlice(t, in), parsedSlice(t, names)}, node(""))
	if s := endpointsOf(got[0].Internal); s != "10.1.0.1:8080" {
		t.Errorf("goes to %q, want the first address", s)
	}
}

// Two records of one address: an endpoint that moves between slices, or a new pod that got the address of one that still terminates.
func TestEndpointThatIsThereTwice(t *testing.T) {
	for _, tc := range []struct{ one, other, want string }{
		{"10.1.0.1 on=node1", "10.1.0.1 notready terminating on=node2", "forward 10.1.0.1*"},
		{"10.1.0.1 on=node1", "10.1.0.1 terminating on=node2", "forward 10.1.0.1*"},
		{"10.1.0.1 notready on=node1", "10.1.0.1 on=node2", "forward 10.1.0.1"},
		{"10.1.0.1 notready on=node1", "10.1.0.1 notready serving terminating on=node2", "reject"},
		{"10.1.0.1 notready terminating on=node1", "10.1.0.1 notready serving terminating on=node2", "forward 10.1.0.1"},
	} {
		for _, pair := range [][2]string{{tc.one, tc.other}, {tc.other, tc.one}} {
			list := []*Slice{parsedSlice(t, endpointSlice(t, 8080, pair[0])), parsedSlice(t, endpointSlice(t, 8080, pair[1]))}
			if got := show(Services(parsedAssignment(t, assignment(nil)), list, node(""))[0].Internal); got != tc.want {
				t.Errorf("%q and %q: %s, want %s", pair[0], pair[1], got, tc.want)
			}
		}
	}
}

func TestHealthCheck(t *testing.T) {
	external := func(s *v1alpha1.ServiceAssignmentSpec) {
		s.ExternalTrafficPolicy, s.HealthCheckNodePort = corev1.ServiceExternalTrafficPolicyLocal, 31000
	}
	const pods = "10.1.0.1 on=node1|10.1.0.2 on=node1|10.1.0.3 on=node2|10.1.0.4 notready on=node1|10.1.0.5 notready serving terminating on=node1"
	for _, tc := range []struct {
		name   string
		spec   func(*v1alpha1.ServiceAssignmentSpec)
		slices []*discoveryv1.EndpointSlice
		want   int // -1: there is no health check
	}{
		{"no Local policy", func(s *v1alpha1.ServiceAssignmentSpec) { s.HealthCheckNodePort = 31000 }, nil, -1},
		{"another node's", func(s *v1alpha1.ServiceAssignmentSpec) {
			external(s)
			s.NodeSelector.MatchLabels = map[string]string{"edge": "yes"}
		}, nil, -1},
		{"none", external, nil, 0},
		{"ready and local ones", external, []*discoveryv1.EndpointSlice{ported(t, "http/TCP:8080", strings.Split(pods, "|")...)}, 2},
		{"a pod counts once, whatever its ports and families", external, []*discoveryv1.EndpointSlice{ported(t, "http/TCP:8080 dns/UDP:53", "10.1.0.1 on=node1"),
			ported(t, "http/TCP:8080", "fd00::1 on=node1"), ported(t, "http/TCP:8080", "10.1.0.1 on=node1")}, 1},
		{"a terminating record beside a new pod's", external, []*discoveryv1.EndpointSlice{ported(t, "http/TCP:8080", "10.1.0.1 terminating on=node1", "10.1.0.1 notready on=node1")}, 0},
		{"without ports nothing serves", external, []*discoveryv1.EndpointSlice{ported(t, "", "10.1.0.1 on=node1")}, 0},
	} {
		var list []*Slice
		for _, s := range tc.slices {
			list = append(list, parsedSlice(t, s))
		}
		got := HealthCheckOf(parsedAssignment(t, assignment(tc.spec)), list, node("a"))
		want := HealthCheck{Port: 31000, Addresses: node("a").Addresses, Endpoints: tc.want}
		if tc.want < 0 {
			want = HealthCheck{}
		}
		if !got.Equal(want) {
			t.Errorf("%s: %+v, want %+v", tc.name, got, want)
		}
	}
}
