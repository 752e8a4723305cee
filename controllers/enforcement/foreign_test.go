package enforcement

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// object makes what a client sends that leaves out what it does not set.
func object(namespace string, spec string, managed ...any) *unstructured.Unstructured {
	GinkgoHelper()
	u := &unstructured.Unstructured{Object: map[string]any{}}
	Expect(yaml.Unmarshal([]byte(spec), &u.Object)).To(Succeed())
	u.Object = map[string]any{"spec": u.Object, "metadata": map[string]any{}}
	u.SetAPIVersion("v1")
	u.SetKind("Service")
	u.SetNamespace(namespace)
	u.SetName(service("", nil).Name)
	if managed != nil {
		u.Object["metadata"].(map[string]any)["managedFields"] = managed
	}
	return u
}

// forget takes the node ports out of a Service.
func forget(s *corev1.Service) {
	for i := range s.Spec.Ports {
		s.Spec.Ports[i].NodePort = 0
	}
}

// kubectl runs kubectl with a manifest on its standard input.
func kubectl(manifest any, args ...string) (string, error) {
	GinkgoHelper()
	text, err := yaml.Marshal(manifest)
	Expect(err).NotTo(HaveOccurred())
	cmd := exec.Command(filepath.Join(os.Getenv("KUBEBUILDER_ASSETS"), "kubectl"), append([]string{"--kubeconfig", kubeconfig}, args...)...)
	cmd.Stdin = strings.NewReader(string(text))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

var _ = Describe("An address or node port of another policy", func() {
	const whole = "10.96.0.0/16" // whatever the API server picks lies in it
	everything := func() v1alpha1.ServiceProxyPolicy {
		return policy("tenant", withPorts(30000, 32759, bestEffort(whole, "fd00:96::/112")))
	}

	It("is refused to whoever asks for it", func() {
		enforce(policy("tenant-a", withPorts(30100, 30149, bestEffort("10.96.60.0/24", "fd00:96::3000/116"))),
			policy("tenant-b", withPorts(30150, 30199, bestEffort("10.96.61.0/24"))))
		nobody, a, b := newNamespace(""), newNamespace("tenant-a"), newNamespace("tenant-b")
		refused(service(nobody, ips("10.96.60.7")),
			"spec.clusterIPs: 10.96.60.7 lies in 10.96.60.0/24, a range of policy tenant-a, which does not cover this Service; ask for no address, or one outside")
		refused(service(nobody, ips("10.96.5.5", "fd00:96::3005")), "spec.clusterIPs: fd00:96::3005 lies in fd00:96::3000/116, a range of policy tenant-a")
		refused(service(b, ips("10.96.60.7")), "10.96.60.7 lies in 10.96.60.0/24, a range of policy tenant-a, which does not cover this Service, "+
			"policy tenant-b does; ask for no address, or one of that policy")
		create(service(a, ips("10.96.60.7")))
		create(service(b, ips("10.96.5.6")))
		refused(service(nobody, nodePorts(30000, 30149)), "spec.ports[1].nodePort: 30149 lies in 30100-30149, the node ports of policy tenant-a, which does not cover this Service; "+
			"ask for no node port, or one outside")
		refused(service(a, nodePorts(30150)), "spec.ports[0].nodePort: 30150 lies in 30150-30199, the node ports of policy tenant-b", "one of that policy")
		refused(service(nobody, func(s *corev1.Service) {
			s.Spec.Type, s.Spec.ExternalTrafficPolicy, s.Spec.HealthCheckNodePort = corev1.ServiceTypeLoadBalancer, corev1.ServiceExternalTrafficPolicyLocal, 30160
		}), "spec.healthCheckNodePort: 30160 lies in 30150-30199")
		create(service(a, nodePorts(30100)))
		create(service(nobody, nodePorts(30200)))
		create(service("kube-system", ips("10.96.60.99")))

		By("updates")
		svc := create(service(nobody, nodePorts(30201)))
		refuseUpdate(svc, func(s *corev1.Service) { s.Spec.Ports[0].NodePort = 30101 }, "30101 lies in 30100-30149")
		refuseUpdate(svc, func(s *corev1.Service) { ips(s.Spec.ClusterIP, "fd00:96::3006")(s) }, "fd00:96::3006 lies in fd00:96::3000/116")
		update(svc, func(s *corev1.Service) { s.Spec.Ports[0].NodePort = 30202 })
	})

	It("is left to whom the API server itself gave it, and who did not ask", func() {
		enforce(everything())
		nobody := newNamespace("")
		svc := create(service(nobody, nil))
		create(service(nobody, func(s *corev1.Service) { s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack) }))
		create(service(nobody, nodePorts(0, 0)))
		update(svc, func(s *corev1.Service) {
			nodePorts(0)(s)
			s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack)
		})
		Expect(svc.Spec.ClusterIPs).To(HaveLen(2))
		update(svc, func(s *corev1.Service) {
			s.Spec.Type, s.Spec.ExternalTrafficPolicy = corev1.ServiceTypeLoadBalancer, corev1.ServiceExternalTrafficPolicyLocal
		})
		Expect(svc.Spec.HealthCheckNodePort).NotTo(BeZero())
		update(svc, func(s *corev1.Service) {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "more", Port: 8443})
		})

		By("a PUT that has none of what was allocated")
		bare := service(nobody, nodePorts(0))
		bare.Name = svc.Name
		bare.Spec.Type, bare.Spec.ExternalTrafficPolicy = corev1.ServiceTypeLoadBalancer, corev1.ServiceExternalTrafficPolicyLocal
		bare.Spec.IPFamilyPolicy = svc.Spec.IPFamilyPolicy
		update(bare, func(*corev1.Service) {})

		By("one node port of two asked for")
		refused(service(nobody, func(s *corev1.Service) {
			nodePorts(30500)(s)
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "u", Port: 80, Protocol: corev1.ProtocolUDP})
		}), "spec.ports[0].nodePort: 30500")
	})

	It("is refused, and left, by every way to make a Service", func() {
		enforce(everything())
		ns := newNamespace("")
		const ask, askPort, askNothing = "{clusterIP: 10.96.70.1, ports: [{port: 80}]}", "{type: NodePort, ports: [{name: a, port: 80, nodePort: 30600}, {name: b, port: 81}]}", "{type: NodePort, ports: [{name: a, port: 80}]}"
		ways := map[string]func(*unstructured.Unstructured) error{
			"POST": func(u *unstructured.Unstructured) error { return k8s.Create(ctx, u) },
			"server-side apply": func(u *unstructured.Unstructured) error {
				return k8s.Apply(ctx, client.ApplyConfigurationFromUnstructured(u), client.FieldOwner("me"), client.ForceOwnership)
			},
		}
		for way, args := range map[string][]string{"kubectl create": {"create", "-f-"}, "kubectl apply": {"apply", "-f-"}, "kubectl apply --server-side": {"apply", "--server-side", "-f-"}} {
			ways[way] = func(u *unstructured.Unstructured) error {
				out, err := kubectl(u.Object, args...)
				if err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
				return nil
			}
		}
		for way, do := range ways {
			By(way)
			u := object(ns, ask)
			Expect(do(u)).To(MatchError(ContainSubstring("10.96.70.1 lies in 10.96.0.0/16, a range of policy tenant")))
			Expect(do(object(ns, askPort))).To(MatchError(ContainSubstring("spec.ports[0].nodePort: 30600 lies in 30000-32759")))
			u = object(ns, askNothing)
			Expect(do(u.DeepCopy())).To(Succeed())
			if way == "kubectl create" || way == "POST" {
				continue
			}
			// A second time, with a port more and none asked for, then with one.
			ports := []any{map[string]any{"name": "a", "port": int64(80)}, map[string]any{"name": "b", "port": int64(81)}}
			Expect(unstructured.SetNestedSlice(u.Object, ports, "spec", "ports")).To(Succeed())
			Expect(do(u.DeepCopy())).To(Succeed())
			ports[1].(map[string]any)["nodePort"] = int64(30601)
			Expect(unstructured.SetNestedSlice(u.Object, ports, "spec", "ports")).To(Succeed())
			Expect(do(u.DeepCopy())).To(MatchError(ContainSubstring("spec.ports[1].nodePort: 30601")))
		}
		By("patches")
		svc := create(service(ns, nodePorts(0)))
		for kind, patch := range map[types.PatchType]string{
			types.MergePatchType:          `{"spec":{"ports":[{"port":80,"nodePort":30602}]}}`,
			types.StrategicMergePatchType: `{"spec":{"ports":[{"port":80,"nodePort":30602}]}}`,
			types.JSONPatchType:           `[{"op":"replace","path":"/spec/ports/0/nodePort","value":30602}]`,
		} {
			expectDenial(k8s.Patch(ctx, svc.DeepCopy(), client.RawPatch(kind, []byte(patch))), "spec.ports[0].nodePort: 30602")
		}
		Expect(k8s.Patch(ctx, svc, client.RawPatch(types.JSONPatchType, []byte(`[{"op":"remove","path":"/spec/ports/0/nodePort"}]`)))).To(Succeed())
	})

	It("cannot be had by writing managedFields oneself", func() {
		enforce(everything())
		ns := newNamespace("")
		crafted := func(fields string) map[string]any {
			return map[string]any{"manager": "me", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1", "time": "2026-01-01T00:00:00Z",
				"fieldsV1": map[string]any{"f:spec": map[string]any{fields: map[string]any{}}}}
		}
		forgeries := map[string][]any{
			"reset": {map[string]any{}}, "none": {}, "somebody else's": {crafted("f:type")}, "of another version": {map[string]any{"manager": "me", "operation": "Update", "apiVersion": "v0",
				"fieldsType": "FieldsV1", "fieldsV1": map[string]any{"f:spec": map[string]any{}}}},
			"not understood": {map[string]any{"manager": "me", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": map[string]any{"nonsense": int64(1)}}},
			"for a status":   {map[string]any{"manager": "me", "operation": "Update", "apiVersion": "v1", "subresource": "status", "fieldsType": "FieldsV1", "fieldsV1": map[string]any{"f:status": map[string]any{}}}},
		}
		for what, managed := range forgeries {
			By(what)
			Expect(k8s.Create(ctx, object(ns, "{clusterIP: 10.96.70.1, ports: [{port: 80}]}", managed...))).To(MatchError(ContainSubstring("10.96.70.1 lies in")))
			Expect(k8s.Create(ctx, object(ns, "{type: NodePort, ports: [{port: 80, nodePort: 30600}]}", managed...))).To(MatchError(ContainSubstring("30600 lies in")))
			svc := create(service(ns, nil))
			u := &unstructured.Unstructured{}
			u.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Service"))
			Expect(k8s.Get(ctx, client.ObjectKeyFromObject(svc), u)).To(Succeed())
			Expect(unstructured.SetNestedField(u.Object, managed, "metadata", "managedFields")).To(Succeed())
			Expect(unstructured.SetNestedField(u.Object, "NodePort", "spec", "type")).To(Succeed())
			Expect(unstructured.SetNestedSlice(u.Object, []any{map[string]any{"port": int64(80), "nodePort": int64(30600)}}, "spec", "ports")).To(Succeed())
			Expect(k8s.Update(ctx, u)).To(MatchError(ContainSubstring("30600 lies in")))
		}
	})

	It("cannot be had by sending so much that nobody can judge it", func() {
		enforce(policy("tenant-a", withPorts(30100, 30149, bestEffort("10.96.60.0/24"))))
		ns := newNamespace("")
		many := func(n int, more ...int32) func(*corev1.Service) {
			return func(s *corev1.Service) {
				nodePorts(append(make([]int32, n), more...)...)(s)
				for i := range n {
					s.Spec.Ports[i].NodePort = int32(31000 + i)
				}
			}
		}
		refused(service(ns, many(maxPorts-1, 30149)), "spec.ports[299].nodePort: 30149 lies in 30100-30149, the node ports of policy tenant-a")
		refused(service(ns, many(maxPorts, 30149)), "spec.ports: a Service with node ports has at most 300 ports, and not 301")
		svc := create(service(ns, many(maxPorts)))
		refuseUpdate(svc, func(s *corev1.Service) { many(maxPorts-1, 30149)(s) }, "spec.ports[299].nodePort: 30149")
		refuseUpdate(svc, func(s *corev1.Service) { many(maxPorts, 30149)(s) }, "and not 301")
		update(svc, func(s *corev1.Service) { s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP })
		Expect(k8s.Delete(ctx, svc)).To(Succeed())
		create(service(ns, func(s *corev1.Service) { many(maxPorts + 1)(s); s.Spec.Type = corev1.ServiceTypeClusterIP; forget(s) }))

		managers := make([]any, 3000)
		for i := range managers {
			managers[i] = map[string]any{"manager": fmt.Sprintf("m%d", i), "operation": "Apply", "apiVersion": "v1", "fieldsType": "FieldsV1",
				"fieldsV1": map[string]any{"f:spec": map[string]any{"f:type": map[string]any{}}}}
		}
		crowded := object(ns, "{type: NodePort, ports: [{port: 80, nodePort: 30149}]}", managers...)
		Expect(k8s.Create(ctx, crowded)).To(MatchError(ContainSubstring("30149 lies in")))
		crowded = object(ns, "{clusterIP: 10.96.60.1, ports: [{port: 80}]}", managers...)
		Expect(k8s.Create(ctx, crowded)).To(MatchError(ContainSubstring("10.96.60.1 lies in")))
		refused(service(ns, func(s *corev1.Service) { // the most that is read
			many(maxPorts-1, 30149)(s)
			for i := range maxManagers - 1 {
				s.ManagedFields = append(s.ManagedFields, metav1.ManagedFieldsEntry{Manager: fmt.Sprint(i), Operation: metav1.ManagedFieldsOperationApply, APIVersion: "v1",
					FieldsType: "FieldsV1", FieldsV1: metav1.NewFieldsV1(`{"f:spec":{"f:ports":{"k:{\"port\":1,\"protocol\":\"TCP\"}":{"f:nodePort":{}}}}}`)})
			}
		}), "spec.ports[299].nodePort: 30149 lies in")
		labelled := service(ns, func(s *corev1.Service) {
			ips("10.96.60.1")(s)
			s.Labels = map[string]string{}
			for i := range 10000 {
				s.Labels[fmt.Sprintf("l%d", i)] = "x"
			}
		})
		refused(labelled, "10.96.60.1 lies in")
	})

	It("is nobody's request if a webhook filled it in", func() {
		enforce(everything())
		playWebhook()
		ns := newNamespace("")
		// The address to fill in is one that a request must not ask for, see above.
		tries := 0
		annotated := func(s *corev1.Service) {
			tries++
			s.Annotations = map[string]string{"test.io/ip": fmt.Sprintf("10.96.71.%d", tries), "test.io/port": fmt.Sprint(30610 + tries)}
		}
		filled := func(s *corev1.Service) bool {
			return s.Annotations["test.io/ip"] == s.Spec.ClusterIP && s.Annotations["test.io/port"] == fmt.Sprint(s.Spec.Ports[0].NodePort)
		}
		var svc *corev1.Service
		Eventually(func() bool { // until the API server has taken notice of its new policy
			svc = service(ns, annotated)
			Expect(k8s.Create(ctx, svc)).To(Succeed())
			return filled(svc)
		}).WithPolling(50 * time.Millisecond).Should(BeTrue())
		svc.Annotations["test.io/port"] = "30699"
		Expect(k8s.Update(ctx, svc)).To(Succeed())
		Expect(filled(svc)).To(BeTrue())
		expectDenial(k8s.Create(ctx, service(ns, ips("10.96.71.250"))), "a range of policy tenant")
	})

	It("passes if it cannot be judged", func() {
		rules := Compile([]v1alpha1.ServiceProxyPolicy{everything(), policy("strict", strict("10.96.1.0/24"))}, nil)
		for _, r := range rules {
			want := map[string]admissionv1.FailurePolicyType{StrictName: admissionv1.Fail, ForeignName: admissionv1.Ignore}[r.Policy.Name]
			Expect(*r.Policy.Spec.FailurePolicy).To(Equal(want))
			Expect(r.Binding.Spec.ValidationActions).To(ConsistOf(admissionv1.Deny))
		}
		Expect(rules).To(HaveLen(2))
	})
})

// playWebhook makes the API server fill addresses and node ports into Services that carry an annotation, where a mutating webhook would.
func playWebhook() {
	GinkgoHelper()
	fill := &admissionv1.MutatingAdmissionPolicy{ObjectMeta: metav1.ObjectMeta{Name: "fill"}, Spec: admissionv1.MutatingAdmissionPolicySpec{
		FailurePolicy: new(admissionv1.Fail), ReinvocationPolicy: admissionv1.NeverReinvocationPolicy,
		MatchConstraints: &admissionv1.MatchResources{ResourceRules: []admissionv1.NamedRuleWithOperations{{RuleWithOperations: admissionv1.RuleWithOperations{
			Operations: []admissionv1.OperationType{admissionv1.Create, admissionv1.Update},
			Rule:       admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"services"}},
		}}}},
		MatchConditions: []admissionv1.MatchCondition{{Name: "annotated", Expression: "has(object.metadata.annotations) && 'test.io/ip' in object.metadata.annotations"}},
		Mutations: []admissionv1.Mutation{{PatchType: admissionv1.PatchTypeJSONPatch, JSONPatch: &admissionv1.JSONPatch{Expression: `[
			JSONPatch{op: "add", path: "/spec/clusterIP", value: object.metadata.annotations["test.io/ip"]},
			JSONPatch{op: "add", path: "/spec/type", value: "NodePort"},
			JSONPatch{op: "add", path: "/spec/ports/0/nodePort", value: int(object.metadata.annotations["test.io/port"])}
		]`}}},
	}}
	Expect(k8s.Create(ctx, fill)).To(Succeed())
	DeferCleanup(func() { Expect(k8s.Delete(ctx, fill)).To(Succeed()) })
	binding := &admissionv1.MutatingAdmissionPolicyBinding{ObjectMeta: metav1.ObjectMeta{Name: "fill"}, Spec: admissionv1.MutatingAdmissionPolicyBindingSpec{PolicyName: "fill"}}
	Expect(k8s.Create(ctx, binding)).To(Succeed())
	DeferCleanup(func() { Expect(k8s.Delete(ctx, binding)).To(Succeed()) })
}
