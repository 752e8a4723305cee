package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

//go:embed policy.yaml
var policyYAML string

//go:embed before.yaml
var beforeYAML string

//go:embed services.yaml
var servicesYAML string

//go:embed strict.yaml
var strictYAML string

// namespace is where the story takes place.
const namespace = "demo"

var (
	orange     = netip.MustParseAddrPort("10.99.13.178:80")
	purplePort = uint16(30080)
	strict     = netip.MustParsePrefix("10.98.7.0/24")
	ranges     = []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16"), netip.MustParsePrefix("fd00:10:99::/112")}
)

// story is what is told, scene by scene. A scene that does not hold ends it.
type story struct {
	c       *cluster.Cluster
	out     io.Writer
	colours bool
	scenes  int
}

func (s *story) tell(ctx context.Context) error {
	for _, scene := range []struct {
		title string
		play  func(context.Context) error
	}{
		{"Before: pods on every node, and a Service as the API server makes them", s.before},
		{"An administrator declares ranges: kubectl apply -f policy.yaml", s.policy},
		{"Two Services: orange asks for 10.99.13.178, purple for node port 30080", s.services},
		{"Their addresses are their ClusterIPs, as in any cluster", s.native},
		{"What the cluster says", s.overview},
		{"Pods call the orange Service at 10.99.13.178:80", s.callOrange},
		{"The outside host calls the purple node port through each node", s.callPurple},
		{"The grey Service was there before: it keeps its addresses and gets more", s.callGrey},
		{"A Strict tenant gets what is its own, and nothing else", s.strictTenant},
		{"An orange pod goes away under traffic", s.podGoesAway},
		{"The agent on NODE1 is stopped: traffic goes on", s.agentStops},
	} {
		s.scene(scene.title)
		if err := scene.play(ctx); err != nil {
			return fmt.Errorf("%s: %w", scene.title, err)
		}
	}
	return nil
}

func (s *story) before(ctx context.Context) error {
	if _, err := s.c.Kubectl(ctx, beforeYAML, "apply", "-f", "-"); err != nil {
		return err
	}
	if _, err := s.c.Kubectl(ctx, "", "-n", namespace, "wait", "--for=condition=Available", "deployment", "--all", "--timeout=120s"); err != nil {
		return err
	}
	if _, err := s.c.Kubectl(ctx, "", "-n", namespace, "wait", "--for=condition=Ready", "pod", "--all", "--timeout=120s"); err != nil {
		return err
	}
	return s.show(ctx, "-n", namespace, "get", "pods,service", "-o", "custom-columns="+
		"KIND:.kind,NAME:.metadata.name,NODE:.spec.nodeName,POD IPS:.status.podIPs[*].ip,CLUSTER IPS:.spec.clusterIPs[*]")
}

func (s *story) policy(ctx context.Context) error {
	s.say("%s", strings.TrimRight(policyYAML, "\n"))
	start := time.Now()
	if _, err := s.c.Kubectl(ctx, policyYAML, "apply", "-f", "-"); err != nil {
		return err
	}
	if err := s.show(ctx, "wait", "--for=condition=Ready", "serviceproxypolicy/demo", "--timeout=120s"); err != nil {
		return err
	}
	s.good("the policy is Ready %s after it was applied", since(start))
	return nil
}

func (s *story) services(ctx context.Context) error {
	if _, err := s.c.Kubectl(ctx, servicesYAML, "apply", "-f", "-"); err != nil {
		return err
	}
	start := time.Now()
	for _, name := range []string{"orange", "purple"} {
		// kubectl wait fails at once for an object that does not exist yet.
		if err := s.show(ctx, "-n", namespace, "wait", "--for=create", "serviceassignment/"+name, "--timeout=60s"); err != nil {
			return err
		}
		if err := s.show(ctx, "-n", namespace, "wait", "--for=condition=Programmed", "serviceassignment/"+name, "--timeout=60s"); err != nil {
			return err
		}
	}
	s.good("both are in the kernels of all three nodes, and kubectl knows, %s after they were applied", since(start))
	// Programmed means that traffic works, so the very first call from each node must.
	for i := range s.c.Nodes {
		if _, err := cluster.Call(ctx, s.client(i), "tcp", orange); err != nil {
			return fmt.Errorf("the Service is Programmed, but the first call from %s failed: %w", nodeName(i), err)
		}
	}
	s.good("the very first call from every node is answered")
	return nil
}

func (s *story) native(ctx context.Context) error {
	if err := s.show(ctx, "-n", namespace, "get", "services"); err != nil {
		return err
	}
	var purple corev1.Service
	if err := s.c.Client().Get(ctx, client.ObjectKey{Namespace: namespace, Name: "purple"}, &purple); err != nil {
		return err
	}
	ip, err := netip.ParseAddr(purple.Spec.ClusterIP)
	if err != nil {
		return err
	}
	if !ranges[0].Contains(ip) {
		return fmt.Errorf("purple asked for no address and got %s, which is not in %s", ip, ranges[0])
	}
	s.good("purple asked for no address: its ClusterIP %s is out of the policy's range, so that DNS leads there", ip)
	if err := s.show(ctx, "get", "claim", orange.Addr().String(), fmt.Sprintf("nodeport-%d", purplePort)); err != nil {
		return err
	}
	s.good("and everybody can see who holds an address or a port")
	return nil
}

func (s *story) overview(ctx context.Context) error {
	return s.show(ctx, "get", "spp,svca,nps", "-A")
}

func (s *story) callOrange(ctx context.Context) error {
	answered := map[string]int{}
	for i := range s.c.Nodes {
		own, err := s.podAddress(ctx, clientPod(i))
		if err != nil {
			return err
		}
		crossed := false
		for n := range 10 {
			a, err := cluster.Call(ctx, s.client(i), "tcp", orange)
			if err != nil {
				return fmt.Errorf("call %d from a pod on %s: %w", n+1, nodeName(i), err)
			}
			if a.Client.Addr() != own {
				return fmt.Errorf("pod %s saw %s calling instead of the client pod's own %s", a.Pod, a.Client.Addr(), own)
			}
			answered[a.Pod]++
			if a.Node != s.c.Nodes[i].Name && !crossed {
				crossed = true
				s.say("pod %s on %s → %s: answered by %s on %s, which saw %s calling", own, nodeName(i), orange, a.Pod, strings.ToUpper(a.Node), a.Client.Addr())
			}
		}
		if _, err := cluster.Call(ctx, s.c.Nodes[i].NS, "tcp", orange); err != nil {
			return fmt.Errorf("call from %s itself: %w", nodeName(i), err)
		}
	}
	if len(answered) < 2 {
		return fmt.Errorf("30 calls were all answered by the same pod: %v", answered)
	}
	s.good("30 calls from pods on 3 nodes, and one from each node itself: all answered, client addresses kept; by pod: %s", counts(answered))
	return nil
}

func (s *story) callPurple(ctx context.Context) error {
	for i, n := range s.c.Nodes {
		to := netip.AddrPortFrom(n.Addresses[0], purplePort)
		a, err := cluster.Call(ctx, s.c.Outside(), "tcp", to)
		if err != nil {
			return fmt.Errorf("from outside to %s through %s: %w", to, nodeName(i), err)
		}
		if !strings.HasPrefix(a.Pod, "purple-") {
			return fmt.Errorf("%s was answered by %s", to, a.Pod)
		}
		s.say("outside host → %s (%s): answered by %s on %s, which saw %s calling", to, nodeName(i), a.Pod, strings.ToUpper(a.Node), a.Client.Addr())
	}
	s.good("node port %d works through every node, whether or not it runs a purple pod", purplePort)
	return nil
}

func (s *story) callGrey(ctx context.Context) error {
	if err := s.show(ctx, "-n", namespace, "wait", "--for=condition=Programmed", "serviceassignment/grey", "--timeout=60s"); err != nil {
		return err
	}
	var grey v1alpha1.ServiceAssignment
	if err := s.c.Client().Get(ctx, client.ObjectKey{Namespace: namespace, Name: "grey"}, &grey); err != nil {
		return err
	}
	additional := 0
	for _, ip := range grey.Spec.ServiceIPs {
		addr, err := netip.ParseAddr(ip.IP)
		if err != nil {
			return err
		}
		ours := slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Contains(addr) })
		if ours && ip.Source == v1alpha1.ServiceIPSourceAdditional {
			additional++
		}
		a, err := cluster.Call(ctx, s.client(0), "tcp", netip.AddrPortFrom(addr, 80))
		if err != nil {
			return fmt.Errorf("%s (%s): %w", ip.IP, ip.Source, err)
		}
		s.say("grey at %-22s %-10s answered by %s on %s", ip.IP, ip.Source, a.Pod, strings.ToUpper(a.Node))
	}
	if additional != len(ranges) {
		return fmt.Errorf("%d additional addresses, want one of each range %v: %v", additional, ranges, grey.Spec.ServiceIPs)
	}
	s.good("an IPv4 and an IPv6 address from the declared ranges, beside the ClusterIPs that it had")
	return nil
}

func (s *story) strictTenant(ctx context.Context) error {
	if err := s.show(ctx, "create", "namespace", "vault"); err != nil {
		return err
	}
	s.say("%s", strings.TrimRight(strictYAML, "\n"))
	if _, err := s.c.Kubectl(ctx, strictYAML, "apply", "-f", "-"); err != nil {
		return err
	}
	if err := s.show(ctx, "wait", "--for=condition=Ready", "serviceproxypolicy/vault", "--timeout=120s"); err != nil {
		return err
	}
	if err := s.show(ctx, "-n", "vault", "create", "service", "clusterip", "safe", "--tcp=80"); err != nil {
		return err
	}
	var safe corev1.Service
	if err := s.c.Client().Get(ctx, client.ObjectKey{Namespace: "vault", Name: "safe"}, &safe); err != nil {
		return err
	}
	if ip, err := netip.ParseAddr(safe.Spec.ClusterIP); err != nil || !strict.Contains(ip) {
		return fmt.Errorf("safe got %q, which is not in %s", safe.Spec.ClusterIP, strict)
	}
	if err := s.showRefused(ctx, strict.String(), "-n", "vault", "create", "service", "clusterip", "astray", "--clusterip=10.99.13.179", "--tcp=80"); err != nil {
		return err
	}
	s.good("safe got %s; astray was refused, with the reason", safe.Spec.ClusterIP)
	return nil
}

func (s *story) podGoesAway(ctx context.Context) error {
	var pods corev1.PodList
	if err := s.c.Client().List(ctx, &pods, client.InNamespace(namespace), client.MatchingLabels{"app": "orange"}); err != nil {
		return err
	}
	if len(pods.Items) == 0 {
		return errors.New("there are no orange pods")
	}
	victim := pods.Items[0]
	p := startProbe(ctx, s.client(1), orange)
	defer p.stop()
	if err := p.await(ctx, "an answer of "+victim.Name, func(c call) bool { return c.pod == victim.Name }); err != nil {
		return err
	}
	before := p.count()
	deleted := time.Now()
	s.say("$ kubectl -n %s delete pod %s", namespace, victim.Name)
	if err := s.c.Client().Delete(ctx, &victim); err != nil {
		return err
	}
	known := map[string]bool{}
	for _, pod := range pods.Items {
		known[pod.Name] = true
	}
	if err := p.await(ctx, "an answer of the pod that takes its place", func(c call) bool {
		return c.pod != "" && !known[c.pod]
	}); err != nil {
		return err
	}
	if _, err := s.c.Kubectl(ctx, "", "-n", namespace, "wait", "--for=delete", "pod/"+victim.Name, "--timeout=60s"); err != nil {
		return err
	}
	gone := p.count()
	if err := p.awaitCount(ctx, gone+50); err != nil {
		return err
	}
	return s.judgeMove(p.stop()[before:], victim.Name, known, deleted)
}

// judgeMove tells how traffic moved away from a pod that was deleted.
func (s *story) judgeMove(calls []call, victim string, known map[string]bool, deleted time.Time) error {
	var last, first time.Duration
	var failures []error
	for _, c := range calls {
		switch after := c.at.Sub(deleted); {
		case c.err != nil:
			failures = append(failures, fmt.Errorf("%v after the deletion: %w", after.Round(time.Millisecond), c.err))
		case c.pod == victim:
			last = max(last, after)
		case !known[c.pod] && first == 0:
			first = after
		}
	}
	s.say("the last new connection to it:     %6d ms after the deletion", last.Milliseconds())
	s.say("the first to the pod in its place: %6d ms after the deletion", first.Milliseconds())
	s.say("calls since then: %d, failed: %d", len(calls), len(failures))
	if len(failures) > 0 {
		return errors.Join(failures[:min(3, len(failures))]...)
	}
	s.good("traffic moved, and no call failed")
	return nil
}

func (s *story) agentStops(ctx context.Context) error {
	node := s.c.Nodes[0]
	p := startProbe(ctx, s.client(0), orange)
	defer p.stop()
	if err := node.Agent.Stop(); err != nil {
		return err
	}
	s.say("the agent on NODE1 has ended; its rules stay")
	for range 20 {
		to := netip.AddrPortFrom(node.Addresses[0], purplePort)
		if _, err := cluster.Call(ctx, s.c.Outside(), "tcp", to); err != nil {
			return fmt.Errorf("from outside to %s: %w", to, err)
		}
	}
	if err := p.awaitCount(ctx, p.count()+100); err != nil {
		return err
	}
	if err := node.Agent.Start(ctx); err != nil {
		return err
	}
	s.say("the agent on NODE1 is started again and reads the kernel back")
	if err := p.awaitCount(ctx, p.count()+100); err != nil {
		return err
	}
	calls := p.stop()
	for _, c := range calls {
		if c.err != nil {
			return fmt.Errorf("a call from a pod on NODE1 failed: %w", c.err)
		}
	}
	s.good("%d calls from a pod on NODE1 and 20 from outside through NODE1: none failed", len(calls))
	return nil
}

// client is the namespace of the pod to call from on the i-th node.
func (s *story) client(i int) *netns.NS { return s.c.Pod(namespace, clientPod(i)) }

func (s *story) podAddress(ctx context.Context, name string) (netip.Addr, error) {
	var pod corev1.Pod
	if err := s.c.Client().Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &pod); err != nil {
		return netip.Addr{}, err
	}
	return netip.ParseAddr(pod.Status.PodIP)
}

// show runs kubectl as a person would, and shows it.
func (s *story) show(ctx context.Context, args ...string) error {
	shown := slices.Clone(args)
	for i, a := range shown {
		if strings.HasPrefix(a, "custom-columns=") {
			shown[i] = "custom-columns=..."
		}
	}
	s.say("$ kubectl %s", strings.Join(shown, " "))
	out, err := s.c.Kubectl(ctx, "", args...)
	if err != nil {
		return err
	}
	s.say("%s", strings.TrimRight(out, "\n"))
	return nil
}

// showRefused is show for what must fail, with a message that names this.
func (s *story) showRefused(ctx context.Context, names string, args ...string) error {
	s.say("$ kubectl %s", strings.Join(args, " "))
	out, err := s.c.Kubectl(ctx, "", args...)
	if err == nil {
		return fmt.Errorf("kubectl %s was not refused", strings.Join(args, " "))
	}
	s.say("%s", strings.TrimRight(out, "\n"))
	if !strings.Contains(out, names) {
		return fmt.Errorf("the refusal does not name %s", names)
	}
	return nil
}

func (s *story) scene(title string) {
	fmt.Fprintf(s.out, "\n%s\n", s.paint("1", fmt.Sprintf("%d. %s", s.scenes+1, title)))
	s.scenes++
}

func (s *story) say(format string, args ...any) {
	fmt.Fprintln(s.out, strings.TrimRight(indent(fmt.Sprintf(format, args...)), "\n"))
}

func (s *story) good(format string, args ...any) {
	fmt.Fprintf(s.out, "  %s %s\n", s.paint("32", "✓"), fmt.Sprintf(format, args...))
}

// failed tells what went wrong and what the cluster looked like.
func (s *story) failed(ctx context.Context, err error, logs string) {
	fmt.Fprintf(s.out, "\n%s %v\n\n", s.paint("31", "✗ This did not hold:"), err)
	if ctx.Err() == nil {
		for _, args := range [][]string{{"get", "spp,svca,nps,claim", "-A", "-o", "wide"}, {"get", "pods,services,endpointslices", "-A", "-o", "wide"},
			{"describe", "spp"}, {"-n", namespace, "describe", "svca"}} {
			if err := s.show(ctx, args...); err != nil {
				s.say("%v", err)
			}
		}
	}
	fmt.Fprintf(s.out, "\nThe logs of all programs are in %s\n", logs)
}

func (s *story) paint(code, text string) string {
	if !s.colours {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func clientPod(i int) string { return fmt.Sprintf("client-%d", i+1) }

func nodeName(i int) string { return fmt.Sprintf("NODE%d", i+1) }

func since(start time.Time) string { return fmt.Sprintf("%.2f s", time.Since(start).Seconds()) }

func counts(m map[string]int) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, fmt.Sprintf("%s %d", name, m[name]))
	}
	return strings.Join(parts, ", ")
}
