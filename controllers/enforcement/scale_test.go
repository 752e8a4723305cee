package enforcement

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// judged reads from the API server's metrics how many creations its ValidatingAdmissionPolicies judged, and how long that took altogether.
func judged() (n, seconds float64) {
	GinkgoHelper()
	text, err := kubernetes.NewForConfigOrDie(restConfig).RESTClient().Get().AbsPath("/metrics").DoRaw(ctx)
	Expect(err).NotTo(HaveOccurred())
	for line := range strings.Lines(string(text)) {
		rest, found := strings.CutPrefix(line, "apiserver_admission_controller_admission_duration_seconds_")
		if !found || !strings.Contains(line, `name="ValidatingAdmissionPolicy",operation="CREATE"`) || strings.HasPrefix(rest, "bucket") {
			continue
		}
		v, err := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndex(line, " ")+1:]), 64)
		Expect(err).NotTo(HaveOccurred())
		if strings.HasPrefix(rest, "sum{") {
			seconds += v
		} else {
			n += v
		}
	}
	return n, seconds
}

var _ = Describe("Many policies", func() {
	It("stay within what the API server lets CEL cost, and cost little", func() {
		const tenants, creates = 200, 50
		var policies []v1alpha1.ServiceProxyPolicy
		for i := range tenants {
			name := fmt.Sprintf("tenant-with-a-rather-long-name-%d", i)
			// One precedence after another, so that the last is found last.
			p := policy(name, withPorts(int32(30000+10*i), int32(30009+10*i), strict(
				fmt.Sprintf("10.96.%d.%d/26", 1+i/4, 64*(i%4)), fmt.Sprintf("10.96.%d.%d/28", 101+i/16, 16*(i%16)),
				fmt.Sprintf("fd00:96::%x/120", 0x100*(1+i%250)), fmt.Sprintf("fd00:96:0:%x::/64", 1+i))))
			p.Spec.ServiceSelector.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: "app.example.org/exposure", Operator: metav1.LabelSelectorOpNotIn, Values: []string{"none", "internal"}}}
			p.Spec.ServiceRanges[0].Reserved = []string{fmt.Sprintf("10.96.%d.%d", 1+i/4, 64*(i%4)+1)}
			policies = append(policies, p)
		}
		began := time.Now()
		enforce(policies...)
		taken := time.Since(began)
		last := newNamespace(policies[tenants-1].Name)
		nobody := newNamespace("")

		measure := func(what string, do func(i int)) {
			n0, s0 := judged()
			for i := range creates {
				do(i)
			}
			n, s := judged()
			Expect(n - n0).To(BeNumerically(">=", creates))
			AddReportEntry(what, fmt.Sprintf("%.0f µs a request (%.0f requests)", (s-s0)/(n-n0)*1e6, n-n0))
			Expect((s-s0)/(n-n0)).To(BeNumerically("<", 0.1), "seconds a request")
		}
		own := func(i int) func(*corev1.Service) {
			return ips(fmt.Sprintf("10.96.113.%d", 112+i%16), fmt.Sprintf("fd00:96::%x", 0x100*(1+(tenants-1)%250)+10+i))
		}
		AddReportEntry("in force after", taken.String())
		measure("covered by the last of 200, dual stack and asked for", func(i int) {
			svc := service(last, own(i))
			Expect(k8s.Create(ctx, svc)).To(Succeed())
			Expect(k8s.Delete(ctx, svc)).To(Succeed())
		})
		measure("covered by nobody, nothing asked for", func(int) {
			svc := service(nobody, nil)
			Expect(k8s.Create(ctx, svc)).To(Succeed())
			Expect(k8s.Delete(ctx, svc)).To(Succeed())
		})
		measure("refused", func(int) {
			expectDenial(k8s.Create(ctx, service(nobody, ips("10.96.1.7"))), "10.96.1.7 lies in 10.96.1.0/26, a range of policy tenant-with-a-rather-long-name-0")
		})
		removeRules()
		Eventually(func() error {
			svc := service(nobody, ips("10.96.1.7"))
			err := k8s.Create(ctx, svc)
			if err == nil {
				Expect(k8s.Delete(ctx, svc)).To(Succeed())
			}
			return err
		}).Should(Succeed())
		measure("without any policy", func(int) {
			svc := service(nobody, nil)
			Expect(k8s.Create(ctx, svc)).To(Succeed())
			Expect(k8s.Delete(ctx, svc)).To(Succeed())
		})
	})
})
