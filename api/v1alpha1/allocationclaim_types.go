package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// ClaimState is how far a claim has come.
// +kubebuilder:validation:Enum=Reserved;Bound;Released
type ClaimState string

const (
	// ClaimReserved: chosen for a request that is under way; its Service may not exist yet.
	ClaimReserved ClaimState = "Reserved"
	// ClaimBound: held by the Service named in holder.
	ClaimBound ClaimState = "Bound"
	// ClaimReleased: its Service is gone; it rests until expiresAt.
	ClaimReleased ClaimState = "Released"
)

// ClaimUse says what the claimed address or port is to its Service.
// +kubebuilder:validation:Enum=ClusterIP;AdditionalIP;LoadBalancerIP;NodePort;HealthCheckNodePort
type ClaimUse string

const (
	ClaimUseClusterIP           ClaimUse = "ClusterIP"
	ClaimUseAdditionalIP        ClaimUse = "AdditionalIP"
	ClaimUseLoadBalancerIP      ClaimUse = "LoadBalancerIP"
	ClaimUseNodePort            ClaimUse = "NodePort"
	ClaimUseHealthCheckNodePort ClaimUse = "HealthCheckNodePort"
)

// ClaimHolder names the Service that holds a claim.
type ClaimHolder struct {
	// namespace of the Service.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Namespace string `json:"namespace"`

	// name of the Service. Empty while a request with generateName is under way.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name,omitempty"`

	// uid of the Service. Empty while the claim is Reserved.
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:validation:MaxLength=64
	UID types.UID `json:"uid,omitempty"`
}

// AllocationClaimSpec says what is locked, for whom, and how firmly.
//
// +kubebuilder:validation:XValidation:rule="has(self.address) != has(self.nodePort)",message="exactly one of address and nodePort must be set"
// +kubebuilder:validation:XValidation:rule="has(self.address) == has(self.nodePort) || has(self.nodePort) == (self.use in ['NodePort', 'HealthCheckNodePort'])",messageExpression="has(self.nodePort) ? 'must be NodePort or HealthCheckNodePort for a node port' : 'must be ClusterIP, AdditionalIP or LoadBalancerIP for an address'",message="must suit what is claimed",fieldPath=".use"
// +kubebuilder:validation:XValidation:rule="has(self.address) == has(oldSelf.address) && (!has(self.address) || self.address == oldSelf.address)",message="is immutable: the claim's name locks it",fieldPath=".address"
// +kubebuilder:validation:XValidation:rule="has(self.nodePort) == has(oldSelf.nodePort) && (!has(self.nodePort) || self.nodePort == oldSelf.nodePort)",message="is immutable: the claim's name locks it",fieldPath=".nodePort"
// +kubebuilder:validation:XValidation:rule="self.state != 'Bound' || (has(self.holder.name) && has(self.holder.uid))",message="must have name and uid when state is Bound",fieldPath=".holder"
// +kubebuilder:validation:XValidation:rule="(self.state == 'Released') == has(self.expiresAt)",message="must be set when state is Released, and only then",fieldPath=".expiresAt"
// +kubebuilder:validation:XValidation:rule="oldSelf.state != 'Bound' || self.state != 'Reserved'",message="must not go from Bound back to Reserved: a Bound claim is Released first",fieldPath=".state"
// +kubebuilder:validation:XValidation:rule="oldSelf.state != 'Bound' || self.state != 'Bound' || !(oldSelf.use in ['AdditionalIP', 'LoadBalancerIP']) || self.holder == oldSelf.holder",message="must not change while the claim of an AdditionalIP or LoadBalancerIP is Bound, because the claim is the address's lock: it is Released first",fieldPath=".holder"
type AllocationClaimSpec struct {
	// address is the claimed address in canonical form.
	// +optional
	// +kubebuilder:validation:MinLength=2
	// +kubebuilder:validation:MaxLength=39
	// +kubebuilder:validation:XValidation:rule="isIP(self)",message="must be an IP address such as 10.99.13.178 or fd00:99::1"
	// +kubebuilder:validation:XValidation:rule="!isIP(self) || ip.isCanonical(self)",messageExpression="'must be in canonical form: %s'.format([string(ip(self))])",message="must be in canonical form"
	Address string `json:"address,omitempty"`

	// nodePort is the claimed node port, for all protocols.
	// +optional
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=65535
	NodePort int32 `json:"nodePort,omitempty"`

	// use says what the address or port is to its Service.
	// +required
	Use ClaimUse `json:"use"`

	// policyName is the ServiceProxyPolicy whose range it was taken from.
	// +required
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	PolicyName string `json:"policyName"`

	// holder is the Service that holds the claim, or held it last.
	// +required
	Holder ClaimHolder `json:"holder"`

	// state is Reserved, Bound or Released.
	// +required
	State ClaimState `json:"state"`

	// reservationToken ties the claim to the one request that made it.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	ReservationToken string `json:"reservationToken,omitempty"`

	// expiresAt is when a Released claim is deleted and its address or port is free again.
	// +optional
	ExpiresAt *metav1.Time `json:"expiresAt,omitempty"`
}

// AllocationClaim is the lock on one address or node port and the record of who holds it. Its name is what it locks: the
// address (10.99.13.178; IPv6 in full with dashes for colons, fd00-0099-0000-0000-0000-0000-0000-0001) or nodeport-30080. Creating it is taking the lock.
//
// It has no status: who holds it must be written in the very request that takes the lock, and a create drops status.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=claim,categories=serviceproxy
// +kubebuilder:printcolumn:name="State",type=string,JSONPath=`.spec.state`
// +kubebuilder:printcolumn:name="Use",type=string,JSONPath=`.spec.use`
// +kubebuilder:printcolumn:name="Namespace",type=string,JSONPath=`.spec.holder.namespace`
// +kubebuilder:printcolumn:name="Service",type=string,JSONPath=`.spec.holder.name`
// +kubebuilder:printcolumn:name="Policy",type=string,JSONPath=`.spec.policyName`
// +kubebuilder:printcolumn:name="Expires",type=string,JSONPath=`.spec.expiresAt`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="has(self.spec.nodePort) ? self.metadata.name.matches('^nodeport-[1-9][0-9]{0,4}$') && int(self.metadata.name.substring(9)) == self.spec.nodePort : !has(self.spec.address) || !isIP(self.spec.address) || (ip(self.spec.address).family() == 4 ? self.metadata.name == self.spec.address : self.metadata.name.size() == 39 && isIP(self.metadata.name.replace('-', ':')) && ip(self.metadata.name.replace('-', ':')) == ip(self.spec.address))",messageExpression="has(self.spec.nodePort) ? 'metadata.name must be nodeport-%d, the node port that the claim locks'.format([self.spec.nodePort]) : ip(self.spec.address).family() == 4 ? 'metadata.name must be %s, the address that the claim locks'.format([self.spec.address]) : 'metadata.name must be %s, the address that the claim locks, in full with dashes for colons, such as fd00-0099-0000-0000-0000-0000-0000-0001'.format([self.spec.address])",message="metadata.name must be what the claim locks"
type AllocationClaim struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec says what is locked, for whom, and how firmly.
	// +required
	Spec AllocationClaimSpec `json:"spec"`
}

// AllocationClaimList is a list of AllocationClaim.
// +kubebuilder:object:root=true
type AllocationClaimList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []AllocationClaim `json:"items"`
}
