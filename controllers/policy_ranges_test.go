package controllers

import (
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/nodeports"
)

var _ = Describe("a nodePortRange", func() {
	It("that the API server does not have shows in the policy's status, once it can be known", func() {
		stop := startManager(quick, nil) // it has no namespace to find anything out in
		t := newTenant()
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.NodePortRange = &v1alpha1.NodePortRange{Start: 32700, End: 32899}
		})
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		Expect(p.Status.NodePorts).To(Equal(&v1alpha1.NodePortStatus{Total: 200, Free: 200}))
		stop()

		options := quick
		options.Namespace = "default"
		startManager(options, nil)
		Eventually(policyCondition(p, v1alpha1.PolicyReady)).Should(Equal("False NodePortRangeOutside: nodePortRange is 32700-32899 and the API server's range " +
			"(--service-node-port-range) is 30000-32767, so only 68 of its 200 ports can be given out"))
		Expect(policyCondition(p, v1alpha1.PolicyAccepted)()).To(HavePrefix("True"))
		Expect(p.Status.NodePorts).To(Equal(&v1alpha1.NodePortStatus{Total: 68, Free: 68}))
		updatePolicy(p, func(s *v1alpha1.ServiceProxyPolicySpec) { s.NodePortRange.End = 32767 })
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		Expect(p.Status.NodePorts).To(Equal(&v1alpha1.NodePortStatus{Total: 68, Free: 68}))
		var probes corev1.ServiceList
		Expect(k8s.List(ctx, &probes, client.HasLabels{nodeports.LabelProbe})).To(Succeed())
		Expect(probes.Items).To(BeEmpty())
	})
})
