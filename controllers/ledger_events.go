package controllers

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// run feeds the ledger from the informers until ctx ends, and closes synced once everything that existed at the start is in it. It is to run in every
// replica, leader or not.
func (l *ledger) run(ctx context.Context, informers cache.Cache) error {
	var synced []toolscache.InformerSynced
	add := func(s toolscache.InformerSynced, err error) error {
		synced = append(synced, s)
		return err
	}
	if err := errors.Join(
		add(follow(ctx, informers, l.onPolicy)),
		add(follow(ctx, informers, l.onServiceCIDR)),
		add(follow(ctx, informers, l.onNode)),
		add(follow(ctx, informers, l.onNodeProxyState)),
		add(follow(ctx, informers, l.onClaim)),
		add(follow(ctx, informers, l.onIPAddress)),
		add(follow(ctx, informers, l.onService)),
		add(follow(ctx, informers, l.onAssignment)),
	); err != nil {
		return err
	}
	if !toolscache.WaitForCacheSync(ctx.Done(), synced...) {
		return nil // ctx ended
	}
	close(l.synced)
	wait.UntilWithContext(ctx, func(context.Context) { l.sweep(time.Now().Add(-l.options.LeakAge)) }, l.options.LeakAge/4)
	return nil
}

// follow calls on for every change of a kind: before is nil for a new object, after for a deleted one.
func follow[T client.Object](ctx context.Context, informers cache.Cache, on func(before, after T)) (toolscache.InformerSynced, error) {
	var none T
	object := reflect.New(reflect.TypeFor[T]().Elem()).Interface().(T)
	informer, err := informers.GetInformer(ctx, object)
	if err != nil {
		return nil, fmt.Errorf("watch %T: %w", object, err)
	}
	handle, err := informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { on(none, obj.(T)) },
		UpdateFunc: func(before, after any) { on(before.(T), after.(T)) },
		DeleteFunc: func(obj any) {
			if gone, ok := obj.(toolscache.DeletedFinalStateUnknown); ok {
				obj = gone.Obj
			}
			on(obj.(T), none)
		},
	})
	if err != nil {
		return nil, fmt.Errorf("watch %T: %w", object, err)
	}
	return handle.HasSynced, nil
}

func (l *ledger) onPolicy(before, after *v1alpha1.ServiceProxyPolicy) {
	again, services := l.notePolicy(before, after)
	if services != nil {
		for _, key := range again { // without mu: admission must not wait for thousands of them
			services.Add(reconcile.Request{NamespacedName: key})
		}
	}
}

// notePolicy returns the Services that a change of policy has looked at again, and the queue they are for.
func (l *ledger) notePolicy(before, after *v1alpha1.ServiceProxyPolicy) ([]types.NamespacedName, queue) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case after == nil:
		delete(l.policies, before.Name)
	case before != nil && before.UID == after.UID && before.Generation == after.Generation:
		l.policies[after.Name].api = after // status, labels: nothing that decides
		return nil, nil
	default:
		e := &policyEntry{api: after, clashes: map[string]string{}}
		if e.parsed, e.err = allocator.ParsePolicy(after); e.err != nil {
			e.parsed = nil
		}
		for name, n := range l.nodes {
			e.noteClash(name, n)
		}
		l.policies[after.Name] = e
	}
	select {
	case l.portsWanted <- struct{}{}:
	default: // it is going to look anyway
	}
	l.stale = true
	l.unsettled.epoch++
	all := slices.Collect(maps.Keys(l.services))
	l.unsettled.setAll(all)
	l.touchAll() // who has what of overlapping ranges may have changed for others
	return all, l.serviceQueue
}

func (l *ledger) onServiceCIDR(before, after *networkingv1.ServiceCIDR) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if after == nil {
		delete(l.cidrs, before.Name)
	} else {
		l.cidrs[after.Name] = registrationOf(after)
	}
	l.stale = true
	l.touchAll()
}

func registrationOf(c *networkingv1.ServiceCIDR) registration {
	out := registration{ours: isOurs(c.Labels)}
	for _, s := range c.Spec.CIDRs {
		if p, err := netip.ParsePrefix(s); err == nil {
			out.prefixes = append(out.prefixes, p)
		}
	}
	if cond := apimeta.FindStatusCondition(c.Status.Conditions, networkingv1.ServiceCIDRConditionReady); cond != nil && cond.Status == "True" && c.DeletionTimestamp == nil {
		out.ready = cond.LastTransitionTime.Time
		if out.ready.IsZero() {
			out.ready = c.CreationTimestamp.Time
		}
	}
	return out
}

func (l *ledger) onNode(before, after *corev1.Node) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if after == nil {
		n := l.nodes[before.Name]
		l.setNode(before.Name, nodeEntry{modes: n.modes, localPorts: n.localPorts, kubeProxy: n.kubeProxy, reports: n.reports})
		return
	}
	was := l.nodes[after.Name]
	n := nodeEntry{labels: after.Labels, exists: true, modes: was.modes, localPorts: was.localPorts, kubeProxy: was.kubeProxy, reports: was.reports}
	for _, c := range after.Status.Conditions {
		n.ready = n.ready || c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	}
	for _, s := range after.Spec.PodCIDRs {
		if p, ok := parsePrefixSloppy(s); ok {
			n.prefixes = append(n.prefixes, p)
		}
	}
	for _, a := range after.Status.Addresses {
		if ip, ok := parseAddrSloppy(a.Address); ok && (a.Type == corev1.NodeInternalIP || a.Type == corev1.NodeExternalIP) {
			n.prefixes = append(n.prefixes, netip.PrefixFrom(ip, ip.BitLen()))
		}
	}
	l.setNode(after.Name, n)
}

func (l *ledger) onNodeProxyState(before, after *v1alpha1.NodeProxyState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if after == nil {
		n := l.nodes[before.Name]
		n.modes, n.localPorts, n.kubeProxy, n.reports = nil, nil, "", false
		l.setNode(before.Name, n)
		return
	}
	n := l.nodes[after.Name]
	n.modes, n.localPorts, n.kubeProxy = after.Status.Modes, after.Status.LocalPorts, after.Status.KubeProxy
	n.reports = !apimeta.IsStatusConditionPresentAndEqual(after.Status.Conditions, v1alpha1.NodeProxyReady, metav1.ConditionUnknown) && !reflect.ValueOf(after.Status).IsZero()
	l.setNode(after.Name, n)
}

// setNode replaces an entry. Heartbeats, which change nothing of it, cost nothing more.
func (l *ledger) setNode(name string, n nodeEntry) {
	was := l.nodes[name]
	// How policies share the cluster with kube-proxy depends on all of these.
	sharing := was.exists != n.exists || was.ready != n.ready || was.kubeProxy != n.kubeProxy || was.reports != n.reports || !maps.Equal(was.labels, n.labels)
	l.unshared = l.unshared || sharing
	if !n.exists && n.modes == nil && n.localPorts == nil && n.kubeProxy == "" && !n.reports {
		delete(l.nodes, name)
	} else {
		l.nodes[name] = n
	}
	if !slices.Equal(was.prefixes, n.prefixes) {
		for _, e := range l.policies {
			l.stale = e.noteClash(name, n) || l.stale
		}
	} else if !sharing && slices.EqualFunc(was.modes, n.modes, sameAbility) && slices.Equal(was.localPorts, n.localPorts) {
		return
	}
	l.touchAll()
}

func sameAbility(a, b v1alpha1.NodeProxyMode) bool {
	return a.Mode == b.Mode && a.Available == b.Available
}

func (l *ledger) onClaim(before, after *v1alpha1.AllocationClaim) {
	named := before
	if after != nil {
		named = after
	}
	lock, err := allocator.ParseName(named.Name)
	if err != nil {
		return // its schema refuses other names
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.pending, lock)
	if after == nil {
		delete(l.claims, lock)
		l.space.Drop(lock)
		l.wake(lock)
	} else {
		l.claims[lock] = after
		l.space.Hold(lock, allocator.HoldOf(after))
		if after.Spec.State == v1alpha1.ClaimReleased {
			l.wakeFirst(need{lock: lock}) // who asks for this very address does not wait until it has rested
		}
	}
	l.touch(named.Spec.PolicyName)
	for policy := range l.space.PoliciesOf(lock) {
		l.touch(policy)
	}
	// A claim that somebody changed or deleted is its Service's business. Our own changes come by here too, and cost a look.
	if before != nil {
		l.lookAt(before.Spec.Holder)
		if after != nil && after.Spec.Holder != before.Spec.Holder {
			l.lookAt(after.Spec.Holder)
		}
	}
}

func (l *ledger) onIPAddress(before, after *networkingv1.IPAddress) {
	named := before
	if after != nil {
		named = after
	}
	addr, err := netip.ParseAddr(named.Name)
	if err != nil {
		return
	}
	lock := allocator.AddrLock(addr)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.steered.forget(lock)
	l.noteReservation(before, false)
	l.noteReservation(after, true)
	was, ours := ourReservationIf(before != nil, before)
	if now, still := ourReservationIf(after != nil, after); ours && !(still && now == was) && l.serviceQueue != nil {
		l.serviceQueue.Add(reconcile.Request{NamespacedName: was})
	}
	if (after != nil) == l.space.Taken(lock) {
		return
	}
	l.space.SetTaken(lock, after != nil)
	for policy := range l.space.PoliciesOf(lock) {
		l.touch(policy)
	}
	if after == nil {
		l.wake(lock)
	}
}

// lookAt has a claim's holder reconciled. Callers hold mu.
func (l *ledger) lookAt(h v1alpha1.ClaimHolder) {
	if h.Name != "" && l.serviceQueue != nil {
		l.serviceQueue.Add(reconcile.Request{NamespacedName: types.NamespacedName{Namespace: h.Namespace, Name: h.Name}})
	}
}

// noteReservation records whether a reservation of ours exists. Callers hold mu.
func (l *ledger) noteReservation(ip *networkingv1.IPAddress, exists bool) {
	if ip == nil {
		return
	}
	key, ours := ourReservation(ip)
	addr, err := netip.ParseAddr(ip.Name)
	if !ours || err != nil {
		return
	}
	if !exists {
		delete(l.reserved[key], addr)
		if len(l.reserved[key]) == 0 {
			delete(l.reserved, key)
		}
		return
	}
	if l.reserved[key] == nil {
		l.reserved[key] = map[netip.Addr]bool{}
	}
	l.reserved[key][addr] = true
}

// onService follows node ports and VIPs that users can see: Kubernetes has no object for either, a Service that has one is the proof.
func (l *ledger) onService(before, after *corev1.Service) {
	named := before
	if after != nil {
		named = after
	}
	key := client.ObjectKeyFromObject(named)
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.services[key]
	var now []allocator.Lock
	if after == nil {
		delete(l.services, key)
		l.unsettled.remove(key)
	} else {
		now = nodePorts(after)
		for _, vip := range shownVIPs(after) {
			now = append(now, allocator.AddrLock(vip))
		}
		l.services[key] = now
		if before == nil {
			l.unsettled.set(key, owing{})
		}
	}
	l.noteLabel(key, labelOf(after))
	for _, lock := range was {
		if !slices.Contains(now, lock) {
			l.setUser(lock, key, false)
		}
	}
	for _, lock := range now {
		l.steered.forget(lock)
		l.setUser(lock, key, true)
	}
	for _, lock := range append(was, now...) {
		for policy := range l.space.PoliciesOf(lock) {
			l.touch(policy)
		}
	}
}

// nodePorts are the Service's node ports, that of the health check included.
func nodePorts(svc *corev1.Service) []allocator.Lock {
	var out []allocator.Lock
	add := func(port int32) {
		if lock := allocator.PortLock(uint16(port)); port > 0 && port < 1<<16 && !slices.Contains(out, lock) {
			out = append(out, lock)
		}
	}
	for _, p := range svc.Spec.Ports {
		add(p.NodePort)
	}
	add(svc.Spec.HealthCheckNodePort)
	return out
}

func (l *ledger) onAssignment(before, after *v1alpha1.ServiceAssignment) {
	named, now := before, assignmentEntry{}
	if after != nil {
		named, now = after, assignmentEntryOf(after)
	}
	exists := after != nil && isOurs(after.Labels) // others' count for nothing
	if !exists {
		now = assignmentEntry{}
	}
	key := client.ObjectKeyFromObject(named)
	l.mu.Lock()
	defer l.mu.Unlock()
	if exists {
		now.label = l.labels[key]
	}
	was, known := l.assignments[key]
	if exists == known && was == now {
		return
	}
	if known {
		l.count(was, -1)
	}
	delete(l.assignments, key)
	if exists {
		l.assignments[key] = now
		l.count(now, 1)
		l.shown(key)
	}
	l.touch(was.policy)
	l.touch(now.policy)
}

func assignmentEntryOf(a *v1alpha1.ServiceAssignment) assignmentEntry {
	e := assignmentEntry{policy: a.Spec.PolicyName, generation: a.Generation, assigned: apimeta.IsStatusConditionTrue(a.Status.Conditions, v1alpha1.AssignmentAllocated),
		programmed: onEveryNode(a), handingBack: isHandingBack(a), exempt: isExempt(client.ObjectKeyFromObject(a))}
	if c := apimeta.FindStatusCondition(a.Status.Conditions, v1alpha1.AssignmentAllocated); c != nil {
		e.exhausted = c.Status == "False" && c.Reason == reasonExhausted
	}
	return e
}

func (l *ledger) count(e assignmentEntry, by int32) {
	t := l.tallies[e.policy]
	if t == nil {
		t = &tally{}
		l.tallies[e.policy] = t
	}
	t.covered += by
	if e.assigned {
		t.assigned += by
	}
	if e.programmed {
		t.programmed += by
	}
	if e.exhausted {
		t.waiting += by
	}
	if e.handingBack {
		t.handingBack += by
	}
	if e.label != unlabelled {
		t.released += by
	} else if e.exempt && !e.handingBack {
		t.exempt += by
	}
	if e.label == labelledByUs {
		t.takenOver += by
	}
}
