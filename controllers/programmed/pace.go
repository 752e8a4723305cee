package programmed

import "time"

// All agents together report at most 200 times a second: one report takes 5 ms of that budget. The interval is
// quantised in powers of two, because one node that joins must not rewrite the NodeProxyState of every other.
const (
	shortestInterval = 200 * time.Millisecond
	longestInterval  = 5 * time.Minute
	reportBudget     = 5 * time.Millisecond
)

// nextInterval returns the report interval for a number of nodes: the shortest step in which all of them can report, between
// shortestInterval and longestInterval. It keeps the current step (0: none yet) until a shorter one would hold a third
// more nodes than there are, so that nodes that come and go at the edge of a step change nothing.
func nextInterval(current time.Duration, nodes int) time.Duration {
	needed := stepFor(time.Duration(nodes) * reportBudget)
	if needed >= current {
		return needed
	}
	return min(current, stepFor(time.Duration(nodes)*reportBudget*4/3))
}

func stepFor(d time.Duration) time.Duration {
	step := shortestInterval
	for step < d && step < longestInterval {
		step *= 2
	}
	return min(step, longestInterval)
}
