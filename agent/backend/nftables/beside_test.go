package nftables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// theirs are the rules that kube-proxy has for a Service (service IP port 80, node port 30080) whose endpoint is the second pod, for one without endpoints
// (10.99.0.2), and for all others in the range, in each of its modes that a node may run beside us. Counters tell what passed them.
var theirs = map[string]string{
	"kube-proxy iptables": `
iptables -t nat -N KUBE-SERVICES; iptables -t nat -N KUBE-SVC; iptables -t nat -N KUBE-SEP; iptables -t nat -N KUBE-MARK-MASQ; iptables -t nat -N KUBE-POSTROUTING; iptables -t nat -N KUBE-NODEPORTS
iptables -t nat -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
iptables -t nat -A KUBE-SVC ! -s 10.244.0.0/16 -j KUBE-MARK-MASQ
iptables -t nat -A KUBE-SVC -j KUBE-SEP
iptables -t nat -A KUBE-SEP -p tcp -j DNAT --to-destination 10.244.2.10:8080
iptables -t nat -A KUBE-SERVICES -d 10.99.0.1/32 -p tcp --dport 80 -j KUBE-SVC
iptables -t nat -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
iptables -t nat -A KUBE-NODEPORTS -p tcp --dport 30080 -j KUBE-MARK-MASQ
iptables -t nat -A KUBE-NODEPORTS -p tcp --dport 30080 -j KUBE-SEP
iptables -t nat -A PREROUTING -j KUBE-SERVICES; iptables -t nat -A OUTPUT -j KUBE-SERVICES
iptables -t nat -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
iptables -t nat -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
iptables -t nat -A KUBE-POSTROUTING -j MASQUERADE --random-fully
iptables -t nat -A POSTROUTING -j KUBE-POSTROUTING
for c in FORWARD OUTPUT; do
  iptables -A $c -m conntrack --ctstate NEW -d 10.99.0.2/32 -p tcp --dport 80 -j REJECT
  iptables -A $c -m conntrack --ctstate INVALID -j DROP
done`,
	"kube-proxy nftables": `
nft -f - <<EOF
table ip kube-proxy {
	map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; elements = { 10.99.0.1 . tcp . 80 : goto service } }
	map service-nodeports { type inet_proto . inet_service : verdict; elements = { tcp . 30080 : goto external } }
	map no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; elements = { 10.99.0.2 . tcp . 80 : goto reject-chain } }
	set cluster-ips { type ipv4_addr; elements = { 10.99.0.1, 10.99.0.2 } }
	chain reject-chain { reject; }
	chain mark-for-masquerade { mark set mark or 0x4000; }
	chain endpoint { meta l4proto tcp dnat to 10.244.2.10:8080; }
	chain service { ip saddr != 10.244.0.0/16 jump mark-for-masquerade; goto endpoint; }
	chain external { jump mark-for-masquerade; goto endpoint; }
	chain services {
		ip daddr . meta l4proto . th dport vmap @service-ips
		fib daddr type local meta l4proto . th dport vmap @service-nodeports
	}
	chain no-endpoints { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
	chain cluster-ips-check { ip daddr @cluster-ips reject; ip daddr 10.99.0.0/16 drop; }
	chain filter-forward { type filter hook forward priority 0; ct state new jump no-endpoints; ct state new jump cluster-ips-check; }
	chain filter-output { type filter hook output priority 0; ct state new jump no-endpoints; ct state new jump cluster-ips-check; }
	chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
	chain nat-output { type nat hook output priority -100; jump services; }
	chain nat-postrouting { type nat hook postrouting priority 100; mark and 0x4000 != 0 mark set mark xor 0x4000 masquerade fully-random; }
}
EOF`,
}

// TestBesideAnotherProxy: while both know a Service ours decides, whichever was there first; once ours lets go theirs does, and what is open stays open. What
// only theirs knows goes on as without us, also in a range that we declare.
func TestBesideAnotherProxy(t *testing.T) {
	for name, rules := range theirs {
		for _, oursFirst := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, ours first: %v", name, oursFirst), func(t *testing.T) {
				top := newTopology(t)
				// Their refusal is ICMP, of which the kernel otherwise sends one client a few a second.
				sh(t, top.node, `sysctl -qw net.ipv4.icmp_ratelimit=0 net.ipv4.icmp_msgs_per_sec=100000`)
				for pod := range top.pods {
					serve(t, top.pods[pod], "tcp", netip.AddrPortFrom(podAddr(0, pod, 0), 8080))
				}
				b := newBackend(t, top.node)
				s := web(0, forwarding.TCP)
				only := forward(forwarding.Endpoint{AddrPort: netip.AddrPortFrom(podAddr(0, 0, 0), 8080), Local: true})
				s.Internal, s.External, s.ExternalFromHere = only, only, only
				g := ground
				g.Ranges, g.DropInvalid = []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16")}, true
				both, none := state(s).On(g), state().On(g)
				if oursFirst {
					apply(t, b, nil, both)
					sh(t, top.node, rules)
				} else {
					sh(t, top.node, rules)
					apply(t, b, nil, both)
				}
				at := []netip.AddrPort{netip.AddrPortFrom(serviceIP.addr(0), 80), netip.AddrPortFrom(nodeAddr.addr(0), 30080)}
				served := func(pod int) {
					t.Helper()
					for _, to := range at {
						for _, from := range []place{{"outside", top.client, clientAddr, ""}, {"node", top.node, nodeAddr, ""}, {"pod", top.pods[1-pod], podAddrs(1 - pod), ""}} {
							server, seen, err := ask(from.ns, "tcp", to, from.addr.addr(0))
							if err != nil || server.Addr() != podAddr(0, pod, 0) {
								t.Errorf("%s to %v: %v answered (%v), want pod %d", from.name, to, server, err, pod)
							}
							if keeps := from.name == "pod" && to.Port() == 80; err == nil && from.name != "node" && keeps != (seen.Addr() == from.addr.addr(0)) {
								t.Errorf("%s to %v: seen as %v", from.name, to, seen)
							}
						}
					}
				}
				served(0)
				c := open(t, top.client, 0)
				apply(t, b, &both, none)
				served(1)
				apply(t, b, &none, both)
				served(0)
				if err := echo(c, "still there"); err != nil {
					t.Errorf("a connection that was open: %v", err)
				}
				// Their Service without endpoints refuses as before, for ours would only drop it; what nobody has is dropped.
				if _, _, err := ask(top.client, "tcp", netip.MustParseAddrPort("10.99.0.2:80"), netip.Addr{}); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("their Service without endpoints: %v", err)
				}
				if _, _, err := askWithin(silence, top.client, "tcp", netip.MustParseAddrPort("10.99.0.3:80"), netip.Addr{}); !isTimeout(err) {
					t.Errorf("an address that nobody has: %v", err)
				}
			})
		}
	}
}

func podAddrs(pod int) both { return both{podAddr(0, pod, 0).String(), podAddr(1, pod, 0).String()} }

// TestOthersInOurRanges: what another proxy translates in a range that we declare gets through, and what is open does.
func TestOthersInOurRanges(t *testing.T) {
	top := newTopology(t)
	serve(t, top.pods[0], "tcp", netip.AddrPortFrom(podAddr(0, 0, 0), 8080))
	nft(t, top.node, `table ip other { chain pre { type nat hook prerouting priority -100; ip daddr 10.99.0.1 tcp dport 80 dnat to 10.244.1.10:8080; }; }`, "-f", "-")
	c := open(t, top.client, 0)
	b := newBackend(t, top.node)
	g := ground
	g.Ranges = []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16"), netip.MustParsePrefix("192.0.2.0/24")}
	apply(t, b, nil, state().On(g))
	if err := echo(c, "open"); err != nil {
		t.Errorf("what was open: %v", err)
	}
	if _, _, err := ask(top.client, "tcp", netip.MustParseAddrPort("10.99.0.1:80"), netip.Addr{}); err != nil {
		t.Errorf("their Service: %v", err)
	}
	// The node's own address is not ours to drop, though it lies in a range; nor is one that it has on a device of its own.
	sh(t, top.node, `ip addr add 10.99.0.77/32 dev lo`)
	for _, own := range []string{"192.0.2.1:7000", "10.99.0.77:7000"} {
		serve(t, top.node, "tcp", netip.MustParseAddrPort(own))
		for _, ns := range []*netns.NS{top.client, top.node} {
			if _, _, err := ask(ns, "tcp", netip.MustParseAddrPort(own), netip.Addr{}); err != nil {
				t.Errorf("%s: %v", own, err)
			}
		}
	}
}

// TestGroundChangesUnderLoad: connections begin all the time while who counts as a pod, who is masqueraded and what is dropped changes; none loses a packet.
func TestGroundChangesUnderLoad(t *testing.T) {
	top := newTopology(t)
	serve(t, top.pods[0], "tcp", netip.AddrPortFrom(podAddr(0, 0, 0), 8080))
	serve(t, top.pods[1], "tcp", netip.AddrPortFrom(podAddr(0, 1, 0), 8080))
	b := newBackend(t, top.node)
	s := web(0, forwarding.TCP)
	grounds := []forwarding.Ground{
		ground, {}, {MasqueradeAll: true, DropInvalid: true}, {Pods: forwarding.PodTraffic{Interfaces: []string{"pod*"}}, Ranges: []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16")}},
		{Pods: ground.Pods, Ranges: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")}, DropInvalid: true},
	}
	prev := state(s)
	apply(t, b, nil, prev)
	stop, done := make(chan struct{}), make(chan error, 1)
	asked := 0
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			start := time.Now()
			_, _, err := ask(top.client, "tcp", netip.AddrPortFrom(serviceIP.addr(0), 80), netip.Addr{})
			if took := time.Since(start); err == nil && took > 900*time.Millisecond {
				err = fmt.Errorf("took %v: a packet was lost and sent again", took)
			}
			if err != nil {
				done <- fmt.Errorf("connection %d: %w", asked, err)
				return
			}
			asked++
		}
	}()
	changes := 0
	for start := time.Now(); time.Since(start) < 2*time.Second; changes++ {
		next := prev.On(grounds[changes%len(grounds)])
		if err := b.Apply(context.Background(), &prev, next); err != nil {
			t.Fatal(err)
		}
		prev = next
	}
	close(stop)
	if err := <-done; err != nil || asked < 20 || changes < 20 {
		t.Fatalf("%v after %d connections and %d changes", err, asked, changes)
	}
}
