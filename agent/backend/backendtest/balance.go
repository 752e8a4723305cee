package backendtest

import (
	"fmt"
	"math"
	"slices"
	"strconv"
)

// balance are the promises about which endpoint serves.
var balance = []Scenario{
	{"connections spread evenly over the endpoints", func(l *Lab) {
		l.Program(web(at(replicasOf("b", 6)...), nil))
		tcp := l.startLoad("tcp", crowd, toServiceIP, 0, 0)
		udp := l.startLoad("udp", crowd, toNodePort, 1, 0)
		for _, ld := range []*load{tcp, udp} {
			ld.await(evenly)
			ld.finish()
			l.even(ld, replicasOf("b", 6))
		}
	}},
	{"connections spread evenly, and none is refused or lost, while the number of endpoints crosses powers of two", func(l *Lab) {
		sent := l.resent(l.space("outside"))
		numbers := []int{5, 4, 8, 9, 4, 5, 8, 17, 4}
		l.Program(web(at(replicasOf("b", 4)...), nil))
		// So many that a proxy still finds time to change its rules.
		tcp := l.startLoad("tcp", crowd, toNodePort, 1, 1000)
		udp := l.startLoad("udp", crowd, toServiceIP, 0, 1000)
		// These are endpoints all the time: whatever the others do, they get the same.
		steady := replicasOf("b", 4)
		for i := 0; !tcp.reached(steady, evenly) || !udp.reached(steady, evenly) || i < len(numbers); i++ {
			l.Program(web(at(replicasOf("b", numbers[i%len(numbers)])...), nil))
			tcp.awaitMore(50)
		}
		for _, ld := range []*load{tcp, udp} {
			ld.finish()
			l.even(ld, steady)
		}
		if n := l.resent(l.space("outside")) - sent; n > 0 {
			l.Errorf("%d SYNs got no answer and were sent again", n)
		}
	}},
	{"an endpoint that is removed gets no connection more, and none fails", func(l *Lab) { l.removeUnderLoad(nil) }},
	{"an endpoint that is removed gets no connection more, and none fails, with session affinity", func(l *Lab) { l.removeUnderLoad(clientIP(3600)) }},
}

// crowd are many clients.
var crowd = replicasOf("outside", replicas)

// evenly is how many connections show whether endpoints get the same: of six, where three get 10 % more and three 10 % less, chi-square is 75 above
// what it is otherwise, so that uneven reports that in 98 of 100 runs.
const evenly = 7500

// even checks with chi-square that servers served the same number of connections. It reports fewer than one of a million fair outcomes.
func (l *Lab) even(ld *load, servers []string) {
	l.Helper()
	counts, _ := ld.counts()
	var observed []int
	for _, s := range servers {
		observed = append(observed, counts[s])
	}
	if chi, limit := chiSquare(observed); chi > limit {
		l.Errorf("%s: chi-square %.1f of %s, want below %.1f", ld.network, chi, describe(servers, observed), limit)
	}
}

// chiSquare compares counts with equal ones, and gives the limit that by chance fewer than one of a million outcomes exceed (by Wilson and Hilferty, who
// are a little high that far out).
func chiSquare(observed []int) (chi, limit float64) {
	total := 0
	for _, n := range observed {
		total += n
	}
	expected := float64(total) / float64(len(observed))
	for _, n := range observed {
		d := float64(n) - expected
		chi += d * d / expected
	}
	const oneInAMillion = 4.7534 // standard deviations
	degrees := float64(len(observed) - 1)
	spread := 2 / (9 * degrees)
	return chi, degrees * math.Pow(1-spread+oneInAMillion*math.Sqrt(spread), 3)
}

func describe(servers []string, observed []int) (out string) {
	for i, s := range servers {
		out += fmt.Sprintf(" %s:%d", s, observed[i])
	}
	return out
}

// reached says whether servers served so many connections together, or a connection has failed.
func (ld *load) reached(servers []string, n int) bool {
	counts, _ := ld.counts()
	for _, s := range servers {
		n -= counts[s]
	}
	ld.mu.Lock()
	defer ld.mu.Unlock()
	return n <= 0 || ld.failed > 0
}

// removeUnderLoad takes endpoints away one by one while clients connect, and brings them back. With affinity, clients of other endpoints must not move.
func (l *Lab) removeUnderLoad(edit func(*spec)) {
	l.Helper()
	const most = 6
	sent := l.resent(l.space("outside"))
	with := func(names []string) { l.Program(web(at(names...), edit).named("web-shrinking")) }
	all := replicasOf("b", most)
	with(all)
	loads := []*load{l.startLoad("tcp", crowd, toServiceIP, 0, 400), l.startLoad("udp", crowd, toNodePort, 1, 400)}
	enough := 3 * len(crowd) // each client a few times
	before := make([]map[string]string, len(loads))
	for removed := 0; removed < most; removed++ {
		with(all[removed:])
		for i, ld := range loads {
			ld.restart()
			ld.await(enough)
			at := map[string]string{}
			_, pairs := ld.counts()
			for p := range pairs {
				n, _ := strconv.Atoi(p.server[1:]) // servers are b1, b2 ...
				switch was, known := before[i][p.client], before[i] != nil; {
				case n <= removed:
					l.Errorf("%s: %s served %s after it was removed", ld.network, p.server, p.client)
				case edit != nil && at[p.client] != "":
					l.Errorf("%s: %s is at %s and at %s", ld.network, p.client, p.server, at[p.client])
				case edit != nil && known && slices.Contains(all[removed:], was) && was != p.server:
					l.Errorf("%s: %s moved from %s to %s", ld.network, p.client, was, p.server)
				}
				at[p.client] = p.server
			}
			before[i] = at
		}
	}
	with(all)
	for _, ld := range loads {
		ld.restart()
		ld.await(enough)
		ld.finish()
	}
	if n := l.resent(l.space("outside")) - sent; n > 0 {
		l.Errorf("%d SYNs got no answer and were sent again", n)
	}
}
