package compile

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unique"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// Assignment is what an agent keeps of a ServiceAssignment. It is immutable: its slices are shared with compiled services.
type Assignment struct {
	Namespace, Name string
	UID             types.UID
	Generation      int64
	Created         time.Time

	Mode      v1alpha1.ProxyMode
	Scheduler forwarding.Scheduler
	Ports     []Port

	// ServiceIPs, ExternalIPs, LoadBalancerIPs and SourceRanges are as in forwarding.Service.
	ServiceIPs, ExternalIPs, LoadBalancerIPs []netip.Addr
	SourceRanges                             []netip.Prefix
	// Families are those of ServiceIPs: the Service exists in no other.
	Families forwarding.Families

	Affinity                     time.Duration
	InternalLocal, ExternalLocal bool

	// HealthCheckNodePort is where load balancers ask for endpoints on this node, 0 for nowhere.
	HealthCheckNodePort uint16

	// NodeSelector is nil if all nodes are selected.
	NodeSelector      labels.Selector
	NodePortAddresses NodePortAddresses
}

// Port is one port of a Service.
type Port struct {
	// Name is how EndpointSlices refer to the port.
	Name           string
	Protocol       forwarding.Protocol
	Port, NodePort uint16
}

// NodePortAddresses says on which addresses of a node its node ports are served.
type NodePortAddresses struct {
	Primary, Localhost, All bool
	CIDRs                   []netip.Prefix
}

// ParseAssignment gives the compact form of an assignment and what was left out of it.
func ParseAssignment(in *v1alpha1.ServiceAssignment) (*Assignment, []Problem) {
	var bad problems
	spec := &in.Spec
	out := &Assignment{
		Namespace:     intern(in.Namespace),
		Name:          in.Name,
		UID:           in.UID,
		Generation:    in.Generation,
		Created:       in.CreationTimestamp.Time,
		Mode:          v1alpha1.ProxyMode(intern(string(spec.ProxyMode))),
		Affinity:      time.Duration(spec.SessionAffinitySeconds) * time.Second,
		InternalLocal: spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal,
		ExternalLocal: spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal,
	}
	var ok bool
	if out.Scheduler, ok = schedulers[spec.Scheduler]; !ok {
		bad.add("spec.scheduler", string(spec.Scheduler), "not a scheduler of this agent; Random is used instead")
	}
	if p := spec.HealthCheckNodePort; p < 0 || p > 65535 {
		bad.add("spec.healthCheckNodePort", fmt.Sprint(p), "must be from 1 to 65535, or absent")
	} else if out.ExternalLocal {
		out.HealthCheckNodePort = uint16(p)
	}
	out.parsePorts(spec.Ports, &bad)
	out.parseAddresses(spec, &bad)
	out.NodeSelector = parseNodeSelector(&spec.NodeSelector, &bad)
	out.NodePortAddresses = parseNodePortAddresses(spec.NodePortAddresses, &bad)
	return out, bad
}

var schedulers = map[v1alpha1.Scheduler]forwarding.Scheduler{
	"":                                forwarding.Random,
	v1alpha1.SchedulerRandom:          forwarding.Random,
	v1alpha1.SchedulerRoundRobin:      forwarding.RoundRobin,
	v1alpha1.SchedulerLeastConnection: forwarding.LeastConnection,
	v1alpha1.SchedulerSourceHash:      forwarding.SourceHash,
	v1alpha1.SchedulerMaglev:          forwarding.Maglev,
}

func (a *Assignment) parsePorts(ports []v1alpha1.AssignmentPort, bad *problems) {
	a.Ports = make([]Port, 0, len(ports))
	for i, p := range ports {
		field := func(name string) string { return fmt.Sprintf("spec.ports[%d].%s", i, name) }
		protocol, ok := parseProtocol(p.Protocol)
		if !ok {
			bad.add(field("protocol"), string(p.Protocol), "must be TCP, UDP or SCTP")
			continue
		}
		if p.Port < 1 || p.Port > 65535 {
			bad.add(field("port"), fmt.Sprint(p.Port), "must be from 1 to 65535")
			continue
		}
		nodePort := p.NodePort
		if nodePort < 0 || nodePort > 65535 {
			bad.add(field("nodePort"), fmt.Sprint(p.NodePort), "must be from 1 to 65535, or absent")
			nodePort = 0
		}
		a.Ports = append(a.Ports, Port{Name: intern(p.Name), Protocol: protocol, Port: uint16(p.Port), NodePort: uint16(nodePort)})
	}
}

func (a *Assignment) parseAddresses(spec *v1alpha1.ServiceAssignmentSpec, bad *problems) {
	for i, s := range spec.ServiceIPs {
		a.ServiceIPs = appendAddr(a.ServiceIPs, fmt.Sprintf("spec.serviceIPs[%d].ip", i), s.IP, bad)
	}
	a.ServiceIPs = sorted(a.ServiceIPs, netip.Addr.Compare)
	for i, s := range spec.ExternalIPs {
		a.ExternalIPs = appendAddr(a.ExternalIPs, fmt.Sprintf("spec.externalIPs[%d]", i), s, bad)
	}
	var loadBalancerIPs []netip.Addr
	for i, s := range spec.LoadBalancerIPs {
		loadBalancerIPs = appendAddr(loadBalancerIPs, fmt.Sprintf("spec.loadBalancerIPs[%d]", i), s, bad)
	}
	for _, ip := range a.ServiceIPs {
		a.Families |= forwarding.FamilyOf(ip)
	}
	// An address that is a service IP as well is served as a service IP: one address has one meaning. One of a family that the Service does not have is not
	// served at all, because it has no endpoints there: who put it there, say a load balancer that translates, does so itself.
	skip := func(ip netip.Addr) bool {
		return slices.Contains(a.ServiceIPs, ip) || a.Families&forwarding.FamilyOf(ip) == 0
	}
	loadBalancerIPs = slices.DeleteFunc(loadBalancerIPs, skip)
	a.ExternalIPs = slices.DeleteFunc(append(a.ExternalIPs, loadBalancerIPs...), skip)
	a.ExternalIPs = sorted(a.ExternalIPs, netip.Addr.Compare)
	a.guard(loadBalancerIPs, spec.LoadBalancerSourceRanges, bad)
}

// guard sets which load-balancer addresses are open to which sources only. Each family is judged by itself, as kube-proxy
// does: without ranges of its own, or with one that covers everything, it is open to all.
func (a *Assignment) guard(loadBalancerIPs []netip.Addr, ranges []string, bad *problems) {
	var guarded, open [2]bool
	var prefixes []netip.Prefix
	for i, s := range ranges {
		p, err := netip.ParsePrefix(strings.TrimSpace(s)) // the Service API allows spaces around a range
		if err != nil {
			bad.add(fmt.Sprintf("spec.loadBalancerSourceRanges[%d]", i), s, "must be a CIDR such as 192.0.2.0/24")
			// What was meant to restrict must not end up open because it cannot be read.
			guarded = [2]bool{true, true}
			continue
		}
		guarded[family(p.Addr())] = true
		open[family(p.Addr())] = open[family(p.Addr())] || p.Bits() == 0
		prefixes = append(prefixes, p.Masked())
	}
	isOpen := func(ip netip.Addr) bool { return !guarded[family(ip)] || open[family(ip)] }
	a.LoadBalancerIPs = sorted(slices.DeleteFunc(loadBalancerIPs, isOpen), netip.Addr.Compare)
	if len(a.LoadBalancerIPs) == 0 {
		a.LoadBalancerIPs = nil
		return
	}
	prefixes = slices.DeleteFunc(prefixes, func(p netip.Prefix) bool { return isOpen(p.Addr()) })
	a.SourceRanges = sorted(prefixes, netip.Prefix.Compare)
	if len(a.SourceRanges) == 0 {
		// To backends no ranges means open; a prefix of length 32 that is never a source means closed.
		a.SourceRanges = []netip.Prefix{netip.MustParsePrefix("255.255.255.255/32")}
	}
}

func parseNodeSelector(in *metav1.LabelSelector, bad *problems) labels.Selector {
	if len(in.MatchLabels) == 0 && len(in.MatchExpressions) == 0 {
		return nil
	}
	selector, err := metav1.LabelSelectorAsSelector(in)
	if err != nil {
		bad.add("spec.nodeSelector", metav1.FormatLabelSelector(in), err.Error()+"; no node is selected")
		return labels.Nothing()
	}
	return selector
}

func parseNodePortAddresses(in []string, bad *problems) NodePortAddresses {
	var out NodePortAddresses
	for i, s := range in {
		switch s {
		case v1alpha1.NodePortAddressesPrimary:
			out.Primary = true
		case v1alpha1.NodePortAddressesLocalhost:
			out.Localhost = true
		case v1alpha1.NodePortAddressesAll:
			out.All = true
		default:
			p, err := netip.ParsePrefix(s)
			if err != nil {
				bad.add(fmt.Sprintf("spec.nodePortAddresses[%d]", i), s, "must be Primary, Localhost, All or a CIDR such as 192.168.0.0/24")
				continue
			}
			out.CIDRs = append(out.CIDRs, p.Masked())
		}
	}
	if len(in) == 0 {
		out.Primary = true
	}
	return out
}

func parseProtocol(p corev1.Protocol) (forwarding.Protocol, bool) {
	switch p {
	case corev1.ProtocolTCP:
		return forwarding.TCP, true
	case corev1.ProtocolUDP:
		return forwarding.UDP, true
	case corev1.ProtocolSCTP:
		return forwarding.SCTP, true
	}
	return 0, false
}

func appendAddr(list []netip.Addr, field, value string, bad *problems) []netip.Addr {
	ip, ok := parseAddr(value)
	if !ok {
		bad.add(field, value, "must be an IP address without a zone")
		return list
	}
	return append(list, ip)
}

// parseAddr gives an address in the form that all comparisons use: an IPv4 address that is written as an IPv6 one is IPv4.
func parseAddr(s string) (netip.Addr, bool) {
	ip, err := netip.ParseAddr(s)
	if err != nil || ip.Zone() != "" {
		return netip.Addr{}, false
	}
	return ip.Unmap(), true
}

// family is 0 for IPv4 and 1 for IPv6.
func family(ip netip.Addr) int {
	if ip.Is4() {
		return 0
	}
	return 1
}

// sorted sorts a list in place and drops duplicates.
func sorted[T comparable](list []T, compare func(T, T) int) []T {
	slices.SortFunc(list, compare)
	return slices.Compact(list)
}

// intern gives one shared copy of a string that many objects repeat (namespaces, port names, zones).
func intern(s string) string { return unique.Make(s).Value() }
