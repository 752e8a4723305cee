package conntrack

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/go-logr/logr/funcr"
	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

func dns(nodePort uint16, endpoints ...string) *forwarding.Service {
	s := &forwarding.Service{
		Key:        forwarding.ServiceKey{Namespace: "kube-system", Name: "dns", Port: 53, Protocol: forwarding.UDP},
		ServiceIPs: []netip.Addr{netip.MustParseAddr("10.99.0.10"), netip.MustParseAddr("fd00:99::10")},
		NodePort:   nodePort, NodePortAddresses: []netip.Prefix{netip.MustParsePrefix("192.168.0.1/32")},
	}
	for _, e := range endpoints {
		s.Internal.Endpoints = append(s.Internal.Endpoints, forwarding.Endpoint{AddrPort: netip.MustParseAddrPort(e)})
	}
	s.External, s.ExternalFromHere = s.Internal, s.Internal
	return s
}

// flow is "PROTOCOL SENT-TO ANSWERS": a client's flow to one address and port that another answers.
func flow(t *testing.T, client uint16, s string) *netlink.ConntrackFlow {
	t.Helper()
	words := strings.Fields(s)
	to, from := netip.MustParseAddrPort(words[1]), netip.MustParseAddrPort(words[2])
	protocol := map[string]uint8{"udp": unix.IPPROTO_UDP, "tcp": unix.IPPROTO_TCP}[words[0]]
	source := net.ParseIP("10.1.0.200").To4()
	family := uint8(unix.AF_INET)
	if to.Addr().Is6() {
		source, family = net.ParseIP("fd00:1::200"), unix.AF_INET6
	}
	f := &netlink.ConntrackFlow{
		FamilyType: family, TimeOut: 120,
		Forward: netlink.IPTuple{Protocol: protocol, SrcIP: source, SrcPort: client, DstIP: to.Addr().AsSlice(), DstPort: to.Port()},
		Reverse: netlink.IPTuple{Protocol: protocol, SrcIP: from.Addr().AsSlice(), SrcPort: from.Port(), DstIP: source, DstPort: client},
	}
	if protocol == unix.IPPROTO_TCP {
		f.ProtoInfo = &netlink.ProtoInfoTCP{State: 3} // established
	}
	return f
}

func TestFlowsThatLeadNowhereEnd(t *testing.T) {
	for _, tc := range []struct {
		name       string
		prev, next *forwarding.Service
		ends, stay []string
	}{
		{name: "an endpoint goes", prev: dns(0, "10.1.0.1:53", "10.1.0.2:53", "[fd00:1::1]:53"), next: dns(0, "10.1.0.2:53"),
			ends: []string{"udp 10.99.0.10:53 10.1.0.1:53", "udp [fd00:99::10]:53 [fd00:1::1]:53"},
			stay: []string{"udp 10.99.0.10:53 10.1.0.2:53", "udp 10.99.0.11:53 10.1.0.1:53", "udp 10.1.0.1:53 10.1.0.1:53", "tcp 10.99.0.10:53 10.1.0.1:53"}},
		{name: "the first endpoint comes: what went out untranslated ends", prev: dns(30053), next: dns(30053, "10.1.0.1:53"),
			ends: []string{"udp 10.99.0.10:53 10.99.0.10:53", "udp 192.168.0.1:30053 192.168.0.1:30053"},
			stay: []string{"udp 8.8.8.8:30053 8.8.8.8:30053", "udp 10.99.0.10:53 10.1.0.1:53"}},
		{name: "node ports", prev: dns(30053, "10.1.0.1:53", "10.1.0.2:53"), next: dns(30053, "10.1.0.2:53"),
			ends: []string{"udp 192.168.0.1:30053 10.1.0.1:53", "udp 192.168.7.7:30053 10.1.0.1:53"},
			stay: []string{"udp 192.168.0.1:30053 10.1.0.2:53", "udp 192.168.0.1:30054 10.1.0.1:53"}},
		{name: "the Service goes", prev: dns(30053, "10.1.0.1:53"), next: nil,
			ends: []string{"udp 10.99.0.10:53 10.1.0.1:53", "udp 192.168.0.1:30053 10.1.0.1:53"}},
		{name: "its node port goes", prev: dns(30053, "10.1.0.1:53"), next: dns(0, "10.1.0.1:53"),
			ends: []string{"udp 192.168.0.1:30053 10.1.0.1:53"}, stay: []string{"udp 10.99.0.10:53 10.1.0.1:53"}},
		{name: "after a restart everything is looked at", prev: nil, next: dns(0, "10.1.0.2:53"),
			ends: []string{"udp 10.99.0.10:53 10.1.0.1:53"}, stay: []string{"udp 10.99.0.10:53 10.1.0.2:53"}},
		{name: "an endpoint more", prev: dns(0, "10.1.0.1:53"), next: dns(0, "10.1.0.1:53", "10.1.0.2:53"), stay: []string{"udp 10.99.0.10:53 10.1.0.9:53"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := New(logr.Discard())
			c.Changed(tc.prev, tc.next)
			f := filter(c.stale)
			for _, s := range tc.ends {
				if !f.MatchConntrackFlow(flow(t, 1, s)) {
					t.Errorf("%s goes on", s)
				}
			}
			for _, s := range tc.stay {
				if f.MatchConntrackFlow(flow(t, 1, s)) {
					t.Errorf("%s ends", s)
				}
			}
		})
	}
}

func TestTCPIsLeftAlone(t *testing.T) {
	prev, next := dns(0, "10.1.0.1:53"), dns(0, "10.1.0.2:53")
	prev.Key.Protocol, next.Key.Protocol = forwarding.TCP, forwarding.TCP
	c := New(logr.Discard())
	c.Changed(prev, next)
	c.Changed(nil, next)
	c.Changed(prev, nil)
	if len(c.stale) != 0 {
		t.Error("a TCP service is looked at")
	}
}

// TestAgainstKernel ends flows of a real table.
func TestAgainstKernel(t *testing.T) {
	ns := netns.NewT(t)
	table, err := netlink.NewHandleAt(vnetns.NsHandle(ns.Fd()), unix.NETLINK_NETFILTER)
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	all := []string{"udp 10.99.0.10:53 10.1.0.1:53", "udp 10.99.0.10:53 10.1.0.2:53", "udp [fd00:99::10]:53 [fd00:1::1]:53",
		"udp 192.168.0.1:30053 10.1.0.1:53", "tcp 10.99.0.10:53 10.1.0.1:53"}
	for i, s := range all {
		f := flow(t, uint16(1000+i), s)
		if err := table.ConntrackCreate(netlink.ConntrackTable, netlink.InetFamily(f.FamilyType), f); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	passes := make(chan string, len(all))
	c := New(funcr.New(func(_, line string) { passes <- line }, funcr.Options{Verbosity: 1}))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.Run(ctx, table)
	}()
	c.Changed(dns(30053, "10.1.0.1:53", "10.1.0.2:53", "[fd00:1::1]:53"), dns(30053, "10.1.0.2:53"))
	select {
	case line := <-passes: // one change is one pass, and it is told only when it is over
		if !strings.Contains(line, `"flows"=3`) || c.Ended() != 3 {
			t.Errorf("%s; %d flows have ended, want 3", line, c.Ended())
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("%d flows have ended, want 3", c.Ended())
	}
	cancel()
	<-done
	var left []string
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		flows, err := table.ConntrackTableList(netlink.ConntrackTable, family)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range flows {
			left = append(left, all[f.Forward.SrcPort-1000])
		}
	}
	slices.Sort(left)
	if want := []string{all[4], all[1]}; !slices.Equal(left, want) {
		t.Errorf("left are %q, want %q", left, want)
	}
}
