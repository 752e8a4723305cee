package allocator

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// Lock is what one AllocationClaim locks: an address, or a node port for all protocols. Exactly one of the two is set.
type Lock struct {
	Addr netip.Addr
	Port uint16
}

const nodePortPrefix = "nodeport-"

// AddrLock locks an address. IPv4-mapped IPv6 addresses are the IPv4 address.
func AddrLock(a netip.Addr) Lock { return Lock{Addr: a.Unmap().WithZone("")} }

// PortLock locks a node port.
func PortLock(p uint16) Lock { return Lock{Port: p} }

// FamilyOf is the family of an address.
func FamilyOf(a netip.Addr) v1alpha1.IPFamily {
	if a.Is4() {
		return v1alpha1.IPv4
	}
	return v1alpha1.IPv6
}

// IsPort says whether the lock is on a node port.
func (l Lock) IsPort() bool { return !l.Addr.IsValid() }

// Name is the name of the claim that takes the lock: 10.99.13.178, IPv6 in full with dashes for colons
// (fd00-0099-0000-0000-0000-0000-0000-0001), or nodeport-30080. Different locks have different names.
func (l Lock) Name() string {
	if l.IsPort() {
		return nodePortPrefix + strconv.Itoa(int(l.Port))
	}
	if l.Addr.Is4() {
		return l.Addr.String()
	}
	return strings.ReplaceAll(l.Addr.StringExpanded(), ":", "-")
}

// String is what a person calls the lock: the address in canonical form, or "node port 30080".
func (l Lock) String() string {
	if l.IsPort() {
		return "node port " + strconv.Itoa(int(l.Port))
	}
	return l.Addr.String()
}

// ParseName is the inverse of Lock.Name. Names that Name never gives are errors.
func ParseName(name string) (Lock, error) {
	l, ok := parseName(name)
	if !ok || l.Name() != name {
		return Lock{}, fmt.Errorf("claim name %q: want an IPv4 address, an IPv6 address in full with dashes for colons, or %sPORT", name, nodePortPrefix)
	}
	return l, nil
}

func parseName(name string) (Lock, bool) {
	if port, ok := strings.CutPrefix(name, nodePortPrefix); ok {
		p, err := strconv.ParseUint(port, 10, 16)
		return PortLock(uint16(p)), err == nil && p > 0
	}
	// A dash never appears in an IPv4 address, so the replacement turns nothing else into an address.
	a, err := netip.ParseAddr(strings.ReplaceAll(name, "-", ":"))
	return AddrLock(a), err == nil && a.Zone() == ""
}
