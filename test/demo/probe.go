package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/test/cluster"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// probeInterval is the pause between two calls.
const probeInterval = 5 * time.Millisecond

// call is one call of a probe.
type call struct {
	at  time.Time // when it began
	pod string    // who answered
	err error
}

// probe calls an address again and again, each time over a new connection.
type probe struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu    sync.Mutex
	calls []call
}

func startProbe(ctx context.Context, from *netns.NS, to netip.AddrPort) *probe {
	ctx, cancel := context.WithCancel(ctx)
	p := &probe{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		for ctx.Err() == nil {
			c := call{at: time.Now()}
			a, err := cluster.Call(ctx, from, "tcp", to)
			if ctx.Err() != nil {
				return // we ended it, the network did not
			}
			c.pod, c.err = a.Pod, err
			p.mu.Lock()
			p.calls = append(p.calls, c)
			p.mu.Unlock()
			time.Sleep(probeInterval)
		}
	}()
	return p
}

// stop ends the probe and gives all its calls.
func (p *probe) stop() []call {
	p.cancel()
	<-p.done
	return p.calls
}

func (p *probe) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.calls)
}

// await waits for a call that is as wanted.
func (p *probe) await(ctx context.Context, what string, wanted func(call) bool) error {
	return p.until(ctx, what, func(calls []call) bool { return slices.ContainsFunc(calls, wanted) })
}

// awaitCount waits until so many calls were made.
func (p *probe) awaitCount(ctx context.Context, n int) error {
	return p.until(ctx, fmt.Sprintf("%d calls", n), func(calls []call) bool { return len(calls) >= n })
}

func (p *probe) until(ctx context.Context, what string, enough func([]call) bool) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	for {
		p.mu.Lock()
		ok := enough(p.calls)
		p.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no %s: %w", what, context.Cause(ctx))
		case <-time.After(probeInterval):
		}
	}
}
