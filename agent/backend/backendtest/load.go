package backendtest

import (
	"bufio"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// load is new connections all the time, each of which must be served: places take turns in connecting to one address.
type load struct {
	lab     *Lab
	network string
	from    []string
	family  int
	to      netip.AddrPort
	ticks   <-chan time.Time // nil: each worker connects again as soon as it was served

	stop    chan struct{}
	running sync.WaitGroup

	mu       sync.Mutex
	next     int
	since    time.Time // connections that began before do not count
	served   map[pair]int
	total    int
	failed   int
	firstErr error
}

// pair is a client and the server that served it.
type pair struct{ client, server string }

// loadWorkers is how many connections of a load are under way at a time.
const loadWorkers = 4

// startLoad starts a load of connections from places to a kind of address; rate is how many a second, 0 as many as are served.
func (l *Lab) startLoad(network string, from []string, to string, family, rate int) *load {
	l.Helper()
	ld := &load{lab: l, network: network, from: from, family: family, to: destination(to, family), stop: make(chan struct{}), served: map[pair]int{}}
	var ticker *time.Ticker
	if rate > 0 {
		ticker = time.NewTicker(time.Second / time.Duration(rate))
		ld.ticks = ticker.C
	}
	for range loadWorkers {
		ld.running.Go(ld.work)
	}
	l.Cleanup(func() {
		ld.end()
		if ticker != nil {
			ticker.Stop()
		}
	})
	return ld
}

func (ld *load) work() {
	for {
		select {
		case <-ld.stop:
			return
		default:
		}
		if ld.ticks != nil {
			select {
			case <-ld.stop:
				return
			case <-ld.ticks:
			}
		}
		ld.mu.Lock()
		client := ld.from[ld.next%len(ld.from)]
		ld.next++
		ld.mu.Unlock()
		began := time.Now()
		got, err := ask(ld.lab.space(client), ld.network, find(client).addrs[ld.family], ld.to, patience)
		ld.record(client, began, got, err)
	}
}

func (ld *load) record(client string, began time.Time, got answer, err error) {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	if err != nil {
		if ld.failed++; ld.firstErr == nil {
			ld.firstErr = fmt.Errorf("%s from %s to %s: %w", ld.network, client, ld.to, err)
		}
		return
	}
	if began.After(ld.since) {
		ld.served[pair{client, got.server}]++
		ld.total++
	}
}

// restart forgets what was counted: from now on only connections that begin from now on count.
func (ld *load) restart() {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	ld.since, ld.served, ld.total = time.Now(), map[pair]int{}, 0
}

// await waits until n connections are counted.
func (ld *load) await(n int) {
	ld.lab.Helper()
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for deadline := time.Now().Add(time.Minute); ; <-ticker.C {
		ld.mu.Lock()
		total, failed := ld.total, ld.failed
		ld.mu.Unlock()
		switch {
		case total >= n || failed > 0:
			return
		case time.Now().After(deadline):
			ld.lab.Fatalf("%d of %d connections in a minute", total, n)
		}
	}
}

// awaitMore waits until n more connections are counted.
func (ld *load) awaitMore(n int) {
	ld.lab.Helper()
	ld.mu.Lock()
	n += ld.total
	ld.mu.Unlock()
	ld.await(n)
}

// counts gives how many of the counted connections each server served, and each pair.
func (ld *load) counts() (servers map[string]int, pairs map[pair]int) {
	ld.mu.Lock()
	defer ld.mu.Unlock()
	servers, pairs = map[string]int{}, map[pair]int{}
	for p, n := range ld.served {
		servers[p.server] += n
		pairs[p] = n
	}
	return servers, pairs
}

func (ld *load) end() {
	select {
	case <-ld.stop:
	default:
		close(ld.stop)
	}
	ld.running.Wait()
}

// finish ends the load and reports connections that failed.
func (ld *load) finish() {
	ld.lab.Helper()
	ld.end()
	if ld.failed > 0 {
		ld.lab.Errorf("%d connections failed, the first: %v", ld.failed, ld.firstErr)
	}
}

// resent gives how often the TCP clients in a namespace had to send a SYN again: how many first packets were lost, in either direction, that no client
// noticed.
func (l *Lab) resent(ns *netns.NS) int {
	l.Helper()
	n := -1
	err := ns.Do(func() error {
		file, err := os.Open("/proc/thread-self/net/netstat")
		if err != nil {
			return err
		}
		defer file.Close()
		var names []string // a line of names, then one of values
		for lines := bufio.NewScanner(file); lines.Scan(); {
			words := strings.Fields(lines.Text())
			for i, name := range names {
				if name == "TCPSynRetrans" && i < len(words) {
					n, err = strconv.Atoi(words[i])
				}
			}
			names = words
		}
		return err
	})
	if err != nil || n < 0 {
		l.Fatalf("count SYNs that were sent again: %d, %v", n, err)
	}
	return n
}
