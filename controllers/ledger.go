package controllers

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

type queue = workqueue.TypedRateLimitingInterface[reconcile.Request]

// policyEntry is a policy as the API has it and as it was parsed; parsed is nil if it could not be.
type policyEntry struct {
	api    *v1alpha1.ServiceProxyPolicy
	parsed *allocator.Policy
	err    error
	// clashes tell which addresses of nodes a range overlaps, by node.
	clashes map[string]string
}

// clash names one of the overlaps with nodes, always the same, empty if there is none.
func (e *policyEntry) clash() string {
	worst := ""
	for _, c := range e.clashes {
		if worst == "" || c < worst {
			worst = c
		}
	}
	return worst
}

// registration is what is known of one ServiceCIDR.
type registration struct {
	prefixes []netip.Prefix // in the order of the ServiceCIDR
	ours     bool           // made for a policy
	ready    time.Time      // since when, zero if it is not
}

// nodeEntry is what policies need to know of a node.
type nodeEntry struct {
	labels   map[string]string
	ready    bool
	prefixes []netip.Prefix // its pod CIDRs and its own addresses
	modes    []v1alpha1.NodeProxyMode
	// kubeProxy tells whether kube-proxy's rules are there, empty while that is not known.
	kubeProxy v1alpha1.KubeProxyPresence
	// reports: its agent has reported, and has not been silent for long.
	reports bool
	// localPorts are what its kernel gives to outgoing connections.
	localPorts []v1alpha1.NodePortRange
	exists     bool
}

// assignmentEntry is what policy status counts of an assignment.
type assignmentEntry struct {
	policy                          string
	generation                      int64
	assigned, programmed, exhausted bool
	handingBack                     bool
	exempt                          bool  // never taken over
	label                           label // of its Service
}

// tally counts the assignments of a policy.
type tally struct {
	covered, assigned, programmed, waiting int32
	// released are those that kube-proxy ignores, takenOver those of them that we labelled; handingBack those that kube-proxy gets, exempt those that it keeps.
	released, takenOver, handingBack, exempt int32
}

// pending marks a lock that this process is taking: granted, its claim not yet seen by the informer.
type pending struct{ since time.Time }

// ledger is the view that this process has of policies, claims, the API server's own locks and coverage. Informer events keep it up to date at a cost
// that does not grow with the cluster. It is a cache: it proposes what to lock and spares reads, and never proves that something is free.
type ledger struct {
	options Options
	synced  chan struct{}

	mu          sync.Mutex
	space       *allocator.Space
	policies    map[string]*policyEntry
	cidrs       map[string]registration // by name of the ServiceCIDR
	serverPorts allocator.PortRange     // the API server's range of node ports, zero while unknown
	nodes       map[string]nodeEntry
	claims      map[allocator.Lock]*v1alpha1.AllocationClaim // as the informer has them: read only
	pending     map[allocator.Lock]pending
	steered     steered
	services    map[types.NamespacedName][]allocator.Lock // every Service, its node ports, and the VIPs in its status
	users       map[allocator.Lock][]types.NamespacedName // the Services of each of these locks: several while informers lag
	assignments map[types.NamespacedName]assignmentEntry
	tallies     map[string]*tally
	waiting     map[need]*waitlist // Services that wait for an address
	unsettled   unsettled
	woken       map[types.NamespacedName][]need              // what Services were taken off waiting lists for, until they ask again or need nothing
	reserved    map[types.NamespacedName]map[netip.Addr]bool // what IPAddresses of ours keep for a Service

	labels    map[types.NamespacedName]label // of Services, those without left out
	kubeProxy hosts
	shared    map[string]sharing // with kube-proxy, by policy
	told      map[string]sharing // what of that the policies' Services were reconciled for

	resolved  []*allocator.Policy
	conflicts []allocator.Conflict
	stale     bool      // resolved is older than its inputs
	unshared  bool      // shared is
	nextReady time.Time // when a range's grace ends, zero if none is in it

	serviceQueue, policyQueue queue
	portsWanted               chan struct{} // gets a value when policies begin or cease to declare node ports
}

func newLedger(options Options) *ledger {
	return &ledger{
		options: options, synced: make(chan struct{}), portsWanted: make(chan struct{}, 1),
		space:       allocator.NewSpace(rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))),
		policies:    map[string]*policyEntry{},
		cidrs:       map[string]registration{},
		nodes:       map[string]nodeEntry{},
		claims:      map[allocator.Lock]*v1alpha1.AllocationClaim{},
		pending:     map[allocator.Lock]pending{},
		steered:     steered{since: map[allocator.Lock]time.Time{}},
		services:    map[types.NamespacedName][]allocator.Lock{},
		users:       map[allocator.Lock][]types.NamespacedName{},
		assignments: map[types.NamespacedName]assignmentEntry{},
		tallies:     map[string]*tally{},
		waiting:     map[need]*waitlist{},
		unsettled:   unsettled{by: map[types.NamespacedName]owing{}, counts: map[string]int{}},
		woken:       map[types.NamespacedName][]need{},
		reserved:    map[types.NamespacedName]map[netip.Addr]bool{},
		labels:      map[types.NamespacedName]label{},
		shared:      map[string]sharing{},
		told:        map[string]sharing{},
	}
}

// unsettled are the Services that no reconcile has brought up to date since the policies last changed. Until there is none that a policy covers, or may
// cover, its status cannot say that all is done.
type unsettled struct {
	epoch  int // counts the changes of policies
	by     map[types.NamespacedName]owing
	counts map[string]int // how many of by are of which policy, empty: of one that is not known
}

// owing is what is missing for a Service to be settled.
type owing struct {
	policy     string // which covers it, empty while that is not known
	generation int64  // of its assignment, which the informer has not shown yet; 0: not written yet
}

func (u *unsettled) set(key types.NamespacedName, o owing) {
	u.remove(key)
	u.by[key] = o
	u.counts[o.policy]++
}

// setAll makes these Services and no others unsettled.
func (u *unsettled) setAll(keys []types.NamespacedName) {
	u.by, u.counts = make(map[types.NamespacedName]owing, len(keys)), map[string]int{}
	for _, key := range keys {
		u.by[key] = owing{}
	}
	if len(keys) > 0 {
		u.counts[""] = len(keys)
	}
}

func (u *unsettled) remove(key types.NamespacedName) {
	o, ok := u.by[key]
	if !ok {
		return
	}
	delete(u.by, key)
	if u.counts[o.policy]--; u.counts[o.policy] == 0 {
		delete(u.counts, o.policy)
	}
}

// of says whether a Service that the policy covers, or may cover, is unsettled.
func (u *unsettled) of(policy string) bool { return u.counts[""] > 0 || u.counts[policy] > 0 }

// covered says that a Service was found to be covered by policy (empty: by none), as of an epoch. What is covered by none is settled.
func (l *ledger) covered(key types.NamespacedName, policy string, epoch int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.unsettled.by[key]; !ok || epoch != l.unsettled.epoch {
		return
	}
	l.unsettled.remove(key)
	if policy != "" {
		l.unsettled.set(key, owing{policy: policy})
	}
	if l.unsettled.counts[""] == 0 {
		l.touchAll()
	}
}

// settled says that a Service's assignment is as its policy wants it, as of an epoch. It counts once the informer has shown it, too.
func (l *ledger) settled(key types.NamespacedName, epoch int, generation int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if o, ok := l.unsettled.by[key]; ok && o.policy != "" && epoch == l.unsettled.epoch {
		l.unsettled.set(key, owing{o.policy, generation})
		l.shown(key)
	}
}

// shown settles a Service if its assignment is what it awaits. Callers hold mu.
func (l *ledger) shown(key types.NamespacedName) {
	o, a := l.unsettled.by[key], l.assignments[key]
	if o.generation > 0 && a.policy == o.policy && a.generation >= o.generation {
		l.unsettled.remove(key)
		l.touch(o.policy)
	}
}

// epoch is the present one of the policies.
func (l *ledger) epoch() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.unsettled.epoch
}

// need is what a Service waits for: any address of a policy's ranges of one family and use, or, if lock is set, that very address.
type need struct {
	policy string
	family v1alpha1.IPFamily
	use    v1alpha1.RangeUse
	lock   allocator.Lock
}

func needOf(r allocator.Request) need {
	n := need{policy: r.Policy, family: r.Family, use: v1alpha1.RangeUseClusterIP}
	if r.Use == v1alpha1.ClaimUseLoadBalancerIP {
		n.use = v1alpha1.RangeUseLoadBalancer
	}
	return n
}

// waitlist is a queue of distinct Services, first come, first served.
type waitlist struct {
	order []types.NamespacedName
	in    map[types.NamespacedName]bool
}

func (w *waitlist) add(key types.NamespacedName) {
	if !w.in[key] {
		w.in[key] = true
		w.order = append(w.order, key)
	}
}

func (w *waitlist) remove(key types.NamespacedName) {
	if w.in[key] {
		delete(w.in, key)
		w.order = slices.DeleteFunc(w.order, func(k types.NamespacedName) bool { return k == key })
	}
}

func (w *waitlist) pop() (key types.NamespacedName, ok bool) {
	for len(w.order) > 0 {
		key, w.order = w.order[0], w.order[1:]
		delete(w.in, key)
		return key, true
	}
	return key, false
}

// refresh settles the policies' ranges anew if anything that decides about them changed. Callers hold mu.
func (l *ledger) refresh(now time.Time) {
	if !l.stale && (l.nextReady.IsZero() || now.Before(l.nextReady)) {
		if l.unshared { // nodes come, go and flap all the time, and what policies declare has nothing to do with it
			l.share()
			l.touchAll()
		}
		return
	}
	l.stale, l.nextReady = false, time.Time{}
	usable, server := l.server(now)
	var parsed []*allocator.Policy
	for _, e := range l.policies {
		if e.parsed == nil {
			continue
		}
		p := *e.parsed
		p.Ranges = slices.Clone(p.Ranges)
		for i := range p.Ranges {
			r := &p.Ranges[i]
			r.Usable = len(e.clashes) == 0 && l.serves(r.Prefix) && (r.Use == v1alpha1.RangeUseLoadBalancer || usable[r.Prefix])
		}
		parsed = append(parsed, &p)
	}
	before := map[string]int{}
	for _, p := range l.resolved {
		before[p.Name] = usableRanges(p)
	}
	// A policy that is not accepted because of a clash keeps its rights against younger ones: nodes come and go, and a range that changed hands with them would in the
	// end have been given out by two policies.
	l.resolved, l.conflicts = allocator.Resolve(parsed)
	l.share()
	l.space.Configure(l.resolved, server)
	for _, p := range l.resolved {
		if usableRanges(p) > before[p.Name] {
			l.wakeAll(p.Name)
		}
		l.touch(p.Name)
	}
}

// server says which ranges every API server gives addresses of, and what of that no policy made. It notes when the next one is to be expected.
func (l *ledger) server(now time.Time) (usable map[netip.Prefix]bool, out allocator.Server) {
	usable, out.NodePorts = map[netip.Prefix]bool{}, l.serverPorts
	for _, name := range l.cidrNames() {
		c := l.cidrs[name]
		if c.ours {
			out.Made = append(out.Made, c.prefixes...)
		}
		if c.ready.IsZero() {
			continue
		}
		at := c.ready.Add(l.options.RangeGrace)
		if now.Before(at) {
			if l.nextReady.IsZero() || at.Before(l.nextReady) {
				l.nextReady = at
			}
			continue
		}
		for _, p := range c.prefixes {
			usable[p] = true
		}
		if !c.ours {
			out.Ranges = append(out.Ranges, c.prefixes...)
		}
	}
	return usable, out
}

// setServerPorts says what the API server's range of node ports was found to be.
func (l *ledger) setServerPorts(r allocator.PortRange) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.serverPorts != r {
		l.serverPorts, l.stale = r, true
		l.touchAll()
	}
}

// wantsServerPorts says whether anything depends on the API server's range of node ports: whether a policy declares any.
func (l *ledger) wantsServerPorts() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.policies {
		if e.parsed != nil && e.parsed.NodePorts.Size() > 0 {
			return true
		}
	}
	return false
}

// defaultServiceCIDR is the ServiceCIDR that the API server makes from its flags.
const defaultServiceCIDR = "kubernetes"

// cidrNames lists the ServiceCIDRs, the default one first.
func (l *ledger) cidrNames() []string {
	return slices.SortedFunc(maps.Keys(l.cidrs), func(a, b string) int {
		if (a == defaultServiceCIDR) != (b == defaultServiceCIDR) {
			if a == defaultServiceCIDR {
				return -1
			}
			return 1
		}
		return strings.Compare(a, b)
	})
}

func usableRanges(p *allocator.Policy) (n int) {
	for _, r := range p.Ranges {
		if r.Usable {
			n++
		}
	}
	return n
}

// noteClash looks whether a node's pods' or own addresses lie in a range of the policy, and says whether that is news.
func (e *policyEntry) noteClash(name string, n nodeEntry) bool {
	worst := ""
	if e.parsed != nil {
		for _, r := range e.parsed.Ranges {
			for _, used := range n.prefixes {
				if !r.Prefix.Overlaps(used) {
					continue
				}
				if msg := r.Prefix.String() + " overlaps " + used.String() + " of node " + name; worst == "" || msg < worst {
					worst = msg
				}
			}
		}
	}
	if e.clashes[name] == worst {
		return false
	}
	if worst == "" {
		delete(e.clashes, name)
	} else {
		e.clashes[name] = worst
	}
	return true
}

// errPolicyInvalid says that nothing may be decided about a Service, because the policy that covers it cannot be understood.
var errPolicyInvalid = errors.New("its policy cannot be understood")

// covering finds the policy that covers the Service, nil if none does. current names the policy that covers it so far. While that one's spec cannot
// be understood it fails with errPolicyInvalid: nobody meant to take the Service's traffic away.
func (l *ledger) covering(svc *corev1.Service, namespaceLabels map[string]string, current string) (*allocator.Policy, *v1alpha1.ServiceProxyPolicy, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refresh(time.Now())
	if e := l.policies[current]; e != nil && e.parsed == nil && allocator.Coverable(svc) {
		return nil, nil, fmt.Errorf("%w: %w", errPolicyInvalid, e.err)
	}
	p := allocator.Select(l.resolved, svc, namespaceLabels, current)
	if p == nil {
		return nil, nil, nil
	}
	return p, l.policies[p.Name].api, nil
}

// restFor is how long a lock that was taken from the policy rests once released.
func (l *ledger) restFor(policy string) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := l.policies[policy]; e != nil && e.parsed != nil {
		return e.parsed.RestFor()
	}
	return allocator.DefaultQuarantine
}

// grant proposes a lock and keeps it from being proposed again until the claim is seen or abandon is called. If there is none now, the holder joins
// the waiting list in the same moment, so that no release in between is missed.
func (l *ledger) grant(r allocator.Request) (allocator.Grant, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	l.refresh(now)
	g, err := l.propose(r, now)
	l.asked(needOf(r), serviceKey(r.Holder))
	if isShortage(err) {
		l.wait(needOf(r), serviceKey(r.Holder))
	}
	return g, err
}

// propose grants a lock and remembers it as pending. Callers hold mu.
func (l *ledger) propose(r allocator.Request, now time.Time) (allocator.Grant, error) {
	g, err := l.space.Grant(r)
	if err == nil {
		l.pending[g.Lock] = pending{since: now}
	}
	return g, err
}

// isShortage says whether waiting helps against an error of grant.
func isShortage(err error) bool {
	return errors.Is(err, allocator.ErrExhausted) || errors.Is(err, allocator.ErrNotUsable)
}

// taking says that this process is about to create or change the claim on a lock that the API server already gave to the holder.
func (l *ledger) taking(lock allocator.Lock, h allocator.Hold) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pending[lock] = pending{since: time.Now()}
	l.space.Hold(lock, h)
}

// took says that the write succeeded. If the informer has seen the claim already, it knows better.
func (l *ledger) took(lock allocator.Lock, h allocator.Hold) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.pending[lock]; ok {
		l.space.Hold(lock, h)
	}
}

// abandon says that the write failed: what the informer last saw holds again.
func (l *ledger) abandon(lock allocator.Lock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.abandonLocked(lock)
}

func (l *ledger) abandonLocked(lock allocator.Lock) {
	if _, ok := l.pending[lock]; !ok {
		return
	}
	delete(l.pending, lock)
	if claim := l.claims[lock]; claim != nil {
		l.space.Hold(lock, allocator.HoldOf(claim))
		return
	}
	l.space.Drop(lock)
	l.wake(lock)
	for policy := range l.space.PoliciesOf(lock) {
		l.touch(policy)
	}
}

// sweep abandons what has been pending for too long: its claim was made, and deleted by another process, while the informer's watch was broken.
func (l *ledger) sweep(before time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.forgetSteered(time.Now())
	for lock, p := range l.pending {
		if p.since.Before(before) {
			l.abandonLocked(lock)
		}
	}
}

func (l *ledger) held(lock allocator.Lock) (allocator.Hold, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.space.Held(lock)
}

// heldBy returns the locks of all Services that ever had the name and are not forgotten yet.
func (l *ledger) heldBy(key types.NamespacedName) map[allocator.Lock]allocator.Hold {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Collect(l.space.HeldBy(key.Namespace, key.Name))
}

// reservedFor lists the addresses that IPAddresses of ours keep for a Service, in order.
func (l *ledger) reservedFor(key types.NamespacedName) []netip.Addr {
	l.mu.Lock()
	defer l.mu.Unlock()
	return sortedAddrs(slices.Collect(maps.Keys(l.reserved[key])))
}

// usersOf lists the Services that have the lock, a node port, by what the informer shows.
func (l *ledger) usersOf(lock allocator.Lock) []types.NamespacedName {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.users[lock])
}

// setUser says whether a Service has the lock. It is taken as long as any has: after a broken watch the informer may show who has it now before who had it. Callers
// hold mu.
func (l *ledger) setUser(lock allocator.Lock, key types.NamespacedName, has bool) {
	users := slices.DeleteFunc(l.users[lock], func(k types.NamespacedName) bool { return k == key })
	if has {
		users = append(users, key)
	}
	if len(users) > 0 {
		l.users[lock] = users
		l.space.SetTaken(lock, true)
		return
	}
	delete(l.users, lock)
	l.space.SetTaken(lock, false)
	l.wake(lock)
}

// claim is the claim on a lock as the informer last saw it, nil if there is none. It must not be changed.
func (l *ledger) claim(lock allocator.Lock) *v1alpha1.AllocationClaim {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.claims[lock]
}

// wait puts a Service on a waiting list: it is reconciled when something that it needs is released. Callers hold mu.
func (l *ledger) wait(n need, key types.NamespacedName) {
	if l.waiting[n] == nil {
		l.waiting[n] = &waitlist{in: map[types.NamespacedName]bool{}}
	}
	l.waiting[n].add(key)
}

// asked says that a Service has asked for what it may have been woken for. Callers hold mu.
func (l *ledger) asked(n need, key types.NamespacedName) {
	if left := slices.DeleteFunc(l.woken[key], func(w need) bool { return w == n }); len(left) > 0 {
		l.woken[key] = left
	} else {
		delete(l.woken, key)
	}
}

// served takes a Service that waits for nothing any more, or is gone, off all waiting lists: what is released next is for another, and so is what it was
// woken for and has not asked for.
func (l *ledger) served(key types.NamespacedName) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for n, w := range l.waiting {
		if w.remove(key); len(w.order) == 0 {
			delete(l.waiting, n)
		}
	}
	passed := l.woken[key]
	delete(l.woken, key)
	for _, n := range passed {
		if n.lock != (allocator.Lock{}) {
			l.wake(n.lock)
		} else {
			l.wakeFirst(n)
		}
	}
}

// wake reconciles the Service that has waited longest for this very lock, or if there is none, for each policy that declares it. Callers hold mu.
func (l *ledger) wake(lock allocator.Lock) {
	if l.wakeFirst(need{lock: lock}) || lock.IsPort() {
		return
	}
	for policy := range l.space.PoliciesOf(lock) {
		if e := l.policies[policy]; e != nil && e.parsed != nil {
			if r := e.parsed.RangeOf(lock.Addr); r != nil {
				l.wakeFirst(need{policy: policy, family: allocator.FamilyOf(lock.Addr), use: r.Use})
			}
		}
	}
}

// wakeFirst reconciles the Service that has waited longest, and says whether there was one. Callers hold mu.
func (l *ledger) wakeFirst(n need) bool {
	w := l.waiting[n]
	if w == nil || l.serviceQueue == nil {
		return false
	}
	key, ok := w.pop()
	if ok {
		l.woken[key] = append(l.woken[key], n)
		l.serviceQueue.Add(reconcile.Request{NamespacedName: key})
	} else {
		delete(l.waiting, n)
	}
	return ok
}

// wakeAll reconciles all that wait for a policy. Callers hold mu.
func (l *ledger) wakeAll(policy string) {
	for n := range l.waiting {
		for n.policy == policy && l.wakeFirst(n) {
			continue
		}
	}
}

// touch has the policy's status looked at soon. Many touches within StatusInterval are one. Callers hold mu.
func (l *ledger) touch(policy string) {
	if l.policyQueue != nil && policy != "" {
		l.policyQueue.AddAfter(reconcile.Request{NamespacedName: types.NamespacedName{Name: policy}}, l.options.StatusInterval)
	}
}

func (l *ledger) touchAll() {
	for name := range l.policies {
		l.touch(name)
	}
}

// inUse counts what keeps a range from being given up: claims that the policy made in it, and the API server's locks of other Services. What lies in one of the
// ranges of except does not count. A zero prefix counts the claims of the policy wherever they are.
func (l *ledger) inUse(policy string, prefix netip.Prefix, except []netip.Prefix) (claims, foreign int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for lock, hold := range l.space.All() {
		if !prefix.IsValid() {
			if hold != nil && hold.Policy == policy {
				claims++
			}
			continue
		}
		if lock.IsPort() || !prefix.Contains(lock.Addr) || slices.ContainsFunc(except, func(p netip.Prefix) bool { return p.Contains(lock.Addr) }) {
			continue
		}
		if hold != nil {
			claims++
		} else {
			foreign++
		}
	}
	return claims, foreign
}

func serviceKey(h allocator.Holder) types.NamespacedName {
	return types.NamespacedName{Namespace: h.Namespace, Name: h.Name}
}

// reconcile has a Service looked at.
func (l *ledger) reconcile(key types.NamespacedName) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.serviceQueue != nil {
		l.serviceQueue.Add(reconcile.Request{NamespacedName: key})
	}
}

// isOurs says whether an object carries our label. What does not is never changed or deleted.
func isOurs(labels map[string]string) bool {
	return labels[v1alpha1.LabelManagedBy] == v1alpha1.ManagedBy
}

// ourReservation says whether an IPAddress is a reservation of ours, and for which Service.
func ourReservation(ip *networkingv1.IPAddress) (types.NamespacedName, bool) {
	if ip.Labels[networkingv1.LabelManagedBy] != v1alpha1.ManagedBy || ip.Spec.ParentRef == nil || ip.Spec.ParentRef.Resource != "services" {
		return types.NamespacedName{}, false
	}
	return types.NamespacedName{Namespace: ip.Spec.ParentRef.Namespace, Name: ip.Spec.ParentRef.Name}, true
}
