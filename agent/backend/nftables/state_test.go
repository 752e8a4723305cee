package nftables

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/backendtest"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// frontendContent is what the kernel does for one frontend, whatever shard and slots it is in.
type frontendContent struct {
	action    action
	hash      bool
	masq      masquerade
	endpoints string
	sources   string
	pin       pin
}

func contentOf(f *family, front *frontend) frontendContent {
	c := frontendContent{action: front.action, hash: front.balancer.hash, masq: front.balancer.masq, pin: front.balancer.pin}
	var list []string
	for i := range f.slotCount(front.slots) {
		if s := f.slot(front.slots, i); !empty(s) {
			list = append(list, fmt.Sprintf("%x", s))
		}
	}
	slices.Sort(list)
	c.endpoints = strings.Join(list, " ")
	if front.sources != nil {
		c.sources = fmt.Sprint(front.sources.list)
	}
	return c
}

// kernelContent reads back what the kernel forwards, and checks what no reader needs but packets do.
func kernelContent(t rapidTB, b *Backend, g forwarding.Ground) map[string]frontendContent {
	content := map[string]frontendContent{}
	for _, f := range families {
		m, err := reader{conn: b.conn}.read(f, g, &transaction{dry: true})
		if err != nil {
			t.Fatal(err)
		}
		for key, front := range m.fronts {
			content[fmt.Sprintf("%s %v", f.name, key)] = contentOf(f, front)
			checkGuard(t, m, key, front)
			if front.action != balance {
				continue
			}
			if front.pins != (front.balancer.pin != 0) {
				t.Fatalf("%s %v: balancer %+v, slots that pin: %v", f.name, key, front.balancer, front.pins)
			}
			if empty(m.slot(front.slots, 0)) || m.slotCount(front.slots) != front.balancer.size || front.shard.index != front.balancer.shard {
				t.Fatalf("%s %v: balancer %+v over %x", f.name, key, front.balancer, []byte(front.slots))
			}
		}
		for e := range m.serviceIPs.uses {
			content[fmt.Sprintf("%s service IP %v", f.name, e)] = frontendContent{}
		}
		for e := range m.hairpin.uses {
			content[fmt.Sprintf("%s hairpin %v", f.name, e)] = frontendContent{}
		}
		if len(m.strays) > 0 || len(m.foreign) > 0 {
			t.Fatalf("%s: strays %v, foreign sets %v", f.name, m.strays, m.foreign)
		}
	}
	return content
}

// checkGuard checks that a gate is before a frontend that has sources, and only there, and asks for sources of their prefix lengths.
func checkGuard(t rapidTB, m *mirror, key frontKey, front *frontend) {
	if front.guarded != (front.sources != nil) {
		t.Fatalf("%s %v: guarded: %v, sources %v", m.name, key, front.guarded, front.sources)
	}
	if !front.guarded {
		return
	}
	g := gate{key.door, front.balancer}
	for _, c := range []chain{{name: g.name(), rules: g.rules()}, {name: fromChain(key.door), rules: m.fromRules(key.door, m.doors[key.door].lengths())}} {
		var want []string
		for _, r := range c.rules {
			want = append(want, r.Fingerprint())
		}
		if !slices.Equal(m.chains[c.name], want) {
			t.Fatalf("%s %v: chain %s is not as it should be", m.name, key, c.name)
		}
	}
}

type rapidTB interface {
	Fatal(...any)
	Fatalf(string, ...any)
}

// wantContent says what the kernel should forward, from the model alone.
func wantContent(s forwarding.State) map[string]frontendContent {
	content := map[string]frontendContent{}
	var all []*forwarding.Service
	for svc := range s.All() {
		all = append(all, svc)
	}
	// The first service by key has what several want.
	slices.SortFunc(all, func(a, b *forwarding.Service) int { return b.Key.Compare(a.Key) })
	for _, svc := range all {
		for _, f := range families {
			for _, w := range f.wants(nil, svc, f.plot(s.Ground()).serviceIPs()) {
				c := frontendContent{action: refuse}
				from, closed := f.admits(&w)
				if len(from) > 0 {
					c.sources = fmt.Sprint(from)
				}
				var list []string
				for _, e := range w.target.Endpoints {
					if f.is(e.AddrPort.Addr()) {
						b, _ := e.AddrPort.MarshalBinary()
						b[len(b)-2], b[len(b)-1] = b[len(b)-1], b[len(b)-2] // it has the port little-endian
						list = append(list, fmt.Sprintf("%x", b))
					}
				}
				switch {
				case closed:
					c = frontendContent{action: drop}
				case len(list) > 0:
					slices.Sort(list)
					c = frontendContent{balance, w.hash, w.masq, strings.Join(list, " "), c.sources, w.pin}
				case w.target.Action(f.bit) == forwarding.Drop:
					c = frontendContent{action: drop}
				}
				content[fmt.Sprintf("%s %v", f.name, w.key)] = c
			}
			for _, e := range f.serviceIPs(nil, svc) {
				content[fmt.Sprintf("%s service IP %v", f.name, e)] = frontendContent{}
			}
			for _, e := range f.hairpins(nil, svc) {
				content[fmt.Sprintf("%s hairpin %v", f.name, e)] = frontendContent{}
			}
		}
	}
	return content
}

// TestApply: the kernel holds what the state says, in one transaction or in many; Verify agrees; and a new process finds nothing to change.
func TestApply(t *testing.T) {
	ns := netns.NewT(t)
	whole, parts := newBackend(t, ns), newBackend(t, ns)
	parts.partSize = 300
	rapid.Check(t, func(t *rapid.T) {
		backend := whole
		if rapid.Bool().Draw(t, "in parts") {
			backend = parts
		}
		next := backendtest.DrawState(t)
		if err := backend.Apply(context.Background(), nil, next); err != nil {
			t.Fatal(err)
		}
		if got, want := kernelContent(t, backend, next.Ground()), wantContent(next); !maps.Equal(got, want) {
			t.Fatalf("the kernel holds\n%v\nwant\n%v", got, want)
		}
		if drifts, err := backend.Verify(context.Background(), next); err != nil || len(drifts) > 0 {
			t.Fatalf("drifts %v, %v", drifts, err)
		}
		before := backend.commits
		if err := backend.Apply(context.Background(), nil, next); err != nil {
			t.Fatal(err)
		}
		if backend.commits != before {
			t.Fatalf("a restart wrote %d transactions", backend.commits-before)
		}
	})
}

// nft runs nft in a namespace, with input on stdin.
func nft(t testing.TB, ns *netns.NS, input string, args ...string) string {
	t.Helper()
	cmd := exec.Command("nft", args...)
	cmd.Stdin = strings.NewReader(input)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := ns.Start(cmd); err != nil {
		t.Fatalf("nft (package nftables): %v", err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("nft %q: %v\n%s\ninput:\n%s", args, err, errOut.String(), input)
	}
	return out.String()
}

var someRanges = []netip.Prefix{
	netip.MustParsePrefix("192.0.2.0/30"), netip.MustParsePrefix("203.0.113.9/32"), netip.MustParsePrefix("2001:db8:1::/64"), netip.MustParsePrefix("2001:db8:9::9/128"),
}

// everything is a state in which each kind of rule occurs.
func everything() forwarding.State {
	g := ground
	g.Pods.Interfaces = []string{"*", "br-pods", "veth*"}
	g.Ranges = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("10.112.0.0/24"), netip.MustParsePrefix("255.0.0.0/8"), netip.MustParsePrefix("fd00:99::/112")}
	g.DropInvalid, g.CountTraffic = true, true
	s := forwarding.State{}.On(g)
	for family := range families {
		for i, proto := range []forwarding.Protocol{forwarding.TCP, forwarding.UDP, forwarding.SCTP} {
			svc := web(family, proto)
			svc.Key.Name = fmt.Sprint("all-", family)
			svc.Internal = forward(endpoints(family, 3, 8080)...)
			switch i {
			case 0:
				svc.Scheduler, svc.PreserveSource = forwarding.SourceHash, true
				svc.External = forwarding.Target{Elsewhere: forwarding.IPv4 | forwarding.IPv6}
			case 1:
				svc.LoadBalancerIPs, svc.SourceRanges = svc.ExternalIPs, someRanges
				svc.Affinity = 3 * time.Hour
				svc.NodePortAddresses = []netip.Prefix{netip.MustParsePrefix("::/0"), netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("fd00::/15")}
			case 2:
				svc.Internal = forwarding.Target{}
			}
			s = s.With(svc)
		}
	}
	return s
}

// TestListedByNft: admins list rule sets and load them again with the distribution's nft, which must understand ours, and print it readably.
func TestListedByNft(t *testing.T) {
	ns := netns.NewT(t)
	b := newBackend(t, ns)
	apply(t, b, nil, everything())
	list := nft(t, ns, "", "list", "ruleset")
	nft(t, ns, list, "-c", "-f", "-")
	for _, want := range []string{
		"10.99.0.1 . tcp . 80 : goto services.0-hash-4-offmasq", "10.99.0.1 . tcp . 80 . 2 : 10.244.1.12 . 8080",
		"fd00:99::1 . tcp . 80 . 0 : fd00:244:1::10 . 8080", "10.99.0.1 . sctp . 80 : goto refuse",
		"198.51.100.7 . udp . 80 : goto guarded-services.0-pin-random-2-masq", "jump services-from", "198.51.100.7 . udp . 80 . 192.0.2.0", "2001:db8:7::7 . udp . 80 . 2001:db8:1::",
		"ip daddr . meta l4proto . th dport . ip saddr & 255.255.255.252 @services-from-30 return", "ip daddr . meta l4proto . th dport . ip saddr @services-from-32 return",
		"ip6 daddr . meta l4proto . th dport . ip6 saddr & ffff:ffff:ffff:ffff:: @services-from-64 return",
		"timeout 3h : meta priority", "10.99.0.1 . udp . 80 . 2 : ", "meta l4proto . th dport . meta priority map @services.0-pinned",
		"type nat hook prerouting priority dstnat - 5", "numgen random mod 4 map @services.0", "masquerade fully-random",
	} {
		if !strings.Contains(list, want) {
			t.Errorf("the listing lacks %q:\n%s", want, list)
		}
	}
	// What nft loaded into an empty kernel is the same table to us, but for its annotations.
	copied := netns.NewT(t)
	nft(t, copied, list, "-f", "-")
	c := newBackend(t, copied)
	if got, want := kernelContent(t, c, everything().Ground()), wantContent(everything()); !maps.Equal(got, want) {
		t.Errorf("loaded by nft:\n%v\nwant\n%v", got, want)
	}
}

func TestNames(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := balancer{
			door:  door{rapid.Uint64().Draw(t, "class"), rapid.Bool().Draw(t, "here")},
			shard: rapid.IntRange(0, 1000).Draw(t, "shard"), hash: rapid.Bool().Draw(t, "hash"),
			size: 1 << rapid.IntRange(0, 20).Draw(t, "size"), masq: masquerade(rapid.IntRange(0, len(masqueradeSuffix)-1).Draw(t, "masquerade")),
		}
		switch {
		case rapid.Bool().Draw(t, "pin"):
			b.pin = pin(rapid.Uint32Min(1).Draw(t, "timeout"))
		case rapid.Bool().Draw(t, "draw"):
			b.kind = rapid.SampledFrom([]kind{drawing, translating}).Draw(t, "kind")
		}
		if got, ok := parseBalancer(b.name()); !ok || got != b {
			t.Fatalf("%s reads back as %+v (%v), want %+v", b.name(), got, ok, b)
		}
		g := gate{b.door, b}
		if rapid.Bool().Draw(t, "refuse") {
			g.to = balancer{}
		}
		if got, ok := parseGate(g.name()); !ok || got != g {
			t.Fatalf("%s reads back as %+v (%v), want %+v", g.name(), got, ok, g)
		}
		if d, i, ok := parseShard(shardName(b.door, b.shard)); !ok || d != b.door || i != b.shard {
			t.Fatalf("%s reads back as %v %d", shardName(b.door, b.shard), d, i)
		}
	})
	for _, name := range []string{"", "refuse", "services", "services.0", "services.0-random-3", "services.0-first-2", "services.x-random-2", "nodeports-1.0-random-2", "services.0-random-2-other",
		"services.0-pin-random-2", "services.0-random-2-5ms", "services.0-pin-random-2-05ms", "services.0-pin-random-2-0ms", "services.0-pin-random-2-5", "services.0-draw-random-2-5ms", "services.00-random-2"} {
		if b, ok := parseBalancer(name); ok {
			t.Errorf("%q is taken for %+v", name, b)
		}
	}
	for _, name := range []string{"", "from-here", "guarded-", "guarded-refuse", "guarded--refuse", "guarded-services", "guarded-services.0-refuse", "guarded-other-refuse", "guarded-services.0-random-3", "services.0-random-2"} {
		if g, ok := parseGate(name); ok {
			t.Errorf("%q is taken for %+v", name, g)
		}
	}
	for name, bits := range map[string]int{"services-from-1": 1, "services-here-from-32": 32, "services-from-33": 33} {
		for _, f := range families {
			d, got, ok := f.parseFromSet(name)
			if fits := bits <= int(f.addrLen)*8; ok != fits || fits && (got != bits || fromSetName(d, bits) != name) {
				t.Errorf("%s: %q is taken for %v %d (%v)", f.name, name, d, got, ok)
			}
		}
	}
	for _, name := range []string{"", "services-from", "services-from-", "services-from-0", "services-from-08", "services-from-x", "services-8", "nodeports-0000000000000001-from-8"} {
		if d, bits, ok := families[1].parseFromSet(name); ok {
			t.Errorf("%q is taken for %v %d", name, d, bits)
		}
	}
}

func TestSlotsFor(t *testing.T) {
	for _, c := range []struct{ n, now, want int }{
		{1, 0, 1}, {2, 0, 2}, {3, 0, 4}, {10, 0, 16}, {16, 0, 16}, {17, 16, 32}, {16, 32, 32}, {12, 32, 32}, {11, 32, 16},
		{2, 1, 2}, {1, 2, 2}, {1, 4, 1}, {2, 4, 4},
	} {
		if got := slotsFor(c.n, c.now); got != c.want {
			t.Errorf("%d endpoints, %d slots: %d, want %d", c.n, c.now, got, c.want)
		}
	}
}

// TestArrange: an endpoint stays in its slot; removing one touches no other but the one that refills slot 0.
func TestArrange(t *testing.T) {
	f := families[0]
	rapid.Check(t, func(t *rapid.T) {
		var old slots
		for range rapid.IntRange(1, 6).Draw(t, "steps") {
			hosts := rapid.SliceOfNDistinct(rapid.Byte(), 1, 40, rapid.ID).Draw(t, "hosts")
			slices.Sort(hosts)
			var list []byte
			for _, h := range hosts {
				list = append(list, 10, 0, 0, h, 0, 80)
			}
			size := slotsFor(len(hosts), f.slotCount(old))
			next := f.arrange(old, list, size)
			var held []byte
			moved := 0
			for i := range size {
				s := f.slot(next, i)
				if empty(s) {
					continue
				}
				held = append(held, s[3])
				if i < f.slotCount(old) && !bytes.Equal(s, f.slot(old, i)) && bytes.Contains(old, s) && f.slotCount(old) <= size {
					moved++
				}
			}
			slices.Sort(held)
			if !slices.Equal(held, hosts) || empty(f.slot(next, 0)) || moved > 1 {
				t.Fatalf("%v in %x (%d moved)", hosts, []byte(next), moved)
			}
			old = next
		}
	})
}
