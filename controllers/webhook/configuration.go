package webhook

import (
	"crypto/x509"
	"strings"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/admission"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

const (
	// entryAll asks for every Service, and lets it pass if nobody answers. Entries of Strict policies are the policy's name and entryStrict.
	entryAll    = "services.networking.serviceproxy.io"
	entryStrict = ".strict.networking.serviceproxy.io"
	// timeoutSeconds is how long the API server waits for one entry.
	timeoutSeconds = 3
)

// entries are the configuration's webhooks for the policies, in an order that depends on nothing but them. There are none without a policy.
//
// Strict entries come first: if nobody answers, the request fails by the first of them, and has not waited for the others.
func entries(policies []v1alpha1.ServiceProxyPolicy, to target, bundle []*x509.Certificate) []admissionregistrationv1.MutatingWebhook {
	if len(policies) == 0 {
		return nil
	}
	var strict []*allocator.Policy
	byName := map[string]*v1alpha1.ServiceProxyPolicy{}
	for i := range policies {
		// A policy that cannot be understood must not keep the API server from taking the others' entries. One that is being deleted takes nothing new.
		if p, err := allocator.ParsePolicy(&policies[i]); err == nil && p.Strict && !p.Terminating {
			strict, byName[p.Name] = append(strict, p), &policies[i]
		}
	}
	allocator.SortByPrecedence(strict)
	var out []admissionregistrationv1.MutatingWebhook
	for _, p := range strict {
		spec := byName[p.Name].Spec
		services := spec.ServiceSelector.DeepCopy()
		if spec.KubeProxy == v1alpha1.KubeProxyCoexist {
			services.MatchExpressions = append(services.MatchExpressions, metav1.LabelSelectorRequirement{
				Key: allocator.LabelServiceProxyName, Operator: metav1.LabelSelectorOpIn, Values: []string{v1alpha1.ServiceProxyName}})
		}
		out = append(out, entry(p.Name+entryStrict, admissionregistrationv1.Fail, &spec.NamespaceSelector, services, to, bundle))
	}
	return append(out, entry(entryAll, admissionregistrationv1.Ignore, &metav1.LabelSelector{}, &metav1.LabelSelector{}, to, bundle))
}

// entry is one webhook. All that the API server would default is said, so that what is there can be compared with what should be.
func entry(name string, failure admissionregistrationv1.FailurePolicyType, namespaces, services *metav1.LabelSelector, to target, bundle []*x509.Certificate) admissionregistrationv1.MutatingWebhook {
	namespaces = namespaces.DeepCopy()
	namespaces.MatchExpressions = append(namespaces.MatchExpressions, metav1.LabelSelectorRequirement{
		Key: corev1.LabelMetadataName, Operator: metav1.LabelSelectorOpNotIn, Values: ExcludedNamespaces(to.namespace)})
	client := admissionregistrationv1.WebhookClientConfig{CABundle: encodeCertificates(bundle...)}
	if to.url != "" {
		client.URL = new(to.at())
	} else {
		client.Service = &admissionregistrationv1.ServiceReference{Namespace: to.namespace, Name: ServiceName, Path: new(admission.Path), Port: new(int32(443))}
	}
	return admissionregistrationv1.MutatingWebhook{
		Name: name, ClientConfig: client, FailurePolicy: &failure, NamespaceSelector: namespaces, ObjectSelector: services,
		Rules: []admissionregistrationv1.RuleWithOperations{{
			Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create, admissionregistrationv1.Update},
			Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"services"}, Scope: new(admissionregistrationv1.NamespacedScope)},
		}},
		MatchPolicy: new(admissionregistrationv1.Equivalent), MatchConditions: matchConditions(failure),
		SideEffects: new(admissionregistrationv1.SideEffectClassNoneOnDryRun), TimeoutSeconds: new(int32(timeoutSeconds)),
		ReinvocationPolicy: new(admissionregistrationv1.IfNeededReinvocationPolicy), AdmissionReviewVersions: []string{"v1"},
	}
}

// matchConditions keep away what allocates nothing. An error in one of them counts as no answer, so each has to hold for whatever a request may lack.
func matchConditions(failure admissionregistrationv1.FailurePolicyType) []admissionregistrationv1.MatchCondition {
	conditions := []admissionregistrationv1.MatchCondition{
		// A Service must be able to go, even if nobody answers.
		{Name: "is-not-being-deleted", Expression: "!has(object.metadata.deletionTimestamp)"},
		// The API server makes it when it starts, and gives it an address of its own choice.
		{Name: "is-not-the-api-server", Expression: "!(request.namespace == 'default' && object.metadata.?name.orValue('') == 'kubernetes')"},
		{Name: "has-addresses", Expression: "object.spec.?type.orValue('ClusterIP') != 'ExternalName' && object.spec.?clusterIP.orValue('') != 'None'"},
		{Name: "changes-what-is-allocated", Expression: "request.operation == 'CREATE' || " + strings.Join(changes, " || ")},
	}
	if failure == admissionregistrationv1.Fail {
		// No policy covers another proxy's Service, so it must not wait for us. It is kept out of what policies declare all the same, if somebody answers.
		conditions = append(conditions, admissionregistrationv1.MatchCondition{Name: "is-not-another-proxys",
			Expression: "object.metadata.?labels[?'" + allocator.LabelServiceProxyName + "'].orValue('" + v1alpha1.ServiceProxyName + "') == '" + v1alpha1.ServiceProxyName + "'"})
	}
	return conditions
}

// changes say whether an UPDATE changes something that is allocated, or by which it is. The API server carries allocated fields that a request leaves out over from
// the old object, and an ipFamilyPolicy too; so what is left out is not changed.
var changes = []string{
	"object.spec.?type != oldObject.spec.?type",
	given("clusterIP", "''"),
	given("clusterIPs", "[]"),
	given("ipFamilies", "[]"),
	given("ipFamilyPolicy", "''"),
	given("healthCheckNodePort", "0"),
	"object.spec.?externalTrafficPolicy != oldObject.spec.?externalTrafficPolicy",
	"object.spec.?allocateLoadBalancerNodePorts != oldObject.spec.?allocateLoadBalancerNodePorts",
	// Node ports are carried over by the ports' names. Cost must not grow with the square of the ports' number, or a Service with many exceeds what the API server allows.
	"(" + ports("object", nodePort) + " != " + ports("oldObject", nodePort) + " && " +
		"(" + ports("object", "") + " != " + ports("oldObject", "") + " || object.spec.?ports.orValue([]).exists(p, p.?nodePort.orValue(0) != 0)))",
}

// given says whether a field of spec is given and differs from the old object's.
func given(field, empty string) string {
	value := ".spec.?" + field + ".orValue(" + empty + ")"
	return "(object" + value + " != " + empty + " && object" + value + " != oldObject" + value + ")"
}

const nodePort = ", p.?nodePort.orValue(0)"

// ports lists what of an object's ports decides about node ports.
func ports(object, more string) string {
	return object + ".spec.?ports.orValue([]).map(p, [p.?name.orValue(''), p.port, p.?protocol.orValue('TCP')" + more + "])"
}
