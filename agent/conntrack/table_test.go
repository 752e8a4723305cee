package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

func openT(t testing.TB, ns *netns.NS) *Table {
	t.Helper()
	var table *Table
	if err := ns.Do(func() (err error) { table, err = Open(); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { table.Close() })
	return table
}

// made is a flow to be made: that of a client, by its port, in a conntrack zone.
type made struct {
	flow
	protocol string
	client   uint16
	zone     uint16
}

// create enters flows in the table.
func (t *Table) create(flows ...made) error {
	const (
		msgNew, attrProtoInfo, attrTimeout = unix.NFNL_SUBSYS_CTNETLINK << 8, 4, 7
		protoInfoTCP, tcpState             = 1, 1
	)
	t.doomed = t.doomed[:0]
	for _, f := range flows {
		family, client := uint8(unix.AF_INET), netip.AddrPortFrom(netip.MustParseAddr("10.1.0.200"), f.client)
		if f.sentTo.Addr().Is6() {
			family, client = unix.AF_INET6, netip.AddrPortFrom(netip.MustParseAddr("fd00:1::200"), f.client)
		}
		at := len(t.doomed)
		m := appendHeader(t.doomed, msgNew, unix.NLM_F_CREATE|unix.NLM_F_EXCL, 0, family)
		number := map[string]byte{"udp": unix.IPPROTO_UDP, "tcp": unix.IPPROTO_TCP}[f.protocol]
		m = appendTuple(m, attrTupleOrig, number, client, f.sentTo)
		m = appendTuple(m, attrTupleReply, number, f.answers, client)
		m = appendAttr(m, attrTimeout, binary.BigEndian.AppendUint32(nil, 600))
		if f.zone != 0 {
			m = appendAttr(m, attrZone, binary.BigEndian.AppendUint16(nil, f.zone))
		}
		if f.protocol == "tcp" {
			var info, tcp int
			m, info = open(m, attrProtoInfo)
			m, tcp = open(m, protoInfoTCP)
			m = appendAttr(m, tcpState, []byte{3}) // established
			finish16(m, tcp)
			finish16(m, info)
		}
		finish(m, at)
		t.doomed = m
	}
	n, err := t.delete() // sends whatever requests there are
	if err == nil && int(n) != len(flows) {
		err = fmt.Errorf("%d flows were entered, want %d", n, len(flows))
	}
	return err
}

func appendTuple(m []byte, attr uint16, protocol byte, from, to netip.AddrPort) []byte {
	source, dest := uint16(ipv4Source), uint16(ipv4Dest)
	if to.Addr().Is6() {
		source, dest = ipv6Source, ipv6Dest
	}
	m, tuple := open(m, attr)
	m, ip := open(m, tupleIP)
	m = appendAttr(m, source, from.Addr().AsSlice())
	m = appendAttr(m, dest, to.Addr().AsSlice())
	finish16(m, ip)
	m, proto := open(m, tupleProto)
	m = appendAttr(m, protoNumber, []byte{protocol})
	m = appendAttr(m, protoSrcPort, binary.BigEndian.AppendUint16(nil, from.Port()))
	m = appendAttr(m, protoDestPort, binary.BigEndian.AppendUint16(nil, to.Port()))
	finish16(m, proto)
	finish16(m, tuple)
	return m
}

// left gives the clients' ports of all flows in a namespace, as a library that has nothing to do with this one reads them.
func left(t *testing.T, ns *netns.NS) []int {
	t.Helper()
	h, err := netlink.NewHandleAt(vnetns.NsHandle(ns.Fd()), unix.NETLINK_NETFILTER)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	var ports []int
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		flows, err := h.ConntrackTableList(netlink.ConntrackTable, family)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range flows {
			ports = append(ports, int(f.Forward.SrcPort))
		}
	}
	slices.Sort(ports)
	return ports
}

// TestKernel ends flows of a real table, in every way to ask for them.
func TestKernel(t *testing.T) {
	flows := []string{
		"udp 10.99.0.10:53 10.1.0.1:53", "udp 10.99.0.10:53 10.1.0.2:53 stays", "udp [fd00:99::10]:53 [fd00:1::1]:53",
		"udp 192.168.0.1:30053 10.1.0.1:53", "tcp 10.99.0.10:53 10.1.0.1:53 stays",
		"udp 10.99.0.10:53 10.1.0.1:53 zone", "udp 10.99.0.10:53 10.1.0.2:53 zone stays", "udp 10.99.0.11:53 10.1.0.1:53 stays",
		"udp 10.99.0.10:54 10.1.0.1:53 stays", "udp 192.168.0.1:30053 10.1.0.2:53 stays", "udp [fd00:99::11]:53 [fd00:1::1]:53 stays",
	}
	for _, tc := range []struct {
		name       string
		unfiltered bool
		more       int // frontends that are stale too
	}{{"each frontend by itself", false, 0}, {"all UDP flows", false, 10}, {"a kernel that does not filter", true, 0}} {
		t.Run(tc.name, func(t *testing.T) {
			ns := netns.NewT(t)
			table := openT(t, ns)
			table.unfiltered = tc.unfiltered
			var want []int
			for i, s := range flows {
				f, protocol := parseFlow(s)
				m := made{flow: f, protocol: protocol, client: uint16(1000 + i)}
				if strings.Contains(s, "zone") {
					m.zone = 7
				}
				if strings.Contains(s, "stays") {
					want = append(want, 1000+i)
				}
				if err := table.create(m); err != nil {
					t.Fatalf("%s: %v", s, err)
				}
			}
			passes := make(chan Pass, 10)
			c := New(logr.Discard())
			c.Observe = func(p Pass) { passes <- p }
			c.Changed(dns(30053, "10.1.0.1:53", "10.1.0.2:53", "[fd00:1::1]:53"), dns(30053, "10.1.0.2:53"))
			for i := range tc.more {
				c.Changed(nil, with(dns(0), func(s *forwarding.Service) { s.Key.Port = uint16(9000 + i) }))
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go c.Run(ctx, table)
			select {
			case p := <-passes: // one pass serves all changes
				if p.Err != nil || p.Ended != 4 || c.Ended() != 4 {
					t.Errorf("%+v; %d flows have ended, want 4", p, c.Ended())
				}
			case <-time.After(10 * time.Second):
				t.Fatal("there was no pass")
			}
			if got := left(t, ns); !slices.Equal(got, want) {
				t.Errorf("left are the flows %v, want %v", got, want)
			}
		})
	}
}

// TestGoneMeanwhile: flows that end by themselves between look and end are no failure, and count for nothing.
func TestGoneMeanwhile(t *testing.T) {
	table := openT(t, netns.NewT(t))
	f, protocol := parseFlow("udp 10.99.0.10:53 10.1.0.1:53")
	for client := range 3 * batch {
		if err := table.create(made{f, protocol, uint16(client), 0}); err != nil {
			t.Fatal(err)
		}
	}
	s := stale{}
	s.change(dns(0, "10.1.0.1:53"), nil)
	table.doomed = table.doomed[:0]
	if err := table.find(unix.AF_INET, s, spareNone); err != nil {
		t.Fatal(err)
	}
	again := slices.Clone(table.doomed)
	if n, err := table.delete(); n != 3*batch || err != nil {
		t.Fatalf("%d flows have ended, want %d; %v", n, 3*batch, err)
	}
	table.doomed = again
	if n, err := table.delete(); n != 0 || err != nil {
		t.Errorf("%d flows have ended once more; %v", n, err)
	}
}

// TestQueryMatches tells a kernel that ignores a query from one that does not.
func TestQueryMatches(t *testing.T) {
	f, _ := parseFlow("udp 10.99.0.10:53 10.1.0.1:53")
	q := query{netip.MustParseAddr("10.99.0.11"), 53}
	if q.match(f) || !(query{}).match(f) || !(query{port: 53}).match(f) || !(query{f.sentTo.Addr(), 53}).match(f) || (query{port: 54}).match(f) {
		t.Error("what a kernel should not have shown is not recognised")
	}
}

// TestIgnoredFilter: a kernel that shows more than was asked for is noticed, and read without a filter.
func TestIgnoredFilter(t *testing.T) {
	f, protocol := parseFlow("udp 10.99.0.10:53 10.1.0.1:53")
	tcp, _ := parseFlow("tcp 10.99.0.10:53 10.1.0.1:53")
	table := openT(t, netns.NewT(t))
	if err := table.create(made{f, protocol, 1, 0}, made{tcp, "tcp", 1, 0}); err != nil {
		t.Fatal(err)
	}
	nothing := func(flow, entry) {}
	for _, q := range []query{{netip.MustParseAddr("10.99.0.11"), 53}, {f.sentTo.Addr(), 54}, {}} {
		if err := table.dump(request(unix.AF_INET, nil), &q, nothing); !errors.Is(err, errIgnored) {
			t.Errorf("%v is asked for and all is shown: %v", q, err)
		}
		if err := table.dump(request(unix.AF_INET, &q), &q, nothing); err != nil {
			t.Errorf("%v is asked for and shown: %v", q, err)
		}
	}
}

// FuzzParse: lengths in what is parsed are never trusted.
func FuzzParse(f *testing.F) {
	f.Add(appendTuple([]byte{2, 0, 0, 0}, attrTupleOrig, 17, netip.MustParseAddrPort("1.2.3.4:5"), netip.MustParseAddrPort("6.7.8.9:10")))
	f.Add([]byte{20, 0, 0, 0, 2, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4})
	f.Fuzz(func(t *testing.T, p []byte) {
		if _, e, ok := parse(p); ok && (e.tuple == nil || e.id == nil) {
			t.Error("an entry that cannot be ended")
		}
		for m := range messages(p) {
			m.errno()
		}
	})
}
