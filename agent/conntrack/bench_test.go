package conntrack

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

const (
	benchFlows = 100_000
	benchStale = 100 // of them lead to an endpoint that is gone
)

// benchTable fills a table: flows to 50 services, one in a thousand to an endpoint that goes.
func benchTable(b *testing.B, ns *netns.NS) (*Table, []made) {
	table := openT(b, ns)
	lost, flows := make([]made, 0, benchStale), make([]made, 0, benchFlows)
	for i := range benchFlows {
		service := netip.AddrFrom4([4]byte{10, 99, 1, byte(i % 50)})
		m := made{protocol: "udp", client: uint16(1 + i/50)}
		m.flow = flow{netip.AddrPortFrom(service, 53), netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, 1, byte(i % 50)}), 53)}
		if i/50 < benchStale && i%50 == 10 {
			m.answers = netip.MustParseAddrPort("10.1.0.1:53")
			lost = append(lost, m)
		}
		flows = append(flows, m)
	}
	if err := table.create(flows...); err != nil {
		b.Fatal(err)
	}
	return table, lost
}

// cpu is this process's CPU time so far, the kernel's on its behalf included.
func cpu(b *testing.B) time.Duration {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// BenchmarkPass ends 100 of 100 000 UDP flows. The library's way is that of kube-proxy: list the table, then list it again to delete.
func BenchmarkPass(b *testing.B) {
	ns := netns.NewT(b)
	table, lost := benchTable(b, ns)
	library, err := netlink.NewHandleAt(vnetns.NsHandle(ns.Fd()), unix.NETLINK_NETFILTER)
	if err != nil {
		b.Fatal(err)
	}
	defer library.Close()
	staleFrontends := func(n int) stale {
		s := stale{}
		for i := range n {
			svc := dns(0, fmt.Sprintf("10.1.1.%d:53", 10+i))
			svc.ServiceIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 99, 1, byte(10 + i)})}
			s.change(nil, svc)
		}
		return s
	}
	one, four, forty := staleFrontends(1), staleFrontends(4), staleFrontends(40)
	for _, c := range []struct {
		name string
		end  func() (uint, error)
	}{
		{"frontends=1", func() (uint, error) { return table.end(unix.AF_INET, one, spareNone) }},
		{"frontends=4", func() (uint, error) { return table.end(unix.AF_INET, four, spareNone) }},
		{"frontends=40", func() (uint, error) { return table.end(unix.AF_INET, forty, spareNone) }},
		{"unfiltered", func() (uint, error) {
			table.unfiltered = true
			defer func() { table.unfiltered = false }()
			return table.end(unix.AF_INET, forty, spareNone)
		}},
		{"library-delete-filters", func() (uint, error) {
			return library.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, libraryFilter(one))
		}},
		{"library-list-and-delete", func() (uint, error) {
			if _, err := library.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET); err != nil {
				return 0, err
			}
			return library.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, libraryFilter(one))
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			var spent time.Duration
			for b.Loop() {
				before := cpu(b)
				ended, err := c.end()
				spent += cpu(b) - before
				b.StopTimer()
				if err != nil || ended != benchStale {
					b.Fatalf("%d flows have ended, want %d: %v", ended, benchStale, err)
				}
				if err := table.create(lost...); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			b.ReportMetric(float64(spent)/float64(b.N)/1e6, "cpu-ms/op")
		})
	}
}

// libraryFilter makes what is stale a filter of the library.
type libraryFilter stale

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (l libraryFilter) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	sentTo, _ := netip.AddrFromSlice(f.Forward.DstIP)
	answers, _ := netip.AddrFromSlice(f.Reverse.SrcIP)
	return f.Forward.Protocol == uint8(forwarding.UDP) && stale(l).leadsNowhere(flow{
		netip.AddrPortFrom(sentTo.Unmap(), f.Forward.DstPort), netip.AddrPortFrom(answers.Unmap(), f.Reverse.SrcPort)})
}

func spareNone(flow) bool { return false }
