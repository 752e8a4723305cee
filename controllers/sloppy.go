package controllers

import (
	"net/netip"
	"strings"

	netutils "k8s.io/utils/net"
)

// parseAddrSloppy reads an address the way the API server's validation of Services does, which tolerates leading zeros
// in IPv4 and surrounding space in loadBalancerSourceRanges.
func parseAddrSloppy(s string) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(netutils.ParseIPSloppy(strings.TrimSpace(s)))
	return a.Unmap(), ok
}

// parsePrefixSloppy does the same for a CIDR. Host bits are cut off.
func parsePrefixSloppy(s string) (netip.Prefix, bool) {
	_, ipnet, err := netutils.ParseCIDRSloppy(strings.TrimSpace(s))
	if err != nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(ipnet.IP)
	ones, _ := ipnet.Mask.Size()
	return netip.PrefixFrom(a, ones).Masked(), ok
}
