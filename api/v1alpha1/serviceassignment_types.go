package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ServiceIPSource says where a service IP comes from.
// +kubebuilder:validation:Enum=ClusterIP;Additional
type ServiceIPSource string

const (
	// ServiceIPSourceClusterIP is one of the Service's spec.clusterIPs.
	ServiceIPSourceClusterIP ServiceIPSource = "ClusterIP"
	// ServiceIPSourceAdditional was taken from the policy's range for a Service whose ClusterIP lies outside of it.
	ServiceIPSourceAdditional ServiceIPSource = "Additional"
)

// ServiceIP is one address at which the cluster reaches a Service.
type ServiceIP struct {
	// ip is the address in canonical form.
	// +required
	// +kubebuilder:validation:MinLength=2
	// +kubebuilder:validation:MaxLength=39
	// +kubebuilder:validation:XValidation:rule="isIP(self) && ip.isCanonical(self)",message="must be an IP address in canonical form"
	IP string `json:"ip"`

	// source says where the address comes from: ClusterIP (spec.clusterIPs of the Service) or Additional (taken from the policy's range).
	// +required
	Source ServiceIPSource `json:"source"`
}

// AssignmentPort is one port of a Service.
type AssignmentPort struct {
	// name is the port's name in the Service, empty if it has one port without a name. EndpointSlices refer to it.
	// +optional
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name,omitempty"`

	// protocol is TCP, UDP or SCTP.
	// +required
	// +kubebuilder:validation:Enum=TCP;UDP;SCTP
	Protocol corev1.Protocol `json:"protocol"`

	// port is the port on the service IPs.
	// +required
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	Port int32 `json:"port"`

	// nodePort is the port on every selected node's addresses. Absent: none.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	NodePort int32 `json:"nodePort,omitempty"`
}

// ServiceAssignmentSpec is all that an agent must know of one Service besides its endpoints.
type ServiceAssignmentSpec struct {
	// policyName is the ServiceProxyPolicy that covers the Service.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	PolicyName string `json:"policyName"`

	// serviceUID is the UID of the Service that this assignment is for.
	// +required
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=64
	ServiceUID types.UID `json:"serviceUID"`

	// proxyMode is how nodes forward the Service.
	// +required
	ProxyMode ProxyMode `json:"proxyMode"`

	// scheduler is how an endpoint is chosen for a new connection.
	// +required
	Scheduler Scheduler `json:"scheduler"`

	// serviceIPs are the addresses at which the cluster reaches the Service.
	// +optional
	// +listType=map
	// +listMapKey=ip
	// +kubebuilder:validation:MaxItems=8
	ServiceIPs []ServiceIP `json:"serviceIPs,omitempty"`

	// externalIPs are the Service's spec.externalIPs.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MaxLength=39
	// +kubebuilder:validation:items:XValidation:rule="isIP(self) && ip.isCanonical(self)",message="must be an IP address in canonical form"
	ExternalIPs []string `json:"externalIPs,omitempty"`

	// loadBalancerIPs are the addresses of the Service's load balancer that nodes forward (ipMode VIP): those that this controller gave, or for a
	// Service of another load-balancer class those in its status.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MaxLength=39
	// +kubebuilder:validation:items:XValidation:rule="isIP(self) && ip.isCanonical(self)",message="must be an IP address in canonical form"
	LoadBalancerIPs []string `json:"loadBalancerIPs,omitempty"`

	// ports are the Service's ports.
	// +optional
	// +listType=map
	// +listMapKey=protocol
	// +listMapKey=port
	// +kubebuilder:validation:MaxItems=1024
	Ports []AssignmentPort `json:"ports,omitempty"`

	// sessionAffinitySeconds pins a client to its endpoint for this long after its last connection. 0: no affinity.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=86400
	SessionAffinitySeconds int32 `json:"sessionAffinitySeconds,omitempty"`

	// internalTrafficPolicy says which endpoints serve traffic to the service IPs: Cluster or Local.
	// +optional
	// +default="Cluster"
	// +kubebuilder:validation:Enum=Cluster;Local
	InternalTrafficPolicy corev1.ServiceInternalTrafficPolicy `json:"internalTrafficPolicy,omitempty"`

	// externalTrafficPolicy says which endpoints serve traffic to external IPs, load-balancer IPs and node ports: Cluster or Local.
	// +optional
	// +default="Cluster"
	// +kubebuilder:validation:Enum=Cluster;Local
	ExternalTrafficPolicy corev1.ServiceExternalTrafficPolicy `json:"externalTrafficPolicy,omitempty"`

	// trafficDistribution is the Service's spec.trafficDistribution, empty if unset.
	// +optional
	// +kubebuilder:validation:MaxLength=63
	TrafficDistribution string `json:"trafficDistribution,omitempty"`

	// loadBalancerSourceRanges are the sources that may use the load-balancer IPs. Empty: all.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=1024
	// +kubebuilder:validation:items:MaxLength=43
	// +kubebuilder:validation:items:XValidation:rule="isCIDR(self)",message="must be a CIDR such as 192.0.2.0/24"
	LoadBalancerSourceRanges []string `json:"loadBalancerSourceRanges,omitempty"`

	// healthCheckNodePort is the port at which a node tells whether it has local endpoints. Absent: none.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	HealthCheckNodePort int32 `json:"healthCheckNodePort,omitempty"`

	// nodeSelector selects the nodes that forward the Service. Empty selects all.
	// +optional
	// +default={}
	// +kubebuilder:validation:XValidation:rule="!has(self.matchExpressions) || self.matchExpressions.all(e, e.operator in ['In', 'NotIn'] ? has(e.values) && size(e.values) > 0 : e.operator in ['Exists', 'DoesNotExist'] && (!has(e.values) || size(e.values) == 0))",message="each entry must have operator In or NotIn with values, or Exists or DoesNotExist without",fieldPath=".matchExpressions"
	NodeSelector metav1.LabelSelector `json:"nodeSelector,omitempty"`

	// nodePortAddresses are the node addresses on which node ports are served: Primary, All, Localhost or CIDRs.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=43
	// +kubebuilder:validation:items:XValidation:rule="self in ['Primary', 'Localhost', 'All'] || (isCIDR(self) && self == string(cidr(self).masked()))",message="must be Primary, Localhost, All or a CIDR in canonical form, such as 192.168.0.0/24"
	NodePortAddresses []string `json:"nodePortAddresses,omitempty"`
}

// Condition types of a ServiceAssignment.
const (
	// AssignmentAllocated: the Service has every address that its policy owes it.
	AssignmentAllocated = "Allocated"
	// AssignmentProgrammed: traffic to the Service works on every selected node that is Ready. Latched per generation: endpoints that
	// come and go, and nodes that join or leave, do not reset it.
	AssignmentProgrammed = "Programmed"
)

// ReasonNoReadyEndpoints is the reason of Programmed=False for a port that no endpoint is ready for: there is no traffic that could work, however
// many nodes hold the assignment. The policy does not count it against the nodes.
const ReasonNoReadyEndpoints = "NoReadyEndpoints"

// AssignmentNodesStatus counts nodes.
type AssignmentNodesStatus struct {
	// desired is how many nodes must forward the Service: those selected that are Ready.
	Desired int32 `json:"desired"`
	// programmed is how many of them held this generation when the condition Programmed was last written.
	Programmed int32 `json:"programmed"`
}

// ServiceAssignmentStatus is written by the controller when a condition changes, never per node: every agent watches this object.
type ServiceAssignmentStatus struct {
	// observedGeneration is the generation of the spec that this status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`

	// conditions: Allocated, Programmed.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	Conditions []metav1.Condition `json:"conditions,omitempty"`

	// nodes counts the nodes that forward the Service.
	// +optional
	Nodes AssignmentNodesStatus `json:"nodes,omitempty"`
}

// ServiceAssignment is one Service compiled for the agents. It has the Service's namespace and name, is owned by it, and is
// written by the controller only.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=svca,categories=serviceproxy
// +kubebuilder:printcolumn:name="Policy",type=string,JSONPath=`.spec.policyName`
// +kubebuilder:printcolumn:name="Mode",type=string,JSONPath=`.spec.proxyMode`
// +kubebuilder:printcolumn:name="Service-IP",type=string,JSONPath=`.spec.serviceIPs[0].ip`
// +kubebuilder:printcolumn:name="Port",type=integer,JSONPath=`.spec.ports[0].port`
// +kubebuilder:printcolumn:name="Node-Port",type=integer,JSONPath=`.spec.ports[0].nodePort`
// +kubebuilder:printcolumn:name="Allocated",type=string,JSONPath=`.status.conditions[?(@.type=="Allocated")].status`
// +kubebuilder:printcolumn:name="Programmed",type=string,JSONPath=`.status.conditions[?(@.type=="Programmed")].status`
// +kubebuilder:printcolumn:name="Nodes",type=integer,JSONPath=`.status.nodes.programmed`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Programmed")].reason`
// +kubebuilder:printcolumn:name="Desired",type=integer,JSONPath=`.status.nodes.desired`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type ServiceAssignment struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec is the Service compiled for the agents.
	// +required
	Spec ServiceAssignmentSpec `json:"spec"`

	// status tells whether addresses are allocated and nodes programmed.
	// +optional
	Status ServiceAssignmentStatus `json:"status,omitempty"`
}

// ServiceAssignmentList is a list of ServiceAssignment.
// +kubebuilder:object:root=true
type ServiceAssignmentList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ServiceAssignment `json:"items"`
}
