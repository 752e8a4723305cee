package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// minInterval is the shortest time between two passes of the loop. The first change after a quiet time is programmed at once; a
// burst is folded into two hundred passes a second, which bounds what it costs at a delay nobody notices.
const minInterval = 5 * time.Millisecond

// Report is what the loop tells the outside after a pass.
type Report struct {
	// Held are the marks that the kernel holds.
	Held                Marks
	Modes               []v1alpha1.NodeProxyMode
	Services, Endpoints int
	LastApplied         time.Time
	DriftRepairs        int64
	// Reason is empty if the kernel holds all it should, else a CamelCase word; Message tells people.
	Reason, Message string
}

// listeners are told what the loop does. None of them may wait.
type listeners struct {
	// changed: a kernel holds next in the place of prev; nil stands for nothing.
	changed func(prev, next *forwarding.Service)
	// checked: the kernel holds what this health check promises.
	checked func(types.NamespacedName, compile.HealthCheck)
	// report: a pass is over.
	report func(Report)
}

// loop turns what the store receives into what the kernel holds. All of it runs in one goroutine.
type loop struct {
	log     logr.Logger
	store   *store
	planes  []*dataplane // in the order of the table
	metrics *metrics
	health  *health
	tell    listeners

	anchorage anchorage

	nudged chan struct{} // a dataplane wants attention

	node      *compile.Node
	programs  map[types.NamespacedName]*program
	frontends frontends
	endpoints int // over all live services
	unserved  map[types.NamespacedName]struct{}
	// checks are the health checks that changed since the kernel last held all it should.
	checks map[types.NamespacedName]compile.HealthCheck

	synced bool
	// received covers all that was folded into what the dataplanes want, held what all of them hold.
	received, held Marks
	triggers       []time.Time // of changes that are received and not held
	lastApplied    time.Time
	lastPass       time.Time
}

func newLoop(log logr.Logger, s *store, table []Mode, m *metrics, h *health, tell listeners) *loop {
	l := &loop{
		log: log, store: s, metrics: m, health: h, tell: tell,
		nudged:    make(chan struct{}, 1),
		programs:  map[types.NamespacedName]*program{},
		frontends: newFrontends(),
		unserved:  map[types.NamespacedName]struct{}{},
		checks:    map[types.NamespacedName]compile.HealthCheck{},
	}
	changed := func(prev, next *forwarding.Service) {
		if next == nil && slices.ContainsFunc(l.planes, func(d *dataplane) bool { return d.want.Get(prev.Key) != nil }) {
			return // it only left one mode for another
		}
		tell.changed(prev, next)
	}
	for _, mode := range table {
		l.planes = append(l.planes, &dataplane{Mode: mode, log: log, changed: changed, made: m.traffic.add, synced: m.synced, leaving: map[forwarding.ServiceKey]struct{}{}})
	}
	return l
}

// run works until ctx ends. What the kernel holds then stays.
func (l *loop) run(ctx context.Context) error {
	for _, d := range l.planes {
		if l.probe(ctx, d); d.inherits(ctx) {
			l.health.inherits()
		}
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		l.pass(ctx)
		timer.Reset(l.untilDue())
		select {
		case <-ctx.Done():
			return l.close()
		case <-l.store.wake:
		case <-l.nudged:
		case <-timer.C:
		}
		if rest := minInterval - time.Since(l.lastPass); rest > 0 {
			select {
			case <-ctx.Done():
				return l.close()
			case <-time.After(rest):
			}
		}
	}
}

func (l *loop) close() error {
	var failed []error
	for _, d := range l.planes {
		if d.backend != nil {
			failed = append(failed, d.backend.Close())
		}
	}
	return errors.Join(failed...)
}

func (l *loop) nudge() {
	select {
	case l.nudged <- struct{}{}:
	default:
	}
}

// pass does all that can be done now.
func (l *loop) pass(ctx context.Context) {
	b, ok := l.store.take()
	if !ok {
		return
	}
	start := time.Now()
	l.lastPass = start
	l.health.waiting(start)
	changed := false
	l.stand(b)
	if !l.synced {
		l.synced = true
		l.log.Info("Received all of the cluster's state", "services", len(b.inputs), "marks", b.marks)
		changed = l.headStart(ctx, b)
	}
	l.reprobe(ctx)
	l.fold(b)
	changed = l.program(ctx) || changed
	if ctx.Err() != nil {
		return
	}
	l.cleanUpUnused(ctx)
	l.settle(b, start, changed)
}

// stand puts what the dataplanes want on what holds for all Services now.
func (l *loop) stand(b batch) {
	l.node = b.node
	for _, d := range l.planes {
		d.want = d.want.On(b.ground)
	}
}

// fold carries a batch into what the dataplanes want. Nothing of it is lost if the kernel refuses: want stays.
func (l *loop) fold(b batch) {
	l.received = b.marks
	l.triggers = appendTriggers(l.triggers, b.triggers...)
	for _, in := range b.inputs {
		l.recompile(in)
	}
}

func (l *loop) recompile(in input) {
	p := l.programs[in.service]
	var full []*forwarding.Service
	var check compile.HealthCheck
	if in.assignment != nil {
		full = compile.Services(in.assignment, in.slices, l.node)
		check = compile.HealthCheckOf(in.assignment, in.slices, l.node)
	}
	if p == nil {
		if len(full) == 0 {
			return
		}
		p = &program{service: in.service}
		l.programs[in.service] = p
	}
	if !check.Equal(p.check) {
		p.check, l.checks[in.service] = check, check
	}
	old := p.full
	if in.assignment != nil {
		p.assignment = in.assignment
	}
	p.full = full
	others := l.frontends.update(p, old)
	l.place(p)
	for _, other := range others {
		l.place(other)
	}
	if len(full) == 0 {
		delete(l.programs, in.service)
	}
}

// place puts what p forwards into the dataplane that is to do it and takes it out of the one that did.
func (l *loop) place(p *program) {
	live, lost := l.frontends.cut(p)
	for fe, holder := range lost {
		if p.lost[fe] != holder {
			l.log.Info("Two Services claim one address and port on this node; the other has it", "service", p.service.String(),
				"holder", holder.String(), "address", fe.addr.String(), "port", fe.port, "protocol", fe.protocol.String())
		}
	}
	p.lost = lost

	to := l.modeFor(p)
	from := l.plane(p.mode)
	for _, s := range p.live {
		l.endpoints -= endpointsOf(s)
		if from != nil && !containsKey(live, s.Key) {
			from.want = from.want.Without(s.Key)
			for _, d := range l.planes {
				d.forget(s.Key)
			}
		}
	}
	for _, s := range live {
		l.endpoints += endpointsOf(s)
		if to == nil {
			continue
		}
		if from != nil && from != to && from.want.Get(s.Key) != nil {
			from.leaving[s.Key] = struct{}{}
		}
		delete(to.leaving, s.Key) // it may have come back before it was gone
		for _, d := range l.planes {
			if _, leaving := d.leaving[s.Key]; leaving || d == to {
				d.put(s) // a mode that still serves it for a while must not do so with endpoints of yesterday
			}
		}
	}
	p.live, p.mode = live, ""
	if to != nil {
		p.mode = to.Name
	}
	if len(live) > 0 && p.mode != p.assignment.Mode {
		l.unserved[p.service] = struct{}{}
	} else {
		delete(l.unserved, p.service)
	}
}

// modeFor gives the dataplane for a Service: the one its assignment names, or, as long as this node cannot do that, the one that
// has it now, so that traffic goes on. nil if there is neither.
func (l *loop) modeFor(p *program) *dataplane {
	if d := l.plane(p.assignment.Mode); d != nil && d.available() {
		return d
	}
	return l.plane(p.mode)
}

func (l *loop) plane(mode v1alpha1.ProxyMode) *dataplane {
	i := slices.IndexFunc(l.planes, func(d *dataplane) bool { return d.Name == mode })
	if i < 0 {
		return nil
	}
	return l.planes[i]
}

func containsKey(list []*forwarding.Service, key forwarding.ServiceKey) bool {
	return slices.ContainsFunc(list, func(s *forwarding.Service) bool { return s.Key == key })
}

// endpointsOf counts the endpoints that a service can use on this node.
func endpointsOf(s *forwarding.Service) int {
	return max(len(s.Internal.Endpoints), len(s.External.Endpoints), len(s.ExternalFromHere.Endpoints))
}

// program makes the kernel hold what the dataplanes want and says whether it changed. A Service that changes its mode is in both
// until the new one holds it.
func (l *loop) program(ctx context.Context) bool {
	changed := false
	for _, d := range l.planes {
		d.verify(ctx)
		changed = d.program(ctx, l.nudge) || changed
	}
	for _, d := range l.planes {
		if d.release(l.heldElsewhere(d)) {
			changed = d.program(ctx, l.nudge) || changed
		}
	}
	return changed
}

func (l *loop) heldElsewhere(d *dataplane) func(forwarding.ServiceKey) bool {
	return func(key forwarding.ServiceKey) bool {
		p := l.programs[types.NamespacedName{Namespace: key.Namespace, Name: key.Name}]
		if p == nil {
			return true
		}
		to := l.plane(p.mode)
		return to != nil && to != d && to.current()
	}
}

// cleanUpUnused removes what an earlier run left in modes that nothing uses now. It waits until everything else is programmed: a
// Service may have changed its mode while no agent ran.
func (l *loop) cleanUpUnused(ctx context.Context) {
	if !l.allCurrent() {
		return
	}
	for _, d := range l.planes {
		if d.backend != nil || d.cleaned || !d.available() || time.Now().Before(d.retryAt) {
			continue
		}
		if err := d.Cleanup(ctx); err != nil {
			d.failures++
			d.retryAt = time.Now().Add(min(retryMin<<min(d.failures-1, 16), retryMax))
			l.metrics.cleanupFailed(d.Name)
			l.log.Error(err, "Could not remove the rules of a mode that is not used any more", "mode", d.Name)
			continue
		}
		d.cleaned, d.failures = true, 0
	}
	l.tendAnchor(ctx)
}

func (l *loop) allCurrent() bool {
	return !slices.ContainsFunc(l.planes, func(d *dataplane) bool { return !d.current() })
}

// settle draws the line under a pass: if the kernel holds all that was received, its marks move.
func (l *loop) settle(b batch, start time.Time, changed bool) {
	now := time.Now()
	if changed {
		l.lastApplied = now
		l.metrics.applied(now, now.Sub(start))
	}
	if l.allCurrent() {
		l.held = l.received
		l.metrics.programmed(now, l.triggers)
		l.triggers = nil
		l.health.updated(now)
		for service, check := range l.checks {
			l.tell.checked(service, check)
		}
		clear(l.checks)
	}
	l.metrics.took(b.services, b.endpoints)
	l.tell.report(l.reportNow())
}

func (l *loop) reportNow() Report {
	r := Report{Held: l.held, Endpoints: l.endpoints, LastApplied: l.lastApplied}
	var failing []string
	for _, d := range l.planes {
		mode := v1alpha1.NodeProxyMode{Mode: d.Name, Available: d.available()}
		if d.available() {
			mode.Services = int32(d.want.Len() - len(d.leaving))
		} else {
			mode.Message = d.unavailable.Error()
		}
		r.Services += int(mode.Services)
		r.DriftRepairs += d.repairs
		r.Modes = append(r.Modes, mode)
		if d.err != nil {
			failing = append(failing, fmt.Sprintf("%s: %v", d.Name, d.err))
		}
		l.metrics.dataplane(d)
	}
	l.metrics.forwarding(l.endpoints)
	r.Modes = l.withUnknownModes(r.Modes)
	switch {
	case len(failing) > 0:
		r.Reason, r.Message = "ApplyFailed", "the kernel refused: "+failing[0]
	case !l.allCurrent():
		r.Reason, r.Message = "Programming", "the kernel is being programmed"
	case len(l.unserved) > 0:
		r.Reason, r.Message = "ModeUnavailable", fmt.Sprintf("%d Services ask for a proxy mode that this node cannot do; see modes", len(l.unserved))
	}
	return r
}

// withUnknownModes adds the modes that Services ask for and this agent does not have, so that nobody takes the marks to mean them.
func (l *loop) withUnknownModes(modes []v1alpha1.NodeProxyMode) []v1alpha1.NodeProxyMode {
	for _, name := range [...]v1alpha1.ProxyMode{v1alpha1.ProxyModeNFTables, v1alpha1.ProxyModeIPTables, v1alpha1.ProxyModeIPVS,
		v1alpha1.ProxyModeUserspace, v1alpha1.ProxyModeEBPF} {
		if l.plane(name) == nil {
			modes = append(modes, v1alpha1.NodeProxyMode{Mode: name, Message: "this version of the agent does not have the mode"})
		}
	}
	return modes
}

func (l *loop) probe(ctx context.Context, d *dataplane) {
	d.unavailable = d.Probe(ctx)
	d.probeAt = time.Now().Add(reprobeEvery)
	if d.unavailable != nil {
		l.log.Info("This node cannot do a proxy mode", "mode", d.Name, "reason", d.unavailable.Error())
	}
}

// reprobe tries modes again that Services ask for in vain.
func (l *loop) reprobe(ctx context.Context) {
	for _, d := range l.planes {
		if d.available() || time.Now().Before(d.probeAt) || !l.asked(d) {
			continue
		}
		if l.probe(ctx, d); !d.available() {
			continue
		}
		l.log.Info("This node can do a proxy mode now", "mode", d.Name)
		for name := range l.unserved {
			l.place(l.programs[name])
		}
	}
}

func (l *loop) asked(d *dataplane) bool {
	for name := range l.unserved {
		if l.programs[name].assignment.Mode == d.Name {
			return true
		}
	}
	return false
}

// untilDue gives how long the loop may sleep if nothing happens.
func (l *loop) untilDue() time.Duration {
	next := time.Now().Add(time.Hour)
	for _, d := range l.planes {
		if at, ok := d.due(); ok && at.Before(next) {
			next = at
		}
		if l.synced && l.allCurrent() && d.backend == nil && !d.cleaned && d.available() && d.retryAt.Before(next) {
			next = d.retryAt
		}
		if !d.available() && len(l.unserved) > 0 && l.asked(d) && d.probeAt.Before(next) {
			next = d.probeAt
		}
	}
	if at := l.anchorage.tryAt; !at.IsZero() && !l.anchorage.gone && at.Before(next) {
		next = at
	}
	return max(time.Until(next), 0)
}
