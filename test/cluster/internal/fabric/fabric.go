// Package fabric is the wiring of an embedded cluster: network namespaces for hosts and pods, joined by a switch that lives in
// a namespace too. The machine's own addresses, routes, firewall and sysctls are never touched.
package fabric

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// uplink is the name of the one interface that a host or a pod has.
const uplink = "eth0"

// Switch is the layer-2 network that joins the hosts, with a router on it that knows no way further.
type Switch struct {
	ns     *netns.NS
	bridge int
}

// NewSwitch makes a switch. The addresses are the router's: the hosts' default gateways. The router knows no other network: what
// is sent to it is answered with "network unreachable" at once.
func NewSwitch(router ...netip.Prefix) (*Switch, error) {
	ns, err := newNamespace(true)
	if err != nil {
		return nil, err
	}
	s := &Switch{ns: ns}
	err = ns.Do(func() error {
		// Snooping would swallow neighbour solicitations for addresses whose group it has not seen a report of yet.
		noSnooping := false
		br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}, MulticastSnooping: &noSnooping}
		if err := netlink.LinkAdd(br); err != nil {
			return err
		}
		s.bridge = br.Index
		return configure("br0", router...)
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make a switch: %w", err), ns.Close())
	}
	return s, nil
}

// Close removes the switch. The hosts stay, unplugged.
func (s *Switch) Close() error { return s.ns.Close() }

// NewHost makes a host: a namespace that forwards packets, plugged into the switch at the port with that name, with these addresses.
func (s *Switch) NewHost(port string, addresses ...netip.Prefix) (*netns.NS, error) {
	host, err := newNamespace(true)
	if err != nil {
		return nil, err
	}
	err = s.ns.Do(func() error {
		veth := &netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: port, MasterIndex: s.bridge, MTU: 1500},
			PeerName:      uplink,
			PeerNamespace: netlink.NsFd(host.Fd()),
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return netlink.LinkSetUp(veth)
	})
	if err == nil {
		err = host.Do(func() error { return configure(uplink, addresses...) })
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("plug in host %s: %w", port, err), host.Close())
	}
	return host, nil
}

// SetCable plugs a host's cable in or pulls it out.
func (s *Switch) SetCable(port string, in bool) error {
	return s.ns.Do(func() error {
		link, err := netlink.LinkByName(port)
		if err != nil {
			return err
		}
		if in {
			return netlink.LinkSetUp(link)
		}
		return netlink.LinkSetDown(link)
	})
}

// AddRoute adds a route to a host.
func AddRoute(host *netns.NS, to netip.Prefix, via netip.Addr) error {
	return host.Do(func() error {
		if err := netlink.RouteAdd(&netlink.Route{Dst: ipNet(to), Gw: via.AsSlice()}); err != nil {
			return fmt.Errorf("route %s via %s: %w", to, via, err)
		}
		return nil
	})
}

// PodLink is the wire between a pod and its node.
type PodLink struct {
	// Interface is the node's end.
	Interface string
	// Addresses are the pod's.
	Addresses []netip.Addr
	// Gateways are the node's addresses on the wire, one for each family of Addresses.
	Gateways []netip.Addr
}

// NewPod makes a pod's namespace and wires it to its node. The wire is routed, not bridged, because two pods on one bridge would
// answer each other directly, past the node's connection tracking that has to translate the answers of a Service.
func NewPod(node *netns.NS, link PodLink) (*netns.NS, error) {
	pod, err := newNamespace(false)
	if err != nil {
		return nil, err
	}
	if err := wire(node, pod, link); err != nil {
		return nil, errors.Join(fmt.Errorf("wire %s: %w", link.Interface, err), pod.Close())
	}
	return pod, nil
}

func wire(node, pod *netns.NS, link PodLink) error {
	err := node.Do(func() error {
		veth := &netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: link.Interface, MTU: 1500},
			PeerName:      uplink,
			PeerNamespace: netlink.NsFd(pod.Fd()),
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return configure(link.Interface, hostPrefixes(link.Gateways)...)
	})
	if err != nil {
		return err
	}
	err = pod.Do(func() error {
		if err := configure(uplink, hostPrefixes(link.Addresses)...); err != nil {
			return err
		}
		dev, err := netlink.LinkByName(uplink)
		if err != nil {
			return err
		}
		index := dev.Attrs().Index
		for _, gw := range link.Gateways {
			everything := netip.PrefixFrom(gw, 0).Masked()
			for _, r := range []netlink.Route{
				{LinkIndex: index, Scope: netlink.SCOPE_LINK, Dst: ipNet(hostPrefix(gw))},
				{LinkIndex: index, Dst: ipNet(everything), Gw: gw.AsSlice()},
			} {
				if err := netlink.RouteAdd(&r); err != nil {
					return fmt.Errorf("route %s: %w", r.Dst, err)
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return node.Do(func() error {
		dev, err := netlink.LinkByName(link.Interface)
		if err != nil {
			return err
		}
		for _, a := range link.Addresses {
			r := netlink.Route{LinkIndex: dev.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: ipNet(hostPrefix(a))}
			if err := netlink.RouteAdd(&r); err != nil {
				return fmt.Errorf("route %s: %w", a, err)
			}
		}
		return nil
	})
}

// Unwire removes a pod's wire from its node, and with it the node's routes to the pod. It is no error if it is gone.
func Unwire(node *netns.NS, iface string) error {
	return node.Do(func() error {
		dev, err := netlink.LinkByName(iface)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return nil
		}
		if err != nil {
			return err
		}
		return netlink.LinkDel(dev)
	})
}

// newNamespace makes a namespace with loopback up and sysctls that do not depend on the machine's: IPv4's are otherwise
// inherited from it (net.core.devconf_inherit_init_net).
func newNamespace(forward bool) (*netns.NS, error) {
	ns, err := netns.New()
	if err != nil {
		return nil, err
	}
	forwarding := "0"
	if forward {
		forwarding = "1"
	}
	err = ns.Do(func() error {
		for _, s := range []struct{ name, value string }{
			{"net.ipv4.conf.all.rp_filter", "0"},
			{"net.ipv4.conf.default.rp_filter", "0"},
			{"net.ipv4.conf.all.route_localnet", "0"},
			{"net.ipv4.conf.default.route_localnet", "0"},
			{"net.ipv4.conf.all.accept_local", "0"},
			{"net.ipv4.ip_forward", forwarding},
			{"net.ipv6.conf.all.disable_ipv6", "0"},
			{"net.ipv6.conf.default.disable_ipv6", "0"},
			{"net.ipv6.conf.all.forwarding", forwarding},
			// Nobody advertises routers, and nobody shares an address: waiting for either would only make the start slow.
			{"net.ipv6.conf.default.accept_ra", "0"},
			{"net.ipv6.conf.default.accept_dad", "0"},
			{"net.ipv6.conf.default.dad_transmits", "0"},
			// No privacy addresses: a pod's connections come from the pod's address.
			{"net.ipv6.conf.default.use_tempaddr", "0"},
		} {
			path := filepath.Join("/proc/sys", strings.ReplaceAll(s.name, ".", "/"))
			if err := os.WriteFile(path, []byte(s.value), 0); err != nil {
				return fmt.Errorf("sysctl %s: %w", s.name, err)
			}
		}
		return configure("lo")
	})
	if err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	return ns, nil
}

// configure sets up an interface of the current namespace.
func configure(iface string, addresses ...netip.Prefix) error {
	link, err := netlink.LinkByName(iface)
	if err != nil {
		return fmt.Errorf("interface %s: %w", iface, err)
	}
	for _, a := range addresses {
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}}
		if a.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("address %s on %s: %w", a, iface, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", iface, err)
	}
	return nil
}

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func hostPrefixes(as []netip.Addr) []netip.Prefix {
	ps := make([]netip.Prefix, len(as))
	for i, a := range as {
		ps[i] = hostPrefix(a)
	}
	return ps
}

func ipNet(p netip.Prefix) *net.IPNet {
	p = p.Masked()
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
