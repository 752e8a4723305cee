package audit

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

var now = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func service(namespace, name string, ips []string, ports ...int32) corev1.Service {
	svc := corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID("uid-of-" + name)},
		Spec: corev1.ServiceSpec{ClusterIPs: ips}}
	for _, p := range ports {
		svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{NodePort: p})
	}
	return svc
}

func ipAddress(name, service string) networkingv1.IPAddress {
	return networkingv1.IPAddress{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{networkingv1.LabelManagedBy: "ipallocator.k8s.io"}},
		Spec: networkingv1.IPAddressSpec{ParentRef: &networkingv1.ParentReference{Resource: "services", Namespace: "t", Name: service}}}
}

func claim(text, service string, use v1alpha1.ClaimUse) v1alpha1.AllocationClaim {
	lock, err := allocator.ParseName(text)
	if err != nil {
		lock = allocator.AddrLock(netip.MustParseAddr(text))
	}
	return *allocator.NewClaim(lock, allocator.Hold{Policy: "p", Use: use, State: v1alpha1.ClaimBound,
		Holder: allocator.Holder{Namespace: "t", Name: service, UID: "uid-of-" + service}})
}

// sound is a world without faults: a Service with everything, one with an additional address, one of nobody, and a claim that rests.
func sound() World {
	local := service("t", "local", []string{"10.1.0.2"}, 30003)
	local.Spec.HealthCheckNodePort = 30004
	reserved := ipAddress("10.1.0.9", "older")
	reserved.Labels[networkingv1.LabelManagedBy] = v1alpha1.ManagedBy
	resting := claim("10.1.0.7", "gone", v1alpha1.ClaimUseClusterIP)
	allocator.Release(&resting, now.Add(time.Minute))
	return World{
		Now: now,
		Tenants: []Tenant{{Namespace: "t", Policy: "p", Ports: [2]uint16{30000, 30009},
			Prefixes: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd00:1::/112")}}},
		Services: []corev1.Service{
			service("t", "web", []string{"10.1.0.1", "fd00:1::1"}, 30001, 30001, 0), // TCP and UDP of one port
			local,
			service("t", "older", []string{"10.96.0.1"}, 31000),
			service("t", "headless", []string{"None"}),
			service("other", "foreign", []string{"10.1.0.200"}, 30009),
		},
		Claims: []v1alpha1.AllocationClaim{
			claim("10.1.0.1", "web", v1alpha1.ClaimUseClusterIP), claim("fd00:1::1", "web", v1alpha1.ClaimUseClusterIP),
			claim("nodeport-30001", "web", v1alpha1.ClaimUseNodePort),
			claim("10.1.0.2", "local", v1alpha1.ClaimUseClusterIP), claim("nodeport-30003", "local", v1alpha1.ClaimUseNodePort),
			claim("nodeport-30004", "local", v1alpha1.ClaimUseHealthCheckNodePort),
			claim("10.1.0.9", "older", v1alpha1.ClaimUseAdditionalIP),
			resting,
		},
		IPAddresses: []networkingv1.IPAddress{
			ipAddress("10.1.0.1", "web"), ipAddress("fd00:1::1", "web"), ipAddress("10.1.0.2", "local"), ipAddress("10.96.0.1", "older"),
			{ObjectMeta: metav1.ObjectMeta{Name: "10.1.0.200"}, Spec: networkingv1.IPAddressSpec{
				ParentRef: &networkingv1.ParentReference{Resource: "services", Namespace: "other", Name: "foreign"}}},
			reserved,
		},
	}
}

func TestASoundWorldHasNoFaults(t *testing.T) {
	w := sound()
	if got := w.Faults(); len(got) > 0 {
		t.Errorf("got %q", got)
	}
	if addresses, ports := w.Outside(); addresses != 1 || ports != 1 {
		t.Errorf("outside: %d addresses and %d ports, want one each", addresses, ports)
	}
	if got := w.Foreign(); got != 2 {
		t.Errorf("foreign: %d, want an address and a port", got)
	}
}

func TestEveryPlantedFaultIsFound(t *testing.T) {
	drop := func(name string) func(*World) {
		return func(w *World) {
			w.Claims = slices.DeleteFunc(w.Claims, func(c v1alpha1.AllocationClaim) bool { return c.Name == name })
		}
	}
	dropIP := func(name string) func(*World) {
		return func(w *World) {
			w.IPAddresses = slices.DeleteFunc(w.IPAddresses, func(ip networkingv1.IPAddress) bool { return ip.Name == name })
		}
	}
	edit := func(name string, change func(*v1alpha1.AllocationClaim)) func(*World) {
		return func(w *World) {
			i := slices.IndexFunc(w.Claims, func(c v1alpha1.AllocationClaim) bool { return c.Name == name })
			change(&w.Claims[i])
		}
	}
	add := func(c v1alpha1.AllocationClaim, change func(*v1alpha1.AllocationClaim)) func(*World) {
		if change != nil {
			change(&c)
		}
		return func(w *World) { w.Claims = append(w.Claims, c) }
	}
	for _, tt := range []struct {
		name  string
		plant func(*World)
		want  []string // one text of each fault
	}{
		{"one address of two Services", func(w *World) { w.Services[1].Spec.ClusterIPs[0] = "10.1.0.1" },
			[]string{"10.1.0.1: its Service has it not", "10.1.0.1: t/local has it, and its IPAddress", "10.1.0.1: t/local has it, and its claim",
				"10.1.0.1: t/web and t/local both", "10.1.0.2: an IPAddress, and no Service", "10.1.0.2: its Service has it not"}},
		{"one node port of two Services", func(w *World) { w.Services[4].Spec.Ports[0].NodePort = 30001 },
			[]string{"nodeport-30001: its Service has it not", "nodeport-30001: t/web and other/foreign both"}},
		{"an address without a claim", drop("10.1.0.1"), []string{"10.1.0.1: t/web has it without a claim"}},
		{"a node port without a claim", drop("nodeport-30001"), []string{"nodeport-30001: t/web has it without a claim"}},
		{"a claim on an earlier life", edit("10.1.0.1", func(c *v1alpha1.AllocationClaim) { c.Spec.Holder.UID = "earlier" }),
			[]string{"10.1.0.1: t/web has it, and its claim says", "10.1.0.1: there is no such Service"}},
		{"a reservation where it should be bound", edit("nodeport-30003", func(c *v1alpha1.AllocationClaim) { c.Spec.State = v1alpha1.ClaimReserved }),
			[]string{"nodeport-30003: left over", "nodeport-30003: t/local has it, and its claim says Reserved"}},
		{"the wrong use", edit("nodeport-30004", func(c *v1alpha1.AllocationClaim) { c.Spec.Use = v1alpha1.ClaimUseNodePort }),
			[]string{"nodeport-30004: t/local has it, and its claim says Bound NodePort"}},
		{"the wrong policy", edit("10.1.0.2", func(c *v1alpha1.AllocationClaim) { c.Spec.PolicyName = "q" }), []string{"10.1.0.2: t/local has it, and its claim says"}},
		{"no label", edit("10.1.0.2", func(c *v1alpha1.AllocationClaim) { c.Labels = nil }), []string{"10.1.0.2: its claim is labelled"}},
		{"a reservation that came to nothing", add(claim("10.1.0.50", "never", v1alpha1.ClaimUseClusterIP), func(c *v1alpha1.AllocationClaim) {
			c.Spec.State, c.Spec.Holder.UID = v1alpha1.ClaimReserved, ""
		}), []string{"10.1.0.50: left over, its claim says Reserved"}},
		{"a claim of a Service that is gone", add(claim("nodeport-30005", "gone", v1alpha1.ClaimUseNodePort), nil), []string{"nodeport-30005: there is no such Service"}},
		{"a claim on what its Service has not", add(claim("10.1.0.51", "web", v1alpha1.ClaimUseClusterIP), nil), []string{"10.1.0.51: its Service has it not"}},
		{"a rest without end", edit("10.1.0.7", func(c *v1alpha1.AllocationClaim) { c.Spec.ExpiresAt.Time = now.Add(-time.Minute) }), []string{"10.1.0.7: left over, its claim says Released"}},
		{"nothing of the policy's", func(w *World) { drop("10.1.0.9")(w); dropIP("10.1.0.9")(w) }, []string{"t/older has 10.96.0.1 and no address that policy p declares"}},
		{"an additional address that is not reserved", dropIP("10.1.0.9"), []string{"10.1.0.9: not reserved with the API server"}},
		{"an additional address that is not recorded", drop("10.1.0.9"), []string{"10.1.0.9: reserved with the API server without a claim", "t/older has 10.96.0.1 and no"}},
		{"an IPAddress of nobody", func(w *World) { w.IPAddresses = append(w.IPAddresses, ipAddress("10.1.0.77", "gone")) }, []string{"10.1.0.77: an IPAddress, and no Service has it"}},
		{"an address without IPAddress", dropIP("10.96.0.1"), []string{"10.96.0.1: t/older has it without an IPAddress"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := sound()
			tt.plant(&w)
			got := w.Faults()
			if !slices.EqualFunc(got, tt.want, strings.HasPrefix) {
				t.Errorf("got faults\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
			}
		})
	}
}

func TestATrailFindsWhatWasLetGoTooEarly(t *testing.T) {
	released := func(c v1alpha1.AllocationClaim) *v1alpha1.AllocationClaim { allocator.Release(&c, now); return &c }
	web, next := claim("10.1.0.1", "web", v1alpha1.ClaimUseClusterIP), claim("10.1.0.1", "next", v1alpha1.ClaimUseClusterIP)
	reserved := claim("10.1.0.1", "web", v1alpha1.ClaimUseClusterIP)
	reserved.Spec.State, reserved.Spec.Holder.UID = v1alpha1.ClaimReserved, ""
	type event struct {
		is    watch.EventType
		claim *v1alpha1.AllocationClaim
	}
	for _, tt := range []struct {
		name   string
		events []event
		faults int // while the Service lives
		ended  int // when it was deleted first
	}{
		{"nothing happens", []event{{watch.Added, &reserved}, {watch.Modified, &web}, {watch.Modified, &web}}, 0, 0},
		{"a reservation goes", []event{{watch.Added, &reserved}, {watch.Deleted, &reserved}}, 0, 0},
		{"it is released", []event{{watch.Added, &web}, {watch.Modified, released(web)}, {watch.Deleted, released(web)}}, 1, 0},
		{"it is deleted", []event{{watch.Added, &web}, {watch.Deleted, &web}}, 1, 0},
		{"it is given to another", []event{{watch.Added, &web}, {watch.Modified, &next}}, 1, 0},
		{"it is given to another, and again", []event{{watch.Added, &web}, {watch.Modified, &next}, {watch.Deleted, &next}}, 2, 1},
	} {
		for _, ended := range []bool{false, true} {
			var trail Trail
			want := tt.faults
			if ended {
				trail.Ending(web.Spec.Holder.UID)
				want = tt.ended
			}
			for _, e := range tt.events {
				trail.See(e.is, e.claim)
			}
			if got := trail.Faults(); len(got) != want {
				t.Errorf("%s, Service deleted first %t: got %d faults %q, want %d", tt.name, ended, len(got), got, want)
			}
		}
	}
}
