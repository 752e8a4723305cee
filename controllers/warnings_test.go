package controllers

import (
	"fmt"
	"strings"
	"testing"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// warnings gives the Warning events of a Service as "REASON: NOTE".
func (t *tenant) warnings(service string) func() []string {
	return func() (out []string) {
		GinkgoHelper()
		var list eventsv1.EventList
		Expect(k8s.List(ctx, &list, client.InNamespace(t.name))).To(Succeed())
		for _, e := range list.Items {
			if e.Type == corev1.EventTypeWarning && e.Regarding.Name == service {
				out = append(out, e.Reason+": "+e.Note)
			}
		}
		return out
	}
}

var _ = Describe("a new Service that got what nobody may have wanted", func() {
	It("has one Warning that names the policies and the range", func() {
		startManager(quick, nil)
		t := newTenant()
		p := t.policy("", func(s *v1alpha1.ServiceProxyPolicySpec) {
			ranges(t.v4)(s)
			s.ServiceSelector = metav1.LabelSelector{MatchLabels: map[string]string{"tier": "gold"}}
			s.NodePortRange = &v1alpha1.NodePortRange{Start: 31060, End: 31069}
		})
		other := t.policy("-other", func(s *v1alpha1.ServiceProxyPolicySpec) {
			s.ServiceSelector = metav1.LabelSelector{MatchLabels: map[string]string{"tier": "silver"}}
			s.Enforcement = v1alpha1.EnforcementStrict
			s.NodePortRange = &v1alpha1.NodePortRange{Start: 31070, End: 31079}
		})
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		Eventually(policyCondition(other, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))

		t.service("stray", at(t.address(40)))
		Eventually(t.warnings("stray")).Should(ConsistOf(And(HavePrefix(reasonForeignAddress), ContainSubstring(t.address(40).String()), ContainSubstring(t.v4.String()),
			ContainSubstring("policy "+p.Name+","), ContainSubstring("no policy covers"))))
		t.service("strict", func(s *corev1.Service) {
			s.Labels = map[string]string{"tier": "silver"}
			s.Spec.Type = corev1.ServiceTypeNodePort
			s.Spec.Ports = []corev1.ServicePort{{Name: "of-another", Port: 80, NodePort: 31060}, {Name: "of-nobody", Port: 81, NodePort: 31081}, {Name: "own", Port: 82, NodePort: 31070}}
		})
		Eventually(t.warnings("strict")).Should(ConsistOf(And(HavePrefix(reasonForeignAddress),
			ContainSubstring("node port 31060"), ContainSubstring("31060-31069"), ContainSubstring("policy "+p.Name+","), ContainSubstring("policy "+other.Name+" covers"),
			ContainSubstring("node port 31081"), ContainSubstring("policy "+other.Name+", whose enforcement is Strict"), Not(ContainSubstring("31070 lies")))))
		single := t.service("single", func(s *corev1.Service) {
			s.Labels = map[string]string{"tier": "gold"}
			s.Annotations = map[string]string{v1alpha1.AnnotationSingleStack: "policy p has no free IPv6 addresses: 3 of 3 in use"}
		})
		t.allocated(single)
		Eventually(t.warnings("single")).Should(ConsistOf(And(HavePrefix(reasonSingleStack), ContainSubstring("3 of 3"))))
		t.allocated(t.service("fine", func(s *corev1.Service) { s.Labels = map[string]string{"tier": "gold"} }))

		By("once, whatever else happens to it")
		Expect(k8s.Patch(ctx, single, client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"sessionAffinity":"ClientIP"}}`)))).To(Succeed())
		Eventually(func() int32 { return t.assignment("single").Spec.SessionAffinitySeconds }).Should(BeNumerically(">", 0))
		Consistently(t.warnings("single")).Should(HaveLen(1))
		Expect(t.warnings("fine")()).To(BeEmpty())
	})
})

// The API server refuses an event with a note of more than 1024 bytes, so a Service with much to be told of would be told nothing.
func TestWarningsFitIntoEvents(t *testing.T) {
	owner := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: strings.Repeat("o", 63), CreationTimestamp: metav1.Unix(1e9, 0)}}
	owner.Spec.NamespaceSelector.MatchLabels = map[string]string{"tenant": "another"}
	owner.Spec.NodePortRange = &v1alpha1.NodePortRange{Start: 30000, End: 30499}
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "1", CreationTimestamp: metav1.Now()}}
	svc.Spec.Type = corev1.ServiceTypeNodePort
	for i := range int32(40) {
		svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: fmt.Sprint(i), Port: 1 + i, NodePort: 30000 + i})
	}
	recorder := events.NewFakeRecorder(1)
	newWarner(recorder, told(owner)).warn(svc, nil)
	select {
	case warning := <-recorder.Events:
		if len(warning) > len("Warning ForeignAddress ")+1024 || !strings.Contains(warning, owner.Name) || !strings.HasSuffix(warning, "and 37 more") {
			t.Errorf("%d bytes: %s", len(warning), warning)
		}
	default:
		t.Error("no Warning")
	}
	if got := note(strings.Repeat("é", 600)); len(got) > 1024 || !strings.HasSuffix(got, "é...") {
		t.Errorf("%d bytes: %s", len(got), got)
	}
}
