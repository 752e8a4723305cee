package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// reclaimed is how soon a reservation that came to nothing is gone.
const reclaimed = 2 * time.Minute

var _ = Describe("admission", Ordered, func() {
	var victim *tenant // of the controller's death

	// First of all, because what a dead controller left is reclaimed only after a while: the specs between do not wait for it.
	BeforeAll(func() {
		victim = newTenant()
		victim.readyPolicy(nil)
	})

	It("lets every create pass while the controller is killed, and makes up for what fell through", func() {
		const services, workers = 100, 8
		DeferCleanup(ensureController)
		var (
			wg     sync.WaitGroup
			errs   [services]error
			next   atomic.Int32
			killed = make(chan error, 1)
		)
		for range workers {
			wg.Go(func() {
				for i := int(next.Add(1)) - 1; i < services; i = int(next.Add(1)) - 1 {
					if i == services/3 {
						killed <- c.Controller.Kill()
					}
					if i == 2*services/3 {
						errs[i] = c.Controller.Start(ctx)
					}
					if errs[i] == nil {
						errs[i] = k8s.Create(ctx, victim.plainService(fmt.Sprintf("web-%03d", i), nil))
					}
				}
			})
		}
		wg.Wait()
		Expect(<-killed).To(Succeed())
		Expect(slices.DeleteFunc(errs[:], func(err error) bool { return err == nil })).To(BeEmpty())
		Eventually(func(g Gomega) {
			assigned := map[netip.Addr]string{}
			native := 0
			for i := range services {
				var a v1alpha1.ServiceAssignment
				g.Expect(k8s.Get(ctx, client.ObjectKey{Namespace: victim.name, Name: fmt.Sprintf("web-%03d", i)}, &a)).To(Succeed())
				own := inside(victim.v4, &a)
				g.Expect(own).To(HaveLen(1), "%s has %v", a.Name, a.Spec.ServiceIPs)
				g.Expect(assigned).NotTo(HaveKey(own[0]), "%s has the address of %s", a.Name, assigned[own[0]])
				assigned[own[0]] = a.Name
				if len(a.Spec.ServiceIPs) == 1 {
					native++
				}
			}
			g.Expect(native).To(BeNumerically(">=", services/3-workers), "before its death the controller chose ClusterIPs")
			g.Expect(native).To(BeNumerically("<", services), "if nothing fell through, nothing is shown")
			AddReportEntry("killed", fmt.Sprintf("%d of %d Services have a native ClusterIP, the others an additional address", native, services))
		}).WithPolling(500 * time.Millisecond).Should(Succeed())
	})

	It("gives a new Service its ClusterIPs and node ports out of its policy's ranges, and they work like any other", func() {
		t := newTenant()
		t.readyPolicy(nil)
		t.deploy("web", 3)
		apply(t.manifest("web", ""))
		svc := t.read("web")
		Expect(svc.Spec.ClusterIPs).To(HaveLen(2))
		ips := addresses(svc.Spec.ClusterIPs)
		Expect(t.v4.Contains(ips[0])).To(BeTrue(), "%v", ips)
		Expect(t.v6.Contains(ips[1])).To(BeTrue(), "%v", ips)
		http, dns, dnsTCP := svc.Spec.Ports[0].NodePort, svc.Spec.Ports[1].NodePort, svc.Spec.Ports[2].NodePort
		for _, p := range []int32{http, dns, dnsTCP} {
			Expect(t.hasPort(p)).To(BeTrue(), "node port %d", p)
		}
		Expect(dnsTCP).To(Equal(dns), "one node port for TCP and UDP of one port")
		Expect(http).NotTo(Equal(dns))
		Expect(kubectl("-n", t.name, "get", "svc", "web")).To(MatchRegexp(`web\s+NodePort\s+%s\s+<none>\s+80:%d/TCP,53:%d/UDP,53:%d/TCP`, ips[0], http, dns, dns))

		t.awaitProgrammed("web")
		a := t.assignment("web")
		Expect(a.Spec.ServiceIPs).To(ConsistOf(
			v1alpha1.ServiceIP{IP: ips[0].String(), Source: v1alpha1.ServiceIPSourceClusterIP},
			v1alpha1.ServiceIP{IP: ips[1].String(), Source: v1alpha1.ServiceIPSourceClusterIP}), "DNS answers with the ClusterIPs, so that they must be all there is")
		for _, from := range append(podCallers(), nodeCallers()...) {
			for _, ip := range ips {
				call(from, "tcp", ip, 80)
				call(from, "tcp", ip, 53)
				call(from, "udp", ip, 53)
			}
		}
		outside := outsideCaller()
		for _, n := range c.Nodes {
			for _, address := range n.Addresses {
				call(outside, "tcp", address, uint16(http))
				call(outside, "udp", address, uint16(dns))
			}
		}

		By("kubectl tells who holds an address")
		holder := MatchRegexp(`Bound\s+ClusterIP\s+%s\s+web\s+%s`, t.name, t.name)
		Eventually(kubectl).WithArguments("get", "claim", ips[0].String()).Should(holder)
		Eventually(kubectl).WithArguments("get", "claim", fmt.Sprintf("nodeport-%d", dns)).Should(MatchRegexp(`Bound\s+NodePort\s+%s\s+web\s+%s`, t.name, t.name))

		By("a headless Service and an ExternalName are left alone")
		headless := t.plainService("headless", func(s *corev1.Service) { s.Spec.ClusterIP = corev1.ClusterIPNone })
		elsewhere := t.plainService("elsewhere", func(s *corev1.Service) {
			s.Spec = corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "example.org"}
		})
		for _, s := range []*corev1.Service{headless, elsewhere} {
			Expect(k8s.Create(ctx, s)).To(Succeed())
		}
		Expect(headless.Spec.ClusterIPs).To(Equal([]string{corev1.ClusterIPNone}))
		Expect(elsewhere.Spec.ClusterIPs).To(BeEmpty())
		Expect(t.claims()).To(HaveLen(4), "two addresses and two node ports of web")
	})

	It("gives each tenant what is its own, and keeps out of it whom no policy covers", func() {
		const each = 15
		a, b := newTenant(), newTenant()
		a.readyPolicy(nil)
		b.readyPolicy(nil)
		nodePort := func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeNodePort }
		for i := range each {
			for _, t := range []*tenant{a, b} {
				svc := t.plainService(fmt.Sprintf("web-%02d", i), nodePort)
				Expect(k8s.Create(ctx, svc)).To(Succeed())
				Expect(t.v4.Contains(netip.MustParseAddr(svc.Spec.ClusterIP))).To(BeTrue(), svc.Spec.ClusterIP)
				Expect(t.hasPort(svc.Spec.Ports[0].NodePort)).To(BeTrue(), "node port %d", svc.Spec.Ports[0].NodePort)
			}
			nobody := a.plainService(fmt.Sprintf("nobody-%02d", i), func(s *corev1.Service) {
				nodePort(s)
				s.Namespace = clients
				s.Spec.IPFamilyPolicy = ptr.To(corev1.IPFamilyPolicyRequireDualStack)
			})
			Expect(k8s.Create(ctx, nobody)).To(Succeed())
			DeferCleanup(k8s.Delete, ctx, nobody)
			for _, ip := range addresses(nobody.Spec.ClusterIPs) {
				Expect(apiServers4.Contains(ip) || apiServers6.Contains(ip)).To(BeTrue(), "%s is a tenant's", ip)
			}
			for _, t := range []*tenant{victim, a, b} {
				Expect(t.hasPort(nobody.Spec.Ports[0].NodePort)).To(BeFalse(), "node port %d is of %s", nobody.Spec.Ports[0].NodePort, t.name)
			}
		}
	})

	It("shows nothing false under dry run, and no difference where there is none", func() {
		t := newTenant()
		t.readyPolicy(nil)
		shown := dryRun(t.manifest("web", ""), "-o", "jsonpath={.spec.clusterIPs[*]} {.spec.ports[*].nodePort}")
		for _, shown := range strings.Fields(shown) {
			// kube-apiserver itself shows the first address of any of its ranges, which nobody ever gets.
			if ip, err := netip.ParseAddr(shown); err == nil && ip != t.v4.Addr() && ip != t.v6.Addr() {
				Expect(t.v4.Contains(ip) || t.v6.Contains(ip)).To(BeFalse(), "%s is shown, and nobody holds it", ip)
			}
		}
		Expect(t.claims()).To(BeEmpty())

		apply(t.manifest("web", ""))
		before := t.read("web")
		out, err := c.Kubectl(ctx, t.manifest("web", ""), "diff", "-f", "-")
		Expect(err).NotTo(HaveOccurred(), out)
		Expect(out).To(BeEmpty())
		out, err = c.Kubectl(ctx, t.manifest("web", "    - {name: alt, port: 8000, targetPort: alt}\n"), "diff", "-f", "-")
		Expect(err).To(MatchError(ContainSubstring("exit status 1")), "kubectl diff tells a difference so")
		Expect(out).To(ContainSubstring("+    port: 8000"))
		Expect(out).NotTo(MatchRegexp(`(?m)^[-+] .*(clusterIP|- fd00|- 10\.)`), "addresses do not change")
		Expect(t.claims()).To(HaveLen(4), "two addresses and two node ports: a dry run takes nothing")
		Expect(t.read("web").ResourceVersion).To(Equal(before.ResourceVersion))
	})

	It("refuses under Strict what lies outside, and everybody who asks for what is another's", func() {
		strict, open := newTenant(), newTenant()
		strict.readyPolicy(enforce)
		open.readyPolicy(nil)
		foreign := host(strict.v4, 77).String()
		for _, tt := range []struct {
			what, manifest string
			names          []string
		}{
			{"a ClusterIP outside", strict.manifestAt("outside", outside()[0]), []string{strict.name, strict.v4.String()}},
			{"a neighbour asks for it", open.manifestAt("thief", foreign), []string{strict.name, strict.v4.String()}},
			{"nobody's Service asks for it", (&tenant{name: clients}).manifestAt("thief", foreign), []string{strict.name, strict.v4.String()}},
		} {
			By(tt.what)
			Eventually(func(g Gomega) {
				out, err := c.Kubectl(ctx, tt.manifest, "create", "-f", "-")
				if err == nil { // the API server does not know the rule yet
					_, err := c.Kubectl(ctx, tt.manifest, "delete", "-f", "-")
					g.Expect(err).NotTo(HaveOccurred())
				}
				g.Expect(err).To(HaveOccurred())
				for _, name := range tt.names {
					g.Expect(out).To(ContainSubstring(name))
				}
			}).Should(Succeed())
		}
		Expect(k8s.Create(ctx, strict.plainService("own", func(s *corev1.Service) { s.Spec.ClusterIP = foreign }))).To(Succeed())
		dryRun(strict.manifest("plain", ""))
		plain := strict.plainService("plain", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeNodePort })
		Expect(k8s.Create(ctx, plain)).To(Succeed())
		Expect(strict.v4.Contains(netip.MustParseAddr(plain.Spec.ClusterIP))).To(BeTrue(), plain.Spec.ClusterIP)
		Expect(strict.hasPort(plain.Spec.Ports[0].NodePort)).To(BeTrue())
	})

	It("is missed only under Strict while there is no controller, and holds up no deletion", func() {
		open, strict := newTenant(), newTenant()
		open.readyPolicy(nil)
		strict.readyPolicy(enforce)
		before := strict.plainService("before", nil)
		Expect(k8s.Create(ctx, before)).To(Succeed())
		DeferCleanup(ensureController)
		Expect(c.Controller.Kill()).To(Succeed())

		Expect(k8s.Create(ctx, open.plainService("during", nil))).To(Succeed())
		Expect(k8s.Create(ctx, (&tenant{name: clients}).plainService("during", nil))).To(Succeed())
		DeferCleanup(func() { kubectl("-n", clients, "delete", "service", "during") })
		Expect(k8s.Create(ctx, strict.plainService("during", nil))).To(MatchError(ContainSubstring("failed calling webhook")))
		Expect(k8s.Create(ctx, strict.plainService("during", nil), client.DryRunAll)).To(MatchError(ContainSubstring("failed calling webhook")))
		patch(before, `{"metadata":{"labels":{"edited":"yes"},"finalizers":["example.org/held"]}}`)
		Expect(k8s.Delete(ctx, before)).To(Succeed())
		patch(before, `{"metadata":{"finalizers":null}}`)
		Eventually(gone(before)).Should(BeTrue())
		kubectl("delete", "namespace", strict.name, "--timeout=60s")

		By("the controller comes back")
		Expect(c.Controller.Start(ctx)).To(Succeed())
		Eventually(func(g Gomega) {
			var a v1alpha1.ServiceAssignment
			g.Expect(k8s.Get(ctx, client.ObjectKey{Namespace: open.name, Name: "during"}, &a)).To(Succeed())
			g.Expect(inside(open.v4, &a)).To(HaveLen(1), "%v", a.Spec.ServiceIPs)
		}).Should(Succeed())
		Eventually(func() (string, error) {
			svc := open.plainService("", func(s *corev1.Service) { s.GenerateName = "after-" })
			err := k8s.Create(ctx, svc)
			return svc.Spec.ClusterIP, err
		}).Should(WithTransform(func(ip string) bool { return open.v4.Contains(netip.MustParseAddr(ip)) }, BeTrue()), "it is asked again")
		// What kube-apiserver chose may lie in the other one's range, whose policy would wait for it.
		Expect(k8s.DeleteAllOf(ctx, &corev1.Service{}, client.InNamespace(open.name))).To(Succeed())
	})

	It("reclaims what a killed controller had reserved for nobody", func() {
		Eventually(func() []string {
			var reserved []string
			for _, claim := range victim.claims() {
				if claim.Spec.State == v1alpha1.ClaimReserved {
					reserved = append(reserved, claim.Name)
				}
			}
			return reserved
		}).WithTimeout(reclaimed).Should(BeEmpty())
	})
})

// The API server's own ranges.
var apiServers4, apiServers6 = netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:10:96::/112")

// enforce makes a policy Strict.
func enforce(s *v1alpha1.ServiceProxyPolicySpec) { s.Enforcement = v1alpha1.EnforcementStrict }

// apply runs kubectl apply and expects it to succeed.
func apply(manifest string) {
	GinkgoHelper()
	_, err := c.Kubectl(ctx, manifest, "apply", "-f", "-")
	Expect(err).NotTo(HaveOccurred())
}

// dryRun runs kubectl apply --dry-run=server and gives what it prints.
func dryRun(manifest string, args ...string) (out string) {
	GinkgoHelper()
	// Under dry run kube-apiserver asks a random one of its ranges, also one that is new or on its way out, of which it then says that it is not ready.
	Eventually(func() (err error) {
		out, err = c.Kubectl(ctx, manifest, append([]string{"apply", "--dry-run=server", "-f", "-"}, args...)...)
		return err
	}).Should(Succeed())
	return out
}

// manifest is that of a dual-stack NodePort Service that asks for no address or port. More ports can be added.
func (t *tenant) manifest(name, ports string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: %s, namespace: %s}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports:
    - {name: http, port: 80, targetPort: http}
    - {name: dns, port: 53, targetPort: dns, protocol: UDP}
    - {name: dns-tcp, port: 53, targetPort: http}
%s`, name, t.name, ports)
}

// manifestAt is that of a Service that asks for an address.
func (t *tenant) manifestAt(name, ip string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: %s, namespace: %s}
spec:
  clusterIP: %s
  selector: {app: web}
  ports: [{port: 80, targetPort: http}]
`, name, t.name, ip)
}

// read reads a Service.
func (t *tenant) read(name string) *corev1.Service {
	GinkgoHelper()
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: t.name, Name: name}}
	Expect(k8s.Get(ctx, client.ObjectKeyFromObject(svc), svc)).To(Succeed())
	return svc
}

// hasPort tells whether a node port is the tenant's.
func (t *tenant) hasPort(port int32) bool {
	return port >= int32(t.ports) && port <= int32(t.ports)+99
}

// inside gives the service IPs of an assignment that lie in a range.
func inside(r netip.Prefix, a *v1alpha1.ServiceAssignment) (out []netip.Addr) {
	for _, ip := range a.Spec.ServiceIPs {
		if addr := netip.MustParseAddr(ip.IP); r.Contains(addr) {
			out = append(out, addr)
		}
	}
	return out
}

func addresses(ips []string) (out []netip.Addr) {
	for _, ip := range ips {
		out = append(out, netip.MustParseAddr(ip))
	}
	return out
}

// ensureController starts the controller if the spec ended before it did.
func ensureController() {
	if !c.Controller.Running() {
		Expect(c.Controller.Start(ctx)).To(Succeed())
	}
}
