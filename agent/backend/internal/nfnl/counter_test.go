package nfnl

import (
	"testing"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// TestCounted: a set whose elements count is recognised as such, and its elements come with what they counted.
func TestCounted(t *testing.T) {
	ns := netns.NewT(t)
	c := dialT(t, ns)
	counted := &Set{Table: table, Name: "counted", KeyType: 7, KeyLen: 4, Counted: true}
	plain := &Set{Table: table, Name: "plain", KeyType: 7, KeyLen: 4}
	commit(t, c, func(b *Batch) {
		b.AddTable(table)
		b.AddSet(counted)
		b.AddSet(plain)
		b.AddElement(counted, []byte{10, 0, 0, 1}, nil)
		b.AddElement(plain, []byte{10, 0, 0, 1}, nil)
	})
	if _, err := ns.Run("nft", "add element ip test counted { 10.0.0.2 counter packets 3 bytes 4294967296 }"); err != nil {
		t.Fatal(err)
	}
	sets, err := c.Sets(table)
	if err != nil || !sets["counted"].SameShape(counted) || !sets["plain"].SameShape(plain) || sets["counted"].SameShape(plain) {
		t.Errorf("sets %+v, %v", sets, err)
	}
	got := map[byte][2]uint64{}
	if err := c.Elements(counted, func(e Element) { got[e.Key[3]] = [2]uint64{e.Packets, e.Bytes} }); err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[1] != [2]uint64{} || got[2] != [2]uint64{3, 1 << 32} {
		t.Errorf("counted %v", got)
	}
}
