package programmed

import "k8s.io/apimachinery/pkg/util/resourceversion"

// revision is a resourceVersion of one resource type. The empty revision is before every other.
type revision string

// parseRevision returns the empty revision for what no API server would have written.
func parseRevision(s string) revision {
	if _, err := resourceversion.CompareResourceVersion(s, s); err != nil {
		return ""
	}
	return revision(s)
}

// reached reports whether r is target or newer. It is the order of resourceversion.CompareResourceVersion, which would check each
// time again what parseRevision has checked: a longer number is a greater one.
func (r revision) reached(target revision) bool {
	if len(r) != len(target) {
		return len(r) > len(target)
	}
	return r >= target
}

func older(a, b revision) revision {
	if a.reached(b) {
		return b
	}
	return a
}

func newer(a, b revision) revision {
	if a.reached(b) {
		return a
	}
	return b
}

// marks are a revision of each of the two resource types that make up a Service's forwarding.
type marks struct {
	assignments revision
	slices      revision
}

// reached reports whether both marks have reached those of target.
func (m marks) reached(target marks) bool {
	return m.assignments.reached(target.assignments) && m.slices.reached(target.slices)
}
