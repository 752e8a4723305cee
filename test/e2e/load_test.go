package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/serviceproxy/serviceproxy-operator/test/cluster"
)

// load opens new connections at a steady rate, each asking once, and remembers how they went.
type load struct {
	cancel  context.CancelFunc
	running sync.WaitGroup

	mu       sync.Mutex
	answered map[string]int       // by pod
	last     map[string]time.Time // when the last connection to a pod was begun
	failures []error
	slowest  time.Duration
}

// loadTimeout is how long a connection may take before it counts as failed.
const loadTimeout = 5 * time.Second

// startLoad calls an address from all callers in turn until the spec ends or stop is called.
func startLoad(to netip.AddrPort, perSecond int, from ...caller) *load {
	running, cancel := context.WithCancel(ctx)
	l := &load{cancel: cancel, answered: map[string]int{}, last: map[string]time.Time{}}
	l.running.Go(func() {
		tick := time.NewTicker(time.Second / time.Duration(perSecond))
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-running.Done():
				return
			case <-tick.C:
				l.running.Go(func() { l.call(from[i%len(from)], to) })
			}
		}
	})
	DeferCleanup(func() { l.stop() })
	return l
}

func (l *load) call(from caller, to netip.AddrPort) {
	begun := time.Now()
	calling, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	a, err := cluster.Call(calling, from.ns, "tcp", to)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slowest = max(l.slowest, time.Since(begun))
	if err != nil {
		l.failures = append(l.failures, fmt.Errorf("%s from %s: %w", begun.Format("15:04:05.000"), from.name, err))
		return
	}
	l.answered[a.Pod]++
	if begun.After(l.last[a.Pod]) {
		l.last[a.Pod] = begun
	}
}

// count is how many connections were answered so far.
func (l *load) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, pod := range l.answered {
		n += pod
	}
	return n
}

// lastTo is when the last connection that a pod answered was begun.
func (l *load) lastTo(pod string) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last[pod]
}

// failed are the connections that failed so far.
func (l *load) failed() []error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.failures
}

// stop waits for the connections under way.
func (l *load) stop() {
	l.cancel()
	l.running.Wait()
}

// expectNoFailure stops the load and expects that there were at least so many connections and that none failed.
func (l *load) expectNoFailure(atLeast int) {
	GinkgoHelper()
	l.stop()
	AddReportEntry("load", fmt.Sprintf("%d connections, the slowest took %v", l.count(), l.slowest.Round(time.Millisecond)))
	Expect(l.failures).To(BeEmpty(), "of %d connections", l.count()+len(l.failures))
	Expect(l.count()).To(BeNumerically(">=", atLeast), "connections; with fewer, nothing is shown")
}
