package v1alpha1_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

var _ = Describe("the API server", func() {
	DescribeTable("accepts what is just inside the limits", func(ctx context.Context, kind, patch string) {
		Expect(c.Create(ctx, object(kind, patch), client.DryRunAll, client.FieldValidation(metav1.FieldValidationStrict))).To(Succeed())
	},
		func(kind, patch string) string { return rejection{kind: kind, object: patch}.String() },
		Entry(nil, "ServiceProxyPolicy", `spec: {serviceRanges: null}`),
		Entry(nil, "ServiceProxyPolicy", `metadata: {name: a23456789-123456789-123456789-123456789-123456789-123456789-123}`),
		Entry(nil, "ServiceProxyPolicy", `spec: {priority: -1000000, serviceRanges: [{cidr: 10.0.0.0/8}, {cidr: 192.168.1.0/30}, {cidr: "fd00::/64"}, {cidr: "fd01::/126"}]}`),
		Entry(nil, "ServiceProxyPolicy", `spec: {priority: 1000000, serviceRanges: [{cidr: 10.98.0.0/16}, {cidr: 10.99.0.0/16}, {cidr: 192.0.2.0/24, use: LoadBalancer, allocation: Manual}]}`),
		Entry(nil, "ServiceProxyPolicy", `spec: {serviceRanges: [{cidr: 10.99.0.0/16, reserved: [10.99.0.1, 10.99.0.0/28, 10.99.255.255, 10.99.0.0/16]}, {cidr: "fd00:99::/112", reserved: ["fd00:99::a"]}]}`),
		Entry(nil, "ServiceProxyPolicy", `spec: {nodePortRange: {start: 30000, end: 30000}, nodePortAddresses: [Primary, Localhost, 192.168.0.0/24, "fd00::/64"]}`),
		Entry(nil, "ServiceProxyPolicy", `spec: {nodePortRange: {start: 1, end: 65535}, nodePortAddresses: [All, Localhost]}`),
		Entry(nil, "ServiceProxyPolicy", `spec: {reuse: {quarantine: 0s, stickyFor: 720h}}`),
		Entry(nil, "ServiceProxyPolicy", `spec: {reuse: {quarantine: 24h, stickyFor: 1h30m0.5s}}`),
		Entry(nil, "ServiceProxyPolicy", `spec: {namespaceSelector: {matchLabels: {tenant: a}, matchExpressions: [{key: tier, operator: In, values: [gold]}, {key: tier, operator: Exists}]}}`),
		Entry(nil, "ServiceProxyPolicy", `spec: {proxyMode: NFTables, scheduler: SourceHash}`),
		Entry(nil, "ServiceProxyPolicy", `spec: {proxyMode: IPTables, scheduler: Random}`),
		Entry(nil, "ServiceProxyPolicy", `spec: {proxyMode: IPVS}`),
		Entry(nil, "ServiceProxyPolicy", `spec: {proxyMode: IPVS, scheduler: Maglev}`),
		Entry(nil, "ServiceProxyPolicy", `spec: {proxyMode: Userspace, scheduler: LeastConnection}`),
		Entry(nil, "ServiceProxyPolicy", `spec: {proxyMode: EBPF, scheduler: Maglev}`),
		Entry(nil, "ServiceAssignment", `spec: {serviceIPs: null, ports: null}`),
		Entry(nil, "ServiceAssignment", `spec: {serviceIPs: [{ip: 10.99.0.1, source: ClusterIP}, {ip: "fd00:99::1", source: Additional}], externalIPs: [192.0.2.1], loadBalancerIPs: ["2001:db8::1"], loadBalancerSourceRanges: [0.0.0.0/0, 10.1.2.3/8]}`),
		Entry(nil, "ServiceAssignment", `spec: {ports: [{name: dns, protocol: UDP, port: 53}, {name: dns-tcp, protocol: TCP, port: 53, nodePort: 65535}, {name: sctp, protocol: SCTP, port: 65535}], sessionAffinitySeconds: 86400}`),
		Entry(nil, "AllocationClaim", `{metadata: {name: fd00-0099-0000-0000-0000-0000-0000-0001}, spec: {address: "fd00:99::1"}}`),
		Entry(nil, "AllocationClaim", `{metadata: {name: nodeport-65535}, spec: {address: null, nodePort: 65535, use: NodePort}}`),
		Entry(nil, "AllocationClaim", `spec: {state: Reserved, holder: {name: null, uid: null}, reservationToken: 6f0c1c6e}`),
		Entry(nil, "NodeProxyState", `spec: {reportInterval: 100ms}`),
		Entry(nil, "NodeProxyState", `spec: {reportInterval: 5m0s}`),
		Entry(nil, "NodeProxyState", `spec: {}`),
	)

	It("fills in the defaults that kubectl explain names", func(ctx context.Context) {
		policy := object("ServiceProxyPolicy")
		Expect(c.Create(ctx, policy, client.DryRunAll)).To(Succeed())
		Expect(yaml.Marshal(policy.Object["spec"])).To(MatchYAML(`
enforcement: BestEffort
kubeProxy: TakeOver
namespaceSelector: {}
nodePortAddresses: [Primary]
nodeSelector: {}
priority: 0
proxyMode: NFTables
reuse: {quarantine: 60s, stickyFor: 0s}
serviceRanges: [{cidr: 10.99.0.0/16, use: ClusterIP, allocation: Automatic}]
serviceSelector: {}`))

		assignment := object("ServiceAssignment")
		Expect(c.Create(ctx, assignment, client.DryRunAll)).To(Succeed())
		Expect(assignment.Object["spec"]).To(And(
			HaveKeyWithValue("internalTrafficPolicy", "Cluster"),
			HaveKeyWithValue("externalTrafficPolicy", "Cluster"),
			HaveKeyWithValue("nodeSelector", BeEmpty())))

		node := object("NodeProxyState", "spec: null")
		Expect(c.Create(ctx, node, client.DryRunAll)).To(Succeed())
		Expect(node.Object["spec"]).To(HaveKeyWithValue("reportInterval", "1s"))
	})

	It("takes the zero values that Go clients write", func(ctx context.Context) {
		policy := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: "bare"}}
		Expect(c.Create(ctx, policy, client.DryRunAll)).To(Succeed())
		Expect(policy.Spec.ProxyMode).To(Equal(v1alpha1.ProxyModeNFTables))
		Expect(policy.Spec.Reuse.Quarantine).To(Equal(&metav1.Duration{Duration: time.Minute}))
		Expect(c.Create(ctx, &v1alpha1.NodeProxyState{ObjectMeta: metav1.ObjectMeta{Name: "bare"}}, client.DryRunAll)).To(Succeed())
	})

	It("lets a claim go from hand to hand", func(ctx context.Context) {
		claim := object("AllocationClaim", `spec: {state: Reserved, holder: {name: null, uid: null}}`)
		Expect(c.Create(ctx, claim)).To(Succeed())
		DeferCleanup(func(ctx context.Context) { Expect(c.Delete(ctx, claim)).To(Succeed()) })
		for _, next := range []string{
			`spec: {state: Bound}`,
			`spec: {state: Bound, policyName: tenant-b}`,
			`spec: {state: Bound, holder: {name: successor}}`, // the API server gave the ClusterIP to another Service; its IPAddress is the lock
			`spec: {state: Released, expiresAt: "2026-01-01T00:00:00Z"}`,
			`spec: {state: Bound, holder: {namespace: other, name: api, uid: 9a1e9d32-5b57-4d6f-8c56-2f6d7c6a3b10}}`,
			`spec: {state: Released, expiresAt: "2026-01-02T00:00:00Z", holder: {namespace: other, name: api, uid: 9a1e9d32-5b57-4d6f-8c56-2f6d7c6a3b10}}`,
			`spec: {state: Reserved, holder: {uid: null}}`,
		} {
			update := object("AllocationClaim", next)
			update.SetResourceVersion(claim.GetResourceVersion())
			Expect(c.Update(ctx, update)).To(Succeed(), next)
			claim = update
		}
	})

	It("keeps every condition and count that the status can hold", func(ctx context.Context) {
		for kind, status := range map[string]string{
			"ServiceProxyPolicy": `{observedGeneration: 1, conditions: [` + condition("Ready") + `, ` + condition("Accepted") + `], families: [` + counts("family: IPv4") + `],
				serviceRanges: [` + counts("cidr: 10.99.0.0/16, ready: true, foreign: 2, serviceCIDR: serviceproxy-abc") + `], nodePorts: {total: 10, allocated: 1, quarantined: 0, free: 9},
				services: {covered: 2, assigned: 2, programmed: 1, waiting: 0}, nodes: {selected: 3, ready: 3, unsupported: 0}}`,
			"ServiceAssignment": `{observedGeneration: 1, conditions: [` + condition("Programmed") + `], nodes: {desired: 3, programmed: 3}}`,
			"NodeProxyState": `{assignmentRevision: "12", endpointSliceRevision: "13", lastAppliedTime: "2026-01-01T00:00:00Z", services: 1, endpoints: 2, driftRepairs: 3, bootID: 6c0e7a5e-2b1a-4b57-9c3f-0d8a6d8d4c11, agentVersion: v0.1.0,
				modes: [{mode: NFTables, available: true, services: 1}, {mode: IPVS, available: false, message: no ip_vs, services: 0}], conditions: [` + condition("Ready") + `]}`,
		} {
			made := object(kind)
			Expect(c.Create(ctx, made)).To(Succeed())
			DeferCleanup(func(ctx context.Context) { Expect(c.Delete(ctx, made)).To(Succeed()) })
			want := object(kind, "status: "+status).Object["status"]
			update := made.DeepCopy()
			update.Object["status"] = want
			Expect(c.Status().Update(ctx, update)).To(Succeed())
			Expect(update.Object["status"]).To(Equal(want))
		}
	})
})

var _ = Describe("server-side apply", func() {
	It("lets two managers own ranges of one policy", func(ctx context.Context) {
		apply := func(manager, spec string) {
			GinkgoHelper()
			policy := &unstructured.Unstructured{}
			Expect(yaml.Unmarshal([]byte("{metadata: {name: shared}, spec: "+spec+"}"), &policy.Object)).To(Succeed())
			policy.SetAPIVersion(v1alpha1.GroupVersion.String())
			policy.SetKind("ServiceProxyPolicy")
			Expect(c.Apply(ctx, client.ApplyConfigurationFromUnstructured(policy), client.FieldOwner(manager))).To(Succeed())
		}
		ranges := func() []v1alpha1.ServiceRange {
			GinkgoHelper()
			var policy v1alpha1.ServiceProxyPolicy
			Expect(c.Get(ctx, client.ObjectKey{Name: "shared"}, &policy)).To(Succeed())
			return policy.Spec.ServiceRanges
		}
		v4 := v1alpha1.ServiceRange{CIDR: "10.99.0.0/16", Use: "ClusterIP", Allocation: "Automatic"}
		v6 := v1alpha1.ServiceRange{CIDR: "fd00:99::/112", Use: "ClusterIP", Allocation: "Automatic"}

		apply("network-team", `{serviceRanges: [{cidr: 10.99.0.0/16}]}`)
		DeferCleanup(func(ctx context.Context) {
			Expect(c.Delete(ctx, &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: "shared"}})).To(Succeed())
		})
		apply("ipv6-team", `{serviceRanges: [{cidr: "fd00:99::/112"}]}`)
		Expect(ranges()).To(ConsistOf(v4, v6))

		v6.Reserved = []string{"fd00:99::1"}
		apply("ipv6-team", `{serviceRanges: [{cidr: "fd00:99::/112", reserved: ["fd00:99::1"]}]}`)
		Expect(ranges()).To(ConsistOf(v4, v6))

		apply("ipv6-team", `{serviceRanges: []}`)
		Expect(ranges()).To(ConsistOf(v4))
	})
})

var _ = Describe("the samples", func() {
	It("are accepted as they are", func(ctx context.Context) {
		files, err := filepath.Glob("../../config/samples/*_serviceproxypolicy*.yaml")
		Expect(err).NotTo(HaveOccurred())
		Expect(files).NotTo(BeEmpty())
		for _, file := range files {
			text, err := os.ReadFile(file)
			Expect(err).NotTo(HaveOccurred())
			sample := &unstructured.Unstructured{}
			Expect(yaml.UnmarshalStrict(text, &sample.Object)).To(Succeed(), file)
			Expect(c.Create(ctx, sample, client.DryRunAll, client.FieldValidation(metav1.FieldValidationStrict))).To(Succeed(), file)
		}
	})

	It("of the README is accepted, and what it says about refusal is true", func(ctx context.Context) {
		readme, err := os.ReadFile("../../README.md")
		Expect(err).NotTo(HaveOccurred())
		_, text, found := strings.Cut(string(readme), "```yaml\n")
		Expect(found).To(BeTrue())
		text, _, _ = strings.Cut(text, "```")
		policy := &unstructured.Unstructured{}
		Expect(yaml.UnmarshalStrict([]byte(text), &policy.Object)).To(Succeed())
		Expect(c.Create(ctx, policy, client.DryRunAll, client.FieldValidation(metav1.FieldValidationStrict))).To(Succeed())

		Expect(unstructured.SetNestedSlice(policy.Object, []any{map[string]any{"cidr": "10.99.13.0/16"}}, "spec", "serviceRanges")).To(Succeed())
		err = c.Create(ctx, policy, client.DryRunAll)
		Expect(err).To(MatchError(ContainSubstring("is invalid: ")))
		_, refusal, _ := strings.Cut(err.Error(), "is invalid: ")
		Expect(string(readme)).To(ContainSubstring(`The ServiceProxyPolicy "tenant-a" is invalid: ` + refusal))
	})
})
