package enforcement

import (
	"fmt"
	"math/rand/v2"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// The oracle is the allocator. Every policy is Strict and declares addresses that nobody asks for, so a refusal tells who covers the Service.
var _ = Describe("The policy that covers a Service", func() {
	It("is the allocator's choice, for random policies, namespaces and labels", func() {
		seed := uint64(GinkgoRandomSeed())
		r := rand.New(rand.NewPCG(seed, 1))
		keys, values := []string{"a", "b.io/c"}, []string{"", "x", "y-1"}
		randomLabels := func() []string {
			var out []string
			for _, k := range keys {
				if r.IntN(3) > 0 {
					out = append(out, k, values[r.IntN(len(values))])
				}
			}
			return out
		}
		randomSelector := func() (s metav1.LabelSelector) {
			for _, k := range keys {
				switch r.IntN(10) {
				case 0, 1:
					s.MatchLabels = map[string]string{k: values[r.IntN(len(values))]}
				case 2, 3:
					s.MatchExpressions = append(s.MatchExpressions, metav1.LabelSelectorRequirement{Key: k, Operator: metav1.LabelSelectorOpIn, Values: values[r.IntN(2):]})
				case 4, 5:
					s.MatchExpressions = append(s.MatchExpressions, metav1.LabelSelectorRequirement{Key: k, Operator: metav1.LabelSelectorOpNotIn, Values: values[r.IntN(2):]})
				case 6:
					s.MatchExpressions = append(s.MatchExpressions, metav1.LabelSelectorRequirement{Key: k, Operator: metav1.LabelSelectorOpExists})
				case 7:
					s.MatchExpressions = append(s.MatchExpressions, metav1.LabelSelectorRequirement{Key: k, Operator: metav1.LabelSelectorOpDoesNotExist})
				}
			}
			return s
		}
		var policies []v1alpha1.ServiceProxyPolicy
		var parsed []*allocator.Policy
		for i := range 24 {
			p := policy(fmt.Sprintf("p%d", i), strict(fmt.Sprintf("10.96.250.%d/30", 4*i)))
			p.Spec.NamespaceSelector, p.Spec.ServiceSelector = randomSelector(), randomSelector()
			p.Spec.Priority = int32(r.IntN(6))
			p.CreationTimestamp = metav1.Unix(int64(1000+r.IntN(3)), 0)
			if r.IntN(3) == 0 {
				p.Spec.KubeProxy = v1alpha1.KubeProxyCoexist
			}
			if r.IntN(8) == 0 {
				p.DeletionTimestamp = nowish()
			}
			policies = append(policies, p)
			a, err := allocator.ParsePolicy(&p)
			Expect(err).NotTo(HaveOccurred())
			parsed = append(parsed, a)
		}
		allocator.SortByPrecedence(parsed)
		enforce(policies...)

		seen, asked := map[string]int{}, 0
		for range 6 {
			nsLabels := randomLabels()
			ns := newNamespace("", nsLabels...)
			set := map[string]string{"kubernetes.io/metadata.name": ns}
			for i := 0; i < len(nsLabels); i += 2 {
				set[nsLabels[i]] = nsLabels[i+1]
			}
			for range 40 {
				asked++
				svc := service(ns, ips(fmt.Sprintf("10.96.%d.%d", 240+asked/200, 1+asked%200)))
				if l := randomLabels(); len(l) > 0 {
					svc.Labels = map[string]string{}
					for i := 0; i < len(l); i += 2 {
						svc.Labels[l[i]] = l[i+1]
					}
					if r.IntN(3) == 0 {
						svc.Labels[allocator.LabelServiceProxyName] = []string{v1alpha1.ServiceProxyName, "other"}[r.IntN(2)]
						if r.IntN(2) == 0 { // set by the controller
							svc.Annotations = map[string]string{v1alpha1.AnnotationTakenOver: "p0"}
						}
					}
				}
				if r.IntN(12) == 0 {
					ips(corev1.ClusterIPNone)(svc)
				}
				want := "nobody"
				if p := allocator.Select(parsed, svc, set, ""); p != nil {
					want = p.Name
				}
				got, err := "nobody", k8s.Create(ctx, svc)
				if err != nil {
					_, after, _ := strings.Cut(err.Error(), " of policy ")
					got, _, _ = strings.Cut(after, " (Strict)")
				}
				Expect(got).To(Equal(want), "seed %d, namespace %v, Service %v: %v", seed, set, svc.Labels, err)
				seen[got]++
			}
		}
		Expect(len(seen)).To(BeNumerically(">", 3), "seed %d: too few policies cover anything: %v", seed, seen)
	})
})
