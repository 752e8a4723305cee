package programmed

import (
	"fmt"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// Reasons of the condition Programmed. Where several hold, the first of this list is given.
const (
	// ReasonNoNodes: no node that is Ready is selected.
	ReasonNoNodes = "NoNodes"
	// ReasonModeUnsupported: a node that counts cannot do the proxy mode.
	ReasonModeUnsupported = "ModeUnsupported"
	// ReasonNoReadyEndpoints: a port has no ready endpoint, so that there is no traffic that could work.
	ReasonNoReadyEndpoints = v1alpha1.ReasonNoReadyEndpoints
	// ReasonWaitingForNodes: the kernel of a node that counts does not hold this generation yet.
	ReasonWaitingForNodes = "WaitingForNodes"
	// ReasonProgrammed: every node that counts holds this generation. The only reason of status True.
	ReasonProgrammed = "Programmed"
)

// namedNodes is how many nodes a message names; how many more there are is a number.
const namedNodes = 3

// target is what a node must hold to have programmed one generation of an assignment.
type target struct {
	marks
	// lacking describes the first port without a ready endpoint; empty if each port has one.
	lacking string
}

// node is what is known of one node from its Node and its NodeProxyState.
type node struct {
	name    string
	ready   bool // condition Ready is True and the Node is not being deleted
	reports bool // its agent has written a report since the Node exists
	holds   marks
	modes   []v1alpha1.NodeProxyMode // as reported; empty: not told, then nothing is held against it
}

// mode returns what the node says of a proxy mode; ok is false if it says that it cannot do it.
func (n *node) mode(mode v1alpha1.ProxyMode) (why string, ok bool) {
	if len(n.modes) == 0 {
		return "", true
	}
	for i := range n.modes {
		if n.modes[i].Mode == mode {
			return n.modes[i].Message, n.modes[i].Available
		}
	}
	return "its agent does not know this mode", false
}

// coverage sums up the nodes that count for assignments with one node selector and one proxy mode, so that each
// of them is judged without looking at the nodes again.
type coverage struct {
	desired int32 // nodes that count: selected and ready
	unable  int32 // of these: cannot do the mode
	silent  int32 // of these: their agent does not report
	lowest  marks // what all of them hold; meaningless if desired is 0
}

// survey sums up the nodes of selected that count for mode.
func survey(selected []*node, mode v1alpha1.ProxyMode) coverage {
	var c coverage
	for _, n := range selected {
		if !n.ready {
			continue // because a dead node must not block a Service: it takes no traffic
		}
		if _, able := n.mode(mode); !able {
			c.unable++
		}
		if !n.reports {
			c.silent++
		}
		if c.desired == 0 {
			c.lowest = n.holds
		}
		c.lowest.assignments = older(c.lowest.assignments, n.holds.assignments)
		c.lowest.slices = older(c.lowest.slices, n.holds.slices)
		c.desired++
	}
	return c
}

// reason judges one target. It costs the same for any number of nodes.
func (c coverage) reason(t target) string {
	switch {
	case c.desired == 0:
		return ReasonNoNodes
	case c.unable > 0:
		return ReasonModeUnsupported
	case t.lacking != "":
		return ReasonNoReadyEndpoints
	case !c.hold(t):
		return ReasonWaitingForNodes
	}
	return ReasonProgrammed
}

// hold says whether every node that counts holds a target.
func (c coverage) hold(t target) bool {
	return c.desired > 0 && c.unable == 0 && c.silent == 0 && c.lowest.reached(t.marks)
}

// verdict is what the status of an assignment should say.
type verdict struct {
	reason, message     string
	desired, programmed int32
}

func (v verdict) status() metav1.ConditionStatus {
	if v.reason == ReasonProgrammed {
		return metav1.ConditionTrue
	}
	return metav1.ConditionFalse
}

// selection is the nodes that an assignment selects and how.
type selection struct {
	selector string // for messages
	mode     v1alpha1.ProxyMode
	nodes    []*node // selected, in the order in which messages name them
}

// evaluate gives the verdict on one target in full, with the counts and the names of the nodes that are waited for; c is the
// survey of s. It costs O(nodes) unless the verdict is Programmed.
func evaluate(s selection, c coverage, t target) verdict {
	v := verdict{reason: c.reason(t), desired: c.desired, programmed: c.desired}
	var unable, waiting nameList
	if v.reason != ReasonProgrammed {
		v.programmed = 0
		for _, n := range s.nodes {
			if !n.ready {
				continue
			}
			switch why, able := n.mode(s.mode); {
			case !able:
				unable.add(n.name, func() string { return cannot(n, why) })
			case !n.reports:
				waiting.add(n.name, func() string { return "its agent does not report" })
			case n.holds.reached(t.marks):
				v.programmed++
			default:
				waiting.add(n.name, func() string { return "behind" })
			}
		}
	}
	switch v.reason {
	case ReasonNoNodes:
		v.message = "No node is Ready"
		if s.selector != "" {
			v.message = "No node that is Ready matches the node selector " + s.selector
		}
	case ReasonModeUnsupported:
		v.message = fmt.Sprintf("Proxy mode %s is not available on %s", s.mode, unable)
	case ReasonNoReadyEndpoints:
		v.message = fmt.Sprintf("No endpoint is ready for %s; %d of %d nodes hold this generation", t.lacking, v.programmed, v.desired)
	case ReasonWaitingForNodes:
		v.message = fmt.Sprintf("%d of %d nodes hold this generation; waiting for %s", v.programmed, v.desired, waiting)
	case ReasonProgrammed:
		v.message = fmt.Sprintf("%d of %d nodes hold this generation", v.programmed, v.desired)
	}
	return v
}

// cannot says why a node cannot do a mode, and which it can.
func cannot(n *node, why string) string {
	var able []string
	for i := range n.modes {
		if n.modes[i].Available {
			able = append(able, string(n.modes[i].Mode))
		}
	}
	can := "it can do no mode"
	if len(able) > 0 {
		can = "it can do " + strings.Join(able, ", ")
	}
	if why == "" {
		return can
	}
	return why + "; " + can
}

// nameList renders as "a (why), b (why), c (why) and 4 more".
type nameList struct {
	named []string
	more  int
}

func (l *nameList) add(name string, why func() string) {
	if len(l.named) == namedNodes {
		l.more++
		return
	}
	l.named = append(l.named, fmt.Sprintf("%s (%s)", name, why()))
}

func (l nameList) String() string {
	s := strings.Join(l.named, ", ")
	if l.more > 0 {
		s += fmt.Sprintf(" and %d more", l.more)
	}
	return s
}
