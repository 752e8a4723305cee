// Package loopback lets the kernel route loopback addresses, so that node ports can be translated at 127.0.0.1, and keeps the node's neighbours from them.
//
// Where the kernel routes loopback addresses (route_localnet), everybody at one of the node's links reaches what listens at 127.0.0.1 only (CVE-2020-8558). The
// parameter stays when the last Service goes that needs it, because others may rely on it by then. So what keeps neighbours out must last as long, whatever
// Services and modes there are: it is a table of its own, there before the parameter is set, and it goes with it.
package loopback

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/sysctl"
)

// TableName is the name of the table, of family ip: what is for ::1 no kernel takes from a neighbour.
const TableName = "serviceproxy-loopback"

var table = nfnl.Table{Family: unix.NFPROTO_IPV4, Name: TableName}

const (
	chainInput = "input"
	// chainRaised is empty. That it is there says that the parameter was 0 before.
	chainRaised = "raised"
	// priority is behind the filter chains of others (0), which may want to see what comes.
	priority = 10
)

// Parameter is the kernel's parameter that lets it route what comes from or goes to 127.0.0.0/8.
var Parameter = sysctl.Parameter{Name: "net/ipv4/conf/all/route_localnet", AtLeast: 1}

// Route lets the kernel of the calling thread's network namespace route loopback addresses, and says whether it did not before. proc has its parameters.
func Route(proc sysctl.Proc) (raised bool, err error) {
	now, err := proc.Get(Parameter.Name)
	if err != nil {
		return false, fmt.Errorf("loopback: %w", err)
	}
	conn, err := nfnl.Dial()
	if err != nil {
		return false, fmt.Errorf("loopback: %w", err)
	}
	var b nfnl.Batch
	b.AddTable(table)
	if now < Parameter.AtLeast {
		b.AddChain(table, chainRaised, nil)
	}
	b.AddChain(table, chainInput, &nfnl.Hook{Type: "filter", Num: unix.NF_INET_LOCAL_IN, Priority: priority})
	b.FlushChain(table, chainInput) // there may be the rule of another version
	b.AppendRule(table, chainInput, guard())
	if err := errors.Join(conn.Commit(&b, 0), conn.Close()); err != nil {
		return false, fmt.Errorf("loopback: keep neighbours out: %w", err)
	}
	return proc.Raise(Parameter)
}

// guard drops what others than the node itself send to loopback, but for what comes back of translated connections.
func guard() *nfnl.Rule {
	const destination, isTranslated = 16, 1 << 5 // where an IPv4 header has it; IPS_DST_NAT
	lo := make([]byte, unix.IFNAMSIZ)
	copy(lo, "lo")
	return nfnl.NewRule().
		Payload(nfnl.R0, unix.NFT_PAYLOAD_NETWORK_HEADER, destination, 4).Bitwise(nfnl.R0, []byte{255, 0, 0, 0}, make([]byte, 4)).Equal(nfnl.R0, []byte{127, 0, 0, 0}).
		Meta(nfnl.R0, unix.NFT_META_IIFNAME).NotEqual(nfnl.R0, lo).
		CtStatus(nfnl.R0).Bitwise(nfnl.R0, nfnl.Host32(isTranslated), nfnl.Host32(0)).Equal(nfnl.R0, nfnl.Host32(0)).
		Verdict(nfnl.Verdict{Code: nfnl.Drop})
}

// Unroute takes back what Route did, if it did anything, and says whether the kernel routes loopback addresses no more. It leaves a parameter that was set before.
func Unroute(proc sysctl.Proc) (lowered bool, err error) {
	conn, err := nfnl.Dial()
	if err != nil {
		return false, fmt.Errorf("loopback: %w", err)
	}
	lowered, err = unroute(conn, proc)
	if err = errors.Join(err, conn.Close()); err != nil {
		return lowered, fmt.Errorf("loopback: %w", err)
	}
	return lowered, nil
}

func unroute(conn *nfnl.Conn, proc sysctl.Proc) (lowered bool, err error) {
	chains, there, err := conn.Chains(table)
	if !there || err != nil && !errors.Is(err, nfnl.ErrChanged) {
		return false, err
	}
	if chains[chainRaised] != nil {
		// If that is not possible, the table stays.
		if err := proc.Restore(Parameter.Name, 0); err != nil {
			return false, err
		}
		lowered = true
	}
	var b nfnl.Batch
	b.DeleteTable(table)
	if err := conn.Commit(&b, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return lowered, err
	}
	return lowered, nil
}
