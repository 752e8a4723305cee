package admission

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	kadmissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	webhook "sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// proposals is a ledger that proposes what it is told to, in that order, and remembers what was said of it.
type proposals struct {
	mu       sync.Mutex
	policy   *allocator.Policy
	unknown  error // of Covering
	families []v1alpha1.IPFamily
	// free is proposed for a policy ("p") or for none (""), by family; what is missing is exhausted, or for no policy ErrNoRange.
	free           map[string]map[v1alpha1.IPFamily][]allocator.Grant
	claims         map[allocator.Lock]*v1alpha1.AllocationClaim
	took, abandons []allocator.Lock
}

func (l *proposals) Covering(context.Context, *corev1.Service) (*allocator.Policy, error) {
	return l.policy, l.unknown
}
func (l *proposals) Families() []v1alpha1.IPFamily { return l.families }
func (l *proposals) Grant(r allocator.Request) (allocator.Grant, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	free := l.free[r.Policy][r.Family]
	if len(free) == 0 && r.Policy == "" {
		return allocator.Grant{}, allocator.ErrNoRange
	} else if len(free) == 0 {
		return allocator.Grant{}, &allocator.ExhaustedError{Policy: r.Policy, Family: r.Family, Used: 3, Total: 3}
	}
	l.free[r.Policy][r.Family] = free[1:]
	return free[0], nil
}
func (l *proposals) Taking(allocator.Lock, allocator.Hold) {}
func (l *proposals) Took(lock allocator.Lock, _ allocator.Hold) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.took = append(l.took, lock)
}
func (l *proposals) Abandon(lock allocator.Lock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.abandons = append(l.abandons, lock)
}
func (l *proposals) Claim(lock allocator.Lock) *v1alpha1.AllocationClaim { return l.claims[lock] }
func (l *proposals) Owner(lock allocator.Lock) (policy, declared string) {
	if l.policy != nil && (lock.IsPort() && l.policy.NodePorts.Contains(lock.Port) || l.policy.RangeOf(lock.Addr) != nil) {
		return l.policy.Name, "RANGE"
	}
	return "", ""
}

func grants(locks ...string) (out []allocator.Grant) {
	for _, text := range locks {
		name, reclaim := strings.CutPrefix(text, "reclaim ")
		out = append(out, allocator.Grant{Lock: lockOf(name), Reclaim: reclaim})
	}
	return out
}

func lockOf(name string) allocator.Lock {
	lock, err := allocator.ParseName(name)
	if err != nil {
		panic(err)
	}
	return lock
}

// policyP gives IPv4 and IPv6 addresses and node ports.
func policyP(strict bool) *allocator.Policy {
	p := &allocator.Policy{Name: "p", Strict: strict, NodePorts: allocator.PortRange{First: 31000, Last: 31099}}
	for _, r := range []string{"10.9.0.0/24", "fd00:9::/112"} {
		p.Ranges = append(p.Ranges, allocator.Range{Prefix: prefixOf(r), Use: v1alpha1.RangeUseClusterIP, Allocation: v1alpha1.RangeAllocationAutomatic})
	}
	return p
}

const second6 = "fd00-0009-0000-0000-0000-0000-0000-0001"

// world is one handler, its ledger and what the API server has.
type world struct {
	*proposals
	client  client.WithWatch
	handler *Handler
}

func newWorld(t *testing.T, policy *allocator.Policy, intercept interceptor.Funcs, objects ...client.Object) *world {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
		t.Fatal(err)
	}
	w := &world{proposals: &proposals{policy: policy, families: both, claims: map[allocator.Lock]*v1alpha1.AllocationClaim{}, free: map[string]map[v1alpha1.IPFamily][]allocator.Grant{
		"p": {v1alpha1.IPv4: grants("10.9.0.1", "10.9.0.2"), v1alpha1.IPv6: grants(second6), "": grants("nodeport-31001", "nodeport-31002")},
		"":  {v1alpha1.IPv4: grants("10.96.0.1"), v1alpha1.IPv6: grants("fd00-0096-0000-0000-0000-0000-0000-0001"), "": grants("nodeport-30001", "nodeport-30002")},
	}}}
	w.client = fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).WithInterceptorFuncs(intercept).Build()
	var err error
	if w.handler, err = New(Options{Ledger: w.proposals, Client: w.client, Live: w.client}); err != nil {
		t.Fatal(err)
	}
	for _, o := range objects {
		if c, ok := o.(*v1alpha1.AllocationClaim); ok && c.Spec.State == v1alpha1.ClaimReleased {
			var known v1alpha1.AllocationClaim
			if err := w.client.Get(t.Context(), client.ObjectKeyFromObject(c), &known); err != nil {
				t.Fatal(err)
			}
			w.proposals.claims[lockOf(c.Name)] = &known
		}
	}
	return w
}

// send has a Service created, and returns the response and its patch as text.
func (w *world) send(t *testing.T, svc *corev1.Service, dryRun bool) (webhook.Response, string) {
	t.Helper()
	raw, err := json.Marshal(svc)
	if err != nil {
		t.Fatal(err)
	}
	r := w.handler.Handle(t.Context(), webhook.Request{AdmissionRequest: kadmissionv1.AdmissionRequest{
		UID: "u", Resource: metav1.GroupVersionResource{Version: "v1", Resource: "services"}, Namespace: "ns", Operation: kadmissionv1.Create,
		Object: runtime.RawExtension{Raw: raw}, DryRun: &dryRun}})
	return r, string(r.Patch)
}

// all lists the claims that there are, "NAME STATE HOLDER".
func (w *world) all(t *testing.T) (out []string) {
	t.Helper()
	var list v1alpha1.AllocationClaimList
	if err := w.client.List(t.Context(), &list); err != nil {
		t.Fatal(err)
	}
	for _, c := range list.Items {
		out = append(out, c.Name+" "+string(c.Spec.State)+" "+c.Spec.Holder.Name)
	}
	slices.Sort(out)
	return out
}

func named(s *corev1.Service) *corev1.Service {
	s.Namespace, s.Name = "ns", "web"
	return s
}

func claimOf(name, holder string, state v1alpha1.ClaimState) *v1alpha1.AllocationClaim {
	h := allocator.Hold{Policy: "p", Use: v1alpha1.ClaimUseClusterIP, State: v1alpha1.ClaimReserved, Holder: allocator.Holder{Namespace: "ns", Name: holder}}
	c := allocator.NewClaim(lockOf(name), h)
	c.Spec.State = state
	return c
}

func expect(t *testing.T, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("claims: got %q, want %q", got, want)
	}
}

func contains(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%q lacks %q", text, p)
		}
	}
}

func TestLostRace(t *testing.T) {
	w := newWorld(t, policyP(true), interceptor.Funcs{}, claimOf("10.9.0.1", "other", v1alpha1.ClaimBound))
	r, patch := w.send(t, named(svc(nodePort)), false)
	if !r.Allowed {
		t.Fatal(r.Result)
	}
	contains(t, patch, `{"op":"add","path":"/spec/clusterIPs","value":["10.9.0.2"]}`, `{"op":"add","path":"/spec/clusterIP","value":"10.9.0.2"}`,
		`{"op":"add","path":"/spec/ports/0/nodePort","value":31001}`, `{"op":"add","path":"/metadata/annotations","value":{"networking.serviceproxy.io/reservation":`)
	expect(t, w.all(t), []string{"10.9.0.1 Bound other", "10.9.0.2 Reserved web", "nodeport-31001 Reserved web"})
	if !slices.Contains(w.abandons, lockOf("10.9.0.1")) || len(w.abandons) != 1 || len(w.took) != 2 {
		t.Errorf("took %v, abandoned %v", w.took, w.abandons)
	}
}

func TestReclaim(t *testing.T) {
	for name, tc := range map[string]struct {
		objects []client.Object
		stale   bool
		want    []string
	}{
		"its IPAddress is gone":        {want: []string{"10.9.0.7 Reserved web"}},
		"its IPAddress is still there": {objects: []client.Object{&networkingv1.IPAddress{ObjectMeta: metav1.ObjectMeta{Name: "10.9.0.7"}}}, want: []string{"10.9.0.2 Reserved web", "10.9.0.7 Released web"}},
		"somebody else was faster":     {stale: true, want: []string{"10.9.0.2 Reserved web", "10.9.0.7 Released web"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, policyP(true), interceptor.Funcs{}, append(tc.objects, claimOf("10.9.0.7", "web", v1alpha1.ClaimReleased))...)
			w.free["p"][v1alpha1.IPv4] = grants("reclaim 10.9.0.7", "10.9.0.2")
			if tc.stale {
				w.proposals.claims[lockOf("10.9.0.7")].ResourceVersion = "1"
			}
			if r, _ := w.send(t, named(svc(clusterIP)), false); !r.Allowed {
				t.Fatal(r.Result)
			}
			expect(t, w.all(t), tc.want)
		})
	}
}

func TestExistingName(t *testing.T) {
	w := newWorld(t, policyP(true), interceptor.Funcs{}, named(svc(clusterIP)))
	r, patch := w.send(t, named(svc(nodePort)), false)
	if !r.Allowed || patch != "" {
		t.Errorf("got %v %s", r.Allowed, patch)
	}
	expect(t, w.all(t), nil)
	if len(w.abandons) != 2 {
		t.Errorf("abandoned %v", w.abandons)
	}
}

func TestAllOrNothing(t *testing.T) {
	w := newWorld(t, policyP(true), interceptor.Funcs{})
	w.free["p"][v1alpha1.IPv6] = nil
	r, _ := w.send(t, named(svc(nodePort, stack(require))), false)
	if r.Allowed || r.Result.Code != http.StatusForbidden {
		t.Fatalf("got %+v", r.Result)
	}
	contains(t, r.Result.Message, "spec.clusterIPs[1]: policy p has no free IPv6 addresses: 3 of 3 in use", "Strict", "add a range")
	expect(t, w.all(t), nil)
	if len(w.abandons) != 2 {
		t.Errorf("abandoned %v", w.abandons)
	}
}

func TestSameRequestAgain(t *testing.T) {
	creates := 0
	w := newWorld(t, policyP(true), interceptor.Funcs{Create: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.CreateOption) error {
		creates++
		return c.Create(ctx, obj, opts...)
	}})
	first := named(svc(clusterIP))
	if r, _ := w.send(t, first, false); !r.Allowed {
		t.Fatal(r.Result)
	}
	var claim v1alpha1.AllocationClaim
	if err := w.client.Get(t.Context(), client.ObjectKey{Name: "10.9.0.1"}, &claim); err != nil {
		t.Fatal(err)
	}
	again := named(svc(nodePort, ips("10.9.0.1"))) // another webhook made it a NodePort Service in between
	again.Annotations = map[string]string{v1alpha1.AnnotationReservation: claim.Spec.ReservationToken}
	r, patch := w.send(t, again, false)
	if !r.Allowed || patch != `[{"op":"add","path":"/spec/ports/0/nodePort","value":31001}]` {
		t.Errorf("got %v %s", r.Allowed, patch)
	}
	expect(t, w.all(t), []string{"10.9.0.1 Reserved web", "nodeport-31001 Reserved web"})
	if creates != 2 { // the address, and the port
		t.Errorf("%d creates", creates)
	}
	var port v1alpha1.AllocationClaim
	if err := w.client.Get(t.Context(), client.ObjectKey{Name: "nodeport-31001"}, &port); err != nil || port.Spec.ReservationToken != claim.Spec.ReservationToken {
		t.Errorf("the port is reserved with another token: %v", err)
	}

	again.Name = "copy"
	if r, _ := w.send(t, again, false); r.Allowed || r.Result.Code != http.StatusUnprocessableEntity {
		t.Errorf("a copied token was honoured: %+v", r)
	}
}

// The second call for one request may reach another replica, whose cache still shows who had the address before.
func TestSameRequestAtAnotherReplica(t *testing.T) {
	claim := claimOf("10.9.0.1", "", v1alpha1.ClaimReserved)
	claim.Spec.ReservationToken = "token"
	w := newWorld(t, policyP(true), interceptor.Funcs{}, claim)
	w.proposals.claims[lockOf("10.9.0.1")] = claimOf("10.9.0.1", "gone", v1alpha1.ClaimReleased)
	again := svc(clusterIP, ips("10.9.0.1"))
	again.Namespace, again.GenerateName = "ns", "web-"
	again.Annotations = map[string]string{v1alpha1.AnnotationReservation: "token"}
	if r, patch := w.send(t, again, false); !r.Allowed || patch != "" {
		t.Errorf("got %+v %s", r, patch)
	}
	expect(t, w.all(t), []string{"10.9.0.1 Reserved "})
}

func TestOutcome(t *testing.T) {
	lock, claim := lockOf("10.9.0.1"), claimOf("10.9.0.1", "web", v1alpha1.ClaimReserved)
	for want, s := range map[string]step{
		outcomeAllocated: {route: route{source: fromPolicy}, lock: lock, claim: claim},
		outcomeSteered:   {route: route{source: steered}, lock: lock},
		outcomeUnchanged: {route: route{source: recorded}, lock: lock, claim: claim, found: true}, // counted when the request came by first
	} {
		if got := (&request{steps: []step{s}}).outcome(nil); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestDryRun(t *testing.T) {
	w := newWorld(t, policyP(true), interceptor.Funcs{Create: func(context.Context, client.WithWatch, client.Object, ...client.CreateOption) error {
		t.Error("something was created")
		return nil
	}})
	w.free = nil // nothing is asked for
	r, patch := w.send(t, named(svc(nodePort, stack(require))), true)
	if !r.Allowed || patch != "" || len(r.Warnings) > 0 {
		t.Errorf("got %+v", r)
	}
}

func TestAPIServerFails(t *testing.T) {
	broken := interceptor.Funcs{Create: func(context.Context, client.WithWatch, client.Object, ...client.CreateOption) error {
		return errors.New("the wire is cut")
	}}
	w := newWorld(t, policyP(false), broken)
	r, patch := w.send(t, named(svc(clusterIP)), false)
	if !r.Allowed {
		t.Fatal(r.Result)
	}
	contains(t, patch, `"value":["10.96.0.1"]`)
	contains(t, strings.Join(r.Warnings, ""), "the wire is cut", "the Service gets 10.96.0.1, which no policy declares")

	w = newWorld(t, policyP(true), broken)
	if r, _ = w.send(t, named(svc(clusterIP)), false); r.Allowed || r.Result.Code != http.StatusServiceUnavailable {
		t.Errorf("got %+v", r)
	}
}

// A request is answered before the API server gives the webhook up, whatever hangs.
func TestDeadline(t *testing.T) {
	hang := func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, policyP(true), interceptor.Funcs{
			Create: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.CreateOption) error {
				if lockOf(obj.GetName()).IsPort() {
					return c.Create(ctx, obj, opts...)
				}
				return hang(ctx)
			},
			Get: func(ctx context.Context, _ client.WithWatch, _ client.ObjectKey, _ client.Object, _ ...client.GetOption) error {
				return hang(ctx)
			},
			Delete: func(ctx context.Context, _ client.WithWatch, _ client.Object, _ ...client.DeleteOption) error {
				return hang(ctx)
			},
		})
		began := time.Now()
		r, _ := w.send(t, named(svc(nodePort)), false)
		if took := time.Since(began); took >= 3*time.Second || r.Allowed {
			t.Errorf("answered %v after %s", r.Allowed, took)
		}
	})
}

func TestPolicyUnknown(t *testing.T) {
	w := newWorld(t, nil, interceptor.Funcs{})
	w.unknown = errors.New("not all was read yet")
	r, patch := w.send(t, named(svc(nodePort)), false)
	if !r.Allowed {
		t.Fatal(r.Result)
	}
	contains(t, patch, "10.96.0.1", "30001")
	contains(t, strings.Join(r.Warnings, ""), "which policy covers the Service cannot be told now (not all was read yet)")

	w.unknown, w.families = nil, nil
	if r, patch = w.send(t, named(svc(nodePort)), false); !r.Allowed || patch != "" || len(r.Warnings) != 1 {
		t.Errorf("got %+v", r)
	}
	w.proposals.policy = policyP(true)
	if r, _ = w.send(t, named(svc(nodePort)), false); r.Allowed || r.Result.Code != http.StatusServiceUnavailable {
		t.Errorf("got %+v", r)
	}
}

func TestNoGaps(t *testing.T) {
	p := policyP(false)
	p.Ranges = p.Ranges[1:] // IPv6 only
	w := newWorld(t, p, interceptor.Funcs{})
	w.free[""][v1alpha1.IPv4] = nil // the API server chooses IPv4 itself
	r, patch := w.send(t, named(svc(clusterIP, stack(require, "IPv4", "IPv6"))), false)
	if !r.Allowed || patch != "" {
		t.Errorf("got %v %s", r.Allowed, patch)
	}
	expect(t, w.all(t), nil)

	w.free["p"][v1alpha1.IPv6] = grants(second6)
	r, patch = w.send(t, named(svc(clusterIP, stack(require))), false)
	if !r.Allowed {
		t.Fatal(r.Result)
	}
	contains(t, patch, `"path":"/spec/clusterIPs","value":["fd00:9::1"]`) // and IPv4 after it, by the API server
}

func TestNothingToDo(t *testing.T) {
	w := newWorld(t, nil, interceptor.Funcs{})
	w.free = nil // the API server cannot choose what a policy declares, so it may choose
	for name, s := range map[string]*corev1.Service{"plain": svc(clusterIP), "headless": svc(clusterIP, ips("None")), "ExternalName": svc(external), "refused": svc(clusterIP, stack(require, "IPv4", "IPv4"))} {
		if r, patch := w.send(t, named(s), false); !r.Allowed || patch != "" || len(r.Warnings) > 0 {
			t.Errorf("%s: got %+v", name, r)
		}
	}
	deleted := named(svc(nodePort))
	deleted.DeletionTimestamp = &metav1.Time{Time: time.Now()}
	w = newWorld(t, policyP(true), interceptor.Funcs{})
	if r, patch := w.send(t, deleted, false); !r.Allowed || patch != "" {
		t.Errorf("deleted: got %+v", r)
	}
	copied := named(svc(external))
	copied.Annotations = map[string]string{v1alpha1.AnnotationReservation: "x", v1alpha1.AnnotationSingleStack: "y"}
	_, patch := w.send(t, copied, false)
	contains(t, patch, `{"op":"remove","path":"/metadata/annotations/networking.serviceproxy.io~1reservation"}`, `{"op":"remove","path":"/metadata/annotations/networking.serviceproxy.io~1single-stack-reason"}`)
}
