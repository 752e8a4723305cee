package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/loopback"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/agent/sysctl"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// Mode is a row of the table of backends: one proxy mode and how to do it.
type Mode struct {
	Name v1alpha1.ProxyMode
	// Probe tries whether this node can do the mode. It changes nothing.
	Probe func(context.Context) error
	// Blank says whether the kernel holds nothing of the mode, as after a boot. It changes nothing. nil: that cannot be told.
	Blank func(context.Context) (bool, error)
	// New makes the mode's backend. It is called once the mode is needed.
	New func() (backend.Backend, error)
	// Cleanup removes what the mode left in the kernel, without New.
	Cleanup func(context.Context) error
	// Anchor keeps open what the mode translated, also after Cleanup. nil: nothing has to.
	Anchor *Anchor
}

const (
	retryMin = 50 * time.Millisecond
	retryMax = 15 * time.Second
	// reprobeEvery is how often a mode that Services ask for and the node cannot do is tried again: a kernel module may have been loaded.
	reprobeEvery = 30 * time.Second
	// A read-back is not cheap, and something that keeps touching our rules must not keep the agent reading: between two of them
	// is this multiple of what the last one took, within the bound.
	verifyRest    = 10
	verifyRestMax = 500 * time.Millisecond
)

// dataplane is one proxy mode of this node: its backend, what that holds and what it should hold. It belongs to the loop's goroutine.
type dataplane struct {
	Mode
	log         logr.Logger
	unavailable error // what Probe says
	probeAt     time.Time

	backend backend.Backend // nil until needed
	want    forwarding.State
	// applied is what the kernel holds as far as is known: nil if that is unknown.
	applied *forwarding.State
	// settled is what the last successful Apply established; unlike applied it outlives failures.
	settled forwarding.State
	// changed is told what a successful Apply changed.
	changed func(prev, next *forwarding.Service)
	// made is told of the backend once there is one, synced of every successful Apply: whether it read the kernel back, and how long it took.
	made   func(backend.Backend)
	synced func(full bool, took time.Duration)
	// leaving are services in want that another mode takes over; they go when that one holds them.
	leaving map[forwarding.ServiceKey]struct{}
	// cleaned says that nothing of an earlier run is left although there is no backend.
	cleaned bool

	failures int   // in a row
	failed   int   // since the start
	err      error // of the last Apply, nil after a success
	retryAt  time.Time

	drifted     atomic.Bool
	verifyAfter time.Time
	repairing   bool
	repairs     int64
}

func (d *dataplane) available() bool { return d.unavailable == nil }

// current says whether the kernel holds what it should.
func (d *dataplane) current() bool {
	if d.backend == nil && d.want.Len() == 0 {
		return true
	}
	return d.applied != nil && *d.applied == d.want
}

// program makes the kernel hold want, if it does not and no failure must be waited out first. It says whether it changed the kernel.
func (d *dataplane) program(ctx context.Context, nudge func()) bool {
	if d.current() || time.Now().Before(d.retryAt) {
		return false
	}
	if err := d.apply(ctx, nudge); err != nil {
		if ctx.Err() != nil {
			return false
		}
		d.failures++
		d.failed++
		delay := min(retryMin<<min(d.failures-1, 16), retryMax)
		d.applied, d.err, d.retryAt = nil, err, time.Now().Add(delay)
		d.log.Error(err, "Could not program the kernel; the rules it holds stay in force", "mode", d.Name, "failures", d.failures, "retryIn", delay)
		return false
	}
	if d.failures > 0 {
		d.log.Info("Programmed the kernel after failures", "mode", d.Name, "failures", d.failures)
	}
	if d.repairing {
		d.repairs++
		d.log.Info("Repaired rules that something else had changed", "mode", d.Name, "repairs", d.repairs)
	}
	d.failures, d.err, d.repairing = 0, nil, false
	return true
}

func (d *dataplane) apply(ctx context.Context, nudge func()) error {
	if d.backend == nil {
		b, err := d.New()
		if err != nil {
			return fmt.Errorf("start backend: %w", err)
		}
		d.backend = b
		d.made(b)
		go d.listen(ctx, b.Drifted(), nudge)
	}
	next := d.want
	full := d.applied == nil || !d.applied.Ground().Equal(next.Ground())
	start := time.Now()
	if err := d.backend.Apply(ctx, d.applied, next); err != nil {
		return err
	}
	d.synced(full, time.Since(start))
	for c := range forwarding.Changes(d.settled, next) {
		d.changed(c.Prev, c.Next)
	}
	d.applied, d.settled = &next, next
	return nil
}

// listen passes a backend's signals on to the loop.
func (d *dataplane) listen(ctx context.Context, drifted <-chan struct{}, nudge func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case _, ok := <-drifted:
			if !ok {
				return
			}
			d.drifted.Store(true)
			nudge()
		}
	}
}

// verify looks at the kernel if something may have changed it. If it did, what the kernel holds counts as unknown from then on, and program repairs it.
func (d *dataplane) verify(ctx context.Context) {
	if !d.drifted.Load() || time.Now().Before(d.verifyAfter) {
		return
	}
	d.drifted.Store(false) // before the read: what changes during it signals again
	if d.applied == nil {
		d.repairing = d.repairing || d.failures > 0
		return // about to be read back anyway
	}
	start := time.Now()
	drifts, err := d.backend.Verify(ctx, *d.applied)
	d.verifyAfter = time.Now().Add(min(verifyRest*time.Since(start), verifyRestMax))
	switch {
	case ctx.Err() != nil:
	case err != nil:
		d.log.Error(err, "Could not read the kernel back; programming it afresh", "mode", d.Name)
		d.applied = nil
	case len(drifts) > 0:
		d.log.Info("Something else changed our rules", "mode", d.Name, "differences", len(drifts), "first", firstOf(drifts))
		d.applied, d.repairing = nil, true
	}
}

// firstOf tells the first few of the drifts in one line.
func firstOf(drifts []backend.Drift) string {
	const shown = 5
	var parts []string
	for _, d := range drifts[:min(len(drifts), shown)] {
		parts = append(parts, d.String())
	}
	return strings.Join(parts, "; ")
}

// put makes a service part of what the kernel should hold.
func (d *dataplane) put(s *forwarding.Service) {
	if was := d.want.Get(s.Key); was == nil || !was.Equal(s) {
		d.want = d.want.With(s)
	}
}

// forget drops a service that is gone and was only kept until another mode had it.
func (d *dataplane) forget(key forwarding.ServiceKey) {
	if _, leaving := d.leaving[key]; leaving {
		delete(d.leaving, key)
		d.want = d.want.Without(key)
	}
}

// release takes out of want what another mode has taken over and says whether there was anything.
func (d *dataplane) release(held func(forwarding.ServiceKey) bool) bool {
	changed := false
	for key := range d.leaving {
		if held(key) {
			delete(d.leaving, key)
			d.want = d.want.Without(key)
			changed = true
		}
	}
	return changed
}

// due gives when the dataplane next needs the loop, and false if it does not.
func (d *dataplane) due() (time.Time, bool) {
	switch {
	case !d.current():
		return d.retryAt, true
	case d.drifted.Load():
		return d.verifyAfter, true
	}
	return time.Time{}, false
}

// Cleanup removes what every mode of a table left in the kernel, ends the connections that it translated, and takes back that the kernel routes loopback addresses
// if the agent had it do that. A mode that this node cannot do cannot have left anything.
func Cleanup(ctx context.Context, log logr.Logger, table []Mode) error {
	return cleanup(ctx, log, table, func() (bool, error) { return loopback.Unroute(sysctl.Node()) })
}

func cleanup(ctx context.Context, log logr.Logger, table []Mode, unroute func() (lowered bool, err error)) error {
	var (
		failed []error
		able   []Mode
	)
	for _, m := range table {
		if err := m.Probe(ctx); err != nil {
			log.Info("Skipped a mode that this node cannot do", "mode", m.Name, "reason", err.Error())
			continue
		}
		able = append(able, m)
		if err := m.Cleanup(ctx); err != nil {
			failed = append(failed, fmt.Errorf("clean up mode %s: %w", m.Name, err))
			continue
		}
		log.Info("Removed all rules of a mode", "mode", m.Name)
	}
	if len(able) > 0 {
		lowered, err := unroute()
		if lowered {
			log.Info("Forbade the kernel to route loopback addresses, as before", "sysctl", loopback.Parameter.Name)
		}
		failed = append(failed, err)
	}
	failed = append(failed, removeAnchor(ctx, able))
	return errors.Join(failed...)
}
