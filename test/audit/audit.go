// Package audit compares what Services have with what is recorded about it, and says where the two differ.
//
// It is written against the API and not against the controller: it derives everything anew from the objects.
package audit

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// Tenant is a namespace, all of whose Services one policy covers, and what that policy declares. No two tenants share anything.
type Tenant struct {
	Namespace, Policy string
	Prefixes          []netip.Prefix
	// Ports are the first and the last node port. Zero for none.
	Ports [2]uint16
}

func (t *Tenant) declares(lock allocator.Lock) bool {
	if lock.IsPort() {
		return t.Ports[0] <= lock.Port && lock.Port <= t.Ports[1]
	}
	return slices.ContainsFunc(t.Prefixes, func(p netip.Prefix) bool { return p.Contains(lock.Addr) })
}

// World is everything that matters at one moment.
type World struct {
	Tenants     []Tenant
	Services    []corev1.Service
	Claims      []v1alpha1.AllocationClaim
	IPAddresses []networkingv1.IPAddress
	// Now is the time by which a claim that rests has rested.
	Now time.Time
}

// Read reads the world. The lists are of slightly different moments, so only a world at rest is without faults.
func Read(ctx context.Context, from client.Reader, tenants []Tenant) (World, error) {
	var services corev1.ServiceList
	var claims v1alpha1.AllocationClaimList
	var addresses networkingv1.IPAddressList
	err := errors.Join(from.List(ctx, &services), from.List(ctx, &claims), from.List(ctx, &addresses))
	return World{Tenants: tenants, Services: services.Items, Claims: claims.Items, IPAddresses: addresses.Items, Now: time.Now()}, err
}

// overdue is how long after its time a claim that has rested may still be there.
const overdue = 10 * time.Second

// Faults are sorted. A world without any has, for each address and node port:
//   - at most one Service;
//   - if the Service's own policy declares it, one claim, that is Bound and names that very Service;
//   - no claim otherwise, but for claims that rest, and additional addresses, that are reserved with the API server;
//   - if it is an address, an IPAddress just if a Service has it.
//
// And every Service has an address that its policy declares in each family in which it has one at all and the policy any.
func (w World) Faults() []string {
	a := &auditor{World: w, owners: map[allocator.Lock]*corev1.Service{}, services: map[types.UID]*corev1.Service{},
		claims: map[string]*v1alpha1.AllocationClaim{}, addresses: map[string]*networkingv1.IPAddress{}}
	for i := range w.Claims {
		a.claims[w.Claims[i].Name] = &w.Claims[i]
	}
	for i := range w.IPAddresses {
		a.addresses[w.IPAddresses[i].Name] = &w.IPAddresses[i]
	}
	for i := range w.Services {
		a.ownership(&w.Services[i])
	}
	for i := range w.Services {
		a.service(&w.Services[i])
	}
	for i := range w.Claims {
		a.claim(&w.Claims[i])
	}
	for i := range w.IPAddresses {
		a.ipAddress(&w.IPAddresses[i])
	}
	slices.Sort(a.faults)
	return a.faults
}

// Outside counts the cluster IPs and node ports of tenants' Services that their policy does not declare although it declares others of the kind.
func (w World) Outside() (addresses, ports int) {
	for i := range w.Services {
		t := w.tenant(w.Services[i].Namespace)
		if t == nil {
			continue
		}
		for _, lock := range locksOf(&w.Services[i]) {
			switch {
			case t.declares(lock):
			case lock.IsPort() && t.Ports[1] != 0:
				ports++
			case !lock.IsPort() && t.hasFamily(lock.Addr):
				addresses++
			}
		}
	}
	return addresses, ports
}

// Foreign counts what tenants' policies declare and Services of others have.
func (w World) Foreign() (n int) {
	for i := range w.Services {
		for _, lock := range locksOf(&w.Services[i]) {
			for j := range w.Tenants {
				if t := &w.Tenants[j]; t.Namespace != w.Services[i].Namespace && t.declares(lock) {
					n++
				}
			}
		}
	}
	return n
}

func (w World) tenant(namespace string) *Tenant {
	for i := range w.Tenants {
		if w.Tenants[i].Namespace == namespace {
			return &w.Tenants[i]
		}
	}
	return nil
}

func (t *Tenant) hasFamily(a netip.Addr) bool {
	return slices.ContainsFunc(t.Prefixes, func(p netip.Prefix) bool { return p.Addr().Is4() == a.Is4() })
}

type auditor struct {
	World
	owners    map[allocator.Lock]*corev1.Service
	services  map[types.UID]*corev1.Service
	claims    map[string]*v1alpha1.AllocationClaim
	addresses map[string]*networkingv1.IPAddress
	faults    []string
}

func (a *auditor) fault(format string, args ...any) {
	a.faults = append(a.faults, fmt.Sprintf(format, args...))
}

func (a *auditor) ownership(svc *corev1.Service) {
	a.services[svc.UID] = svc
	for _, lock := range locksOf(svc) {
		if other := a.owners[lock]; other != nil {
			a.fault("%s: %s and %s both have it", lock.Name(), key(other), key(svc))
		}
		a.owners[lock] = svc
	}
}

func (a *auditor) service(svc *corev1.Service) {
	t := a.tenant(svc.Namespace)
	for _, lock := range locksOf(svc) {
		if !lock.IsPort() {
			if ip := a.addresses[lock.Addr.String()]; ip == nil {
				a.fault("%s: %s has it without an IPAddress", lock.Name(), key(svc))
			} else if !isFor(ip, svc.Namespace, svc.Name) {
				a.fault("%s: %s has it, and its IPAddress is another's", lock.Name(), key(svc))
			}
		}
		if t != nil && t.declares(lock) {
			a.recorded(lock, svc, t)
		}
	}
	if t == nil {
		return
	}
	for _, text := range svc.Spec.ClusterIPs {
		if own, err := netip.ParseAddr(text); err == nil && t.hasFamily(own) && !t.declares(allocator.AddrLock(own)) && !a.hasAdditional(svc, t, own) {
			a.fault("%s has %s and no address that policy %s declares", key(svc), own, t.Policy)
		}
	}
}

// recorded checks the claim on what a Service has and its policy declares.
func (a *auditor) recorded(lock allocator.Lock, svc *corev1.Service, t *Tenant) {
	claim := a.claims[lock.Name()]
	if claim == nil {
		a.fault("%s: %s has it without a claim", lock.Name(), key(svc))
		return
	}
	want := v1alpha1.AllocationClaimSpec{State: v1alpha1.ClaimBound, PolicyName: t.Policy, Use: v1alpha1.ClaimUseClusterIP,
		Holder: v1alpha1.ClaimHolder{Namespace: svc.Namespace, Name: svc.Name, UID: svc.UID}}
	if lock.IsPort() {
		want.Use = v1alpha1.ClaimUseNodePort
		if svc.Spec.HealthCheckNodePort == int32(lock.Port) {
			want.Use = v1alpha1.ClaimUseHealthCheckNodePort
		}
	}
	if have := claim.Spec; have.State != want.State || have.Holder != want.Holder || have.Use != want.Use || have.PolicyName != want.PolicyName {
		a.fault("%s: %s has it, and its claim says %s", lock.Name(), key(svc), says(claim))
	}
	if claim.Labels[v1alpha1.LabelManagedBy] != v1alpha1.ManagedBy || claim.Labels[v1alpha1.LabelPolicy] != t.Policy {
		a.fault("%s: its claim is labelled %v", lock.Name(), claim.Labels)
	}
}

// hasAdditional says whether the Service has an additional address of the family of own.
func (a *auditor) hasAdditional(svc *corev1.Service, t *Tenant, own netip.Addr) bool {
	return slices.ContainsFunc(a.Claims, func(c v1alpha1.AllocationClaim) bool {
		addr, err := netip.ParseAddr(c.Spec.Address)
		return err == nil && addr.Is4() == own.Is4() && t.declares(allocator.AddrLock(addr)) &&
			c.Spec.Use == v1alpha1.ClaimUseAdditionalIP && c.Spec.State == v1alpha1.ClaimBound && c.Spec.Holder.UID == svc.UID
	})
}

// claim checks that somebody stands behind a claim.
func (a *auditor) claim(c *v1alpha1.AllocationClaim) {
	lock, err := allocator.ParseName(c.Name)
	if err != nil {
		a.fault("%s: no claim has such a name", c.Name)
		return
	}
	switch c.Spec.State {
	case v1alpha1.ClaimReserved:
		a.fault("%s: left over, its claim says %s", c.Name, says(c))
	case v1alpha1.ClaimReleased:
		if c.Spec.ExpiresAt == nil || a.Now.After(c.Spec.ExpiresAt.Add(overdue)) {
			a.fault("%s: left over, its claim says %s until %v", c.Name, says(c), c.Spec.ExpiresAt)
		}
	case v1alpha1.ClaimBound:
		svc := a.services[c.Spec.Holder.UID]
		switch {
		case svc == nil || svc.Namespace != c.Spec.Holder.Namespace || svc.Name != c.Spec.Holder.Name:
			a.fault("%s: there is no such Service, and its claim says %s", c.Name, says(c))
		case c.Spec.Use == v1alpha1.ClaimUseAdditionalIP:
			if ip := a.addresses[c.Spec.Address]; ip == nil || ip.Labels[networkingv1.LabelManagedBy] != v1alpha1.ManagedBy || !isFor(ip, svc.Namespace, svc.Name) {
				a.fault("%s: not reserved with the API server, and its claim says %s", c.Name, says(c))
			}
		case c.Spec.Use == v1alpha1.ClaimUseLoadBalancerIP: // it is in the status of the Service, when it is programmed
		case a.owners[lock] != svc:
			a.fault("%s: its Service has it not, and its claim says %s", c.Name, says(c))
		}
	}
}

func (a *auditor) ipAddress(ip *networkingv1.IPAddress) {
	addr, err := netip.ParseAddr(ip.Name)
	if err != nil {
		a.fault("%s: no IPAddress has such a name", ip.Name)
		return
	}
	lock := allocator.AddrLock(addr)
	if ip.Labels[networkingv1.LabelManagedBy] != v1alpha1.ManagedBy {
		if svc := a.owners[lock]; svc == nil {
			a.fault("%s: an IPAddress, and no Service has it", ip.Name)
		}
		return
	}
	if c := a.claims[lock.Name()]; c == nil || c.Spec.State != v1alpha1.ClaimBound || c.Spec.Use != v1alpha1.ClaimUseAdditionalIP {
		a.fault("%s: reserved with the API server without a claim", ip.Name)
	}
}

// locksOf are all addresses and node ports that the API server gave the Service, each once.
func locksOf(svc *corev1.Service) []allocator.Lock {
	var out []allocator.Lock
	for _, text := range svc.Spec.ClusterIPs {
		if addr, err := netip.ParseAddr(text); err == nil { // else it is None
			out = append(out, allocator.AddrLock(addr))
		}
	}
	ports := []int32{svc.Spec.HealthCheckNodePort}
	for _, p := range svc.Spec.Ports {
		ports = append(ports, p.NodePort)
	}
	slices.Sort(ports)
	for _, port := range slices.Compact(ports) {
		if port != 0 {
			out = append(out, allocator.PortLock(uint16(port)))
		}
	}
	return out
}

func isFor(ip *networkingv1.IPAddress, namespace, name string) bool {
	ref := ip.Spec.ParentRef
	return ref != nil && ref.Resource == "services" && ref.Namespace == namespace && ref.Name == name
}

func key(svc *corev1.Service) string { return svc.Namespace + "/" + svc.Name }

func says(c *v1alpha1.AllocationClaim) string {
	h := c.Spec.Holder
	return strings.Join([]string{string(c.Spec.State), string(c.Spec.Use), "for", h.Namespace + "/" + h.Name, "of policy", c.Spec.PolicyName}, " ") +
		fmt.Sprintf(" (UID %q, made %s)", h.UID, c.CreationTimestamp.UTC().Format(time.TimeOnly))
}
