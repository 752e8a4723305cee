package agent

import (
	"context"
	"fmt"
	"maps"
	"testing"

	"github.com/go-logr/logr"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"pgregory.net/rapid"

	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// history is what an API server held at each resourceVersion.
type history struct {
	assignments map[string]*v1alpha1.ServiceAssignment
	slices      map[string]*discoveryv1.EndpointSlice
}

func (h history) clone() history { return history{maps.Clone(h.assignments), maps.Clone(h.slices)} }

// kernelShould gives what a node must forward of a whole cluster, compiled from nothing.
func (h history) kernelShould(n *compile.Node) map[forwarding.ServiceKey]*forwarding.Service {
	out := map[forwarding.ServiceKey]*forwarding.Service{}
	for name, in := range h.assignments {
		a, _ := compile.ParseAssignment(in)
		var list []*compile.Slice
		for _, s := range h.slices {
			if s.Labels[discoveryv1.LabelServiceName] == name {
				parsed, _ := compile.ParseSlice(s, thisNode)
				list = append(list, parsed)
			}
		}
		for _, s := range compile.Services(a, list, n) {
			out[s.Key] = s
		}
	}
	return out
}

// TestMarksNeverExceedTheKernel drives an agent through arbitrary events, failures, flushes and relists, one pass at a time. Whenever the
// agent reports marks while nothing is pending, the kernels together must hold exactly what the cluster was at these marks; marks never go back.
func TestMarksNeverExceedTheKernel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables, v1alpha1.ProxyModeIPVS)
		r.loop.log = logr.Discard()
		for _, d := range r.loop.planes {
			d.log = logr.Discard()
			r.loop.probe(t.Context(), d)
		}
		now := history{map[string]*v1alpha1.ServiceAssignment{}, map[string]*discoveryv1.EndpointSlice{}}
		at := map[Marks]history{}
		r.sync()
		received := Marks{"102", "103"}
		at[received] = now.clone()
		node, _ := compile.ParseNode(newNode("a"))
		last := Marks{}

		for range rapid.IntRange(1, 40).Draw(rt, "steps") {
			name := fmt.Sprintf("s%d", rapid.IntRange(0, 3).Draw(rt, "service"))
			switch rapid.IntRange(0, 6).Draw(rt, "what") {
			case 0:
				a := newAssignment(name, "10.99.0."+name[1:])
				a.Generation = int64(r.version)
				a.Spec.ProxyMode = rapid.SampledFrom([]v1alpha1.ProxyMode{v1alpha1.ProxyModeNFTables, v1alpha1.ProxyModeIPVS}).Draw(rt, "mode")
				a.Spec.Ports[0].Port = int32(rapid.IntRange(80, 81).Draw(rt, "port"))
				now.assignments[name] = a
				received.Assignments = r.put(a)
			case 1:
				if a := now.assignments[name]; a != nil {
					delete(now.assignments, name)
					received.Assignments = r.remove(a)
				}
			case 2:
				s := newSlice(name, fmt.Sprintf("10.1.0.%d", rapid.IntRange(1, 9).Draw(rt, "ip")))
				now.slices[name] = s
				received.EndpointSlices = r.put(s)
			case 3:
				if s := now.slices[name]; s != nil {
					delete(now.slices, name)
					received.EndpointSlices = r.remove(s)
				}
			case 4: // an outage, during which things changed
				delete(now.slices, name)
				var list []any
				for _, s := range now.slices {
					list = append(list, s.DeepCopy())
				}
				received.EndpointSlices = r.next()
				r.must(r.slices.Replace(list, received.EndpointSlices))
			case 5:
				r.modes[rapid.IntRange(0, 1).Draw(rt, "which")].failNext(rapid.IntRange(1, 2).Draw(rt, "failures"))
			case 6:
				m := r.modes[rapid.IntRange(0, 1).Draw(rt, "which")]
				m.flush()
				for _, d := range r.loop.planes {
					d.drifted.Store(true)
				}
			}
			at[received] = now.clone()
			if rapid.Bool().Draw(rt, "pass") {
				continue // several events in one pass
			}
			for _, d := range r.loop.planes {
				d.retryAt, d.verifyAfter = d.probeAt, d.probeAt.Add(-reprobeEvery) // the waits are over
				d.retryAt = d.verifyAfter
			}
			r.loop.pass(context.Background())
			last = checkHeld(rt, r, at, last, node)
		}
	})
}

func checkHeld(t *rapid.T, r *rig, at map[Marks]history, last Marks, node *compile.Node) Marks {
	got := r.report()
	for _, pair := range [][2]string{{last.Assignments, got.Held.Assignments}, {last.EndpointSlices, got.Held.EndpointSlices}} {
		if pair[0] == "" || pair[1] == "" {
			continue
		}
		if order, err := resourceversion.CompareResourceVersion(pair[0], pair[1]); err != nil || order > 0 {
			t.Fatalf("a mark went back from %v to %v (%v)", last, got.Held, err)
		}
	}
	if got.Reason != "" {
		if got.Held != last {
			t.Fatalf("marks moved from %v to %v although %s", last, got.Held, got.Reason)
		}
		return got.Held
	}
	cluster, known := at[got.Held]
	if !known {
		t.Fatalf("marks %v were never received", got.Held)
	}
	want := cluster.kernelShould(node)
	for i, m := range r.modes {
		for k, s := range m.kernel {
			w := want[k]
			if w == nil || !w.Equal(s) || cluster.assignments[k.Name].Spec.ProxyMode != m.name {
				t.Fatalf("kernel %d holds %v, the cluster at %v does not have it so", i, k, got.Held)
			}
			delete(want, k)
		}
	}
	if len(want) > 0 {
		t.Fatalf("the kernel lacks %d services of the cluster at %v", len(want), got.Held)
	}
	return got.Held
}
