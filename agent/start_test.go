package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/nftables"
	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// essentials gives the API server's Service and a DNS Service, with a slice each.
func essentials() []any {
	kubernetes, dns := newAssignment("kubernetes", "10.96.0.1"), newAssignment("any-dns", "10.96.0.10")
	kubernetes.Namespace, dns.Namespace = "default", "kube-system"
	dns.Spec.Ports = []v1alpha1.AssignmentPort{{Name: "http", Protocol: corev1.ProtocolUDP, Port: 53}}
	apiserver, coredns := newSlice("kubernetes", "192.168.0.9"), newSlice("any-dns", "10.1.0.53")
	apiserver.Namespace, coredns.Namespace = "default", "kube-system"
	coredns.Ports[0].Protocol = new(corev1.ProtocolUDP)
	return []any{kubernetes, dns, apiserver, coredns}
}

func TestEssential(t *testing.T) {
	port := func(number uint16, protocol forwarding.Protocol) *compile.Assignment {
		return &compile.Assignment{Ports: []compile.Port{{Port: 443, Protocol: forwarding.TCP}, {Port: number, Protocol: protocol}}}
	}
	for _, c := range []struct {
		name       string
		assignment *compile.Assignment
		want       bool
	}{
		{"default/kubernetes", port(6443, forwarding.TCP), true},
		{"default/kubernetes", nil, false}, // not assigned: kube-proxy has it
		{"shop/kubernetes", port(6443, forwarding.TCP), false},
		{"kube-system/kube-dns", port(53, forwarding.UDP), true},
		{"kube-system/rke2-coredns-rke2-coredns", port(53, forwarding.UDP), true},
		{"openshift-dns/dns-default", port(53, forwarding.UDP), true},
		{"kube-system/kube-dns", port(53, forwarding.TCP), false},
		{"shop/web", port(80, forwarding.TCP), false},
	} {
		namespace, name, _ := strings.Cut(c.name, "/")
		if got := essential(input{service: types.NamespacedName{Namespace: namespace, Name: name}, assignment: c.assignment}); got != c.want {
			t.Errorf("%s %+v: %t", c.name, c.assignment, got)
		}
	}
}

func TestColdStartBeginsWithTheEssential(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		nft := r.modes[0]
		var steps []string
		nft.beforeReturn = func() { steps = append(steps, nft.names()) }
		r.sync(append(essentials(), newAssignment("web", "10.99.0.1"), newSlice("web", "10.1.0.1"), newAssignment("api", "10.99.0.2"))...)
		pause(time.Second)
		const first, all = "default/kubernetes kube-system/any-dns", "default/kubernetes kube-system/any-dns shop/api shop/web"
		if got := strings.Join(steps, "; "); got != first+"; "+all {
			t.Errorf("the kernel held %s, want %s, then %s", got, first, all)
		}
		if got := r.reports[0]; got.Services != 4 || got.Endpoints != 3 || got.LastApplied.IsZero() {
			t.Errorf("the first report is %+v: the first part must not pass for the whole", got)
		}
		if len(r.changes()) != 4 {
			t.Errorf("told of %d changes, want each Service once", len(r.changes()))
		}
	})
}

// A state of the essential alone would take the others away from a kernel that holds them.
func TestRestartDropsNothing(t *testing.T) {
	for _, unsure := range []error{nil, errors.New("no answer")} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, v1alpha1.ProxyModeNFTables)
			nft := r.modes[0]
			nft.unsure = unsure
			web := &forwarding.Service{Key: forwarding.ServiceKey{Namespace: "shop", Name: "web", Port: 80, Protocol: forwarding.TCP}}
			nft.kernel[web.Key] = web
			nft.beforeReturn = func() {
				if nft.get("web") == nil {
					t.Error("a Service that an earlier run left was taken away")
				}
			}
			defer r.run()()
			r.sync(append(essentials(), newAssignment("web", "10.99.0.1"), newSlice("web", "10.1.0.1"))...)
			pause(time.Second)
			if applies, full := nft.counts(); applies != 1 || full != 1 || nft.len() != 3 {
				t.Errorf("%d applies (%d full) leave %d services, want one that leaves 3", applies, full, nft.len())
			}
			if logged := r.logs("Could not tell whether rules"); (logged == 1) != (unsure != nil) {
				t.Errorf("logged %d times that it cannot be told, the reason being %v", logged, unsure)
			}
		})
	}
}

func TestHeadStartThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		nft := r.modes[0]
		nft.failNext(1)
		r.sync(append(essentials(), newAssignment("web", "10.99.0.1"))...)
		pause(time.Second)
		if applies, full := nft.counts(); applies != 2 || full != 2 || nft.len() != 3 {
			t.Errorf("%d applies (%d full) leave %d services, want a second one that trusts nothing and leaves 3", applies, full, nft.len())
		}
		if got := r.report(); got.Reason != "" || got.Services != 3 {
			t.Errorf("report: %+v", got)
		}
	})
}

// TestStartNeverDropsWhatWorked starts an agent on kernels in which an earlier run left any part of the cluster, and more. Nothing that is there and stays is ever
// missing, and after the first pass the kernels hold the cluster.
func TestStartNeverDropsWhatWorked(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables, v1alpha1.ProxyModeIPVS)
		r.loop.log = logr.Discard()
		mode := func(label string) int { return rapid.IntRange(0, 1).Draw(rt, label) }
		objects := essentials()
		for i := range rapid.IntRange(0, 3).Draw(rt, "others") {
			name := fmt.Sprintf("s%d", i)
			objects = append(objects, newAssignment(name, "10.99.0."+name[1:]), newSlice(name, "10.1.0.1"))
		}
		var keys []forwarding.ServiceKey
		left := map[forwarding.ServiceKey]bool{}
		leave := func(key forwarding.ServiceKey, in int) {
			if rapid.Bool().Draw(rt, "left "+key.Name) {
				left[key] = key.Name != "gone"
				r.modes[in].kernel[key] = &forwarding.Service{Key: key}
			}
		}
		leave(forwarding.ServiceKey{Name: "gone"}, mode("mode of gone"))
		for _, o := range objects {
			a, ok := o.(*v1alpha1.ServiceAssignment)
			if !ok {
				continue
			}
			in := mode("mode of " + a.Name)
			a.Spec.ProxyMode = r.modes[in].name
			key := forwarding.ServiceKey{Namespace: a.Namespace, Name: a.Name, Port: 80, Protocol: forwarding.TCP}
			if a.Namespace == "kube-system" {
				key.Port, key.Protocol = 53, forwarding.UDP
			}
			keys = append(keys, key)
			leave(key, in)
		}
		held := func(key forwarding.ServiceKey) bool {
			return r.modes[0].kernel[key] != nil || r.modes[1].kernel[key] != nil
		}
		for _, m := range r.modes {
			m.beforeReturn = func() {
				for key, stays := range left {
					if stays && !held(key) {
						rt.Errorf("%v, which worked, was dropped for a while", key)
					}
				}
			}
		}
		for _, d := range r.loop.planes {
			d.log = logr.Discard()
			r.loop.probe(t.Context(), d)
		}
		r.sync(objects...)
		r.loop.pass(context.Background())
		for _, key := range keys {
			if !held(key) {
				rt.Errorf("%v is not programmed", key)
			}
		}
		if n := r.modes[0].len() + r.modes[1].len(); n != len(keys) {
			rt.Errorf("the kernels hold %d services, want %d", n, len(keys))
		}
	})
}

// observed is a backend that tells what each Apply was asked for, once the kernel has it.
type observed struct {
	backend.Backend
	applied func(next forwarding.State)
}

func (o observed) Apply(ctx context.Context, prev *forwarding.State, next forwarding.State) error {
	err := o.Backend.Apply(ctx, prev, next)
	if err == nil {
		o.applied(next)
	}
	return err
}

// nftablesIn is nftables in a network namespace.
func nftablesIn(ns *netns.NS, applied func(backend.Backend, forwarding.State)) Mode {
	return Mode{
		Name:  v1alpha1.ProxyModeNFTables,
		Probe: func(ctx context.Context) error { return ns.Do(func() error { return nftables.Probe(ctx) }) },
		Blank: func(ctx context.Context) (blank bool, err error) {
			err = ns.Do(func() (err error) {
				blank, err = nftables.Blank(ctx)
				return err
			})
			return blank, err
		},
		Cleanup: func(ctx context.Context) error { return ns.Do(func() error { return nftables.Cleanup(ctx) }) },
		New: func() (b backend.Backend, err error) {
			err = ns.Do(func() (err error) {
				b, err = nftables.New()
				return err
			})
			return observed{b, func(next forwarding.State) { applied(b, next) }}, err
		},
	}
}

// TestColdStartInKernel starts twice on one kernel: the first time it is blank, the second time it is not.
func TestColdStartInKernel(t *testing.T) {
	ns := netns.NewT(t)
	for _, start := range []struct {
		name string
		want []int
	}{{"cold", []int{2, 3}}, {"with rules in force", []int{3}}} {
		var held []int
		r := newRig(t)
		mode := nftablesIn(ns, func(b backend.Backend, next forwarding.State) {
			held = append(held, next.Len())
			drifts, err := b.Verify(t.Context(), next)
			if err != nil || len(drifts) > 0 {
				t.Errorf("%s: after part %d the kernel is not as it should be: %v %v", start.name, len(held), err, drifts)
			}
		})
		r.loop = newLoop(r.loop.log, r.store, []Mode{mode}, r.loop.metrics, r.loop.health, r.loop.tell)
		r.sync(append(essentials(), newAssignment("web", "10.99.0.1"), newSlice("web", "10.1.0.1"))...)
		r.loop.pass(t.Context())
		r.must(r.loop.close())
		if !slices.Equal(held, start.want) {
			t.Errorf("%s: the kernel held %v services after each part, want %v", start.name, held, start.want)
		}
	}
}

// BenchmarkColdStart is the time from the last list that an agent needs until the kernel holds default/kubernetes (first-ns), and until it holds all.
func BenchmarkColdStart(b *testing.B) {
	for _, size := range []int{1000, 10000} {
		assignments, slicesOf := []any{}, []any{}
		for _, o := range essentials() {
			if s, ok := o.(*discoveryv1.EndpointSlice); ok {
				slicesOf = append(slicesOf, s)
			} else {
				assignments = append(assignments, o)
			}
		}
		for i := range size {
			name := fmt.Sprintf("service-%d", i)
			assignments = append(assignments, newAssignment(name, fmt.Sprintf("10.99.%d.%d", i/256, i%256)))
			slicesOf = append(slicesOf, newSlice(name, tenEndpoints(i, 0)...))
		}
		for _, order := range []string{"essential-first", "all-at-once"} {
			b.Run(fmt.Sprintf("services=%d/%s", size, order), func(b *testing.B) {
				var first time.Duration
				for b.Loop() {
					b.StopTimer()
					ns := netns.NewT(b)
					r := newRig(b)
					var start time.Time
					held := false
					mode := nftablesIn(ns, func(_ backend.Backend, next forwarding.State) {
						if !held && next.Get(forwarding.ServiceKey{Namespace: "default", Name: "kubernetes", Port: 80, Protocol: forwarding.TCP}) != nil {
							held = true
							first += time.Since(start)
						}
					})
					if order == "all-at-once" {
						mode.Blank = nil
					}
					r.loop = newLoop(logr.Discard(), r.store, []Mode{mode}, r.loop.metrics, r.loop.health, r.loop.tell)
					r.must(r.nodes.Replace([]any{newNode("a")}, "1"))
					r.must(r.states.Replace(nil, "1"))
					r.must(r.assignments.Replace(assignments, "1"))
					r.must(r.slices.Replace(slicesOf, "1"))
					b.StartTimer()
					start = time.Now()
					r.loop.pass(b.Context())
					b.StopTimer()
					if !held || r.report().Reason != "" {
						b.Fatalf("not programmed: %+v", r.report())
					}
					r.must(r.loop.close())
					b.StartTimer()
				}
				b.ReportMetric(float64(first)/float64(b.N), "first-ns/op")
			})
		}
	}
}
