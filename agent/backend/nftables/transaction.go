package nftables

import (
	"slices"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
)

// transaction collects what is to change. Made by Verify, it only notes that as drift.
type transaction struct {
	// new makes maps, chains and the rules of chains that had none; now changes rules and elements; late deletes chains, maps and what was replaced otherwise. They are committed
	// one after the other, because a packet is not atomic: it keeps the generation of rules that it began with, but looks
	// maps up in the current one. So it could follow a new verdict to a chain that has no rules yet in its own generation.
	new, now, late nfnl.Batch

	// whole says that it must not be committed in parts, because it replaces a table.
	whole bool

	dry    bool
	drifts []backend.Drift
}

// reset empties it and keeps its buffers.
func (t *transaction) reset() {
	t.new.Reset()
	t.now.Reset()
	t.late.Reset()
	t.whole, t.drifts = false, nil
}

// shrink empties it and lets go of big buffers.
func (t *transaction) shrink() {
	t.reset()
	t.new.Shrink()
	t.now.Shrink()
	t.late.Shrink()
}

func (t *transaction) size() int { return t.new.Size() + t.now.Size() + t.late.Size() }

func (t *transaction) note(table nfnl.Table, kind, name, problem string) {
	family := "ip"
	if table.Family == families[1].proto {
		family = "ip6"
	}
	t.drifts = append(t.drifts, backend.Drift{Object: family + " " + table.Name + " " + kind + " " + name, Problem: problem})
}

func (t *transaction) noteElement(s *nfnl.Set, key []byte, problem string) {
	kind := "set "
	if s.Map || s.Verdicts {
		kind = "map "
	}
	t.note(s.Table, kind+s.Name+" element", formatKey(s, key), problem)
}

func (t *transaction) addTable(table nfnl.Table) {
	if t.dry {
		t.note(table, "table", table.Name, "missing")
		return
	}
	t.new.AddTable(table)
}

// replaceTable empties the table within the transaction.
func (t *transaction) replaceTable(table nfnl.Table) {
	if t.dry {
		t.note(table, "table", table.Name, "differs: a set or base chain is of another kind")
		return
	}
	t.whole = true
	t.new.DeleteTable(table)
	t.new.AddTable(table)
}

func (t *transaction) addSet(s *nfnl.Set) {
	if t.dry {
		t.note(s.Table, "map", s.Name, "missing")
		return
	}
	t.new.AddSet(s)
}

func (t *transaction) deleteSet(s *nfnl.Set) {
	if t.dry {
		t.note(s.Table, "map", s.Name, "unexpected")
		return
	}
	t.late.DeleteSet(s)
}

func (t *transaction) addChain(table nfnl.Table, c chain) {
	if t.dry {
		t.note(table, "chain", c.name, "missing")
		return
	}
	t.new.AddChain(table, c.name, c.hook)
}

// setRules gives a chain its rules, in one of the transaction's batches.
func (t *transaction) setRules(table nfnl.Table, c chain, batch *nfnl.Batch) {
	if t.dry {
		t.note(table, "chain", c.name, "differs: its rules are others")
		return
	}
	batch.FlushChain(table, c.name) // even if it should have none: the dump that said so may have been incomplete
	for _, r := range c.rules {
		batch.AppendRule(table, c.name, r)
	}
}

// deleteChains deletes chains that only refer to each other.
func (t *transaction) deleteChains(table nfnl.Table, names []string) {
	for _, name := range names {
		if t.dry {
			t.note(table, "chain", name, "unexpected")
			continue
		}
		t.late.FlushChain(table, name)
	}
	if t.dry {
		return
	}
	for _, name := range names {
		t.late.DeleteChain(table, name)
	}
}

func (t *transaction) addElement(s *nfnl.Set, key, data []byte) {
	if t.dry {
		t.noteElement(s, key, "missing")
		return
	}
	t.now.AddElement(s, key, data)
}

func (t *transaction) deleteElement(s *nfnl.Set, key []byte) {
	if t.dry {
		t.noteElement(s, key, "unexpected")
		return
	}
	t.now.DeleteElement(s, key)
}

// retireElement deletes an element after everything else has changed, for those packets that are already on their way to it.
func (t *transaction) retireElement(s *nfnl.Set, key []byte) {
	if t.dry {
		t.noteElement(s, key, "unexpected")
		return
	}
	t.late.DeleteElement(s, key)
}

// setRanges makes an interval set hold exactly these bounds. Packets see all or none of that.
func (t *transaction) setRanges(s *nfnl.Set, bounds []bound) {
	if t.dry {
		t.note(s.Table, "set", s.Name, "differs: its ranges are others")
		return
	}
	t.now.FlushSet(s)
	for _, b := range bounds {
		t.now.AddBound(s, b.addr.AsSlice(), b.end)
	}
}

// setVerdict gives an element of a verdict map its verdict; replace says that it has another one now.
func (t *transaction) setVerdict(s *nfnl.Set, key []byte, v nfnl.Verdict, replace bool) {
	if t.dry {
		problem := "missing"
		if replace {
			problem = "differs: another verdict"
		}
		t.noteElement(s, key, problem)
		return
	}
	if replace {
		t.now.DeleteElement(s, key)
	}
	t.now.AddVerdict(s, key, v)
}

// sortedDrifts gives what a dry transaction found, in a stable order.
func (t *transaction) sortedDrifts() []backend.Drift {
	slices.SortFunc(t.drifts, func(a, b backend.Drift) int {
		if a.Object < b.Object || (a.Object == b.Object && a.Problem < b.Problem) {
			return -1
		}
		if a == b {
			return 0
		}
		return 1
	})
	return t.drifts
}
