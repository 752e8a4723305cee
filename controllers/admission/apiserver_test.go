package admission_test

import (
	"fmt"
	"math/rand/v2"
	"slices"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/admission"
)

// The plan claims to know what the API server does. Here the API server itself is the judge: random Services, and random changes to them, in a namespace that our
// webhook does not see.
var _ = Describe("The plan of a request", func() {
	It("is what the API server does, for random Services and changes of them", func() {
		seed := GinkgoRandomSeed()
		r := rand.New(rand.NewPCG(uint64(seed), 3))
		accepted := map[string]int{}
		for i := range 150 {
			svc := randomService(r, i)
			was := compare(accepted, "create", svc, nil, func(s *corev1.Service) error { return k8s.Create(ctx, s) })
			if was == nil {
				continue
			}
			for range 2 {
				changed := randomChange(r, was, i)
				if now := compare(accepted, "update", changed, was, func(s *corev1.Service) error { return k8s.Update(ctx, s) }); now != nil {
					was = now
				}
			}
			Expect(k8s.Delete(ctx, was)).To(Succeed())
		}
		AddReportEntry("accepted by the API server", accepted)
		Expect(accepted["create"]).To(BeNumerically(">", 30))
		Expect(accepted["update"]).To(BeNumerically(">", 30))
	})
})

// compare sends a request and holds the plan to the answer. It returns the Service, nil if it was refused.
func compare(accepted map[string]int, what string, svc, old *corev1.Service, send func(*corev1.Service) error) *corev1.Service {
	GinkgoHelper()
	want, ok := admission.Predict(svc, old, []v1alpha1.IPFamily{v1alpha1.IPv4, v1alpha1.IPv6})
	got := svc.DeepCopy()
	if err := send(got); err != nil {
		return nil // for whatever reason: there are more than the plan knows
	}
	accepted[what]++
	about := fmt.Sprintf("%s %+v\nof %+v\ngave %+v", what, svc.Spec, old, got.Spec)
	Expect(ok).To(BeTrue(), "the plan has it refused: %s", about)
	if got.Spec.Type == corev1.ServiceTypeExternalName {
		return got
	}
	if got.Spec.ClusterIP != corev1.ClusterIPNone {
		Expect(got.Spec.IPFamilies).To(Equal(want.Families), about)
		Expect(got.Spec.ClusterIPs).To(HaveLen(len(want.Addresses)), about)
		for i, ip := range want.Addresses {
			Expect(ip).To(BeElementOf("", got.Spec.ClusterIPs[i]), about)
		}
	}
	if got.Spec.Type == corev1.ServiceTypeClusterIP {
		return got
	}
	any := map[int32]int32{} // what each "any" turned out to be
	ports := append(portsOf(got), got.Spec.HealthCheckNodePort)
	for i, port := range append(slices.Clone(want.Ports), want.Health) {
		if port >= 0 {
			Expect(ports[i]).To(Equal(port), about)
			continue
		}
		if other, known := any[port]; known {
			Expect(ports[i]).To(Equal(other), about)
		} else {
			Expect(ports[i]).NotTo(BeZero(), about)
			for _, other := range any {
				Expect(ports[i]).NotTo(Equal(other), about)
			}
		}
		any[port] = ports[i]
	}
	return got
}

func oneOf[T any](r *rand.Rand, all ...T) T { return all[r.IntN(len(all))] }

// randomService makes a Service as admission sees it: with the API server's defaults.
func randomService(r *rand.Rand, i int) *corev1.Service {
	svc := &corev1.Service{}
	svc.Namespace, svc.Name = operatorNamespace, fmt.Sprintf("random-%d", i)
	randomType(r, svc)
	randomFamilies(r, svc, i)
	randomPorts(r, svc, i)
	return svc
}

func randomType(r *rand.Rand, svc *corev1.Service) {
	spec := &svc.Spec
	spec.Type = oneOf(r, corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeExternalName)
	spec.AllocateLoadBalancerNodePorts, spec.ExternalTrafficPolicy, spec.ExternalName = nil, "", ""
	switch spec.Type {
	case corev1.ServiceTypeExternalName:
		spec.ExternalName = "example.org"
	case corev1.ServiceTypeLoadBalancer:
		spec.AllocateLoadBalancerNodePorts = new(r.IntN(3) > 0)
		spec.ExternalTrafficPolicy = oneOf(r, corev1.ServiceExternalTrafficPolicyCluster, corev1.ServiceExternalTrafficPolicyLocal)
	case corev1.ServiceTypeNodePort:
		spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
	}
	spec.HealthCheckNodePort = 0
}

func randomFamilies(r *rand.Rand, svc *corev1.Service, i int) {
	spec := &svc.Spec
	if spec.Type == corev1.ServiceTypeExternalName {
		return
	}
	policies := []*corev1.IPFamilyPolicy{nil, new(corev1.IPFamilyPolicySingleStack), new(corev1.IPFamilyPolicyPreferDualStack), new(corev1.IPFamilyPolicyRequireDualStack)}
	spec.IPFamilyPolicy = oneOf(r, policies...)
	spec.IPFamilies = oneOf(r, nil, nil, []corev1.IPFamily{"IPv4"}, []corev1.IPFamily{"IPv6"}, []corev1.IPFamily{"IPv4", "IPv6"}, []corev1.IPFamily{"IPv6", "IPv4"}, []corev1.IPFamily{"IPv4", "IPv4"})
	v4, v6 := fmt.Sprintf("10.96.250.%d", i+1), fmt.Sprintf("fd00:96::fa:%x", i+1)
	spec.ClusterIPs = oneOf(r, nil, nil, nil, nil, []string{v4}, []string{v6}, []string{v4, v6}, []string{v6, v4}, []string{v4, v4}, []string{"None"}, []string{"none"})
	if len(spec.ClusterIPs) > 0 && r.IntN(8) > 0 {
		spec.ClusterIP = spec.ClusterIPs[0]
	}
	if len(spec.ClusterIPs) == 1 && r.IntN(3) == 0 {
		spec.ClusterIPs = nil // a client that knows clusterIP only
	}
}

func randomPorts(r *rand.Rand, svc *corev1.Service, i int) {
	svc.Spec.Ports = nil
	for range 1 + r.IntN(3) {
		p := corev1.ServicePort{Port: oneOf[int32](r, 53, 53, 80), Protocol: oneOf(r, corev1.ProtocolTCP, corev1.ProtocolUDP)}
		p.Name = fmt.Sprintf("p%d-%s", p.Port, map[corev1.Protocol]string{"TCP": "t", "UDP": "u"}[p.Protocol])
		if slices.ContainsFunc(svc.Spec.Ports, func(o corev1.ServicePort) bool { return o.Name == p.Name }) {
			continue
		}
		if svc.Spec.Type != corev1.ServiceTypeClusterIP && r.IntN(4) == 0 {
			p.NodePort = 30030 + int32(r.IntN(3))
		}
		svc.Spec.Ports = append(svc.Spec.Ports, p)
	}
	if svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal && r.IntN(4) == 0 {
		svc.Spec.HealthCheckNodePort = 30035 + int32(i%3)
	}
}

// randomChange is an update of a Service: of a client that read it first, or of one that did not.
func randomChange(r *rand.Rand, was *corev1.Service, i int) *corev1.Service {
	svc := was.DeepCopy()
	svc.ResourceVersion = ""
	if r.IntN(2) == 0 {
		svc = randomService(r, i)
		if r.IntN(2) == 0 {
			svc.Spec.ClusterIP, svc.Spec.ClusterIPs, svc.Spec.IPFamilies = "", nil, nil
		}
		return svc
	}
	for range 1 + r.IntN(2) {
		switch r.IntN(4) {
		case 0:
			randomType(r, svc)
		case 1:
			svc.Spec.IPFamilyPolicy = oneOf(r, new(corev1.IPFamilyPolicySingleStack), new(corev1.IPFamilyPolicyPreferDualStack), new(corev1.IPFamilyPolicyRequireDualStack))
		case 2:
			svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: fmt.Sprintf("more-%d", r.IntN(1e6)), Port: 1000 + int32(r.IntN(1000)), Protocol: "TCP"})
		case 3:
			svc.Spec.IPFamilies = []corev1.IPFamily{"IPv4", "IPv6"}
		}
	}
	return svc
}
