// Package kubeproxy finds out whether kube-proxy's rules are in a node's kernel, and whether it runs. It asks for single objects that kube-proxy always has, so that it costs the
// same however many Services there are, and it never writes.
package kubeproxy

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Mode is a mode of kube-proxy.
type Mode string

// Modes of kube-proxy, and that it is not there or does not run any more. They are named as the API names them.
const (
	Absent   Mode = "Absent"
	Stopped  Mode = "Stopped"
	IPTables Mode = "IPTables"
	IPVS     Mode = "IPVS"
	NFTables Mode = "NFTables"
)

const (
	// table is the name of kube-proxy's nftables tables, one of family ip and one of ip6.
	table = "kube-proxy"
	// canary is a chain that kube-proxy keeps in the mangle table, by which it notices that somebody flushed its rules. Its others are large.
	canary = "KUBE-PROXY-CANARY"
	// device holds the service IPs in mode ipvs.
	device = "kube-ipvs0"
)

// Find says which of kube-proxy's modes has rules in the calling thread's network namespace. Rules that a kube-proxy left when it ended count too; see Answers. A
// kernel that lacks a facility has no rules in it.
func Find() (Mode, error) {
	var errs []error
	for _, look := range []struct {
		mode Mode
		at   func() (bool, error)
	}{
		{NFTables, func() (bool, error) { return either(hasTable(unix.NFPROTO_IPV4))(hasTable(unix.NFPROTO_IPV6)) }},
		{IPVS, hasDevice},
		{IPTables, func() (bool, error) { return either(hasChain(unix.NFPROTO_IPV4))(hasChain(unix.NFPROTO_IPV6)) }},
		{IPTables, func() (bool, error) { return either(hasLegacyChain(legacyIPv4))(hasLegacyChain(legacyIPv6)) }},
	} {
		found, err := look.at()
		if found {
			return look.mode, nil
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return "", fmt.Errorf("look for kube-proxy's rules: %w", err)
	}
	return Absent, nil
}

func either(a bool, errA error) func(bool, error) (bool, error) {
	return func(b bool, errB error) (bool, error) { return a || b, errors.Join(errA, errB) }
}

func hasDevice() (bool, error) {
	_, err := net.InterfaceByName(device)
	return err == nil, nil // the only error that passes for its absence is that netlink fails, which the others report
}

func hasTable(family uint8) (bool, error) {
	return exists(unix.NFT_MSG_GETTABLE, family, attribute(unix.NFTA_TABLE_NAME, table))
}

// hasChain looks for the canary as iptables-nft makes it.
func hasChain(family uint8) (bool, error) {
	return exists(unix.NFT_MSG_GETCHAIN, family, attribute(unix.NFTA_CHAIN_TABLE, "mangle"), attribute(unix.NFTA_CHAIN_NAME, canary))
}

func attribute(kind int, name string) *nl.RtAttr { return nl.NewRtAttr(kind, nl.ZeroTerminated(name)) }

// exists asks nf_tables for one object.
func exists(message int, family uint8, attributes ...*nl.RtAttr) (bool, error) {
	request := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|message, 0)
	request.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	for _, a := range attributes {
		request.AddData(a)
	}
	_, err := request.Execute(unix.NETLINK_NETFILTER, 0)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT):
		return false, nil // without nf_tables in the kernel it is one of the later
	}
	return false, fmt.Errorf("nf_tables: %w", err)
}

// legacy is how legacy iptables of one family is asked.
type legacy struct {
	domain, level int
	tables        string // where the kernel lists the tables that are in use
}

var (
	legacyIPv4 = legacy{unix.AF_INET, unix.SOL_IP, "/proc/thread-self/net/ip_tables_names"}
	legacyIPv6 = legacy{unix.AF_INET6, unix.SOL_IPV6, "/proc/thread-self/net/ip6_tables_names"}
)

// The kernel's struct ipt_getinfo and struct ipt_get_entries, and the socket options that fill them.
const (
	optGetInfo    = 64
	optGetEntries = 65
	tableNameLen  = 32
	infoLen       = tableNameLen + 13*4
	sizeOffset    = tableNameLen + 12*4
	entriesOffset = tableNameLen + 8 // a size, and padding to eight bytes
)

// hasLegacyChain looks for the canary in legacy iptables' mangle table.
func hasLegacyChain(l legacy) (bool, error) {
	// To ask for a table would bring it into being, so only one that is in use is asked for.
	used, err := os.ReadFile(l.tables)
	if err != nil || !strings.Contains("\n"+string(used), "\nmangle\n") {
		return false, nil // without the file the kernel has no legacy iptables
	}
	// Any socket of the family can ask; a raw one, as iptables has, would need CAP_NET_RAW, which the agent's container does not have.
	socket, err := unix.Socket(l.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("legacy iptables: %w", err)
	}
	defer unix.Close(socket)
	for range 3 { // the table may grow in between
		info := make([]byte, infoLen)
		copy(info, "mangle")
		if err := getsockopt(socket, l.level, optGetInfo, info); err != nil {
			return false, fmt.Errorf("legacy iptables: %w", err)
		}
		size := *(*uint32)(unsafe.Pointer(&info[sizeOffset]))
		entries := make([]byte, entriesOffset+size)
		copy(entries, "mangle")
		*(*uint32)(unsafe.Pointer(&entries[tableNameLen])) = size
		if err = getsockopt(socket, l.level, optGetEntries, entries); err == nil {
			// A chain begins with an entry that holds its name.
			return strings.Contains(string(entries[entriesOffset:]), canary+"\x00"), nil
		}
	}
	return false, fmt.Errorf("legacy iptables: %w", err)
}

func getsockopt(socket, level, option int, value []byte) error {
	length := uint32(len(value))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(socket), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
