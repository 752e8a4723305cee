package controllers

import (
	"fmt"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// A restart must cost reads only, however many Services there are.
var _ = Describe("many older Services", func() {
	It("are allocated, and a restart with nothing changed writes nothing", func() {
		t := newTenant()
		const n = 200
		services := make([]*corev1.Service, n)
		for i := range services {
			services[i] = t.newService(fmt.Sprintf("web-%04d", i), nil)
		}
		workqueue.ParallelizeUntil(ctx, 16, n, func(i int) {
			defer GinkgoRecover()
			Expect(k8s.Create(ctx, services[i])).To(Succeed())
		})
		wide := t.wide()
		policy := t.policy("", ranges(wide))
		stop := startManager(quick, nil)
		Eventually(func(g Gomega) {
			g.Expect(k8s.Get(ctx, client.ObjectKeyFromObject(policy), policy)).To(Succeed())
			g.Expect(policy.Status.Services).To(Equal(v1alpha1.PolicyServicesStatus{Covered: n, Assigned: n}))
		}).WithTimeout(2 * time.Minute).WithPolling(100 * time.Millisecond).Should(Succeed())
		t.consistent(Default, policy.Name, services, 1)
		stop()

		var wrote writeCounter
		stop = startManager(quick, wrote.count)
		Consistently(wrote.Load).WithTimeout(3*time.Second).Should(BeZero(), "writes after a restart with nothing changed")
		stop()
	})
})
