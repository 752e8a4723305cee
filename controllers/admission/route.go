package admission

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// source is where a wanted address or node port comes from.
type source int

const (
	// fromRequest: the request names it and it is not the policy's to give, so nothing is done about it.
	fromRequest source = iota
	// recorded: the request names it, and it is claimed for the Service.
	recorded
	// fromPolicy: a free one of the policy's ranges.
	fromPolicy
	// steered: a free one that no policy declares.
	steered
	// dropped: the Service does without this second family.
	dropped
)

// route is the decision about one want.
type route struct {
	source  source
	warning string // for whoever made the request, empty if none
	denial  string // why the request is denied, empty if it is not
}

// firstFamily is the family of a Service that says nothing of families: the API server's default unless the policy, which may be nil, gives addresses only of the
// other one. served are the API server's families, its default first.
func firstFamily(policy *allocator.Policy, served []v1alpha1.IPFamily) v1alpha1.IPFamily {
	for _, f := range served {
		if policy != nil && policy.Gives(f) {
			return f
		}
	}
	return served[0]
}

// routeOf decides where a want is served from. policy covers the Service, nil if none does. owner names the policy that declares a lock, and the range.
func routeOf(w want, policy *allocator.Policy, owner func(allocator.Lock) (policy, declared string)) route {
	if w.isNamed() {
		return routeNamed(w, policy, owner)
	}
	if policy == nil || !declares(policy, w) {
		return route{source: steered}
	}
	if w.family == "" || policy.Gives(w.family) {
		return route{source: fromPolicy}
	}
	reason := fmt.Sprintf("policy %s gives out no %s addresses of itself (%s)", policy.Name, w.family, describe(policy, w))
	return fallback(w, policy, reason, "ask for another family in spec.ipFamilies, or for one of the policy's addresses in spec.clusterIP")
}

// fallback is what becomes of a want that the policy should serve and cannot, for a reason. remedy is what to do about it.
func fallback(w want, policy *allocator.Policy, reason, remedy string) route {
	switch {
	case !policy.Strict:
		return route{source: steered, warning: reason}
	case w.optional:
		return route{source: dropped, warning: reason}
	}
	return route{denial: fmt.Sprintf("%s: %s, and the policy is Strict: %s", w.field(), reason, remedy)}
}

// routeNamed decides about what a request names.
func routeNamed(w want, policy *allocator.Policy, owner func(allocator.Lock) (policy, declared string)) route {
	of, declared := owner(w.named)
	if policy == nil || of != policy.Name {
		if policy != nil && policy.Strict && declares(policy, w) {
			whose := "no policy"
			if of != "" {
				whose = fmt.Sprintf("policy %s (%s)", of, declared)
			}
			return route{denial: fmt.Sprintf("%s: %s belongs to %s; policy %s is Strict and has %s: name none, or one of these",
				w.field(), w.named, whose, policy.Name, describe(policy, w))}
		}
		if of != "" {
			return route{source: fromRequest, warning: fmt.Sprintf("%s: %s lies in %s, which policy %s declares for other Services", w.field(), w.named, declared, of)}
		}
		return route{source: fromRequest}
	}
	if w.family == "" {
		return route{source: recorded}
	}
	r := policy.RangeOf(w.named.Addr)
	if r == nil || r.Use != v1alpha1.RangeUseClusterIP {
		return route{source: fromRequest} // the API server knows no such range, and says so
	}
	reason := ""
	if r.Allocation == v1alpha1.RangeAllocationDraining {
		reason = fmt.Sprintf("%s: %s lies in %s, which policy %s drains", w.field(), w.named, r.Prefix, policy.Name)
	} else if i := slices.IndexFunc(r.Excluded, func(e netip.Prefix) bool { return e.Contains(w.named.Addr) }); i >= 0 {
		reason = fmt.Sprintf("%s: %s is reserved in range %s of policy %s", w.field(), w.named, r.Prefix, policy.Name)
	}
	if reason != "" && policy.Strict {
		return route{denial: reason + ", which is Strict: name another address, or none"}
	}
	return route{source: recorded, warning: reason}
}

// declares says whether the policy has ranges of the kind that is wanted. A policy without leaves it to the API server what Services get.
func declares(p *allocator.Policy, w want) bool {
	if w.family == "" {
		return p.NodePorts.Size() > 0
	}
	return slices.ContainsFunc(p.Ranges, func(r allocator.Range) bool { return r.Use == v1alpha1.RangeUseClusterIP })
}

// describe lists what the policy has of the kind that is wanted.
func describe(p *allocator.Policy, w want) string {
	if w.family == "" {
		return fmt.Sprintf("node ports %d-%d", p.NodePorts.First, p.NodePorts.Last)
	}
	var out []string
	for _, r := range p.Ranges {
		if r.Use == v1alpha1.RangeUseClusterIP {
			s := r.Prefix.String()
			if r.Allocation != v1alpha1.RangeAllocationAutomatic {
				s += " " + string(r.Allocation)
			}
			out = append(out, s)
		}
	}
	return strings.Join(out, ", ")
}
