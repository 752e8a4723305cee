package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// clients is the namespace of the pods that call, one on each node.
const clients = "clients"

func startClients() {
	GinkgoHelper()
	Expect(k8s.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: clients}})).To(Succeed())
	for _, n := range c.Nodes {
		Expect(k8s.Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: clients, Name: "on-" + n.Name},
			Spec:       corev1.PodSpec{NodeName: n.Name, Containers: []corev1.Container{{Name: "client", Image: "client"}}},
		})).To(Succeed())
	}
	kubectl("-n", clients, "wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s")
}

// caller is where connections come from.
type caller struct {
	name string
	node *cluster.Node
	ns   *netns.NS
	// addresses are the caller's own, IPv4 first.
	addresses []netip.Addr
}

// podCallers are the client pods, one on each node.
func podCallers() (out []caller) {
	GinkgoHelper()
	for _, n := range c.Nodes {
		var pod corev1.Pod
		Expect(k8s.Get(ctx, client.ObjectKey{Namespace: clients, Name: "on-" + n.Name}, &pod)).To(Succeed())
		out = append(out, caller{"a pod on " + n.Name, n, c.Pod(clients, pod.Name), podAddresses(&pod)})
	}
	return out
}

// nodeCallers are the nodes themselves.
func nodeCallers() (out []caller) {
	for _, n := range c.Nodes {
		out = append(out, caller{n.Name, n, n.NS, n.Addresses})
	}
	return out
}

// outsideCaller is the host outside of the cluster.
func outsideCaller() caller {
	GinkgoHelper()
	out := caller{name: "outside", ns: c.Outside()}
	Expect(out.ns.Do(func() error {
		addrs, err := net.InterfaceAddrs()
		for _, a := range addrs {
			p, err := netip.ParsePrefix(a.String())
			if err != nil {
				return err
			}
			if p.Addr().IsGlobalUnicast() {
				out.addresses = append(out.addresses, p.Addr())
			}
		}
		return err
	})).To(Succeed())
	slices.SortFunc(out.addresses, netip.Addr.Compare) // IPv4 first
	Expect(out.addresses).To(HaveLen(2))
	return out
}

func podAddresses(pod *corev1.Pod) (out []netip.Addr) {
	for _, ip := range pod.Status.PodIPs {
		out = append(out, netip.MustParseAddr(ip.IP))
	}
	return out
}

// call calls once and expects an answer.
func call(from caller, network string, to netip.Addr, port uint16) cluster.Answer {
	GinkgoHelper()
	a, err := cluster.Call(ctx, from.ns, network, netip.AddrPortFrom(to, port))
	Expect(err).NotTo(HaveOccurred(), "from %s to %s %s port %d", from.name, network, to, port)
	return a
}

// callError calls once and gives the error.
func callError(ns *netns.NS, network string, to netip.AddrPort) error {
	_, err := cluster.Call(ctx, ns, network, to)
	return err
}

// kubectl runs the real kubectl and expects it to succeed.
func kubectl(args ...string) string {
	GinkgoHelper()
	out, err := c.Kubectl(ctx, "", args...)
	Expect(err).NotTo(HaveOccurred())
	return out
}

// tenant is a namespace with ranges that no other spec has.
type tenant struct {
	name   string
	v4, v6 netip.Prefix // a /24 of 10.99.0.0/16 and a /112
	ports  uint16       // the first of a hundred node ports
}

var tenants = 0

// newTenant makes a tenant. When the spec ends, all that it made is deleted, and nothing may be left of it: see checkNothingLeft.
func newTenant() *tenant {
	GinkgoHelper()
	tenants++
	t := &tenant{
		name:  fmt.Sprintf("t%d", tenants),
		v4:    netip.MustParsePrefix(fmt.Sprintf("10.99.%d.0/24", tenants)),
		v6:    netip.MustParsePrefix(fmt.Sprintf("fd00:10:99:%x::/112", tenants)),
		ports: 30000 + uint16(tenants%27)*100,
	}
	Expect(k8s.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: t.name}})).To(Succeed())
	DeferCleanup(func() {
		if !CurrentSpecReport().Failed() {
			t.clean()
		}
	})
	return t
}

// clean deletes what the spec made and checks that nothing of it is left.
func (t *tenant) clean() {
	GinkgoHelper()
	Expect(k8s.DeleteAllOf(ctx, &corev1.Service{}, client.InNamespace(t.name))).To(Succeed())
	for _, p := range t.policies() {
		Expect(client.IgnoreNotFound(k8s.Delete(ctx, &p))).To(Succeed())
	}
	t.checkNothingLeft()
	Expect(client.IgnoreNotFound(k8s.Delete(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: t.name}}))).To(Succeed())
}

// checkNothingLeft waits until no policy, assignment, claim, IPAddress or ServiceCIDR of the tenant is left, and no kernel knows its ranges.
func (t *tenant) checkNothingLeft() {
	GinkgoHelper()
	Eventually(func(g Gomega) {
		var waiting []string
		for _, p := range t.policies() {
			ready := apimeta.FindStatusCondition(p.Status.Conditions, v1alpha1.PolicyReady)
			waiting = append(waiting, fmt.Sprintf("%s: %+v", p.Name, ready))
		}
		g.Expect(waiting).To(BeEmpty(), "policies")
		g.Expect(t.assignments()).To(BeEmpty(), "assignments")
		g.Expect(t.claims()).To(BeEmpty(), "claims")
		g.Expect(t.reservations()).To(BeEmpty(), "IPAddresses")
		for _, s := range t.serviceCIDRs() {
			// Kubernetes itself keeps one for ten seconds after its deletion.
			g.Expect(s.DeletionTimestamp).NotTo(BeNil(), "ServiceCIDR %s", s.Name)
		}
		for _, n := range c.Nodes {
			g.Expect(rules(n)).NotTo(ContainSubstring(strings.TrimSuffix(t.v4.Addr().String(), "0")), "IPv4 rules on %s", n.Name)
			g.Expect(rules(n)).NotTo(ContainSubstring(t.v6.Addr().String()), "IPv6 rules on %s", n.Name)
		}
	}).Should(Succeed())
}

func (t *tenant) policies() []v1alpha1.ServiceProxyPolicy {
	GinkgoHelper()
	var list v1alpha1.ServiceProxyPolicyList
	Expect(k8s.List(ctx, &list)).To(Succeed())
	return slices.DeleteFunc(list.Items, func(p v1alpha1.ServiceProxyPolicy) bool { return !t.owns(p.Name) })
}

func (t *tenant) assignments() []v1alpha1.ServiceAssignment {
	GinkgoHelper()
	var list v1alpha1.ServiceAssignmentList
	Expect(k8s.List(ctx, &list, client.InNamespace(t.name))).To(Succeed())
	return list.Items
}

func (t *tenant) claims() []v1alpha1.AllocationClaim {
	GinkgoHelper()
	var list v1alpha1.AllocationClaimList
	Expect(k8s.List(ctx, &list)).To(Succeed())
	return slices.DeleteFunc(list.Items, func(a v1alpha1.AllocationClaim) bool { return !t.owns(a.Spec.PolicyName) })
}

// reservations are the IPAddresses that the controller made for the tenant's Services.
func (t *tenant) reservations() []networkingv1.IPAddress {
	GinkgoHelper()
	var list networkingv1.IPAddressList
	Expect(k8s.List(ctx, &list, client.MatchingLabels{networkingv1.LabelManagedBy: v1alpha1.ManagedBy})).To(Succeed())
	return slices.DeleteFunc(list.Items, func(ip networkingv1.IPAddress) bool { return ip.Spec.ParentRef.Namespace != t.name })
}

func (t *tenant) serviceCIDRs() []networkingv1.ServiceCIDR {
	GinkgoHelper()
	var list networkingv1.ServiceCIDRList
	Expect(k8s.List(ctx, &list, client.MatchingLabels{"app.kubernetes.io/managed-by": v1alpha1.ManagedBy})).To(Succeed())
	return slices.DeleteFunc(list.Items, func(s networkingv1.ServiceCIDR) bool { return !t.owns(s.Labels[v1alpha1.LabelPolicy]) })
}

func (t *tenant) owns(policy string) bool {
	return policy == t.name || strings.HasPrefix(policy, t.name+"-")
}

// policy makes a policy for the tenant's namespace with all of its ranges and without quarantine, unless change says otherwise.
func (t *tenant) policy(suffix string, change func(*v1alpha1.ServiceProxyPolicySpec)) *v1alpha1.ServiceProxyPolicy {
	GinkgoHelper()
	p := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: t.name + suffix}}
	p.Spec = v1alpha1.ServiceProxyPolicySpec{
		NamespaceSelector: metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: t.name}},
		ServiceRanges:     []v1alpha1.ServiceRange{{CIDR: t.v4.String()}, {CIDR: t.v6.String()}},
		NodePortRange:     &v1alpha1.NodePortRange{Start: int32(t.ports), End: int32(t.ports) + 99},
		Reuse:             v1alpha1.ReusePolicy{Quarantine: &metav1.Duration{}},
	}
	if change != nil {
		change(&p.Spec)
	}
	Expect(k8s.Create(ctx, p)).To(Succeed())
	return p
}

// readyPolicy makes a policy and waits until it is Ready.
func (t *tenant) readyPolicy(change func(*v1alpha1.ServiceProxyPolicySpec)) *v1alpha1.ServiceProxyPolicy {
	GinkgoHelper()
	p := t.policy("", change)
	kubectl("wait", "--for=condition=Ready", "serviceproxypolicy/"+p.Name, "--timeout=60s")
	return p
}

// policyCondition gives "STATUS REASON: MESSAGE" of a policy's condition, for Eventually.
func policyCondition(p *v1alpha1.ServiceProxyPolicy, kind string) func() string {
	return func() string {
		if err := k8s.Get(ctx, client.ObjectKeyFromObject(p), p); err != nil {
			return err.Error()
		}
		return conditionText(p.Status.Conditions, kind, p.Generation)
	}
}

// assignmentCondition is the same of the assignment of a Service.
func (t *tenant) assignmentCondition(name, kind string) func() string {
	return func() string {
		var a v1alpha1.ServiceAssignment
		if err := k8s.Get(ctx, client.ObjectKey{Namespace: t.name, Name: name}, &a); err != nil {
			return err.Error()
		}
		return conditionText(a.Status.Conditions, kind, a.Generation)
	}
}

func conditionText(all []metav1.Condition, kind string, generation int64) string {
	cond := apimeta.FindStatusCondition(all, kind)
	if cond == nil || cond.ObservedGeneration != generation {
		return "none"
	}
	return fmt.Sprintf("%s %s: %s", cond.Status, cond.Reason, cond.Message)
}

// outside gives addresses for a Service that lie outside of every policy's range. Left alone, the API server picks from any ServiceCIDR,
// those of policies included.
func outside() []string {
	outsiders++
	return []string{fmt.Sprintf("10.96.%d.%d", 100+outsiders/250, 1+outsiders%250), fmt.Sprintf("fd00:10:96::%x", 0x1000+outsiders)}
}

var outsiders = 0

// host is an address of the tenant's range.
func host(r netip.Prefix, n byte) netip.Addr {
	b := r.Addr().AsSlice()
	b[len(b)-1] = n
	a, _ := netip.AddrFromSlice(b)
	return a
}

// service makes a Service for the pods of Deployment web with one port, 80 to their port named http, at addresses outside of the tenant's ranges,
// unless change says otherwise.
func (t *tenant) service(name string, change func(*corev1.Service)) *corev1.Service {
	GinkgoHelper()
	svc := t.newService(name, change)
	Expect(k8s.Create(ctx, svc)).To(Succeed())
	return svc
}

func (t *tenant) newService(name string, change func(*corev1.Service)) *corev1.Service {
	svc := t.plainService(name, change)
	if svc.Spec.ClusterIP == "" {
		ips := outside()
		svc.Spec.ClusterIP, svc.Spec.ClusterIPs = ips[0], ips[:1]
		if ptr.Deref(svc.Spec.IPFamilyPolicy, "") == corev1.IPFamilyPolicyRequireDualStack {
			svc.Spec.ClusterIPs = ips
		}
	}
	return svc
}

// plainService is the same, but asks for no address.
func (t *tenant) plainService(name string, change func(*corev1.Service)) *corev1.Service {
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: t.name, Name: name},
		Spec: corev1.ServiceSpec{
			Selector: map[string]string{"app": "web"},
			Ports:    []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromString("http")}},
		},
	}
	if change != nil {
		change(svc)
	}
	return svc
}

// at gives a Service these addresses of the tenant's ranges.
func (t *tenant) at(n byte) func(*corev1.Service) {
	return func(s *corev1.Service) {
		s.Spec.ClusterIP = host(t.v4, n).String()
		s.Spec.ClusterIPs = []string{s.Spec.ClusterIP, host(t.v6, n).String()}
		s.Spec.IPFamilyPolicy = ptr.To(corev1.IPFamilyPolicyRequireDualStack)
	}
}

// awaitProgrammed waits as a user would.
func (t *tenant) awaitProgrammed(names ...string) {
	GinkgoHelper()
	for _, name := range names {
		// kubectl wait for a condition fails at once for an object that does not exist yet.
		kubectl("-n", t.name, "wait", "--for=create", "serviceassignment/"+name, "--timeout=60s")
		kubectl("-n", t.name, "wait", "--for=condition=Programmed", "serviceassignment/"+name, "--timeout=60s")
	}
}

// assignment reads the assignment of a Service.
func (t *tenant) assignment(name string) *v1alpha1.ServiceAssignment {
	GinkgoHelper()
	var a v1alpha1.ServiceAssignment
	Expect(k8s.Get(ctx, client.ObjectKey{Namespace: t.name, Name: name}, &a)).To(Succeed())
	return &a
}

// additional gives the addresses that a Service got from the range.
func additional(a *v1alpha1.ServiceAssignment) (out []netip.Addr) {
	for _, ip := range a.Spec.ServiceIPs {
		if ip.Source == v1alpha1.ServiceIPSourceAdditional {
			out = append(out, netip.MustParseAddr(ip.IP))
		}
	}
	return out
}

// Ports of the pods.
const (
	podHTTP, podAlt, podDNS = 8080, 9090, 5353
)

// deploy starts a Deployment and waits until all of its pods are ready. They go on answering for a while after their deletion, as pods should.
func (t *tenant) deploy(name string, replicas int32) []corev1.Pod {
	GinkgoHelper()
	labels := map[string]string{"app": name}
	Expect(k8s.Create(ctx, &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Namespace: t.name, Name: name},
		Spec: appsv1.DeploymentSpec{
			Replicas: ptr.To(replicas),
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{Containers: []corev1.Container{{
					Name: "echo", Image: "echo",
					Ports: []corev1.ContainerPort{
						{Name: "http", ContainerPort: podHTTP}, {Name: "alt", ContainerPort: podAlt},
						{Name: "dns", ContainerPort: podDNS, Protocol: corev1.ProtocolUDP},
					},
					Lifecycle: &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 2}}},
				}}},
			},
		},
	})).To(Succeed())
	return t.pods(name, int(replicas))
}

// pods waits until so many pods of a Deployment are ready, and no others exist.
func (t *tenant) pods(name string, n int) (out []corev1.Pod) {
	GinkgoHelper()
	Eventually(func(g Gomega) {
		var list corev1.PodList
		g.Expect(k8s.List(ctx, &list, client.InNamespace(t.name), client.MatchingLabels{"app": name})).To(Succeed())
		g.Expect(list.Items).To(HaveLen(n))
		for _, p := range list.Items {
			ready := slices.ContainsFunc(p.Status.Conditions, func(cond corev1.PodCondition) bool {
				return cond.Type == corev1.PodReady && cond.Status == corev1.ConditionTrue
			})
			g.Expect(ready && p.DeletionTimestamp == nil).To(BeTrue(), p.Name)
		}
		out = list.Items
	}).Should(Succeed())
	return out
}

// nodeState reads what a node's agent reports.
func nodeState(name string) *v1alpha1.NodeProxyState {
	GinkgoHelper()
	var s v1alpha1.NodeProxyState
	Expect(k8s.Get(ctx, client.ObjectKey{Name: name}, &s)).To(Succeed())
	return &s
}

func gone(obj client.Object) func() bool {
	return func() bool { return apierrors.IsNotFound(k8s.Get(ctx, client.ObjectKeyFromObject(obj), obj)) }
}

func patch(obj client.Object, format string, args ...any) {
	GinkgoHelper()
	Expect(k8s.Patch(ctx, obj, client.RawPatch("application/merge-patch+json", fmt.Appendf(nil, format, args...)))).To(Succeed())
}
