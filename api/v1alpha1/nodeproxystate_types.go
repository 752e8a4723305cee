package v1alpha1

import (
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// NodeProxyStateSpec is what the controller tells the agent of a node.
type NodeProxyStateSpec struct {
	// reportInterval is the shortest time between two reports of the agent. The controller lengthens it with the number of
	// nodes, so that all agents together write at a bounded rate.
	// +optional
	// +default="1s"
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=20
	// +kubebuilder:validation:XValidation:rule="self.matches('^(0|([0-9]{1,6}([.][0-9]{1,9})?(ms|s|m|h))+)$')",message="must be a duration such as 200ms, 1s or 1m"
	// +kubebuilder:validation:XValidation:rule="!self.matches('^(0|([0-9]{1,6}([.][0-9]{1,9})?(ms|s|m|h))+)$') || (duration(self) >= duration('100ms') && duration(self) <= duration('5m'))",message="must be between 100ms and 5m"
	ReportInterval *metav1.Duration `json:"reportInterval,omitempty"`

	// serviceRanges are the ranges of service IPs that policies declare for this node, in canonical form, sorted. What goes to an address in them that no
	// Service has is dropped on the node.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=4096
	// +kubebuilder:validation:items:MinLength=3
	// +kubebuilder:validation:items:MaxLength=43
	ServiceRanges []string `json:"serviceRanges,omitempty"`
}

// HeartbeatInterval is how often an agent reports at least, even if there is nothing new: a minute, or ten report intervals where that is longer, so that signs of
// life take a tenth of what the controller allows for reports at the most.
func (s *NodeProxyStateSpec) HeartbeatInterval() time.Duration {
	interval := time.Minute
	if s.ReportInterval != nil {
		interval = max(interval, 10*s.ReportInterval.Duration)
	}
	return interval
}

// NodeProxyMode tells whether a node can do a proxy mode.
type NodeProxyMode struct {
	// mode is the proxy mode.
	// +required
	Mode ProxyMode `json:"mode"`
	// available says whether the node can do it. It was tried, not guessed from a version.
	Available bool `json:"available"`
	// message says what is missing.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Message string `json:"message,omitempty"`
	// services is how many service ports the mode forwards on this node now.
	Services int32 `json:"services"`
}

// KubeProxyPresence tells whether kube-proxy runs on a node, and in which of its modes.
// +kubebuilder:validation:Enum=Absent;Stopped;IPTables;IPVS;NFTables
type KubeProxyPresence string

const (
	// KubeProxyAbsent: none of its rules are in the kernel.
	KubeProxyAbsent KubeProxyPresence = "Absent"
	// KubeProxyStopped: its rules are in the kernel, but nobody answers at its ports: what changes is not followed any more.
	KubeProxyStopped KubeProxyPresence = "Stopped"
	// KubeProxyIPTables: it runs in mode iptables.
	KubeProxyIPTables KubeProxyPresence = "IPTables"
	// KubeProxyIPVS: it runs in mode ipvs.
	KubeProxyIPVS KubeProxyPresence = "IPVS"
	// KubeProxyNFTables: it runs in mode nftables.
	KubeProxyNFTables KubeProxyPresence = "NFTables"
)

// Runs says whether kube-proxy is known to run.
func (p KubeProxyPresence) Runs() bool {
	return p != "" && p != KubeProxyAbsent && p != KubeProxyStopped
}

// Condition types of a NodeProxyState.
const (
	// NodeProxyReady: the kernel holds what the agent wants it to. Unknown, which the controller sets: the agent has not reported for long.
	NodeProxyReady = "Ready"
	// NodeProxyKernelTuned: the parameters of the node's kernel are at least what the agent's configuration asks for.
	NodeProxyKernelTuned = "KernelTuned"
)

// NodeProxyStateStatus is what an agent's kernel holds. The two revisions are marks: every object up to and including this
// resourceVersion is in the kernel. They compare only within one resource type.
type NodeProxyStateStatus struct {
	// assignmentRevision is the newest ServiceAssignment resourceVersion that the kernel holds.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	AssignmentRevision string `json:"assignmentRevision,omitempty"`

	// endpointSliceRevision is the newest EndpointSlice resourceVersion that the kernel holds.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	EndpointSliceRevision string `json:"endpointSliceRevision,omitempty"`

	// lastAppliedTime is when the kernel was last changed.
	// +optional
	LastAppliedTime *metav1.Time `json:"lastAppliedTime,omitempty"`

	// heartbeatTime is when the agent reported last, by its node's clock. It does so at least every minute, or every ten spec.reportInterval where that is longer. The
	// controller sets the condition Ready to Unknown when it has not seen it change for three times as long.
	// +optional
	HeartbeatTime *metav1.Time `json:"heartbeatTime,omitempty"`

	// modes tells which proxy modes the node can do.
	// +optional
	// +listType=map
	// +listMapKey=mode
	// +kubebuilder:validation:MaxItems=8
	Modes []NodeProxyMode `json:"modes,omitempty"`

	// services is how many service ports are forwarded.
	// +optional
	Services int32 `json:"services,omitempty"`

	// endpoints is how many endpoints they have in all.
	// +optional
	Endpoints int32 `json:"endpoints,omitempty"`

	// driftRepairs is how often something else changed our rules and the agent repaired them since it started.
	// +optional
	DriftRepairs int64 `json:"driftRepairs,omitempty"`

	// kubeProxy tells whether kube-proxy runs on the node, and in which of its modes. Empty: not known.
	// +optional
	KubeProxy KubeProxyPresence `json:"kubeProxy,omitempty"`

	// bootID identifies the boot of the node's kernel that this report is about, as the Node's status.nodeInfo.bootID does. A report of
	// an earlier boot says nothing: its rules are gone.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	BootID string `json:"bootID,omitempty"`

	// agentVersion is the version of the agent.
	// +optional
	// +kubebuilder:validation:MaxLength=128
	AgentVersion string `json:"agentVersion,omitempty"`

	// localPorts are the ports that the node's kernel gives to outgoing connections by itself: net.ipv4.ip_local_port_range without
	// net.ipv4.ip_local_reserved_ports. A node port should not be among them.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=64
	LocalPorts []NodePortRange `json:"localPorts,omitempty"`

	// conditions: Ready, KernelTuned.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// NodeProxyState is what one node has programmed. It has the node's name and is created by the controller; the node's agent writes its status.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=nps,categories=serviceproxy
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Services",type=integer,JSONPath=`.status.services`
// +kubebuilder:printcolumn:name="Endpoints",type=integer,JSONPath=`.status.endpoints`
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.status.modes[?(@.available==true)].mode`
// +kubebuilder:printcolumn:name="Applied",type=date,JSONPath=`.status.lastAppliedTime`
// +kubebuilder:printcolumn:name="Repairs",type=integer,JSONPath=`.status.driftRepairs`,priority=1
// +kubebuilder:printcolumn:name="Assignments-At",type=string,JSONPath=`.status.assignmentRevision`,priority=1
// +kubebuilder:printcolumn:name="EndpointSlices-At",type=string,JSONPath=`.status.endpointSliceRevision`,priority=1
// +kubebuilder:printcolumn:name="Kube-Proxy",type=string,JSONPath=`.status.kubeProxy`,priority=1
// +kubebuilder:printcolumn:name="Version",type=string,JSONPath=`.status.agentVersion`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type NodeProxyState struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec is what the controller tells the agent.
	// +optional
	// +default={}
	Spec NodeProxyStateSpec `json:"spec,omitempty"`

	// status is what the node's kernel holds.
	// +optional
	Status NodeProxyStateStatus `json:"status,omitempty"`
}

// NodeProxyStateList is a list of NodeProxyState.
// +kubebuilder:object:root=true
type NodeProxyStateList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []NodeProxyState `json:"items"`
}
