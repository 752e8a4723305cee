package controllers

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// A Service of our load-balancer class has one VIP of each of its families. The claim is the VIP's only lock: the API server knows nothing of load-balancer addresses.
// A VIP is born and dies in this order, so that an address which users can see is always one that nodes forward:
//
//	claim, assignment, every node's kernel, status.loadBalancer of the Service;    status, assignment, claim.
//
// A Service that is to have another VIP goes through both, first up, then down.

// Reasons of the condition Allocated for a request that cannot be met as it is.
const (
	reasonRequestInvalid      = "RequestInvalid"
	reasonAddressNotOffered   = "AddressNotOffered"
	reasonAddressInUse        = "AddressInUse"
	reasonNoLoadBalancerRange = "NoLoadBalancerRange"
)

// refusal says why a Service does not get a VIP. Only an edit of the Service or of its policy, or somebody else's release, ends it.
type refusal struct{ reason, message string }

func (e *refusal) Error() string { return e.message }

func refuse(reason, format string, args ...any) error {
	return &refusal{reason, fmt.Sprintf(format, args...)}
}

// wantsVIPs says whether a Service is of our load-balancer class. The status.loadBalancer of any other belongs to somebody else.
func wantsVIPs(svc *corev1.Service) bool {
	return svc.Spec.Type == corev1.ServiceTypeLoadBalancer && ptr.Deref(svc.Spec.LoadBalancerClass, "") == v1alpha1.LoadBalancerClass
}

// familiesOf are the Service's families, the primary one first.
func familiesOf(svc *corev1.Service) []v1alpha1.IPFamily {
	var out []v1alpha1.IPFamily
	for _, a := range clusterAddrs(svc) {
		out = append(out, allocator.FamilyOf(a))
	}
	return out
}

// shownVIPs are the addresses in the status of a Service of our class.
func shownVIPs(svc *corev1.Service) []netip.Addr {
	if !wantsVIPs(svc) {
		return nil
	}
	var out []netip.Addr
	for _, in := range svc.Status.LoadBalancer.Ingress {
		if a, ok := parseAddrSloppy(in.IP); ok {
			out = append(out, a)
		}
	}
	return out
}

// assignedVIPs are the load-balancer addresses that an assignment, if it is this Service's, has nodes forward.
func assignedVIPs(svc *corev1.Service, assignment *v1alpha1.ServiceAssignment) []netip.Addr {
	if assignment == nil || assignment.Spec.ServiceUID != svc.UID || !isOurs(assignment.Labels) {
		return nil
	}
	var out []netip.Addr
	for _, s := range assignment.Spec.LoadBalancerIPs {
		if a, err := netip.ParseAddr(s); err == nil {
			out = append(out, a)
		}
	}
	return out
}

// requestedVIPs reads which addresses a Service asks for: in the annotation, or else in spec.loadBalancerIP.
func requestedVIPs(svc *corev1.Service) (map[v1alpha1.IPFamily]netip.Addr, error) {
	field, value := "annotation "+v1alpha1.AnnotationLoadBalancerIPs, svc.Annotations[v1alpha1.AnnotationLoadBalancerIPs]
	if strings.TrimSpace(value) == "" {
		field, value = "spec.loadBalancerIP", svc.Spec.LoadBalancerIP
	}
	if strings.TrimSpace(value) == "" {
		return nil, nil
	}
	out := map[v1alpha1.IPFamily]netip.Addr{}
	for s := range strings.SplitSeq(value, ",") {
		addr, ok := parseAddrSloppy(s)
		if !ok {
			return nil, refuse(reasonRequestInvalid, "%s: %q is not an IP address; give at most one address of each family, separated by a comma, such as 192.0.2.10 or 192.0.2.10,2001:db8::10",
				field, strings.TrimSpace(s))
		}
		family := allocator.FamilyOf(addr)
		if had, twice := out[family]; twice && had != addr {
			return nil, refuse(reasonRequestInvalid, "%s: %s and %s are both %s; give at most one address of each family", field, had, addr, family)
		}
		if have := familiesOf(svc); !slices.Contains(have, family) {
			return nil, refuse(reasonRequestInvalid, "%s: %s is %s, and spec.ipFamilies of the Service is %v", field, addr, family, have)
		}
		out[family] = addr
	}
	return out, nil
}

// vipsOf finds the VIPs that a Service keeps of those that policy gave it (an empty policy stands for any): one of each of its families. That is the one it asks for if
// it has it, else the one that its status shows, else the one that its assignment has; several may be held while one follows another, or when replicas raced.
// They are kept even where the policy no longer declares them: a valid address is never moved.
func vipsOf(svc *corev1.Service, policy string, held map[allocator.Lock]allocator.Hold, assignment *v1alpha1.ServiceAssignment) map[v1alpha1.IPFamily]netip.Addr {
	out := map[v1alpha1.IPFamily]netip.Addr{}
	if !wantsVIPs(svc) {
		return out
	}
	families, shown, assigned := familiesOf(svc), shownVIPs(svc), assignedVIPs(svc, assignment)
	requested, _ := requestedVIPs(svc) // a request that cannot be read changes nothing
	rank := func(a netip.Addr) (n int) {
		for i, holds := range []bool{slices.Contains(assigned, a), slices.Contains(shown, a), requested[allocator.FamilyOf(a)] == a} {
			if holds {
				n = 1 + i
			}
		}
		return n
	}
	for lock, hold := range held {
		family := allocator.FamilyOf(lock.Addr)
		if !isVIPOf(svc, hold) || policy != "" && hold.Policy != policy || !slices.Contains(families, family) {
			continue
		}
		if best, several := out[family]; !several || cmp.Or(cmp.Compare(rank(lock.Addr), rank(best)), best.Compare(lock.Addr)) > 0 {
			out[family] = lock.Addr
		}
	}
	return out
}

// isVIPOf says whether a hold is that of a VIP of this very Service.
func isVIPOf(svc *corev1.Service, hold allocator.Hold) bool {
	return hold.Use == v1alpha1.ClaimUseLoadBalancerIP && hold.State == v1alpha1.ClaimBound && hold.Holder == holderOf(svc)
}

// vipRanges are the policy's ranges of load-balancer addresses of a family.
func vipRanges(policy *allocator.Policy, family v1alpha1.IPFamily) (out []allocator.Range) {
	for _, r := range policy.Ranges {
		if r.Use == v1alpha1.RangeUseLoadBalancer && allocator.FamilyOf(r.Prefix.Addr()) == family {
			out = append(out, r)
		}
	}
	return out
}

// describeVIPRanges lists, for messages, what a policy gives out or could.
func describeVIPRanges(policy *allocator.Policy, family v1alpha1.IPFamily) string {
	var out []string
	for _, r := range vipRanges(policy, family) {
		out = append(out, fmt.Sprintf("%s (%s)", r.Prefix, r.Allocation))
	}
	if len(out) == 0 {
		return "it declares no " + string(family) + " range with use LoadBalancer"
	}
	return "its ranges with use LoadBalancer are " + strings.Join(out, ", ")
}

// offered says why the policy does not give the address to a Service that asks for it, nil if it does. A Service that had the address before, restored, also gets what
// drains.
func offered(policy *allocator.Policy, addr netip.Addr, restored bool) error {
	no := func(why string) error {
		return refuse(reasonAddressNotOffered, "%s is not offered by policy %s: %s; %s", addr, policy.Name, why, describeVIPRanges(policy, allocator.FamilyOf(addr)))
	}
	r := policy.RangeOf(addr)
	switch {
	case r == nil || r.Use != v1alpha1.RangeUseLoadBalancer:
		return no("it lies outside of its ranges")
	case slices.ContainsFunc(r.Excluded, func(e netip.Prefix) bool { return e.Contains(addr) }):
		return no("it is reserved, or belongs to an older policy")
	case addr == r.Prefix.Addr() || addr.Is4() && !r.Prefix.Contains(addr.Next()):
		return no("it is the first address of " + r.Prefix.String() + ", or its broadcast address")
	case restored:
		return nil
	case r.Allocation == v1alpha1.RangeAllocationDraining || policy.Terminating:
		return no("nothing new is given out of " + r.Prefix.String())
	case !r.Usable:
		return fmt.Errorf("policy %s, %s: %w", policy.Name, r.Prefix, allocator.ErrNotUsable)
	}
	return nil
}

// wish is a VIP that a Service lacks: any of a family, a particular one, or rather a particular one than any.
type wish struct {
	family    v1alpha1.IPFamily
	addr      netip.Addr // the zero Addr stands for any
	orAnother bool
}

// wishes lists what a Service that has the VIPs have lacks, and why it cannot have what else it asks for. Of former, which nobody has claimed, it gets back what the policy
// still declares.
func wishes(svc *corev1.Service, policy *allocator.Policy, have map[v1alpha1.IPFamily]netip.Addr, former []netip.Addr) (out []wish, short []error) {
	requested, err := requestedVIPs(svc)
	if err != nil {
		return nil, []error{err} // what it would rather have is unknown, so it gets nothing new
	}
	families := familiesOf(svc)
	var without []error // families that the policy has nothing of
	for _, family := range families {
		asked, asks := requested[family]
		had, has := have[family]
		if has && (!asks || asked == had) {
			continue
		}
		w := wish{family: family, addr: asked}
		if asks {
			if err := offered(policy, asked, slices.Contains(former, asked)); err != nil {
				short = append(short, err)
				continue
			}
		} else {
			w.orAnother = slices.ContainsFunc(vipRanges(policy, family), func(r allocator.Range) bool { return r.Allocation == v1alpha1.RangeAllocationAutomatic })
			if i := slices.IndexFunc(former, func(a netip.Addr) bool { return allocator.FamilyOf(a) == family && offered(policy, a, true) == nil }); i >= 0 {
				w.addr = former[i]
			}
		}
		if !w.addr.IsValid() && !w.orAnother {
			without = append(without, refuse(reasonNoLoadBalancerRange, "policy %s gives out no %s load-balancer addresses by itself: %s", policy.Name, family, describeVIPRanges(policy, family)))
			continue
		}
		out = append(out, w)
	}
	if ptr.Deref(svc.Spec.IPFamilyPolicy, "") != corev1.IPFamilyPolicyPreferDualStack || len(without) == len(families) {
		short = append(short, without...)
	}
	if requiresBoth(svc) && len(short) > 0 {
		out = nil // all or nothing
	}
	return out, short
}

func requiresBoth(svc *corev1.Service) bool {
	return ptr.Deref(svc.Spec.IPFamilyPolicy, "") == corev1.IPFamilyPolicyRequireDualStack
}

// vips is what a Service has of load-balancer addresses. Those of a Service of another class are none.
type vips struct {
	// wanted is the address of each family that its status is to show.
	wanted map[v1alpha1.IPFamily]netip.Addr
	// forwarded are the addresses that nodes forward: those, and what the status shows until it shows them.
	forwarded []netip.Addr
}

// allocateVIPs takes the VIPs that the policy owes the Service. It returns those that it has, and why it has not all that it asks for, if so.
func (r *serviceReconciler) allocateVIPs(ctx context.Context, svc *corev1.Service, policy *allocator.Policy, assignment *v1alpha1.ServiceAssignment) (out vips, shortage, err error) {
	if !wantsVIPs(svc) {
		return vips{}, nil, nil
	}
	held, shown := r.ledger.heldBy(client.ObjectKeyFromObject(svc)), shownVIPs(svc)
	out.wanted = vipsOf(svc, policy.Name, held, assignment)
	// Held beats new: what it has without a claim, because that was lost or is not in a backup, it gets back if nobody else has it.
	former := slices.DeleteFunc(slices.Concat(shown, assignedVIPs(svc, assignment)), func(a netip.Addr) bool {
		_, claimed := r.ledger.held(allocator.AddrLock(a))
		return claimed
	})
	lacking, short := wishes(svc, policy, out.wanted, former)
	taken, missed, err := r.takeVIPs(ctx, svc, policy.Name, lacking)
	if err != nil {
		return vips{}, nil, err
	}
	for lock, hold := range taken {
		out.wanted[allocator.FamilyOf(lock.Addr)], held[lock] = lock.Addr, hold
	}
	shortage = errors.Join(append(short, missed...)...)
	if shortage != nil {
		for family, addr := range vipsOf(svc, "", held, assignment) { // of the policy that covered it before: its traffic goes on until it has another
			if _, ok := out.wanted[family]; !ok && len(vipRanges(policy, family)) > 0 {
				out.wanted[family] = addr
			}
		}
	}
	for lock, hold := range held {
		if isVIPOf(svc, hold) && (out.wanted[allocator.FamilyOf(lock.Addr)] == lock.Addr || slices.Contains(shown, lock.Addr)) {
			out.forwarded = append(out.forwarded, lock.Addr)
		}
	}
	out.forwarded = sortedAddrs(out.forwarded)
	return out, shortage, nil
}

// takeVIPs claims what a Service lacks. What it cannot have is in short; a Service that requires both families then gets nothing.
func (r *serviceReconciler) takeVIPs(ctx context.Context, svc *corev1.Service, policy string, lacking []wish) (taken map[allocator.Lock]allocator.Hold, short []error, err error) {
	hold := allocator.Hold{Policy: policy, Use: v1alpha1.ClaimUseLoadBalancerIP, State: v1alpha1.ClaimBound, Holder: holderOf(svc)}
	taken = map[allocator.Lock]allocator.Hold{}
	var lost []allocator.Lock
	defer func() {
		for _, lock := range lost { // kept pending until now, so that the same address is not proposed twice
			r.ledger.abandon(lock)
		}
	}()
	for range maxAttempts {
		if len(lacking) == 0 {
			return taken, short, nil
		}
		grants, missed := r.ledger.grantVIPs(svc, hold, lacking)
		short, lacking = append(short, missed...), nil
		for _, g := range grants {
			switch err := r.take(ctx, g.Grant, hold); {
			case err == nil:
				r.ledger.took(g.Lock, hold)
				taken[g.Lock] = hold
			case g.Lock.Addr != g.wish.addr && (apierrors.IsAlreadyExists(err) || apierrors.IsConflict(err) || apierrors.IsNotFound(err)):
				lost = append(lost, g.Lock)
				lacking = append(lacking, g.wish)
			case apierrors.IsAlreadyExists(err): // the informer is about to show whose it is: perhaps this Service's own, by another replica
				r.ledger.abandon(g.Lock)
				return nil, nil, apierrors.NewConflict(v1alpha1.GroupVersion.WithResource("allocationclaims").GroupResource(), g.Lock.Name(), err)
			default:
				// Whether the claim was made is unknown: perhaps only the answer was lost. If it was, the informer brings it.
				r.ledger.abandon(g.Lock)
				return nil, nil, fmt.Errorf("claim %s: %w", g.Lock, err)
			}
		}
	}
	return nil, nil, fmt.Errorf("policy %s: others took %d load-balancer addresses in a row first", policy, maxAttempts)
}

// vipGrant is a lock that was proposed for a wish.
type vipGrant struct {
	allocator.Grant
	wish wish
}

// grantVIPs proposes a lock for each wish, as grant does, and says why it does not for others. To a Service that requires both families it proposes all or
// none, in one step, so that two such Services cannot each hold what the other waits for.
func (l *ledger) grantVIPs(svc *corev1.Service, hold allocator.Hold, lacking []wish) (out []vipGrant, short []error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	l.refresh(now)
	for _, w := range lacking {
		g, err := l.grantVIP(svc, hold, w, now)
		if err != nil {
			short = append(short, err)
			continue
		}
		out = append(out, vipGrant{g, w})
	}
	if len(short) == 0 || !requiresBoth(svc) {
		return out, short
	}
	for _, g := range out { // not abandoned: nothing was released that could wake anybody, this Service least of all
		l.withdraw(g.Lock)
	}
	return nil, short
}

// grantVIP proposes a lock for one wish. Callers hold mu.
func (l *ledger) grantVIP(svc *corev1.Service, hold allocator.Hold, w wish, now time.Time) (allocator.Grant, error) {
	key := serviceKey(hold.Holder)
	if w.addr.IsValid() {
		lock := allocator.AddrLock(w.addr)
		l.asked(need{lock: lock}, key)
		other, held := l.space.Held(lock)
		switch {
		case held && other.State == v1alpha1.ClaimReleased, // who asks for an address by name does not wait until it has rested
			!held && (!l.space.Taken(lock) || slices.Contains(shownVIPs(svc), w.addr)):
			l.pending[lock] = pending{since: now}
			l.space.Hold(lock, allocator.Hold{Policy: hold.Policy, Use: hold.Use, State: v1alpha1.ClaimReserved, Holder: hold.Holder})
			return allocator.Grant{Lock: lock, Reclaim: held}, nil
		case !w.orAnother && held:
			l.wait(need{lock: lock}, key)
			return allocator.Grant{}, refuse(reasonAddressInUse, "%s is held by Service %s/%s; the Service gets it as soon as that one releases it", w.addr, other.Holder.Namespace, other.Holder.Name)
		case !w.orAnother:
			l.wait(need{lock: lock}, key)
			return allocator.Grant{}, refuse(reasonAddressInUse, "%s is in use outside of the policy; the Service gets it as soon as it is released", w.addr)
		}
	}
	request := allocator.Request{Policy: hold.Policy, Family: w.family, Use: hold.Use, Holder: hold.Holder}
	g, err := l.propose(request, now)
	l.asked(needOf(request), key)
	if isShortage(err) {
		l.wait(needOf(request), key)
	}
	return g, err
}

// withdraw takes back a proposal that nobody has seen. Callers hold mu.
func (l *ledger) withdraw(lock allocator.Lock) {
	delete(l.pending, lock)
	if claim := l.claims[lock]; claim != nil {
		l.space.Hold(lock, allocator.HoldOf(claim))
	} else {
		l.space.Drop(lock)
	}
}

// showVIPs makes the Service's status show the VIPs that are wanted and that every node forwards. What it shows already stays until its successor
// is programmed, whatever happens to nodes and endpoints meanwhile. Anything else that is there goes: the status of a Service of our class is ours.
func (r *serviceReconciler) showVIPs(ctx context.Context, svc *corev1.Service, assignment *v1alpha1.ServiceAssignment, v vips) error {
	if !wantsVIPs(svc) {
		return nil
	}
	shown := shownVIPs(svc)
	var ready []netip.Addr
	if assignment != nil && onEveryNode(assignment) {
		ready = assignedVIPs(svc, assignment)
	}
	var ingress []corev1.LoadBalancerIngress
	for _, family := range familiesOf(svc) {
		addr, ok := v.wanted[family]
		if !ok {
			continue
		}
		if !slices.Contains(ready, addr) && !slices.Contains(shown, addr) {
			i := slices.IndexFunc(shown, func(a netip.Addr) bool { return allocator.FamilyOf(a) == family && slices.Contains(v.forwarded, a) })
			if i < 0 {
				continue
			}
			addr = shown[i]
		}
		ingress = append(ingress, corev1.LoadBalancerIngress{IP: addr.String(), IPMode: ptr.To(corev1.LoadBalancerIPModeVIP)})
	}
	if equality.Semantic.DeepEqual(ingress, svc.Status.LoadBalancer.Ingress) {
		return nil
	}
	// The version keeps this from being written to a Service that has become another type since, or another Service.
	body, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": svc.UID, "resourceVersion": svc.ResourceVersion},
		"status":   map[string]any{"loadBalancer": map[string]any{"ingress": ingress}},
	})
	if err != nil {
		return err
	}
	if err := r.client.Status().Patch(ctx, svc.DeepCopy(), client.RawPatch(types.MergePatchType, body)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("write status.loadBalancer: %w", err)
	}
	return nil
}

// onEveryNode says whether every node that counts holds the assignment as it is now. Where no endpoint is ready a node holds that connections are refused.
func onEveryNode(a *v1alpha1.ServiceAssignment) bool {
	c := apimeta.FindStatusCondition(a.Status.Conditions, v1alpha1.AssignmentProgrammed)
	return c != nil && c.ObservedGeneration == a.Generation &&
		(c.Status == metav1.ConditionTrue || c.Reason == v1alpha1.ReasonNoReadyEndpoints && a.Status.Nodes.Programmed >= a.Status.Nodes.Desired)
}

// newlyOnEveryNode picks the one change of an assignment's status that matters to its Service: the VIPs can be shown now, and kube-proxy can let go.
func (r *serviceReconciler) newlyOnEveryNode(e event.UpdateEvent) bool {
	before, after := e.ObjectOld.(*v1alpha1.ServiceAssignment), e.ObjectNew.(*v1alpha1.ServiceAssignment)
	return onEveryNode(after) && !onEveryNode(before) && (r.ledger.sharing(after.Spec.PolicyName).takes || slices.ContainsFunc(after.Spec.LoadBalancerIPs, func(s string) bool {
		a, err := netip.ParseAddr(s)
		hold, held := r.ledger.held(allocator.AddrLock(a))
		return err == nil && held && hold.Use == v1alpha1.ClaimUseLoadBalancerIP
	}))
}
