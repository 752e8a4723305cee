package enforcement

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// validator is the CEL of one ValidatingAdmissionPolicy while it is written. The API server evaluates a variable once, when it is first used, and variables can only
// use those before them. Maps and lists of literals are built when the policy is compiled, so that to look something up in them costs little, however
// many ranges there are.
type validator struct {
	variables   []admissionv1.Variable
	validations []admissionv1.Validation
}

func (v *validator) let(name, format string, args ...any) {
	v.variables = append(v.variables, admissionv1.Variable{Name: name, Expression: fmt.Sprintf(format, args...)})
}

// reject refuses the request unless the list of that name is empty. message is CEL about the list's first element.
func (v *validator) reject(list, summary, message string) {
	v.validations = append(v.validations, admissionv1.Validation{
		Expression: "variables." + list + ".size() == 0", Message: summary, Reason: new(metav1.StatusReasonForbidden),
		// A message is evaluated even if nobody will read it, and anew: then it must not be an error.
		MessageExpression: "variables." + list + ".size() == 0 ? '' : " + message,
	})
}

// maxExpression bounds the length of the generated lists and maps. The API server takes no expression of more than 100 000 code points.
const maxExpression = 50_000

// maxConditions bounds how many conditions are in one expression, because the type checker's work grows with the square of the operators in it. The
// literals of a table cost it nothing.
const maxConditions = 10

// chunks splits a list into parts of at most so many texts, that are not longer than maxExpression together, if they are not one by one. There is always
// one chunk.
func chunks(texts []string, most int) [][]string {
	out := [][]string{nil}
	size := 0
	for _, t := range texts {
		last := len(out) - 1
		if size += len(t) + len(", "); len(out[last]) > 0 && (len(out[last]) == most || size > maxExpression) {
			out, size, last = append(out, nil), len(t), last+1
		}
		out[last] = append(out[last], t)
	}
	return out
}

// table is a constant map in as many variables as it needs.
type table []string

// table declares a map; entries are CEL, "key: value".
func (v *validator) table(name string, entries []string) (t table) {
	for i, chunk := range chunks(entries, len(entries)) {
		t = append(t, "variables."+name+strconv.Itoa(i))
		v.let(name+strconv.Itoa(i), "{%s}", strings.Join(chunk, ", "))
	}
	return t
}

// has is CEL for: the map has this key.
func (t table) has(key string) string {
	out := make([]string, len(t))
	for i, name := range t {
		out[i] = key + " in " + name
	}
	return "(" + strings.Join(out, " || ") + ")"
}

// get is CEL for the value of a key that the map has.
func (t table) get(key string) string {
	var out strings.Builder
	for _, name := range t[:len(t)-1] {
		fmt.Fprintf(&out, "%s in %s ? %s[%s] : ", key, name, name, key)
	}
	return "(" + out.String() + t[len(t)-1] + "[" + key + "])"
}

// quote makes a CEL string literal.
func quote(s string) string { return strconv.QuoteToASCII(s) }

func quoteAll[S ~[]E, E any](list S) string {
	out := make([]string, len(list))
	for i, e := range list {
		out[i] = quote(fmt.Sprint(e))
	}
	return "[" + strings.Join(out, ", ") + "]"
}

// covers is CEL for allocator.Policy.Matches, and false for a policy that covers nothing new.
func covers(p *allocator.Policy, spec *v1alpha1.ServiceProxyPolicySpec) string {
	if p.Terminating {
		return "false"
	}
	var all []string
	if spec.KubeProxy == v1alpha1.KubeProxyCoexist {
		all = append(all, "variables.handedOver")
	}
	all = append(all, selects("variables.namespaceLabels", &spec.NamespaceSelector)...)
	all = append(all, selects("variables.labels", &spec.ServiceSelector)...)
	if len(all) == 0 {
		return "true"
	}
	return strings.Join(all, " && ")
}

// selects is CEL for what a selector requires of a map of labels.
func selects(labelled string, selector *metav1.LabelSelector) (out []string) {
	parsed, err := metav1.LabelSelectorAsSelector(selector)
	if err != nil {
		return []string{"false"} // not reached: the policy was parsed
	}
	requirements, _ := parsed.Requirements() // that it selects something is clear: the selector is not nil
	for _, r := range requirements {
		out = append(out, requires(labelled, r))
	}
	return out
}

func requires(labelled string, r labels.Requirement) string {
	key := quote(r.Key())
	has := key + " in " + labelled
	values := r.Values().List()
	slices.Sort(values)
	in := fmt.Sprintf("%s && %s[%s] in %s", has, labelled, key, quoteAll(values))
	switch r.Operator() {
	case selection.In, selection.Equals, selection.DoubleEquals:
		return in
	case selection.NotIn, selection.NotEquals: // a missing label is not in the list
		return "!(" + in + ")"
	case selection.Exists:
		return has
	case selection.DoesNotExist:
		return "!(" + has + ")"
	}
	return "false" // no label selector of the API has another operator
}

// declareCovering declares "covering": the place of the policy that covers the Service, -1 if none does, as allocator.Select finds it.
func (v *validator) declareCovering(b *book) {
	v.let("labels", "object.metadata.?labels.orValue({})")
	v.let("namespaceLabels", "namespaceObject.metadata.?labels.orValue({})")
	v.let("ours", "variables.labels[?%[1]s].orValue('') == %[2]s", quote(allocator.LabelServiceProxyName), quote(v1alpha1.ServiceProxyName))
	v.let("handedOver", "variables.ours && !(%s in object.metadata.?annotations.orValue({}))", quote(v1alpha1.AnnotationTakenOver))
	v.let("coverable", "object.spec.?type.orValue('') != 'ExternalName' && object.spec.?clusterIP.orValue('') != 'None'"+
		" && (variables.ours || !(%s in variables.labels))", quote(allocator.LabelServiceProxyName))
	before, first := "-1", 0
	for i, chunk := range chunks(b.covers, maxConditions) {
		name := "covering" + strconv.Itoa(i)
		v.let(name, "%[1]s >= 0 || !variables.coverable ? %[1]s : [[%[2]s].indexOf(true)].map(i, i < 0 ? i : i + %[3]d)[0]", before, strings.Join(chunk, ", "), first)
		before, first = "variables."+name, first+len(chunk)
	}
	v.let("covering", "%s", before)
}

// declareNew declares what the request adds to the Service: newIPs and newPorts, health check node port included.
func (v *validator) declareNew() {
	const held = "%[1]s.spec.?ports.orValue([]).map(p, int(p.?nodePort.orValue(0))) + [int(%[1]s.spec.?healthCheckNodePort.orValue(0))]"
	v.let("oldIPs", "oldObject == null ? [] : oldObject.spec.?clusterIPs.orValue([])")
	v.let("newIPs", "object.spec.?clusterIPs.orValue([]).filter(a, a != 'None' && !(a in variables.oldIPs))")
	v.let("oldPorts", "oldObject == null ? [0] : [0] + "+held, "oldObject")
	v.let("newPorts", "("+held+").filter(p, !(p in variables.oldPorts))", "object")
}

// What foreign looks at in one Service. The API server bounds what an expression may cost, and lets a request pass whose foreign check costs more: nobody
// must get there by sending much.
const (
	// maxManagers is how many entries of managedFields are read. If there are more, the request counts as asking.
	maxManagers = 30
	// maxPorts is how many ports a Service may have that changes its node ports.
	maxPorts = 300
)

// declareAsked declares those of the new ones that the request itself asked for: askedIPs and askedPorts. managedFields tell: they list what a request set,
// and neither what a webhook added nor what the API server allocated. Without any the request counts as asking.
func (v *validator) declareAsked() {
	v.let("managers", "dyn(object).metadata.?managedFields.orValue([])")
	v.let("tracked", "variables.managers.size() > 0 && variables.managers.size() <= %d", maxManagers)
	v.let("asks", "!variables.tracked ? [] : variables.managers.map(m, m[?'fieldsV1'][?'f:spec'].orValue({}))")
	v.let("askedIPs", "variables.newIPs.filter(a, !variables.tracked || variables.asks.exists(s, 'f:clusterIPs' in s"+
		" || ('f:clusterIP' in s && a == object.spec.?clusterIP.orValue(''))))")
	v.let("tooMany", "object.spec.?ports.orValue([]).size() > %[1]d || oldObject != null && oldObject.spec.?ports.orValue([]).size() > %[1]d", maxPorts)
	v.let("askedPorts", "variables.tooMany ? [] : ((variables.tracked && !variables.asks.exists(s, 'f:healthCheckNodePort' in s) ? []"+
		" : [int(object.spec.?healthCheckNodePort.orValue(0))])"+
		" + object.spec.?ports.orValue([]).filter(p, has(p.nodePort) && (!variables.tracked || variables.asks.exists(s,"+
		` s[?'f:ports'][?('k:{"port":' + string(p.port) + ',"protocol":"' + p.protocol + '"}')][?'f:nodePort'].hasValue()))).map(p, int(p.nodePort))`+
		").filter(n, !(n in variables.oldPorts))")
	v.let("crowd", "!variables.tooMany || object.spec.?ports.orValue([]).all(p, p.?nodePort.orValue(0) == 0) || oldObject != null &&"+
		" object.spec.?ports.orValue([]).map(p, p.?nodePort.orValue(0)) == oldObject.spec.?ports.orValue([]).map(p, p.?nodePort.orValue(0))"+
		" ? [] : [object.spec.?ports.orValue([]).size()]")
}

// locateIPs declares "located": for each address of a list a list of the address and, if a policy has it, its range. An address that is not
// written as it should be has no range, because one cannot be told.
func (v *validator) locateIPs(list string, b *book, ranges table) {
	v.let("located", "variables.%s.map(a, [string(a)] + (!isIP(a) ? [] : (ip(a).family() == 4 ? %s : %s).map(bits, string(cidr(a + bits).masked())).filter(c, %s)))",
		list, quoteAll(b.lengths(true)), quoteAll(b.lengths(false)), ranges.has("c"))
}

// portsPerBucket is how many neighbouring ports are looked up together.
const portsPerBucket = 64

// locatePorts declares "locatedPorts": for each port of a list a list of triples (first, last, policy): the port itself, then the ranges that hold it. The
// first of them has it. The ranges are in buckets, so that it does not matter how many there are.
func (v *validator) locatePorts(list string, b *book) {
	buckets := map[int][]string{}
	for _, r := range b.ports {
		for i := int(r.First) / portsPerBucket; i <= int(r.Last)/portsPerBucket; i++ {
			buckets[i] = append(buckets[i], fmt.Sprintf("[%d, %d, %d]", r.First, r.Last, r.policy))
		}
	}
	var entries []string
	for _, i := range slices.Sorted(maps.Keys(buckets)) {
		entries = append(entries, fmt.Sprintf("%d: [%s]", i, strings.Join(buckets[i], ", ")))
	}
	ports, bucket := v.table("ports", entries), fmt.Sprintf("n / %d", portsPerBucket)
	v.let("locatedPorts", "variables.%s.map(n, [[n, n, -1]] + (!%s ? [] : %s.filter(r, r[0] <= n && n <= r[1])))", list, ports.has(bucket), ports.get(bucket))
}

// portField is CEL for the path of the field that holds the port.
const portField = "(%[1]s == int(object.spec.?healthCheckNodePort.orValue(0)) ? 'spec.healthCheckNodePort'" +
	" : 'spec.ports[' + string(object.spec.ports.map(p, int(p.?nodePort.orValue(0))).indexOf(%[1]s)) + '].nodePort')"

// tables declares what all validations look up: the policy of each range and the name of each policy.
func (v *validator) tables(b *book) (ranges, names table) {
	var entries []string
	for _, p := range sorted(b.ranges) {
		entries = append(entries, fmt.Sprintf("%s: %d", quote(p.String()), b.ranges[p]))
	}
	ranges = v.table("ranges", entries)
	entries = nil
	for i, p := range b.policies {
		entries = append(entries, fmt.Sprintf("%d: %s", i, quote(p.Name)))
	}
	return ranges, v.table("names", entries)
}

// strict writes serviceproxy-strict. It has no validations if no policy needs any.
func (b *book) strict() *validator {
	v := &validator{}
	var ips, ports, reserved []string
	for i, p := range b.policies {
		if !p.Strict || p.Terminating {
			continue
		}
		entry := func(list *[]string, value string) {
			if value != "" {
				*list = append(*list, fmt.Sprintf("%d: %s", i, quote(value)))
			}
		}
		entry(&ips, declared(p))
		if p.NodePorts.Size() > 0 {
			entry(&ports, fmt.Sprintf("%d-%d", p.NodePorts.First, p.NodePorts.Last))
		}
		var kept []netip.Prefix
		for _, r := range p.Ranges {
			kept = append(kept, r.Excluded...)
		}
		if len(kept) > 0 {
			reserved = append(reserved, fmt.Sprintf("%d: %s", i, quoteAll(kept)))
		}
	}
	if len(ips)+len(ports) == 0 {
		return v
	}
	v.declareCovering(b)
	v.declareNew()
	ranges, names := v.tables(b)
	const covering = "variables.covering"
	if len(ips) > 0 {
		v.strictIPs(b, ranges, names, v.table("strictIPs", ips), v.table("reserved", reserved))
	}
	if len(ports) > 0 {
		v.locatePorts("newPorts", b)
		own := v.table("strictPorts", ports)
		v.let("badPorts", "variables.newPorts.size() == 0 || !%s ? [] : variables.locatedPorts.filter(l, l.size() == 1 || l[1][2] != %s)", own.has(covering), covering)
		const bad = "variables.badPorts[0]"
		v.reject("badPorts", "a node port lies outside the nodePortRange of the Strict policy that covers this Service",
			fmt.Sprintf(portField, bad+"[0][0]")+" + ': ' + string("+bad+"[0][0]) + ("+
				bad+".size() == 1 ? ' lies outside' : ' is a node port of policy ' + "+names.get(bad+"[1][2]")+" + ', outside') + "+
				"' nodePortRange ' + "+own.get(covering)+" + ' of policy ' + "+names.get(covering)+" + ' (Strict); ask for a port of that range, or for none'")
	}
	return v
}

func (v *validator) strictIPs(b *book, ranges, names, strict, reserved table) {
	const covering, bad = "variables.covering", "variables.badIPs[0]"
	v.locateIPs("newIPs", b, ranges)
	var entries []string
	for _, p := range sorted(b.closed) {
		entries = append(entries, quote(p.String())+": "+quote(b.closed[p]))
	}
	closed := v.table("closed", entries)
	v.let("badIPs", "variables.newIPs.size() == 0 || !%s ? [] : variables.located.filter(l, l.size() == 1 || %s != %s || %s || %s && %s.exists(r, cidr(r).containsIP(l[0])))",
		strict.has(covering), ranges.get("l[1]"), covering, closed.has("l[1]"), reserved.has(covering), reserved.get(covering))
	owner := ranges.get(bad + "[1]")
	v.reject("badIPs", "a cluster IP is not one that the Strict policy that covers this Service gives out",
		"'spec.clusterIPs: ' + "+bad+"[0] + ("+
			"!isIP("+bad+"[0]) ? ' is not in canonical form and must lie in' : "+
			bad+".size() == 1 ? ' lies outside' : "+
			owner+" != "+covering+" ? ' lies in ' + "+bad+"[1] + ', a range of policy ' + "+names.get(owner)+" + ', outside' : "+
			closed.has(bad+"[1]")+" ? ' lies in ' + "+bad+"[1] + ', which gives out nothing (' + "+closed.get(bad+"[1]")+" + '), of' : ' is reserved in') + "+
			"' the ranges ' + "+strict.get(covering)+" + ' of policy ' + "+names.get(covering)+" + ' (Strict); ask for an address that these give out, or for none'")
}

// foreign writes serviceproxy-foreign. It has no validations if no policy declares anything.
func (b *book) foreign() *validator {
	v := &validator{}
	if len(b.ranges)+len(b.ports) == 0 {
		return v
	}
	v.declareCovering(b)
	v.declareNew()
	v.declareAsked()
	ranges, names := v.tables(b)
	const covering = "variables.covering"
	advice := func(what string) string {
		return "', which ' + (" + covering + " < 0 ? 'does not cover this Service; ask for no " + what + ", or one outside'" +
			" : 'does not cover this Service, policy ' + " + names.get(covering) + " + ' does; ask for no " + what + ", or one of that policy')"
	}
	if len(b.ranges) > 0 {
		const bad = "variables.badIPs[0]"
		v.locateIPs("askedIPs", b, ranges)
		v.let("badIPs", "variables.located.filter(l, l.size() == 1 ? !isIP(l[0]) : %s != %s)", ranges.get("l[1]"), covering)
		v.reject("badIPs", "a cluster IP that was asked for lies in a range of a policy that does not cover this Service",
			"'spec.clusterIPs: ' + "+bad+"[0] + ("+bad+".size() == 1 ? ' is not in canonical form, without which nobody can tell whose it is' : "+
				"' lies in ' + "+bad+"[1] + ', a range of policy ' + "+names.get(ranges.get(bad+"[1]"))+" + "+advice("address")+")")
	}
	if len(b.ports) > 0 {
		const bad = "variables.badPorts[0]"
		v.reject("crowd", "a Service changes its node ports and has too many to tell whose they are",
			fmt.Sprintf("'spec.ports: a Service with node ports has at most %d ports, and not ' + string(variables.crowd[0])", maxPorts))
		v.locatePorts("askedPorts", b)
		v.let("badPorts", "variables.locatedPorts.filter(l, l.size() > 1 && l[1][2] != %s)", covering)
		v.reject("badPorts", "a node port that was asked for belongs to a policy that does not cover this Service",
			fmt.Sprintf(portField, bad+"[0][0]")+" + ': ' + string("+bad+"[0][0]) + ' lies in ' + string("+bad+"[1][0]) + '-' + string("+bad+"[1][1])"+
				" + ', the node ports of policy ' + "+names.get(bad+"[1][2]")+" + "+advice("node port"))
	}
	return v
}
