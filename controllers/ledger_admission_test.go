package controllers

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	. "github.com/onsi/gomega"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// told is a ledger that was told of these objects as informers do, and has them all.
func told(objects ...client.Object) *ledger {
	l := newLedger(quick.withDefaults())
	for _, o := range objects {
		tell(l, o)
	}
	close(l.synced)
	return l
}

func tell(l *ledger, o client.Object) {
	switch o := o.(type) {
	case *v1alpha1.ServiceProxyPolicy:
		l.onPolicy(nil, o)
	case *networkingv1.ServiceCIDR:
		l.onServiceCIDR(nil, o)
	case *networkingv1.IPAddress:
		l.onIPAddress(nil, o)
	case *corev1.Service:
		l.onService(nil, o)
	case *corev1.Node:
		l.onNode(nil, o)
	case *v1alpha1.AllocationClaim:
		l.onClaim(nil, o)
	default:
		panic(fmt.Sprintf("%T", o))
	}
}

// serviceCIDR is one that has been Ready for long.
func serviceCIDR(name string, labels map[string]string, cidrs ...string) *networkingv1.ServiceCIDR {
	c := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: cidrs}}
	c.Status.Conditions = []metav1.Condition{{Type: "Ready", Status: "True", LastTransitionTime: metav1.NewTime(time.Now().Add(-time.Hour))}}
	return c
}

// declaring is a policy for the namespaces labelled tenant=NAME with ranges, the first of which is older than the next.
func declaring(name string, age time.Duration, ports *v1alpha1.NodePortRange, ranges ...v1alpha1.ServiceRange) *v1alpha1.ServiceProxyPolicy {
	p := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: name, Generation: 1, UID: types.UID(name), CreationTimestamp: metav1.NewTime(time.Now().Add(-age))}}
	p.Spec.NamespaceSelector.MatchLabels = map[string]string{"tenant": name}
	p.Spec.ServiceRanges, p.Spec.NodePortRange = ranges, ports
	return p
}

func clusterIPRange(cidr string) v1alpha1.ServiceRange {
	return v1alpha1.ServiceRange{CIDR: cidr, Use: v1alpha1.RangeUseClusterIP, Allocation: v1alpha1.RangeAllocationAutomatic}
}

func vipRange(cidr string) v1alpha1.ServiceRange {
	return v1alpha1.ServiceRange{CIDR: cidr, Use: v1alpha1.RangeUseLoadBalancer, Allocation: v1alpha1.RangeAllocationAutomatic}
}

func steeredIP(family v1alpha1.IPFamily) allocator.Request {
	return allocator.Request{Family: family, Use: v1alpha1.ClaimUseClusterIP, Holder: allocator.Holder{Namespace: "ns", Name: "web"}}
}

var steeredPort = allocator.Request{Use: v1alpha1.ClaimUseNodePort, Holder: allocator.Holder{Namespace: "ns", Name: "web"}}

func TestServicesOfNobodyAreSteered(t *testing.T) {
	kubernetes := serviceCIDR("kubernetes", nil, "10.0.0.0/24", "fd00::/112")
	policy := declaring("a", time.Hour, &v1alpha1.NodePortRange{Start: 30000, End: 30007}, clusterIPRange("10.0.0.0/25"), vipRange("10.0.0.128/26"))
	t.Run("out of all that policies declare", func(t *testing.T) {
		g := NewWithT(t)
		a := admissionLedger{ledger: told(kubernetes, policy)}
		a.ledger.setServerPorts(allocator.PortRange{First: 30000, Last: 30009})
		seen := map[allocator.Lock]bool{}
		for range 63 { // all but the broadcast address
			grant, err := a.Grant(steeredIP(v1alpha1.IPv4))
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(netip.MustParsePrefix("10.0.0.192/26").Contains(grant.Lock.Addr)).To(BeTrue(), "%s", grant.Lock)
			g.Expect(seen).NotTo(HaveKey(grant.Lock))
			seen[grant.Lock] = true
		}
		_, err := a.Grant(steeredIP(v1alpha1.IPv4))
		g.Expect(err).To(MatchError(allocator.ErrExhausted))
		g.Expect(err).To(MatchError(ContainSubstring("the API server's own ranges have no free IPv4 addresses outside of all policies' ranges: 63 of 63 in use")))
		for range 2 {
			grant, err := a.Grant(steeredPort)
			g.Expect(err).NotTo(HaveOccurred())
			g.Expect(grant.Lock.Port).To(BeNumerically(">=", 30008))
		}
		_, err = a.Grant(steeredPort)
		g.Expect(err).To(MatchError(allocator.ErrExhausted))
		g.Expect(a.ledger.waiting).To(BeEmpty(), "nobody waits for what nobody declares")
		g.Expect(a.ledger.heldBy(types.NamespacedName{Namespace: "ns", Name: "web"})).To(BeEmpty(), "there is no claim on it")
	})
	t.Run("only where the API server could take what is a policy's", func(t *testing.T) {
		g := NewWithT(t)
		a := admissionLedger{ledger: told(kubernetes, policy)}
		_, err := a.Grant(steeredIP(v1alpha1.IPv6))
		g.Expect(err).To(MatchError(allocator.ErrNoRange), "no policy declares IPv6")
		_, err = a.Grant(steeredPort)
		g.Expect(err).To(MatchError(allocator.ErrNoRange), "its range is not known")
		tell(a.ledger, serviceCIDR("a-x7", ourLabels("a"), "fd00:1::/112"))
		_, err = a.Grant(steeredIP(v1alpha1.IPv6))
		g.Expect(err).NotTo(HaveOccurred(), "a ServiceCIDR of ours that is still there")

		none := admissionLedger{ledger: told(kubernetes)}
		none.ledger.setServerPorts(allocator.PortRange{First: 30000, Last: 32767})
		for _, r := range []allocator.Request{steeredIP(v1alpha1.IPv4), steeredIP(v1alpha1.IPv6), steeredPort} {
			_, err := none.Grant(r)
			g.Expect(err).To(MatchError(allocator.ErrNoRange))
		}
		_, err = admissionLedger{ledger: told(policy, serviceCIDR("a-x7", ourLabels("a"), "10.0.0.0/25"))}.Grant(steeredIP(v1alpha1.IPv4))
		g.Expect(err).To(MatchError(allocator.ErrNoRange), "what the API server gives out by itself is not known")
	})
	t.Run("and what came to nothing is free again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g := NewWithT(t)
			small := serviceCIDR("kubernetes", nil, "10.0.0.0/30")
			a := admissionLedger{ledger: told(small, declaring("a", time.Hour, nil, clusterIPRange("10.0.0.0/31")))}
			take := func() netip.Addr {
				grant, err := a.Grant(steeredIP(v1alpha1.IPv4))
				if !errors.Is(err, allocator.ErrExhausted) {
					g.Expect(err).NotTo(HaveOccurred())
				}
				return grant.Lock.Addr
			}
			two := netip.MustParseAddr("10.0.0.2")
			g.Expect(take()).To(Equal(two))
			g.Expect(take().IsValid()).To(BeFalse())
			time.Sleep(steeredFor + time.Millisecond) // of the bubble's clock
			g.Expect(take()).To(Equal(two), "no IPAddress was seen")
			ip := &networkingv1.IPAddress{ObjectMeta: metav1.ObjectMeta{Name: "10.0.0.2"}}
			a.ledger.onIPAddress(nil, ip)
			time.Sleep(steeredFor + time.Millisecond)
			g.Expect(take().IsValid()).To(BeFalse(), "the API server has given it")
			a.ledger.onIPAddress(ip, nil)
			g.Expect(take()).To(Equal(two))
			time.Sleep(steeredFor / 2)
			a.ledger.onIPAddress(nil, ip)
			a.ledger.onIPAddress(ip, nil)
			g.Expect(take()).To(Equal(two), "it was let go")
			time.Sleep(steeredFor/2 + time.Millisecond)
			g.Expect(take().IsValid()).To(BeFalse(), "the older request's time does not count for the newer")
		})
	})
}

func TestAdmissionDoesNotWait(t *testing.T) {
	g := NewWithT(t)
	a := admissionLedger{ledger: told(serviceCIDR("a-x7", ourLabels("a"), "10.0.0.0/30"), declaring("a", time.Hour, nil, clusterIPRange("10.0.0.0/30")))}
	request := allocator.Request{Policy: "a", Family: v1alpha1.IPv4, Use: v1alpha1.ClaimUseClusterIP, Holder: allocator.Holder{Namespace: "ns", Name: "web"}}
	for range 2 {
		_, err := a.Grant(request)
		g.Expect(err).NotTo(HaveOccurred())
	}
	_, err := a.Grant(request)
	g.Expect(err).To(MatchError("policy a has no free IPv4 addresses: 2 of 2 in use"))
	g.Expect(a.ledger.waiting).To(BeEmpty())
	_, err = a.ledger.grant(request)
	g.Expect(err).To(HaveOccurred())
	g.Expect(a.ledger.waiting).NotTo(BeEmpty(), "its reconciler does")
}

func TestARequestProvesNothing(t *testing.T) {
	g := NewWithT(t)
	lock := allocator.AddrLock(netip.MustParseAddr("10.0.0.5"))
	theirs := allocator.Hold{Policy: "a", Use: v1alpha1.ClaimUseAdditionalIP, State: v1alpha1.ClaimBound, Holder: allocator.Holder{Namespace: "ns", Name: "has", UID: "1"}}
	a := admissionLedger{ledger: told(declaring("a", time.Hour, nil, clusterIPRange("10.0.0.0/25")), allocator.NewClaim(lock, theirs))}
	mine := allocator.Hold{Policy: "a", Use: v1alpha1.ClaimUseClusterIP, State: v1alpha1.ClaimReserved, Holder: allocator.Holder{Namespace: "ns", Name: "asks"}}
	holds := func(name string) map[allocator.Lock]allocator.Hold {
		return a.ledger.heldBy(types.NamespacedName{Namespace: "ns", Name: name})
	}
	a.Taking(lock, mine)
	g.Expect(holds("has")).To(HaveKeyWithValue(lock, theirs), "until its claim is shown to be gone, it has the address")
	a.Abandon(lock)
	g.Expect(holds("has")).To(HaveKeyWithValue(lock, theirs))
	g.Expect(holds("asks")).To(BeEmpty())

	a.Taking(lock, mine)
	a.Took(lock, mine) // the claim was gone
	g.Expect(holds("asks")).To(HaveKeyWithValue(lock, mine))
	other := allocator.AddrLock(netip.MustParseAddr("10.0.0.6"))
	a.Taking(other, mine)
	g.Expect(holds("asks")).To(HaveKeyWithValue(other, mine), "nobody is proposed what is being taken")
}

// After a broken watch an informer shows what is there before what is gone.
func TestEventsOutOfOrder(t *testing.T) {
	g := NewWithT(t)
	l := told()
	queued := workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[reconcile.Request]())
	defer queued.ShutDown()
	l.serviceQueue = queued
	port := allocator.PortLock(30001)
	with := func(name string) *corev1.Service {
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{NodePort: 30001}}}}
	}
	l.onService(nil, with("before"))
	l.onService(nil, with("after"))
	l.onService(with("before"), nil)
	g.Expect(l.space.Taken(port)).To(BeTrue())
	g.Expect(l.usersOf(port)).To(ConsistOf(types.NamespacedName{Namespace: "ns", Name: "after"}))
	l.onService(with("after"), nil)
	g.Expect(l.space.Taken(port)).To(BeFalse())
	g.Expect(l.users).To(BeEmpty())

	ours := &networkingv1.IPAddress{ObjectMeta: metav1.ObjectMeta{Name: "10.0.0.5", Labels: map[string]string{networkingv1.LabelManagedBy: v1alpha1.ManagedBy}}}
	ours.Spec.ParentRef = &networkingv1.ParentReference{Resource: "services", Namespace: "ns", Name: "web"}
	l.onIPAddress(nil, ours)
	g.Expect(queued.Len()).To(BeZero())
	theirs := &networkingv1.IPAddress{ObjectMeta: metav1.ObjectMeta{Name: "10.0.0.5"}, Spec: networkingv1.IPAddressSpec{ParentRef: &networkingv1.ParentReference{Resource: "services", Namespace: "ns", Name: "other"}}}
	l.onIPAddress(ours, theirs)
	g.Expect(queued.Len()).To(Equal(1), "deleted, and given to another Service meanwhile: the one that it was for looks again")
}

func TestALeakWaitsForItsAssignment(t *testing.T) {
	g := NewWithT(t)
	s := runtime.NewScheme()
	g.Expect(errors.Join(clientgoscheme.AddToScheme(s), v1alpha1.AddToScheme(s))).To(Succeed())
	claim := allocator.NewClaim(allocator.AddrLock(netip.MustParseAddr("192.0.2.5")), allocator.Hold{Policy: "a", Use: v1alpha1.ClaimUseLoadBalancerIP,
		State: v1alpha1.ClaimBound, Holder: allocator.Holder{Namespace: "ns", Name: "web", UID: "gone"}})
	claim.CreationTimestamp = metav1.NewTime(time.Now().Add(-time.Hour))
	assignment := &v1alpha1.ServiceAssignment{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", Labels: ourLabels("a")}}
	assignment.Spec.ServiceUID = "gone"
	c := fake.NewClientBuilder().WithScheme(s).WithObjects(claim, assignment).Build()
	l := told(claim)
	r := &claimReconciler{client: c, live: c, ledger: l, options: l.options, reclaimed: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "reclaimed"}, []string{"kind"})}
	state := func() v1alpha1.ClaimState {
		result, err := r.Reconcile(t.Context(), reconcile.Request{NamespacedName: types.NamespacedName{Name: claim.Name}})
		g.Expect(err).NotTo(HaveOccurred())
		var now v1alpha1.AllocationClaim
		g.Expect(c.Get(t.Context(), client.ObjectKeyFromObject(claim), &now)).To(Succeed())
		g.Expect(result.RequeueAfter > 0).To(Equal(now.Spec.State == v1alpha1.ClaimBound))
		return now.Spec.State
	}
	g.Expect(state()).To(Equal(v1alpha1.ClaimBound))
	g.Expect(c.Delete(t.Context(), assignment)).To(Succeed())
	g.Expect(state()).To(Equal(v1alpha1.ClaimReleased))
}

func TestOwner(t *testing.T) {
	g := NewWithT(t)
	deleted := declaring("b", 2*time.Hour, nil, vipRange("10.0.0.0/26"))
	deleted.DeletionTimestamp = &metav1.Time{Time: time.Now()}
	a := admissionLedger{ledger: told(
		declaring("a", time.Hour, &v1alpha1.NodePortRange{Start: 30000, End: 30099}, clusterIPRange("10.0.0.0/24"), clusterIPRange("fd00::/112")), deleted,
		declaring("c", time.Minute, &v1alpha1.NodePortRange{Start: 30050, End: 30199}))}
	for _, tt := range []struct {
		lock             allocator.Lock
		policy, declared string
	}{
		{allocator.AddrLock(netip.MustParseAddr("10.0.0.63")), "b", "10.0.0.0/26"},
		{allocator.AddrLock(netip.MustParseAddr("10.0.0.64")), "a", "10.0.0.0/24"},
		{allocator.AddrLock(netip.MustParseAddr("fd00::7")), "a", "fd00::/112"},
		{allocator.AddrLock(netip.MustParseAddr("10.0.1.0")), "", ""},
		{allocator.PortLock(30050), "a", "30000-30099"},
		{allocator.PortLock(30100), "c", "30050-30199"},
		{allocator.PortLock(30200), "", ""},
	} {
		policy, declared := a.Owner(tt.lock)
		g.Expect([]string{policy, declared}).To(Equal([]string{tt.policy, tt.declared}), tt.lock.String())
	}
}

func TestFamilies(t *testing.T) {
	g := NewWithT(t)
	families := func(objects ...client.Object) []v1alpha1.IPFamily {
		return admissionLedger{ledger: told(objects...)}.Families()
	}
	g.Expect(families()).To(BeEmpty())
	g.Expect(families(serviceCIDR("a-x7", ourLabels("a"), "10.0.0.0/24"))).To(BeEmpty(), "ours says nothing about the API server")
	g.Expect(families(serviceCIDR("kubernetes", nil, "fd00::/112", "10.0.0.0/24"), serviceCIDR("a", nil, "10.1.0.0/24"))).To(Equal([]v1alpha1.IPFamily{"IPv6", "IPv4"}))
	g.Expect(families(serviceCIDR("kubernetes", nil, "10.0.0.0/24"), serviceCIDR("a", nil, "fd00::/112"))).To(Equal([]v1alpha1.IPFamily{"IPv4"}))
	g.Expect(families(serviceCIDR("b", nil, "10.0.0.0/24", "fd00::/112"), serviceCIDR("a", nil, "fd01::/112"))).To(Equal([]v1alpha1.IPFamily{"IPv6", "IPv4"}))
}

func TestCovering(t *testing.T) {
	g := NewWithT(t)
	s := runtime.NewScheme()
	g.Expect(errors.Join(clientgoscheme.AddToScheme(s), v1alpha1.AddToScheme(s))).To(Succeed())
	namespace := func(name, tenant string) *corev1.Namespace {
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"tenant": tenant}}}
	}
	assignment := &v1alpha1.ServiceAssignment{ObjectMeta: metav1.ObjectMeta{Namespace: "seen", Name: "old"}}
	assignment.Spec.ServiceUID, assignment.Spec.PolicyName = "uid-old", "leaving"
	cached := fake.NewClientBuilder().WithScheme(s).WithObjects(namespace("seen", "a"), assignment).Build()
	reads := 0
	live := interceptor.NewClient(fake.NewClientBuilder().WithScheme(s).WithObjects(namespace("seen", "a"), namespace("new", "a")).Build(), interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
			reads++
			return c.Get(ctx, key, o, opts...)
		}})
	leaving := declaring("leaving", 2*time.Hour, nil)
	leaving.Spec.NamespaceSelector, leaving.Spec.Priority, leaving.DeletionTimestamp = metav1.LabelSelector{}, 7, &metav1.Time{Time: time.Now()}
	service := func(namespace, name string, uid types.UID) *corev1.Service {
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: uid, Labels: map[string]string{allocator.LabelServiceProxyName: v1alpha1.ServiceProxyName}}}
	}
	a := admissionLedger{ledger: newLedger(quick.withDefaults()), cached: cached, live: live}
	_, err := a.Covering(t.Context(), service("seen", "web", ""))
	g.Expect(err).To(MatchError(ContainSubstring("not all that is held was read yet")))
	_, err = a.Grant(steeredPort)
	g.Expect(err).To(MatchError(ContainSubstring("not all that is held was read yet")))
	a.ledger = told(declaring("a", time.Hour, nil), leaving)
	for _, tt := range []struct {
		svc   *corev1.Service
		want  string
		reads int
	}{
		{service("seen", "web", ""), "a", 0},
		{service("new", "web", ""), "a", 1},
		{service("seen", "old", "uid-old"), "leaving", 0}, // it keeps what it covers
		{service("seen", "old", ""), "a", 0},              // another Service of the name
		{service("seen", "old", "uid-new"), "a", 0},
	} {
		reads = 0
		policy, err := a.Covering(t.Context(), tt.svc)
		g.Expect(err).NotTo(HaveOccurred())
		g.Expect(policy.Name).To(Equal(tt.want), "%s/%s %s", tt.svc.Namespace, tt.svc.Name, tt.svc.UID)
		g.Expect(reads).To(Equal(tt.reads))
	}
	headless := service("absent", "web", "")
	headless.Spec.ClusterIP = corev1.ClusterIPNone
	g.Expect(a.Covering(t.Context(), headless)).To(BeNil())
	_, err = a.Covering(t.Context(), service("absent", "web", ""))
	g.Expect(err).To(MatchError("namespace absent does not exist"))
}

func TestStatusOfWhatTheAPIServerDoesNotGive(t *testing.T) {
	g := NewWithT(t)
	ports := &v1alpha1.NodePortRange{Start: 32000, End: 33999}
	p := declaring("a", time.Hour, ports, clusterIPRange("10.1.0.0/24"), clusterIPRange("fd00:1::/112"))
	single := serviceCIDR("kubernetes", nil, "10.0.0.0/24")
	l := told(p, serviceCIDR("a-x7", ourLabels("a"), "10.1.0.0/24"), serviceCIDR("a-x8", ourLabels("a"), "fd00:1::/112"))
	reason := func() string {
		v, ok := l.view(p, time.Now())
		g.Expect(ok).To(BeTrue())
		c := v.rangesReady()
		return string(c.Status) + " " + c.Reason + ": " + c.Message
	}
	total := func() int32 {
		v, _ := l.view(p, time.Now())
		return policyStatus(p, v, nil).NodePorts.Total
	}
	ready := func() (out []bool) {
		v, _ := l.view(p, time.Now())
		for _, r := range policyStatus(p, v, nil).ServiceRanges {
			out = append(out, r.Ready)
		}
		return out
	}
	g.Expect(reason()).To(HavePrefix("True Registered"), "nothing is claimed while nothing is known")
	g.Expect(total()).To(Equal(int32(2000)))
	g.Expect(ready()).To(Equal([]bool{true, true}))

	tell(l, single)
	g.Expect(reason()).To(Equal("False FamilyNotServed: nothing of fd00:1::/112 can be given out: this cluster's Services have addresses of IPv4 only"))
	v, _ := l.view(p, time.Now())
	g.Expect(v.toRegister()).To(Equal([]netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}))
	g.Expect(ready()).To(Equal([]bool{true, false}))

	l.onServiceCIDR(single, serviceCIDR("kubernetes", nil, "10.0.0.0/24", "fd00::/112"))
	g.Expect(reason()).To(HavePrefix("True Registered"))
	l.setServerPorts(allocator.PortRange{First: 30000, Last: 32767})
	g.Expect(reason()).To(Equal("False NodePortRangeOutside: nodePortRange is 32000-33999 and the API server's range (--service-node-port-range) is 30000-32767, so only 768 of its 2000 ports can be given out"))
	g.Expect(total()).To(Equal(int32(768)))
	l.setServerPorts(allocator.PortRange{First: 30000, Last: 31999})
	g.Expect(reason()).To(ContainSubstring("so only 0 of its 2000 ports can be given out"))
	g.Expect(total()).To(BeZero())
	l.setServerPorts(allocator.PortRange{First: 32000, Last: 33999})
	g.Expect(reason()).To(HavePrefix("True Registered"))
	g.Expect(total()).To(Equal(int32(2000)))
}

// A range that is used up is no reason not to be Ready, until somebody waits. It is counted by what it is used for: free VIPs help no ClusterIP.
func TestStatusOfAFullRange(t *testing.T) {
	g := NewWithT(t)
	p := declaring("a", time.Hour, nil, clusterIPRange("10.1.0.0/30"), vipRange("10.2.0.0/24"))
	l := told(p, serviceCIDR("a-x7", ourLabels("a"), "10.1.0.0/30"))
	conditions := func() map[string]string {
		v, _ := l.view(p, time.Now())
		out := map[string]string{}
		for _, c := range v.conditions() {
			out[c.Type] = string(c.Status) + " " + c.Reason + ": " + c.Message
		}
		return out
	}
	g.Expect(conditions()).To(HaveKeyWithValue("CapacityAvailable", HavePrefix("True Available")))
	for _, name := range []string{"10.1.0.1", "10.1.0.2"} {
		tell(l, &networkingv1.IPAddress{ObjectMeta: metav1.ObjectMeta{Name: name}})
	}
	g.Expect(conditions()).To(And(
		HaveKeyWithValue("CapacityAvailable", "False RangeFull: policy a has no free IPv4 addresses: 2 of 2 in use; no Service waits, and the next one would"),
		HaveKeyWithValue("Ready", HavePrefix("True Ready"))))
	l.onAssignment(nil, &v1alpha1.ServiceAssignment{ObjectMeta: metav1.ObjectMeta{Name: "web", Labels: ourLabels("a")}, Spec: v1alpha1.ServiceAssignmentSpec{PolicyName: "a"},
		Status: v1alpha1.ServiceAssignmentStatus{Conditions: []metav1.Condition{{Type: v1alpha1.AssignmentAllocated, Status: "False", Reason: reasonExhausted}}}})
	g.Expect(conditions()).To(And(
		HaveKeyWithValue("CapacityAvailable", HavePrefix("False RangeExhausted: policy a has no free IPv4 addresses: 2 of 2 in use; add a range")),
		HaveKeyWithValue("Ready", HavePrefix("False RangeExhausted"))))
}

func TestStatusWithoutNodes(t *testing.T) {
	g := NewWithT(t)
	p := declaring("a", time.Hour, nil)
	p.Spec.NodeSelector.MatchLabels = map[string]string{"role": "edge"}
	l := told(p)
	programmed := func() string {
		v, _ := l.view(p, time.Now())
		c := v.programmed()
		return string(c.Status) + " " + c.Reason + ": " + c.Message
	}
	g.Expect(programmed()).To(HavePrefix("True NoServices"), "there is no node at all: the selector is not to blame")
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}
	tell(l, node)
	g.Expect(programmed()).To(Equal("False NoNodes: nodeSelector matches none of the cluster's 1 nodes, so nobody forwards the covered Services"))
	labelled := node.DeepCopy()
	labelled.Labels = map[string]string{"role": "edge"}
	l.onNode(node, labelled)
	g.Expect(programmed()).To(HavePrefix("True NoServices"))
}

// An overlap with nodes is followed node by node, and comes to the same as looking at all.
func TestClashesComeAndGoWithNodes(t *testing.T) {
	g := NewWithT(t)
	node := func(name string, cidrs ...string) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: cidrs}}
	}
	p := declaring("a", time.Hour, nil, vipRange("10.1.0.0/24"))
	l := told(node("n2", "10.1.0.0/26"), p)
	clash := func() string {
		v, _ := l.view(p, time.Now())
		g.Expect(v.resolved.Ranges[0].Usable).To(Equal(v.clash == ""))
		return v.clash
	}
	g.Expect(clash()).To(Equal("10.1.0.0/24 overlaps 10.1.0.0/26 of node n2"))
	tell(l, node("n1", "10.1.0.0/26", "10.9.0.0/24"))
	g.Expect(clash()).To(HaveSuffix("of node n1"))
	l.onNode(node("n1", "10.1.0.0/26", "10.9.0.0/24"), node("n1", "10.9.0.0/24"))
	g.Expect(clash()).To(HaveSuffix("of node n2"))
	changed := declaring("a", time.Hour, nil, vipRange("10.9.0.0/16"))
	changed.Generation = 2
	l.onPolicy(p, changed)
	p = changed
	g.Expect(clash()).To(Equal("10.9.0.0/16 overlaps 10.9.0.0/24 of node n1"))
	l.onNode(node("n1", "10.9.0.0/24"), nil)
	g.Expect(clash()).To(BeEmpty())
}

// bigLedger knows 10 000 Services, 5 000 of them with a node port, of 50 policies with a /20 each, and 1 000 nodes.
func bigLedger(b *testing.B) (*ledger, []*v1alpha1.ServiceProxyPolicy) {
	b.Helper()
	l := newLedger(Options{}.withDefaults())
	tell(l, serviceCIDR("kubernetes", nil, "10.96.0.0/12", "fd00::/108"))
	var policies []*v1alpha1.ServiceProxyPolicy
	for i := range 50 {
		name := fmt.Sprintf("tenant-%02d", i)
		cidr := fmt.Sprintf("10.99.%d.0/20", i*16%256)
		if i >= 16 {
			cidr = fmt.Sprintf("10.%d.%d.0/20", 200+i/16, i*16%256)
		}
		p := declaring(name, time.Hour, &v1alpha1.NodePortRange{Start: int32(30000 + 50*i), End: int32(30049 + 50*i)}, clusterIPRange(cidr))
		policies = append(policies, p)
		tell(l, p)
		tell(l, serviceCIDR(name+"-x7", ourLabels(name), cidr))
	}
	for i := range 1000 {
		tell(l, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("node-%04d", i)}, Spec: corev1.NodeSpec{PodCIDRs: []string{fmt.Sprintf("10.24%d.%d.0/24", i/256, i%256)}}})
	}
	for i := range 10000 {
		policy := fmt.Sprintf("tenant-%02d", i%50)
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: policy, Name: fmt.Sprintf("web-%05d", i)}}
		tell(l, svc)
		l.mu.Lock()
		l.refresh(time.Now())
		g, err := l.space.Grant(allocator.Request{Policy: policy, Family: v1alpha1.IPv4, Use: v1alpha1.ClaimUseClusterIP, Holder: allocator.Holder{Namespace: svc.Namespace, Name: svc.Name}})
		l.mu.Unlock()
		if err != nil {
			b.Fatal(err)
		}
		tell(l, &networkingv1.IPAddress{ObjectMeta: metav1.ObjectMeta{Name: g.Lock.Addr.String()}})
	}
	l.setServerPorts(allocator.PortRange{First: 30000, Last: 32767})
	l.serviceQueue = workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[reconcile.Request]())
	close(l.synced)
	return l, policies
}

// BenchmarkAdmissionLedger measures what a request costs at 10 000 Services, and for how long events keep requests out.
func BenchmarkAdmissionLedger(b *testing.B) {
	l, policies := bigLedger(b)
	defer l.serviceQueue.ShutDown()
	a := admissionLedger{ledger: l}
	covered := allocator.Request{Policy: "tenant-07", Family: v1alpha1.IPv4, Use: v1alpha1.ClaimUseClusterIP, Holder: allocator.Holder{Namespace: "tenant-07", Name: "new"}}
	b.Run("request=covered", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			g, err := a.Grant(covered)
			if err != nil {
				b.Fatal(err)
			}
			a.Abandon(g.Lock)
		}
	})
	b.Run("request=steered", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			g, err := a.Grant(steeredIP(v1alpha1.IPv4))
			if err != nil {
				b.Fatal(err)
			}
			ip := &networkingv1.IPAddress{ObjectMeta: metav1.ObjectMeta{Name: g.Lock.Addr.String()}}
			l.onIPAddress(nil, ip)
			l.onIPAddress(ip, nil)
		}
	})
	b.Run("request=owner", func(b *testing.B) {
		lock := allocator.AddrLock(netip.MustParseAddr("10.99.3.7"))
		for b.Loop() {
			a.Owner(lock)
		}
	})
	waitOf := func(b *testing.B, event func(i int)) {
		var waits []time.Duration
		for i := 0; b.Loop(); i++ {
			event(i)
			start := time.Now()
			g, err := a.Grant(covered)
			waits = append(waits, time.Since(start))
			if err != nil {
				b.Fatal(err)
			}
			a.Abandon(g.Lock)
		}
		slices.Sort(waits)
		b.ReportMetric(float64(waits[len(waits)-1].Microseconds()), "grant-max-µs")
	}
	b.Run("event=policy", func(b *testing.B) { // the next Grant settles the ranges anew
		waitOf(b, func(i int) {
			changed := policies[3].DeepCopy()
			changed.Generation = int64(i + 2)
			changed.Spec.ServiceRanges[0].Reserved = []string{"10.99.48." + fmt.Sprint(i%200+1)}
			l.onPolicy(policies[3], changed)
		})
	})
	b.Run("event=node", func(b *testing.B) {
		waitOf(b, func(i int) {
			tell(l, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-0007"}, Spec: corev1.NodeSpec{PodCIDRs: []string{fmt.Sprintf("10.250.%d.0/24", i%256)}}})
		})
	})
	b.Run("event=status", func(b *testing.B) {
		waitOf(b, func(int) {
			if _, ok := l.view(policies[5], time.Now()); !ok {
				b.Fatal("not seen")
			}
		})
	})
}
