package admission

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

var (
	v4Only = []v1alpha1.IPFamily{v1alpha1.IPv4}
	both   = []v1alpha1.IPFamily{v1alpha1.IPv4, v1alpha1.IPv6}
)

// svc makes a Service as the API server's defaulting leaves it.
func svc(kind corev1.ServiceType, change ...func(*corev1.ServiceSpec)) *corev1.Service {
	s := &corev1.Service{Spec: corev1.ServiceSpec{Type: kind, Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: "TCP"}}}}
	if kind == corev1.ServiceTypeLoadBalancer {
		s.Spec.AllocateLoadBalancerNodePorts = new(true)
	}
	for _, c := range change {
		c(&s.Spec)
	}
	return s
}

func ips(all ...string) func(*corev1.ServiceSpec) {
	return func(s *corev1.ServiceSpec) { s.ClusterIP, s.ClusterIPs = all[0], all }
}

func stack(policy corev1.IPFamilyPolicy, families ...corev1.IPFamily) func(*corev1.ServiceSpec) {
	return func(s *corev1.ServiceSpec) { s.IPFamilyPolicy, s.IPFamilies = &policy, families }
}

// ports replaces the ports: "NAME PORT/PROTOCOL NODEPORT".
func ports(all ...string) func(*corev1.ServiceSpec) {
	return func(s *corev1.ServiceSpec) {
		s.Ports = nil
		for _, text := range all {
			var p corev1.ServicePort
			var protocol string
			if _, err := fmt.Sscanf(strings.ReplaceAll(text, "/", " "), "%s %d %s %d", &p.Name, &p.Port, &protocol, &p.NodePort); err != nil {
				panic(err)
			}
			p.Protocol = corev1.Protocol(protocol)
			s.Ports = append(s.Ports, p)
		}
	}
}

func local(s *corev1.ServiceSpec) {
	s.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
}

func healthCheck(port int32) func(*corev1.ServiceSpec) {
	return func(s *corev1.ServiceSpec) { s.HealthCheckNodePort = port }
}

// describeWants is one word for each want: where it goes, what it is, "?" if optional.
func describeWants(p plan) string {
	var out []string
	for _, w := range p.wants {
		what := "port" + strings.ReplaceAll(strings.Trim(fmt.Sprint(w.ports), "[]"), " ", ",")
		switch {
		case w.family != "":
			what = fmt.Sprintf("ip%d:%s", w.index, w.family)
		case w.use == v1alpha1.ClaimUseHealthCheckNodePort:
			what = "health"
		}
		if w.isNamed() {
			what += "=" + strings.TrimPrefix(w.named.String(), "node port ")
		}
		if w.optional {
			what += "?"
		}
		out = append(out, what)
	}
	return strings.Join(out, " ")
}

const (
	single, prefer, require = corev1.IPFamilyPolicySingleStack, corev1.IPFamilyPolicyPreferDualStack, corev1.IPFamilyPolicyRequireDualStack
	clusterIP, nodePort     = corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort
	loadBalancer, external  = corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeExternalName
	refused                 = "refused"
)

func TestPlan(t *testing.T) {
	had := func(kind corev1.ServiceType, more ...func(*corev1.ServiceSpec)) *corev1.Service {
		return svc(kind, append([]func(*corev1.ServiceSpec){ips("10.96.0.9"), stack(single, "IPv4")}, more...)...)
	}
	dual := func(kind corev1.ServiceType, more ...func(*corev1.ServiceSpec)) *corev1.Service {
		return svc(kind, append([]func(*corev1.ServiceSpec){ips("10.96.0.9", "fd00::9"), stack(require, "IPv4", "IPv6")}, more...)...)
	}
	noPorts := func(s *corev1.ServiceSpec) { s.AllocateLoadBalancerNodePorts = new(false) }
	for name, tc := range map[string]struct {
		svc, old *corev1.Service
		served   []v1alpha1.IPFamily // default: both
		first    v1alpha1.IPFamily   // default: the first of served
		want     string
	}{
		// CREATE, addresses.
		"plain":                              {svc: svc(clusterIP), want: "ip0:IPv4"},
		"plain, the policy has IPv6 only":    {svc: svc(clusterIP), first: v1alpha1.IPv6, want: "ip0:IPv6"},
		"families said, the policy's or not": {svc: svc(clusterIP, stack(single, "IPv4")), first: v1alpha1.IPv6, want: "ip0:IPv4"},
		"prefer":                             {svc: svc(clusterIP, stack(prefer)), want: "ip0:IPv4 ip1:IPv6?"},
		"prefer, IPv6 first":                 {svc: svc(clusterIP, stack(prefer, "IPv6")), want: "ip0:IPv6 ip1:IPv4?"},
		"prefer in a cluster of one family":  {svc: svc(clusterIP, stack(prefer)), served: v4Only, want: "ip0:IPv4"},
		"require":                            {svc: svc(clusterIP, stack(require)), want: "ip0:IPv4 ip1:IPv6"},
		"require in a cluster of one family": {svc: svc(clusterIP, stack(require)), served: v4Only, want: refused},
		"a family the cluster has not":       {svc: svc(clusterIP, stack(single, "IPv6")), served: v4Only, want: refused},
		"an address of a family it has not":  {svc: svc(clusterIP, ips("fd00::1")), served: v4Only, want: refused},
		"one family twice":                   {svc: svc(clusterIP, stack(require, "IPv4", "IPv4")), want: refused},
		"two families in a single stack":     {svc: svc(clusterIP, stack(single, "IPv4", "IPv6")), want: refused},
		"named":                              {svc: svc(clusterIP, ips("10.96.0.9")), want: "ip0:IPv4=10.96.0.9"},
		"named, singular only":               {svc: svc(clusterIP, func(s *corev1.ServiceSpec) { s.ClusterIP = "10.96.0.9" }), want: "ip0:IPv4=10.96.0.9"},
		"named, plural only":                 {svc: svc(clusterIP, func(s *corev1.ServiceSpec) { s.ClusterIPs = []string{"10.96.0.9"} }), want: refused},
		"named, leading zeros":               {svc: svc(clusterIP, ips("010.096.000.009")), want: "ip0:IPv4=10.96.0.9"},
		"named, not an address":              {svc: svc(clusterIP, ips("10.96.0")), want: refused},
		"named, against ipFamilies":          {svc: svc(clusterIP, ips("10.96.0.9"), stack(single, "IPv6")), want: refused},
		"named IPv6 decides the family":      {svc: svc(clusterIP, ips("fd00::9")), want: "ip0:IPv6=fd00::9"},
		"one named of two":                   {svc: svc(clusterIP, ips("fd00::9"), stack(prefer)), want: "ip0:IPv6=fd00::9 ip1:IPv4?"},
		"two named":                          {svc: svc(clusterIP, ips("fd00::9", "10.96.0.9"), stack(require)), want: "ip0:IPv6=fd00::9 ip1:IPv4=10.96.0.9"},
		"two named of one family":            {svc: svc(clusterIP, ips("10.96.0.8", "10.96.0.9"), stack(require)), want: refused},
		"two named in a single stack":        {svc: svc(clusterIP, ips("fd00::9", "10.96.0.9")), want: refused},
		"headless":                           {svc: svc(clusterIP, ips("None")), want: ""},
		"headless with node ports":           {svc: svc(nodePort, ips("None")), want: ""},
		"ExternalName":                       {svc: svc(external), want: ""},
		// CREATE, node ports.
		"node port":                             {svc: svc(nodePort), want: "ip0:IPv4 port0"},
		"node port named":                       {svc: svc(nodePort, ports("a 80/TCP 30080")), want: "ip0:IPv4 port0=30080"},
		"node port out of bounds":               {svc: svc(nodePort, ports("a 80/TCP 70000")), want: refused},
		"TCP and UDP of one number":             {svc: svc(nodePort, ports("a 53/TCP 0", "b 80/TCP 0", "c 53/UDP 0")), want: "ip0:IPv4 port0,2 port1"},
		"TCP and UDP, the second named":         {svc: svc(nodePort, ports("a 53/TCP 0", "c 53/UDP 30053")), want: "ip0:IPv4 port1=30053"},
		"TCP and UDP, both named the same":      {svc: svc(nodePort, ports("a 53/TCP 30053", "c 53/UDP 30053")), want: "ip0:IPv4 port0=30053"},
		"TCP and UDP, both named, different":    {svc: svc(nodePort, ports("a 53/TCP 30053", "c 53/UDP 30054")), want: "ip0:IPv4 port0=30053 port1=30054"},
		"load balancer":                         {svc: svc(loadBalancer), want: "ip0:IPv4 port0"},
		"load balancer without node ports":      {svc: svc(loadBalancer, noPorts), want: "ip0:IPv4"},
		"load balancer without, but one named":  {svc: svc(loadBalancer, noPorts, ports("a 80/TCP 0", "b 81/TCP 30081")), want: "ip0:IPv4 port1=30081"},
		"load balancer, local":                  {svc: svc(loadBalancer, local), want: "ip0:IPv4 port0 health"},
		"load balancer, local, port named":      {svc: svc(loadBalancer, local, healthCheck(30001)), want: "ip0:IPv4 port0 health=30001"},
		"NodePort, local":                       {svc: svc(nodePort, local), want: "ip0:IPv4 port0"},
		"ClusterIP with a node port is refused": {svc: svc(clusterIP, ports("a 80/TCP 30080")), want: "ip0:IPv4"},
		// UPDATE, what is left out is carried over.
		"PUT without what was allocated": {
			old: dual(loadBalancer, local, healthCheck(30001), ports("a 80/TCP 30080", "b 81/TCP 30081")),
			svc: svc(loadBalancer, local, ports("a 80/TCP 0", "b 81/TCP 0")), want: ""},
		"PUT without, ports renumbered, told by name": {
			old: had(nodePort, ports("a 80/TCP 30080", "b 81/TCP 30081")), svc: svc(nodePort, ports("b 91/TCP 0", "a 90/TCP 0")), want: ""},
		"PUT without, a node port moved to another": {
			old: had(nodePort, ports("a 80/TCP 30080", "b 81/TCP 30081")), svc: svc(nodePort, ports("a 80/TCP 30081", "b 81/TCP 0")), want: "port1"},
		"PUT by a client of one clusterIP only": {
			old: had(clusterIP), svc: svc(clusterIP, func(s *corev1.ServiceSpec) { s.ClusterIP = "10.96.0.9" }), want: ""},
		"nothing changes": {old: dual(nodePort, ports("a 80/TCP 30080")), svc: dual(nodePort, ports("a 80/TCP 30080")), want: ""},
		// UPDATE, what is newly needed.
		"ExternalName to ClusterIP":       {old: svc(external), svc: svc(clusterIP), want: "ip0:IPv4"},
		"ExternalName to dual NodePort":   {old: svc(external), svc: svc(nodePort, stack(require)), want: "ip0:IPv4 ip1:IPv6 port0"},
		"ExternalName to a named address": {old: svc(external), svc: svc(clusterIP, ips("10.96.0.9")), want: "ip0:IPv4=10.96.0.9"},
		"ClusterIP to ExternalName":       {old: had(clusterIP), svc: svc(external), want: ""},
		"single to dual":                  {old: had(clusterIP), svc: had(clusterIP, stack(require)), want: "ip1:IPv6"},
		"single to dual, by PUT":          {old: had(clusterIP), svc: svc(clusterIP, stack(prefer)), want: "ip1:IPv6?"},
		"single to dual, named":           {old: had(clusterIP), svc: svc(clusterIP, ips("10.96.0.9", "fd00::9"), stack(require)), want: "ip1:IPv6=fd00::9"},
		"dual to single":                  {old: dual(clusterIP), svc: dual(clusterIP, stack(single, "IPv4", "IPv6")), want: ""},
		"dual to single, not said":        {old: dual(clusterIP), svc: dual(clusterIP, ips("10.96.0.9")), want: refused},
		"prefers two, has one, says so again": {
			old: had(clusterIP, stack(prefer, "IPv4")), svc: had(clusterIP, stack(prefer, "IPv4")), want: ""},
		"prefers two, has one, now requires": {
			old: had(clusterIP, stack(prefer, "IPv4")), svc: had(clusterIP, stack(require, "IPv4")), want: "ip1:IPv6"},
		"headless stays":                    {old: svc(clusterIP, ips("None"), stack(single, "IPv4")), svc: svc(clusterIP, stack(prefer)), want: ""},
		"to NodePort":                       {old: had(clusterIP), svc: had(nodePort), want: "port0"},
		"to LoadBalancer, local":            {old: had(clusterIP), svc: had(loadBalancer, local), want: "port0 health"},
		"NodePort to LoadBalancer":          {old: had(nodePort, ports("a 80/TCP 30080")), svc: had(loadBalancer, ports("a 80/TCP 0")), want: ""},
		"to ClusterIP":                      {old: had(nodePort, ports("a 80/TCP 30080")), svc: had(clusterIP, ports("a 80/TCP 30080")), want: ""},
		"a port more":                       {old: had(nodePort, ports("a 80/TCP 30080")), svc: had(nodePort, ports("a 80/TCP 30080", "b 81/TCP 0")), want: "port1"},
		"a port more, named":                {old: had(nodePort, ports("a 80/TCP 30080")), svc: had(nodePort, ports("a 80/TCP 0", "b 81/TCP 30081")), want: "port1=30081"},
		"TCP and UDP at once, each its own": {old: had(clusterIP), svc: had(nodePort, ports("a 53/TCP 0", "b 53/UDP 0")), want: "port0 port1"},
		"another node port":                 {old: had(nodePort, ports("a 80/TCP 30080")), svc: had(nodePort, ports("a 80/TCP 30081")), want: "port0=30081"},
		"to local":                          {old: had(loadBalancer, ports("a 80/TCP 30080")), svc: had(loadBalancer, local, ports("a 80/TCP 30080")), want: "health"},
		"node ports wanted after all":       {old: had(loadBalancer, noPorts), svc: had(loadBalancer), want: "port0"},
		"node ports not wanted any more":    {old: had(loadBalancer, ports("a 80/TCP 30080")), svc: had(loadBalancer, noPorts, ports("a 80/TCP 0")), want: ""},
		"stored before ipFamilies existed":  {old: svc(clusterIP, func(s *corev1.ServiceSpec) { s.ClusterIP = "10.96.0.9" }), svc: svc(clusterIP, stack(require)), want: "ip1:IPv6"},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.served == nil {
				tc.served = both
			}
			if tc.first == "" {
				tc.first = tc.served[0]
			}
			before := tc.svc.DeepCopy()
			p, ok := newPlan(tc.svc, tc.old, tc.served, tc.first)
			got := describeWants(p)
			if !ok {
				got = refused
			}
			if got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
			if !equalServices(before, tc.svc) {
				t.Errorf("the request was changed")
			}
		})
	}
}
