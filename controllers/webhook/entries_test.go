package webhook

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

func strictPolicy(name string, change func(*v1alpha1.ServiceProxyPolicy)) v1alpha1.ServiceProxyPolicy {
	p := v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(start)}}
	p.Spec.Enforcement = v1alpha1.EnforcementStrict
	if change != nil {
		change(&p)
	}
	return p
}

func TestEntries(t *testing.T) {
	policies := []v1alpha1.ServiceProxyPolicy{
		strictPolicy("b", nil),
		strictPolicy("a", nil),
		strictPolicy("older", func(p *v1alpha1.ServiceProxyPolicy) { p.CreationTimestamp = metav1.NewTime(start.Add(-time.Hour)) }),
		strictPolicy("important", func(p *v1alpha1.ServiceProxyPolicy) { p.Spec.Priority = 1 }),
		strictPolicy("going", func(p *v1alpha1.ServiceProxyPolicy) { p.DeletionTimestamp = &metav1.Time{Time: start} }),
		strictPolicy("lenient", func(p *v1alpha1.ServiceProxyPolicy) { p.Spec.Enforcement = v1alpha1.EnforcementBestEffort }),
		// The API server would refuse the whole configuration for it.
		strictPolicy("broken", func(p *v1alpha1.ServiceProxyPolicy) {
			p.Spec.NamespaceSelector.MatchLabels = map[string]string{"tenant": "not a value"}
		}),
	}
	to := target{namespace: "net"}
	first := entries(policies, to, nil)
	var names []string
	for _, w := range first {
		names = append(names, w.Name)
	}
	want := []string{"important" + entryStrict, "older" + entryStrict, "a" + entryStrict, "b" + entryStrict, entryAll}
	if !slices.Equal(names, want) {
		t.Errorf("got %v, want %v", names, want)
	}
	for range 20 {
		rand.Shuffle(len(policies), func(i, j int) { policies[i], policies[j] = policies[j], policies[i] })
		if !equality.Semantic.DeepEqual(entries(policies, to, nil), first) {
			t.Fatal("the entries depend on the order of the policies")
		}
	}
	if s := first[0].ClientConfig.Service; s == nil || first[0].ClientConfig.URL != nil || fmt.Sprintf("%s/%s:%d%s", s.Namespace, s.Name, *s.Port, *s.Path) != "net/serviceproxy-webhook:443/mutate-services" {
		t.Errorf("without a URL API servers are sent to %+v, want the Service", first[0].ClientConfig)
	}
	if len(policies[0].Spec.NamespaceSelector.MatchExpressions) > 0 {
		t.Error("a policy was changed")
	}
	if entries(nil, to, nil) != nil {
		t.Error("there are entries without a policy")
	}
	if got := entries(policies[:1], target{namespace: "net", url: "https://hooks:8443/"}, nil); *got[len(got)-1].ClientConfig.URL != "https://hooks:8443/mutate-services" || got[0].ClientConfig.Service != nil {
		t.Errorf("with a URL API servers are sent to %+v", got[0].ClientConfig)
	}
}
