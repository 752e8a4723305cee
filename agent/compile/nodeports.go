package compile

import (
	"net/netip"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

var (
	everyAddress = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	loopback     = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
)

// on gives the prefixes in which a node's own addresses serve node ports, sorted. The caller must not change them: the plain
// cases share one list.
func (a NodePortAddresses) on(n *Node) []netip.Prefix {
	if a.Primary && !a.All && !a.Localhost && len(a.CIDRs) == 0 {
		return n.Addresses
	}
	var out []netip.Prefix
	if a.Primary {
		out = append(out, n.Addresses...)
	}
	if a.All {
		out = append(out, everyAddress...)
	}
	if a.Localhost {
		out = append(out, loopback...)
	}
	return sorted(append(out, a.CIDRs...), netip.Prefix.Compare)
}

// inFamilies gives the prefixes of some families; the list itself if that is all of them.
func inFamilies(list []netip.Prefix, families forwarding.Families) []netip.Prefix {
	return filter(list, func(p netip.Prefix) bool { return families&forwarding.FamilyOf(p.Addr()) != 0 })
}
