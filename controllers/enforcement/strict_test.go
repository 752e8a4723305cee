package enforcement

import (
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

var _ = Describe("A Service that a Strict policy covers", func() {
	It("gets a cluster IP of the policy's ranges or is refused", func() {
		enforce(policy("strict-ip", func(s *v1alpha1.ServiceProxyPolicySpec) {
			strict("10.96.16.0/24", "10.96.17.0/24", "10.96.18.0/24", "fd00:96::1000/116", "10.96.20.0/24", "10.96.21.0/24", "10.96.22.0/24")(s)
			s.ServiceRanges[0].Reserved = []string{"10.96.16.8", "10.96.16.16/28"}
			s.ServiceRanges[1].Allocation = v1alpha1.RangeAllocationDraining
			s.ServiceRanges[2].Use = v1alpha1.RangeUseLoadBalancer
			s.ServiceRanges[4].Allocation = v1alpha1.RangeAllocationManual
		}), policy("other", bestEffort("10.96.30.0/24")))
		ns := newNamespace("strict-ip")
		create(service(ns, ips("10.96.16.5")))
		create(service(ns, ips("10.96.16.6", "fd00:96::1001")))
		create(service(ns, ips("10.96.20.6")))
		const ranges = "the ranges 10.96.16.0/24, 10.96.17.0/24 Draining, fd00:96::1000/116, 10.96.20.0/24 Manual, 10.96.21.0/24, 1 more of policy strict-ip (Strict); "
		refused(service(ns, ips("10.96.3.4")), "spec.clusterIPs: 10.96.3.4 lies outside "+ranges)
		refused(service(ns, ips("10.96.16.7", "fd00:96::9001")), "spec.clusterIPs: fd00:96::9001 lies outside "+ranges)
		refused(service(ns, ips("10.96.30.1")), "10.96.30.1 lies in 10.96.30.0/24, a range of policy other")
		refused(service(ns, ips("10.96.16.8")), "10.96.16.8 is reserved in "+ranges)
		refused(service(ns, ips("10.96.16.30")), "10.96.16.30 is reserved in "+ranges)
		refused(service(ns, ips("10.96.17.1")), "10.96.17.1 lies in 10.96.17.0/24, which gives out nothing (allocation Draining), of "+ranges)
		refused(service(ns, ips("10.96.18.1")), "10.96.18.1 lies in 10.96.18.0/24, which gives out nothing (use LoadBalancer), of "+ranges)
	})

	It("is refused if the API server itself chose the address, because no webhook did", func() {
		enforce(policy("strict-chosen", strict("10.96.31.0/30")))
		ns := newNamespace("strict-chosen")
		refused(service(ns, nil), "spec.clusterIPs: 10.96.", "lies outside the ranges 10.96.31.0/30 of policy strict-chosen (Strict)")
		Expect(addressesOf(ns)).To(BeEmpty(), "a refused request leaves nothing behind")
	})

	It("gets node ports of the policy's range or is refused", func() {
		enforce(policy("strict-port", withPorts(30100, 30149, strict())), policy("other", withPorts(30150, 30199, bestEffort())))
		ns := newNamespace("strict-port")
		kept := create(service(ns, nodePorts(30100, 30149)))
		refused(service(ns, nodePorts(30101, 30250)), "spec.ports[1].nodePort: 30250 lies outside nodePortRange 30100-30149 of policy strict-port (Strict)")
		refused(service(ns, nodePorts(30160)), "spec.ports[0].nodePort: 30160 ", "policy other")
		local := func(ports, health int32) func(*corev1.Service) {
			return func(s *corev1.Service) {
				nodePorts(ports)(s)
				s.Spec.Type, s.Spec.ExternalTrafficPolicy, s.Spec.HealthCheckNodePort = corev1.ServiceTypeLoadBalancer, corev1.ServiceExternalTrafficPolicyLocal, health
			}
		}
		create(service(ns, local(30102, 30103)))
		refused(service(ns, local(30104, 30255)), "spec.healthCheckNodePort: 30255 lies outside nodePortRange 30100-30149")
		refuseUpdate(kept, nodePorts(30100, 30149, 30251), "spec.ports[2].nodePort: 30251")
		refuseUpdate(kept, nodePorts(30100, 30252), "spec.ports[1].nodePort: 30252")
		update(kept, func(s *corev1.Service) { s.Spec.Ports[0].Port = 8080 })
	})

	It("is judged by what it adds only, whoever is down", func() {
		ns := newNamespace("strict-later", "stage", "later")
		old := create(service(ns, nodePorts(30300)))
		old.Finalizers = nil
		held := create(service(ns, func(s *corev1.Service) { s.Finalizers = []string{"test.io/hold"} }))
		doomed := create(service(ns, func(s *corev1.Service) { s.Finalizers = []string{"test.io/hold"} }))
		enforce(policy("strict-later", withPorts(30100, 30149, strict("10.96.32.0/24"))))
		refused(service(ns, ips("10.96.4.1")), "policy strict-later (Strict)")

		By("labels, finalizers, ports, status, deletion")
		update(old, func(s *corev1.Service) { s.Labels = map[string]string{"a": "b"} })
		update(old, func(s *corev1.Service) {
			s.Spec.Ports[0].Port, s.Spec.SessionAffinity = 81, corev1.ServiceAffinityClientIP
		})
		update(held, func(s *corev1.Service) { s.Finalizers = nil })
		status := old.DeepCopy()
		status.Status.LoadBalancer.Ingress = nil
		status.Status.Conditions = nil
		Expect(k8s.Status().Update(ctx, status)).To(Succeed())
		update(old, func(s *corev1.Service) {
			nodePorts()(s)
			s.Spec.Type, s.Spec.Ports = corev1.ServiceTypeClusterIP, []corev1.ServicePort{{Port: 80}}
		})

		By("an object being deleted, whatever is done to it")
		Expect(k8s.Delete(ctx, doomed)).To(Succeed())
		Expect(k8s.Get(ctx, client.ObjectKeyFromObject(doomed), doomed)).To(Succeed())
		update(doomed, func(s *corev1.Service) { nodePorts(30301)(s) })
		update(doomed, func(s *corev1.Service) { s.Finalizers = nil })

		By("the namespace")
		Expect(k8s.Delete(ctx, &corev1.Namespace{ObjectMeta: old.ObjectMeta})).NotTo(Succeed(), "the name of a Service is not that of its namespace")
		var namespace corev1.Namespace
		Expect(k8s.Get(ctx, client.ObjectKey{Name: ns}, &namespace)).To(Succeed())
		Expect(k8s.Delete(ctx, &namespace)).To(Succeed())
		Eventually(func() error { return k8s.Get(ctx, client.ObjectKey{Name: ns}, &namespace) }).Should(MatchError(ContainSubstring("not found")))
	})

	It("may not come to be covered with a new address", func() {
		enforce(policy("strict-moving", func(s *v1alpha1.ServiceProxyPolicySpec) {
			strict("10.96.33.0/24", "fd00:96::2000/124")(s)
			s.ServiceSelector.MatchLabels = map[string]string{"covered": "yes"}
		}))
		ns := newNamespace("strict-moving")
		covered := func(s *corev1.Service) { s.Labels = map[string]string{"covered": "yes"} }
		svc := create(service(ns, nil))
		update(svc, covered)
		refuseUpdate(svc, func(s *corev1.Service) { s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack) }, "fd00:96::", "policy strict-moving (Strict)")
		update(svc, func(s *corev1.Service) { ips(s.Spec.ClusterIP, "fd00:96::2001")(s) })
		external := create(service(ns, func(s *corev1.Service) {
			covered(s)
			s.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "example.com"}
		}))
		refuseUpdate(external, func(s *corev1.Service) {
			s.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, ClusterIP: "10.96.4.6", Ports: []corev1.ServicePort{{Port: 80}}}
		}, "policy strict-moving (Strict)")
	})

	It("is not one that nobody covers", func() {
		enforce(policy("strict-all", func(s *v1alpha1.ServiceProxyPolicySpec) {
			strict("10.96.34.0/24")(s)
			s.NamespaceSelector.MatchLabels = nil
		}))
		ns := newNamespace("")
		refused(service(ns, ips("10.96.4.2")), "policy strict-all (Strict)")
		create(service(ns, func(s *corev1.Service) { s.Spec.ClusterIP = corev1.ClusterIPNone }))
		create(service(ns, func(s *corev1.Service) {
			s.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "example.com"}
		}))
		create(service(ns, func(s *corev1.Service) {
			s.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "other"}
		}))
		refused(service(ns, func(s *corev1.Service) {
			s.Spec.ClusterIP, s.Labels = "10.96.4.3", map[string]string{"service.kubernetes.io/service-proxy-name": v1alpha1.ServiceProxyName}
		}), "policy strict-all (Strict)")
		create(service("kube-system", nil))
	})

	It("cannot pretend to be deleted, or to be another's", func() {
		enforce(policy("strict-sly", strict("10.96.35.0/24")))
		ns := newNamespace("strict-sly")
		refused(service(ns, func(s *corev1.Service) {
			ips("10.96.5.1")(s)
			s.DeletionTimestamp = nowish()
		}), "policy strict-sly (Strict)")
		refused(service(ns, func(s *corev1.Service) { s.Name, s.Spec.ClusterIP = "kubernetes", "10.96.4.4" }), "policy strict-sly (Strict)")
		refused(service(ns, func(s *corev1.Service) { s.Name, s.GenerateName, s.Spec.ClusterIP = "", "any-", "10.96.4.5" }), "policy strict-sly (Strict)")
	})

	It("does without checks of what the policy does not declare", func() {
		enforce(policy("strict-nothing", strict()))
		ns := newNamespace("strict-nothing")
		create(service(ns, nodePorts(30305)))
	})

	It("has what the older of two overlapping policies declares from that one only", func() {
		enforce(policy("older", withPorts(30410, 30419, bestEffort("10.96.40.0/25", "10.96.44.0/22"))),
			policy("younger", withPorts(30400, 30429, strict("10.96.40.0/24", "10.96.45.0/24", "10.96.48.0/30"))))
		ns := newNamespace("younger")
		create(service(ns, ips("10.96.40.200")))
		refused(service(ns, ips("10.96.40.100")), "10.96.40.100 lies in 10.96.40.0/25, a range of policy older")
		refused(service(ns, ips("10.96.45.100")), "10.96.45.100 lies in 10.96.44.0/22, a range of policy older")
		create(service(ns, func(s *corev1.Service) { ips("10.96.40.201")(s); nodePorts(30400, 30429)(s) }))
		refused(service(ns, func(s *corev1.Service) { ips("10.96.40.202")(s); nodePorts(30410)(s) }), "30410 ", "policy older")
	})

	It("is not covered by a policy that is being deleted, whose ranges stay its own", func() {
		leaving := policy("leaving", strict("10.96.49.0/24"))
		leaving.DeletionTimestamp = nowish()
		enforce(leaving, policy("stays", func(s *v1alpha1.ServiceProxyPolicySpec) {
			strict("10.96.50.0/24")(s)
			s.Priority, s.NamespaceSelector.MatchLabels = -1, map[string]string{"tenant": "leaving"}
		}))
		ns := newNamespace("leaving")
		create(service(ns, ips("10.96.50.1")))
		refused(service(ns, ips("10.96.49.1")), "10.96.49.1 lies in 10.96.49.0/24, a range of policy leaving")
	})
})
