package e2e

import (
	"context"
	"fmt"
	"math"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster"
)

// port is one port of the Service web.
type port struct {
	name, network  string
	port, nodePort uint16
	pod            uint16
}

func (p port) String() string { return fmt.Sprintf("%s %s", p.network, p.name) }

// refusedAtOnce bounds a refusal: a client that gets none tries again only after a second.
const refusedAtOnce = 500 * time.Millisecond

var _ = Describe("a covered Service", Ordered, func() {
	var (
		t           *tenant
		ports       []port
		pods        []corev1.Pod
		ips         []netip.Addr // IPv4, IPv6
		externalIPs = []netip.Addr{netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8::7")}
	)

	// Once for all specs of this container, because each of them only looks.
	BeforeAll(func() {
		t = newTenant()
		ports = []port{
			{"http", "tcp", 80, t.ports + 10, podHTTP},
			{"alt", "tcp", 8000, t.ports + 11, podAlt},
			{"dns", "udp", 53, t.ports + 12, podDNS},
		}
		ips = []netip.Addr{host(t.v4, 178), host(t.v6, 0xb2)}
		By("older than its policy, for later", func() {
			t.service("grey", func(s *corev1.Service) { s.Spec.IPFamilyPolicy = ptr.To(corev1.IPFamilyPolicyRequireDualStack) })
		})
		policy := t.policy("", nil)
		pods = t.deploy("web", 5)
		Eventually(policyCondition(policy, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		t.service("web", func(s *corev1.Service) {
			t.at(178)(s)
			s.Spec.Type = corev1.ServiceTypeNodePort
			s.Spec.ExternalIPs = []string{externalIPs[0].String(), externalIPs[1].String()}
			s.Spec.Ports = []corev1.ServicePort{
				{Name: "http", Port: 80, TargetPort: intstr.FromString("http"), NodePort: int32(ports[0].nodePort)},
				{Name: "alt", Port: 8000, TargetPort: intstr.FromInt32(podAlt), NodePort: int32(ports[1].nodePort)},
				{Name: "dns", Port: 53, TargetPort: intstr.FromString("dns"), NodePort: int32(ports[2].nodePort), Protocol: corev1.ProtocolUDP},
			}
		})
		t.awaitProgrammed("web", "grey")
		nodes := map[string]bool{}
		for _, p := range pods {
			nodes[p.Spec.NodeName] = true
		}
		Expect(nodes).To(HaveLen(3), "the pods must be on all nodes, or nothing crosses between them")
	})

	It("makes its policy Ready and is shown by kubectl", func() {
		kubectl("wait", "--for=condition=Ready", "serviceproxypolicy/"+t.name, "--timeout=60s")
		Expect(kubectl("-n", t.name, "get", "svca", "web")).To(MatchRegexp(`web\s+%s\s+NFTables\s+%s\s+80\s+%d\s+True\s+True\s+3`, t.name, ips[0], ports[0].nodePort))
		a := t.assignment("web")
		Expect(a.Spec.ServiceIPs).To(ConsistOf(
			v1alpha1.ServiceIP{IP: ips[0].String(), Source: v1alpha1.ServiceIPSourceClusterIP},
			v1alpha1.ServiceIP{IP: ips[1].String(), Source: v1alpha1.ServiceIPSourceClusterIP}))
		Expect(a.Status.Nodes).To(Equal(v1alpha1.AssignmentNodesStatus{Desired: 3, Programmed: 3}))
		var claims []string
		for _, claim := range t.claims() {
			if claim.Spec.Holder.Name == "web" {
				claims = append(claims, claim.Name)
			}
		}
		Expect(claims).To(ConsistOf(ips[0].String(), fmt.Sprintf("fd00-0010-0099-%04x-0000-0000-0000-00b2", tenants),
			fmt.Sprintf("nodeport-%d", ports[0].nodePort), fmt.Sprintf("nodeport-%d", ports[1].nodePort), fmt.Sprintf("nodeport-%d", ports[2].nodePort)))
		for _, n := range c.Nodes {
			Eventually(func() *v1alpha1.NodeProxyState { return nodeState(n.Name) }).Should(HaveField("Status.Services", BeNumerically(">=", 4)))
		}
		version, err := exec.Command(agentCommand(c.Nodes[0])[0], "--version").Output()
		Expect(err).NotTo(HaveOccurred())
		Expect(string(version)).NotTo(ContainSubstring("devel"), "it is built as a release is")
		Expect(nodeState("node1").Status.AgentVersion).To(Equal(strings.TrimSpace(string(version))))
	})

	It("answers at its ClusterIPs, from pods on every node, with their addresses kept", func() {
		for _, from := range podCallers() {
			for family, ip := range ips {
				for _, p := range ports {
					a := call(from, p.network, ip, p.port)
					Expect(a.Namespace).To(Equal(t.name))
					Expect(a.Server.Port()).To(Equal(p.pod), "%s", p)
					Expect(a.Client.Addr()).To(Equal(from.addresses[family]), "%s from %s", p, from.name)
				}
			}
		}
	})

	It("answers at its ClusterIPs, from the nodes themselves", func() {
		for _, from := range nodeCallers() {
			for _, ip := range ips {
				for _, p := range ports {
					Expect(call(from, p.network, ip, p.port).Server.Port()).To(Equal(p.pod), "%s", p)
				}
			}
		}
	})

	It("answers at its node ports, from outside through each node, and masquerades", func() {
		outside := outsideCaller()
		for _, n := range c.Nodes {
			for family, address := range n.Addresses {
				for _, p := range ports {
					for range 5 { // with five pods on three nodes: local ones and others
						a := call(outside, p.network, address, p.nodePort)
						Expect(a.Server.Port()).To(Equal(p.pod), "%s", p)
						if a.Node != n.Name {
							Expect(a.Client.Addr()).To(Equal(address), "%s through %s to %s: the answer must come back through the node", p, n.Name, a.Node)
						} else {
							Expect(a.Client.Addr()).NotTo(Equal(outside.addresses[family]), "%s through %s", p, n.Name)
						}
					}
				}
			}
		}
	})

	It("answers at its node ports, from pods and nodes", func() {
		for _, from := range append(podCallers(), nodeCallers()...) {
			for _, n := range c.Nodes {
				for _, p := range ports {
					call(from, p.network, n.Addresses[0], p.nodePort)
					call(from, p.network, n.Addresses[1], p.nodePort)
				}
			}
		}
	})

	It("answers at its external IPs, from outside through each node, and from pods", func() {
		outside := outsideCaller()
		for _, n := range c.Nodes {
			for family, ip := range externalIPs {
				route := []string{"route", "replace", netip.PrefixFrom(ip, ip.BitLen()).String(), "via", n.Addresses[family].String()}
				_, err := c.Outside().Run("ip", route...)
				Expect(err).NotTo(HaveOccurred())
				for _, p := range ports {
					Expect(call(outside, p.network, ip, p.port).Server.Port()).To(Equal(p.pod), "%s through %s", p, n.Name)
				}
			}
		}
		for _, from := range podCallers() {
			for _, ip := range externalIPs {
				call(from, "tcp", ip, 80)
			}
		}
	})

	It("that is older than its policy answers at its old ClusterIPs and at additional ones of the range", func() {
		a := t.assignment("grey")
		extra := additional(a)
		Expect(extra).To(HaveLen(2))
		Expect(t.v4.Contains(extra[0]) || t.v4.Contains(extra[1])).To(BeTrue(), "%v", extra)
		Expect(t.v6.Contains(extra[0]) || t.v6.Contains(extra[1])).To(BeTrue(), "%v", extra)
		Expect(a.Spec.ServiceIPs).To(HaveLen(4))
		for _, from := range append(podCallers(), nodeCallers()...) {
			for _, ip := range a.Spec.ServiceIPs {
				call(from, "tcp", netip.MustParseAddr(ip.IP), 80)
			}
		}
	})

	It("is refused at once on a port that it does not have", func() {
		for _, from := range append(podCallers(), nodeCallers()...) {
			for _, ip := range ips {
				start := time.Now()
				Expect(callError(from.ns, "tcp", netip.AddrPortFrom(ip, 81))).To(MatchError(syscall.ECONNREFUSED), "from %s", from.name)
				Expect(time.Since(start)).To(BeNumerically("<", refusedAtOnce), "from %s", from.name)
			}
		}
	})

	It("balances evenly over all endpoints", func() {
		const connections = 1000
		var (
			answered = map[string]int{}
			mu       sync.Mutex
			wg       sync.WaitGroup
			failures []error
		)
		callers := podCallers()
		for i := range 10 {
			wg.Go(func() {
				for range connections / 10 {
					a, err := cluster.Call(ctx, callers[i%len(callers)].ns, "tcp", netip.AddrPortFrom(ips[i%2], 80))
					mu.Lock()
					if err != nil {
						failures = append(failures, err)
					}
					answered[a.Pod]++
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		Expect(failures).To(BeEmpty())
		Expect(answered).To(HaveLen(len(pods)))
		expected, chi2 := float64(connections)/float64(len(pods)), 0.0
		for _, n := range answered {
			chi2 += math.Pow(float64(n)-expected, 2) / expected
		}
		AddReportEntry("balancing", fmt.Sprintf("%v, chi-square %.1f", answered, chi2))
		// With 4 degrees of freedom a uniform choice exceeds it once in a million runs.
		Expect(chi2).To(BeNumerically("<", 33.4), "%v", answered)
	})
})

var _ = Describe("a pod", func() {
	It("reaches its own Service, itself included", func() {
		t := newTenant()
		t.readyPolicy(nil)
		pod := t.deploy("web", 1)[0]
		t.service("web", func(s *corev1.Service) {
			t.at(9)(s)
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "dns", Port: 53, TargetPort: intstr.FromString("dns"), Protocol: corev1.ProtocolUDP})
		})
		t.awaitProgrammed("web")
		self := caller{name: pod.Name, ns: c.Pod(t.name, pod.Name), addresses: podAddresses(&pod)}
		for family, ip := range []netip.Addr{host(t.v4, 9), host(t.v6, 9)} {
			for _, p := range []port{{"http", "tcp", 80, 0, podHTTP}, {"dns", "udp", 53, 0, podDNS}} {
				a := call(self, p.network, ip, p.port)
				Expect(a.Pod).To(Equal(pod.Name))
				Expect(a.Client.Addr()).NotTo(Equal(self.addresses[family]), "%s: a packet from itself to itself would not come back through the node", p)
			}
			a := call(self, "tcp", self.addresses[family], podHTTP)
			Expect(a.Client.Addr()).To(Equal(self.addresses[family]), "a direct connection is not ours to translate")
		}
	})
})

var _ = Describe("a Service without endpoints", func() {
	It("is refused at once, at every address and from everywhere, until it has one", func() {
		t := newTenant()
		t.readyPolicy(nil)
		svc := t.service("web", func(s *corev1.Service) {
			t.at(10)(s)
			s.Spec.Type = corev1.ServiceTypeNodePort
			s.Spec.Ports[0].NodePort = int32(t.ports)
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{
				Name: "dns", Port: 53, TargetPort: intstr.FromString("dns"), Protocol: corev1.ProtocolUDP, NodePort: int32(t.ports) + 1,
			})
		})
		Eventually(t.assignmentCondition("web", v1alpha1.AssignmentProgrammed)).Should(And(
			HavePrefix("False NoReadyEndpoints"), ContainSubstring("3 of 3 nodes")))
		refused := func(from caller, network string, to netip.AddrPort, want ...error) {
			GinkgoHelper()
			start := time.Now()
			err := callError(from.ns, network, to)
			Expect(err).To(HaveOccurred())
			Expect(slices.ContainsFunc(want, func(w error) bool { ok, _ := MatchError(w).Match(err); return ok })).To(BeTrue(),
				"from %s to %s %s: %v", from.name, network, to, err)
			Expect(time.Since(start)).To(BeNumerically("<", refusedAtOnce), "from %s to %s %s", from.name, network, to)
		}
		for _, ip := range []netip.Addr{host(t.v4, 10), host(t.v6, 10)} {
			for _, from := range append(podCallers(), nodeCallers()...) {
				refused(from, "tcp", netip.AddrPortFrom(ip, 80), syscall.ECONNREFUSED)
				// To a node's own datagram the kernel reports it as EPERM.
				refused(from, "udp", netip.AddrPortFrom(ip, 53), syscall.ECONNREFUSED, syscall.EPERM)
			}
		}
		outside := outsideCaller()
		for _, n := range c.Nodes {
			for _, address := range n.Addresses {
				refused(outside, "tcp", netip.AddrPortFrom(address, t.ports), syscall.ECONNREFUSED)
				refused(outside, "udp", netip.AddrPortFrom(address, t.ports+1), syscall.ECONNREFUSED)
			}
		}
		t.deploy("web", 1)
		t.awaitProgrammed("web")
		for _, from := range podCallers() {
			call(from, "tcp", host(t.v4, 10), 80)
			call(from, "udp", host(t.v6, 10), 53)
		}
		Expect(k8s.Delete(ctx, svc)).To(Succeed())
		Eventually(gone(&v1alpha1.ServiceAssignment{ObjectMeta: svc.ObjectMeta})).Should(BeTrue())
	})
})

var _ = Describe("a UDP client that never pauses", func() {
	It("is led to another pod when its own goes away", func() {
		t := newTenant()
		t.readyPolicy(nil)
		pods := t.deploy("web", 2)
		t.service("web", func(s *corev1.Service) {
			t.at(11)(s)
			s.Spec.Ports = []corev1.ServicePort{{Name: "dns", Port: 53, TargetPort: intstr.FromString("dns"), Protocol: corev1.ProtocolUDP}}
		})
		t.awaitProgrammed("web")
		for _, ip := range []netip.Addr{host(t.v4, 11), host(t.v6, 11)} {
			// One socket, so that conntrack takes all its datagrams for one flow for as long as they keep coming.
			conn, err := cluster.Dial(ctx, podCallers()[0].ns, "udp", netip.AddrPortFrom(ip, 53))
			Expect(err).NotTo(HaveOccurred())
			DeferCleanup(conn.Close)
			ask := func() (string, error) {
				asking, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
				defer cancel()
				a, err := cluster.Ask(asking, conn)
				return a.Pod, err
			}
			first, err := ask()
			Expect(err).NotTo(HaveOccurred())
			for range 20 {
				Expect(ask()).To(Equal(first), "one flow, one pod")
			}
			i := slices.IndexFunc(pods, func(p corev1.Pod) bool { return p.Name == first })
			Expect(k8s.Delete(ctx, &pods[i], client.GracePeriodSeconds(0))).To(Succeed())
			Eventually(ask).WithTimeout(10 * time.Second).Should(And(Not(BeEmpty()), Not(Equal(first))))
			pods = t.pods("web", 2)
		}
	})
})

var _ = Describe("traffic policies", func() {
	It("Local: only pods of the node answer, and see who asked", func() {
		t := newTenant()
		t.readyPolicy(nil)
		pod := t.deploy("web", 1)[0]
		t.service("web", func(s *corev1.Service) {
			t.at(12)(s)
			s.Spec.Type = corev1.ServiceTypeNodePort
			s.Spec.Ports[0].NodePort = int32(t.ports)
			s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
			s.Spec.InternalTrafficPolicy = ptr.To(corev1.ServiceInternalTrafficPolicyLocal)
		})
		t.awaitProgrammed("web")
		dropped := func(from caller, to netip.AddrPort) {
			GinkgoHelper()
			trying, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
			defer cancel()
			_, err := cluster.Call(trying, from.ns, "tcp", to)
			Expect(err).To(Satisfy(os.IsTimeout), "from %s to %s: dropped, not refused, because there are endpoints elsewhere", from.name, to)
		}
		outside, calling := outsideCaller(), podCallers()
		for i, n := range c.Nodes {
			for family, ip := range []netip.Addr{host(t.v4, 12), host(t.v6, 12)} {
				if n.Name != pod.Spec.NodeName {
					dropped(outside, netip.AddrPortFrom(n.Addresses[family], t.ports))
					dropped(calling[i], netip.AddrPortFrom(ip, 80))
					continue
				}
				a := call(outside, "tcp", n.Addresses[family], t.ports)
				Expect(a.Client.Addr()).To(Equal(outside.addresses[family]))
				a = call(calling[i], "tcp", ip, 80)
				Expect(a.Client.Addr()).To(Equal(calling[i].addresses[family]))
			}
		}
	})
})
