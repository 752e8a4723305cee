package programmed

import (
	"cmp"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

const (
	// settle is how long a generation may be pending before its first False is written. Most are programmed sooner, and
	// each write reaches every agent. Until then the older condition tells by its observedGeneration that it is outdated.
	settle = time.Second
	// A False that is written is looked at again, to name the nodes that are waited for now, after firstRefresh and
	// then after twice the time each, up to lastRefresh. A new reason waits for settle only.
	firstRefresh = 10 * time.Second
	lastRefresh  = 5 * time.Minute
	// falsesPerEvaluation bounds how many False are decided at a time, so that a flood of new assignments neither holds up the
	// tracker nor floods the agents with statuses that are about to change.
	falsesPerEvaluation = 50
)

// tracker holds what is known of nodes, assignments and slices, and decides what the assignments' status should say.
// It has no client and no clock. All methods may be called concurrently.
type tracker struct {
	mu          sync.Mutex
	nodes       map[string]*trackedNode
	nodesEpoch  int // counts changes of who exists and of labels
	services    map[types.NamespacedName]service
	assignments map[types.NamespacedName]*assignment
	groups      map[groupKey]*group
	pending     int
}

// trackedNode is a node and what decides whether it is one.
type trackedNode struct {
	node
	uid      types.UID // of the Node; empty: there is none
	bootID   string    // of the Node; empty: not known
	labels   labels.Set
	reported *report // nil: there is no NodeProxyState
}

// report is what a NodeProxyState says.
type report struct {
	nodeUID  types.UID // the Node that owns it; empty: no Node does
	bootID   string    // of the kernel that it is about; empty: not known
	given    bool      // an agent wrote it
	holds    marks
	modes    []v1alpha1.NodeProxyMode
	interval time.Duration // 0 if not ours
}

// groupKey is what assignments must share to wait for the same nodes in the same way.
type groupKey struct {
	selector string
	mode     v1alpha1.ProxyMode
}

// group is the assignments that share a groupKey.
type group struct {
	selector labels.Selector
	members  int           // assignments, pending or not
	pending  []*assignment // each knows its place; no map, because one that was large once stays slow to walk
	nodes    []*node       // selected, by name; as of epoch
	epoch    int
}

// assignment is what is tracked of a ServiceAssignment: of its present generation only.
type assignment struct {
	key        types.NamespacedName
	uid        types.UID
	generation int64
	ports      []v1alpha1.AssignmentPort
	groupKey   groupKey
	place      int // in its group's pending; -1: latched

	revision revision  // at which this generation was first seen
	served   readiness // when its ports were first served
	target   target    // what follows from these and the Service's slices

	since     time.Time // when this generation was first seen; zero if that is not known, or measured already
	lookAfter time.Time // when a False may be written next for the same reason
	reasonAt  time.Time // and for another
	refresh   time.Duration

	want   verdict // empty: nothing is decided yet
	stored stored  // what the API server holds, as of the newest revision seen
}

// stored is the part of an assignment's status that is ours.
type stored struct {
	revision   revision
	generation int64
	verdict    verdict
	transition metav1.Time
}

// statusWrite is a status to be written.
type statusWrite struct {
	key        types.NamespacedName
	uid        types.UID
	generation int64
	verdict    verdict
	transition metav1.Time // of the stored condition if it has the same status, else zero
	since      time.Time
}

func newTracker() *tracker {
	return &tracker{
		nodes:       map[string]*trackedNode{},
		services:    map[types.NamespacedName]service{},
		assignments: map[types.NamespacedName]*assignment{},
		groups:      map[groupKey]*group{},
	}
}

func (t *tracker) setNode(n *corev1.Node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	tracked := t.node(n.Name)
	if tracked.uid != n.UID || !maps.Equal(tracked.labels, n.Labels) {
		t.nodesEpoch++
	}
	tracked.uid, tracked.labels, tracked.bootID = n.UID, n.Labels, n.Status.NodeInfo.BootID
	tracked.ready = n.DeletionTimestamp.IsZero() && slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
	tracked.settle()
}

func (t *tracker) deleteNode(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	tracked := t.node(name)
	tracked.uid, tracked.labels, tracked.bootID, tracked.ready = "", nil, "", false
	tracked.settle()
	t.nodesEpoch++
	t.forget(tracked)
}

func (t *tracker) setState(s *v1alpha1.NodeProxyState) {
	r := &report{
		given: !reflect.ValueOf(s.Status).IsZero(),
		holds: marks{parseRevision(s.Status.AssignmentRevision), parseRevision(s.Status.EndpointSliceRevision)},
		modes: s.Status.Modes, bootID: s.Status.BootID,
	}
	for _, o := range s.OwnerReferences {
		if o.APIVersion == "v1" && o.Kind == "Node" {
			r.nodeUID = o.UID
		}
	}
	if ours(s) && s.Spec.ReportInterval != nil {
		r.interval = s.Spec.ReportInterval.Duration
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	tracked := t.node(s.Name)
	tracked.reported = r
	tracked.settle()
}

func (t *tracker) deleteState(name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	tracked := t.node(name)
	tracked.reported = nil
	tracked.settle()
	t.forget(tracked)
}

// node returns the tracked node of a name, a new one if need be.
func (t *tracker) node(name string) *trackedNode {
	if t.nodes[name] == nil {
		t.nodes[name] = &trackedNode{node: node{name: name}}
	}
	return t.nodes[name]
}

func (t *tracker) forget(n *trackedNode) {
	if n.uid == "" && n.reported == nil {
		delete(t.nodes, n.name)
	}
}

// settle takes over the report if it is about this Node in its present boot: what an earlier Node of that name held is gone with it, and a kernel
// that booted holds nothing until its agent reports again.
func (n *trackedNode) settle() {
	n.reports, n.holds, n.modes = false, marks{}, nil
	if r := n.reported; r != nil && r.given && (r.nodeUID == "" || r.nodeUID == n.uid) && (r.bootID == "" || n.bootID == "" || r.bootID == n.bootID) {
		n.reports, n.holds, n.modes = true, r.holds, r.modes
	}
}

// counts returns how many Nodes there are, and the longest interval that our NodeProxyStates ask for.
func (t *tracker) counts() (nodes int, interval time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, n := range t.nodes {
		if n.uid != "" {
			nodes++
		}
		if n.reported != nil {
			interval = max(interval, n.reported.interval)
		}
	}
	return nodes, interval
}

// nodeNames returns the names of all Nodes, sorted.
func (t *tracker) nodeNames() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var names []string
	for name, n := range t.nodes {
		if n.uid != "" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func (t *tracker) setSlice(s *discoveryv1.EndpointSlice) {
	t.mu.Lock()
	defer t.mu.Unlock()
	key, ok := serviceOf(s)
	if !ok {
		return
	}
	if t.services[key] == nil {
		t.services[key] = service{}
	}
	t.services[key][s.Name] = newEndpointSlice(s)
	t.endpointsChanged(key)
}

func (t *tracker) deleteSlice(s *discoveryv1.EndpointSlice) {
	t.mu.Lock()
	defer t.mu.Unlock()
	key, ok := serviceOf(s)
	if !ok {
		return
	}
	delete(t.services[key], s.Name)
	if len(t.services[key]) == 0 {
		delete(t.services, key)
	}
	t.endpointsChanged(key)
}

func serviceOf(s *discoveryv1.EndpointSlice) (types.NamespacedName, bool) {
	name := s.Labels[discoveryv1.LabelServiceName]
	return types.NamespacedName{Namespace: s.Namespace, Name: name}, name != ""
}

func (t *tracker) endpointsChanged(key types.NamespacedName) {
	if a := t.assignments[key]; a != nil && a.isPending() {
		a.serve(t.services[key])
	}
}

// serve keeps the target for slices while one of the endpoints for whose sake it was chosen is still ready for each port, and
// else moves it to the present revision: a node that holds the older one would send traffic to nobody.
func (a *assignment) serve(s service) {
	now := s.observe(a.ports)
	if !a.served.stillServes(now) {
		a.served = now
	}
	// Because a slice may have been deleted since then, and an agent that started later never sees its revision, no more
	// is asked than the newest slice that there is.
	a.target = target{marks: marks{a.revision, older(a.served.revision, now.revision)}, lacking: now.lacking}
}

// setAssignment takes over an assignment at time now; fresh says that its last change happened then, and not some time before
// this process began to look. It reports whether a status that was decided before must be written again because the API
// server holds another.
func (t *tracker) setAssignment(o *v1alpha1.ServiceAssignment, now time.Time, fresh bool) (rewrite bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	key := types.NamespacedName{Namespace: o.Namespace, Name: o.Name}
	held := storedOf(o)
	if a := t.assignments[key]; a != nil && a.uid == o.UID && a.generation == o.Generation {
		if !held.revision.reached(a.stored.revision) {
			return false // an event from before our last write
		}
		a.stored = held
		return a.want != (verdict{}) && !a.isStored()
	}
	t.drop(key)
	a := &assignment{key: key, uid: o.UID, generation: o.Generation, ports: o.Spec.Ports, place: -1, revision: held.revision, stored: held}
	if fresh {
		a.since = now
	}
	var selector labels.Selector
	a.groupKey, selector = groupOf(&o.Spec)
	t.assignments[key] = a
	g := t.groups[a.groupKey]
	if g == nil {
		g = &group{selector: selector, epoch: -1}
		t.groups[a.groupKey] = g
	}
	g.members++
	if held.generation == o.Generation && held.verdict.reason == ReasonProgrammed {
		a.want = held.verdict // latched, by an earlier life of the controller
		return false
	}
	a.reasonAt = now.Add(settle)
	a.lookAfter = a.reasonAt
	a.refresh = firstRefresh
	a.place = len(g.pending)
	g.pending = append(g.pending, a)
	t.pending++
	a.serve(t.services[key])
	return false
}

func (t *tracker) deleteAssignment(key types.NamespacedName) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.drop(key)
}

func (t *tracker) drop(key types.NamespacedName) {
	a := t.assignments[key]
	if a == nil {
		return
	}
	delete(t.assignments, key)
	t.settled(a)
	g := t.groups[a.groupKey]
	if g.members--; g.members == 0 {
		delete(t.groups, a.groupKey)
	}
}

func (a *assignment) isPending() bool { return a.place >= 0 }

// settled takes an assignment out of those that are looked at.
func (t *tracker) settled(a *assignment) {
	if !a.isPending() {
		return
	}
	g := t.groups[a.groupKey]
	last := len(g.pending) - 1
	g.pending[a.place] = g.pending[last]
	g.pending[a.place].place = a.place
	g.pending[last] = nil
	g.pending = g.pending[:last]
	a.place = -1
	t.pending--
}

// groupOf returns an assignment's group. A selector that cannot be parsed selects no node, and its name tells so.
func groupOf(spec *v1alpha1.ServiceAssignmentSpec) (groupKey, labels.Selector) {
	selector, err := metav1.LabelSelectorAsSelector(&spec.NodeSelector)
	if err != nil {
		return groupKey{"(invalid: " + err.Error() + ")", spec.ProxyMode}, labels.Nothing()
	}
	return groupKey{selector.String(), spec.ProxyMode}, selector
}

func storedOf(o *v1alpha1.ServiceAssignment) stored {
	s := stored{revision: parseRevision(o.ResourceVersion)}
	c := meta.FindStatusCondition(o.Status.Conditions, v1alpha1.AssignmentProgrammed)
	if c == nil {
		return s
	}
	s.generation, s.transition = c.ObservedGeneration, c.LastTransitionTime
	s.verdict = verdict{reason: c.Reason, message: c.Message, desired: o.Status.Nodes.Desired, programmed: o.Status.Nodes.Programmed}
	if c.Status != s.verdict.status() {
		s.verdict = verdict{} // not written by us, or not whole
	}
	return s
}

func (a *assignment) isStored() bool {
	return a.stored.verdict == a.want && a.stored.generation == a.generation
}

// waiting returns how many assignments are pending and how many are latched.
func (t *tracker) waiting() (pending, latched int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.pending, len(t.assignments) - t.pending
}

// evaluate decides about every pending assignment at time now. It returns those whose status must be written, sorted, and when
// to call again even if nothing happens (zero: never). It costs O(nodes) per group that has pending assignments plus O(1) for
// each of these; O(nodes) more for each False that it decides. Latched assignments cost nothing.
func (t *tracker) evaluate(now time.Time) (due []types.NamespacedName, next time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	falses := 0
	for key, g := range t.groups {
		if len(g.pending) == 0 {
			continue
		}
		t.selectNodes(g)
		covered := survey(g.nodes, key.mode)
		for _, a := range slices.Backward(g.pending) { // because those that are latched leave it meanwhile
			if reason := covered.reason(a.target); reason != ReasonProgrammed {
				if at := a.dueAt(reason, covered.hold(a.target)); now.Before(at) || falses == falsesPerEvaluation {
					next = earlier(next, at)
					continue
				}
				falses++
			}
			t.decide(a, evaluate(selection{key.selector, key.mode, g.nodes}, covered, a.target), now)
			if a.isPending() {
				next = earlier(next, a.lookAfter)
			}
			if !a.isStored() {
				due = append(due, a.key)
			}
		}
	}
	slices.SortFunc(due, func(a, b types.NamespacedName) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	return due, next
}

// dueAt is when a False with this reason may be decided. That by now every node holds what has no endpoints is as good as another reason: load-balancer addresses are shown then,
// and kube-proxy lets go.
func (a *assignment) dueAt(reason string, held bool) time.Time {
	if reason == a.want.reason && !(held && a.want.programmed < a.want.desired) {
		return a.lookAfter
	}
	return a.reasonAt
}

// decide takes a verdict over and latches True.
func (t *tracker) decide(a *assignment, v verdict, now time.Time) {
	if v.reason == ReasonProgrammed {
		t.settled(a)
		a.served = readiness{} // of no use any more
	}
	if v.reason != a.want.reason {
		a.refresh = firstRefresh
	}
	a.want = v
	a.reasonAt = now.Add(settle)
	a.lookAfter = now.Add(a.refresh)
	a.refresh = min(2*a.refresh, lastRefresh)
}

func (t *tracker) selectNodes(g *group) {
	if g.epoch == t.nodesEpoch {
		return
	}
	g.nodes, g.epoch = g.nodes[:0], t.nodesEpoch
	for _, n := range t.nodes {
		if n.uid != "" && g.selector.Matches(n.labels) {
			g.nodes = append(g.nodes, &n.node)
		}
	}
	slices.SortFunc(g.nodes, func(a, b *node) int { return strings.Compare(a.name, b.name) })
}

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || b.Before(a) {
		return b
	}
	return a
}

// toWrite returns the status that key should have; ok is false if the API server holds it already.
func (t *tracker) toWrite(key types.NamespacedName) (w statusWrite, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := t.assignments[key]
	if a == nil || a.want == (verdict{}) || a.isStored() {
		return statusWrite{}, false
	}
	w = statusWrite{key: key, uid: a.uid, generation: a.generation, verdict: a.want, since: a.since}
	if a.stored.verdict != (verdict{}) && a.stored.verdict.status() == a.want.status() {
		w.transition = a.stored.transition
	}
	return w, true
}

// wrote records that the API server holds w, as of revision.
func (t *tracker) wrote(w statusWrite, r revision) {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := t.assignments[w.key]
	if a == nil || a.uid != w.uid || !r.reached(a.stored.revision) {
		return
	}
	a.stored = stored{revision: r, generation: w.generation, verdict: w.verdict, transition: w.transition}
	if w.verdict.reason == ReasonProgrammed && w.generation == a.generation {
		a.since = time.Time{} // measured; a status that must be restored later is no new measurement
	}
}
