package nftables

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/anchor"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

func drained(b *Backend) {
	select {
	case <-b.Drifted():
	default:
	}
}

func awaitDrift(t *testing.T, b *Backend) {
	t.Helper()
	select {
	case <-b.Drifted():
	case <-time.After(2 * time.Second):
		t.Fatal("no drift was signalled")
	}
}

// TestDrift: whatever someone else does to our table is signalled, named by Verify, and repaired by Apply with a nil state.
func TestDrift(t *testing.T) {
	udp := web(0, forwarding.UDP)
	udp.Key.Name, udp.Affinity = "all-0", 3*time.Hour
	pinning := balancer{size: 2, masq: masqueradeAll, pin: pinOf(udp)}.name()
	guarded := gate{to: balancer{size: 2, masq: masqueradeAll, pin: pinOf(udp)}}.name()
	number := newNumberings().provide(udp.Key).take(families[0], slots{10, 244, 1, 11, 8080 >> 8, 8080 & 0xff})[0]
	second := fmt.Sprintf("10.99.0.1 . udp . 80 . %x:%x", number>>16, number&0xffff)
	const element = "ip serviceproxy services.0 { 10.99.0.1 . tcp . 80 . %s }"
	for _, c := range []struct {
		name, nft string
		want      []string // some of the drifts
	}{
		{"table", "delete table ip serviceproxy", []string{"ip serviceproxy table serviceproxy: missing", "ip serviceproxy map services element 10.99.0.1 . tcp . 80: missing"}},
		{"everything", "flush ruleset", []string{"ip6 serviceproxy table serviceproxy: missing"}},
		{"endpoint", fmt.Sprintf("delete element "+element, "1"), []string{"ip serviceproxy map services.0 element 10.99.0.1 . tcp . 80 . 1: missing"}},
		{"slot 0", fmt.Sprintf("delete element "+element, "0"), []string{"ip serviceproxy map services.0 element 10.99.0.1 . tcp . 80 . 0: missing"}},
		{"foreign endpoint", fmt.Sprintf("add element "+element, "3 : 203.0.113.1 . 1"), []string{"ip serviceproxy map services.0 element 10.99.0.1 . tcp . 80 . 3: unexpected"}},
		{"slot beyond all", fmt.Sprintf("add element "+element, "3000000 : 203.0.113.1 . 1"), []string{"ip serviceproxy map services.0 element 10.99.0.1 . tcp . 80 . 3000000: unexpected"}},
		{"verdict", "delete element ip serviceproxy services { 10.99.0.1 . tcp . 80 }", []string{"ip serviceproxy map services element 10.99.0.1 . tcp . 80: missing"}},
		{"foreign verdict", "delete element ip6 serviceproxy services { fd00:99::1 . udp . 80 }; add element ip6 serviceproxy services { fd00:99::1 . udp . 80 : accept }",
			[]string{"ip6 serviceproxy map services element fd00:99::1 . udp . 80: differs: another verdict"}},
		{"foreign service", "add element ip serviceproxy services { 10.99.9.9 . tcp . 80 : drop }", []string{"ip serviceproxy map services element 10.99.9.9 . tcp . 80: unexpected"}},
		{"service IP", "flush set ip serviceproxy service-ips", []string{"ip serviceproxy set service-ips element 10.99.0.1: missing"}},
		{"foreign hairpin", "add element ip serviceproxy hairpin { 10.0.0.1 . 10.0.0.2 . tcp . 1 }", []string{"ip serviceproxy set hairpin element 10.0.0.1 . 10.0.0.2 . tcp . 1: unexpected"}},
		{"rule", "flush chain ip serviceproxy postrouting", []string{"ip serviceproxy chain postrouting: differs: its rules are others"}},
		{"gate flushed", "flush chain ip serviceproxy " + guarded, []string{"ip serviceproxy chain " + guarded + ": differs: its rules are others"}},
		{"gate opened", "insert rule ip serviceproxy services-from accept", []string{"ip serviceproxy chain services-from: differs: its rules are others"}},
		{"source ranges never asked for", "flush chain ip serviceproxy services-from", []string{"ip serviceproxy chain services-from: differs: its rules are others"}},
		{"source range", "flush set ip serviceproxy services-from-30", []string{"ip serviceproxy set services-from-30 element 198.51.100.7 . udp . 80 . 192.0.2.0: missing"}},
		{"another source range", "add element ip serviceproxy services-from-30 { 198.51.100.7 . udp . 80 . 203.0.113.0 }",
			[]string{"ip serviceproxy set services-from-30 element 198.51.100.7 . udp . 80 . 203.0.113.0: unexpected"}},
		{"no source range", "add element ip serviceproxy services-from-30 { 198.51.100.7 . udp . 80 . 203.0.113.1 }",
			[]string{"ip serviceproxy set services-from-30 element 198.51.100.7 . udp . 80 . 203.0.113.1: unexpected"}},
		{"source range of what has none", "add element ip6 serviceproxy services-from-64 { fd00:99::1 . udp . 80 . fd00:: }", []string{"ip6 serviceproxy set services-from-64 element fd00:99::1 . udp . 80 . fd00::: unexpected"}},
		{"source range of no service", "add element ip serviceproxy services-from-32 { 10.99.9.9 . udp . 80 . 192.0.2.9 }", []string{"ip serviceproxy set services-from-32 element 10.99.9.9 . udp . 80 . 192.0.2.9: unexpected"}},
		{"set of source ranges", "flush chain ip serviceproxy services-from; delete set ip serviceproxy services-from-30", []string{"ip serviceproxy map services-from-30: missing"}},
		{"foreign set of source ranges", "add set ip serviceproxy services-from-7 { type ipv4_addr . inet_proto . inet_service . ipv4_addr; }", []string{"ip serviceproxy map services-from-7: unexpected"}},
		{"foreign source ranges", "add set ip serviceproxy services-here-from-7 { type ipv4_addr . inet_proto . inet_service . ipv4_addr; elements = { 10.99.0.1 . tcp . 80 . 2.0.0.0 } }",
			[]string{"ip serviceproxy set services-here-from-7 element 10.99.0.1 . tcp . 80 . 2.0.0.0: unexpected", "ip serviceproxy map services-here-from-7: unexpected"}},
		{"source ranges passed by", "delete element ip serviceproxy services { 198.51.100.7 . udp . 80 }; add element ip serviceproxy services { 198.51.100.7 . udp . 80 : goto " + pinning + " }",
			[]string{"ip serviceproxy map services element 198.51.100.7 . udp . 80: differs: another verdict"}},
		{"draw", "delete element ip serviceproxy services.0-draws { 10.99.0.1 . udp . 80 . 1 }", []string{"ip serviceproxy map services.0-draws element 10.99.0.1 . udp . 80 . 1: missing"}},
		{"draw of slot 0", "delete element ip serviceproxy services.0-draws { 10.99.0.1 . udp . 80 . 0 }", []string{"ip serviceproxy map services.0-draws element 10.99.0.1 . udp . 80 . 0: missing"}},
		{"foreign draw", "add element ip serviceproxy services.0-draws { 10.99.0.1 . udp . 80 . 3 : 8000:1 }", []string{"ip serviceproxy map services.0-draws element 10.99.0.1 . udp . 80 . 3: unexpected"}},
		{"draw twice", fmt.Sprintf("add element ip serviceproxy services.0-draws { 10.99.0.1 . udp . 80 . 3 : %x:%x }", number>>16, number&0xffff), []string{"ip serviceproxy map services.0-draws element 10.99.0.1 . udp . 80 . 3: unexpected"}},
		{"pinned", "delete element ip serviceproxy services.0-pinned { " + second + " }", []string{"ip serviceproxy map services.0-pinned element " + second + ": missing"}},
		{"foreign pinned", "add element ip serviceproxy services.0-pinned { 10.99.0.1 . udp . 80 . 8000:1 : 203.0.113.1 . 1 }", []string{"ip serviceproxy map services.0-pinned element 10.99.0.1 . udp . 80 . 8000:1: unexpected"}},
		{"pinned elsewhere", "delete element ip serviceproxy services.0-pinned { " + second + " }; add element ip serviceproxy services.0-pinned { " + second + " : 203.0.113.1 . 1 }",
			[]string{"ip serviceproxy map services.0-pinned element " + second + ": unexpected", "ip serviceproxy map services.0-pinned element " + second + ": missing"}},
		{"foreign service that pins", "add element ip serviceproxy services.0-pinned { 10.99.9.9 . udp . 80 . 8000:1 : 203.0.113.1 . 1 }", []string{"ip serviceproxy map services.0-pinned element 10.99.9.9 . udp . 80 . 8000:1: unexpected"}},
		{"both kinds of endpoint", "add element ip serviceproxy services.0 { 10.99.0.1 . udp . 80 . 0 : 203.0.113.1 . 1 }", []string{"ip serviceproxy map services.0 element 10.99.0.1 . udp . 80 . 0: unexpected"}},
		{"pinning maps", "flush map ip serviceproxy services.0-draws; flush map ip serviceproxy services.0-pinned", []string{"ip serviceproxy map services.0-pinned element " + second + ": missing"}},
		{"pinning chain", "flush chain ip serviceproxy " + pinning, []string{"ip serviceproxy chain " + pinning + ": differs: its rules are others"}},
		{"foreign rule", "insert rule ip serviceproxy services.0-hash-4-offmasq accept", []string{"ip serviceproxy chain services.0-hash-4-offmasq: differs: its rules are others"}},
		{"foreign chains", "add chain ip serviceproxy a; add chain ip serviceproxy b; add rule ip serviceproxy a jump b; add rule ip serviceproxy b tcp dport 1 counter",
			[]string{"ip serviceproxy chain a: unexpected", "ip serviceproxy chain b: unexpected"}},
		{"foreign set", "add set ip serviceproxy mine { type ipv4_addr; elements = { 1.2.3.4 } }; insert rule ip serviceproxy services ip saddr @mine drop", []string{"ip serviceproxy map mine: unexpected"}},
		{"hook", "flush chain ip serviceproxy output; delete chain ip serviceproxy output; add chain ip serviceproxy output { type nat hook output priority -150; }",
			[]string{"ip serviceproxy table serviceproxy: differs: a set or base chain is of another kind"}},
		{"orphan class", "add map ip serviceproxy nodeports-00000000000000aa { type inet_proto . inet_service : verdict; }", []string{"ip serviceproxy map nodeports-00000000000000aa: unexpected"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns := netns.NewT(t)
			nft(t, ns, "table ip other { chain c { counter; }; }", "-f", "-")
			b := newBackend(t, ns)
			want := everything()
			apply(t, b, nil, want)
			if drifts, err := b.Verify(context.Background(), want); err != nil || len(drifts) > 0 {
				t.Fatalf("before: %v %v", drifts, err)
			}
			drained(b)
			nft(t, ns, c.nft, "-f", "-")
			awaitDrift(t, b)
			drifts, err := b.Verify(context.Background(), want)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, d := range drifts {
				got = append(got, d.String())
			}
			for _, w := range c.want {
				if !slices.Contains(got, w) {
					t.Errorf("Verify does not name %q:\n%s", w, strings.Join(got, "\n"))
				}
			}
			apply(t, b, nil, want)
			if drifts, err := b.Verify(context.Background(), want); err != nil || len(drifts) > 0 {
				t.Errorf("after the repair: %v %v", drifts, err)
			}
			if got, want := kernelContent(t, b, want.Ground()), wantContent(want); !maps.Equal(got, want) {
				t.Errorf("after the repair the kernel holds\n%v\nwant\n%v", got, want)
			}
		})
	}
}

// TestNoDriftOfOthers: neither our own transactions nor those on other tables are drift.
func TestNoDriftOfOthers(t *testing.T) {
	ns := netns.NewT(t)
	b := newBackend(t, ns)
	apply(t, b, nil, everything())
	prev := everything()
	next := state()
	apply(t, b, &prev, next)
	apply(t, b, &next, benchState(3000)) // enough for notifications to be off meanwhile
	nft(t, ns, "table ip other { chain c { counter; }; }", "-f", "-")
	select {
	case <-b.Drifted():
		t.Error("a change of our own or of another table is signalled as drift")
	default:
	}
	nft(t, ns, "flush chain ip serviceproxy services", "-f", "-")
	awaitDrift(t, b)
}

// TestCleanup removes ours, only ours, and is content if nothing is there.
func TestCleanup(t *testing.T) {
	ns := netns.NewT(t)
	const foreign = "table ip other {\n\tchain c {\n\t\tip saddr 1.2.3.4 drop\n\t}\n}\ntable inet serviceproxy {\n}\ntable ip serviceproxy-other {\n}\n"
	nft(t, ns, foreign, "-f", "-")
	before := nft(t, ns, "", "list", "ruleset")
	b := newBackend(t, ns)
	apply(t, b, nil, everything())
	for range 2 {
		cleanUp(t, ns)
		gone := false
		if err := ns.Do(func() (err error) { gone, err = anchor.Release(context.Background()); return err }); err != nil || !gone {
			t.Fatalf("the anchor is gone: %v, %v", gone, err)
		}
		if after := nft(t, ns, "", "list", "ruleset"); after != before {
			t.Fatalf("left:\n%s\nwant:\n%s", after, before)
		}
	}
}

// TestProbe leaves nothing, neither with our table there nor without.
func TestProbe(t *testing.T) {
	ns := netns.NewT(t)
	probe := func() {
		t.Helper()
		before := nft(t, ns, "", "list", "ruleset")
		if err := ns.Do(func() error { return Probe(context.Background()) }); err != nil {
			t.Fatal(err)
		}
		if after := nft(t, ns, "", "list", "ruleset"); after != before {
			t.Fatalf("left:\n%s\nwant:\n%s", after, before)
		}
	}
	probe()
	apply(t, newBackend(t, ns), nil, everything())
	probe()
}

// TestForeignChurn: another program that never stops changing its own table must not keep us from starting.
func TestForeignChurn(t *testing.T) {
	ns := netns.NewT(t)
	b := newBackend(t, ns)
	churn := newBackend(t, ns).conn
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		var err error
		for err == nil {
			select {
			case <-stop:
				stopped <- nil
				return
			default:
				err = churnOnce(churn)
			}
		}
		stopped <- err
	}()
	for range 20 {
		apply(t, b, nil, everything())
		apply(t, b, nil, state())
	}
	close(stop)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	apply(t, b, nil, everything())
	if drifts, err := b.Verify(context.Background(), everything()); err != nil || len(drifts) > 0 {
		t.Errorf("%v %v", drifts, err)
	}
}

// churnOnce makes and deletes a table of another name.
func churnOnce(conn *nfnl.Conn) error {
	var batch nfnl.Batch
	t := nfnl.Table{Family: families[0].proto, Name: "churn"}
	batch.AddTable(t)
	batch.DeleteTable(t)
	return conn.Commit(&batch, 0)
}
