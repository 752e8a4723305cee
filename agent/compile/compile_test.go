package compile

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

const thisNode = "node1"

// assignment is a Service with a ClusterIP, port 80 named http, changed by f.
func assignment(f func(*v1alpha1.ServiceAssignmentSpec)) *v1alpha1.ServiceAssignment {
	a := &v1alpha1.ServiceAssignment{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "1", Generation: 1},
		Spec: v1alpha1.ServiceAssignmentSpec{
			PolicyName: "orange",
			ProxyMode:  v1alpha1.ProxyModeNFTables,
			Scheduler:  v1alpha1.SchedulerRandom,
			ServiceIPs: []v1alpha1.ServiceIP{{IP: "10.99.0.1"}},
			Ports:      []v1alpha1.AssignmentPort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}},
		},
	}
	if f != nil {
		f(&a.Spec)
	}
	return a
}

// dualStack gives a Service an IPv6 address too.
func dualStack(s *v1alpha1.ServiceAssignmentSpec) {
	s.ServiceIPs = append(s.ServiceIPs, v1alpha1.ServiceIP{IP: "fd00:99::1"})
}

// endpoint reads "ADDRESS [notready] [serving] [terminating] [on=NODE] [fornode=NODE]... [forzone=ZONE]...".
func endpoint(t *testing.T, s string) discoveryv1.Endpoint {
	t.Helper()
	words := strings.Fields(s)
	e := discoveryv1.Endpoint{Addresses: words[:1]}
	yes, no := true, false
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "notready":
			e.Conditions.Ready, e.Conditions.Serving = &no, &no
		case "serving":
			e.Conditions.Serving = &yes
		case "terminating":
			e.Conditions.Terminating = &yes
		case "on":
			e.NodeName = &value
		case "fornode":
			if e.Hints == nil {
				e.Hints = &discoveryv1.EndpointHints{}
			}
			e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: value})
		case "forzone":
			if e.Hints == nil {
				e.Hints = &discoveryv1.EndpointHints{}
			}
			e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: value})
		default:
			t.Fatalf("no such word: %q", w)
		}
	}
	return e
}

func endpointSlice(t *testing.T, port int32, endpoints ...string) *discoveryv1.EndpointSlice {
	t.Helper()
	name, tcp := "http", corev1.ProtocolTCP
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "shop", Name: "web-1", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &tcp}},
	}
	for _, e := range endpoints {
		s.Endpoints = append(s.Endpoints, endpoint(t, e))
	}
	return s
}

func parsedSlice(t *testing.T, in *discoveryv1.EndpointSlice) *Slice {
	t.Helper()
	s, problems := ParseSlice(in, thisNode)
	if len(problems) > 0 {
		t.Fatalf("slice: %v", problems)
	}
	return s
}

func parsedAssignment(t *testing.T, in *v1alpha1.ServiceAssignment) *Assignment {
	t.Helper()
	a, problems := ParseAssignment(in)
	if len(problems) > 0 {
		t.Fatalf("assignment: %v", problems)
	}
	return a
}

func node(zone string) *Node {
	return &Node{Name: thisNode, Zone: zone, Labels: map[string]string{corev1.LabelTopologyZone: zone},
		Addresses: []netip.Prefix{netip.MustParsePrefix("192.168.0.1/32"), netip.MustParsePrefix("fd00:1::1/128")}}
}

// show writes a target as "forward ADDRESS* ADDRESS", a star at local endpoints, "drop" or "reject".
func show(t forwarding.Target) string {
	words := []string{"reject"}
	switch {
	case len(t.Endpoints) > 0:
		words[0] = "forward"
	case t.Elsewhere != 0:
		words[0] = "drop"
	}
	for _, e := range t.Endpoints {
		s := e.AddrPort.Addr().String()
		if e.Local {
			s += "*"
		}
		words = append(words, s)
	}
	return strings.Join(words, " ")
}

func TestWhereTrafficGoes(t *testing.T) {
	internalLocal := func(s *v1alpha1.ServiceAssignmentSpec) { s.InternalTrafficPolicy = "Local" }
	external := func(policy corev1.ServiceExternalTrafficPolicy) func(*v1alpha1.ServiceAssignmentSpec) {
		return func(s *v1alpha1.ServiceAssignmentSpec) {
			s.ExternalTrafficPolicy, s.Ports[0].NodePort = policy, 30080
		}
	}
	for _, tc := range []struct {
		name      string
		spec      func(*v1alpha1.ServiceAssignmentSpec)
		endpoints []string
		zone      string
		internal  string
		// external and fromHere are checked if not empty.
		external, fromHere string
	}{
		{name: "no endpoints at all are refused", internal: "reject"},
		{name: "endpoints that are neither ready nor serving are none", endpoints: []string{"10.1.0.1 notready", "10.1.0.2 notready terminating"}, internal: "reject"},
		{name: "a serving endpoint that is not terminating is none", endpoints: []string{"10.1.0.1 notready serving"}, internal: "reject"},
		{name: "ready endpoints", endpoints: []string{"10.1.0.2 on=node2", "10.1.0.1 on=node1"}, internal: "forward 10.1.0.1* 10.1.0.2"},
		{name: "ready endpoints before terminating ones", endpoints: []string{"10.1.0.1", "10.1.0.2 notready serving terminating"}, internal: "forward 10.1.0.1"},
		{name: "terminating endpoints that serve, if none is ready", endpoints: []string{"10.1.0.1 notready", "10.1.0.2 notready serving terminating", "10.1.0.3 notready terminating"},
			internal: "forward 10.1.0.2"},
		{name: "ready although terminating (publishNotReadyAddresses)", endpoints: []string{"10.1.0.1 terminating"}, internal: "forward 10.1.0.1"},

		{name: "internal Local", spec: internalLocal, endpoints: []string{"10.1.0.1 on=node1", "10.1.0.2 on=node2"}, internal: "forward 10.1.0.1*"},
		{name: "internal Local without a local one drops", spec: internalLocal, endpoints: []string{"10.1.0.2 on=node2"}, internal: "drop"},
		{name: "internal Local without any rejects", spec: internalLocal, endpoints: []string{"10.1.0.2 notready on=node2"}, internal: "reject"},
		{name: "internal Local falls back to its own terminating one", spec: internalLocal,
			endpoints: []string{"10.1.0.1 notready serving terminating on=node1", "10.1.0.2 on=node2"}, internal: "forward 10.1.0.1*"},
		{name: "internal Local drops if only others terminate", spec: internalLocal, endpoints: []string{"10.1.0.2 notready serving terminating on=node2"}, internal: "drop"},
		{name: "internal Local does not follow hints", spec: internalLocal, zone: "a",
			endpoints: []string{"10.1.0.1 on=node1 forzone=b", "10.1.0.2 on=node2 forzone=a"}, internal: "forward 10.1.0.1*"},

		{name: "external Cluster", spec: external("Cluster"), endpoints: []string{"10.1.0.1 on=node1", "10.1.0.2 on=node2"},
			internal: "forward 10.1.0.1* 10.1.0.2", external: "forward 10.1.0.1* 10.1.0.2", fromHere: "forward 10.1.0.1* 10.1.0.2"},
		{name: "external Local", spec: external("Local"), endpoints: []string{"10.1.0.1 on=node1", "10.1.0.2 on=node2"},
			internal: "forward 10.1.0.1* 10.1.0.2", external: "forward 10.1.0.1*", fromHere: "forward 10.1.0.1* 10.1.0.2"},
		{name: "external Local without a local one", spec: external("Local"), endpoints: []string{"10.1.0.2 on=node2"},
			internal: "forward 10.1.0.2", external: "drop", fromHere: "forward 10.1.0.2"},
		{name: "external Local falls back by itself", spec: external("Local"),
			endpoints: []string{"10.1.0.1 notready serving terminating on=node1", "10.1.0.2 on=node2"},
			internal:  "forward 10.1.0.2", external: "forward 10.1.0.1*", fromHere: "forward 10.1.0.2"},
		{name: "external Local without any", spec: external("Local"), internal: "reject", external: "reject", fromHere: "reject"},
		{name: "traffic from here is Cluster even if both policies are Local", spec: func(s *v1alpha1.ServiceAssignmentSpec) {
			internalLocal(s)
			external("Local")(s)
		}, endpoints: []string{"10.1.0.2 on=node2"}, internal: "drop", external: "drop", fromHere: "forward 10.1.0.2"},

		{name: "zone hints", zone: "a", endpoints: []string{"10.1.0.1 forzone=a", "10.1.0.2 forzone=b"}, internal: "forward 10.1.0.1"},
		{name: "several zones per endpoint", zone: "b", endpoints: []string{"10.1.0.1 forzone=a forzone=b", "10.1.0.2 forzone=c", "10.1.0.3 forzone=b"}, internal: "forward 10.1.0.1 10.1.0.3"},
		{name: "a zone is not its prefix", zone: "a", endpoints: []string{"10.1.0.1 forzone=ab forzone=c", "10.1.0.2 forzone=c"}, internal: "forward 10.1.0.1 10.1.0.2"},
		{name: "no hint for this zone", zone: "c", endpoints: []string{"10.1.0.1 forzone=a", "10.1.0.2 forzone=b"}, internal: "forward 10.1.0.1 10.1.0.2"},
		{name: "a node without a zone", zone: "", endpoints: []string{"10.1.0.1 forzone=a", "10.1.0.2 forzone=b"}, internal: "forward 10.1.0.1 10.1.0.2"},
		{name: "one ready endpoint without a hint: none counts", zone: "a", endpoints: []string{"10.1.0.1 forzone=a", "10.1.0.2"}, internal: "forward 10.1.0.1 10.1.0.2"},
		{name: "an endpoint that is not ready needs no hint", zone: "a", endpoints: []string{"10.1.0.1 forzone=a", "10.1.0.2 forzone=b", "10.1.0.3 notready"}, internal: "forward 10.1.0.1"},
		{name: "the zone's only endpoint not ready: all", zone: "a", endpoints: []string{"10.1.0.1 notready forzone=a", "10.1.0.2 forzone=b"}, internal: "forward 10.1.0.2"},
		{name: "node hints before zone hints", zone: "a",
			endpoints: []string{"10.1.0.1 forzone=a fornode=node1", "10.1.0.2 forzone=a fornode=node2"}, internal: "forward 10.1.0.1"},
		{name: "node hints for others: zone hints", zone: "a",
			endpoints: []string{"10.1.0.1 forzone=a fornode=node3", "10.1.0.2 forzone=b fornode=node2"}, internal: "forward 10.1.0.1"},
		{name: "one without a node hint: zone hints", zone: "a",
			endpoints: []string{"10.1.0.1 forzone=a fornode=node1", "10.1.0.2 forzone=a"}, internal: "forward 10.1.0.1 10.1.0.2"},
		{name: "hints do not reach terminating ones", zone: "a",
			endpoints: []string{"10.1.0.1 notready serving terminating forzone=b"}, internal: "forward 10.1.0.1"},

		{name: "each family decides by itself", endpoints: []string{"10.1.0.1", "10.1.0.2 notready serving terminating", "fd00::1 notready serving terminating", "fd00::2 notready"},
			internal: "forward 10.1.0.1 fd00::1"},
		{name: "each family follows its own hints", zone: "a", endpoints: []string{"10.1.0.1 forzone=a", "10.1.0.2 forzone=b", "fd00::1 forzone=b", "fd00::2"},
			internal: "forward 10.1.0.1 fd00::1 fd00::2"},
		{name: "one address twice: the pod that is not terminating", endpoints: []string{"10.1.0.1 notready terminating on=node2", "10.1.0.1 on=node1", "10.1.0.1 notready serving terminating on=node2"},
			internal: "forward 10.1.0.1*"},
		{name: "an IPv4 address written as IPv6", endpoints: []string{"::ffff:10.1.0.1", "10.1.0.1"}, internal: "forward 10.1.0.1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := parsedAssignment(t, assignment(tc.spec))
			got := Services(a, []*Slice{parsedSlice(t, endpointSlice(t, 8080, tc.endpoints...))}, node(tc.zone))
			if len(got) != 1 {
				t.Fatalf("%d services, want 1", len(got))
			}
			if s := show(got[0].Internal); s != tc.internal {
				t.Errorf("internal: %s, want %s", s, tc.internal)
			}
			if s := show(got[0].External); tc.external != "" && s != tc.external {
				t.Errorf("external: %s, want %s", s, tc.external)
			}
			if s := show(got[0].ExternalFromHere); tc.fromHere != "" && s != tc.fromHere {
				t.Errorf("external from here: %s, want %s", s, tc.fromHere)
			}
			if want := a.ExternalLocal && tc.external != ""; got[0].PreserveSource != want {
				t.Errorf("PreserveSource is %v", got[0].PreserveSource)
			}
		})
	}
}

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func TestEverythingButEndpoints(t *testing.T) {
	a := parsedAssignment(t, assignment(func(s *v1alpha1.ServiceAssignmentSpec) {
		s.Scheduler = v1alpha1.SchedulerSourceHash
		s.ServiceIPs = []v1alpha1.ServiceIP{{IP: "fd00:99::1"}, {IP: "10.99.0.2"}, {IP: "10.99.0.1"}}
		s.ExternalIPs = []string{"203.0.113.9", "10.99.0.1", "203.0.113.7"}
		s.LoadBalancerIPs = []string{"203.0.113.7", "2001:db8::7"}
		s.LoadBalancerSourceRanges = []string{"198.51.100.7/24", " 192.0.2.0/24"}
		s.SessionAffinitySeconds = 600
		s.NodePortAddresses = []string{"Localhost", "Primary", "192.168.7.9/24"}
		s.Ports = []v1alpha1.AssignmentPort{
			{Name: "https", Protocol: corev1.ProtocolTCP, Port: 443},
			{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80, NodePort: 30080},
			{Name: "dns", Protocol: corev1.ProtocolUDP, Port: 80},
		}
	}))
	web := endpointSlice(t, 8080, "10.1.0.1")
	dns, dnsPort, udp := "dns", int32(53), corev1.ProtocolUDP
	web.Ports = append(web.Ports, discoveryv1.EndpointPort{Name: &dns, Port: &dnsPort, Protocol: &udp})
	got := Services(a, []*Slice{parsedSlice(t, web)}, node("a"))
	target := func(addrPort string) forwarding.Target {
		return forwarding.Target{Endpoints: []forwarding.Endpoint{{AddrPort: netip.MustParseAddrPort(addrPort)}}}
	}
	base := forwarding.Service{
		Scheduler:       forwarding.SourceHash,
		ServiceIPs:      addrs("10.99.0.1", "10.99.0.2", "fd00:99::1"),
		ExternalIPs:     addrs("203.0.113.7", "203.0.113.9", "2001:db8::7"),
		LoadBalancerIPs: addrs("203.0.113.7"), // IPv6 has no ranges: open
		SourceRanges:    prefixes("192.0.2.0/24", "198.51.100.0/24"),
		Affinity:        10 * time.Minute,
	}
	key := func(port uint16, p forwarding.Protocol) forwarding.ServiceKey {
		return forwarding.ServiceKey{Namespace: "shop", Name: "web", Port: port, Protocol: p}
	}
	http, dnsService, https := base, base, base
	http.Key, http.NodePort = key(80, forwarding.TCP), 30080
	http.NodePortAddresses = prefixes("127.0.0.0/8", "192.168.0.1/32", "192.168.7.0/24", "::1/128", "fd00:1::1/128")
	http.Internal = target("10.1.0.1:8080")
	dnsService.Key, dnsService.Internal = key(80, forwarding.UDP), target("10.1.0.1:53")
	https.Key = key(443, forwarding.TCP)
	want := []*forwarding.Service{&http, &dnsService, &https}
	for _, s := range want {
		s.External, s.ExternalFromHere = s.Internal, s.Internal
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

func TestNodePortAddresses(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"", "192.168.0.1/32 fd00:1::1/128"},
		{"Primary", "192.168.0.1/32 fd00:1::1/128"},
		{"All", "0.0.0.0/0 ::/0"},
		{"Localhost", "127.0.0.0/8 ::1/128"},
		{"10.0.0.0/8 Primary 10.0.0.0/8", "10.0.0.0/8 192.168.0.1/32 fd00:1::1/128"},
	} {
		a := parsedAssignment(t, assignment(func(s *v1alpha1.ServiceAssignmentSpec) {
			dualStack(s)
			s.NodePortAddresses, s.Ports[0].NodePort = strings.Fields(tc.in), 30080
		}))
		if got := Services(a, nil, node(""))[0].NodePortAddresses; !slices.Equal(got, prefixes(strings.Fields(tc.want)...)) {
			t.Errorf("%q: %v, want %s", tc.in, got, tc.want)
		}
		a.Ports[0].NodePort = 0
		if got := Services(a, nil, node(""))[0].NodePortAddresses; got != nil {
			t.Errorf("%q without a node port: %v", tc.in, got)
		}
	}
}

func TestNodeSelector(t *testing.T) {
	a := parsedAssignment(t, assignment(func(s *v1alpha1.ServiceAssignmentSpec) {
		s.NodeSelector.MatchLabels = map[string]string{corev1.LabelTopologyZone: "a"}
	}))
	if got := Services(a, nil, node("a")); len(got) != 1 {
		t.Errorf("selected node: %d services, want 1", len(got))
	}
	if got := Services(a, nil, node("b")); len(got) != 0 {
		t.Errorf("node that is not selected: %d services, want none", len(got))
	}
}

func TestSourceRanges(t *testing.T) {
	for _, tc := range []struct {
		name, ips, ranges, guarded, want string
	}{
		{"none: open", "203.0.113.7", "", "", ""},
		{"everything: open", "203.0.113.7", "10.0.0.0/8 0.0.0.0/0", "", ""},
		{"each family by itself", "203.0.113.7 2001:db8::7", "10.0.0.0/8 ::/0", "203.0.113.7", "10.0.0.0/8"},
		{"unreadable is closed, not open", "203.0.113.7", "10.0.0.0", "203.0.113.7", "255.255.255.255/32"},
		{"the rest of an unreadable list stays in force", "203.0.113.7", "10.0.0.0 192.0.2.0/24", "203.0.113.7", "192.0.2.0/24"},
	} {
		a, _ := ParseAssignment(assignment(func(s *v1alpha1.ServiceAssignmentSpec) {
			dualStack(s)
			s.LoadBalancerIPs, s.LoadBalancerSourceRanges = strings.Fields(tc.ips), strings.Fields(tc.ranges)
		}))
		if !slices.Equal(a.LoadBalancerIPs, addrs(strings.Fields(tc.guarded)...)) || !slices.Equal(a.SourceRanges, prefixes(strings.Fields(tc.want)...)) {
			t.Errorf("%s: %v may be used from %v, want %s from %s", tc.name, a.LoadBalancerIPs, a.SourceRanges, tc.guarded, tc.want)
		}
	}
}

// A node that is in range may use a load-balancer address that is its own too; then it is the source as well.
func TestSourceRangesOfNode(t *testing.T) {
	for _, tc := range []struct{ name, ranges, want string }{
		{"neither", "198.51.100.0/24 2001:db8:9::/48", "198.51.100.0/24 2001:db8:9::/48"},
		{"IPv4", "198.51.100.0/24 192.168.0.0/16 2001:db8:9::/48", "192.168.0.0/16 198.51.100.0/24 203.0.113.7/32 2001:db8:9::/48"},
		{"IPv6", "198.51.100.0/24 fd00:1::/64", "198.51.100.0/24 2001:db8::7/128 fd00:1::/64"},
	} {
		a := parsedAssignment(t, assignment(func(s *v1alpha1.ServiceAssignmentSpec) {
			dualStack(s)
			s.LoadBalancerIPs, s.LoadBalancerSourceRanges = []string{"203.0.113.7", "2001:db8::7"}, strings.Fields(tc.ranges)
		}))
		before := slices.Clone(a.SourceRanges)
		for range 2 {
			if got := Services(a, nil, node(""))[0].SourceRanges; !slices.Equal(got, prefixes(strings.Fields(tc.want)...)) {
				t.Errorf("%s: %v, want %s", tc.name, got, tc.want)
			}
		}
		if !slices.Equal(a.SourceRanges, before) {
			t.Errorf("%s: the assignment's own ranges became %v", tc.name, a.SourceRanges)
		}
	}
}

// A Service exists in the families of its service IPs only. In others it could only refuse, and would refuse what somebody else serves there: a load balancer
// that translates, another socket of the node.
func TestFamilies(t *testing.T) {
	everywhere := func(s *v1alpha1.ServiceAssignmentSpec) {
		s.ExternalIPs, s.LoadBalancerIPs = []string{"203.0.113.9", "2001:db8::9"}, []string{"203.0.113.7", "2001:db8::7"}
		s.LoadBalancerSourceRanges = []string{"198.51.100.0/24", "2001:db8:9::/48"}
		s.NodePortAddresses, s.Ports[0].NodePort = []string{"All"}, 30080
	}
	got := Services(parsedAssignment(t, assignment(everywhere)), nil, node(""))[0]
	if !slices.Equal(got.ExternalIPs, addrs("203.0.113.7", "203.0.113.9")) || !slices.Equal(got.LoadBalancerIPs, addrs("203.0.113.7")) ||
		!slices.Equal(got.NodePortAddresses, prefixes("0.0.0.0/0")) {
		t.Errorf("an IPv4 Service is served at %v, guarded at %v, its node ports at %v", got.ExternalIPs, got.LoadBalancerIPs, got.NodePortAddresses)
	}
	got = Services(parsedAssignment(t, assignment(func(s *v1alpha1.ServiceAssignmentSpec) { dualStack(s); everywhere(s) })), nil, node(""))[0]
	if len(got.ExternalIPs) != 4 || len(got.LoadBalancerIPs) != 2 || len(got.NodePortAddresses) != 2 {
		t.Errorf("a dual-stack Service is served at %v, guarded at %v, its node ports at %v", got.ExternalIPs, got.LoadBalancerIPs, got.NodePortAddresses)
	}
}

func TestNothingToReachItBy(t *testing.T) {
	a := parsedAssignment(t, assignment(func(s *v1alpha1.ServiceAssignmentSpec) { s.ServiceIPs = nil }))
	if got := Services(a, nil, node("")); len(got) != 0 {
		t.Errorf("a Service without any address: %d services, want none", len(got))
	}
}

// What cannot be read is named, and the rest is in force.
func TestBadAssignment(t *testing.T) {
	a, problems := ParseAssignment(assignment(func(s *v1alpha1.ServiceAssignmentSpec) {
		s.ServiceIPs = append(s.ServiceIPs, v1alpha1.ServiceIP{IP: "10.99.0.300"})
		s.ExternalIPs = []string{"fe80::1%eth0", "203.0.113.9"}
		s.LoadBalancerIPs = []string{"lb.example.org"}
		s.NodePortAddresses = []string{"Everywhere"}
		s.Scheduler = "Fastest"
		s.Ports = append(s.Ports, v1alpha1.AssignmentPort{Protocol: "QUIC", Port: 1}, v1alpha1.AssignmentPort{Protocol: "UDP", Port: 70000})
		s.NodeSelector.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Near"}}
	}))
	var got []string
	for _, p := range problems {
		got = append(got, p.Field+"="+p.Value)
		if p.Reason == "" {
			t.Errorf("%v: says no reason", p)
		}
	}
	want := []string{"spec.scheduler=Fastest", "spec.ports[1].protocol=QUIC", "spec.ports[2].port=70000", "spec.serviceIPs[1].ip=10.99.0.300",
		"spec.externalIPs[0]=fe80::1%eth0", "spec.loadBalancerIPs[0]=lb.example.org", "spec.nodeSelector=a Near", "spec.nodePortAddresses[0]=Everywhere"}
	for i := range got {
		if strings.HasPrefix(got[i], "spec.nodeSelector=") {
			got[i] = "spec.nodeSelector=a Near"
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if !slices.Equal(a.ServiceIPs, addrs("10.99.0.1")) || !slices.Equal(a.ExternalIPs, addrs("203.0.113.9")) || len(a.Ports) != 1 {
		t.Errorf("the rest is not in force: %+v", a)
	}
	if got := Services(a, nil, node("")); len(got) != 0 {
		t.Error("an unreadable node selector selects a node")
	}
}

func TestBadSlice(t *testing.T) {
	in := endpointSlice(t, 8080, "10.1.0.1", "10.1.0.300", "10.1.0.2")
	in.Endpoints = append(in.Endpoints, discoveryv1.Endpoint{})
	none := int32(0)
	in.Ports = append(in.Ports, discoveryv1.EndpointPort{}, discoveryv1.EndpointPort{Port: &none})
	s, problems := ParseSlice(in, thisNode)
	var got []string
	for _, p := range problems {
		got = append(got, p.Error())
	}
	want := []string{`ports[2].port: "0": must be from 1 to 65535`, `endpoints[1].addresses[0]: "10.1.0.300": must be an IP address without a zone`,
		`endpoints[3].addresses: "": must have an address`}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if len(s.Endpoints) != 2 || len(s.Ports) != 1 {
		t.Errorf("the rest is not in force: %+v", s)
	}
	in.AddressType = discoveryv1.AddressTypeFQDN
	if s, problems := ParseSlice(in, thisNode); len(s.Endpoints) != 0 || len(problems) != 0 {
		t.Errorf("host names: %+v, %v", s, problems)
	}
}

func TestParseNode(t *testing.T) {
	in := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: thisNode, Labels: map[string]string{corev1.LabelTopologyZone: "a"}}}
	address := func(kind corev1.NodeAddressType, ip string) corev1.NodeAddress {
		return corev1.NodeAddress{Type: kind, Address: ip}
	}
	in.Status.Addresses = []corev1.NodeAddress{address("Hostname", thisNode), address("ExternalIP", "203.0.113.1"), address("InternalIP", "fd00:1::1"), address("InternalIP", "192.168.0.1")}
	n, problems := ParseNode(in)
	if len(problems) != 0 || n.Zone != "a" || n.Leaving || !slices.Equal(n.Addresses, node("a").Addresses) {
		t.Errorf("got %+v, %v", n, problems)
	}
	in.Status.Addresses = in.Status.Addresses[:2]
	in.Spec.Taints = []corev1.Taint{{Key: toBeDeletedTaint}}
	m, _ := ParseNode(in)
	if !slices.Equal(m.Addresses, prefixes("203.0.113.1/32")) || !m.Leaving {
		t.Errorf("got %+v", m)
	}
	if n.SameForwarding(m) || !n.SameForwarding(node("a")) {
		t.Error("SameForwarding does not compare what compile uses")
	}
}
