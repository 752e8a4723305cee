// Package oracle holds agent/compile against kube-proxy's own code: random Services, EndpointSlices and Nodes go through both, and what a node would do with
// the traffic of each must be the same.
//
// The whole way is compared: from the Service to its assignment to the compiled service on our side, from kube-proxy's change trackers to CategorizeEndpoints
// on the other. Where the two differ on purpose the generator makes no such input, and says so in a comment that begins with "Exception:".
package oracle

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/proxy"
	"pgregory.net/rapid"

	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers"
)

func TestMain(m *testing.M) {
	klog.SetLogger(logr.Discard()) // kube-proxy's code comments on every odd input
	flag.Parse()
	if !slices.ContainsFunc(os.Args, func(s string) bool { return strings.HasPrefix(strings.TrimLeft(s, "-"), "rapid.checks") }) {
		flag.Set("rapid.checks", "5000") // the flag is rapid's, and a number
	}
	m.Run()
}

// TestAgainstKubeProxy compares some thousand worlds; -rapid.checks says how many.
func TestAgainstKubeProxy(t *testing.T) { rapid.Check(t, compare) }

// FuzzAgainstKubeProxy looks for worlds that the test is not lucky enough to meet.
func FuzzAgainstKubeProxy(f *testing.F) { f.Fuzz(rapid.MakeFuzz(compare)) }

// world is what both are given.
type world struct {
	service *corev1.Service
	slices  []*discoveryv1.EndpointSlice
	node    *corev1.Node
}

func compare(t *rapid.T) {
	w := drawWorld(t)
	ours := w.ours(t)
	for _, family := range []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol} {
		theirs, endpoints := w.theirs(family)
		if got := portsIn(ours, family); got != len(theirs) {
			t.Fatalf("%s: %d ports, kube-proxy has %d", family, got, len(theirs))
		}
		for name, port := range theirs {
			p := port.(*proxy.BaseServicePortInfo)
			i := slices.IndexFunc(ours, func(s *forwarding.Service) bool {
				return int(s.Key.Port) == p.Port() && s.Key.Protocol.String() == string(p.Protocol())
			})
			if i < 0 {
				t.Fatalf("%s: %s is missing", family, name)
			}
			if err := w.comparePort(ours[i], p, endpoints[name], family); err != nil {
				t.Fatalf("%s %s: %v", family, name, err)
			}
		}
		checked := compile.HealthCheckOf(w.assignment(t), w.parsedSlices(t), w.parsedNode(t))
		if want := theirs.HealthCheckNodePorts()[w.name()]; len(theirs) > 0 && checked.Port != want {
			t.Fatalf("%s: the health check is at port %d, kube-proxy's at %d", family, checked.Port, want)
		}
	}
	w.compareHealth(t)
}

// compareHealth compares how many endpoints a load balancer is told of. Exception: kube-proxy answers for the family of the address that was asked, we for the
// Service as a whole, with the family that has more.
func (w *world) compareHealth(t *rapid.T) {
	check := compile.HealthCheckOf(w.assignment(t), w.parsedSlices(t), w.parsedNode(t))
	if check.Port == 0 {
		return
	}
	want := 0
	for _, family := range []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol} {
		want = max(want, w.endpoints(family).LocalReadyEndpoints()[w.name()])
	}
	if check.Endpoints != want {
		t.Fatalf("the health check counts %d endpoints, kube-proxy %d", check.Endpoints, want)
	}
}

func (w *world) name() types.NamespacedName {
	return types.NamespacedName{Namespace: w.service.Namespace, Name: w.service.Name}
}

// ours is what our controller and agent make of the world.
func (w *world) ours(t *rapid.T) []*forwarding.Service {
	return compile.Services(w.assignment(t), w.parsedSlices(t), w.parsedNode(t))
}

func (w *world) assignment(t *rapid.T) *compile.Assignment {
	policy := &v1alpha1.ServiceProxyPolicy{}
	in := &v1alpha1.ServiceAssignment{ObjectMeta: w.service.ObjectMeta, Spec: controllers.CompileAssignment(w.service, policy, nil, nil)}
	out, problems := compile.ParseAssignment(in)
	if len(problems) > 0 {
		t.Fatalf("the assignment of a valid Service has problems: %v", problems)
	}
	return out
}

func (w *world) parsedSlices(t *rapid.T) (out []*compile.Slice) {
	for _, in := range w.slices {
		s, problems := compile.ParseSlice(in, w.node.Name)
		if len(problems) > 0 {
			t.Fatalf("a valid EndpointSlice has problems: %v", problems)
		}
		out = append(out, s)
	}
	return out
}

func (w *world) parsedNode(t *rapid.T) *compile.Node {
	out, problems := compile.ParseNode(w.node)
	if len(problems) > 0 {
		t.Fatalf("a valid Node has problems: %v", problems)
	}
	return out
}

// theirs is what kube-proxy's trackers make of the world in one family.
func (w *world) theirs(family corev1.IPFamily) (proxy.ServicePortMap, proxy.EndpointsMap) {
	tracker := proxy.NewServiceChangeTracker(family, nil, nil)
	tracker.Update(nil, w.service)
	ports := proxy.ServicePortMap{}
	ports.Update(tracker)
	return ports, w.endpoints(family)
}

func (w *world) endpoints(family corev1.IPFamily) proxy.EndpointsMap {
	tracker := proxy.NewEndpointsChangeTracker(family, w.node.Name, nil, nil)
	for _, s := range w.slices {
		tracker.EndpointSliceUpdate(s, false)
	}
	endpoints := proxy.EndpointsMap{}
	endpoints.Update(tracker)
	return endpoints
}

// portsIn counts the ports that can be reached in a family. kube-proxy knows a Service in the families of its cluster IPs.
func portsIn(list []*forwarding.Service, family corev1.IPFamily) (n int) {
	for _, s := range list {
		if len(only(s.ServiceIPs, family)) > 0 {
			n++
		}
	}
	return n
}

func (w *world) comparePort(s *forwarding.Service, p *proxy.BaseServicePortInfo, endpoints []proxy.Endpoint, family corev1.IPFamily) error {
	cluster, local, _, anywhere := proxy.CategorizeEndpoints(endpoints, p, w.node.Name, w.node.Labels)
	internal, external := cluster, cluster
	if p.InternalPolicyLocal() {
		internal = local
	}
	if p.ExternalPolicyLocal() {
		external = local
	}
	if err := sameTarget(s.Internal, internal, anywhere, family); err != nil {
		return fmt.Errorf("from inside: %w", err)
	}
	if p.ExternallyAccessible() {
		if err := sameTarget(s.External, external, anywhere, family); err != nil {
			return fmt.Errorf("from outside: %w", err)
		}
		if err := sameTarget(s.ExternalFromHere, cluster, anywhere, family); err != nil {
			return fmt.Errorf("from here to an external address: %w", err)
		}
		if s.PreserveSource != p.ExternalPolicyLocal() {
			return fmt.Errorf("PreserveSource is %v", s.PreserveSource)
		}
	}
	return samePort(s, p, family)
}

// sameTarget compares where traffic of one family goes. kube-proxy drops where it has endpoints but none that may be used, and rejects where it has none.
func sameTarget(ours forwarding.Target, theirs []proxy.Endpoint, anywhere bool, family corev1.IPFamily) error {
	bit := forwarding.IPv4
	if family == corev1.IPv6Protocol {
		bit = forwarding.IPv6
	}
	action := forwarding.Forward
	switch {
	case len(theirs) == 0 && anywhere:
		action = forwarding.Drop
	case len(theirs) == 0:
		action = forwarding.Reject
	}
	if got := ours.Action(bit); got != action {
		return fmt.Errorf("action %d, kube-proxy's is %d", got, action)
	}
	var got []forwarding.Endpoint
	for _, e := range ours.Endpoints {
		if forwarding.FamilyOf(e.AddrPort.Addr()) == bit {
			got = append(got, e)
		}
	}
	var want []forwarding.Endpoint
	for _, e := range theirs {
		want = append(want, forwarding.Endpoint{AddrPort: netip.MustParseAddrPort(e.String()), Local: e.IsLocal()})
	}
	slices.SortFunc(want, forwarding.Endpoint.Compare)
	if !slices.Equal(got, want) {
		return fmt.Errorf("endpoints %v, kube-proxy's are %v", got, want)
	}
	return nil
}

// samePort compares all of a port but its endpoints.
func samePort(s *forwarding.Service, p *proxy.BaseServicePortInfo, family corev1.IPFamily) error {
	var external, guarded []netip.Addr
	for _, ip := range p.ExternalIPs() {
		external = append(external, addr(ip.String()))
	}
	for _, ip := range p.LoadBalancerVIPs() {
		external = append(external, addr(ip.String()))
		if len(p.LoadBalancerSourceRanges()) > 0 {
			guarded = append(guarded, addr(ip.String()))
		}
	}
	var ranges []netip.Prefix
	for _, r := range p.LoadBalancerSourceRanges() {
		ranges = append(ranges, netip.MustParsePrefix(r.String()))
	}
	guards := onlyRanges(s.SourceRanges, family)
	if len(guarded) == 0 {
		guards, ranges = nil, nil // ranges that guard nothing mean nothing
	}
	var affinity time.Duration
	if p.SessionAffinityType() == corev1.ServiceAffinityClientIP {
		affinity = time.Duration(p.StickyMaxAgeSeconds()) * time.Second
	}
	for _, c := range []struct {
		what      string
		got, want any
	}{
		{"service IPs", only(s.ServiceIPs, family), []netip.Addr{addr(p.ClusterIP().String())}},
		{"external IPs", only(s.ExternalIPs, family), set(external, netip.Addr.Compare)},
		{"guarded load-balancer IPs", only(s.LoadBalancerIPs, family), set(guarded, netip.Addr.Compare)},
		{"source ranges", guards, set(ranges, netip.Prefix.Compare)},
		{"node port", int(s.NodePort), p.NodePort()},
		{"affinity", s.Affinity, affinity},
	} {
		if got, want := fmt.Sprint(c.got), fmt.Sprint(c.want); got != want {
			return fmt.Errorf("%s %s, kube-proxy's are %s", c.what, got, want)
		}
	}
	return nil
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s).Unmap() }

func set[T comparable](list []T, compare func(T, T) int) []T {
	slices.SortFunc(list, compare)
	return slices.Compact(list)
}

func only(list []netip.Addr, family corev1.IPFamily) (out []netip.Addr) {
	for _, a := range list {
		if a.Is4() == (family == corev1.IPv4Protocol) {
			out = append(out, a)
		}
	}
	return out
}

func onlyRanges(list []netip.Prefix, family corev1.IPFamily) (out []netip.Prefix) {
	for _, p := range list {
		if p.Addr().Is4() == (family == corev1.IPv4Protocol) {
			out = append(out, p)
		}
	}
	return out
}
