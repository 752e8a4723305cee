package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"
	"github.com/go-logr/logr/funcr"
	dto "github.com/prometheus/client_model/go"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

const thisNode = "node1"

// rig is an agent without an API server: what sources would deliver is put in by hand, through the very stores that reflectors use.
type rig struct {
	t        testing.TB
	store    *store
	loop     *loop
	modes    []*fakeMode
	reporter *reporter

	assignments, slices, nodes, states interface {
		Add(any) error
		Delete(any) error
		Replace([]any, string) error
		Bookmark(string) error
	}

	mu      sync.Mutex
	reports []Report
	logged  []string
	changed []forwarding.Change
	checks  map[types.NamespacedName]compile.HealthCheck
	version int // the last resourceVersion
}

func newRig(t testing.TB, names ...v1alpha1.ProxyMode) *rig {
	r := &rig{t: t, store: newStore(Settings{}), version: 100, checks: map[types.NamespacedName]compile.HealthCheck{}}
	log := funcr.New(func(_, line string) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.logged = append(r.logged, line)
	}, funcr.Options{})
	var table []Mode
	for _, name := range names {
		m := newFakeMode(name)
		r.modes = append(r.modes, m)
		table = append(table, m.mode())
	}
	r.reporter = newReporter(log, "test", nil) // never run: nothing is written
	for _, source := range new(clients).sources(log, thisNode, r.store, r.reporter) {
		switch source.resource {
		case "serviceassignments":
			r.assignments = source.store.(*reflectorStore[compile.Assignment])
		case "endpointslices":
			r.slices = source.store.(*reflectorStore[compile.Slice])
		case "nodes":
			r.nodes = source.store.(*reflectorStore[compile.Node])
		case "nodeproxystates":
			r.states = source.store.(*reflectorStore[nodeState])
		}
	}
	m := newMetrics(r.store, "test")
	r.loop = newLoop(log, r.store, table, m, newHealth(r.store, m), listeners{r.noteChange, r.noteCheck, func(report Report) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.reports = append(r.reports, report)
	}})
	return r
}

// noteChange keeps what the kernel is said to have changed.
func (r *rig) noteChange(prev, next *forwarding.Service) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changed = append(r.changed, forwarding.Change{Prev: prev, Next: next})
}

// noteCheck keeps the health check that a Service is said to have.
func (r *rig) noteCheck(service types.NamespacedName, check compile.HealthCheck) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.checks[service] = check
}

func (r *rig) check(service string) compile.HealthCheck {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.checks[types.NamespacedName{Namespace: "shop", Name: service}]
}

func (r *rig) changes() []forwarding.Change {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.changed)
}

// run starts the loop and gives the function that stops it.
func (r *rig) run() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- r.loop.run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("the loop ended with %v", err)
		}
	}
}

func (r *rig) report() Report {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.reports) == 0 {
		return Report{}
	}
	return r.reports[len(r.reports)-1]
}

func (r *rig) logs(what string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, line := range r.logged {
		if strings.Contains(line, what) {
			n++
		}
	}
	return n
}

func (r *rig) next() string {
	r.version++
	return strconv.Itoa(r.version)
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// sync delivers the first lists: the node and everything given.
func (r *rig) sync(objects ...any) {
	r.t.Helper()
	var assignments, slices []any
	for _, o := range objects {
		switch o.(type) {
		case *v1alpha1.ServiceAssignment:
			assignments = append(assignments, o)
		case *discoveryv1.EndpointSlice:
			slices = append(slices, o)
		}
	}
	r.must(r.nodes.Replace([]any{newNode("a")}, r.next()))
	r.must(r.assignments.Replace(assignments, r.next()))
	r.must(r.slices.Replace(slices, r.next()))
	r.must(r.states.Replace(nil, "1")) // the controller makes this node's later
}

// put delivers an added or changed object with a new resourceVersion, which it gives.
func (r *rig) put(o metav1.Object) string {
	r.t.Helper()
	o.SetResourceVersion(r.next())
	o = o.(runtime.Object).DeepCopyObject().(metav1.Object) // a watch never hands over one object twice
	switch o.(type) {
	case *v1alpha1.ServiceAssignment:
		r.must(r.assignments.Add(o))
	case *discoveryv1.EndpointSlice:
		r.must(r.slices.Add(o))
	case *corev1.Node:
		r.must(r.nodes.Add(o))
	case *v1alpha1.NodeProxyState:
		r.must(r.states.Add(o))
	}
	return o.GetResourceVersion()
}

func (r *rig) remove(o metav1.Object) string {
	r.t.Helper()
	o.SetResourceVersion(r.next())
	switch o.(type) {
	case *v1alpha1.ServiceAssignment:
		r.must(r.assignments.Delete(o))
	case *discoveryv1.EndpointSlice:
		r.must(r.slices.Delete(o))
	case *corev1.Node:
		r.must(r.nodes.Delete(o))
	case *v1alpha1.NodeProxyState:
		r.must(r.states.Delete(o))
	}
	return o.GetResourceVersion()
}

func newNode(zone string) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: thisNode, Labels: map[string]string{corev1.LabelTopologyZone: zone}},
		Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.168.0.1"}}},
	}
}

func newAssignment(name, ip string) *v1alpha1.ServiceAssignment {
	return &v1alpha1.ServiceAssignment{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: "1", Generation: 1, ResourceVersion: "1"},
		Spec: v1alpha1.ServiceAssignmentSpec{
			ProxyMode:  v1alpha1.ProxyModeNFTables,
			Scheduler:  v1alpha1.SchedulerRandom,
			ServiceIPs: []v1alpha1.ServiceIP{{IP: ip}},
			Ports:      []v1alpha1.AssignmentPort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}},
		},
	}
}

func newSlice(service string, ips ...string) *discoveryv1.EndpointSlice {
	name, port, tcp := "http", int32(8080), corev1.ProtocolTCP
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: service + "-1", ResourceVersion: "1",
			Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &tcp}},
	}
	for _, ip := range ips {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{ip}})
	}
	return s
}

// endpointsIn writes what a kernel holds of a Service: "" if nothing.
func endpointsIn(f interface {
	get(string) *forwarding.Service
}, name string) string {
	s := f.get(name)
	if s == nil {
		return ""
	}
	words := []string{"of"}
	for _, e := range s.Internal.Endpoints {
		words = append(words, e.AddrPort.Addr().String())
	}
	return strings.Join(words, " ")
}

func expect(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %q, want %q", what, got, want)
	}
}

func TestNothingBeforeEverySourceHasDelivered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		nft := r.modes[0]
		r.must(r.assignments.Replace([]any{newAssignment("web", "10.99.0.1")}, "5"))
		pause(time.Minute)
		r.must(r.slices.Replace([]any{newSlice("web", "10.1.0.1")}, "6"))
		pause(time.Minute)
		r.must(r.states.Replace(nil, "7"))
		pause(time.Minute)
		if n, _ := nft.counts(); n != 0 || len(r.reports) != 0 || nft.cleanups != 0 {
			t.Fatalf("%d applies, %d reports, %d clean-ups before the node is known", n, len(r.reports), nft.cleanups)
		}
		r.must(r.nodes.Replace([]any{newNode("a")}, "7"))
		synctest.Wait()
		expect(t, "kernel", endpointsIn(nft, "web"), "of 10.1.0.1")
		if got, want := r.report().Held, (Marks{"5", "6"}); got != want {
			t.Errorf("marks are %v, want %v", got, want)
		}
		if got := r.report(); got.Services != 1 || got.Endpoints != 1 || got.Reason != "" {
			t.Errorf("report: %+v", got)
		}
	})
}

func TestOnlyWhatChangedIsProgrammed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		nft := r.modes[0]
		web := newSlice("web", "10.1.0.1")
		assigned := newAssignment("web", "10.99.0.1")
		r.sync(assigned, web)
		synctest.Wait()
		before, _ := nft.counts()

		// Of no consequence: a status, an annotation, a slice of a Service that nobody covers, a node's heartbeat. The marks move all the same.
		assigned.Status.Conditions = []metav1.Condition{{Type: "Programmed"}}
		assignmentMark := r.put(assigned)
		web.Annotations = map[string]string{"a": "b"}
		r.put(web)
		sliceMark := r.put(newSlice("stranger", "10.1.0.9"))
		r.put(newNode("a"))
		pause(time.Second)
		if n, _ := nft.counts(); n != before {
			t.Errorf("%d applies for nothing", n-before)
		}
		if got, want := r.report().Held, (Marks{assignmentMark, sliceMark}); got != want {
			t.Errorf("marks are %v, want %v", got, want)
		}

		web.Endpoints = newSlice("web", "10.1.0.1", "10.1.0.2").Endpoints
		r.put(web)
		pause(time.Second)
		expect(t, "kernel", endpointsIn(nft, "web"), "of 10.1.0.1 10.1.0.2")
		if n, full := nft.counts(); n != before+1 || full != 1 {
			t.Errorf("%d applies, %d of them full, want one more than %d and 1", n, full, before)
		}

		// Another zone changes what is preferred, everywhere.
		for i := range web.Endpoints {
			web.Endpoints[i].Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: string(rune('a' + i))}}}
		}
		r.put(web)
		pause(time.Second)
		expect(t, "zone a", endpointsIn(nft, "web"), "of 10.1.0.1")
		r.put(newNode("b"))
		pause(time.Second)
		expect(t, "zone b", endpointsIn(nft, "web"), "of 10.1.0.2")

		r.remove(web)
		pause(time.Second)
		expect(t, "no slice", endpointsIn(nft, "web"), "of")
		mark := r.remove(assigned)
		pause(time.Second)
		expect(t, "no Service", endpointsIn(nft, "web"), "")
		if got := r.report(); got.Held.Assignments != mark || got.Services != 0 || got.Endpoints != 0 {
			t.Errorf("report: %+v, want mark %s and nothing forwarded", got, mark)
		}
	})
}

func TestBurstsAreFolded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		nft := r.modes[0]
		web := newSlice("web")
		r.sync(newAssignment("web", "10.99.0.1"), web)
		pause(time.Second)
		before, _ := nft.counts()
		start := time.Now()
		web.Endpoints = newSlice("web", "10.1.0.1").Endpoints
		r.put(web)
		synctest.Wait()
		if time.Since(start) != 0 || endpointsIn(nft, "web") != "of 10.1.0.1" {
			t.Error("the first change after a quiet time was not programmed at once")
		}
		for i := range 1000 { // one second
			web.Endpoints = newSlice("web", fmt.Sprintf("10.1.%d.%d", i/250, 1+i%250)).Endpoints
			r.put(web)
			pause(time.Millisecond)
		}
		pause(minInterval)
		if n, _ := nft.counts(); n-before > int(time.Second/minInterval)+2 {
			t.Errorf("%d applies for a burst of a second", n-before)
		}
		expect(t, "kernel", endpointsIn(nft, "web"), "of 10.1.3.250")
	})
}

func TestFailureAndRecovery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		nft := r.modes[0]
		web := newSlice("web", "10.1.0.1")
		r.sync(newAssignment("web", "10.99.0.1"), web)
		synctest.Wait()
		held := r.report().Held

		nft.failNext(1000)
		web.Endpoints = newSlice("web", "10.1.0.2").Endpoints
		mark := r.put(web)
		pause(59 * time.Second)
		if got := r.report(); got.Held != held || got.Reason != "ApplyFailed" || !strings.Contains(got.Message, errKernel.Error()) {
			t.Errorf("while it fails: %+v, want marks %v", got, held)
		}
		if code := probe(r, "/healthz"); code != http.StatusOK {
			t.Errorf("/healthz is %d within the time allowed", code)
		}
		pause(2 * time.Second)
		for _, path := range []string{"/healthz", "/livez", "/readyz"} {
			if code := probe(r, path); code != http.StatusServiceUnavailable {
				t.Errorf("%s is %d after a minute", path, code)
			}
		}
		applies, full := nft.counts()
		if applies > 25 || full != applies-1 { // the first failure trusted what was held
			t.Errorf("%d applies, %d of them full", applies, full)
		}
		if got := metric(r, "sync_proxy_rules_failures_total").GetCounter().GetValue(); int(got) != applies-1 {
			t.Errorf("%v failures are counted, want %d", got, applies-1)
		}

		nft.failNext(0)
		changed := len(r.changes())
		pause(2 * retryMax)
		// Whoever follows what the kernel changed learns what it held before the failures.
		if got := r.changes(); len(got) != changed+1 || got[changed].Prev.Internal.Endpoints[0].AddrPort.String() != "10.1.0.1:8080" {
			t.Errorf("told of %d changes after the recovery, want one, from 10.1.0.1", len(r.changes())-changed)
		}
		expect(t, "kernel", endpointsIn(nft, "web"), "of 10.1.0.2")
		if got := r.report(); got.Held.EndpointSlices != mark || got.Reason != "" {
			t.Errorf("after it: %+v, want mark %s", got, mark)
		}
		for _, path := range []string{"/healthz", "/livez", "/readyz"} {
			if code := probe(r, path); code != http.StatusOK {
				t.Errorf("%s is %d after the recovery", path, code)
			}
		}
		if r.report().DriftRepairs != 0 {
			t.Error("a failure counts as a repair")
		}
	})
}

// metric gives the first metric of a name.
func metric(r *rig, name string) *dto.Metric {
	r.t.Helper()
	families, err := r.loop.metrics.registry.Gather()
	r.must(err)
	for _, f := range families {
		if f.GetName() == metricsPrefix+name {
			return f.GetMetric()[0]
		}
	}
	r.t.Fatalf("no metric %s", name)
	return nil
}

func probe(r *rig, path string) int {
	w := httptest.NewRecorder()
	r.loop.health.handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Code
}

func TestHealthBeforeTheFirstSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		if probe(r, "/healthz") != 200 || probe(r, "/livez") != 200 || probe(r, "/readyz") != 503 {
			t.Error("an agent that just started must be healthy, live and not ready")
		}
		pause(2 * time.Minute) // no API server: a restart would not help, but new traffic should go elsewhere
		if probe(r, "/healthz") != 503 || probe(r, "/livez") != 200 || probe(r, "/readyz") != 503 {
			t.Error("an agent that waits for the API server must be unhealthy and live")
		}
	})
}

func TestNodeThatGoesAwayIsUnhealthyAndForwardsOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		r.sync(newAssignment("web", "10.99.0.1"), newSlice("web", "10.1.0.1"))
		n := newNode("a")
		n.Spec.Taints = []corev1.Taint{{Key: "ToBeDeletedByClusterAutoscaler"}}
		r.put(n)
		pause(time.Second)
		if probe(r, "/healthz") != 503 || probe(r, "/livez") != 200 {
			t.Error("a node that is about to go must be unhealthy and live")
		}
		r.must(r.nodes.Replace(nil, r.next()))
		pause(time.Second)
		if probe(r, "/healthz") != 503 || probe(r, "/livez") != 200 {
			t.Error("a node that is gone must be unhealthy and live")
		}
		expect(t, "kernel", endpointsIn(r.modes[0], "web"), "of 10.1.0.1")
	})
}

func TestDriftIsRepairedWithinASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		nft := r.modes[0]
		r.sync(newAssignment("web", "10.99.0.1"), newSlice("web", "10.1.0.1"), newAssignment("other", "10.99.0.2"))
		pause(time.Second)
		for i := range 10 {
			nft.flush()
			pause(900 * time.Millisecond)
			expect(t, fmt.Sprintf("repair %d", i), endpointsIn(nft, "web"), "of 10.1.0.1")
		}
		if got := r.report().DriftRepairs; got != 10 {
			t.Errorf("%d repairs are counted, want 10", got)
		}
		if got := metric(r, "drift_repairs_total").GetCounter().GetValue(); got != 10 {
			t.Errorf("%v repairs in the metrics, want 10", got)
		}
		if r.logs("Something else changed our rules") != 10 {
			t.Error("not every repair is logged")
		}
		if r.logs("/TCP: missing; shop/") != 10 {
			t.Error("what differs is not told one by one")
		}
		_, full := nft.counts()
		nft.signal() // a false alarm: nothing differs
		pause(time.Second)
		if _, now := nft.counts(); now != full || r.report().DriftRepairs != 10 {
			t.Error("a false alarm was repaired")
		}
	})
}

// After an outage the source lists anew. What differs is programmed, and nothing else.
func TestRelistAfterOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		nft := r.modes[0]
		r.sync(newAssignment("same", "10.99.0.1"), newAssignment("moved", "10.99.0.2"), newAssignment("gone", "10.99.0.3"),
			newSlice("same", "10.1.0.1"), newSlice("moved", "10.1.0.2"), newSlice("gone", "10.1.0.3"))
		pause(time.Second)
		same, applies := nft.get("same"), nft.applies
		r.must(r.assignments.Replace([]any{newAssignment("same", "10.99.0.1"), newAssignment("moved", "10.99.0.2"), newAssignment("new", "10.99.0.4")}, "900"))
		r.must(r.slices.Replace([]any{newSlice("same", "10.1.0.1"), newSlice("moved", "10.1.0.22"), newSlice("new", "10.1.0.4")}, "901"))
		services, endpoints, _ := r.store.pending()
		if services != 2 || endpoints != 3 {
			t.Errorf("%d Services and %d slices count as changed, want 2 and 3", services, endpoints)
		}
		pause(time.Second)
		if nft.get("same") != same {
			t.Error("what is the same was programmed again")
		}
		expect(t, "moved", endpointsIn(nft, "moved"), "of 10.1.0.22")
		expect(t, "gone", endpointsIn(nft, "gone"), "")
		expect(t, "new", endpointsIn(nft, "new"), "of 10.1.0.4")
		if got, want := r.report().Held, (Marks{"900", "901"}); got != want {
			t.Errorf("marks are %v, want %v", got, want)
		}
		if _, full := nft.counts(); full != 1 || nft.applies > applies+2 {
			t.Errorf("%d applies (%d full) for one relist", nft.applies-applies, full)
		}
	})
}

func TestModeSwitchIsMakeBeforeBreak(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables, v1alpha1.ProxyModeIPVS)
		nft, ipvs := r.modes[0], r.modes[1]
		watch := func() {
			if nft.get("web") == nil && ipvs.get("web") == nil {
				t.Error("for a moment no mode serves the Service")
			}
		}
		web, slice := newAssignment("web", "10.99.0.1"), newSlice("web", "10.1.0.1")
		defer r.run()()
		r.sync(web, slice, newAssignment("stays", "10.99.0.2"))
		pause(time.Second)
		nft.beforeReturn, ipvs.beforeReturn = watch, watch
		if ipvs.made != 0 || ipvs.cleanups != 1 {
			t.Errorf("a mode that nothing uses: made %d times, cleaned up %d times, want 0 and 1", ipvs.made, ipvs.cleanups)
		}

		ipvs.failNext(3)
		switchTo := func(mode v1alpha1.ProxyMode) string {
			web.Spec.ProxyMode = mode
			web.Generation++
			return r.put(web)
		}
		switchTo(v1alpha1.ProxyModeIPVS)
		pause(10 * time.Millisecond)
		expect(t, "old mode while the new one fails", endpointsIn(nft, "web"), "of 10.1.0.1")
		slice.Endpoints = newSlice("web", "10.1.0.2").Endpoints
		r.put(slice)
		pause(10 * time.Millisecond)
		expect(t, "old mode while the new one fails, new endpoints", endpointsIn(nft, "web"), "of 10.1.0.2")
		pause(time.Second)
		expect(t, "old mode", endpointsIn(nft, "web"), "")
		expect(t, "new mode", endpointsIn(ipvs, "web"), "of 10.1.0.2")
		expect(t, "other Service", endpointsIn(nft, "stays"), "of")
		if slices.ContainsFunc(r.changes(), func(c forwarding.Change) bool { return c.Next == nil }) {
			t.Error("a Service that changed its mode counts as gone: its flows would be ended")
		}

		// There and back before the new mode is programmed, then away for good.
		nft.failNext(3)
		switchTo(v1alpha1.ProxyModeNFTables)
		pause(10 * time.Millisecond)
		switchTo(v1alpha1.ProxyModeIPVS)
		pause(time.Second)
		expect(t, "old mode", endpointsIn(nft, "web"), "")
		expect(t, "new mode", endpointsIn(ipvs, "web"), "of 10.1.0.2")
		if got := services(r.report(), v1alpha1.ProxyModeIPVS); got != 1 {
			t.Errorf("%d services are reported in the new mode, want 1", got)
		}
		nft.beforeReturn, ipvs.beforeReturn = nil, nil
		nft.failNext(3)
		switchTo(v1alpha1.ProxyModeNFTables)
		pause(10 * time.Millisecond)
		r.remove(web)
		pause(time.Second)
		if nft.len() != 1 || ipvs.len() != 0 {
			t.Errorf("a Service that went during a switch is left: %d and %d", nft.len(), ipvs.len())
		}
		if !slices.ContainsFunc(r.changes(), func(c forwarding.Change) bool { return c.Next == nil }) {
			t.Error("a Service that is gone does not count as gone")
		}
	})
}

func services(r Report, mode v1alpha1.ProxyMode) int32 {
	i := slices.IndexFunc(r.Modes, func(m v1alpha1.NodeProxyMode) bool { return m.Mode == mode })
	return r.Modes[i].Services
}

func TestModeThatTheNodeCannotDo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables, v1alpha1.ProxyModeIPVS)
		nft, ipvs := r.modes[0], r.modes[1]
		ipvs.setMissing(errors.New("no ip_vs in this kernel"))
		served, never, unknown := newAssignment("served", "10.99.0.1"), newAssignment("never", "10.99.0.2"), newAssignment("unknown", "10.99.0.3")
		never.Spec.ProxyMode, unknown.Spec.ProxyMode = v1alpha1.ProxyModeIPVS, v1alpha1.ProxyModeEBPF
		defer r.run()()
		slice := newSlice("served", "10.1.0.1")
		r.sync(served, never, unknown, slice)
		pause(time.Second)
		got := r.report()
		if got.Reason != "ModeUnavailable" || got.Services != 1 {
			t.Errorf("report: %+v", got)
		}
		for _, m := range got.Modes {
			if m.Available != (m.Mode == v1alpha1.ProxyModeNFTables) || m.Available == (m.Message != "") {
				t.Errorf("mode: %+v", m)
			}
		}
		if len(got.Modes) != 5 {
			t.Errorf("%d modes are reported, want every one that an assignment may name", len(got.Modes))
		}

		served.Spec.ProxyMode = v1alpha1.ProxyModeIPVS
		served.Generation++
		r.put(served)
		slice.Endpoints = newSlice("served", "10.1.0.2").Endpoints
		r.put(slice)
		pause(time.Second)
		expect(t, "a Service that was served goes on in its old mode", endpointsIn(nft, "served"), "of 10.1.0.2")

		ipvs.setMissing(nil) // modprobe ip_vs
		pause(reprobeEvery + time.Second)
		expect(t, "old mode", endpointsIn(nft, "served"), "")
		expect(t, "new mode", endpointsIn(ipvs, "served"), "of 10.1.0.2")
		expect(t, "new mode", endpointsIn(ipvs, "never"), "of")
		if got := r.report(); got.Services != 2 {
			t.Errorf("report: %+v", got)
		}
	})
}

func TestTwoServicesClaimOneAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		nft := r.modes[0]
		day := func(n int) metav1.Time { return metav1.NewTime(time.Date(2026, 1, n, 0, 0, 0, 0, time.UTC)) }
		old, young, thief := newAssignment("old", "10.99.0.1"), newAssignment("young", "10.99.0.2"), newAssignment("thief", "10.99.0.3")
		old.CreationTimestamp, young.CreationTimestamp, thief.CreationTimestamp = day(2), day(3), day(1)
		old.Spec.ExternalIPs, young.Spec.ExternalIPs = []string{"203.0.113.1"}, []string{"203.0.113.1", "203.0.113.2"}
		thief.Spec.ExternalIPs = []string{"10.99.0.2"} // a ClusterIP, and the thief is the oldest
		external := func(name string) string {
			var out []string
			for _, ip := range nft.get(name).ExternalIPs {
				out = append(out, ip.String())
			}
			return strings.Join(out, " ")
		}
		r.sync(young) // first come is not first served
		pause(time.Second)
		expect(t, "alone", external("young"), "203.0.113.1 203.0.113.2")
		r.put(old)
		r.put(thief)
		pause(time.Second)
		expect(t, "the older one", external("old"), "203.0.113.1")
		expect(t, "the younger one", external("young"), "203.0.113.2")
		expect(t, "the thief", external("thief"), "")
		if s := nft.get("young"); len(s.ServiceIPs) != 1 {
			t.Error("an external IP took away a service IP")
		}
		before := r.logs("Two Services claim")
		applies, _ := nft.counts()
		for i := range 5 {
			r.put(newSlice("young", fmt.Sprintf("10.1.0.%d", i+1)))
			pause(time.Second)
		}
		if n := r.logs("Two Services claim"); n != before || before != 2 {
			t.Errorf("logged %d and then %d times, want 2", before, n)
		}
		if n, _ := nft.counts(); n != applies+5 {
			t.Errorf("%d applies for 5 changes", n-applies)
		}
		expect(t, "the younger one", external("young"), "203.0.113.2")
		r.remove(old)
		pause(time.Second)
		expect(t, "the heir", external("young"), "203.0.113.1 203.0.113.2")
		if len(r.loop.frontends.rivals) != 1 {
			t.Errorf("%d contested frontends are left, want the thief's", len(r.loop.frontends.rivals))
		}
		r.remove(young)
		r.remove(thief)
		pause(time.Second)
		if len(r.loop.frontends.rivals)+len(r.loop.frontends.holder)+len(r.loop.programs) != 0 {
			t.Error("something is left of Services that are gone")
		}
	})
}

func TestStoppingLeavesTheRules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		stop := r.run()
		r.sync(newAssignment("web", "10.99.0.1"), newSlice("web", "10.1.0.1"))
		synctest.Wait()
		stop()
		expect(t, "kernel", endpointsIn(r.modes[0], "web"), "of 10.1.0.1")
		if !r.modes[0].closed {
			t.Error("the backend was not closed")
		}
	})
}

func TestBadObjectsAreNamedAndTheRestGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		bad := newAssignment("web", "10.99.0.1")
		bad.Spec.ExternalIPs = []string{"not-an-ip"}
		r.sync(bad, newSlice("web", "10.1.0.300", "10.1.0.1"))
		pause(time.Second)
		expect(t, "kernel", endpointsIn(r.modes[0], "web"), "of 10.1.0.1")
		for _, want := range []string{`"object"="shop/web"`, `"field"="spec.externalIPs[0]"`, `"value"="not-an-ip"`, `"kind"="EndpointSlice"`, `"value"="10.1.0.300"`} {
			if r.logs(want) != 1 {
				t.Errorf("%s is not logged", want)
			}
		}
	})
}

func TestCleanup(t *testing.T) {
	can, cannot := newFakeMode(v1alpha1.ProxyModeNFTables), newFakeMode(v1alpha1.ProxyModeIPVS)
	cannot.setMissing(errors.New("no ip_vs"))
	none := func() (bool, error) { return false, nil }
	if err := cleanup(t.Context(), logr.Discard(), []Mode{can.mode(), cannot.mode()}, none); err != nil {
		t.Fatal(err)
	}
	if can.cleanups != 1 || cannot.cleanups != 0 {
		t.Errorf("cleaned up %d and %d times, want 1 and 0", can.cleanups, cannot.cleanups)
	}
	broken := can.mode()
	broken.Cleanup = func(context.Context) error { return errKernel }
	err := cleanup(t.Context(), logr.Discard(), []Mode{broken, can.mode()}, none)
	if !errors.Is(err, errKernel) || !strings.Contains(err.Error(), "NFTables") || can.cleanups != 2 {
		t.Errorf("error %v after %d clean-ups: want one that names the mode, and the rest done", err, can.cleanups)
	}
}

func TestTriggersAreBounded(t *testing.T) {
	var list []time.Time
	for range 3 {
		list = appendTriggers(list, make([]time.Time, maxTriggers/2+1)...)
	}
	if list = appendTriggers(list, time.Now()); len(list) != maxTriggers {
		t.Errorf("%d changes are remembered, want %d", len(list), maxTriggers)
	}
}

func TestNetworkProgrammingIsMeasured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		web := newSlice("web", "10.1.0.1")
		trigger := func() {
			web.Annotations = map[string]string{corev1.EndpointsLastChangeTriggerTime: time.Now().Format(time.RFC3339Nano)}
		}
		web.Annotations = map[string]string{corev1.EndpointsLastChangeTriggerTime: time.Now().Add(-time.Hour).Format(time.RFC3339Nano)}
		r.sync(newAssignment("web", "10.99.0.1"), web)
		pause(time.Second)
		web.Endpoints = newSlice("web", "10.1.0.2").Endpoints
		trigger()
		pause(3 * time.Second) // on its way
		r.modes[0].failNext(1)
		r.put(web)
		pause(time.Second)
		if got := metric(r, "sync_proxy_rules_endpoint_changes_total").GetCounter().GetValue(); got != 2 {
			t.Errorf("%v changes are counted, want 2", got)
		}
		h := metric(r, "network_programming_duration_seconds").GetHistogram()
		if h.GetSampleCount() != 1 || h.GetSampleSum() < 3 || h.GetSampleSum() > 3.2 {
			t.Errorf("%d samples of %v s in all, want one of a little over 3 s, counted once the kernel held it", h.GetSampleCount(), h.GetSampleSum())
		}
	})
}

// pause lets time pass and everything come to rest. The Wait also orders what the loop did before what the test does next.
func pause(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// A load balancer must not send a node traffic for which its kernel is not ready.
func TestHealthCheckAfterTheKernel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		nft := r.modes[0]
		assigned := newAssignment("web", "10.99.0.1")
		assigned.Spec.ExternalTrafficPolicy, assigned.Spec.HealthCheckNodePort = corev1.ServiceExternalTrafficPolicyLocal, 32000
		web := newSlice("web", "10.1.0.1", "10.1.0.2", "10.1.0.3")
		web.Endpoints[0].NodeName, web.Endpoints[1].NodeName = new(thisNode), new(thisNode)
		nft.failNext(1)
		r.sync(assigned, web)
		synctest.Wait()
		if got := r.check("web"); got.Port != 0 {
			t.Errorf("answers %+v before the kernel holds the Service", got)
		}
		pause(time.Second)
		if got := r.check("web"); got.Port != 32000 || got.Endpoints != 2 || len(got.Addresses) != 1 {
			t.Errorf("answers %+v, want 2 endpoints at port 32000 of the node's address", got)
		}
		web.Endpoints[1].Conditions = discoveryv1.EndpointConditions{Ready: new(false), Serving: new(true), Terminating: new(true)}
		r.put(web)
		pause(time.Second)
		if got := r.check("web"); got.Endpoints != 1 {
			t.Errorf("answers %+v, want 1 endpoint: the other terminates", got)
		}
		r.remove(assigned)
		pause(time.Second)
		if got := r.check("web"); got.Port != 0 {
			t.Errorf("answers %+v after the Service is gone", got)
		}
	})
}
