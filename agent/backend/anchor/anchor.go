// Package anchor keeps translated connections open when the rules that translated them go.
//
// The kernel only goes on translating the packets of a connection while some chain of type nat is hooked, and only knows connections at all while some rule
// asks about them. So when the last Service goes, or a node changes from one mode to another, the rules must not just vanish. The anchor is a table that has
// what the kernel asks for and does nothing: empty chains of type nat, and a rule about connections that no packet passes. All backends that translate in the
// kernel share it. See docs/adr/0016-anchor.md.
package anchor

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/conntrack"
)

// TableName is the name of the table, of family inet.
const TableName = "serviceproxy-anchor"

var table = nfnl.Table{Family: unix.NFPROTO_INET, Name: TableName}

// The chains come behind those of proxies (-100 and 100), so that no packet that one of them translates visits them.
const (
	priorityDestination = -90
	prioritySource      = 110
)

// Present says whether the anchor is there.
func Present(conn *nfnl.Conn) (bool, error) {
	there, err := conn.HasTable(table)
	if err != nil {
		return false, fmt.Errorf("anchor: %w", err)
	}
	return there, nil
}

// Ensure makes the anchor be there. A backend calls it before its first rule, and before it takes away its last one.
func Ensure(conn *nfnl.Conn) error {
	if there, err := Present(conn); there || err != nil {
		return err
	}
	var b nfnl.Batch
	b.AddTable(table)
	for _, c := range []struct {
		name     string
		hook     uint32
		priority int32
	}{
		{"prerouting", unix.NF_INET_PRE_ROUTING, priorityDestination},
		{"input", unix.NF_INET_LOCAL_IN, prioritySource},
		{"output", unix.NF_INET_LOCAL_OUT, priorityDestination},
		{"postrouting", unix.NF_INET_POST_ROUTING, prioritySource},
	} {
		b.AddChain(table, c.name, &nfnl.Hook{Type: "nat", Num: c.hook, Priority: c.priority})
	}
	const tracking = "tracking"
	zero := nfnl.Host32(0)
	b.AddChain(table, tracking, nil)
	b.AppendRule(table, tracking, nfnl.NewRule().CtState(nfnl.R0).Bitwise(nfnl.R0, nfnl.Host32(nfnl.StateNew), zero).NotEqual(nfnl.R0, zero).
		Verdict(nfnl.Verdict{Code: nfnl.Return}))
	if err := conn.Commit(&b, 0); err != nil {
		return fmt.Errorf("anchor: %w", err)
	}
	return nil
}

// Release removes the anchor of the calling thread's network namespace unless a connection may need it, and says whether it is gone. Whose connection that
// is cannot be told: one that another proxy translates counts too.
func Release(ctx context.Context) (gone bool, err error) {
	err = with(func(conn *nfnl.Conn) error {
		there, err := Present(conn)
		if err != nil || !there {
			gone = err == nil
			return err
		}
		open, err := translated(ctx)
		if err != nil || open {
			return err
		}
		gone = true
		return remove(conn)
	})
	return gone && err == nil, err
}

// Remove removes the anchor of the calling thread's network namespace. Connections that only it kept open end.
func Remove(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return with(remove)
}

func with(f func(*nfnl.Conn) error) error {
	conn, err := nfnl.Dial()
	if err != nil {
		return fmt.Errorf("anchor: %w", err)
	}
	return errors.Join(f(conn), conn.Close())
}

func remove(conn *nfnl.Conn) error {
	var b nfnl.Batch
	b.DeleteTable(table)
	if err := conn.Commit(&b, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("anchor: %w", err)
	}
	return nil
}

// translated says whether there is any connection whose destination is translated.
func translated(ctx context.Context) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	flows, err := conntrack.Open()
	if err != nil {
		return false, fmt.Errorf("anchor: %w", err)
	}
	open, err := flows.Translated()
	return open, errors.Join(err, flows.Close())
}
