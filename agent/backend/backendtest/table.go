package backendtest

import "testing"

// Scenario is a row of the table: one promise of a Service.
type Scenario struct {
	// Name says what is promised. It is the row's name in docs/parity.md.
	Name string
	Run  func(*Lab)
}

// Run holds a subject to the whole table, in one lab: each scenario finds what the one before left, as on a real node. It needs root, because the lab is
// made of network namespaces.
func Run(t *testing.T, start Starter) {
	lab := newLab(t, start)
	for _, s := range Table() {
		t.Run(s.Name, func(t *testing.T) {
			same := *lab
			same.TB = t
			s.Run(&same)
		})
	}
}

// Table is every scenario.
func Table() []Scenario {
	return addresses
}
