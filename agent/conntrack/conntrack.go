// Package conntrack ends the UDP flows that still lead to endpoints which are gone.
//
// The kernel translates a flow by what was decided for its first packet. TCP notices when its peer is gone; a UDP client that
// keeps sending keeps its flow alive, so a resolver would ask a dead endpoint for hours, or, if there was no endpoint when it first asked,
// nobody at all. TCP flows are left alone: an endpoint that terminates may finish them. So may one that terminates and serves UDP: a flow ends when
// its endpoint serves no more or is gone, not when new traffic goes elsewhere (forwarding.Service.Lingering; kube-proxy has the same rule).
//
// It works for every backend that translates in the kernel, beside the path that programs it: what changed is collected, and one
// pass over the kernel's table serves all of it. The kernel chooses what it shows of the table, so a pass allocates by what it ends and not by what
// there is.
package conntrack

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

const (
	// settle is how long a pass waits for what changed: a packet that the old rules translated is entered in the table only once it has left the node's
	// hooks, and a burst of changes is one pass.
	settle = 10 * time.Millisecond
	// A pass is followed by a rest of this multiple of its CPU time, within the bound, so that passes never take more than a twentieth of a core. It is not of
	// what the pass took, because on a busy node that is many times as long, and flows would lead nowhere for as much longer.
	rest    = 20
	restMax = 5 * time.Second
	// What a failed pass left is tried again, after a delay that doubles between these, whatever changes meanwhile.
	retryMin = 100 * time.Millisecond
	retryMax = 30 * time.Second
)

// Pass is what one pass over the kernel's table came to.
type Pass struct {
	Took time.Duration
	// Ended is how many flows it ended.
	Ended uint
	// Err says that it could not do all; it will be tried again.
	Err error
}

// Cleaner collects changes of services and ends the flows that they leave behind.
type Cleaner struct {
	// Observe, if not nil, is told of every pass. It must be set before Run.
	Observe func(Pass)

	log  logr.Logger
	wake chan struct{}
	// spent gives the calling thread's CPU time.
	spent func() time.Duration

	mu    sync.Mutex
	stale stale
	// newer is what changed since the pass under way began; nil if there is none.
	newer stale
	ended uint64
}

// New makes a Cleaner. Run does its work.
func New(log logr.Logger) *Cleaner {
	return &Cleaner{log: log, wake: make(chan struct{}, 1), spent: threadTime, stale: stale{}}
}

// threadTime is the CPU time of the calling thread so far, the kernel's on its behalf included.
func threadTime() time.Duration {
	var r unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_THREAD, &r) // fails for other arguments only
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// Changed takes note that the kernel holds next in the place of prev; either may be nil. prev being nil means a Service that was
// not forwarded before as far as is known, which after a restart of the agent says nothing about the flows. It costs next to nothing.
func (c *Cleaner) Changed(prev, next *forwarding.Service) {
	c.mu.Lock()
	leaves := mayLeaveFlows(prev, next)
	if leaves {
		c.stale.change(prev, next)
	} else {
		c.stale.update(next) // a pass that is due must not end flows to an endpoint that has come since
	}
	if c.newer != nil {
		c.newer.change(nil, next)
	}
	c.mu.Unlock()
	if !leaves {
		return
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Ended gives how many flows have been ended since the start.
func (c *Cleaner) Ended() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended
}

// Run works on a table until ctx ends.
func (c *Cleaner) Run(ctx context.Context, table *Table) { c.run(ctx, table.end) }

// endFunc ends the flows of one address family that lead nowhere, but for those that spare then says go to where they may.
type endFunc func(family uint8, s stale, spare func(flow) bool) (uint, error)

// run is Run with the way to end flows.
func (c *Cleaner) run(ctx context.Context, end endFunc) {
	failures := 0
	var earliest time.Time
	for {
		var retry <-chan time.Time
		if failures > 0 {
			retry = time.After(time.Until(earliest))
		}
		select {
		case <-ctx.Done():
			return
		case <-c.wake:
		case <-retry:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(max(settle, time.Until(earliest))):
		}
		p, spent := c.measured(end)
		pause := min(rest*spent, restMax)
		if p.Err != nil {
			failures++
			pause = max(pause, min(retryMin<<min(failures-1, 16), retryMax))
			c.log.Error(p.Err, "Could not end all UDP flows that lead nowhere; trying again", "ended", p.Ended, "failures", failures, "retryIn", pause)
		} else {
			failures = 0
		}
		earliest = time.Now().Add(pause)
		if p.Ended > 0 {
			c.log.V(1).Info("Ended UDP flows that led to endpoints which are gone", "flows", p.Ended)
		}
		if c.Observe != nil {
			c.Observe(p)
		}
	}
}

// measured is pass, with its CPU time.
func (c *Cleaner) measured(end endFunc) (Pass, time.Duration) {
	runtime.LockOSThread() // nothing else runs on the thread meanwhile
	defer runtime.UnlockOSThread()
	before := c.spent()
	p := c.pass(end)
	return p, c.spent() - before
}

// spare says whether a flow leads to where it may by what changed since the pass began.
func (c *Cleaner) spare(f flow) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.newer.allows(f)
}

// pass ends what is stale now. What it could not look at stays stale.
func (c *Cleaner) pass(end endFunc) Pass {
	start := time.Now()
	c.mu.Lock()
	s := c.stale
	c.stale, c.newer = stale{}, stale{}
	c.mu.Unlock()
	var p Pass
	for _, family := range [2]uint8{unix.AF_INET, unix.AF_INET6} {
		mine := s.of(family)
		if len(mine) == 0 {
			continue
		}
		n, err := end(family, mine, c.spare)
		p.Ended += n
		if err != nil {
			p.Err = errors.Join(p.Err, err)
			c.mu.Lock()
			c.stale.restore(mine)
			c.mu.Unlock()
		}
	}
	c.mu.Lock()
	c.ended += uint64(p.Ended)
	c.newer = nil
	c.mu.Unlock()
	p.Took = time.Since(start)
	return p
}
