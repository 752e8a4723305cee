package agent

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// noKernel takes everything.
type noKernel struct{ backend.Backend }

func (noKernel) Apply(context.Context, *forwarding.State, forwarding.State) error { return nil }
func (noKernel) Drifted() <-chan struct{}                                         { return nil }
func (noKernel) Close() error                                                     { return nil }

// BenchmarkChange is the whole way of one endpoint change through the agent, from the decoded event to Apply: its cost must not grow with
// the number of services.
func BenchmarkChange(b *testing.B) {
	for _, size := range []int{1000, 10000, 50000} {
		b.Run(fmt.Sprintf("services=%d/dirty=1", size), func(b *testing.B) {
			r := newRig(b)
			r.loop = newLoop(logr.Discard(), r.store, []Mode{{
				Name:    v1alpha1.ProxyModeNFTables,
				Probe:   func(context.Context) error { return nil },
				New:     func() (backend.Backend, error) { return noKernel{}, nil },
				Cleanup: func(context.Context) error { return nil },
			}}, r.loop.metrics, r.loop.health, listeners{func(_, _ *forwarding.Service) {}, func(types.NamespacedName, compile.HealthCheck) {}, func(Report) {}})
			var assignments, slices []any
			names := make([]string, size)
			for i := range size {
				names[i] = fmt.Sprintf("service-%d", i)
				assignments = append(assignments, newAssignment(names[i], fmt.Sprintf("10.99.%d.%d", i/256, i%256)))
				slices = append(slices, newSlice(names[i], tenEndpoints(i, 0)...))
			}
			r.must(r.nodes.Replace([]any{newNode("a")}, "1"))
			r.must(r.assignments.Replace(assignments, "1"))
			r.must(r.slices.Replace(slices, "1"))
			r.must(r.states.Replace(nil, "1"))
			r.loop.pass(b.Context())
			if r.loop.planes[0].want.Len() != size {
				b.Fatalf("%d services are forwarded", r.loop.planes[0].want.Len())
			}
			b.ReportAllocs()
			for b.Loop() {
				b.StopTimer()
				i := rand.IntN(size)
				event := newSlice(names[i], tenEndpoints(i, 1+rand.IntN(200))...)
				event.ResourceVersion = r.next()
				b.StartTimer()
				r.must(r.slices.Add(event))
				r.loop.pass(b.Context())
			}
		})
	}
}

// tenEndpoints gives ten addresses, of which the last depends on variant.
func tenEndpoints(service, variant int) []string {
	var out []string
	for e := range 10 {
		out = append(out, fmt.Sprintf("10.%d.%d.%d", 1+e, service/256, service%256))
	}
	out[9] = fmt.Sprintf("10.100.%d.%d", variant, service%256)
	return out
}
