package backendtest

import (
	"slices"
	"testing"
)

// Scenario is a row of the table: one promise of a Service.
type Scenario struct {
	// Name says what is promised. It is the row's name in docs/parity.md.
	Name string
	Run  func(*Lab)
}

// Run holds a subject to the whole table, in one lab: each scenario finds what the one before left, as on a real node. It needs root, because the lab is
// made of network namespaces.
//
// A row has three results: kept (pass), broken (fail), and not applicable (skip), which is left to subjects that lack an optional interface.
func Run(t *testing.T, start Starter) {
	lab := newLab(t, start)
	lab.addReplicas()
	var results []Result
	for _, s := range Table() {
		t.Run(s.Name, func(t *testing.T) {
			same := *lab
			same.TB = t
			t.Cleanup(func() { results = append(results, resultOf(t, s.Name)) })
			t.Cleanup(func() {
				if _, ok := lab.subject.(Breaker); ok && t.Skipped() {
					t.Error("a row that is applicable was skipped")
				}
			})
			s.Run(&same)
		})
	}
	record(t, results)
}

// Table is every scenario.
func Table() []Scenario {
	return slices.Concat(addresses, nodePorts, grounds, packets, flows, stale, balance, affinity, churn)
}

// breaker gives the subject as a Breaker. The scenario ends here as not applicable if it is none.
func (l *Lab) breaker() Breaker {
	l.Helper()
	b, ok := l.subject.(Breaker)
	if !ok {
		l.Skip("not applicable: the subject does not promise to repair what others change")
	}
	return b
}
