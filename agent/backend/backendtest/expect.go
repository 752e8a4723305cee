package backendtest

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// Destinations of web's addresses.
const (
	toServiceIP      = "service IP"
	toUnusedPort     = "unused port of the service IP"
	toExternalIP     = "external IP"
	toLoadBalancerIP = "load-balancer IP"
	toNodePort       = "node port"
	toSecondNodePort = "node port of another address"
	toLocalhostPort  = "node port of localhost"
	toNewNodePort    = "node port of an address that came later"
	toUnallocated    = "unallocated address of a declared range"
	toUndeclared     = "address outside all declared ranges"
	toOwnAddress     = "port 80 of the node's own address"
	toSecureIP       = "second port of the service IP"
	toSecurePort     = "second node port"
	toOtherIP        = "other Service's load-balancer IP"
)

// destinations are the addresses and ports behind the names, of IPv4 and IPv6.
var destinations = map[string][2]netip.AddrPort{
	toServiceIP:      withPort(addrs("10.99.0.1", "fd00:99::1"), 80),
	toUnusedPort:     withPort(addrs("10.99.0.1", "fd00:99::1"), 81),
	toExternalIP:     withPort(addrs("198.51.100.7", "2001:db8:7::7"), 80),
	toLoadBalancerIP: withPort(addrs("198.51.100.8", "2001:db8:7::8"), 80),
	toNodePort:       withPort(places["node"].addrs, 30080),
	toSecondNodePort: withPort(secondAddrs, 30080),
	toLocalhostPort:  withPort(loopback, 30080),
	toNewNodePort:    withPort(newAddrs, 30080),
	toUnallocated:    withPort(addrs("10.99.0.99", "fd00:99::99"), 80),
	toUndeclared:     withPort(addrs("10.98.0.99", "fd00:98::99"), 80),
	toOwnAddress:     withPort(places["node"].addrs, 80),
	toSecureIP:       withPort(addrs("10.99.0.1", "fd00:99::1"), 443),
	toSecurePort:     withPort(places["node"].addrs, 30443),
	toOtherIP:        withPort(addrs("198.51.100.9", "2001:db8:7::9"), 80),
}

var loopback = addrs("127.0.0.1", "::1")

func withPort(a [2]netip.Addr, port uint16) [2]netip.AddrPort {
	return [2]netip.AddrPort{netip.AddrPortFrom(a[0], port), netip.AddrPortFrom(a[1], port)}
}

// destination gives the address and port behind a name.
func destination(name string, family int) netip.AddrPort {
	to, ok := destinations[name]
	if !ok {
		panic("no such destination: " + name)
	}
	return to[family]
}

// Expectations besides lists of endpoints.
const (
	refused = "refused" // at once
	silent  = "silent"  // no answer
	// passed connections are none of ours: they reach whatever else is there, which must be the listener of Lab.listen.
	passed = "passed"
	// unasked says that nothing is expected.
	unasked = "unasked"
)

// Expect checks what becomes of connections from places (separated by blanks) to a destination, in both families and with every protocol.
//
// want is refused, silent, passed, or the names of the places that serve, each of which must: "a b r". A place that sees the client's own address is written
// "a=", one that sees an address of the node "a*"; without a mark State.Lookup alone decides. Where the families differ, it is "IPv4's | IPv6's".
func (l *Lab) Expect(from, to, want string) {
	l.Helper()
	l.expectAll(slices.Sorted(maps.Keys(networks)), from, to, want)
}

// ExpectOf is Expect with one protocol only.
func (l *Lab) ExpectOf(protocol forwarding.Protocol, from, to, want string) {
	l.Helper()
	l.expectAll([]forwarding.Protocol{protocol}, from, to, want)
}

// expectAll asks everywhere at a time: what is silent takes a while.
func (l *Lab) expectAll(protocols []forwarding.Protocol, from, to, want string) {
	l.Helper()
	state := l.world.State()
	wants := [2]string{want, want}
	if v4, v6, differ := strings.Cut(want, " | "); differ {
		wants = [2]string{v4, v6}
	}
	var asking failures
	for _, name := range strings.Fields(from) {
		for family := range 2 {
			for _, protocol := range protocols {
				if protocol == forwarding.SCTP && destination(to, family) == destination(toLocalhostPort, 1) && want != passed || wants[family] == unasked {
					continue // the one thing that is not served: the kernel cannot, and there may be no sockets to do it with
				}
				asking.Go(func() error {
					if err := l.expect(state, name, to, family, protocol, wants[family]); err != nil {
						return fmt.Errorf("%s from %s to the %s %s: %w", protocol, name, to, destination(to, family), err)
					}
					return nil
				})
			}
		}
	}
	asking.report(l)
}

// failures are of what is done at a time.
type failures struct {
	doing sync.WaitGroup
	mu    sync.Mutex
	all   []string
}

func (f *failures) Go(do func() error) {
	f.doing.Go(func() {
		if err := do(); err != nil {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.all = append(f.all, err.Error())
		}
	})
}

// report waits until all is done.
func (f *failures) report(l *Lab) {
	l.Helper()
	f.doing.Wait()
	slices.Sort(f.all)
	for _, text := range f.all {
		l.Error(text)
	}
}

func (l *Lab) expect(state forwarding.State, from, to string, family int, protocol forwarding.Protocol, want string) error {
	source := places[from].addrs[family]
	if to == toLocalhostPort && from == "node" {
		source = loopback[family]
	}
	p := forwarding.Packet{Protocol: protocol, Source: source, Destination: destination(to, family), In: places[from].in}
	verdict := state.Lookup(l.lookupNode(), p)
	if err := judge(verdict, family, want); err != nil {
		return fmt.Errorf("by State.Lookup: %w", err)
	}
	probe := func() (answer, error) {
		wait := patience
		if want == silent {
			wait = silence
		}
		return ask(l.spaces[from], networks[protocol], source, p.Destination, wait)
	}
	switch want {
	case refused, silent:
		_, err := probe()
		return met(want, from, err)
	case passed:
		got, err := probe()
		if err == nil && got.server != listener {
			err = fmt.Errorf("%s answered, want the %s", got.server, listener)
		}
		return err
	}
	return l.served(verdict, source, probe)
}

// met says whether what was tried from a place ended as wanted.
func met(want, from string, err error) error {
	// What an output hook rejects or drops never leaves the socket, whose owner is told so.
	unsent := from == "node" && errors.Is(err, syscall.EPERM)
	switch {
	case want == passed && err == nil:
		return nil
	case want == refused && (errors.Is(err, syscall.ECONNREFUSED) || unsent), want == silent && (isTimeout(err) || unsent):
		return nil
	case err == nil:
		return fmt.Errorf("got an answer, want %s", want)
	}
	return fmt.Errorf("got %w, want %s", err, want)
}

// tries is how many connections are made until every endpoint has served one: with four endpoints one is missed in fewer than one of 10^7 runs.
const tries = 60

// served makes connections until every endpoint of the verdict has served one, and checks that no other does and what each sees.
func (l *Lab) served(v forwarding.Verdict, source netip.Addr, probe func() (answer, error)) error {
	missing := slices.Clone(v.Endpoints)
	for range tries {
		got, err := probe()
		if err != nil {
			return err
		}
		at := endpointOf(got.server, familyOf(source))
		i := slices.IndexFunc(v.Endpoints, func(e forwarding.Endpoint) bool { return e.AddrPort == at })
		if i < 0 {
			return fmt.Errorf("%s answered, want one of %s", got.server, names(v, familyOf(source)))
		}
		// The node's own connections may be given another of its addresses, whoever masquerades.
		own := slices.Contains(l.lookupNode().Addrs, source)
		masqueraded := got.seen.Addr() != source
		if !own && masqueraded != v.Masquerades(v.Endpoints[i]) {
			return fmt.Errorf("%s saw %s, masqueraded should be %v", got.server, got.seen, !masqueraded)
		}
		if masqueraded && !slices.Contains(l.lookupNode().Addrs, got.seen.Addr()) {
			return fmt.Errorf("%s saw %s, which is no address of the node", got.server, got.seen)
		}
		missing = slices.DeleteFunc(missing, func(e forwarding.Endpoint) bool { return e.AddrPort == at })
		if len(missing) == 0 {
			return nil
		}
	}
	return fmt.Errorf("%v served none of %d connections", missing, tries)
}

// judge compares a verdict with what a scenario says.
func judge(v forwarding.Verdict, family int, want string) error {
	switch {
	case want == refused && v.Fate == forwarding.Rejected, want == silent && v.Fate == forwarding.Dropped, want == passed && v.Fate == forwarding.Passed:
		return nil
	case v.Fate != forwarding.Forwarded:
		return fmt.Errorf("says %s, want %s", v.Fate, want)
	}
	wants := strings.Fields(want)
	slices.Sort(wants)
	got := strings.Fields(names(v, family))
	if !slices.EqualFunc(wants, got, func(w, g string) bool { return w == g || w == strings.TrimRight(g, "=*") }) {
		return fmt.Errorf("says %v, want %v", got, wants)
	}
	return nil
}

// endpointOf gives the address at which a server of that name serves: "a", or "a:9090" if it is not the usual port.
func endpointOf(server string, family int) netip.AddrPort {
	name, port, other := strings.Cut(server, ":")
	at := netip.AddrPortFrom(places[name].addrs[family], serverPort)
	if n, err := strconv.ParseUint(port, 10, 16); other && err == nil {
		at = netip.AddrPortFrom(at.Addr(), uint16(n))
	}
	return at
}

// names are the servers of a verdict's endpoints, sorted, with marks.
func names(v forwarding.Verdict, family int) string {
	var out []string
	for name, p := range places {
		for _, e := range v.Endpoints {
			if e.AddrPort.Addr() == p.addrs[family] {
				if port := e.AddrPort.Port(); port != serverPort {
					name = fmt.Sprintf("%s:%d", name, port)
				}
				mark := "="
				if v.Masquerades(e) {
					mark = "*"
				}
				out = append(out, name+mark)
			}
		}
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}
