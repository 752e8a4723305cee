package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// RangeUse says what the addresses of a range are for.
// +kubebuilder:validation:Enum=ClusterIP;LoadBalancer
type RangeUse string

const (
	// RangeUseClusterIP ranges are registered with the API server as ServiceCIDRs and hold service IPs.
	RangeUseClusterIP RangeUse = "ClusterIP"
	// RangeUseLoadBalancer ranges are never registered as ServiceCIDRs. Services of class LoadBalancerClass get their addresses from them.
	RangeUseLoadBalancer RangeUse = "LoadBalancer"
)

// RangeAllocation says whether new addresses may be taken from a range.
// +kubebuilder:validation:Enum=Automatic;Manual;Draining
type RangeAllocation string

const (
	// RangeAllocationAutomatic ranges serve Services that ask for no particular address, and those that do.
	RangeAllocationAutomatic RangeAllocation = "Automatic"
	// RangeAllocationManual ranges serve only Services that ask for one of their addresses.
	RangeAllocationManual RangeAllocation = "Manual"
	// RangeAllocationDraining ranges give out nothing new; what they hold stays until its Service goes.
	RangeAllocationDraining RangeAllocation = "Draining"
)

// Enforcement says what happens to a covered Service that cannot get what its policy declares.
// +kubebuilder:validation:Enum=BestEffort;Strict
type Enforcement string

const (
	// EnforcementBestEffort lets the Service be, and reports.
	EnforcementBestEffort Enforcement = "BestEffort"
	// EnforcementStrict refuses it.
	EnforcementStrict Enforcement = "Strict"
)

// KubeProxyRelation says how a policy shares the cluster with a running kube-proxy.
// +kubebuilder:validation:Enum=Coexist;TakeOver
type KubeProxyRelation string

const (
	// KubeProxyCoexist covers only Services labelled service.kubernetes.io/service-proxy-name=serviceproxy.io, which
	// kube-proxy ignores.
	KubeProxyCoexist KubeProxyRelation = "Coexist"
	// KubeProxyTakeOver covers every Service the selectors match, labelled or not. Where nodes run kube-proxy, the controller labels each of them once every
	// node forwards it, so that kube-proxy lets go.
	KubeProxyTakeOver KubeProxyRelation = "TakeOver"
)

// ServiceRange is a range of addresses that a policy gives to its Services.
//
// +kubebuilder:validation:XValidation:rule="!has(self.reserved) || !isCIDR(self.cidr) || self.reserved.all(r, (!isIP(r) && !isCIDR(r)) || (isIP(r) ? cidr(self.cidr).containsIP(r) : cidr(self.cidr).containsCIDR(r)))",messageExpression="'%s does not lie inside the range %s'.format([self.reserved.filter(r, isIP(r) ? !cidr(self.cidr).containsIP(r) : isCIDR(r) && !cidr(self.cidr).containsCIDR(r))[0], self.cidr])",message="does not lie inside the range",fieldPath=".reserved"
// +kubebuilder:validation:XValidation:rule="self.use == oldSelf.use",messageExpression="'is immutable, and was ' + oldSelf.use + ': set allocation Draining, take the range out of the policy when nothing holds an address of it, then add it again'",message="is immutable",fieldPath=".use"
type ServiceRange struct {
	// cidr is the range in canonical form, for example 10.99.0.0/16 or fd00:99::/112. An IPv4 range has a prefix length of 8
	// to 30, an IPv6 range of 64 to 126. Loopback, link-local, multicast, reserved and unspecified addresses are not allowed.
	// It identifies the range within the policy.
	// +required
	// +kubebuilder:validation:MinLength=3
	// +kubebuilder:validation:MaxLength=43
	// +kubebuilder:validation:XValidation:rule="isCIDR(self)",message="must be a CIDR such as 10.99.0.0/16 or fd00:99::/112"
	// +kubebuilder:validation:XValidation:rule="!isCIDR(self) || self == string(cidr(self).masked())",messageExpression="'must be in canonical form: %s'.format([string(cidr(self).masked())])",message="must be in canonical form"
	// +kubebuilder:validation:XValidation:rule="!isCIDR(self) || (cidr(self).ip().family() == 4 ? cidr(self).prefixLength() >= 8 && cidr(self).prefixLength() <= 30 : cidr(self).prefixLength() >= 64 && cidr(self).prefixLength() <= 126)",message="prefix length must be 8 to 30 for IPv4 and 64 to 126 for IPv6"
	// +kubebuilder:validation:XValidation:rule="!isCIDR(self) || !['0.0.0.0/8', '127.0.0.0/8', '169.254.0.0/16', '224.0.0.0/3', '::/8', 'fe80::/10', 'ff00::/8'].exists(n, cidr(n).containsIP(cidr(self).ip()))",message="must be unicast addresses that can be routed: not of 0.0.0.0/8, 127.0.0.0/8 (loopback), 169.254.0.0/16 (link-local), 224.0.0.0/3 (multicast, reserved), ::/8, fe80::/10 (link-local) or ff00::/8 (multicast)"
	CIDR string `json:"cidr"`

	// use says what the addresses are for. ClusterIP ranges are registered with the API server as ServiceCIDRs.
	// LoadBalancer ranges are not: Services of type LoadBalancer with loadBalancerClass networking.serviceproxy.io/vip get one address of each of their families from them, and
	// show it once every node forwards it. Routing these addresses to the nodes is not part of this: nothing announces them by ARP, NDP or BGP. Immutable for as long as the
	// range is part of the policy.
	// +optional
	// +default="ClusterIP"
	Use RangeUse `json:"use,omitempty"`

	// allocation says whether new addresses may be taken: Automatic (for every Service), Manual (only for Services that
	// ask for one), Draining (nothing new; what is held stays).
	// +optional
	// +default="Automatic"
	Allocation RangeAllocation `json:"allocation,omitempty"`

	// reserved lists addresses and CIDRs inside the range that are never given out, in canonical form.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MinLength=2
	// +kubebuilder:validation:items:MaxLength=43
	// +kubebuilder:validation:items:XValidation:rule="isIP(self) ? ip.isCanonical(self) : isCIDR(self) && self == string(cidr(self).masked())",message="must be an IP address or a CIDR in canonical form, such as 10.99.0.10 or 10.99.0.0/28"
	Reserved []string `json:"reserved,omitempty"`
}

// NodePortRange is a range of ports, both ends included.
//
// +kubebuilder:validation:XValidation:rule="self.start <= self.end",messageExpression="'start %d must not be greater than end %d'.format([self.start, self.end])",message="start must not be greater than end"
type NodePortRange struct {
	// start is the first port of the range.
	// +required
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	Start int32 `json:"start"`

	// end is the last port of the range.
	// +required
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	End int32 `json:"end"`
}

// ReusePolicy says when a released address is given out again.
type ReusePolicy struct {
	// quarantine is how long a released address or node port rests before another Service may get it. 0s to 24h.
	// +optional
	// +default="60s"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:XValidation:rule="self.matches('^(0|([0-9]{1,6}([.][0-9]{1,9})?(ms|s|m|h))+)$')",message="must be a duration such as 60s, 5m or 1h30m"
	// +kubebuilder:validation:XValidation:rule="!self.matches('^(0|([0-9]{1,6}([.][0-9]{1,9})?(ms|s|m|h))+)$') || (duration(self) >= duration('0s') && duration(self) <= duration('24h'))",message="must be between 0s and 24h"
	Quarantine *metav1.Duration `json:"quarantine,omitempty"`

	// stickyFor is how long a released address is kept for a Service of the same namespace and name. 0s to 720h; 0s: not at all.
	// +optional
	// +default="0s"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:XValidation:rule="self.matches('^(0|([0-9]{1,6}([.][0-9]{1,9})?(ms|s|m|h))+)$')",message="must be a duration such as 60s, 5m or 1h30m"
	// +kubebuilder:validation:XValidation:rule="!self.matches('^(0|([0-9]{1,6}([.][0-9]{1,9})?(ms|s|m|h))+)$') || (duration(self) >= duration('0s') && duration(self) <= duration('720h'))",message="must be between 0s and 720h"
	StickyFor *metav1.Duration `json:"stickyFor,omitempty"`
}

// ServiceProxyPolicySpec declares which Services a policy covers, what they get, and how nodes forward them.
//
// +kubebuilder:validation:XValidation:rule="!has(self.serviceRanges) || self.serviceRanges.all(a, !isCIDR(a.cidr) || self.serviceRanges.all(b, a.cidr == b.cidr || !isCIDR(b.cidr) || !cidr(a.cidr).containsCIDR(b.cidr)))",messageExpression="'ranges must not overlap, and %s lies inside another one'.format([self.serviceRanges.filter(b, isCIDR(b.cidr) && self.serviceRanges.exists(a, a.cidr != b.cidr && isCIDR(a.cidr) && cidr(a.cidr).containsCIDR(b.cidr)))[0].cidr])",message="ranges must not overlap",fieldPath=".serviceRanges"
// +kubebuilder:validation:XValidation:rule="!has(self.scheduler) || self.scheduler in {'NFTables': ['Random', 'SourceHash'], 'IPTables': ['Random'], 'IPVS': ['RoundRobin', 'LeastConnection', 'SourceHash', 'Maglev'], 'Userspace': ['Random', 'RoundRobin', 'LeastConnection', 'SourceHash'], 'EBPF': ['Random', 'SourceHash', 'Maglev']}[self.proxyMode]",messageExpression="'proxyMode ' + self.proxyMode + ' does not do scheduler ' + self.scheduler + ', only ' + {'NFTables': 'Random and SourceHash', 'IPTables': 'Random', 'IPVS': 'RoundRobin, LeastConnection, SourceHash and Maglev', 'Userspace': 'Random, RoundRobin, LeastConnection and SourceHash', 'EBPF': 'Random, SourceHash and Maglev'}[self.proxyMode] + '; scheduler ' + self.scheduler + ' needs proxyMode ' + {'Random': 'NFTables, IPTables, Userspace or EBPF', 'RoundRobin': 'IPVS or Userspace', 'LeastConnection': 'IPVS or Userspace', 'SourceHash': 'NFTables, IPVS, Userspace or EBPF', 'Maglev': 'IPVS or EBPF'}[self.scheduler]",message="proxyMode does not do scheduler",fieldPath=".scheduler"
type ServiceProxyPolicySpec struct {
	// priority decides which policy covers a Service that several match: the highest wins, then the oldest policy, then
	// the first name.
	// +optional
	// +default=0
	// +kubebuilder:validation:Minimum=-1000000
	// +kubebuilder:validation:Maximum=1000000
	Priority int32 `json:"priority,omitempty"`

	// namespaceSelector selects the namespaces whose Services are covered. Empty selects all.
	// +optional
	// +default={}
	// +kubebuilder:validation:XValidation:rule="!has(self.matchExpressions) || self.matchExpressions.all(e, e.operator in ['In', 'NotIn'] ? has(e.values) && size(e.values) > 0 : e.operator in ['Exists', 'DoesNotExist'] && (!has(e.values) || size(e.values) == 0))",message="each entry must have operator In or NotIn with values, or Exists or DoesNotExist without",fieldPath=".matchExpressions"
	NamespaceSelector metav1.LabelSelector `json:"namespaceSelector,omitempty"`

	// serviceSelector selects the Services that are covered, by their labels. Empty selects all.
	// +optional
	// +default={}
	// +kubebuilder:validation:XValidation:rule="!has(self.matchExpressions) || self.matchExpressions.all(e, e.operator in ['In', 'NotIn'] ? has(e.values) && size(e.values) > 0 : e.operator in ['Exists', 'DoesNotExist'] && (!has(e.values) || size(e.values) == 0))",message="each entry must have operator In or NotIn with values, or Exists or DoesNotExist without",fieldPath=".matchExpressions"
	ServiceSelector metav1.LabelSelector `json:"serviceSelector,omitempty"`

	// nodeSelector selects the nodes that forward the covered Services, by their labels. Empty selects all.
	// +optional
	// +default={}
	// +kubebuilder:validation:XValidation:rule="!has(self.matchExpressions) || self.matchExpressions.all(e, e.operator in ['In', 'NotIn'] ? has(e.values) && size(e.values) > 0 : e.operator in ['Exists', 'DoesNotExist'] && (!has(e.values) || size(e.values) == 0))",message="each entry must have operator In or NotIn with values, or Exists or DoesNotExist without",fieldPath=".matchExpressions"
	NodeSelector metav1.LabelSelector `json:"nodeSelector,omitempty"`

	// serviceRanges are the ranges of addresses that covered Services get, of either or both families. Without any, nothing
	// is allocated and Services keep the addresses that the API server gave them.
	// +optional
	// +listType=map
	// +listMapKey=cidr
	// +kubebuilder:validation:MaxItems=16
	ServiceRanges []ServiceRange `json:"serviceRanges,omitempty"`

	// nodePortRange is the range of node ports of covered Services. It lies inside the API server's own range
	// (--service-node-port-range, by default 30000-32767).
	// +optional
	NodePortRange *NodePortRange `json:"nodePortRange,omitempty"`

	// nodePortAddresses are the node addresses on which node ports are served: Primary (the node's InternalIPs), All (every
	// address but loopback), Localhost, or CIDRs.
	// +optional
	// +default=["Primary"]
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MinLength=3
	// +kubebuilder:validation:items:MaxLength=43
	// +kubebuilder:validation:items:XValidation:rule="self in ['Primary', 'Localhost', 'All'] || (isCIDR(self) && self == string(cidr(self).masked()))",message="must be Primary, Localhost, All or a CIDR in canonical form, such as 192.168.0.0/24"
	NodePortAddresses []string `json:"nodePortAddresses,omitempty"`

	// proxyMode is how nodes forward the covered Services.
	// +optional
	// +default="NFTables"
	ProxyMode ProxyMode `json:"proxyMode,omitempty"`

	// scheduler is how an endpoint is chosen for a new connection. Unset is the mode's own: RoundRobin in IPVS, else Random.
	// NFTables: Random, SourceHash. IPTables: Random. IPVS: RoundRobin, LeastConnection, SourceHash, Maglev.
	// Userspace: Random, RoundRobin, LeastConnection, SourceHash. EBPF: Random, SourceHash, Maglev.
	// +optional
	Scheduler Scheduler `json:"scheduler,omitempty"`

	// enforcement says what happens to a covered Service that cannot get what the policy declares: BestEffort lets it be and
	// reports, Strict refuses it.
	// +optional
	// +default="BestEffort"
	Enforcement Enforcement `json:"enforcement,omitempty"`

	// reuse says when a released address or node port is given out again.
	// +optional
	// +default={}
	Reuse ReusePolicy `json:"reuse,omitempty"`

	// kubeProxy says how the policy shares the cluster with a running kube-proxy: Coexist covers only Services that are
	// labelled service.kubernetes.io/service-proxy-name=serviceproxy.io, TakeOver covers all that the selectors match. Where nodes
	// run kube-proxy, TakeOver also labels each Service once every node forwards it, so that kube-proxy lets go of it; that
	// needs a nodeSelector that selects all nodes. What was taken over goes back to kube-proxy when the policy is changed to
	// Coexist or deleted, or no longer selects the Service.
	// +optional
	// +default="TakeOver"
	KubeProxy KubeProxyRelation `json:"kubeProxy,omitempty"`
}

// Condition types of a ServiceProxyPolicy.
const (
	// PolicyReady summarises the others: True when the policy is accepted, its ranges are ready and what it covers is programmed.
	PolicyReady = "Ready"
	// PolicyAccepted: the policy makes sense in this cluster.
	PolicyAccepted = "Accepted"
	// PolicyRangesReady: the API server knows every ClusterIP range as a ServiceCIDR.
	PolicyRangesReady = "RangesReady"
	// PolicyCapacityAvailable: no covered Service waits for an address or a node port.
	PolicyCapacityAvailable = "CapacityAvailable"
	// PolicyProgrammed: every covered Service is programmed on every selected node that is Ready.
	PolicyProgrammed = "Programmed"
	// PolicyConflicted: something of this policy overlaps another policy's, which wins.
	PolicyConflicted = "Conflicted"
	// PolicyNodePortsExclusive: no selected node gives ports of nodePortRange to outgoing connections. Ready does not depend on it.
	PolicyNodePortsExclusive = "NodePortsExclusive"
	// PolicyTakenOver: no covered Service is forwarded by kube-proxy as well. Not part of Ready: a Service that both forward works.
	PolicyTakenOver = "TakenOver"
)

// AddressCounts counts the addresses of one family or range.
type AddressCounts struct {
	// total is how many addresses can be given out. Above 2^63-1 it is 2^63-1.
	Total int64 `json:"total"`
	// allocated is how many addresses are held by Services, whoever gave them.
	Allocated int64 `json:"allocated"`
	// quarantined is how many released addresses rest.
	Quarantined int64 `json:"quarantined"`
	// free is how many addresses can be given out now.
	Free int64 `json:"free"`
}

// FamilyStatus counts the addresses of one family over all ranges of the policy.
type FamilyStatus struct {
	// family is IPv4 or IPv6.
	Family        IPFamily `json:"family"`
	AddressCounts `json:",inline"`
}

// ServiceRangeStatus is what is known about one range.
type ServiceRangeStatus struct {
	// cidr is the range.
	// +kubebuilder:validation:MaxLength=43
	CIDR string `json:"cidr"`
	// serviceCIDR names the ServiceCIDR object that registers the range with the API server.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	ServiceCIDR string `json:"serviceCIDR,omitempty"`
	// ready says that addresses can be taken from the range.
	Ready bool `json:"ready"`
	// foreign is how many addresses of the range are held by Services that the policy does not cover.
	Foreign       int64 `json:"foreign"`
	AddressCounts `json:",inline"`
}

// NodePortStatus counts the node ports of the policy's range.
type NodePortStatus struct {
	// total is how many ports of the range can be given out: those that belong to no older policy and, once it is known, lie inside the API server's range.
	Total int32 `json:"total"`
	// allocated is how many ports of the range are held by Services.
	Allocated int32 `json:"allocated"`
	// quarantined is how many released ports rest.
	Quarantined int32 `json:"quarantined"`
	// free is how many ports can be given out now.
	Free int32 `json:"free"`
}

// PolicyServicesStatus counts the Services that the policy covers.
type PolicyServicesStatus struct {
	// covered is how many Services the policy covers.
	Covered int32 `json:"covered"`
	// assigned is how many of them have all the addresses they are owed.
	Assigned int32 `json:"assigned"`
	// programmed is how many of them are programmed on every selected node that is Ready.
	Programmed int32 `json:"programmed"`
	// waiting is how many of them wait for an address or node port.
	Waiting int32 `json:"waiting"`
	// takenOver is how many Services carry the label that the controller set for this policy so that kube-proxy ignores them.
	// +optional
	TakenOver int32 `json:"takenOver,omitempty"`
	// handingBack is how many Services leave the policy and are forwarded until kube-proxy has had time to forward them.
	// +optional
	HandingBack int32 `json:"handingBack,omitempty"`
}

// PolicyNodesStatus counts the nodes that the policy selects.
type PolicyNodesStatus struct {
	// selected is how many nodes the policy selects.
	Selected int32 `json:"selected"`
	// ready is how many of them are Ready.
	Ready int32 `json:"ready"`
	// unsupported is how many of them cannot do the policy's proxy mode.
	Unsupported int32 `json:"unsupported"`
}

// ServiceProxyPolicyStatus is what the controller observed.
type ServiceProxyPolicyStatus struct {
	// observedGeneration is the generation of the spec that this status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// conditions: Ready (summary), Accepted, RangesReady, CapacityAvailable, Programmed, Conflicted, TakenOver, NodePortsExclusive.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=16
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// families counts addresses per family.
	// +optional
	// +listType=map
	// +listMapKey=family
	// +kubebuilder:validation:MaxItems=2
	Families []FamilyStatus `json:"families,omitempty"`

	// serviceRanges tells about each range of the spec, and about ranges taken out of it that are still in use.
	// +optional
	// +listType=map
	// +listMapKey=cidr
	// +kubebuilder:validation:MaxItems=64
	ServiceRanges []ServiceRangeStatus `json:"serviceRanges,omitempty"`

	// nodePorts counts the ports of nodePortRange.
	// +optional
	NodePorts *NodePortStatus `json:"nodePorts,omitempty"`

	// services counts the covered Services.
	// +optional
	Services PolicyServicesStatus `json:"services,omitempty"`

	// nodes counts the selected nodes.
	// +optional
	Nodes PolicyNodesStatus `json:"nodes,omitempty"`
}

// ServiceProxyPolicy declares ranges of service IPs and node ports, a proxy mode, and the Services and nodes they are for.
// A Service belongs to one policy: of those that match it the one with the highest priority, then the oldest, then the first by name.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=spp,categories=serviceproxy
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.proxyMode`
// +kubebuilder:printcolumn:name="Range",type=string,JSONPath=`.spec.serviceRanges[0].cidr`
// +kubebuilder:printcolumn:name="Services",type=integer,JSONPath=`.status.services.covered`
// +kubebuilder:printcolumn:name="Programmed",type=integer,JSONPath=`.status.services.programmed`
// +kubebuilder:printcolumn:name="Nodes",type=integer,JSONPath=`.status.nodes.ready`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Priority",type=integer,JSONPath=`.spec.priority`,priority=1
// +kubebuilder:printcolumn:name="Taken-Over",type=integer,JSONPath=`.status.services.takenOver`,priority=1
// +kubebuilder:printcolumn:name="Free-IPv4",type=integer,JSONPath=`.status.families[?(@.family=="IPv4")].free`,priority=1
// +kubebuilder:printcolumn:name="Free-IPv6",type=integer,JSONPath=`.status.families[?(@.family=="IPv6")].free`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name.size() <= 63",messageExpression="'metadata.name must be at most 63 characters, because it is used as a label value, and has %d'.format([self.metadata.name.size()])",message="metadata.name must be at most 63 characters"
type ServiceProxyPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec declares what is wanted.
	// +required
	Spec ServiceProxyPolicySpec `json:"spec"`

	// status is what the controller observed.
	// +optional
	Status ServiceProxyPolicyStatus `json:"status,omitempty"`
}

// ServiceProxyPolicyList is a list of ServiceProxyPolicy.
// +kubebuilder:object:root=true
type ServiceProxyPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ServiceProxyPolicy `json:"items"`
}
