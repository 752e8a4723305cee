// Package v1alpha1 holds the API of serviceproxy-operator, group networking.serviceproxy.io.
//
// Users write ServiceProxyPolicy. The controller writes AllocationClaim and ServiceAssignment, the agents write the
// status of NodeProxyState. Every rule on a field is stated in its schema (CEL where patterns do not suffice), so that a
// wrong object is refused by the API server with a message that names the field, the value and what would be valid.
//
// +kubebuilder:object:generate=true
// +groupName=networking.serviceproxy.io
package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion identifies this API: networking.serviceproxy.io/v1alpha1.
var GroupVersion = schema.GroupVersion{Group: "networking.serviceproxy.io", Version: "v1alpha1"}

// AddToScheme registers the types of this package with a scheme.
func AddToScheme(scheme *runtime.Scheme) error {
	scheme.AddKnownTypes(GroupVersion,
		&ServiceProxyPolicy{}, &ServiceProxyPolicyList{},
		&ServiceAssignment{}, &ServiceAssignmentList{},
		&AllocationClaim{}, &AllocationClaimList{},
		&NodeProxyState{}, &NodeProxyStateList{},
	)
	metav1.AddToGroupVersion(scheme, GroupVersion)
	return nil
}

const (
	// ServiceProxyName is the value of the Service label service.kubernetes.io/service-proxy-name that hands a Service
	// to this proxy and makes kube-proxy ignore it. A Service with another value is never covered.
	ServiceProxyName = "serviceproxy.io"

	// ManagedBy is the value of the labels app.kubernetes.io/managed-by and ipaddress.kubernetes.io/managed-by on every
	// object this operator creates. Objects without it are not ours and are never changed or deleted.
	ManagedBy = "serviceproxy-operator"

	// LabelManagedBy is on every object of ours, with the value ManagedBy. What does not carry it is never changed or deleted.
	LabelManagedBy = "app.kubernetes.io/managed-by"

	// LabelPolicy names the ServiceProxyPolicy that an object of ours exists for.
	LabelPolicy = "networking.serviceproxy.io/policy"

	// AnnotationReservation is put on a Service at admission. Its value is the reservationToken of the claims that were made for that very request, so that a second
	// look at one request finds what the first reserved. On a Service that exists it means nothing.
	AnnotationReservation = "networking.serviceproxy.io/reservation"

	// AnnotationSingleStack is put at admission on a Service that preferred two families and got one. Its value is the reason, for people.
	AnnotationSingleStack = "networking.serviceproxy.io/single-stack-reason"

	// LabelServiceProxyName on a Service hands it to a proxy other than kube-proxy.
	LabelServiceProxyName = "service.kubernetes.io/service-proxy-name"

	// AnnotationTakenOver is on a Service whose label LabelServiceProxyName the controller set, and names the policy that asked for it. It says that the label is
	// the controller's to remove; without it the label is the user's and stays.
	AnnotationTakenOver = "networking.serviceproxy.io/taken-over"

	// AnnotationHandingBack is on a ServiceAssignment that nodes keep forwarding though the Service left, until kube-proxy has had time to forward it. Its
	// value is since when, in RFC 3339.
	AnnotationHandingBack = "networking.serviceproxy.io/handing-back-since"

	// LoadBalancerClass is the spec.loadBalancerClass of Services that get an address of each of their families from ranges with use LoadBalancer. The status.loadBalancer of
	// such a Service is the controller's; that of any other Service is never touched.
	LoadBalancerClass = "networking.serviceproxy.io/vip"

	// AnnotationLoadBalancerIPs asks for particular addresses of ranges with use LoadBalancer: at most one of each family, separated by a comma.
	// It wins over the deprecated spec.loadBalancerIP, which is understood too.
	AnnotationLoadBalancerIPs = "networking.serviceproxy.io/load-balancer-ips"

	// FinalizerPolicy holds a ServiceProxyPolicy while allocations from its ranges exist.
	FinalizerPolicy = "networking.serviceproxy.io/policy-in-use"
)
