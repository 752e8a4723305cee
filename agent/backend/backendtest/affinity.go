package backendtest

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// hour is a timeout of session affinity that no scenario outlives.
const hour = 3600

// affinity are the promises of session affinity ClientIP.
var affinity = []Scenario{
	{"session affinity pins a client, whichever address of the Service it uses", func(l *Lab) {
		l.Program(web(at(replicasOf("b", 8)...), clientIP(hour)))
		pins := l.pin("c q node outside outside1 outside2", serviceAddresses)
		pins.stay(2)
	}},
	{"session affinity pins clients to many endpoints, not to one", func(l *Lab) {
		// Its name sets it apart from the Service at whose endpoints the clients are since other scenarios.
		l.Program(web(at(replicasOf("b", 8)...), clientIP(hour)).named("web-crowded"))
		for family := range 2 {
			for _, network := range []string{"tcp", "udp"} {
				servers := map[string]int{}
				for _, client := range crowd {
					servers[l.who(network, client, toServiceIP, family)]++
				}
				if len(servers) < 3 { // in fewer than one of 10^10 runs
					l.Errorf("%s: all clients are at %v", network, servers)
				}
			}
		}
	}},
	{"ports of one Service pin a client apart from one another", func(l *Lab) {
		l.Program(web(at(replicasOf("b", 8)...), func(s *spec) {
			clientIP(hour)(s)
			s.Ports = append(s.Ports, otherPort(81, 30081))
		}))
		apart := 0
		for _, client := range crowd {
			if l.who("tcp", client, toServiceIP, 0) != l.whoAt("tcp", client, 0, netip.AddrPortFrom(destination(toServiceIP, 0).Addr(), 81)) {
				apart++
			}
		}
		if apart == 0 {
			l.Error("each of the clients is at one endpoint by both ports")
		}
	}},
	{"session affinity lasts for its timeout after the last connection", func(l *Lab) { l.affinityExpires() }},
	{"session affinity survives unrelated changes and a restart of the proxy", func(l *Lab) {
		s := web(at(replicasOf("b", 8)...), clientIP(hour))
		l.Program(s)
		pins := l.pin("c node outside outside1", serviceAddresses)
		l.Program(s, another(0, at("a")))
		pins.stay(1)
		l.Program(s)
		pins.stay(1)
		l.Restart()
		pins.stay(1)
		l.Program(web(at(replicasOf("b", 17)...), clientIP(hour)))
		pins.stay(1)
		l.Program(web(at(replicasOf("b", 8)...), func(s *spec) {
			clientIP(2 * hour)(s)
			s.LoadBalancerSourceRanges = []string{"0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"}
		}))
		pins.stay(1)
	}},
	{"a client pinned to an endpoint that is removed moves, and stays where it moved", func(l *Lab) {
		l.Program(web(at(replicasOf("b", 4)...), clientIP(hour)))
		pins := l.pin("c node outside "+strings.Join(crowd, " "), []string{toServiceIP})
		gone := pins.servers()[0]
		rest := slices.DeleteFunc(replicasOf("b", 4), func(s string) bool { return s == gone })
		l.Program(web(at(rest...), clientIP(hour)))
		pins.leave(gone)
		pins.stay(2)
		// Who has moved does not move back, and who had not stays as well.
		l.Program(web(at(replicasOf("b", 4)...), clientIP(hour)))
		pins.stay(1)
	}},
	{"session affinity pins clients to endpoints on the node's own network too", func(l *Lab) {
		l.Program(web(at("node", "a", "b1", "b2"), clientIP(hour)))
		pins := l.pin("c outside "+strings.Join(crowd, " "), []string{toServiceIP, toExternalIP})
		if !slices.Contains(pins.servers(), "node") {
			l.Errorf("nobody is at the node's own endpoint: %v", pins.servers())
		}
		pins.stay(2)
		l.Restart()
		pins.stay(1)
	}},
	{"session affinity keeps to what traffic policies allow", func(l *Lab) {
		edit := func(s *spec) { clientIP(hour)(s); externalLocal(s) }
		l.Program(web(at("r", "b1", "b2", "b3", "b4"), edit))
		// By the service IP clients are pinned to r too, which they may not use from outside by other addresses.
		l.pin(strings.Join(crowd, " "), []string{toServiceIP})
		pins := l.pin("c outside "+strings.Join(crowd, " "), []string{toExternalIP, toNodePort})
		for p, server := range pins.at {
			if p.client != "c" && server == "r" {
				l.Errorf("%v is at r, which is not on this node", p)
			}
		}
		pins.stay(2)
	}},
	{"sessions begin and end with session affinity of their Service", func(l *Lab) {
		l.Program(web(at(replicasOf("b", 8)...), clientIP(hour)))
		l.pin("c outside", serviceAddresses)
		l.Program(web(at(replicasOf("b", 8)...), nil))
		for _, client := range []string{"c", "outside"} {
			servers := map[string]int{}
			for range 40 { // all at one endpoint in fewer than one of 10^35 runs
				servers[l.who("tcp", client, toServiceIP, 0)]++
			}
			if len(servers) == 1 {
				l.Errorf("%s is still pinned: %v", client, servers)
			}
		}
		l.Program(web(at(replicasOf("b", 8)...), clientIP(hour)))
		pins := l.pin("c outside", serviceAddresses)
		pins.stay(1)
	}},
}

// serviceAddresses are all kinds of addresses of web.
var serviceAddresses = frontends

// who gives who serves a new connection.
func (l *Lab) who(network, client, to string, family int) string {
	l.Helper()
	return l.whoAt(network, client, family, destination(to, family))
}

func (l *Lab) whoAt(network, client string, family int, at netip.AddrPort) string {
	l.Helper()
	got, err := ask(l.space(client), network, find(client).addrs[family], at, patience)
	if err != nil {
		l.Fatalf("%s from %s to %s: %v", network, client, at, err)
	}
	return got.server
}

// session is a client of one port of the Service.
type session struct {
	client, network string
	family          int
}

func (s session) String() string {
	return fmt.Sprintf("%s (%s, IPv%d)", s.client, s.network, 4+2*s.family)
}

// pins are where sessions are.
type pins struct {
	*Lab
	to []string // the kinds of addresses by which they connect
	at map[session]string
}

// pin has clients (separated by blanks) connect once, over TCP and UDP, in both families.
func (l *Lab) pin(clients string, to []string) pins {
	l.Helper()
	p := pins{l, to, map[session]string{}}
	for _, client := range strings.Fields(clients) {
		for family := range 2 {
			for _, network := range []string{"tcp", "udp"} {
				p.at[session{client, network, family}] = ""
			}
		}
	}
	p.each(func(s session, _ string) string { return l.who(s.network, s.client, to[0], s.family) })
	return p
}

// each calls f for all sessions at a time, with where they are, and notes where they are then.
func (p pins) each(f func(s session, at string) string) {
	p.Helper()
	var (
		running sync.WaitGroup
		mu      sync.Mutex
	)
	next := map[session]string{}
	for s, at := range p.at {
		running.Go(func() {
			at := f(s, at)
			mu.Lock()
			defer mu.Unlock()
			next[s] = at
		})
	}
	running.Wait()
	for s, at := range next {
		p.at[s] = at
	}
}

// stay checks that each session is where it was, by all its addresses, so many times.
func (p pins) stay(times int) {
	p.Helper()
	p.each(func(s session, at string) string {
		for range times {
			for _, to := range p.to {
				if got := p.who(s.network, s.client, to, s.family); got != at {
					p.Errorf("%v is at %s by its %s, was at %s", s, got, to, at)
					return at
				}
			}
		}
		return at
	})
}

// leave checks that sessions which were at a server are elsewhere now, and no others.
func (p pins) leave(server string) {
	p.Helper()
	p.each(func(s session, at string) string {
		got := p.who(s.network, s.client, p.to[0], s.family)
		if got == server || at != server && got != at {
			p.Errorf("%v is at %s, was at %s", s, got, at)
		}
		return got
	})
}

// servers are those that have sessions, sorted.
func (p pins) servers() (out []string) {
	for _, server := range p.at {
		out = append(out, server)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// affinityExpires checks that connections prolong a session, and that it ends after a pause.
func (l *Lab) affinityExpires() {
	l.Helper()
	const timeout = 2 * time.Second
	l.Program(web(at(replicasOf("b", 8)...), clientIP(int32(timeout/time.Second))))
	idle := l.pin(strings.Join(crowd, " "), []string{toServiceIP})
	began := time.Now()
	busy := l.pin("c q node outside", serviceAddresses)
	last := time.Now()
	ticker := time.NewTicker(timeout / 8)
	defer ticker.Stop()
	for time.Since(began) < timeout+timeout/2 {
		<-ticker.C
		if time.Since(last) < timeout*3/4 { // else this machine was too busy to tell
			busy.stay(1)
		} else {
			busy = l.pin("c q node outside", serviceAddresses)
			began = time.Now()
		}
		last = time.Now()
	}
	// Those that made no connection meanwhile are free. One may come to the same endpoint again, all of them in none of 10^70 runs.
	moved := 0
	for s, at := range idle.at {
		if l.who(s.network, s.client, toServiceIP, s.family) != at {
			moved++
		}
	}
	if moved == 0 {
		l.Errorf("%v after their last connection clients are still pinned", time.Since(began))
	}
}
