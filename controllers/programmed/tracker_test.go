package programmed

import (
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strconv"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
	"pgregory.net/rapid"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// world is a tracker and an API server of which it is told everything at once.
type world struct {
	*tracker
	now      time.Time
	revision int
	writes   []string // "key: reason", in order
	objects  map[types.NamespacedName]*v1alpha1.ServiceAssignment
}

func newWorld() *world {
	return &world{tracker: newTracker(), now: time.Unix(1000, 0), revision: 100, objects: map[types.NamespacedName]*v1alpha1.ServiceAssignment{}}
}

func (w *world) next() string {
	w.revision++
	return strconv.Itoa(w.revision)
}

func (w *world) addNode(name string, ready bool, labels map[string]string) {
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	w.setNode(&corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name), Labels: labels},
		Status:     corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}}},
	})
}

// report lets the agent of a node report marks, by default all that there is.
func (w *world) report(name string, at ...int) {
	at = append(at, w.revision, w.revision)
	w.setState(&v1alpha1.NodeProxyState{
		ObjectMeta: metav1.ObjectMeta{Name: name, OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: name, UID: types.UID("uid-" + name)}}},
		Status: v1alpha1.NodeProxyStateStatus{
			AgentVersion: "test", AssignmentRevision: strconv.Itoa(at[0]), EndpointSliceRevision: strconv.Itoa(at[1]),
		},
	})
}

// slice sets the one EndpointSlice of a Service.
func (w *world) slice(service string, ready ...string) {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: service + "-abc", ResourceVersion: w.next(),
			Labels: map[string]string{discoveryv1.LabelServiceName: service},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: ptr.To("http"), Port: ptr.To[int32](8080)}},
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{"10.244.9.9"}, Conditions: discoveryv1.EndpointConditions{Ready: ptr.To(false)}}},
	}
	for _, a := range ready {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}})
	}
	w.setSlice(s)
}

func key(name string) types.NamespacedName {
	return types.NamespacedName{Namespace: "default", Name: name}
}

// assign creates an assignment, or gives it another generation.
func (w *world) assign(name string, change ...func(*v1alpha1.ServiceAssignmentSpec)) {
	o := w.objects[key(name)]
	if o == nil {
		o = &v1alpha1.ServiceAssignment{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("uid-" + w.next())},
			Spec: v1alpha1.ServiceAssignmentSpec{
				ProxyMode: v1alpha1.ProxyModeNFTables,
				Ports:     []v1alpha1.AssignmentPort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}},
			},
		}
	}
	o = o.DeepCopy()
	o.Generation++
	for _, f := range change {
		f(&o.Spec)
	}
	w.store(o)
}

func (w *world) store(o *v1alpha1.ServiceAssignment) {
	o.ResourceVersion = w.next()
	w.objects[key(o.Name)] = o
	if w.setAssignment(o, w.now, true) {
		w.apply(key(o.Name))
	}
}

func (w *world) unassign(name string) {
	delete(w.objects, key(name))
	w.deleteAssignment(key(name))
}

// step lets time pass and evaluates; what is due is written and comes back as an event.
func (w *world) step(d time.Duration) {
	w.now = w.now.Add(d)
	due, _ := w.evaluate(w.now)
	for _, k := range due {
		w.apply(k)
	}
}

func (w *world) apply(k types.NamespacedName) {
	s, ok := w.toWrite(k)
	o := w.objects[k]
	if !ok || o == nil || o.UID != s.uid {
		return
	}
	o = o.DeepCopy()
	s.transition = metav1.NewTime(w.now)
	o.Status = v1alpha1.ServiceAssignmentStatus{
		ObservedGeneration: s.generation,
		Nodes:              v1alpha1.AssignmentNodesStatus{Desired: s.verdict.desired, Programmed: s.verdict.programmed},
		Conditions: []metav1.Condition{{
			Type: v1alpha1.AssignmentProgrammed, Status: s.verdict.status(), Reason: s.verdict.reason, Message: s.verdict.message,
			ObservedGeneration: s.generation, LastTransitionTime: s.transition,
		}},
	}
	w.writes = append(w.writes, k.Name+": "+s.verdict.reason)
	r := w.next()
	w.wrote(s, revision(r))
	o.ResourceVersion = r
	w.objects[k] = o
	w.setAssignment(o, w.now, true)
}

// restart is another controller that finds the same cluster.
func (w *world) restart(nodes, services func(*world)) *world {
	again := newWorld()
	again.now, again.revision, again.objects = w.now, w.revision, w.objects
	nodes(again)
	services(again)
	for _, o := range w.objects {
		again.setAssignment(o, again.now, false)
	}
	return again
}

func (w *world) expect(t *testing.T, writes ...string) {
	t.Helper()
	if !slices.Equal(w.writes, writes) {
		t.Errorf("written: %q, want %q", w.writes, writes)
	}
	w.writes = nil
}

const soon = 2 * settle

func TestProgrammedIsWrittenOnceWhenAllHoldIt(t *testing.T) {
	w := newWorld()
	w.addNode("a", true, nil)
	w.addNode("b", true, nil)
	w.slice("web", "10.244.1.2")
	w.assign("web")
	w.report("a")
	w.step(0)
	w.expect(t) // too early for a False
	w.report("b")
	w.step(0)
	w.expect(t, "web: Programmed")
	w.step(time.Hour)
	w.expect(t)
	if pending, latched := w.waiting(); pending != 0 || latched != 1 {
		t.Errorf("%d pending, %d latched", pending, latched)
	}
}

func TestAgentHeldBack(t *testing.T) {
	w := newWorld()
	w.addNode("a", true, nil)
	w.addNode("b", true, nil)
	w.slice("web", "10.244.1.2")
	w.report("b")
	before := w.revision
	w.assign("web")
	w.report("a")
	w.step(soon)
	w.expect(t, "web: WaitingForNodes")
	w.report("b", before, w.revision)
	w.step(soon)
	w.expect(t)
	w.step(firstRefresh) // looked at again, but there is nothing new to say
	w.expect(t)
	w.report("b", w.revision, before)
	w.step(soon)
	w.expect(t, "web: Programmed")
}

func TestEachGenerationIsProgrammedAnew(t *testing.T) {
	w := newWorld()
	w.addNode("a", true, nil)
	w.slice("web", "10.244.1.2")
	w.assign("web")
	w.report("a")
	w.step(0)
	w.expect(t, "web: Programmed")
	w.assign("web")
	w.step(soon)
	w.expect(t, "web: WaitingForNodes")
	w.report("a")
	w.step(soon)
	w.expect(t, "web: Programmed")
	w.unassign("web")
	w.assign("web") // the same name and generation 1, another UID
	w.step(soon)
	w.expect(t, "web: WaitingForNodes")
}

func TestLatchedThroughChurn(t *testing.T) {
	w := newWorld()
	w.addNode("a", true, nil)
	w.slice("web", "10.244.1.2")
	w.assign("web")
	w.report("a")
	w.step(0)
	w.expect(t, "web: Programmed")
	w.addNode("new", true, nil)
	w.step(soon)
	w.slice("web", "10.244.1.3")
	w.step(soon)
	w.slice("web")
	w.step(soon)
	w.report("a", 1, 1)
	w.step(soon)
	w.addNode("a", false, nil)
	w.deleteNode("new")
	w.step(soon)
	w.expect(t)
}

func TestEndpointsBecomeReadyLater(t *testing.T) {
	w := newWorld()
	w.addNode("a", true, nil)
	w.assign("web")
	w.report("a")
	w.step(soon)
	w.expect(t, "web: NoReadyEndpoints")
	w.slice("web") // not ready yet
	w.report("a")
	w.step(soon)
	w.expect(t)
	w.slice("web", "10.244.1.2")
	w.step(soon)
	w.expect(t, "web: WaitingForNodes")
	w.report("a")
	w.step(0)
	w.expect(t, "web: Programmed")
}

// Who waits for every node to refuse the connections of a Service without endpoints is not kept waiting for the next look at it.
func TestNodeThatIsLateWithAServiceWithoutEndpoints(t *testing.T) {
	w := newWorld()
	w.addNode("a", true, nil)
	w.addNode("b", true, nil)
	w.assign("web")
	w.report("a")
	w.step(soon)
	w.expect(t, "web: NoReadyEndpoints")
	w.step(firstRefresh) // 1 of 2 nodes still
	w.expect(t)
	w.report("b")
	w.step(settle)
	w.expect(t, "web: NoReadyEndpoints")
	if n := w.objects[key("web")].Status.Nodes; n.Programmed != 2 {
		t.Errorf("%d of %d nodes", n.Programmed, n.Desired)
	}
	w.addNode("c", true, nil)
	w.step(soon)
	w.expect(t) // that one is late is no news for as long
}

func TestEachPortNeedsAnEndpoint(t *testing.T) {
	w := newWorld()
	w.addNode("a", true, nil)
	w.slice("web", "10.244.1.2")
	w.assign("web", func(s *v1alpha1.ServiceAssignmentSpec) {
		s.Ports = append(s.Ports, v1alpha1.AssignmentPort{Name: "metrics", Protocol: corev1.ProtocolTCP, Port: 81})
	})
	w.report("a")
	w.step(soon)
	w.expect(t, "web: NoReadyEndpoints")
	if m := w.objects[key("web")].Status.Conditions[0].Message; m != "No endpoint is ready for port TCP metrics; 1 of 1 nodes hold this generation" {
		t.Error(m)
	}
}

func TestTargetMovesOnlyWhenItsEndpointsAreGone(t *testing.T) {
	w := newWorld()
	w.addNode("a", true, nil)
	w.slice("web", "10.244.1.2")
	first := w.revision
	w.assign("web")
	assigned := w.revision
	w.slice("web", "10.244.1.2", "10.244.1.3") // 1.2 still answers
	w.report("a", assigned, first)
	w.step(0)
	w.expect(t, "web: Programmed")

	w.assign("web")
	assigned = w.revision
	second := w.revision - 1
	w.slice("web", "10.244.1.4") // whoever holds the second revision sends traffic to pods that are gone
	w.report("a", assigned, second)
	w.step(soon)
	w.expect(t, "web: WaitingForNodes")
	w.report("a", assigned, w.revision)
	w.step(soon)
	w.expect(t, "web: Programmed")
}

// An agent that starts after the newest slice was deleted never sees its revision.
func TestDeletedSliceDoesNotBlock(t *testing.T) {
	w := newWorld()
	w.addNode("a", true, nil)
	w.slice("web", "10.244.1.2")
	held := w.revision
	gone := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{
		Namespace: "default", Name: "web-2", ResourceVersion: w.next(), Labels: map[string]string{discoveryv1.LabelServiceName: "web"},
	}}
	w.setSlice(gone)
	w.assign("web")
	w.report("a", w.revision, held)
	w.step(soon)
	w.expect(t, "web: WaitingForNodes")
	w.deleteSlice(gone)
	w.step(0)
	w.expect(t, "web: Programmed")
}

func TestDeadAndUnselectedNodesDoNotBlock(t *testing.T) {
	w := newWorld()
	ssd := map[string]string{"disk": "ssd"}
	w.addNode("a", true, ssd)
	w.addNode("dead", false, ssd)
	w.addNode("other", true, nil)
	w.slice("web", "10.244.1.2")
	onSSD := func(s *v1alpha1.ServiceAssignmentSpec) { s.NodeSelector.MatchLabels = ssd }
	w.assign("web", onSSD)
	w.report("a")
	w.step(0)
	w.expect(t, "web: Programmed")

	w.addNode("dead", true, ssd)
	w.assign("web")
	w.report("a")
	w.step(soon)
	w.expect(t, "web: WaitingForNodes")
	w.addNode("dead", true, nil) // no longer selected
	w.step(0)
	w.expect(t, "web: Programmed")
}

func TestSelectorThatNoNodeMatches(t *testing.T) {
	w := newWorld()
	w.addNode("a", true, nil)
	w.slice("web", "10.244.1.2")
	w.assign("web", func(s *v1alpha1.ServiceAssignmentSpec) {
		s.NodeSelector.MatchExpressions = []metav1.LabelSelectorRequirement{{Key: "x", Operator: "Near"}}
	})
	w.report("a")
	w.step(soon)
	w.expect(t, "web: NoNodes")
}

func TestRecreatedNodeHoldsNothing(t *testing.T) {
	w := newWorld()
	w.addNode("a", true, nil)
	w.slice("web", "10.244.1.2")
	w.assign("web")
	w.deleteNode("a")
	w.report("a", w.revision+1000, w.revision+1000) // owned by uid-a
	w.setNode(&corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "a", UID: "another"},
		Status:     corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}},
	})
	w.step(soon)
	w.expect(t, "web: WaitingForNodes")
}

func TestRebootedNodeHoldsNothing(t *testing.T) {
	w := newWorld()
	w.addNode("b", true, nil)
	boots := func(id string) {
		w.setNode(&corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: "a", UID: "uid-a"},
			Status: corev1.NodeStatus{
				NodeInfo:   corev1.NodeSystemInfo{BootID: id},
				Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
			},
		})
	}
	reports := func(id string) {
		w.setState(&v1alpha1.NodeProxyState{ObjectMeta: metav1.ObjectMeta{Name: "a"}, Status: v1alpha1.NodeProxyStateStatus{
			BootID: id, AssignmentRevision: strconv.Itoa(w.revision), EndpointSliceRevision: strconv.Itoa(w.revision),
		}})
	}
	boots("first")
	w.slice("web", "10.244.1.2")
	w.assign("web")
	reports("first")
	boots("second") // before the other node catches up
	w.report("b")
	w.step(soon)
	w.expect(t, "web: WaitingForNodes")
	reports("second")
	w.step(soon)
	w.expect(t, "web: Programmed")
}

func TestStatusThatSomeoneElseChangedIsRestored(t *testing.T) {
	w := newWorld()
	w.addNode("a", true, nil)
	w.slice("web", "10.244.1.2")
	w.assign("web")
	w.report("a")
	w.step(0)
	w.expect(t, "web: Programmed")
	o := w.objects[key("web")].DeepCopy()
	o.Status = v1alpha1.ServiceAssignmentStatus{}
	w.store(o)
	w.expect(t, "web: Programmed")
}

func TestEventsFromBeforeTheLastWriteAreIgnored(t *testing.T) {
	w := newWorld()
	w.addNode("a", true, nil)
	w.slice("web", "10.244.1.2")
	w.assign("web")
	late := w.objects[key("web")]
	w.report("a")
	w.step(0)
	if w.setAssignment(late, w.now, true) {
		t.Error("asks for the status to be written again")
	}
}

func TestRestart(t *testing.T) {
	nodes := func(w *world) {
		w.addNode("a", true, nil)
		w.addNode("b", true, nil)
	}
	slices := func(w *world) {
		w.slice("latched", "10.244.1.2")
		w.slice("pending", "10.244.1.2")
	}
	w := newWorld()
	nodes(w)
	slices(w)
	w.assign("latched")
	w.report("a")
	w.report("b")
	w.step(0)
	w.assign("pending")
	w.report("a")
	w.step(soon)
	w.expect(t, "latched: Programmed", "pending: WaitingForNodes")

	again := w.restart(nodes, slices) // all agents are behind this controller's slices
	again.step(soon)
	again.expect(t, "pending: WaitingForNodes") // it names other nodes now
	if pending, latched := again.waiting(); pending != 1 || latched != 1 {
		t.Errorf("%d pending, %d latched", pending, latched)
	}
	again.report("a")
	again.report("b")
	again.step(0)
	again.expect(t, "pending: Programmed")
}

func TestFalseIsRefreshedEverMoreRarely(t *testing.T) {
	w := newWorld()
	w.slice("web", "10.244.1.2")
	w.assign("web")
	w.addNode("n0", true, nil)
	for i := range 720 { // the worst case: every five seconds another number of nodes to tell
		w.addNode(fmt.Sprintf("n%d", i+1), true, nil)
		w.step(5 * time.Second)
	}
	if n := len(w.writes); n > 18 {
		t.Errorf("%d writes in an hour of waiting", n)
	}
}

// True is latched as soon as all that counts holds the target and never before, whatever happens in whatever order.
func TestLatchedExactlyWhenHeld(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		type agent struct{ assignments, slices int }
		ready, agents := map[string]bool{}, map[string]agent{}
		names := []string{"a", "b", "c"}
		node := rapid.SampledFrom(names)
		endpoints, generation := 0, 0
		newest, firstServed := 0, 0 // revision of the slices: now, and when this generation's endpoints were first ready
		assigned := 0               // revision of the assignment's present generation
		latched := false
		t.Repeat(map[string]func(*rapid.T){
			"node": func(t *rapid.T) {
				n := node.Draw(t, "node")
				ready[n] = rapid.Bool().Draw(t, "ready")
				w.addNode(n, ready[n], nil)
			},
			"node gone": func(t *rapid.T) {
				n := node.Draw(t, "node")
				delete(ready, n)
				w.deleteNode(n)
			},
			"report": func(t *rapid.T) {
				n := node.Draw(t, "node")
				agents[n] = agent{w.revision - rapid.IntRange(0, 6).Draw(t, "a"), w.revision - rapid.IntRange(0, 6).Draw(t, "s")}
				w.report(n, agents[n].assignments, agents[n].slices)
			},
			"agent gone": func(t *rapid.T) {
				n := node.Draw(t, "node")
				delete(agents, n)
				w.deleteState(n)
			},
			"endpoints": func(t *rapid.T) {
				n := rapid.IntRange(0, 2).Draw(t, "endpoints")
				w.slice("web", []string{"10.244.1.2", "10.244.2.2"}[:n]...)
				newest = w.revision
				if n > 0 && endpoints == 0 {
					firstServed = newest
				}
				endpoints = n
			},
			"generation": func(t *rapid.T) {
				w.assign("web")
				generation++
				assigned, firstServed, latched = w.revision, newest, false
			},
			"": func(t *rapid.T) {
				w.writes = nil
				w.step(soon)
				counting, holding := 0, 0
				for n, ok := range maps.All(ready) {
					if !ok {
						continue
					}
					counting++
					if a, ok := agents[n]; ok && a.assignments >= assigned && a.slices >= firstServed {
						holding++
					}
				}
				due := generation > 0 && counting > 0 && counting == holding && endpoints > 0
				wrote := slices.Contains(w.writes, "web: Programmed")
				if wrote != (due && !latched) {
					t.Fatalf("latched: %v, with %d of %d nodes and %d endpoints (latched before: %v)", wrote, holding, counting, endpoints, latched)
				}
				latched = latched || wrote
				if o := w.objects[key("web")]; latched && o.Status.Conditions[0].Status != metav1.ConditionTrue {
					t.Fatalf("no longer latched: %+v", o.Status)
				}
			},
		})
	})
}

// large is a world of nodes and assignments, of which the last few are pending.
func large(nodes, assignments, pending int) *world {
	w := newWorld()
	for i := range nodes {
		w.addNode(fmt.Sprintf("node-%05d", i), true, nil)
	}
	for i := range assignments {
		name := fmt.Sprintf("svc-%05d", i)
		w.slice(name, "10.244.1.2")
		if i == assignments-pending {
			for n := range nodes {
				w.report(fmt.Sprintf("node-%05d", n))
			}
			w.step(0)
		}
		w.assign(name)
	}
	if pending == 0 {
		for n := range nodes {
			w.report(fmt.Sprintf("node-%05d", n))
		}
	}
	w.step(0)
	return w
}

// One node's marks advance, and all pending assignments are looked at: what a report costs.
func BenchmarkReport(b *testing.B) {
	for _, nodes := range []int{50, 5000} {
		for _, pending := range []int{0, 10, 10000} {
			b.Run(fmt.Sprintf("nodes=%d/assignments=10000/pending=%d", nodes, pending), func(b *testing.B) {
				w := large(nodes, 10000, pending)
				if p, l := w.waiting(); p != pending || l != 10000-pending {
					b.Fatalf("%d pending, %d latched", p, l)
				}
				held := w.revision - 2*pending - 1
				b.ReportAllocs()
				for b.Loop() {
					w.report("node-00007", held, held)
					w.evaluate(w.now)
				}
			})
		}
	}
}

// The last node catches up, and 10 000 assignments become programmed at once.
func BenchmarkLatch(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		w := large(5000, 10000, 10000)
		for n := range 5000 {
			w.report(fmt.Sprintf("node-%05d", n))
		}
		b.StartTimer()
		if due, _ := w.evaluate(w.now); len(due) != 10000 {
			b.Fatalf("%d due", len(due))
		}
	}
}

// What the tracker itself keeps of 5 000 nodes and 10 000 Services with 10 endpoints each, the strings of their addresses included.
func BenchmarkMemory(b *testing.B) {
	for b.Loop() {
		before := heap()
		w := newWorld()
		for n := range 5000 {
			w.addNode(fmt.Sprintf("node-%05d", n), true, nil)
		}
		for i := range 10000 {
			var ready []string
			for e := range 10 {
				ready = append(ready, fmt.Sprintf("10.%d.%d.%d", i/256, i%256, e))
			}
			w.slice(fmt.Sprintf("svc-%05d", i), ready...)
			w.assign(fmt.Sprintf("svc-%05d", i))
		}
		pending := heap()
		for n := range 5000 {
			w.report(fmt.Sprintf("node-%05d", n))
		}
		w.evaluate(w.now)
		w.objects = nil
		b.ReportMetric(float64(pending-before)/1e6, "MB-pending")
		b.ReportMetric(float64(heap()-before)/1e6, "MB-latched")
		runtime.KeepAlive(w)
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
