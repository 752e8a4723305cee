package nftables

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/anchor"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// echo sends a line and says whether it comes back.
func echo(c net.Conn, line string) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(c, line); err != nil {
		return err
	}
	got, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && strings.TrimSpace(got) != line {
		err = fmt.Errorf("%q came back of %q", got, line)
	}
	return err
}

// open opens a connection to the service IP from outside, which is translated and masqueraded.
func open(t *testing.T, ns *netns.NS, family int) net.Conn {
	t.Helper()
	c, err := dial(ns, "tcp", netip.AddrPortFrom(serviceIP.addr(family), 80), netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, err := bufio.NewReader(io.LimitReader(c, 200)).ReadString('\n'); err != nil { // who answers
		t.Fatal(err)
	}
	return c
}

// TestOpenConnectionsOutliveTheLastRule: the last Service goes, the agent starts again without Services and cleans the mode up; what is open stays open until
// it ends by itself, and then nothing is left.
func TestOpenConnectionsOutliveTheLastRule(t *testing.T) {
	top := newTopology(t)
	sh(t, top.node, `sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_time_wait=1 net.netfilter.nf_conntrack_tcp_timeout_close=1`)
	b := newBackend(t, top.node)
	both := state()
	for family := range families {
		serve(t, top.pods[0], "tcp", netip.AddrPortFrom(podAddr(family, 0, 0), 8080))
		s := web(family, forwarding.TCP)
		s.Key.Name = fmt.Sprint("web-", family)
		s.Internal.Endpoints = s.Internal.Endpoints[:1]
		both = both.With(s)
	}
	apply(t, b, nil, both)
	var conns []net.Conn
	for family := range families {
		conns = append(conns, open(t, top.client, family))
	}
	stillOpen := func(when string) {
		t.Helper()
		for family, c := range conns {
			if err := echo(c, when); err != nil {
				t.Errorf("%s, family %d: %v", when, family, err)
			}
		}
	}
	// One that is not translated needs no anchor: it stays open through all of this, and keeps nothing.
	direct, err := dial(top.client, "tcp", netip.AddrPortFrom(podAddr(0, 0, 0), 8080), netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { direct.Close() })
	stillOpen("before")
	empty := state()
	apply(t, b, &both, empty)
	stillOpen("after the last Service")
	apply(t, newBackend(t, top.node), nil, empty)
	stillOpen("after a restart")
	release := func() (gone bool) {
		t.Helper()
		err := top.node.Do(func() (err error) { gone, err = anchor.Release(context.Background()); return err })
		if err != nil {
			t.Fatal(err)
		}
		return gone
	}
	cleanUp(t, top.node)
	stillOpen("after the mode was cleaned up")
	if release() {
		t.Error("the anchor was released while connections are open")
	}
	stillOpen("after trying to release the anchor")
	if list := nft(t, top.node, "", "list", "ruleset"); !strings.Contains(list, anchor.TableName) || strings.Contains(list, "ip serviceproxy {") {
		t.Errorf("left:\n%s", list)
	} else {
		nft(t, top.node, list, "-c", "-f", "-")
	}
	for _, c := range conns {
		c.Close()
	}
	for deadline := time.Now().Add(10 * time.Second); !release(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the anchor stays although the connections have ended")
		}
	}
	if list := nft(t, top.node, "", "list", "ruleset"); list != "" {
		t.Errorf("left:\n%s", list)
	}
}

// TestConnectionsEndWithoutTheAnchor shows what the anchor is for, so that nobody keeps it longer than the kernel needs it; and that it is repaired.
func TestConnectionsEndWithoutTheAnchor(t *testing.T) {
	top := newTopology(t)
	b := newBackend(t, top.node)
	serve(t, top.pods[0], "tcp", netip.AddrPortFrom(podAddr(0, 0, 0), 8080))
	s := web(0, forwarding.TCP)
	s.Internal.Endpoints = s.Internal.Endpoints[:1]
	want := state(s)
	apply(t, b, nil, want)
	nft(t, top.node, "", "delete", "table", "inet", anchor.TableName)
	awaitDrift(t, b)
	if drifts, err := b.Verify(context.Background(), want); err != nil || len(drifts) != 1 || !strings.Contains(drifts[0].String(), anchor.TableName) {
		t.Errorf("without the anchor: %v, %v", drifts, err)
	}
	apply(t, b, nil, want)
	if drifts, err := b.Verify(context.Background(), want); err != nil || len(drifts) != 0 {
		t.Errorf("after the repair: %v, %v", drifts, err)
	}
	c := open(t, top.client, 0)
	if err := echo(c, "before"); err != nil {
		t.Fatal(err)
	}
	nft(t, top.node, "", "flush", "ruleset")
	if err := c.SetDeadline(time.Now().Add(2 * silence)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(c, "after")
	if _, err := bufio.NewReader(c).ReadString('\n'); err == nil {
		t.Error("the connection outlived all of nf_tables: the kernel needs no anchor")
	}
}

// silence is how long is waited for an answer that must not come.
const silence = 150 * time.Millisecond

func cleanUp(t *testing.T, ns *netns.NS) {
	t.Helper()
	if err := ns.Do(func() error { return Cleanup(context.Background()) }); err != nil {
		t.Fatal(err)
	}
}
