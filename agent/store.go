package agent

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"

	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// Marks are the newest resourceVersions of each type: everything up to them has been received, or is in the kernel. They
// compare only within one type.
type Marks struct {
	Assignments, EndpointSlices string
}

// input is what one Service compiles from. Assignment is nil if there is none.
type input struct {
	service    types.NamespacedName
	assignment *compile.Assignment
	slices     []*compile.Slice
}

// batch is what changed since the one before.
type batch struct {
	inputs []input
	node   *compile.Node
	ground forwarding.Ground
	// marks cover everything in this batch and in all before it, and nothing more.
	marks Marks
	// triggers are when the changes of endpoints in this batch happened, as far as the API tells.
	triggers []time.Time
	// services and endpoints are how many events of either kind the batch folds into one.
	services, endpoints int
}

// store is what the agent knows of the cluster. Sources write to it, the run loop takes from it. Values in it are immutable.
type store struct {
	// wake has one pending signal while there may be something to take.
	wake chan struct{}
	// queued is when there last was something, in nanoseconds since 1970; 0 for never.
	queued  atomic.Int64
	started time.Time

	mu       sync.Mutex
	node     *compile.Node
	settings Settings
	ranges   []netip.Prefix // declared for this node
	// ground is the last that was handed out, nil before the first.
	ground      *forwarding.Ground
	assignments map[types.NamespacedName]*compile.Assignment
	slices      map[types.NamespacedName]*compile.Slice // by the slice's own name
	// byService lists the slices of a Service. A list is never changed in place: batches share it.
	byService map[types.NamespacedName][]*compile.Slice

	hasAssignments, hasSlices, hasState bool // the first list has arrived
	marks                               Marks
	dirty                               map[types.NamespacedName]struct{}
	triggers                            []time.Time
	changes                             struct{ services, endpoints int }
}

func newStore(settings Settings) *store {
	return &store{
		settings:    settings,
		wake:        make(chan struct{}, 1),
		started:     time.Now(),
		assignments: map[types.NamespacedName]*compile.Assignment{},
		slices:      map[types.NamespacedName]*compile.Slice{},
		byService:   map[types.NamespacedName][]*compile.Slice{},
		dirty:       map[types.NamespacedName]struct{}{},
	}
}

// take gives what changed since the last take, and false until every source has delivered its first list: a kernel programmed
// from half the cluster would refuse traffic that it served before.
func (s *store) take() (batch, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lacks() != "" {
		return batch{}, false
	}
	if s.groundKnown() {
		g := groundOf(s.settings, s.node, s.ranges)
		s.ground = &g
	}
	b := batch{node: s.node, ground: *s.ground, marks: s.marks, triggers: s.triggers, services: s.changes.services, endpoints: s.changes.endpoints}
	b.inputs = make([]input, 0, len(s.dirty))
	for name := range s.dirty {
		b.inputs = append(b.inputs, input{service: name, assignment: s.assignments[name], slices: s.byService[name]})
	}
	if len(s.dirty) > 256 {
		s.dirty = map[types.NamespacedName]struct{}{} // a map never shrinks
	} else {
		clear(s.dirty)
	}
	s.triggers, s.changes.services, s.changes.endpoints = nil, 0, 0
	return b, true
}

// lacks says what is still missing before the first take, "" if nothing. Callers hold mu.
func (s *store) lacks() string {
	switch {
	case !s.hasAssignments:
		return "the list of ServiceAssignments"
	case !s.hasSlices:
		return "the list of EndpointSlices"
	case !s.hasState:
		return "the list of NodeProxyStates" // it may well be empty: the controller makes this node's when it sees the Node
	case s.node == nil:
		return "this agent's own Node"
	case s.ground == nil && !s.groundKnown():
		return podRanges
	}
	return ""
}

// podRanges is what settings with NodeCIDR build on.
const podRanges = "spec.podCIDRs of this agent's own Node"

// groundKnown says whether all is there that the settings build on. Where it is not, what was in force goes on. Callers hold mu.
func (s *store) groundKnown() bool { return !s.settings.NodeCIDR || len(s.node.PodCIDRs) > 0 }

// pending gives how many changes wait to be taken, and what the sources still lack before the first take ("" if nothing).
func (s *store) pending() (services, endpoints int, lacks string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changes.services, s.changes.endpoints, s.lacks()
}

// configure replaces the settings, and says what they wait for if they cannot be in force yet.
func (s *store) configure(settings Settings) (waitFor string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settings = settings
	s.signal()
	if s.node != nil && !s.groundKnown() {
		return podRanges
	}
	return ""
}

// nodeLeaving says whether the node is being deleted.
func (s *store) nodeLeaving() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.node != nil && s.node.Leaving
}

func (s *store) signal() {
	s.queued.Store(time.Now().UnixNano())
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// lastQueued gives when the newest change was received that has to reach the kernel; the zero time if there was none.
func (s *store) lastQueued() time.Time {
	if at := s.queued.Load(); at != 0 {
		return time.Unix(0, at)
	}
	return time.Time{}
}

// advance moves a mark forward, never back: only a whole list may do that (a cluster that was restored from a backup).
func advance(mark *string, resourceVersion string) {
	if newer, err := resourceversion.CompareResourceVersion(resourceVersion, *mark); *mark == "" || (err == nil && newer > 0) {
		*mark = resourceVersion
	}
}

// maxTriggers bounds how many changes are remembered that wait for the kernel: a kernel that refuses for days must not fill the memory. Those beyond are not measured.
const maxTriggers = 1 << 16

func appendTriggers(list []time.Time, more ...time.Time) []time.Time {
	return append(list, more[:min(len(more), maxTriggers-len(list))]...)
}

// kindFeed is the store as the source of one kind of object sees it. Its pointers are to what the store keeps for that kind.
type kindFeed[T any] struct {
	*store
	known  map[types.NamespacedName]*T
	mark   *string
	listed *bool
	// set stores an object, or forgets it if the value is nil, and says whether that changed anything.
	set func(types.NamespacedName, *T) bool
}

func (s *store) assignmentFeed() *kindFeed[compile.Assignment] {
	return &kindFeed[compile.Assignment]{s, s.assignments, &s.marks.Assignments, &s.hasAssignments, s.setAssignment}
}

func (s *store) sliceFeed() *kindFeed[compile.Slice] {
	return &kindFeed[compile.Slice]{s, s.slices, &s.marks.EndpointSlices, &s.hasSlices, s.setSlice}
}

func (f *kindFeed[T]) put(o *object[T]) {
	f.mu.Lock()
	defer f.mu.Unlock()
	// What happened before this agent started was not slow to be programmed because of it.
	if f.set(o.name, o.value) && o.trigger.After(f.started) {
		f.triggers = appendTriggers(f.triggers, o.trigger)
	}
	advance(f.mark, o.resourceVersion)
	f.signal()
}

func (f *kindFeed[T]) remove(name types.NamespacedName, resourceVersion string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.set(name, nil)
	advance(f.mark, resourceVersion)
	f.signal()
}

func (f *kindFeed[T]) replace(list []*object[T], resourceVersion string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	gone := maps.Clone(f.known)
	for _, o := range list {
		delete(gone, o.name)
		f.set(o.name, o.value)
	}
	for name := range gone {
		f.set(name, nil)
	}
	*f.listed, *f.mark = true, resourceVersion
	f.signal()
}

// The mark of a bookmark waits for the next change: it says nothing that the controller waits for, and if it woke the loop, every
// node would write its state once a minute in a cluster where nothing happens.
func (f *kindFeed[T]) bookmark(resourceVersion string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	advance(f.mark, resourceVersion)
}

// setAssignment is set of ServiceAssignments. Their status changes without their generation: that is no change here.
func (s *store) setAssignment(name types.NamespacedName, a *compile.Assignment) bool {
	old := s.assignments[name]
	if a == nil {
		if old == nil {
			return false
		}
		delete(s.assignments, name)
	} else {
		if old != nil && old.UID == a.UID && old.Generation == a.Generation && a.Generation != 0 {
			return false
		}
		s.assignments[name] = a
	}
	s.dirty[name] = struct{}{}
	s.changes.services++
	return true
}

// setSlice is set of EndpointSlices.
func (s *store) setSlice(name types.NamespacedName, sl *compile.Slice) bool {
	old := s.slices[name]
	if old == sl || (old != nil && sl != nil && old.Equal(sl)) {
		return false
	}
	if old != nil {
		s.relist(types.NamespacedName{Namespace: name.Namespace, Name: old.Service}, old, nil)
	}
	if sl == nil {
		delete(s.slices, name)
	} else {
		s.slices[name] = sl
		s.relist(types.NamespacedName{Namespace: name.Namespace, Name: sl.Service}, nil, sl)
	}
	s.changes.endpoints++
	return true
}

// relist replaces one slice of a service by another; either may be nil.
func (s *store) relist(service types.NamespacedName, old, sl *compile.Slice) {
	was := s.byService[service]
	list := make([]*compile.Slice, 0, len(was)+1)
	for _, x := range was {
		if x != old {
			list = append(list, x)
		}
	}
	if sl != nil {
		list = append(list, sl)
	}
	if len(list) == 0 {
		delete(s.byService, service)
	} else {
		s.byService[service] = slices.Clip(list)
	}
	s.dirty[service] = struct{}{}
}

// nodeFeed is the store as the source of the agent's own Node sees it.
type nodeFeed struct{ *store }

func (s nodeFeed) put(o *object[compile.Node]) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.node
	s.node = o.value
	if old != nil && len(s.node.PodCIDRs) == 0 && len(old.PodCIDRs) > 0 {
		// A Node that was made anew has none for a while, and its pods are where they were.
		node := *s.node
		node.PodCIDRs, s.node = old.PodCIDRs, &node
	}
	if old == nil {
		s.signal()
		return
	}
	if !slices.Equal(old.PodCIDRs, s.node.PodCIDRs) {
		s.signal()
	}
	if old.SameForwarding(s.node) {
		return
	}
	for name := range s.assignments {
		s.dirty[name] = struct{}{}
	}
	s.signal()
}

// remove keeps the node as it was last: a Node object that is gone is no reason to change what the kernel forwards.
func (s nodeFeed) remove(types.NamespacedName, string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.node != nil {
		gone := *s.node
		gone.Leaving = true
		s.node = &gone
	}
}

func (s nodeFeed) replace(list []*object[compile.Node], resourceVersion string) {
	if len(list) == 0 {
		s.remove(types.NamespacedName{}, resourceVersion)
		return
	}
	s.put(list[0])
}

func (s nodeFeed) bookmark(string) {}

// stateFeed is the store and the reporter as the source of the node's own NodeProxyState sees them.
type stateFeed struct {
	store    *store
	reporter *reporter
}

func (f stateFeed) put(o *object[nodeState]) {
	f.reporter.found(o.value)
	f.store.declare(o.value.ranges)
}

// remove keeps the ranges: the controller makes the object anew, and what it declared holds until it says otherwise.
func (f stateFeed) remove(types.NamespacedName, string) { f.reporter.lost() }

func (f stateFeed) replace(list []*object[nodeState], resourceVersion string) {
	if len(list) == 0 {
		f.remove(types.NamespacedName{}, resourceVersion)
	} else {
		f.put(list[0])
	}
	f.store.mu.Lock()
	defer f.store.mu.Unlock()
	f.store.hasState = true
	f.store.signal()
}

func (f stateFeed) bookmark(string) {}

// declare says which ranges are declared for this node.
func (s *store) declare(ranges []netip.Prefix) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Equal(s.ranges, ranges) {
		s.ranges = ranges
		s.signal()
	}
}
