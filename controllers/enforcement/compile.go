package enforcement

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// Names of the objects. A policy and its binding have the same name.
const (
	StrictName  = "serviceproxy-strict"
	ForeignName = "serviceproxy-foreign"
)

// Rule is one ValidatingAdmissionPolicy and what puts it in force. Every field that the API server would default is set, so that what is stored can be
// compared with it.
type Rule struct {
	Policy  *admissionv1.ValidatingAdmissionPolicy
	Binding *admissionv1.ValidatingAdmissionPolicyBinding
}

// Compile says what the API server must enforce for these policies. Services in exempt namespaces are never judged. A policy whose spec cannot be
// understood covers and owns nothing, as in the ledger. The result depends on the set of policies only, not on their order.
func Compile(policies []v1alpha1.ServiceProxyPolicy, exempt []string) []Rule {
	b := newBook(policies)
	var rules []Rule
	if v := b.strict(); len(v.validations) > 0 {
		rules = append(rules, v.rule(StrictName, admissionv1.Fail, exempt))
	}
	if v := b.foreign(); len(v.validations) > 0 {
		rules = append(rules, v.rule(ForeignName, admissionv1.Ignore, exempt))
	}
	return rules
}

// book is what all policies say together. A policy is known by its place in the order of precedence.
type book struct {
	policies []*allocator.Policy
	covers   []string // CEL: whether each policy's selectors select the Service
	// ranges says which policy has an address: the one of the longest prefix in it. Prefixes of which an older policy has everything are not in it.
	ranges map[netip.Prefix]int
	// closed says of those ranges that give no Service a new cluster IP why not, for people.
	closed map[netip.Prefix]string
	// ports are the ranges of node ports: the first that holds a port has it.
	ports []portRange
}

type portRange struct {
	allocator.PortRange
	policy int
}

func newBook(policies []v1alpha1.ServiceProxyPolicy) *book {
	b := &book{ranges: map[netip.Prefix]int{}, closed: map[netip.Prefix]string{}}
	specs := map[string]*v1alpha1.ServiceProxyPolicySpec{}
	for i := range policies {
		if p, err := allocator.ParsePolicy(&policies[i]); err == nil {
			b.policies = append(b.policies, p)
			specs[p.Name] = &policies[i].Spec
		}
	}
	allocator.SortByPrecedence(b.policies)
	var byAge []int
	for i, p := range b.policies {
		b.covers = append(b.covers, covers(p, specs[p.Name]))
		byAge = append(byAge, i)
	}
	slices.SortFunc(byAge, func(i, j int) int {
		x, y := b.policies[i], b.policies[j]
		return cmp.Or(x.Created.Compare(y.Created), cmp.Compare(x.Name, y.Name))
	})
	for _, i := range byAge {
		b.own(i)
	}
	return b
}

// own gives a policy what it declares and no older policy has. Then the longest prefix decides: a shorter one that was not there before
// belongs to a younger policy, and a longer one inside it to an older.
func (b *book) own(policy int) {
	p := b.policies[policy]
	for _, r := range p.Ranges {
		if b.owned(r.Prefix) {
			continue
		}
		b.ranges[r.Prefix] = policy
		switch {
		case r.Use != v1alpha1.RangeUseClusterIP:
			b.closed[r.Prefix] = "use " + string(r.Use)
		case r.Allocation == v1alpha1.RangeAllocationDraining:
			b.closed[r.Prefix] = "allocation " + string(r.Allocation)
		}
	}
	if p.NodePorts.Size() > 0 {
		b.ports = append(b.ports, portRange{p.NodePorts, policy})
	}
}

// owned says whether a range in the book holds all of the prefix.
func (b *book) owned(prefix netip.Prefix) bool {
	for bits := 0; bits <= prefix.Bits(); bits++ {
		if _, found := b.ranges[netip.PrefixFrom(prefix.Addr(), bits).Masked()]; found {
			return true
		}
	}
	return false
}

// sorted lists the keys of a map in a fixed order.
func sorted[V any](m map[netip.Prefix]V) []netip.Prefix {
	return slices.SortedFunc(maps.Keys(m), netip.Prefix.Compare)
}

// lengths lists the lengths of the prefixes of one family, the longest first.
func (b *book) lengths(ipv4 bool) []string {
	var bits []int
	for p := range b.ranges {
		if p.Addr().Is4() == ipv4 && !slices.Contains(bits, p.Bits()) {
			bits = append(bits, p.Bits())
		}
	}
	slices.Sort(bits)
	slices.Reverse(bits)
	out := make([]string, len(bits))
	for i, n := range bits {
		out[i] = "/" + strconv.Itoa(n)
	}
	return out
}

// maxNamed bounds how many ranges a message lists.
const maxNamed = 5

// declared lists a policy's ranges of cluster IPs for people, empty if it has none.
func declared(p *allocator.Policy) string {
	var out []string
	for _, r := range p.Ranges {
		if r.Use == v1alpha1.RangeUseClusterIP {
			text := r.Prefix.String()
			if r.Allocation != v1alpha1.RangeAllocationAutomatic {
				text += " " + string(r.Allocation)
			}
			out = append(out, text)
		}
	}
	if more := len(out) - maxNamed; more > 0 {
		out = append(out[:maxNamed:maxNamed], fmt.Sprintf("%d more", more))
	}
	return strings.Join(out, ", ")
}

// rule makes the objects. What their matchConditions leave out costs the API server next to nothing.
func (v *validator) rule(name string, onFailure admissionv1.FailurePolicyType, exempt []string) Rule {
	meta := metav1.ObjectMeta{Name: name, Labels: map[string]string{v1alpha1.LabelManagedBy: v1alpha1.ManagedBy}}
	exempt = slices.Compact(slices.Sorted(slices.Values(exempt)))
	namespaces := &metav1.LabelSelector{}
	if len(exempt) > 0 {
		namespaces.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: corev1.LabelMetadataName, Operator: metav1.LabelSelectorOpNotIn, Values: exempt}}
	}
	return Rule{
		Policy: &admissionv1.ValidatingAdmissionPolicy{ObjectMeta: meta, Spec: admissionv1.ValidatingAdmissionPolicySpec{
			FailurePolicy: &onFailure,
			MatchConstraints: &admissionv1.MatchResources{
				NamespaceSelector: namespaces, ObjectSelector: &metav1.LabelSelector{}, MatchPolicy: new(admissionv1.Equivalent),
				ResourceRules: []admissionv1.NamedRuleWithOperations{{RuleWithOperations: admissionv1.RuleWithOperations{
					Operations: []admissionv1.OperationType{admissionv1.Create, admissionv1.Update},
					Rule: admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"services"},
						Scope: new(admissionv1.NamespacedScope)},
				}}},
			},
			MatchConditions: matchConditions,
			Variables:       v.variables,
			Validations:     v.validations,
		}},
		Binding: &admissionv1.ValidatingAdmissionPolicyBinding{ObjectMeta: *meta.DeepCopy(), Spec: admissionv1.ValidatingAdmissionPolicyBindingSpec{
			PolicyName: name, ValidationActions: []admissionv1.ValidationAction{admissionv1.Deny},
		}},
	}
}

var matchConditions = []admissionv1.MatchCondition{
	// Under dry run the API server shows placeholders in place of what it would allocate.
	{Name: "not-dry-run", Expression: "!has(request.dryRun) || !request.dryRun"},
	{Name: "not-being-deleted", Expression: "!has(object.metadata.deletionTimestamp)"},
	{Name: "changes-the-spec", Expression: "oldObject == null || object.spec != oldObject.spec"},
	// The API server makes this one for itself, with an address of its own choice.
	{Name: "not-the-api-servers-own", Expression: "object.metadata.namespace != 'default' || object.metadata.name != 'kubernetes'"},
}
