package nftables

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

var _ backend.TrafficCounter = (*Backend)(nil)

// tally is what the counters of a frontend say.
type tally struct {
	original, reply backend.Volume
	connections     uint64
}

func (t *tally) set(c counter, e nfnl.Element) {
	switch c {
	case countsOriginal:
		t.original = backend.Volume{Packets: e.Packets, Bytes: e.Bytes}
	case countsReply:
		t.reply = backend.Volume{Packets: e.Packets, Bytes: e.Bytes}
	case countsConnections:
		t.connections = e.Packets
	}
}

// ledger adds up what the counters of one family say, by service. A counter begins at 0 again when its element is made again, a service's total never falls.
type ledger struct {
	mu       sync.Mutex
	accounts map[frontKey]*account
	totals   map[forwarding.ServiceKey]*backend.Traffic
	// base is what counters said that an earlier process left: they go on from there, and that counts for nothing.
	base map[frontKey]foundTally
	// reading numbers the readings. What an account opened during one finds in it may be of an earlier element of the same key.
	reading uint64
}

// account is where the counters of one frontend go.
type account struct {
	total  *backend.Traffic
	last   tally
	opened uint64
}

func newLedger() *ledger {
	return &ledger{accounts: map[frontKey]*account{}, totals: map[forwarding.ServiceKey]*backend.Traffic{}}
}

// adopt takes note of what was read back.
func (l *ledger) adopt(found map[frontKey]foundTally) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.base = map[frontKey]foundTally{}
	for k, f := range found {
		if l.accounts[k] == nil {
			l.base[k] = f
		}
	}
}

// open makes the counters of a frontend count for a service. Those that are made now begin at 0.
func (l *ledger) open(k frontKey, owner forwarding.ServiceKey, made [counters]bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	total := l.totals[owner]
	if total == nil {
		total = &backend.Traffic{Service: owner}
		l.totals[owner] = total
	}
	a := l.accounts[k]
	if a == nil {
		a = &account{last: l.base[k].tally, opened: l.reading}
		l.accounts[k] = a
	}
	a.total = total
	for c := range counters {
		if made[c] {
			a.last.set(c, nfnl.Element{})
		}
	}
}

// close forgets the counters of a frontend. What they counted until the last reading stays in the service's total.
func (l *ledger) close(k frontKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.accounts, k)
}

// drop forgets a service.
func (l *ledger) drop(k forwarding.ServiceKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.totals, k)
}

// retain forgets all but what a mirror has and a state says, after a rebuild.
func (l *ledger) retain(m *mirror, s forwarding.State) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.base = nil
	for k := range l.accounts {
		if f := m.fronts[k]; f == nil || !f.counted {
			delete(l.accounts, k)
		}
	}
	for k := range l.totals {
		if s.Get(k) == nil || !m.plot.countTraffic {
			delete(l.totals, k)
		}
	}
}

// begin begins a reading and gives the sets that it has to read.
func (l *ledger) begin() map[tallySet]struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reading++
	sets := map[tallySet]struct{}{}
	for k := range l.accounts {
		for c := range counters {
			sets[c.set(k.door.class)] = struct{}{}
		}
	}
	return sets
}

// note books what a counter says.
func (l *ledger) note(k frontKey, c counter, e nfnl.Element) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.accounts[k]
	if a == nil || a.opened >= l.reading {
		return
	}
	now := a.last
	now.set(c, e)
	a.total.Original = a.total.Original.Add(since(a.last.original, now.original))
	a.total.Reply = a.total.Reply.Add(since(a.last.reply, now.reply))
	a.total.Connections += since(backend.Volume{Packets: a.last.connections}, backend.Volume{Packets: now.connections}).Packets
	a.last = now
}

// since gives what a counter counted between two readings. One that says less than before has begun again.
func since(last, now backend.Volume) backend.Volume {
	if now.Packets < last.Packets || now.Bytes < last.Bytes {
		return now
	}
	return backend.Volume{Packets: now.Packets - last.Packets, Bytes: now.Bytes - last.Bytes}
}

// addTo adds the totals to those of another family.
func (l *ledger) addTo(sum map[forwarding.ServiceKey]backend.Traffic) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for k, t := range l.totals {
		if *t == (backend.Traffic{Service: k}) {
			continue
		}
		s := sum[k]
		s.Service = k
		s.Connections += t.Connections
		s.Original, s.Reply = s.Original.Add(t.Original), s.Reply.Add(t.Reply)
		sum[k] = s
	}
}

// counting is what reads counters: a connection of its own, because readers do not wait for the loop.
type counting struct {
	mu      sync.Mutex // held while reading, and to close
	conn    *nfnl.Conn // nil once closed
	ledgers []*ledger  // one per family
}

func newCounting() (*counting, error) {
	conn, err := nfnl.Dial()
	if err != nil {
		return nil, err
	}
	c := &counting{conn: conn}
	for range families {
		c.ledgers = append(c.ledgers, newLedger())
	}
	return c, nil
}

func (c *counting) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.conn.Close()
	c.conn = nil
	return err
}

// adopt gives mirrors that were read back the ledgers that they write to.
func (c *counting) adopt(mirrors []*mirror) {
	for i, m := range mirrors {
		m.tallies.ledger = c.ledgers[i]
		c.ledgers[i].adopt(m.tallies.found)
	}
}

func (c *counting) retain(mirrors []*mirror, s forwarding.State) {
	for i, m := range mirrors {
		c.ledgers[i].retain(m, s)
	}
}

// Traffic implements backend.TrafficCounter.
func (b *Backend) Traffic(ctx context.Context) ([]backend.Traffic, error) {
	c := b.counting
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return nil, errors.New("nftables: the backend is closed")
	}
	sum := map[forwarding.ServiceKey]backend.Traffic{}
	for i, f := range families {
		l := c.ledgers[i]
		for s := range l.begin() {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			err := c.conn.Elements(f.tallySet(s), func(e nfnl.Element) {
				if k, c, ok := f.parseTally(s, e.Key); ok {
					l.note(k, c, e)
				}
			})
			// What a dump leaves out comes with the next one; a set may not be there yet, or no more.
			if err != nil && !errors.Is(err, nfnl.ErrChanged) && !errors.Is(err, unix.ENOENT) {
				return nil, fmt.Errorf("nftables: %w", err)
			}
		}
		l.addTo(sum)
	}
	out := make([]backend.Traffic, 0, len(sum))
	for _, t := range sum {
		out = append(out, t)
	}
	return out, nil
}
