package compile

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// Slice is what an agent keeps of an EndpointSlice: an agent holds the endpoints of the whole cluster, so this is most of its memory. It is
// immutable, and made for one node: what an endpoint's node name and node hints mean here is decided when it is parsed.
type Slice struct {
	// Service is the name of the Service, in the slice's namespace.
	Service   string
	Ports     []SlicePort
	Endpoints []SliceEndpoint
}

// SlicePort is a port of every endpoint of a slice.
type SlicePort struct {
	Name     string
	Protocol forwarding.Protocol
	Port     uint16
}

// SliceEndpoint is one endpoint of a slice.
type SliceEndpoint struct {
	Addr netip.Addr
	// ZoneHints are the zones that should use the endpoint, joined by commas (which no zone's name can hold); empty if there are none.
	ZoneHints string
	Flags     Flags
}

// Flags are the conditions of an endpoint and what its node and node hints mean on this node.
type Flags uint8

const (
	Ready Flags = 1 << iota
	Serving
	Terminating
	// Local: the endpoint is on this node.
	Local
	// NodeHinted: the endpoint says which nodes should use it.
	NodeHinted
	// HintedHere: this node is one of them.
	HintedHere
)

// Has says whether all of want are set.
func (f Flags) Has(want Flags) bool { return f&want == want }

// Equal says whether two slices mean the same.
func (s *Slice) Equal(o *Slice) bool {
	return s.Service == o.Service && slices.Equal(s.Ports, o.Ports) && slices.Equal(s.Endpoints, o.Endpoints)
}

// ParseSlice gives the compact form of an EndpointSlice for one node, and what was left out of it. Slices of host names have no
// addresses to forward to: nothing of them is kept.
func ParseSlice(in *discoveryv1.EndpointSlice, nodeName string) (*Slice, []Problem) {
	out := &Slice{Service: in.Labels[discoveryv1.LabelServiceName]}
	if in.AddressType == discoveryv1.AddressTypeFQDN {
		return out, nil
	}
	var bad problems
	out.Ports = make([]SlicePort, 0, len(in.Ports))
	for i, p := range in.Ports {
		if port, ok := parseSlicePort(i, &p, &bad); ok {
			out.Ports = append(out.Ports, port)
		}
	}
	out.Endpoints = make([]SliceEndpoint, 0, len(in.Endpoints))
	for i := range in.Endpoints {
		if e, ok := parseEndpoint(i, &in.Endpoints[i], nodeName, &bad); ok {
			out.Endpoints = append(out.Endpoints, e)
		}
	}
	return out, bad
}

func parseSlicePort(i int, in *discoveryv1.EndpointPort, bad *problems) (SlicePort, bool) {
	if in.Port == nil {
		return SlicePort{}, false // "all ports": the API reserves it for consumers other than Services
	}
	out := SlicePort{Protocol: forwarding.TCP, Port: uint16(*in.Port)}
	if *in.Port < 1 || *in.Port > 65535 {
		bad.add(fmt.Sprintf("ports[%d].port", i), fmt.Sprint(*in.Port), "must be from 1 to 65535")
		return out, false
	}
	if in.Name != nil {
		out.Name = intern(*in.Name)
	}
	if in.Protocol != nil {
		var ok bool
		if out.Protocol, ok = parseProtocol(*in.Protocol); !ok {
			bad.add(fmt.Sprintf("ports[%d].protocol", i), string(*in.Protocol), "must be TCP, UDP or SCTP")
			return out, false
		}
	}
	return out, true
}

func parseEndpoint(i int, in *discoveryv1.Endpoint, nodeName string, bad *problems) (SliceEndpoint, bool) {
	if len(in.Addresses) == 0 {
		bad.add(fmt.Sprintf("endpoints[%d].addresses", i), "", "must have an address")
		return SliceEndpoint{}, false
	}
	// Only the first address counts: the API says that all of them are the same endpoint and consumers may use any.
	ip, ok := parseAddr(in.Addresses[0])
	if !ok {
		bad.add(fmt.Sprintf("endpoints[%d].addresses[0]", i), in.Addresses[0], "must be an IP address without a zone")
		return SliceEndpoint{}, false
	}
	out := SliceEndpoint{Addr: ip}
	set := func(flag Flags, on bool) {
		if on {
			out.Flags |= flag
		}
	}
	// Unknown means true for ready and serving, by the EndpointSlice API.
	set(Ready, in.Conditions.Ready == nil || *in.Conditions.Ready)
	set(Serving, in.Conditions.Serving == nil || *in.Conditions.Serving)
	set(Terminating, in.Conditions.Terminating != nil && *in.Conditions.Terminating)
	set(Local, in.NodeName != nil && *in.NodeName == nodeName)
	if in.Hints != nil {
		for _, n := range in.Hints.ForNodes {
			set(NodeHinted, true)
			set(HintedHere, n.Name == nodeName)
		}
		out.ZoneHints = joinZones(in.Hints.ForZones)
	}
	return out, true
}

func joinZones(hints []discoveryv1.ForZone) string {
	switch len(hints) {
	case 0:
		return ""
	case 1:
		return intern(hints[0].Name)
	}
	zones := make([]string, len(hints))
	for i, z := range hints {
		zones[i] = z.Name
	}
	return intern(strings.Join(sorted(zones, strings.Compare), ","))
}

// hintedFor says whether a zone is one of an endpoint's hints.
func (e *SliceEndpoint) hintedFor(zone string) bool {
	if zone == "" || e.ZoneHints == "" {
		return false
	}
	for z := range strings.SplitSeq(e.ZoneHints, ",") {
		if z == zone {
			return true
		}
	}
	return false
}

// Node is what the agent keeps of its own Node.
type Node struct {
	Name   string
	Labels map[string]string
	Zone   string
	// Addresses are the node's own addresses as full-length prefixes, sorted: its InternalIPs, or its ExternalIPs if it has none.
	Addresses []netip.Prefix
	// PodCIDRs are the ranges of the node's own pods, sorted.
	PodCIDRs []netip.Prefix
	// Leaving says that the node is being deleted or about to be, so load balancers should send it nothing new.
	Leaving bool
}

// toBeDeletedTaint is set by the cluster autoscaler on a node that it is about to remove.
const toBeDeletedTaint = "ToBeDeletedByClusterAutoscaler"

// ParseNode gives the compact form of a Node and what was left out of it.
func ParseNode(in *corev1.Node) (*Node, []Problem) {
	out := &Node{Name: in.Name, Labels: in.Labels, Zone: in.Labels[corev1.LabelTopologyZone]}
	out.Leaving = in.DeletionTimestamp != nil || slices.ContainsFunc(in.Spec.Taints, func(t corev1.Taint) bool { return t.Key == toBeDeletedTaint })
	var bad problems
	for _, kind := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		for i, a := range in.Status.Addresses {
			if a.Type != kind {
				continue
			}
			ip, ok := parseAddr(a.Address)
			if !ok {
				bad.add(fmt.Sprintf("status.addresses[%d].address", i), a.Address, "must be an IP address without a zone")
				continue
			}
			out.Addresses = append(out.Addresses, netip.PrefixFrom(ip, ip.BitLen()))
		}
		if len(out.Addresses) > 0 {
			break
		}
	}
	out.Addresses = sorted(out.Addresses, netip.Prefix.Compare)
	for i, s := range in.Spec.PodCIDRs {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			bad.add(fmt.Sprintf("spec.podCIDRs[%d]", i), s, "must be a CIDR such as 10.244.1.0/24")
			continue
		}
		out.PodCIDRs = append(out.PodCIDRs, p.Masked())
	}
	out.PodCIDRs = sorted(out.PodCIDRs, netip.Prefix.Compare)
	return out, bad
}

// SameForwarding says whether two nodes compile every Service alike.
func (n *Node) SameForwarding(o *Node) bool {
	return n.Name == o.Name && slices.Equal(n.Addresses, o.Addresses) && maps.Equal(n.Labels, o.Labels)
}
