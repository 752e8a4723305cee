package allocator

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

func apiPolicy(name string, age time.Duration, change func(*v1alpha1.ServiceProxyPolicy)) *v1alpha1.ServiceProxyPolicy {
	p := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(time.Unix(1_000_000, 0).Add(-age))}}
	if change != nil {
		change(p)
	}
	return p
}

func parse(t testing.TB, policies ...*v1alpha1.ServiceProxyPolicy) []*Policy {
	t.Helper()
	var out []*Policy
	for _, p := range policies {
		parsed, err := ParsePolicy(p)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, parsed)
	}
	SortByPrecedence(out)
	return out
}

func matchLabels(kv ...string) metav1.LabelSelector {
	m := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i]] = kv[i+1]
	}
	return metav1.LabelSelector{MatchLabels: m}
}

func TestSelect(t *testing.T) {
	svc := func(change func(*corev1.Service)) *corev1.Service {
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", Labels: map[string]string{"app": "web"}},
			Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.1"}}
		if change != nil {
			change(s)
		}
		return s
	}
	type policies = []*v1alpha1.ServiceProxyPolicy
	priority := func(n int32) func(*v1alpha1.ServiceProxyPolicy) {
		return func(p *v1alpha1.ServiceProxyPolicy) { p.Spec.Priority = n }
	}
	coexist := func(p *v1alpha1.ServiceProxyPolicy) { p.Spec.KubeProxy = v1alpha1.KubeProxyCoexist }
	labelled := func(s *corev1.Service) { s.Labels[LabelServiceProxyName] = v1alpha1.ServiceProxyName }
	takenOver := func(s *corev1.Service) {
		labelled(s)
		s.Annotations = map[string]string{v1alpha1.AnnotationTakenOver: "a"}
	}
	unlabelled := func(p *v1alpha1.ServiceProxyPolicy) {
		p.Spec.ServiceSelector.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: LabelServiceProxyName, Operator: metav1.LabelSelectorOpDoesNotExist}}
	}
	dying := func(p *v1alpha1.ServiceProxyPolicy) { p.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)} }
	for _, tt := range []struct {
		name     string
		policies policies
		svc      *corev1.Service
		current  string
		want     string
	}{
		{"priority before age", policies{apiPolicy("old", time.Hour, nil), apiPolicy("high", 0, priority(5))}, svc(nil), "", "high"},
		{"age before name", policies{apiPolicy("a", 0, nil), apiPolicy("b", time.Hour, nil)}, svc(nil), "", "b"},
		{"name last", policies{apiPolicy("b", 0, nil), apiPolicy("a", 0, nil)}, svc(nil), "", "a"},
		{"negative priority loses", policies{apiPolicy("low", time.Hour, priority(-1)), apiPolicy("zero", 0, nil)}, svc(nil), "", "zero"},
		{"service selector", policies{apiPolicy("db", 0, func(p *v1alpha1.ServiceProxyPolicy) { p.Spec.ServiceSelector = matchLabels("app", "db") })}, svc(nil), "", ""},
		{"namespace selector", policies{
			apiPolicy("other", 0, func(p *v1alpha1.ServiceProxyPolicy) { p.Spec.NamespaceSelector = matchLabels("team", "b") }),
			apiPolicy("mine", 0, func(p *v1alpha1.ServiceProxyPolicy) { p.Spec.NamespaceSelector = matchLabels("team", "a") })}, svc(nil), "", "mine"},
		{"headless", policies{apiPolicy("a", 0, nil)}, svc(func(s *corev1.Service) { s.Spec.ClusterIP = corev1.ClusterIPNone }), "", ""},
		{"ExternalName", policies{apiPolicy("a", 0, nil)}, svc(func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName }), "", ""},
		{"another proxy's", policies{apiPolicy("a", 0, nil)}, svc(func(s *corev1.Service) { s.Labels[LabelServiceProxyName] = "cilium" }), "", ""},
		{"an empty proxy name is a name", policies{apiPolicy("a", 0, nil)}, svc(func(s *corev1.Service) { s.Labels[LabelServiceProxyName] = "" }), "", ""},
		{"ours, TakeOver", policies{apiPolicy("a", 0, nil)}, svc(func(s *corev1.Service) { s.Labels[LabelServiceProxyName] = v1alpha1.ServiceProxyName }), "", "a"},
		{"ours, Coexist", policies{apiPolicy("a", 0, coexist)}, svc(func(s *corev1.Service) { s.Labels[LabelServiceProxyName] = v1alpha1.ServiceProxyName }), "", "a"},
		{"unlabelled, Coexist", policies{apiPolicy("a", 0, coexist)}, svc(nil), "", ""},
		{"a dying policy covers nothing new", policies{apiPolicy("a", time.Hour, dying), apiPolicy("b", 0, nil)}, svc(nil), "", "b"},
		{"a dying policy keeps what it has", policies{apiPolicy("a", time.Hour, dying), apiPolicy("b", 0, nil)}, svc(nil), "a", "a"},
		{"no policy", nil, svc(nil), "gone", ""},
		{"taken over, TakeOver", policies{apiPolicy("a", 0, nil)}, svc(takenOver), "", "a"},
		{"taken over is not labelled by the user", policies{apiPolicy("b", time.Hour, coexist), apiPolicy("a", 0, nil)}, svc(takenOver), "", "a"},
		{"our label does not end the selection", policies{apiPolicy("a", 0, unlabelled)}, svc(takenOver), "", "a"},
		{"the user's label does", policies{apiPolicy("a", 0, unlabelled)}, svc(labelled), "", ""},
		{"a claim on a label that is another proxy's says nothing", policies{apiPolicy("a", 0, nil)}, svc(func(s *corev1.Service) {
			takenOver(s)
			s.Labels[LabelServiceProxyName] = "cilium"
		}), "a", ""},
		{"a dying policy hands back what kube-proxy takes", policies{apiPolicy("back", time.Hour, dying)}, svc(takenOver), "back", ""},
		{"or the next policy", policies{apiPolicy("back", time.Hour, dying), apiPolicy("b", 0, nil)}, svc(takenOver), "back", "b"},
		{"a dying policy keeps what nobody would take", policies{apiPolicy("back", time.Hour, dying)}, svc(labelled), "back", "back"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := ""
			parsed := parse(t, tt.policies...)
			for _, p := range parsed {
				p.HandsBack = p.Name == "back"
			}
			if p := Select(parsed, tt.svc, map[string]string{"team": "a"}, tt.current); p != nil {
				got = p.Name
			}
			if got != tt.want {
				t.Errorf("covered by %q, want %q", got, tt.want)
			}
		})
	}
}

func TestParsePolicyNamesTheField(t *testing.T) {
	_, err := ParsePolicy(apiPolicy("a", 0, func(p *v1alpha1.ServiceProxyPolicy) {
		p.Spec.ServiceSelector.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: "x", Operator: "Near"}}
		p.Spec.ServiceRanges = []v1alpha1.ServiceRange{{CIDR: "10.99.0.1/16"}, {CIDR: "10.98.0.0/16", Reserved: []string{"here"}}}
		p.Spec.NodePortRange = &v1alpha1.NodePortRange{Start: 9, End: 5}
	}))
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"spec.serviceSelector", `serviceRanges[0]: cidr "10.99.0.1/16"`, `serviceRanges[1]: reserved "here"`, "nodePortRange: 9-5"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error lacks %q: %v", want, err)
		}
	}
}

func TestResolve(t *testing.T) {
	ranges := func(ports string, cidrs ...string) func(*v1alpha1.ServiceProxyPolicy) {
		return func(p *v1alpha1.ServiceProxyPolicy) {
			for _, c := range cidrs {
				p.Spec.ServiceRanges = append(p.Spec.ServiceRanges, v1alpha1.ServiceRange{CIDR: c})
			}
			if ports == "low" {
				p.Spec.NodePortRange = &v1alpha1.NodePortRange{Start: 30000, End: 30100}
			} else if ports == "high" {
				p.Spec.NodePortRange = &v1alpha1.NodePortRange{Start: 30050, End: 30200}
			}
		}
	}
	in := parse(t,
		apiPolicy("old", time.Hour, ranges("low", "10.99.0.0/24", "fd00::/112")),
		apiPolicy("wider", 0, ranges("high", "10.99.0.0/16")),
		apiPolicy("within", time.Minute, ranges("", "10.99.0.128/25", "fd01::/112")))
	resolved, conflicts := Resolve(in)
	var got []string
	for _, c := range conflicts {
		got = append(got, c.Policy+": "+c.String())
	}
	want := []string{
		"within: 10.99.0.128/25 belongs to the older policy old",
		"wider: 10.99.0.0/24 belongs to the older policy old",
		"wider: node ports 30050-30100 belong to the older policy old",
		"wider: 10.99.0.128/25 belongs to the older policy within",
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	for _, p := range resolved {
		if p.Name == "wider" && !reflect.DeepEqual(p.Ranges[0].Excluded, []netip.Prefix{netip.MustParsePrefix("10.99.0.0/24"), netip.MustParsePrefix("10.99.0.128/25")}) {
			t.Errorf("wider excludes %v", p.Ranges[0].Excluded)
		}
	}
	for _, p := range in {
		for _, r := range p.Ranges {
			if len(r.Excluded) > 0 {
				t.Errorf("Resolve changed its input: %+v", r)
			}
		}
	}
}
