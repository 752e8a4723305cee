package controllers

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// errHeldElsewhere says that somebody else holds a lock that this Service should have. It passes: the retry decides anew.
var errHeldElsewhere = errors.New("held by another Service")

// maxAttempts bounds how many addresses one reconcile tries when others keep getting there first.
const maxAttempts = 32

// adoptable lists what the API server gave the Service from what the policy declares.
func adoptable(svc *corev1.Service, policy *allocator.Policy) map[allocator.Lock]v1alpha1.ClaimUse {
	out := map[allocator.Lock]v1alpha1.ClaimUse{}
	for _, a := range clusterAddrs(svc) {
		if r := policy.RangeOf(a); r != nil && r.Use == v1alpha1.RangeUseClusterIP {
			out[allocator.AddrLock(a)] = v1alpha1.ClaimUseClusterIP
		}
	}
	for _, lock := range nodePorts(svc) {
		if !policy.NodePorts.Contains(lock.Port) {
			continue
		}
		out[lock] = v1alpha1.ClaimUseNodePort
		if int32(lock.Port) == svc.Spec.HealthCheckNodePort {
			out[lock] = v1alpha1.ClaimUseHealthCheckNodePort
		}
	}
	return out
}

// owed lists the families of which the policy gives a Service an address of its own, but the API server did not.
func owed(svc *corev1.Service, policy *allocator.Policy) []v1alpha1.IPFamily {
	var out []v1alpha1.IPFamily
	for _, a := range clusterAddrs(svc) {
		family := allocator.FamilyOf(a)
		if r := policy.RangeOf(a); r != nil && r.Use == v1alpha1.RangeUseClusterIP {
			continue
		}
		if policy.Gives(family) {
			out = append(out, family)
		}
	}
	return out
}

func holderOf(svc *corev1.Service) allocator.Holder {
	return allocator.Holder{Namespace: svc.Namespace, Name: svc.Name, UID: string(svc.UID)}
}

// additionalOf finds the additional addresses that a Service keeps: one per family that it has, the one its assignment shows if several
// were taken by racing replicas. They are kept even where the policy no longer declares or owes them: a valid address is never moved.
//
// An empty policy stands for any: what the Service has in its assignment, whoever gave it.
func additionalOf(svc *corev1.Service, policy string, held map[allocator.Lock]allocator.Hold, assignment *v1alpha1.ServiceAssignment) map[v1alpha1.IPFamily]netip.Addr {
	assigned := map[string]bool{}
	if assignment != nil {
		for _, ip := range assignment.Spec.ServiceIPs {
			assigned[ip.IP] = true
		}
	}
	out := map[v1alpha1.IPFamily]netip.Addr{}
	for lock, hold := range held {
		if hold.Use != v1alpha1.ClaimUseAdditionalIP || hold.State != v1alpha1.ClaimBound || hold.Holder != holderOf(svc) {
			continue
		}
		if policy == "" && !assigned[lock.Addr.String()] || policy != "" && hold.Policy != policy {
			continue
		}
		family := allocator.FamilyOf(lock.Addr)
		if !slices.ContainsFunc(clusterAddrs(svc), func(a netip.Addr) bool { return allocator.FamilyOf(a) == family }) {
			continue
		}
		best, several := out[family]
		better := lock.Addr.Less(best)
		if a, b := assigned[lock.Addr.String()], assigned[best.String()]; a != b {
			better = a
		}
		if !several || better {
			out[family] = lock.Addr
		}
	}
	return out
}

// allocate records what the API server gave, and takes what else the policy owes. It returns the additional addresses of the Service, and why it has not all
// that it is owed, if so. Held beats new: what exists is claimed before anything is granted.
func (r *serviceReconciler) allocate(ctx context.Context, svc *corev1.Service, policy *allocator.Policy, assignment *v1alpha1.ServiceAssignment) (additional []netip.Addr, shortage, err error) {
	for lock, use := range adoptable(svc, policy) {
		if err := r.adopt(ctx, svc, lock, use, policy.Name); err != nil {
			return nil, nil, err
		}
	}
	held, err := r.rebuild(ctx, svc, policy, assignment)
	if err != nil {
		return nil, nil, err
	}
	have := additionalOf(svc, policy.Name, held, assignment)
	former := additionalOf(svc, "", held, assignment)
	for family, addr := range have {
		ok, err := r.reserve(ctx, svc, addr)
		if err != nil {
			return nil, nil, err
		}
		if !ok { // somebody removed our reservation and the address went to another Service
			ctrl.LoggerFrom(ctx).Info("An additional address was lost to another holder", "address", addr)
			if err := r.forget(ctx, allocator.AddrLock(addr), holderOf(svc)); err != nil {
				return nil, nil, err
			}
			delete(have, family)
			delete(former, family)
		}
	}
	var short []error
	for _, family := range owed(svc, policy) {
		if _, ok := have[family]; ok {
			continue
		}
		addr, err := r.takeAdditional(ctx, svc, policy.Name, family)
		switch {
		case isShortage(err):
			short = append(short, err)
			if addr, ok := former[family]; ok { // of the policy that covered it before: its traffic goes on until it has another
				have[family] = addr
			}
		case err != nil:
			return nil, nil, err
		default:
			have[family] = addr
		}
	}
	for _, addr := range have {
		additional = append(additional, addr)
	}
	return sortedAddrs(additional), errors.Join(short...), nil
}

// lostOf finds the additional addresses, one per family, that a Service has though no claim says so: its assignment shows them to the agents, or a reservation of ours
// keeps them for its name. held are the locks of that name, claimed says what a claim on any lock says. The value is the policy that gave the address.
func lostOf(svc *corev1.Service, policy *allocator.Policy, held map[allocator.Lock]allocator.Hold, assignment *v1alpha1.ServiceAssignment, reserved []netip.Addr,
	claimed func(allocator.Lock) (allocator.Hold, bool)) map[netip.Addr]string {
	missing := map[v1alpha1.IPFamily]bool{}
	for _, a := range clusterAddrs(svc) {
		missing[allocator.FamilyOf(a)] = true
	}
	for _, kept := range []map[v1alpha1.IPFamily]netip.Addr{additionalOf(svc, policy.Name, held, assignment), additionalOf(svc, "", held, assignment)} {
		for family := range kept {
			delete(missing, family)
		}
	}
	out := map[netip.Addr]string{}
	if assignment != nil && assignment.Spec.ServiceUID == svc.UID && isOurs(assignment.Labels) {
		for _, ip := range assignment.Spec.ServiceIPs {
			addr, err := netip.ParseAddr(ip.IP)
			if err != nil || ip.Source != v1alpha1.ServiceIPSourceAdditional || !missing[allocator.FamilyOf(addr)] {
				continue
			}
			if hold, ok := claimed(allocator.AddrLock(addr)); !ok || hold.State == v1alpha1.ClaimReleased && hold.Holder == holderOf(svc) {
				out[addr] = assignment.Spec.PolicyName
				delete(missing, allocator.FamilyOf(addr))
			}
		}
	}
	for _, addr := range reserved {
		r := policy.RangeOf(addr)
		if _, ok := claimed(allocator.AddrLock(addr)); !ok && missing[allocator.FamilyOf(addr)] && r != nil && r.Use == v1alpha1.RangeUseClusterIP {
			out[addr] = policy.Name
			delete(missing, allocator.FamilyOf(addr))
		}
	}
	return out
}

// rebuild takes the claims on a Service's additional addresses again that were lost: somebody deleted them, or restored the cluster without them. An address does not
// move for that. It returns the locks of the Service's name.
func (r *serviceReconciler) rebuild(ctx context.Context, svc *corev1.Service, policy *allocator.Policy, assignment *v1alpha1.ServiceAssignment) (map[allocator.Lock]allocator.Hold, error) {
	key := client.ObjectKeyFromObject(svc)
	held := r.ledger.heldBy(key)
	lost := lostOf(svc, policy, held, assignment, r.ledger.reservedFor(key), r.ledger.held)
	if len(lost) == 0 {
		return held, nil
	}
	for addr, giver := range lost {
		lock := allocator.AddrLock(addr)
		hold := allocator.Hold{Policy: giver, Use: v1alpha1.ClaimUseAdditionalIP, State: v1alpha1.ClaimBound, Holder: holderOf(svc)}
		resting := r.ledger.claim(lock) != nil
		r.ledger.taking(lock, hold)
		if err := r.take(ctx, allocator.Grant{Lock: lock, Reclaim: resting}, hold); err != nil {
			// If the claim exists by now, the informer is about to show whose it is.
			r.ledger.abandon(lock)
			return nil, fmt.Errorf("rebuild claim %s: %w", lock, err)
		}
		r.ledger.took(lock, hold)
		ctrl.LoggerFrom(ctx).Info("Rebuilt the lost claim on an additional address", "address", addr)
	}
	return r.ledger.heldBy(key), nil
}

// reservedFor says whether the claim was made at admission for a request from which the Service may have come. That the Service has the lock is then proof enough, and spares
// live reads at the rate of admission: were the Service gone since, its deletion would release the claim, and the write fails if the claim changed.
func reservedFor(claim *v1alpha1.AllocationClaim, svc *corev1.Service) bool {
	h := claim.Spec.Holder
	return isOurs(claim.Labels) && claim.Spec.State == v1alpha1.ClaimReserved && h.Namespace == svc.Namespace && (h.Name == "" || h.Name == svc.Name) && (h.UID == "" || h.UID == svc.UID)
}

// adopt makes the claim on what the API server gave the Service say so. The API server's own lock is the proof, so a claim of anybody else is out of date, unless it is
// an additional address on its way: its taker finds the IPAddress in place and lets go.
func (r *serviceReconciler) adopt(ctx context.Context, svc *corev1.Service, lock allocator.Lock, use v1alpha1.ClaimUse, policy string) error {
	want := allocator.Hold{Policy: policy, Use: use, State: v1alpha1.ClaimBound, Holder: holderOf(svc)}
	have, held := r.ledger.held(lock)
	if held && have == want {
		return nil
	}
	if cached := r.ledger.claim(lock); cached != nil && reservedFor(cached, svc) {
		return r.bind(ctx, lock, cached, want)
	}
	if !held {
		r.ledger.taking(lock, want)
		err := r.client.Create(ctx, allocator.NewClaim(lock, want))
		if err == nil {
			r.ledger.took(lock, want)
			return nil
		}
		r.ledger.abandon(lock)
		if !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("claim %s: %w", lock, err)
		}
	}
	var claim *v1alpha1.AllocationClaim
	if found, err := get(ctx, r.live, types.NamespacedName{Name: lock.Name()}, &claim); err != nil {
		return err
	} else if !found {
		return fmt.Errorf("claim %s: it was there a moment ago", lock)
	}
	if !isOurs(claim.Labels) {
		return nil // somebody wrote it by hand; the API server's lock holds without a record
	}
	have = allocator.HoldOf(claim)
	if have == want {
		return nil // the informer lags
	}
	if reservedFor(claim, svc) {
		return r.bind(ctx, lock, claim, want)
	}
	if have.State == v1alpha1.ClaimBound && have.Use == v1alpha1.ClaimUseAdditionalIP && have.Holder != want.Holder {
		return fmt.Errorf("claim %s: %w %s/%s", lock, errHeldElsewhere, have.Holder.Namespace, have.Holder.Name)
	}
	var live *corev1.Service
	if found, err := get(ctx, r.live, client.ObjectKeyFromObject(svc), &live); err != nil {
		return err
	} else if !found || live.UID != svc.UID || !slices.Contains(locksOf(live), lock) {
		return nil // this reconcile works on an old Service; an event is on its way
	}
	return r.bind(ctx, lock, claim, want)
}

// bind makes a claim, if it is still as it was read, say want.
func (r *serviceReconciler) bind(ctx context.Context, lock allocator.Lock, claim *v1alpha1.AllocationClaim, want allocator.Hold) error {
	updated := claim.DeepCopy()
	allocator.SetHold(updated, want)
	r.ledger.taking(lock, want)
	if err := r.client.Update(ctx, updated); err != nil {
		r.ledger.abandon(lock)
		return fmt.Errorf("claim %s: %w", lock, err)
	}
	r.ledger.took(lock, want)
	return nil
}

// locksOf are all addresses and node ports that the API server gave the Service.
func locksOf(svc *corev1.Service) []allocator.Lock {
	out := nodePorts(svc)
	for _, a := range clusterAddrs(svc) {
		out = append(out, allocator.AddrLock(a))
	}
	return out
}

// takeAdditional takes one address for the Service: the claim first, the IPAddress second. Whoever holds either already keeps it, and the
// next address is tried.
func (r *serviceReconciler) takeAdditional(ctx context.Context, svc *corev1.Service, policy string, family v1alpha1.IPFamily) (netip.Addr, error) {
	hold := allocator.Hold{Policy: policy, Use: v1alpha1.ClaimUseAdditionalIP, State: v1alpha1.ClaimBound, Holder: holderOf(svc)}
	var lost []allocator.Lock
	defer func() {
		for _, lock := range lost { // kept pending until now, so that the same address is not proposed twice
			r.ledger.abandon(lock)
		}
	}()
	for range maxAttempts {
		grant, err := r.ledger.grant(allocator.Request{Policy: policy, Family: family, Use: hold.Use, Holder: hold.Holder})
		if err != nil {
			return netip.Addr{}, err
		}
		err = r.take(ctx, grant, hold)
		if apierrors.IsAlreadyExists(err) || apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
			lost = append(lost, grant.Lock)
			continue
		}
		if err != nil {
			// Whether the claim was made is unknown: perhaps only the answer was lost. If it was, the informer brings it.
			r.ledger.abandon(grant.Lock)
			return netip.Addr{}, fmt.Errorf("claim %s: %w", grant.Lock, err)
		}
		r.ledger.took(grant.Lock, hold)
		ok, err := r.reserve(ctx, svc, grant.Lock.Addr)
		if err != nil {
			return netip.Addr{}, err
		}
		if ok {
			return grant.Lock.Addr, nil
		}
		if err := r.forget(ctx, grant.Lock, hold.Holder); err != nil {
			return netip.Addr{}, err
		}
	}
	return netip.Addr{}, fmt.Errorf("policy %s: others took %d addresses in a row first", policy, maxAttempts)
}

// take creates the claim, or takes over the one that rests for this Service.
func (r *serviceReconciler) take(ctx context.Context, grant allocator.Grant, hold allocator.Hold) error {
	if !grant.Reclaim {
		return r.client.Create(ctx, allocator.NewClaim(grant.Lock, hold))
	}
	resting := r.ledger.claim(grant.Lock)
	if resting == nil {
		return apierrors.NewNotFound(v1alpha1.GroupVersion.WithResource("allocationclaims").GroupResource(), grant.Lock.Name())
	}
	claim := resting.DeepCopy()
	allocator.SetHold(claim, hold)
	return r.client.Update(ctx, claim)
}

// reserve makes the IPAddress that keeps the API server from giving an additional address to anybody. It says false if somebody has it.
func (r *serviceReconciler) reserve(ctx context.Context, svc *corev1.Service, addr netip.Addr) (bool, error) {
	key := types.NamespacedName{Name: addr.String()}
	mine := func(ip *networkingv1.IPAddress) bool {
		holder, ours := ourReservation(ip)
		return ours && holder == client.ObjectKeyFromObject(svc) && ip.DeletionTimestamp == nil
	}
	var have *networkingv1.IPAddress
	if found, err := get(ctx, r.client, key, &have); err != nil || found && mine(have) {
		return err == nil, err
	}
	err := r.client.Create(ctx, &networkingv1.IPAddress{
		ObjectMeta: metav1.ObjectMeta{Name: key.Name, Labels: map[string]string{
			networkingv1.LabelIPAddressFamily: string(allocator.FamilyOf(addr)),
			networkingv1.LabelManagedBy:       v1alpha1.ManagedBy,
			v1alpha1.LabelManagedBy:           v1alpha1.ManagedBy,
		}},
		Spec: networkingv1.IPAddressSpec{ParentRef: &networkingv1.ParentReference{Resource: "services", Namespace: svc.Namespace, Name: svc.Name}},
	})
	if err == nil {
		return true, nil
	}
	if !apierrors.IsAlreadyExists(err) {
		return false, fmt.Errorf("reserve %s: %w", addr, err)
	}
	found, err := get(ctx, r.live, key, &have)
	if err == nil && !found {
		err = fmt.Errorf("reserve %s: its IPAddress came and went", addr)
	}
	return err == nil && mine(have), err
}

// forget deletes holder's claim on an address that turned out to be somebody else's, so it needs no rest. A process that was paused since it took the
// claim may find another's in its place, and leaves that alone.
func (r *serviceReconciler) forget(ctx context.Context, lock allocator.Lock, holder allocator.Holder) error {
	var claim *v1alpha1.AllocationClaim
	if found, err := get(ctx, r.live, types.NamespacedName{Name: lock.Name()}, &claim); err != nil || !found {
		return err
	}
	if hold := allocator.HoldOf(claim); hold.State != v1alpha1.ClaimBound || hold.Use != v1alpha1.ClaimUseAdditionalIP || hold.Holder != holder {
		return nil
	}
	if err := client.IgnoreNotFound(r.client.Delete(ctx, claim, exactly(claim))); err != nil {
		return fmt.Errorf("delete claim %s: %w", lock, err)
	}
	r.ledger.abandon(lock)
	return nil
}

// releaseSurplus releases what is held under the Service's name but is not, or no longer, its own. The cache only raises the suspicion; what is
// released is decided by live reads of the Service and its assignment.
func (r *serviceReconciler) releaseSurplus(ctx context.Context, key types.NamespacedName) error {
	var cached *corev1.Service
	if _, err := get(ctx, r.client, key, &cached); err != nil {
		return err
	}
	surplus, err := r.surplus(ctx, r.client, key, cached)
	if err != nil || len(surplus) == 0 {
		return err
	}
	var live *corev1.Service
	if _, err := get(ctx, r.live, key, &live); err != nil {
		return err
	}
	if surplus, err = r.surplus(ctx, r.live, key, live); err != nil {
		return err
	}
	for _, lock := range surplus {
		claim := r.ledger.claim(lock)
		if claim == nil { // this process took it a moment ago, and the informer has not brought it yet: nothing else would come back for it
			found, err := get(ctx, r.live, types.NamespacedName{Name: lock.Name()}, &claim)
			if err != nil {
				return err
			}
			if hold, held := r.ledger.held(lock); !found || !held || allocator.HoldOf(claim) != hold {
				continue
			}
		}
		rest := r.ledger.restFor(claim.Spec.PolicyName)
		if live != nil && slices.Contains(locksOf(live), lock) {
			rest = 0 // the Service left the policy with what the API server gave it: that is in use, and counts as foreign
		}
		if err := r.ledger.release(ctx, r.client, r.live, claim, rest); err != nil {
			return err
		}
	}
	return nil
}

// surplus lists the locks bound to the Service's name, or to an earlier Service of the name, that svc (nil if gone) does not own.
func (r *serviceReconciler) surplus(ctx context.Context, from client.Reader, key types.NamespacedName, svc *corev1.Service) ([]allocator.Lock, error) {
	held := r.ledger.heldBy(key)
	if len(held) == 0 {
		return nil, nil
	}
	keep := map[allocator.Lock]bool{}
	if svc != nil {
		var assignment *v1alpha1.ServiceAssignment
		if _, err := get(ctx, from, key, &assignment); err != nil {
			return nil, err
		}
		policy, _, err := r.covering(ctx, svc, assignment)
		if errors.Is(err, errPolicyInvalid) {
			return nil, nil // nothing is decided until it can be understood
		}
		if err != nil {
			return nil, err
		}
		if policy != nil {
			for lock := range adoptable(svc, policy) {
				keep[lock] = true
			}
			for _, lock := range locksOf(svc) { // also of a range that the policy declared once: it drains
				keep[lock] = keep[lock] || held[lock].Policy == policy.Name
			}
			for _, addr := range additionalOf(svc, policy.Name, held, assignment) {
				keep[allocator.AddrLock(addr)] = true
			}
			for _, addr := range vipsOf(svc, policy.Name, held, assignment) {
				keep[allocator.AddrLock(addr)] = true
			}
		}
		for _, addr := range append(shownVIPs(svc), assignedVIPs(svc, assignment)...) {
			keep[allocator.AddrLock(addr)] = true
		}
		if assignment != nil && assignment.Spec.ServiceUID == svc.UID && isOurs(assignment.Labels) {
			// Agents still forward these; the next reconcile takes them out of the assignment first.
			for _, ip := range assignment.Spec.ServiceIPs {
				if a, err := netip.ParseAddr(ip.IP); err == nil && ip.Source == v1alpha1.ServiceIPSourceAdditional {
					keep[allocator.AddrLock(a)] = true
				}
			}
		}
	}
	var out []allocator.Lock
	for lock, hold := range held {
		mine := svc != nil && hold.Holder.UID == string(svc.UID)
		if hold.State == v1alpha1.ClaimBound && !(mine && keep[lock]) {
			out = append(out, lock)
		}
	}
	slices.SortFunc(out, func(a, b allocator.Lock) int { return a.Addr.Compare(b.Addr) })
	return out, nil
}

// release lets go of a claim whose holder is known, by a live read, not to own it any more: first the reservation, so that a Released claim
// proves that there is none, then the claim, which rests for a while.
func (l *ledger) release(ctx context.Context, c client.Client, live client.Reader, claim *v1alpha1.AllocationClaim, rest time.Duration) error {
	if err := release(ctx, c, live, claim, rest); err != nil {
		return err
	}
	// The informer may never show what was made and let go while its watch was broken. If it has not shown the claim yet, nothing is held any more.
	if lock, err := allocator.ParseName(claim.Name); err == nil {
		l.abandon(lock)
	}
	return nil
}

// portRest is how long a node port rests at least. The API server frees it only after its Service is deleted or changed, and nothing shows when: whoever is given it
// in between is refused.
const portRest = 2 * time.Second

func release(ctx context.Context, c client.Client, live client.Reader, claim *v1alpha1.AllocationClaim, rest time.Duration) error {
	if !isOurs(claim.Labels) {
		return nil
	}
	if claim.Spec.Use == v1alpha1.ClaimUseAdditionalIP {
		var ip *networkingv1.IPAddress
		found, err := get(ctx, live, types.NamespacedName{Name: claim.Spec.Address}, &ip)
		if err != nil {
			return err
		}
		if holder, ours := ourReservationIf(found, ip); ours && holder.Namespace == claim.Spec.Holder.Namespace && holder.Name == claim.Spec.Holder.Name {
			// The reservation does not say which Service of the name it is for. If the claim is still the one that was judged, after the reservation was
			// read, then so was the reservation; else a later Service of the name has both by now.
			if err := unchanged(ctx, live, claim); err != nil {
				return err
			}
			if err := client.IgnoreNotFound(c.Delete(ctx, ip, exactly(ip))); err != nil {
				return fmt.Errorf("delete reservation %s: %w", ip.Name, err)
			}
		}
	}
	if claim.Spec.NodePort != 0 {
		rest = max(rest, portRest)
	}
	if rest <= 0 {
		if err := client.IgnoreNotFound(c.Delete(ctx, claim, exactly(claim))); err != nil {
			return fmt.Errorf("delete claim %s: %w", claim.Name, err)
		}
		return nil
	}
	released := claim.DeepCopy()
	allocator.Release(released, time.Now().Add(rest))
	if err := client.IgnoreNotFound(c.Update(ctx, released)); err != nil {
		return fmt.Errorf("release claim %s: %w", claim.Name, err)
	}
	return nil
}

// unchanged fails with a conflict if the claim is not what the API server has.
func unchanged(ctx context.Context, live client.Reader, claim *v1alpha1.AllocationClaim) error {
	var now *v1alpha1.AllocationClaim
	found, err := get(ctx, live, client.ObjectKeyFromObject(claim), &now)
	if err != nil {
		return err
	}
	if !found || now.UID != claim.UID || now.ResourceVersion != claim.ResourceVersion {
		return apierrors.NewConflict(v1alpha1.GroupVersion.WithResource("allocationclaims").GroupResource(), claim.Name, errors.New("it changed since it was judged"))
	}
	return nil
}

func ourReservationIf(found bool, ip *networkingv1.IPAddress) (types.NamespacedName, bool) {
	if !found {
		return types.NamespacedName{}, false
	}
	return ourReservation(ip)
}
