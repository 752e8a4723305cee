package agent

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// fakeAnchor is an anchor with so many connections open.
type fakeAnchor struct {
	mu                   sync.Mutex
	open, tries, removed int
}

func (f *fakeAnchor) anchor() *Anchor {
	return &Anchor{
		Release: func(context.Context) (bool, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.tries++
			return f.open == 0, nil
		},
		Remove: func(context.Context) error {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.removed++
			return nil
		},
	}
}

// end ends all connections.
func (f *fakeAnchor) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open = 0
}

// counts gives how often it was tried to release it, and how often it was removed.
func (f *fakeAnchor) counts() (tries, removed int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.tries, f.removed
}

// The anchor stays while a mode is in use, then until the last connection has ended, but not for ever.
func TestAnchorage(t *testing.T) {
	for _, c := range []struct {
		name            string
		open            int // connections that never end
		last            time.Duration
		released, ended bool
	}{
		{"no connection", 0, 0, true, false},
		{"connections end", 1, time.Hour, true, false},
		{"a connection never ends", 1, 1000 * time.Hour, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := fakeAnchor{open: c.open}
				var a anchorage
				tend := func(needed bool) { a.tend(t.Context(), logr.Discard(), f.anchor(), needed) }
				for range 10 {
					tend(true)
					time.Sleep(time.Minute)
				}
				if f.tries > 0 {
					t.Fatal("tried to let go of the anchor while a mode is in use")
				}
				start := time.Now()
				for !a.gone && time.Since(start) < 100*time.Hour {
					if time.Since(start) >= c.last {
						f.open = 0
					}
					tend(false)
					time.Sleep(10 * time.Second)
				}
				took := time.Since(start)
				if want := max(c.last, 0); !c.ended && (took < want || took > want+time.Minute) || c.ended && (took < drainTimeout || took > drainTimeout+time.Minute) {
					t.Errorf("gone after %v", took)
				}
				if !a.gone || (f.removed > 0) != c.ended || f.tries > int(took/releaseEvery)+1 {
					t.Errorf("gone: %v, removed %d times, %d tries in %v", a.gone, f.removed, f.tries, took)
				}
				tries := f.tries
				tend(false)
				if f.tries != tries {
					t.Error("tried again what is gone")
				}
			})
		})
	}
}

// An agent that starts without Services lets go of the anchor only after the rules, and asks again by itself.
func TestLoopReleasesTheAnchor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		f := fakeAnchor{open: 1}
		r.loop.planes[0].Anchor = f.anchor()
		stop := r.run()
		r.sync()
		pause(time.Second)
		if tries, _ := f.counts(); r.modes[0].cleanups != 1 || tries != 1 {
			t.Errorf("%d clean-ups, %d tries", r.modes[0].cleanups, tries)
		}
		f.end()
		pause(releaseEvery)
		if tries, removed := f.counts(); tries != 2 || removed != 0 {
			t.Errorf("%d tries, removed %d times", tries, removed)
		}
		pause(time.Hour)
		if tries, _ := f.counts(); tries != 2 {
			t.Errorf("%d tries after it was gone", tries-2)
		}
		r.put(newAssignment("web", "10.99.0.1"))
		r.put(newSlice("web", "10.1.0.1"))
		pause(time.Hour)
		stop()
		if tries, _ := f.counts(); tries != 2 || r.loop.anchorage.gone {
			t.Error("the anchor is let go of while a Service needs it")
		}
	})
}

func TestCleanupRemovesTheAnchor(t *testing.T) {
	f := fakeAnchor{open: 1}
	mode := newFakeMode(v1alpha1.ProxyModeNFTables).mode()
	mode.Anchor = f.anchor()
	unrouted := 0
	unroute := func() (bool, error) { unrouted++; return true, nil }
	if err := cleanup(t.Context(), logr.Discard(), []Mode{mode, mode}, unroute); err != nil || f.removed != 1 || unrouted != 1 {
		t.Errorf("removed the anchor %d times, took back the route to loopback %d times: %v", f.removed, unrouted, err)
	}
}
