package backendtest

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// stale are the promises about UDP flows that lead to the wrong place: the kernel goes on translating a flow as it did its first datagram, for as long as
// its client keeps sending from the same port. In all of these rows the clients do.
var stale = []Scenario{
	{"UDP flows leave an endpoint that is removed; those of other endpoints stay", func(l *Lab) {
		l.Program(web(at("a", "b", "r"), nil))
		open := l.openFlows("c node outside", "udp")
		open.at("b", "r").during(func() {
			l.Program(web(at("b", "r"), nil))
			open.at("a").reach("b r")
		})
	}},
	{"UDP flows end when their last endpoint is removed", func(l *Lab) {
		l.Program(web(at("a", "r"), nil))
		open := l.openFlows("c node outside", "udp")
		l.Program(web(nil, nil))
		open.end()
	}},
	{"UDP flows end when their Service is deleted", func(l *Lab) {
		l.Program(web(at("a", "r"), nil))
		open := l.openFlows("c node outside", "udp")
		l.Program()
		open.end()
	}},
	{"UDP flows that begin before there is an endpoint find the first one", func(l *Lab) {
		l.Program(web(nil, nil))
		early := l.silentFlows("c node outside")
		l.Program(web(at("a"), nil))
		early.reach("a")
	}},
	{"UDP flows that begin before there is the Service find it", func(l *Lab) {
		l.Program()
		early := l.silentFlows("c node outside")
		l.Program(web(at("a"), nil))
		early.reach("a")
	}},
	{"UDP flows stay with an endpoint that terminates as long as it serves, and not longer", func(l *Lab) {
		l.Program(web(at("a", "b", "r"), nil))
		open := l.openFlows("c node outside", "udp")
		open.at("a", "b").during(func() {
			l.Program(web([]Endpoint{{Place: "a", NotReady: true, Serving: true, Terminating: true}, {Place: "b"}}, nil))
			open.at("r").reach("b") // by now all that was to end has ended
		})
		onA := open.at("a")
		l.Program(web([]Endpoint{{Place: "a", NotReady: true, Terminating: true}, {Place: "b"}}, nil))
		onA.reach("b")
	}},
	{"UDP flows stay with an endpoint that serves when new traffic prefers others", func(l *Lab) {
		l.Program(web(at("a", "b", "r"), nil))
		open := l.openFlows("c node outside", "udp")
		open.at("a", "r").during(func() {
			l.Program(web([]Endpoint{{Place: "a", Zones: []string{zoneHere}}, {Place: "r", Zones: []string{"zone-b"}}}, nil))
			open.at("b").reach("a")
		})
	}},
	{"UDP flows to the same endpoint of other Services are left alone", func(l *Lab) {
		other := another(0, at("a", "b"))
		l.Program(web(at("a", "b"), nil), other)
		open := l.openFlows("c node outside", "udp")
		others := openFlows{Lab: l}
		for family, ip := range other.Spec.ServiceIPs {
			for range 4 {
				others.add(l.openFlowTo("udp", "c", "another Service's IP", family, netip.AddrPortFrom(netip.MustParseAddr(ip.IP), 80)))
			}
		}
		for family, a := range places["node"].addrs {
			for range 4 {
				others.add(l.openFlowTo("udp", "outside", "another Service's node port", family, netip.AddrPortFrom(a, uint16(other.Spec.Ports[0].NodePort))))
			}
		}
		others.during(func() {
			l.Program(web(at("b"), nil), other)
			open.at("a").reach("b")
			l.Program(other)
			open.end()
		})
	}},
	{"UDP flows that something else than a Service translates are left alone", func(l *Lab) {
		l.Program(web(at("a", "b"), nil))
		// To somebody else's address, at the number of web's node port, and from there to a place that is no endpoint.
		l.sh(l.node, `nft 'table inet lab { chain pre { type nat hook prerouting priority -90; ip daddr 203.0.113.9 udp dport 30080 dnat ip to 10.244.2.3:8080
			ip6 daddr 2001:db8:113::9 udp dport 30080 dnat ip6 to [fd00:244:2::3]:8080; }; }'`)
		foreign := openFlows{Lab: l}
		for family, a := range addrs("203.0.113.9", "2001:db8:113::9") {
			foreign.add(l.openFlowTo("udp", "outside", "address", family, netip.AddrPortFrom(a, 30080)))
		}
		l.sh(l.node, `nft delete table inet lab`) // from now on only connection tracking knows
		open := l.openFlows("c node outside", "udp")
		foreign.during(func() {
			l.Program(web(at("b"), nil))
			open.at("a").reach("b")
			l.Program()
			open.end()
		})
	}},
}

// silentFlows starts UDP conversations to which nobody answers, from each place to each kind of address.
func (l *Lab) silentFlows(from string) openFlows {
	l.Helper()
	open := openFlows{Lab: l}
	for _, to := range frontends {
		for family := range 2 {
			for _, place := range strings.Fields(from) {
				f, err := l.dialFlow("udp", place, to, family, destination(to, family))
				if err != nil {
					l.Fatal(err)
				}
				open.all = append(open.all, f)
			}
		}
	}
	open.end()
	return open
}

// at gives the flows that lead to servers.
func (o openFlows) at(servers ...string) openFlows {
	some := openFlows{Lab: o.Lab}
	for _, f := range o.all {
		if slices.Contains(servers, f.server) {
			some.all = append(some.all, f)
		}
	}
	if len(some.all) == 0 {
		o.Fatalf("the scenario has no flow at %v", servers)
	}
	return some
}

// reach has all flows keep sending until one of the servers (separated by blanks) answers.
func (o openFlows) reach(servers string) {
	o.Helper()
	o.until("reach "+servers, func(f *openFlow) error {
		server, err := f.greeting(silence)
		if err == nil && !slices.Contains(strings.Fields(servers), server) {
			err = fmt.Errorf("%s answers", server)
		}
		if err == nil {
			f.server = server
		}
		return err
	})
}

// end has all flows keep sending until nobody answers.
func (o openFlows) end() {
	o.Helper()
	o.until("end", func(f *openFlow) error {
		// The second time with patience: on a busy machine an answer may be late.
		for _, wait := range []time.Duration{silence, patience / 2} {
			server, err := f.greeting(wait)
			if err == nil {
				return fmt.Errorf("%s answers", server)
			}
			if !isTimeout(err) {
				return nil // refused
			}
		}
		return nil
	})
}

// until tries each flow until try succeeds.
func (o openFlows) until(what string, try func(*openFlow) error) {
	o.Helper()
	var running sync.WaitGroup
	settled := o.settled()
	deadline := time.Now().Add(settled)
	for _, f := range o.all {
		running.Go(func() {
			ticker := time.NewTicker(20 * time.Millisecond)
			defer ticker.Stop()
			for {
				err := try(f)
				if err == nil {
					return
				}
				if time.Now().After(deadline) {
					o.Errorf("%s does not %s within %v: %v", f.name, what, settled, err)
					return
				}
				<-ticker.C
			}
		})
	}
	running.Wait()
}
