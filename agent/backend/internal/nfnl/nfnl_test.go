package nfnl

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

var table = Table{Family: unix.NFPROTO_IPV4, Name: "test"}

func dialT(t *testing.T, ns *netns.NS) *Conn {
	t.Helper()
	var c *Conn
	if err := ns.Do(func() (err error) { c, err = Dial(); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return c
}

func commit(t *testing.T, c *Conn, fill func(b *Batch)) {
	t.Helper()
	var b Batch
	fill(&b)
	if err := c.Commit(&b, 0); err != nil {
		t.Fatal(err)
	}
}

func numbers() *Set {
	return &Set{Table: table, Name: "numbers", KeyType: 4, KeyLen: 4, Map: true, DataType: 4, DataLen: 4}
}

// TestElements sends far more than one netlink attribute can hold, and reads all of it back.
func TestElements(t *testing.T) {
	c := dialT(t, netns.NewT(t))
	s := numbers()
	const n = 20000
	commit(t, c, func(b *Batch) {
		b.AddTable(table)
		b.AddSet(s)
		for i := range uint32(n) {
			b.AddElement(s, Host32(i), Host32(i+1))
		}
	})
	var sum uint64
	var count int
	var err error
	// The kernel's hash table may still be growing.
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		sum, count = 0, 0
		err = c.Elements(s, func(e Element) {
			k, v := binary.NativeEndian.Uint32(e.Key), binary.NativeEndian.Uint32(e.Data)
			if v != k+1 {
				t.Errorf("element %d is %d", k, v)
			}
			sum += uint64(k)
			count++
		})
		if !errors.Is(err, ErrChanged) {
			break
		}
	}
	if err != nil || count != n || sum != n*(n-1)/2 {
		t.Fatalf("%d elements with sum %d, %v", count, sum, err)
	}
	sets, err := c.Sets(table)
	if err != nil || len(sets) != 1 || !sets["numbers"].SameShape(s) {
		t.Fatalf("sets %v, %v", sets, err)
	}
	commit(t, c, func(b *Batch) {
		for i := range uint32(n) {
			b.DeleteElement(s, Host32(i))
		}
	})
	if err := c.Elements(s, func(e Element) { t.Errorf("left: %x", e.Key) }); err != nil {
		t.Fatal(err)
	}
}

// TestFailure: an error says what failed, nothing of the transaction stays, and the connection goes on.
func TestFailure(t *testing.T) {
	jumpTo := func(chain string) *Rule { return NewRule().Verdict(Verdict{Code: Jump, Chain: chain}) }
	for _, c := range []struct {
		name  string
		fill  func(b *Batch)
		errno unix.Errno
		text  string
	}{
		{"missing set", func(b *Batch) { b.AddTable(table); b.AddElement(numbers(), Host32(1), Host32(1)) }, unix.ENOENT, "add elements to test numbers"},
		{"missing chain", func(b *Batch) {
			b.AddTable(table)
			b.AddChain(table, "a", nil)
			b.AppendRule(table, "a", jumpTo("nowhere"))
		}, unix.ENOENT, "add rule to chain test a"},
		{"first of several", func(b *Batch) {
			b.AddTable(table)
			b.DeleteChain(table, "x")
			b.DeleteChain(table, "y")
			b.AddChain(table, "z", nil)
		}, unix.ENOENT, "delete chain test x"},
		// The kernel only finds this one when it commits, and says so about the batch as a whole.
		{"loop", func(b *Batch) {
			b.AddTable(table)
			b.AddChain(table, "base", &Hook{"nat", unix.NF_INET_PRE_ROUTING, -100})
			b.AddChain(table, "a", nil)
			b.AddChain(table, "b", nil)
			b.AppendRule(table, "a", jumpTo("b"))
			b.AppendRule(table, "b", jumpTo("a"))
			b.AppendRule(table, "base", jumpTo("a"))
		}, unix.ELOOP, "nf_tables"},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn := dialT(t, netns.NewT(t))
			var b Batch
			c.fill(&b)
			err := conn.Commit(&b, 0)
			if (!errors.Is(err, c.errno) && !errors.Is(err, unix.EMLINK)) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v, want %v about %q", err, c.errno, c.text)
			}
			if _, exists, err := conn.Chains(table); err != nil || exists {
				t.Errorf("the table is there: %v, %v", exists, err)
			}
			commit(t, conn, func(b *Batch) { b.AddTable(table) })
		})
	}
}

func TestGeneration(t *testing.T) {
	c := dialT(t, netns.NewT(t))
	g, err := c.Generation()
	if err != nil {
		t.Fatal(err)
	}
	var b Batch
	b.AddTable(table)
	if err := c.Commit(&b, g); err != nil {
		t.Fatalf("with the right generation: %v", err)
	}
	b.Reset()
	b.DeleteTable(table)
	if err := c.Commit(&b, g); !errors.Is(err, ErrChanged) {
		t.Fatalf("with an old generation: %v", err)
	}
	if err := c.Commit(&b, NextGeneration(g)); err != nil {
		t.Fatalf("with the next generation: %v", err)
	}
}

func TestLostAnswer(t *testing.T) {
	c := dialT(t, netns.NewT(t))
	if err := c.answer(1, 2); !errors.Is(err, ErrUnknown) {
		t.Errorf("%v, want ErrUnknown", err)
	}
}

func TestTry(t *testing.T) {
	c := dialT(t, netns.NewT(t))
	var b Batch
	b.AddTable(table)
	b.AddChain(table, "a", nil)
	if err := c.Try(&b); err != nil {
		t.Fatal(err)
	}
	if _, exists, err := c.Chains(table); err != nil || exists {
		t.Errorf("the table is there: %v, %v", exists, err)
	}
	b.DeleteChain(table, "b")
	if err := c.Try(&b); !errors.Is(err, unix.ENOENT) {
		t.Errorf("%v, want ENOENT", err)
	}
}

// TestChains: rules come back with the fingerprints that they were written with, in order; others' rules without.
func TestChains(t *testing.T) {
	ns := netns.NewT(t)
	c := dialT(t, ns)
	drop, accept := NewRule().Verdict(Verdict{Code: Drop}), NewRule().Verdict(Verdict{Code: Accept})
	hook := &Hook{"nat", unix.NF_INET_LOCAL_OUT, -105}
	commit(t, c, func(b *Batch) {
		b.AddTable(table)
		b.AddChain(table, "base", hook)
		b.AddChain(table, "empty", nil)
		b.AppendRule(table, "base", accept)
		b.AppendRule(table, "base", drop)
		other := Table{Family: unix.NFPROTO_IPV6, Name: table.Name}
		b.AddTable(other)
		b.AddChain(other, "other", nil)
	})
	if _, err := ns.Run("nft", "add rule ip test base accept"); err != nil {
		t.Fatal(err)
	}
	chains, exists, err := c.Chains(table)
	if err != nil || !exists || len(chains) != 2 {
		t.Fatalf("%v, %v, %v", chains, exists, err)
	}
	base := chains["base"]
	if base.Hook == nil || *base.Hook != *hook || chains["empty"].Hook != nil {
		t.Errorf("hooks: %+v, %+v", base.Hook, chains["empty"].Hook)
	}
	if got, want := strings.Join(base.Rules, ","), accept.Fingerprint()+","+drop.Fingerprint()+","; got != want || accept.Fingerprint() == drop.Fingerprint() {
		t.Errorf("rules %s, want %s", got, want)
	}
}

// TestWatch: changes by others are reported; our own, those of other tables and those during a pause are not.
func TestWatch(t *testing.T) {
	ns := netns.NewT(t)
	own, other := dialT(t, ns), dialT(t, ns)
	changed := make(chan struct{}, 100)
	var w *Watch
	if err := ns.Do(func() (err error) {
		w, err = NewWatch(own, func() { changed <- struct{}{} }, "another", table.Name)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	add := func(b *Batch) { b.AddTable(table) }
	remove := func(b *Batch) { b.DeleteTable(table) }
	wait := func(what string) {
		t.Helper()
		select {
		case <-changed:
		case <-time.After(2 * time.Second):
			t.Fatalf("%s was not reported", what)
		}
	}
	commit(t, own, add)
	commit(t, other, func(b *Batch) { b.AddTable(Table{Family: table.Family, Name: "unrelated"}) })
	if err := w.Pause(); err != nil {
		t.Fatal(err)
	}
	commit(t, other, remove)
	if err := w.Resume(); err != nil {
		t.Fatal(err)
	}
	commit(t, other, add)
	wait("the table that another socket made")
	// Reports come in order, so all of the above would have come before this one.
	commit(t, other, remove)
	wait("the table that another socket deleted")
	select {
	case <-changed:
		t.Error("something else was reported")
	default:
	}
}

// FuzzMessages: lengths in what is parsed are never trusted.
func FuzzMessages(f *testing.F) {
	var b Batch
	b.AddTable(table)
	b.AddChain(table, "base", &Hook{"nat", 0, 1})
	b.AddVerdict(&Set{Table: table, Name: "v", Verdicts: true}, []byte{1, 2, 3, 4}, Verdict{Goto, "base"})
	framed, _ := b.frame(nil, 1, 7, true)
	f.Add(framed)
	f.Add([]byte{20, 0, 0, 0, 2, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4})
	f.Fuzz(func(t *testing.T, p []byte) {
		w := &Watch{tables: []string{"test"}}
		w.concerns(p)
		describe(p, 2)
		for m := range messages(p) {
			_ = m.extAck()
			parseChain(m.body)
			parseRule(m.body)
			parseSet(2, m.body)
			parseElement(m.body)
		}
	})
}
