// Package compile decides, for one node, where the traffic of each Service goes.
//
// It is pure: no client, clock or log. The API's objects are parsed once into compact validated forms (Assignment, Slice, Node),
// which is also what the agent keeps of them in memory, and Services turns those of one Service into what backends program.
// Every decision about readiness, terminating endpoints, traffic policy and topology is made here and nowhere else, per
// address family as kube-proxy makes it.
//
// Parsing never fails as a whole: what cannot be understood is left out and returned as a Problem, the rest stays in force.
package compile

import "fmt"

// Problem is a field of an object that cannot be understood and is left out.
type Problem struct {
	// Field is the field's path, for example spec.externalIPs[2].
	Field string
	// Value is what it holds.
	Value string
	// Reason says what would be valid.
	Reason string
}

func (p Problem) Error() string { return fmt.Sprintf("%s: %q: %s", p.Field, p.Value, p.Reason) }

// problems collects what a parse leaves out.
type problems []Problem

func (p *problems) add(field, value, reason string) {
	*p = append(*p, Problem{Field: field, Value: value, Reason: reason})
}
