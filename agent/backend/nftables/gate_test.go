package nftables

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// served says whether a connection is answered. Who is to be refused is not waited for as long as who is to be served.
func served(t *testing.T, ns *netns.NS, network string, at netip.AddrPort, from netip.Addr, want bool, what string) {
	t.Helper()
	within := patience
	if !want {
		within = 300 * time.Millisecond
	}
	if _, _, err := askWithin(within, ns, network, at, from); (err == nil) != want || (err != nil && !isTimeout(err)) {
		t.Errorf("%s: %v; want it served: %v, else a timeout", what, err, want)
	}
}

// TestSourceRanges: only who is in a range reaches a load balancer's address, through a restart as well; all other addresses are open.
func TestSourceRanges(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for family := range families {
		for network := range transports {
			serve(t, top.pods[0], network, netip.AddrPortFrom(podAddr(family, 0, 0), 8080))
			serve(t, top.pods[1], network, netip.AddrPortFrom(podAddr(family, 1, 0), 8080))
		}
	}
	other := both{"198.51.100.8", "2001:db8:7::8"} // an external IP that is no load balancer's
	var prev *forwarding.State
	for family, name := range []string{"IPv4", "IPv6"} {
		for network, proto := range transports {
			t.Run(name+"/"+network, func(t *testing.T) {
				host := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
				client := host(clientAddr.addr(family))
				elsewhere := host(clientAddr.addr(family).Next())
				otherFamily := host(clientAddr.addr(1 - family))
				everybody := netip.PrefixFrom(client.Addr(), 0).Masked()
				pods := clusterCIDRs[family]
				s := web(family, proto)
				s.ExternalIPs = append(s.ExternalIPs, other.addr(family))
				s.LoadBalancerIPs = s.ExternalIPs[:1]
				vip := netip.AddrPortFrom(s.LoadBalancerIPs[0], 80)
				for _, c := range []struct {
					name        string
					ranges      []netip.Prefix
					client, pod bool
				}{
					{"none", nil, true, true},
					{"the client", []netip.Prefix{client}, true, false},
					{"a network around the client and the client itself", []netip.Prefix{netip.PrefixFrom(client.Addr(), client.Bits()-4).Masked(), client}, true, false},
					{"somebody else", []netip.Prefix{elsewhere}, false, false},
					{"the pods", []netip.Prefix{pods}, false, true},
					{"several", []netip.Prefix{elsewhere, client, pods}, true, true},
					{"the other family only", []netip.Prefix{otherFamily}, false, false},
					{"none again", nil, true, true},
					{"everybody", []netip.Prefix{everybody}, true, true},
				} {
					svc := *s
					svc.SourceRanges = c.ranges
					next := state(&svc)
					apply(t, b, prev, next)
					prev = &next
					served(t, top.client, network, vip, netip.Addr{}, c.client, c.name+": client")
					served(t, top.pods[0], network, vip, podAddr(family, 0, 1), c.pod, c.name+": pod")
					for _, open := range []netip.AddrPort{
						netip.AddrPortFrom(s.ServiceIPs[0], 80), netip.AddrPortFrom(other.addr(family), 80), netip.AddrPortFrom(nodeAddr.addr(family), 30080),
					} {
						served(t, top.client, network, open, netip.Addr{}, true, c.name+": "+open.String())
					}
					restarted := newBackend(t, top.node)
					if apply(t, restarted, nil, next); restarted.commits != 0 {
						t.Errorf("%s: a restart wrote %d transactions", c.name, restarted.commits)
					}
				}
			})
		}
	}
}

// TestSourceRangesOfNode: the node itself is held to the ranges too, with the address that it sends from.
func TestSourceRangesOfNode(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for family := range families {
		serve(t, top.pods[0], "tcp", netip.AddrPortFrom(podAddr(family, 0, 0), 8080))
		s := web(family, forwarding.TCP)
		s.External = forward(s.External.Endpoints[0])
		s.ExternalFromHere, s.LoadBalancerIPs = s.External, s.ExternalIPs
		vip := netip.AddrPortFrom(externalIP.addr(family), 80)
		for source, want := range map[netip.Addr]bool{nodeAddr.addr(family): true, nodeAddr.addr(family).Next(): false} {
			s.SourceRanges = []netip.Prefix{netip.PrefixFrom(source, source.BitLen())}
			apply(t, b, nil, state(s))
			served(t, top.node, "tcp", vip, nodeAddr.addr(family), want, fmt.Sprintf("%v allowed: the node itself", source))
		}
	}
}

// TestSourceRangesUnserved: without endpoints an allowed client is refused at once, and any other still gets no answer.
// External traffic policy Local has doors of its own, which are guarded as well.
func TestSourceRangesUnserved(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	serve(t, top.pods[1], "tcp", netip.AddrPortFrom(podAddr(0, 1, 0), 8080))
	s := web(0, forwarding.TCP)
	s.LoadBalancerIPs = s.ExternalIPs
	vip := netip.AddrPortFrom(externalIP.addr(0), 80)
	with := func(external forwarding.Target, source netip.Prefix) {
		svc := *s
		svc.External, svc.PreserveSource, svc.SourceRanges = external, true, []netip.Prefix{source}
		apply(t, b, nil, state(&svc))
	}
	s.ExternalFromHere = forward(s.Internal.Endpoints[1])
	client := netip.PrefixFrom(clientAddr.addr(0), 32)
	with(forwarding.Target{}, client)
	if _, _, err := ask(top.client, "tcp", vip, netip.Addr{}); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("no endpoints, allowed client: %v, want connection refused", err)
	}
	served(t, top.pods[0], "tcp", vip, netip.Addr{}, false, "pod out of range")
	with(forwarding.Target{}, clusterCIDRs[0])
	served(t, top.client, "tcp", vip, netip.Addr{}, false, "no endpoints, other client")
	if server, _, err := ask(top.pods[0], "tcp", vip, netip.Addr{}); err != nil || server.Addr() != podAddr(0, 1, 0) {
		t.Errorf("pod in range: %v, %v; want the second pod", server, err)
	}
	with(forwarding.Target{Elsewhere: forwarding.IPv4 | forwarding.IPv6}, client)
	served(t, top.client, "tcp", vip, netip.Addr{}, false, "no endpoint here")
}

// TestSourceRangesLive: a change of ranges applies to new connections; who is connected stays so.
func TestSourceRangesLive(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	serve(t, top.pods[0], "tcp", netip.AddrPortFrom(podAddr(0, 0, 0), 8080))
	s := web(0, forwarding.TCP)
	s.External = forward(s.External.Endpoints[0])
	s.ExternalFromHere, s.LoadBalancerIPs = s.External, s.ExternalIPs
	vip := netip.AddrPortFrom(externalIP.addr(0), 80)
	with := func(ranges ...string) forwarding.State {
		svc := *s
		for _, r := range ranges {
			svc.SourceRanges = append(svc.SourceRanges, netip.MustParsePrefix(r))
		}
		return state(&svc)
	}
	prev := with("192.0.2.2/32")
	apply(t, b, nil, prev)
	c, err := dial(top.client, "tcp", vip, netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	lines := bufio.NewReader(c)
	if _, err := lines.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	for i, step := range []struct {
		next   forwarding.State
		served bool
	}{{with("192.0.2.2/32", "203.0.113.0/24"), true}, {with("203.0.113.0/24"), false}, {with(), true}, {with("203.0.113.7/32"), false}, {with("192.0.2.0/24"), true}} {
		apply(t, b, &prev, step.next)
		prev = step.next
		served(t, top.client, "tcp", vip, netip.Addr{}, step.served, fmt.Sprintf("step %d: new connection", i))
		if err := c.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Fprintln(c, i); err != nil {
			t.Fatal(err)
		}
		if echo, err := lines.ReadString('\n'); err != nil || echo != fmt.Sprintln(i) {
			t.Fatalf("step %d: the open connection: %q, %v", i, echo, err)
		}
		if drifts, err := b.Verify(context.Background(), prev); err != nil || len(drifts) > 0 {
			t.Errorf("step %d: %v %v", i, drifts, err)
		}
	}
}

// TestSourceRangesChange: what a change of ranges writes does not depend on how many other services there are, nor does it change any of them.
func TestSourceRangesChange(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	s := web(0, forwarding.TCP)
	s.LoadBalancerIPs = s.ExternalIPs
	open := *s
	s.SourceRanges = someRanges
	verdicts := func() []string {
		var list []string
		m := b.mirrors[0]
		err := b.conn.Elements(m.doors[door{}].set, func(e nfnl.Element) {
			list = append(list, fmt.Sprint(formatKey(m.doors[door{}].set, e.Key), e.Verdict))
		})
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(list)
		return list
	}
	prev := benchState(100).With(&open)
	apply(t, b, nil, prev)
	before := verdicts()
	rules := func() string { return nft(t, top.node, "", "list", "chain", "ip", TableName, chainServices) }
	static := rules()
	next := prev.With(s)
	apply(t, b, &prev, next)
	if after := verdicts(); len(after) != len(before) {
		t.Errorf("%d verdicts, before %d", len(after), len(before))
	} else {
		for i := range after {
			if guarded := after[i] != before[i]; guarded != (after[i][:len("198.51.100.7 ")] == "198.51.100.7 ") {
				t.Errorf("%s, before %s", after[i], before[i])
			}
		}
	}
	if after := rules(); after != static {
		t.Errorf("the static rules changed:\n%s\nbefore\n%s", after, static)
	}
	guarded := verdicts()
	edited := *s
	edited.SourceRanges = append([]netip.Prefix{netip.MustParsePrefix("203.0.113.0/30")}, s.SourceRanges[1:]...)
	other := next.With(&edited)
	commits := b.commits
	apply(t, b, &next, other)
	// What goes must do so after what comes is there: a client in both may be looked for while that changes.
	if n := b.commits - commits; n != 2 {
		t.Errorf("%d transactions, want 2", n)
	}
	if after := verdicts(); !slices.Equal(after, guarded) {
		t.Errorf("with other ranges:\n%v\nbefore\n%v", after, guarded)
	}
	apply(t, b, &other, prev)
	if after := verdicts(); !slices.Equal(after, before) {
		t.Errorf("without the ranges again:\n%v\nbefore\n%v", after, before)
	}
}

// TestSourceRangesNeverLapse: whatever changes, who may use an address before and after is let in meanwhile, and who may not is not.
func TestSourceRangesNeverLapse(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	for i := range 10 {
		serve(t, top.pods[0], "udp", netip.AddrPortFrom(podAddr(0, 0, i), 8080))
	}
	outsider := netip.MustParseAddr("192.0.2.99")
	sh(t, top.client, "ip addr add 192.0.2.99/24 dev eth0")
	vip := netip.AddrPortFrom(externalIP.addr(0), 80)
	with := func(affinity time.Duration, local bool, n int, ranges ...string) forwarding.State {
		s := web(0, forwarding.UDP)
		s.LoadBalancerIPs, s.Affinity, s.PreserveSource = s.ExternalIPs, affinity, local
		s.Internal = forward(endpoints(0, n, 8080)...)
		s.External, s.ExternalFromHere = s.Internal, s.Internal
		if local {
			s.External = forward(endpoints(0, 1, 8080)...)
		}
		for _, r := range ranges {
			s.SourceRanges = append(s.SourceRanges, netip.MustParsePrefix(r))
		}
		return state(s)
	}
	guarded := func(affinity time.Duration) []forwarding.State {
		return []forwarding.State{
			with(affinity, false, 2, "192.0.2.0/30"), with(affinity, false, 2, "192.0.2.0/29"), with(affinity, false, 10, "192.0.2.2/32"), with(affinity, false, 2, "192.0.2.2/32"),
			with(affinity, true, 2, "192.0.2.2/32", "203.0.113.0/24"), with(affinity, false, 4, "192.0.2.0/28", "198.18.0.0/15", "203.0.113.0/24"), with(affinity, false, 5, "192.0.2.2/31"),
		}
	}
	for _, c := range []struct {
		name   string
		states []forwarding.State
		who    netip.Addr
		served bool
	}{
		{"allowed", guarded(0), clientAddr.addr(0), true},
		{"allowed, with affinity", guarded(time.Hour), clientAddr.addr(0), true},
		{"allowed, guarded or not", append(guarded(0), with(0, false, 2), with(0, false, 9), with(0, false, 9, "0.0.0.0/0")), clientAddr.addr(0), true},
		{"an outsider", append(guarded(0), with(0, false, 0, "192.0.2.0/28"), with(0, false, 3, "2001:db8::/32"), state()), outsider, false},
		{"an outsider, with affinity", guarded(time.Hour), outsider, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			prev := c.states[len(c.states)-1]
			apply(t, b, nil, prev)
			askMeanwhile(t, top, vip, c.who, c.served, func(i int) {
				next := c.states[i%len(c.states)]
				apply(t, b, &prev, next)
				prev = next
			})
		})
	}
}

// askMeanwhile changes something over and over while a client asks for an address, which must be served each time, or never.
func askMeanwhile(t *testing.T, top *topology, at netip.AddrPort, who netip.Addr, want bool, change func(i int)) {
	t.Helper()
	within := patience
	if !want {
		within = 3 * time.Millisecond
	}
	stop := time.Now().Add(time.Second)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for asked := 0; time.Now().Before(stop) || asked < 50; asked++ {
			if server, _, err := askWithin(within, top.client, "udp", at, who); (err == nil) != want {
				t.Errorf("after %d times: %v, %v; want it served: %v", asked, server, err, want)
				return
			}
		}
	}()
	defer func() { <-done }()
	for i := 0; ; i++ {
		select {
		case <-done:
			return
		default:
			change(i)
		}
	}
}

// TestSourceRangesUpgrade: gates of an earlier layout, a chain for each distinct set of ranges, are replaced at a restart without a moment of open or closed.
func TestSourceRangesUpgrade(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	serve(t, top.pods[0], "udp", netip.AddrPortFrom(podAddr(0, 0, 0), 8080))
	sh(t, top.client, "ip addr add 192.0.2.99/24 dev eth0")
	s := web(0, forwarding.UDP)
	s.External = forward(s.External.Endpoints[0])
	s.ExternalFromHere, s.LoadBalancerIPs, s.SourceRanges = s.External, s.ExternalIPs, []netip.Prefix{netip.PrefixFrom(clientAddr.addr(0), 32)}
	want := state(s)
	apply(t, b, nil, want)
	const table, to, guard = "ip serviceproxy ", "services.0-random-1-masq", "198.51.100.7 . udp . 80"
	const earlier = table + "from-0123456789abcdef0123456789abcdef-" + to
	for who, served := range map[netip.Addr]bool{clientAddr.addr(0): true, netip.MustParseAddr("192.0.2.99"): false} {
		askMeanwhile(t, top, netip.AddrPortFrom(externalIP.addr(0), 80), who, served, func(int) {
			for _, script := range []string{
				"add chain " + earlier + "; add rule " + earlier + " ip saddr 192.0.2.2 goto " + to + "; add rule " + earlier + " drop",
				"delete element " + table + "services { " + guard + " }; add element " + table + "services { " + guard + " : goto " + strings.TrimPrefix(earlier, table) + " }",
				"delete chain " + table + "guarded-" + to + "; flush chain " + table + "services-from; delete chain " + table + "services-from; delete set " + table + "services-from-32",
			} {
				nft(t, top.node, script, "-f", "-")
			}
			apply(t, b, nil, want)
			if list := nft(t, top.node, "", "list", "table", "ip", TableName); strings.Contains(list, "from-0123") || !strings.Contains(list, guard+" : goto guarded-"+to) {
				t.Error(list)
			}
		})
	}
	if drifts, err := b.Verify(context.Background(), want); err != nil || len(drifts) > 0 {
		t.Errorf("%v %v", drifts, err)
	}
}

// TestSourceRangesMany: hundreds of ranges of many prefix lengths are there, and go again.
func TestSourceRangesMany(t *testing.T) {
	b := newBackend(t, netns.NewT(t))
	s := web(0, forwarding.TCP)
	s.LoadBalancerIPs = s.ExternalIPs
	open := state(s)
	many := *s
	for i := range 600 {
		many.SourceRanges = append(many.SourceRanges, netip.PrefixFrom(netip.AddrFrom4([4]byte{20 + byte(i>>8), byte(i), 0, 0}), 16+i%17))
	}
	next := state(&many)
	apply(t, b, nil, open)
	apply(t, b, &open, next)
	for _, step := range []struct{ from, to forwarding.State }{{next, next}, {next, open}} {
		apply(t, b, &step.from, step.to)
		if got, want := kernelContent(t, b, step.to.Ground()), wantContent(step.to); !maps.Equal(got, want) {
			t.Errorf("the kernel holds\n%v\nwant\n%v", got, want)
		}
		if drifts, err := b.Verify(context.Background(), step.to); err != nil || len(drifts) > 0 {
			t.Errorf("%v %v", drifts, err)
		}
	}
}

// TestSourceRangesOfRivals: who takes over an address of another service has the ranges of its own from the first packet on.
func TestSourceRangesOfRivals(t *testing.T) {
	b := newBackend(t, netns.NewT(t))
	first, second := web(0, forwarding.UDP), web(0, forwarding.UDP)
	first.Key.Name, second.Key.Name = "a", "b"
	for s, ranges := range map[*forwarding.Service]string{first: "192.0.2.0/30", second: "203.0.113.0/24"} {
		s.LoadBalancerIPs, s.SourceRanges = s.ExternalIPs, []netip.Prefix{netip.MustParsePrefix(ranges), netip.MustParsePrefix("198.18.0.0/15")}
	}
	both, one := state(first, second), state(second)
	apply(t, b, nil, both)
	m := b.mirrors[0]
	key := frontKey{addr: addr16(externalIP.addr(0)), proto: forwarding.UDP, port: 80}
	f := m.fronts[key]
	from := m.reduce(second.SourceRanges)
	m.tx.reset()
	f.owner = second.Key
	m.admit(key, f, from)
	if !slices.Equal(f.sources.list, from) || len(m.narrowing) > 0 {
		t.Errorf("at once: %v, to narrow: %v; want %v", f.sources.list, m.narrowing, from)
	}
	b.mirrors = nil
	apply(t, b, nil, both)
	apply(t, b, &both, one)
	if got, want := kernelContent(t, b, one.Ground()), wantContent(one); !maps.Equal(got, want) {
		t.Errorf("the kernel holds\n%v\nwant\n%v", got, want)
	}
}

// TestReduce: fewer ranges, the same addresses, and the same ranges however they are listed.
func TestReduce(t *testing.T) {
	f := families[0]
	rapid.Check(t, func(t *rapid.T) {
		drawn := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) netip.Prefix {
			a := netip.AddrFrom4([4]byte{10, 0, byte(rapid.IntRange(0, 3).Draw(t, "third")), rapid.Byte().Draw(t, "fourth")})
			return netip.PrefixFrom(a, rapid.IntRange(20, 32).Draw(t, "bits"))
		}), 0, 12).Draw(t, "ranges")
		contains := func(list []netip.Prefix, a netip.Addr) bool {
			return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
		}
		reduced := f.reduce(drawn)
		for i, p := range reduced {
			if contains(reduced[:i], p.Addr()) || contains(reduced[i+1:], p.Addr()) {
				t.Fatalf("%v overlap", reduced)
			}
		}
		for i := range 1 << 11 {
			a := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
			if contains(drawn, a) != contains(reduced, a) {
				t.Fatalf("%v became %v: not the same about %v", drawn, reduced, a)
			}
		}
		shuffled := append(rapid.Permutation(drawn).Draw(t, "order"), clusterCIDRs[1])
		if again := f.reduce(shuffled); !slices.Equal(again, reduced) {
			t.Fatalf("%v became %v, %v became %v", shuffled, again, drawn, reduced)
		}
	})
}
