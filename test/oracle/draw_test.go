package oracle

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"
)

// here is the node for which both decide.
const here = "here"

var (
	families  = [][]string{{"10.99.0.1"}, {"fd00:99::1"}, {"10.99.0.1", "fd00:99::1"}, {"fd00:99::1", "10.99.0.1"}}
	externals = []string{"198.51.100.7", "2001:db8:7::7"}
	balancers = []string{"198.51.100.8", "198.51.100.9", "2001:db8:7::8"}
	ranges    = []string{"10.0.0.0/8", " 192.0.2.0/24 ", "fd00::/16", "0.0.0.0/0", "::/0"}
	portNames = []string{"http", "dns", "other"}
	protocols = []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP}
)

func drawWorld(t *rapid.T) *world {
	w := &world{service: drawService(t), node: &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: here}}}
	// A node without a zone, with an empty one, and with one: hints for zones mean something in the last only.
	switch zone := rapid.SampledFrom([]string{"absent", "", "a", "b"}).Draw(t, "zone"); zone {
	case "absent":
	default:
		w.node.Labels = map[string]string{corev1.LabelTopologyZone: zone}
	}
	known := map[string]*discoveryv1.Endpoint{}
	for i := range rapid.IntRange(0, 4).Draw(t, "slices") {
		w.slices = append(w.slices, drawSlice(t, i, known))
	}
	return w
}

func drawService(t *rapid.T) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "u1"}}
	s.Spec.Type = rapid.SampledFrom([]corev1.ServiceType{corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer}).Draw(t, "type")
	// Exception: a headless or ExternalName Service and one of another proxy gets no assignment at all; the controller's own tests hold it to that.
	s.Spec.ClusterIPs = rapid.SampledFrom(families).Draw(t, "cluster IPs")
	s.Spec.ClusterIP = s.Spec.ClusterIPs[0]
	for _, ip := range s.Spec.ClusterIPs {
		family := corev1.IPv4Protocol
		if strings.Contains(ip, ":") {
			family = corev1.IPv6Protocol
		}
		s.Spec.IPFamilies = append(s.Spec.IPFamilies, family)
	}
	for i, name := range portNames[:rapid.IntRange(1, 3).Draw(t, "ports")] {
		p := corev1.ServicePort{Name: name, Protocol: rapid.SampledFrom(protocols).Draw(t, "protocol"), Port: int32(80 + i)}
		if s.Spec.Type != corev1.ServiceTypeClusterIP && rapid.IntRange(0, 3).Draw(t, "node port") > 0 {
			p.NodePort = int32(30080 + i)
		}
		s.Spec.Ports = append(s.Spec.Ports, p)
	}
	if rapid.Bool().Draw(t, "affinity") {
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		// Exception: without a timeout we take the API server's default; kube-proxy relies on the API server to have set it.
		s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: new(int32(rapid.IntRange(1, 86400).Draw(t, "timeout")))}}
	}
	if rapid.Bool().Draw(t, "internal policy set") {
		policy := rapid.SampledFrom([]corev1.ServiceInternalTrafficPolicy{corev1.ServiceInternalTrafficPolicyCluster, corev1.ServiceInternalTrafficPolicyLocal}).Draw(t, "internal policy")
		s.Spec.InternalTrafficPolicy = &policy
	}
	s.Spec.ExternalIPs = some(t, "external IPs", externals)
	if s.Spec.Type != corev1.ServiceTypeClusterIP || len(s.Spec.ExternalIPs) > 0 {
		s.Spec.ExternalTrafficPolicy = rapid.SampledFrom([]corev1.ServiceExternalTrafficPolicy{corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal}).Draw(t, "external policy")
	}
	if s.Spec.Type == corev1.ServiceTypeLoadBalancer {
		drawLoadBalancer(t, s)
	}
	return s
}

func drawLoadBalancer(t *rapid.T, s *corev1.Service) {
	s.Spec.LoadBalancerSourceRanges = some(t, "source ranges", ranges)
	if s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal {
		s.Spec.HealthCheckNodePort = 31000
	}
	for _, ip := range some(t, "load-balancer IPs", balancers) {
		in := corev1.LoadBalancerIngress{IP: ip}
		if mode := rapid.SampledFrom([]corev1.LoadBalancerIPMode{"", corev1.LoadBalancerIPModeVIP, corev1.LoadBalancerIPModeProxy}).Draw(t, "ipMode"); mode != "" {
			in.IPMode = &mode
		}
		s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, in)
	}
	if rapid.Bool().Draw(t, "host name") {
		s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{Hostname: "lb.example"})
	}
}

// some gives a part of a list, in its order.
func some[T any](t *rapid.T, label string, list []T) (out []T) {
	mask := rapid.IntRange(0, 1<<len(list)-1).Draw(t, label)
	for i, v := range list {
		if mask>>i&1 == 1 {
			out = append(out, v)
		}
	}
	return out
}

// drawSlice draws an EndpointSlice. known holds what earlier ones say of each address.
func drawSlice(t *rapid.T, i int, known map[string]*discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprintf("web-%d", i), Labels: map[string]string{discoveryv1.LabelServiceName: "web"}}}
	s.AddressType = rapid.SampledFrom([]discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6, discoveryv1.AddressTypeIPv6, discoveryv1.AddressTypeFQDN}).Draw(t, "address type")
	for _, name := range some(t, "slice ports", portNames) {
		// Exception: a port without a name has the empty name for us; kube-proxy leaves it out. The API server sets the empty name.
		p := discoveryv1.EndpointPort{Name: &name, Protocol: new(rapid.SampledFrom(protocols).Draw(t, "protocol"))}
		// A named target port may have another number in every pod, so in every slice. No number: "all ports", which Services have no use for.
		if number := rapid.SampledFrom([]int32{0, 8080, 8081}).Draw(t, "number"); number != 0 {
			p.Port = &number
		}
		s.Ports = append(s.Ports, p)
	}
	for range rapid.IntRange(0, 5).Draw(t, "endpoints") {
		s.Endpoints = append(s.Endpoints, drawEndpoint(t, s.AddressType, known))
	}
	return s
}

// drawEndpoint draws an endpoint. An address may be there again, in the same slice or another: as it was (it moves between slices), or once as what terminates
// and once as what does not (a new pod has its address). Exception: of two records that contradict each other in another way kube-proxy takes whichever its
// map gives last, we take the one furthest from its end; see TestEndpointThatIsThereTwice in agent/compile.
func drawEndpoint(t *rapid.T, kind discoveryv1.AddressType, known map[string]*discoveryv1.Endpoint) discoveryv1.Endpoint {
	n := rapid.IntRange(1, 9).Draw(t, "address")
	address := map[discoveryv1.AddressType]string{
		discoveryv1.AddressTypeIPv4: fmt.Sprintf("10.244.0.%d", n), discoveryv1.AddressTypeIPv6: fmt.Sprintf("fd00:244::%d", n), discoveryv1.AddressTypeFQDN: fmt.Sprintf("host-%d.example", n),
	}[kind]
	e := discoveryv1.Endpoint{Addresses: []string{address}}
	if rapid.IntRange(0, 3).Draw(t, "more addresses") == 0 {
		e.Addresses = append(e.Addresses, "10.244.7.7") // kube-proxy and we use the first
	}
	e.Conditions.Ready, e.Conditions.Serving = drawCondition(t, "ready"), drawCondition(t, "serving")
	e.Conditions.Terminating = drawCondition(t, "terminating")
	if name := rapid.SampledFrom([]string{"", here, here, "elsewhere"}).Draw(t, "node"); name != "" {
		e.NodeName = &name
	}
	zones, nodes := some(t, "zone hints", []string{"a", "b"}), some(t, "node hints", []string{here, "elsewhere"})
	if len(zones)+len(nodes) > 0 {
		e.Hints = &discoveryv1.EndpointHints{}
	}
	for _, z := range zones {
		e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: z})
	}
	for _, n := range nodes {
		e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: n})
	}
	terminating := e.Conditions.Terminating != nil && *e.Conditions.Terminating
	key := fmt.Sprint(address, terminating)
	if before := known[key]; before != nil {
		return *before
	}
	known[key] = &e
	return e
}

func drawCondition(t *rapid.T, label string) *bool {
	switch rapid.SampledFrom([]string{"unknown", "yes", "no"}).Draw(t, label) {
	case "yes":
		return new(true)
	case "no":
		return new(false)
	}
	return nil
}
