package admission

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	netutils "k8s.io/utils/net"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// want is one address or node port that the API server would take for a request: any that is free, or the one that the request names.
type want struct {
	use    v1alpha1.ClaimUse
	family v1alpha1.IPFamily // of an address, empty for a node port
	// index is where an address belongs in spec.clusterIPs.
	index int
	// ports are the spec.ports that get a node port, or the one that names it; none for that of the health check.
	ports []int
	// named is what the request asks for, the zero Lock if anything will do.
	named allocator.Lock
	// optional is the second address of a Service that only prefers to have two.
	optional bool
}

func (w want) isNamed() bool { return w.named != allocator.Lock{} }

// field is where the Service has what is wanted.
func (w want) field() string {
	switch {
	case w.family != "":
		return fmt.Sprintf("spec.clusterIPs[%d]", w.index)
	case w.use == v1alpha1.ClaimUseHealthCheckNodePort:
		return "spec.healthCheckNodePort"
	}
	return fmt.Sprintf("spec.ports[%d].nodePort", w.ports[0])
}

// plan is what a request wants besides what its Service has.
type plan struct {
	// service is as the API server has it when it begins to allocate: with what the client left out and the Service has, with its families settled.
	service *corev1.Service
	wants   []want
}

// newPlan finds out what the API server would allocate for a request. svc is as it arrived, old nil on CREATE; neither is changed. served are the families
// that the API server gives addresses of. first is the family that a Service gets which says nothing of families.
//
// It follows k8s.io/kubernetes v1.37 pkg/registry/core/service/storage: beginCreate, beginUpdate (storage.go) and what they call (alloc.go), step by step. Not ok
// means that the API server will refuse the request, and say best itself why.
func newPlan(svc, old *corev1.Service, served []v1alpha1.IPFamily, first v1alpha1.IPFamily) (p plan, ok bool) {
	svc = svc.DeepCopy()
	if old != nil {
		old = old.DeepCopy()
		defaultOnRead(old)
		carryOver(svc, old)
	}
	normalizeClusterIPs(svc, old)
	p.service = svc
	if svc.Spec.Type == corev1.ServiceTypeExternalName || isHeadless(svc) {
		return p, true
	}
	if !portsInBounds(svc) {
		return p, false
	}
	if !settleFamilies(svc, old, served, first) {
		return p, false
	}
	addresses, ok := wantedAddresses(svc, old)
	if !ok {
		return p, false
	}
	p.wants = addresses
	if old == nil {
		p.wants = append(p.wants, portsOnCreate(svc)...)
	} else {
		p.wants = append(p.wants, portsOnUpdate(svc, old)...)
	}
	if needsHealthCheckPort(svc) && (old == nil || !needsHealthCheckPort(old)) {
		p.wants = append(p.wants, want{use: v1alpha1.ClaimUseHealthCheckNodePort, named: portLock(svc.Spec.HealthCheckNodePort)})
	}
	return p, true
}

func portsInBounds(svc *corev1.Service) bool {
	return !slices.ContainsFunc(append(namedPorts(svc), svc.Spec.HealthCheckNodePort), func(p int32) bool { return p < 0 || p > 65535 })
}

// portLock is the lock on a port that a request names, the zero Lock if it names none.
func portLock(port int32) allocator.Lock { return allocator.PortLock(uint16(port)) }

// defaultOnRead completes a Service that was stored before clusterIPs and ipFamilies existed.
func defaultOnRead(svc *corev1.Service) {
	if svc.Spec.Type == corev1.ServiceTypeExternalName {
		return
	}
	normalizeClusterIPs(svc, nil)
	if len(svc.Spec.IPFamilies) > 0 || isHeadless(svc) {
		return
	}
	for _, ip := range svc.Spec.ClusterIPs {
		if a, ok := parseAddr(ip); ok {
			svc.Spec.IPFamilies = append(svc.Spec.IPFamilies, corev1.IPFamily(allocator.FamilyOf(a)))
		}
	}
	policy := corev1.IPFamilyPolicySingleStack
	if len(svc.Spec.IPFamilies) == 2 {
		policy = corev1.IPFamilyPolicyRequireDualStack
	}
	svc.Spec.IPFamilyPolicy = &policy
}

// carryOver fills in what the client left out and the Service has (patchAllocatedValues).
func carryOver(svc, old *corev1.Service) {
	if old.Spec.Type != corev1.ServiceTypeExternalName && svc.Spec.Type != corev1.ServiceTypeExternalName {
		if svc.Spec.ClusterIP == "" {
			svc.Spec.ClusterIP = old.Spec.ClusterIP
		}
		if len(svc.Spec.ClusterIPs) == 0 {
			svc.Spec.ClusterIPs = slices.Clone(old.Spec.ClusterIPs)
		}
	}
	if allocatesNodePorts(old) && allocatesNodePorts(svc) {
		byName := map[string]int32{}
		for _, p := range old.Spec.Ports {
			byName[p.Name] = p.NodePort
		}
		has, had := namedPorts(svc), namedPorts(old)
		for i := range svc.Spec.Ports {
			p := &svc.Spec.Ports[i]
			if was := byName[p.Name]; p.NodePort == 0 && !(slices.Contains(has, was) && slices.Contains(had, was)) {
				p.NodePort = was
			}
		}
	}
	if needsHealthCheckPort(old) && needsHealthCheckPort(svc) && svc.Spec.HealthCheckNodePort == 0 {
		svc.Spec.HealthCheckNodePort = old.Spec.HealthCheckNodePort
	}
}

// normalizeClusterIPs makes clusterIPs agree with clusterIP where the client, perhaps one that knows only the latter, meant it to.
func normalizeClusterIPs(svc, old *corev1.Service) {
	spec := &svc.Spec
	if old == nil {
		if spec.ClusterIP != "" && len(spec.ClusterIPs) == 0 {
			spec.ClusterIPs = []string{spec.ClusterIP}
		}
		return
	}
	if len(spec.ClusterIPs) == 0 && spec.ClusterIP == old.Spec.ClusterIP {
		spec.ClusterIPs = slices.Clone(old.Spec.ClusterIPs)
	}
	if spec.ClusterIP == old.Spec.ClusterIP || !slices.Equal(spec.ClusterIPs, old.Spec.ClusterIPs) {
		return
	}
	if spec.ClusterIP == "" {
		spec.ClusterIPs = nil
	} else {
		spec.ClusterIPs = []string{spec.ClusterIP}
	}
}

// settleFamilies gives a Service that has addresses its ipFamilyPolicy and ipFamilies (initIPFamilyFields). It says false if the API server refuses the request.
func settleFamilies(svc, old *corev1.Service, served []v1alpha1.IPFamily, first v1alpha1.IPFamily) bool {
	if keepsPreferDualStack(svc, old) {
		return true
	}
	spec := &svc.Spec
	if spec.IPFamilyPolicy == nil {
		policy := corev1.IPFamilyPolicySingleStack
		if old != nil && old.Spec.IPFamilyPolicy != nil {
			policy = *old.Spec.IPFamilyPolicy
		}
		spec.IPFamilyPolicy = &policy
	}
	if !agree(spec) {
		return false
	}
	single := *spec.IPFamilyPolicy == corev1.IPFamilyPolicySingleStack
	if old != nil && single {
		if slices.Equal(spec.ClusterIPs, old.Spec.ClusterIPs) {
			spec.ClusterIPs = spec.ClusterIPs[:min(1, len(spec.ClusterIPs))]
		}
		if slices.Equal(spec.IPFamilies, old.Spec.IPFamilies) {
			spec.IPFamilies = spec.IPFamilies[:min(1, len(spec.IPFamilies))]
		}
	} else if old != nil && (reduced(spec.ClusterIPs, old.Spec.ClusterIPs) || reduced(spec.IPFamilies, old.Spec.IPFamilies)) {
		return false
	}
	if single && (len(spec.ClusterIPs) == 2 || len(spec.IPFamilies) == 2) {
		return false
	}
	for i, ip := range spec.ClusterIPs {
		if i >= len(spec.IPFamilies) {
			a, _ := parseAddr(ip)
			spec.IPFamilies = append(spec.IPFamilies, corev1.IPFamily(allocator.FamilyOf(a)))
		}
	}
	if *spec.IPFamilyPolicy == corev1.IPFamilyPolicyRequireDualStack && len(served) < 2 {
		return false
	}
	for _, f := range spec.IPFamilies {
		if !slices.Contains(served, v1alpha1.IPFamily(f)) {
			return false
		}
	}
	if len(spec.IPFamilies) == 0 {
		spec.IPFamilies = []corev1.IPFamily{corev1.IPFamily(first)}
	}
	if !single && len(spec.IPFamilies) == 1 && len(served) == 2 {
		other := served[0]
		if v1alpha1.IPFamily(spec.IPFamilies[0]) == other {
			other = served[1]
		}
		spec.IPFamilies = append(spec.IPFamilies, corev1.IPFamily(other))
	}
	return true
}

// agree says whether clusterIP, clusterIPs, ipFamilies and ipFamilyPolicy fit together (ValidateServiceClusterIPsRelatedFields).
func agree(spec *corev1.ServiceSpec) bool {
	if spec.ClusterIP == "" && len(spec.ClusterIPs) > 0 || spec.ClusterIP != "" && (len(spec.ClusterIPs) == 0 || spec.ClusterIPs[0] != spec.ClusterIP) {
		return false
	}
	for i, f := range spec.IPFamilies {
		if f != corev1.IPv4Protocol && f != corev1.IPv6Protocol || slices.Contains(spec.IPFamilies[:i], f) {
			return false
		}
	}
	switch *spec.IPFamilyPolicy {
	case corev1.IPFamilyPolicySingleStack, corev1.IPFamilyPolicyPreferDualStack, corev1.IPFamilyPolicyRequireDualStack:
	default:
		return false
	}
	if len(spec.ClusterIPs) > 2 {
		return false
	}
	var families []corev1.IPFamily
	for i, ip := range spec.ClusterIPs {
		a, ok := parseAddr(ip)
		if !ok {
			return false
		}
		f := corev1.IPFamily(allocator.FamilyOf(a))
		if slices.Contains(families, f) || i < len(spec.IPFamilies) && spec.IPFamilies[i] != f {
			return false
		}
		families = append(families, f)
	}
	return true
}

func reduced[T any](now, was []T) bool { return len(now) > 0 && len(now) < len(was) }

// keepsPreferDualStack says whether an update leaves alone the addresses of a Service with PreferDualStack, however many families the cluster has by now
// (isMatchingPreferDualStackClusterIPFields).
func keepsPreferDualStack(svc, old *corev1.Service) bool {
	const prefer = corev1.IPFamilyPolicyPreferDualStack
	return old != nil && svc.Spec.IPFamilyPolicy != nil && *svc.Spec.IPFamilyPolicy == prefer &&
		(old.Spec.IPFamilyPolicy == nil || *old.Spec.IPFamilyPolicy == prefer) && svc.Spec.Type == old.Spec.Type &&
		svc.Spec.Type != corev1.ServiceTypeExternalName && slices.Equal(svc.Spec.ClusterIPs, old.Spec.ClusterIPs) && slices.Equal(svc.Spec.IPFamilies, old.Spec.IPFamilies)
}

// wantedAddresses are those that the API server would take: all of a new Service or of one that was ExternalName, the second of one that gets its second family
// (allocClusterIPs, updateClusterIPs). Not ok: the request names what is no address.
func wantedAddresses(svc, old *corev1.Service) (out []want, ok bool) {
	if keepsPreferDualStack(svc, old) {
		return nil, true
	}
	from := 0
	if old != nil && old.Spec.Type != corev1.ServiceTypeExternalName {
		if isHeadless(old) || len(old.Spec.IPFamilies) != 1 || len(svc.Spec.IPFamilies) != 2 {
			return nil, true
		}
		from = 1
	}
	for i := from; i < len(svc.Spec.IPFamilies); i++ {
		w := want{use: v1alpha1.ClaimUseClusterIP, family: v1alpha1.IPFamily(svc.Spec.IPFamilies[i]), index: i,
			optional: i == 1 && *svc.Spec.IPFamilyPolicy == corev1.IPFamilyPolicyPreferDualStack}
		if i < len(svc.Spec.ClusterIPs) {
			a, ok := parseAddr(svc.Spec.ClusterIPs[i])
			if !ok {
				return nil, false
			}
			w.named = allocator.AddrLock(a)
		}
		out = append(out, w)
	}
	return out, true
}

// portsOnCreate are the node ports that the API server would take for a new Service: one for all ports with the same number, which differ in protocol
// (initNodePorts).
func portsOnCreate(svc *corev1.Service) []want {
	var out []want
	if !hasNodePorts(svc) {
		return nil
	}
	byNumber := map[int32]int{} // index into out
	for i, p := range svc.Spec.Ports {
		if p.NodePort == 0 && !allocatesNodePorts(svc) {
			continue
		}
		first, known := byNumber[p.Port]
		switch {
		case !known:
			byNumber[p.Port] = len(out)
			out = append(out, firstOf(i, svc.Spec.Ports))
		case p.NodePort == 0 && !out[first].isNamed():
			out[first].ports = append(out[first].ports, i)
		case p.NodePort == 0: // the API server fills in what another port of the number names
		case portLock(p.NodePort) != out[first].named:
			out = append(out, want{use: v1alpha1.ClaimUseNodePort, ports: []int{i}, named: portLock(p.NodePort)})
		}
	}
	return distinct(out)
}

// firstOf is what is wanted for the first port of a number: any node port, or the first that the request names for the number (findRequestedNodePort).
func firstOf(i int, ports []corev1.ServicePort) want {
	for j, p := range ports {
		if p.Port == ports[i].Port && p.NodePort != 0 {
			return want{use: v1alpha1.ClaimUseNodePort, ports: []int{j}, named: portLock(p.NodePort)}
		}
	}
	return want{use: v1alpha1.ClaimUseNodePort, ports: []int{i}}
}

// portsOnUpdate are the node ports that the API server would take for an update: one for each port that has none, and those named that the Service
// did not have (updateNodePorts).
func portsOnUpdate(svc, old *corev1.Service) []want {
	if !hasNodePorts(svc) {
		return nil
	}
	var out []want
	had := namedPorts(old)
	for i, p := range svc.Spec.Ports {
		w := want{use: v1alpha1.ClaimUseNodePort, ports: []int{i}, named: portLock(p.NodePort)}
		if p.NodePort == 0 && allocatesNodePorts(svc) || p.NodePort != 0 && !slices.Contains(had, p.NodePort) {
			out = append(out, w)
		}
	}
	return distinct(out)
}

// distinct leaves the first of several wants that name the same port.
func distinct(wants []want) []want {
	var out []want
	for _, w := range wants {
		if !w.isNamed() || !slices.ContainsFunc(out, func(o want) bool { return o.named == w.named }) {
			out = append(out, w)
		}
	}
	return out
}

func namedPorts(svc *corev1.Service) []int32 {
	var out []int32
	for _, p := range svc.Spec.Ports {
		if p.NodePort != 0 {
			out = append(out, p.NodePort)
		}
	}
	return out
}

func hasNodePorts(svc *corev1.Service) bool {
	return svc.Spec.Type == corev1.ServiceTypeNodePort || svc.Spec.Type == corev1.ServiceTypeLoadBalancer
}

// allocatesNodePorts says whether ports without a node port get one.
func allocatesNodePorts(svc *corev1.Service) bool {
	return svc.Spec.Type == corev1.ServiceTypeNodePort ||
		svc.Spec.Type == corev1.ServiceTypeLoadBalancer && (svc.Spec.AllocateLoadBalancerNodePorts == nil || *svc.Spec.AllocateLoadBalancerNodePorts)
}

func needsHealthCheckPort(svc *corev1.Service) bool {
	return svc.Spec.Type == corev1.ServiceTypeLoadBalancer && svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
}

func isHeadless(svc *corev1.Service) bool { return svc.Spec.ClusterIP == corev1.ClusterIPNone }

// parseAddr reads an address as the API server does, which bears leading zeros.
func parseAddr(s string) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(netutils.ParseIPSloppy(s))
	return a.Unmap(), ok
}
