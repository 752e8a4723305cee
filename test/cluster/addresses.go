package cluster

import (
	"fmt"
	"net/netip"
)

// maxNodes is bounded by the addresses below the outside host's.
const maxNodes = 80

var (
	// serviceCIDRs are the API server's. 10.99.0.0/16, the demo's range, lies outside of them on purpose.
	serviceCIDRs = []string{"10.96.0.0/16", "fd00:10:96::/112"}
	// clusterCIDRs hold all pods.
	clusterCIDRs = []string{"10.244.0.0/16", "fd00:10:244::/48"}
)

const (
	nodeNetwork4, nodeNetwork6 = "172.30.0.%d", "fd00:172:30::%x"
	nodeBits4, nodeBits6       = 24, 64
	// Numbers of hosts in the node network.
	routerNumber, firstNodeNumber, outsideNumber = 1, 11, 100
)

// nodeAddresses are those of the node with this number, counted from 1.
func nodeAddresses(n int) []netip.Addr { return hostAddresses(firstNodeNumber + n - 1) }

// podCIDRs are the pod ranges of the node with this number.
func podCIDRs(n int) []netip.Prefix {
	return []netip.Prefix{
		netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", n)),
		netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%x::/64", n)),
	}
}

func routers() []netip.Prefix { return onNodeNetwork(hostAddresses(routerNumber)) }

func outsideAddresses() []netip.Prefix { return onNodeNetwork(hostAddresses(outsideNumber)) }

func hostAddresses(host int) []netip.Addr {
	h6 := host
	if host >= firstNodeNumber { // …::11 for 172.30.0.11, as long as it reads so
		h6 = host - 10 + 0x10
	}
	return []netip.Addr{
		netip.MustParseAddr(fmt.Sprintf(nodeNetwork4, host)),
		netip.MustParseAddr(fmt.Sprintf(nodeNetwork6, h6)),
	}
}

func onNodeNetwork(as []netip.Addr) []netip.Prefix {
	ps := make([]netip.Prefix, len(as))
	for i, a := range as {
		bits := nodeBits4
		if a.Is6() {
			bits = nodeBits6
		}
		ps[i] = netip.PrefixFrom(a, bits)
	}
	return ps
}
