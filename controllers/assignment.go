package controllers

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// defaultAffinitySeconds is the API server's default for sessionAffinityConfig.clientIP.timeoutSeconds.
const defaultAffinitySeconds = 10800

// CompileAssignment says what agents must know of a Service that a policy covers and to which additional addresses and VIPs were given. It is pure. Addresses
// are in canonical form whatever form the Service has them in (10.0.0.01 and ::ffff:10.0.0.1 are valid in old objects), and what is no
// address at all is left out: agents could not use it.
func CompileAssignment(svc *corev1.Service, policy *v1alpha1.ServiceProxyPolicy, additional, vips []netip.Addr) v1alpha1.ServiceAssignmentSpec {
	s := &svc.Spec
	out := v1alpha1.ServiceAssignmentSpec{
		PolicyName:            policy.Name,
		ServiceUID:            svc.UID,
		ProxyMode:             policy.Spec.ProxyMode,
		Scheduler:             policy.Spec.Scheduler,
		ExternalIPs:           canonicalAddrs(s.ExternalIPs),
		InternalTrafficPolicy: corev1.ServiceInternalTrafficPolicyCluster,
		ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyCluster,
		NodeSelector:          *policy.Spec.NodeSelector.DeepCopy(),
		NodePortAddresses:     slices.Clone(policy.Spec.NodePortAddresses),
		HealthCheckNodePort:   s.HealthCheckNodePort,
	}
	if out.ProxyMode == "" {
		out.ProxyMode = v1alpha1.ProxyModeNFTables
	}
	if out.Scheduler == "" {
		out.Scheduler = v1alpha1.SchedulerRandom
		if out.ProxyMode == v1alpha1.ProxyModeIPVS {
			out.Scheduler = v1alpha1.SchedulerRoundRobin
		}
	}
	for _, ip := range canonicalAddrs(clusterIPs(svc)) {
		out.ServiceIPs = append(out.ServiceIPs, v1alpha1.ServiceIP{IP: ip, Source: v1alpha1.ServiceIPSourceClusterIP})
	}
	for _, a := range additional {
		out.ServiceIPs = append(out.ServiceIPs, v1alpha1.ServiceIP{IP: a.String(), Source: v1alpha1.ServiceIPSourceAdditional})
	}
	for _, p := range s.Ports {
		port := v1alpha1.AssignmentPort{Name: p.Name, Protocol: p.Protocol, Port: p.Port, NodePort: p.NodePort}
		if port.Protocol == "" {
			port.Protocol = corev1.ProtocolTCP
		}
		out.Ports = append(out.Ports, port)
	}
	if s.InternalTrafficPolicy != nil {
		out.InternalTrafficPolicy = *s.InternalTrafficPolicy
	}
	if s.ExternalTrafficPolicy != "" {
		out.ExternalTrafficPolicy = s.ExternalTrafficPolicy
	}
	if s.TrafficDistribution != nil {
		out.TrafficDistribution = *s.TrafficDistribution
	}
	if s.SessionAffinity == corev1.ServiceAffinityClientIP {
		out.SessionAffinitySeconds = defaultAffinitySeconds
		if c := s.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
			out.SessionAffinitySeconds = *c.ClientIP.TimeoutSeconds
		}
	}
	if s.Type == corev1.ServiceTypeLoadBalancer {
		out.LoadBalancerIPs = loadBalancerIPs(svc, vips)
		out.LoadBalancerSourceRanges = canonicalPrefixes(s.LoadBalancerSourceRanges)
	}
	return out
}

// loadBalancerIPs are the load-balancer addresses that nodes forward. A Service of our class has vips, whatever its status says: that follows. For any other class
// they are those of its status with ipMode VIP, which is also what an absent ipMode means. With ipMode Proxy traffic must pass the load balancer, so
// nodes leave the address alone.
func loadBalancerIPs(svc *corev1.Service, vips []netip.Addr) []string {
	var ips []string
	if wantsVIPs(svc) {
		for _, a := range vips {
			ips = append(ips, a.String())
		}
		return ips
	}
	for _, in := range svc.Status.LoadBalancer.Ingress {
		if in.IP != "" && (in.IPMode == nil || *in.IPMode == corev1.LoadBalancerIPModeVIP) {
			ips = append(ips, in.IP)
		}
	}
	return canonicalAddrs(ips)
}

// clusterIPs are the Service's addresses of both families, also of objects from before clusterIPs existed.
func clusterIPs(svc *corev1.Service) []string {
	if len(svc.Spec.ClusterIPs) > 0 {
		return svc.Spec.ClusterIPs
	}
	return []string{svc.Spec.ClusterIP}
}

// clusterAddrs are the Service's cluster IPs, parsed.
func clusterAddrs(svc *corev1.Service) []netip.Addr {
	var out []netip.Addr
	for _, s := range canonicalAddrs(clusterIPs(svc)) {
		out = append(out, netip.MustParseAddr(s)) // canonicalAddrs gives nothing else
	}
	return out
}

// canonicalAddrs keeps the order and drops duplicates and what is no address.
func canonicalAddrs(in []string) []string {
	var out []string
	for _, s := range in {
		a, ok := parseAddrSloppy(s)
		if !ok {
			continue
		}
		if c := a.String(); !slices.Contains(out, c) {
			out = append(out, c)
		}
	}
	return out
}

func canonicalPrefixes(in []string) []string {
	var out []string
	for _, s := range in {
		p, ok := parsePrefixSloppy(s)
		if !ok {
			continue
		}
		if c := p.String(); !slices.Contains(out, c) {
			out = append(out, c)
		}
	}
	return out
}
