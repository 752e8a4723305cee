package conntrack

import (
	"context"
	"errors"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
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

func with(s *forwarding.Service, change func(*forwarding.Service)) *forwarding.Service {
	change(s)
	return s
}

// lingers makes a service let flows stay with an endpoint that gets no new traffic.
func lingers(e string) func(*forwarding.Service) {
	return func(s *forwarding.Service) { s.Lingering = []netip.AddrPort{netip.MustParseAddrPort(e)} }
}

// at serves the node port at other addresses.
func at(prefix string) func(*forwarding.Service) {
	return func(s *forwarding.Service) { s.NodePortAddresses = []netip.Prefix{netip.MustParsePrefix(prefix)} }
}

// parseFlow reads "PROTOCOL SENT-TO ANSWERS": a client's flow to one address and port that another answers.
func parseFlow(s string) (f flow, protocol string) {
	words := strings.Fields(s)
	return flow{netip.MustParseAddrPort(words[1]), netip.MustParseAddrPort(words[2])}, words[0]
}

func TestFlowsThatLeadNowhereEnd(t *testing.T) {
	for _, tc := range []struct {
		name       string
		prev, next *forwarding.Service
		ends, stay []string
	}{
		{name: "an endpoint goes", prev: dns(0, "10.1.0.1:53", "10.1.0.2:53", "[fd00:1::1]:53"), next: dns(0, "10.1.0.2:53"),
			ends: []string{"udp 10.99.0.10:53 10.1.0.1:53", "udp [fd00:99::10]:53 [fd00:1::1]:53"},
			stay: []string{"udp 10.99.0.10:53 10.1.0.2:53", "udp 10.99.0.11:53 10.1.0.1:53", "udp 10.1.0.1:53 10.1.0.1:53"}},
		{name: "the first endpoint comes: what went out untranslated ends", prev: dns(30053), next: dns(30053, "10.1.0.1:53"),
			ends: []string{"udp 10.99.0.10:53 10.99.0.10:53", "udp 192.168.0.1:30053 192.168.0.1:30053"},
			stay: []string{"udp 8.8.8.8:30053 8.8.8.8:30053", "udp 10.99.0.10:53 10.1.0.1:53"}},
		{name: "the first endpoint of one family comes", prev: dns(0, "10.1.0.1:53"), next: dns(0, "10.1.0.1:53", "[fd00:1::1]:53"),
			ends: []string{"udp [fd00:99::10]:53 [fd00:99::10]:53"}, stay: []string{"udp 10.99.0.10:53 10.1.0.1:53"}},
		{name: "an address comes", prev: with(dns(0, "10.1.0.1:53"), func(s *forwarding.Service) { s.ServiceIPs = nil }), next: dns(0, "10.1.0.1:53"),
			ends: []string{"udp 10.99.0.10:53 10.99.0.10:53"}, stay: []string{"udp 10.99.0.10:53 10.1.0.1:53"}},
		{name: "node ports", prev: dns(30053, "10.1.0.1:53", "10.1.0.2:53"), next: dns(30053, "10.1.0.2:53"),
			ends: []string{"udp 192.168.0.1:30053 10.1.0.1:53"},
			stay: []string{"udp 192.168.0.1:30053 10.1.0.2:53", "udp 192.168.0.1:30054 10.1.0.1:53", "udp 192.168.7.7:30053 10.1.0.1:53"}},
		{name: "node ports at addresses that are not listed", prev: with(dns(30053, "10.1.0.1:53"), at("192.168.0.0/16")), next: with(dns(30053, "10.1.0.2:53"), at("192.168.0.0/16")),
			ends: []string{"udp 192.168.7.7:30053 10.1.0.1:53"}, stay: []string{"udp 192.168.7.7:30053 192.168.7.7:30053"}},
		{name: "the node's address changes", prev: with(dns(30053, "10.1.0.1:53"), at("192.168.7.7/32")), next: dns(30053, "10.1.0.2:53"),
			ends: []string{"udp 192.168.7.7:30053 10.1.0.1:53", "udp 192.168.0.1:30053 10.1.0.1:53"}},
		{name: "the Service goes", prev: dns(30053, "10.1.0.1:53"), next: nil,
			ends: []string{"udp 10.99.0.10:53 10.1.0.1:53", "udp 192.168.0.1:30053 10.1.0.1:53"}},
		{name: "its node port goes", prev: dns(30053, "10.1.0.1:53"), next: dns(0, "10.1.0.1:53"),
			ends: []string{"udp 192.168.0.1:30053 10.1.0.1:53"}, stay: []string{"udp 10.99.0.10:53 10.1.0.1:53"}},
		{name: "after a restart everything is looked at", prev: nil, next: dns(0, "10.1.0.2:53"),
			ends: []string{"udp 10.99.0.10:53 10.1.0.1:53"}, stay: []string{"udp 10.99.0.10:53 10.1.0.2:53"}},
		{name: "an endpoint more", prev: dns(0, "10.1.0.1:53"), next: dns(0, "10.1.0.1:53", "10.1.0.2:53"), stay: []string{"udp 10.99.0.10:53 10.1.0.9:53"}},
		{name: "an endpoint terminates and serves", prev: dns(0, "10.1.0.1:53", "10.1.0.2:53"), next: with(dns(0, "10.1.0.2:53"), lingers("10.1.0.1:53")),
			stay: []string{"udp 10.99.0.10:53 10.1.0.1:53"}},
		{name: "an endpoint that terminated serves no more", prev: with(dns(0, "10.1.0.2:53"), lingers("10.1.0.1:53")), next: dns(0, "10.1.0.2:53"),
			ends: []string{"udp 10.99.0.10:53 10.1.0.1:53"}},
		{name: "after a restart with an endpoint that terminates and serves", prev: nil, next: with(dns(0, "10.1.0.2:53"), lingers("10.1.0.1:53")),
			ends: []string{"udp 10.99.0.10:53 10.1.0.3:53"}, stay: []string{"udp 10.99.0.10:53 10.1.0.1:53"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := New(logr.Discard())
			c.Changed(tc.prev, tc.next)
			for _, s := range tc.ends {
				if f, _ := parseFlow(s); !c.stale.leadsNowhere(f) {
					t.Errorf("%s goes on", s)
				}
			}
			for _, s := range tc.stay {
				if f, _ := parseFlow(s); c.stale.leadsNowhere(f) {
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

// TestAddressMoves: changes of one pass come in any order.
func TestAddressMoves(t *testing.T) {
	other := func(endpoints ...string) *forwarding.Service {
		return with(dns(0, endpoints...), func(s *forwarding.Service) { s.Key.Name = "other" })
	}
	right, _ := parseFlow("udp 10.99.0.10:53 10.1.0.2:53")
	wrong, _ := parseFlow("udp 10.99.0.10:53 10.1.0.1:53")
	gone := func(c *Cleaner) { c.Changed(dns(0, "10.1.0.1:53"), nil) }
	comes := func(c *Cleaner) { c.Changed(nil, other("10.1.0.2:53")) }
	for _, order := range [][]func(*Cleaner){{gone, comes}, {comes, gone}} {
		c := New(logr.Discard())
		for _, change := range order {
			change(c)
		}
		if c.stale.leadsNowhere(right) || !c.stale.leadsNowhere(wrong) {
			t.Errorf("the flow to the new owner's endpoint ends: %t, to the old one's: %t", c.stale.leadsNowhere(right), c.stale.leadsNowhere(wrong))
		}
	}
}

// TestEndpointComesMeanwhile: flows to an endpoint that comes when a pass is due or under way go on, although the change that asked for the pass did not
// know it.
func TestEndpointComesMeanwhile(t *testing.T) {
	wrong, _ := parseFlow("udp 10.99.0.10:53 10.1.0.1:53")
	right, _ := parseFlow("udp 10.99.0.10:53 10.1.0.3:53")
	c := New(logr.Discard())
	goes := func() { c.Changed(dns(0, "10.1.0.1:53", "10.1.0.2:53"), dns(0, "10.1.0.2:53")) }
	comes := func() { c.Changed(dns(0, "10.1.0.2:53"), dns(0, "10.1.0.2:53", "10.1.0.3:53")) }
	for when, pass := range map[string]func(ends func(stale, func(flow) bool)){
		"due": func(ends func(stale, func(flow) bool)) {
			comes()
			c.pass(func(_ uint8, s stale, spare func(flow) bool) (uint, error) { ends(s, spare); return 0, nil })
		},
		"under way": func(ends func(stale, func(flow) bool)) {
			c.pass(func(_ uint8, s stale, spare func(flow) bool) (uint, error) { comes(); ends(s, spare); return 0, nil })
		},
	} {
		goes()
		families := 0
		pass(func(s stale, spare func(flow) bool) {
			if families++; families > 1 {
				return // IPv6
			}
			if !s.leadsNowhere(wrong) || spare(wrong) {
				t.Errorf("a pass is %s: the flow to an endpoint that is gone goes on", when)
			}
			if s.leadsNowhere(right) && !spare(right) {
				t.Errorf("a pass is %s: the flow to the endpoint that came ends", when)
			}
		})
	}
}

// TestFailedPass: what a pass could not do is done by a later one, with what has changed meanwhile.
func TestFailedPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		c := New(logr.Discard())
		passes := make(chan Pass, 10)
		c.Observe = func(p Pass) { passes <- p }
		refused := errors.New("no memory")
		failing := 3
		looked := make(chan stale, 10)
		go c.run(ctx, func(_ uint8, s stale, _ func(flow) bool) (uint, error) {
			if failing > 0 {
				failing--
				return 1, refused
			}
			looked <- s
			return 2, nil
		})
		only4 := func(s *forwarding.Service) { s.ServiceIPs = s.ServiceIPs[:1] }
		c.Changed(with(dns(0, "10.1.0.1:53"), only4), with(dns(0, "10.1.0.2:53"), only4))
		if p := <-passes; !errors.Is(p.Err, refused) || c.Ended() != 1 {
			t.Fatalf("%+v, %d ended", p, c.Ended())
		}
		c.Changed(with(dns(0, "10.1.0.2:53"), only4), with(dns(0, "10.1.0.3:53"), only4))
		for range 2 {
			if p := <-passes; !errors.Is(p.Err, refused) {
				t.Fatalf("%+v", p)
			}
		}
		p, seen := <-passes, <-looked
		newest, _ := parseFlow("udp 10.99.0.10:53 10.1.0.3:53")
		outdated, _ := parseFlow("udp 10.99.0.10:53 10.1.0.2:53")
		if p.Err != nil || p.Ended != 2 || seen.leadsNowhere(newest) || !seen.leadsNowhere(outdated) {
			t.Errorf("pass %+v looked for %v", p, seen)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(passes) > 0 {
			t.Error("there was another pass after one that has done all")
		}
	})
}

// TestPassesRest: a pass that takes much CPU time is not followed by the next at once, however much changes; one that only waits for a CPU is.
func TestPassesRest(t *testing.T) {
	for name, c := range map[string]struct {
		spends      bool
		least, most int32
	}{
		"a twentieth of the time, of passes that compute": {true, 20, 25},
		"nearly all of it, of passes that wait":           {false, 300, 340},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				cleaner := New(logr.Discard())
				var spent time.Duration
				cleaner.spent = func() time.Duration { return spent }
				var passes atomic.Int32
				var running sync.WaitGroup
				defer running.Wait()
				defer cancel()
				running.Go(func() {
					cleaner.run(ctx, func(uint8, stale, func(flow) bool) (uint, error) {
						passes.Add(1)
						time.Sleep(20 * time.Millisecond)
						if c.spends {
							spent += 20 * time.Millisecond
						}
						return 0, nil
					})
				})
				only4 := func(s *forwarding.Service) { s.ServiceIPs = s.ServiceIPs[:1] }
				for range 1000 { // 10 s
					cleaner.Changed(nil, with(dns(0, "10.1.0.1:53"), only4))
					time.Sleep(10 * time.Millisecond)
				}
				if n := passes.Load(); n < c.least || n > c.most {
					t.Errorf("%d passes of 20 ms in 10 s", n)
				}
			})
		})
	}
}

// TestFailuresAreNotHurried: while passes fail, changes do not bring the next about any sooner.
func TestFailuresAreNotHurried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		c := New(logr.Discard())
		passes := 0
		go c.run(ctx, func(uint8, stale, func(flow) bool) (uint, error) {
			passes++
			return 0, errors.New("no memory")
		})
		only4 := func(s *forwarding.Service) { s.ServiceIPs = s.ServiceIPs[:1] }
		for range 1000 { // 10 s
			c.Changed(nil, with(dns(0, "10.1.0.1:53"), only4))
			time.Sleep(10 * time.Millisecond)
		}
		synctest.Wait()
		if passes < 5 || passes > 8 { // after 0.1, 0.2, 0.4 ... s
			t.Errorf("%d passes in 10 s, want one after each delay", passes)
		}
	})
}

func TestThreadTime(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	before := threadTime()
	for deadline := time.Now().Add(time.Minute); threadTime() < before+10*time.Millisecond; {
		if time.Now().After(deadline) {
			t.Fatal("a thread that computes spends no time")
		}
	}
}
