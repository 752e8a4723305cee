package nftables

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// TableName is the name of our tables, one of family ip and one of family ip6. Everything in them is ours, nothing else is.
const TableName = "serviceproxy"

// masqueradeMark is bit 14 of the packet mark, as kube-proxy uses it: set where a packet is to be masqueraded, cleared in postrouting.
const masqueradeMark = 1 << 14

// Base chains run right before those of other proxies (-100 and 100): at equal priority the hook registered last would win.
const (
	priorityDestination = -105
	prioritySource      = 95
)

// family is what differs between IPv4 and IPv6.
type family struct {
	proto                    nfnl.Family
	name                     string
	addrLen, addrType        uint32
	saddrOffset, daddrOffset uint32
	source, destination      nfnl.Field
	loopback                 netip.Prefix
	is                       func(netip.Addr) bool
	bit                      forwarding.Families
	// localhost says that the kernel can translate what is for loopback. Of IPv6 it cannot: a packet from ::1 leaves by no other interface.
	localhost bool
}

var families = [...]*family{
	{
		proto: unix.NFPROTO_IPV4, name: "ip", addrLen: 4, addrType: typeIPv4, saddrOffset: 12, daddrOffset: 16,
		source: nfnl.IPv4Source, destination: nfnl.IPv4Destination, loopback: netip.MustParsePrefix("127.0.0.0/8"), is: netip.Addr.Is4, bit: forwarding.IPv4,
		localhost: true,
	},
	{
		proto: unix.NFPROTO_IPV6, name: "ip6", addrLen: 16, addrType: typeIPv6, saddrOffset: 8, daddrOffset: 24,
		source: nfnl.IPv6Source, destination: nfnl.IPv6Destination, loopback: netip.MustParsePrefix("::1/128"), is: netip.Addr.Is6, bit: forwarding.IPv6,
	},
}

// nft's numbers of data types; a concatenation shifts them together by six bits each.
const (
	typeInteger = 4
	typeIPv4    = 7
	typeIPv6    = 8
	typeProto   = 12
	typeService = 13
	typeClassID = 23 // of meta priority
)

func (f *family) words() nfnl.Reg { return nfnl.Reg(f.addrLen / 4) }

// Names of what is always there.
const (
	setServiceIPs = "service-ips"
	setHairpin    = "hairpin"
	mapServices   = "services"
	mapNodePorts  = "nodeports"
	hereSuffix    = "-here"

	chainServices   = "services"
	chainFromHere   = "from-here"
	chainNodePorts  = "nodeports"
	chainOffCluster = "off-cluster"
	chainRefuse     = "refuse"
)

// door is one verdict map: what traffic is looked up by before an endpoint is chosen. The zero value is the door of service
// and external IPs, whose keys are address, protocol and port.
type door struct {
	// class identifies a set of node-port addresses; such a door has keys of protocol and port.
	class uint64
	// here says that it is only for traffic from this node and its pods.
	here bool
}

func (d door) name() string {
	name := mapServices
	if d.class != 0 {
		name = fmt.Sprintf("%s-%016x", mapNodePorts, d.class)
	}
	if d.here {
		name += hereSuffix
	}
	return name
}

func parseDoor(name string) (d door, ok bool) {
	name, d.here = strings.CutSuffix(name, hereSuffix)
	if name == mapServices {
		return d, true
	}
	hex, ok := strings.CutPrefix(name, mapNodePorts+"-")
	if !ok || len(hex) != 16 {
		return d, false
	}
	class, err := strconv.ParseUint(hex, 16, 64)
	d.class = class
	return d, err == nil && class != 0
}

// classOf identifies the node-port addresses of one family. 0: none.
func classOf(f *family, prefixes []netip.Prefix) uint64 {
	h := fnv.New64a()
	some := false
	for _, p := range prefixes {
		if f.is(p.Addr()) {
			some = true
			b, _ := p.MarshalBinary() // never fails
			h.Write(b)
		}
	}
	if !some {
		return 0
	}
	return max(h.Sum64(), 1)
}

// keyTypes gives the data types of a door's key, without a slot.
func (f *family) keyTypes(d door) []uint32 {
	if d.class != 0 {
		return []uint32{typeProto, typeService}
	}
	return []uint32{f.addrType, typeProto, typeService}
}

func (f *family) table() nfnl.Table { return nfnl.Table{Family: f.proto, Name: TableName} }

// newSet describes a set or map with a key of such types.
func (f *family) newSet(name string, types ...uint32) *nfnl.Set {
	s := &nfnl.Set{Table: f.table(), Name: name}
	for _, t := range types {
		s.KeyType = s.KeyType<<6 | t
		s.KeyLen += partLen(t)
	}
	return s
}

func partLen(typ uint32) uint32 {
	if typ == typeIPv6 {
		return 16
	}
	return 4
}

// doorMap describes a door's verdict map.
func (f *family) doorMap(d door) *nfnl.Set {
	s := f.newSet(d.name(), f.keyTypes(d)...)
	s.Verdicts = true
	return s
}

// endpointMap describes a shard of the endpoints behind a door: door key and slot to address and port.
func (f *family) endpointMap(d door, shard int) *nfnl.Set {
	s := f.newSet(shardName(d, shard), append(f.keyTypes(d), typeInteger)...)
	s.Map, s.DataType, s.DataLen = true, f.addrType<<6|typeService, f.addrLen+4
	key := []nfnl.Field{nfnl.L4Proto, nfnl.TCPPort, nfnl.Number}
	if d.class == 0 {
		key = slices.Insert(key, 0, f.destination)
	}
	s.Userdata = nfnl.Typeof(key, []nfnl.Field{f.destination, nfnl.TCPPort})
	return s
}

func shardName(d door, shard int) string { return d.name() + "." + strconv.Itoa(shard) }

func parseShard(name string) (d door, shard int, ok bool) {
	base, number, ok := strings.Cut(name, ".")
	if !ok {
		return d, 0, false
	}
	if d, ok = parseDoor(base); !ok {
		return d, 0, false
	}
	shard, err := strconv.Atoi(number)
	return d, shard, err == nil && shard >= 0
}

// chain is a chain as it should be.
type chain struct {
	name  string
	hook  *nfnl.Hook
	rules []*nfnl.Rule
}

// match appends "the address at offset lies in p" to a rule.
func (f *family) match(r *nfnl.Rule, offset uint32, p netip.Prefix) *nfnl.Rule {
	if p.Bits() == 0 {
		return r
	}
	r.Payload(nfnl.R0, unix.NFT_PAYLOAD_NETWORK_HEADER, offset, f.addrLen)
	f.mask(r, p)
	return r.Equal(nfnl.R0, p.Masked().Addr().AsSlice())
}

// mask clears what p does not compare in the address at R0.
func (f *family) mask(r *nfnl.Rule, p netip.Prefix) { f.maskBits(r, nfnl.R0, p.Bits()) }

// maskBits clears all but so many bits of an address.
func (f *family) maskBits(r *nfnl.Rule, reg nfnl.Reg, bits int) {
	if bits == int(f.addrLen)*8 {
		return
	}
	m := make([]byte, f.addrLen)
	for i := range bits {
		m[i/8] |= 0x80 >> (i % 8)
	}
	r.Bitwise(reg, m, make([]byte, f.addrLen))
}

// loadKey loads a door's key to R0 and gives the register behind it.
func (f *family) loadKey(r *nfnl.Rule, d door) nfnl.Reg {
	next := nfnl.R0
	if d.class == 0 {
		r.Payload(next, unix.NFT_PAYLOAD_NETWORK_HEADER, f.daddrOffset, f.addrLen)
		next += f.words()
	}
	r.Meta(next, unix.NFT_META_L4PROTO)
	r.Payload(next+1, unix.NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2) // the destination port of TCP, UDP and SCTP alike
	return next + 2
}

// enter is the rule that looks a packet up behind a door.
func (f *family) enter(r *nfnl.Rule, d door) *nfnl.Rule {
	f.loadKey(r, d)
	return r.VerdictMap(d.name(), nfnl.R0)
}

func local(r *nfnl.Rule, flag uint32) *nfnl.Rule {
	return r.FibType(nfnl.R0, flag).Equal(nfnl.R0, nfnl.Host32(unix.RTN_LOCAL))
}

func jump(r *nfnl.Rule, to string) *nfnl.Rule {
	return r.Verdict(nfnl.Verdict{Code: nfnl.Jump, Chain: to})
}

func setMark(r *nfnl.Rule) *nfnl.Rule {
	const keep = 1<<32 - 1 - masqueradeMark
	return r.Meta(nfnl.R0, unix.NFT_META_MARK).
		Bitwise(nfnl.R0, nfnl.Host32(keep), nfnl.Host32(masqueradeMark)).SetMeta(unix.NFT_META_MARK, nfnl.R0)
}

// staticSets are the sets and maps that are always there.
func (f *family) staticSets() []*nfnl.Set {
	return []*nfnl.Set{
		f.newSet(setServiceIPs, f.addrType),
		f.newSet(setHairpin, f.addrType, f.addrType, typeProto, typeService),
		f.doorMap(door{}), f.doorMap(door{here: true}),
	}
}

// staticChains are the chains that depend on nothing but the ground.
func (f *family) staticChains(p plot) []chain {
	toServices := jump(nfnl.NewRule(), chainServices)
	base := func(name string, num uint32, priority int32, rules ...*nfnl.Rule) chain {
		return chain{name, &nfnl.Hook{Type: "nat", Num: num, Priority: priority}, rules}
	}
	prerouting := []*nfnl.Rule{toServices}
	if f.localhost {
		// Translated here, what neighbours send to loopback would be routed as if the node itself had sent it.
		prerouting = slices.Insert(prerouting, 0, f.match(nfnl.NewRule(), f.daddrOffset, f.loopback).Verdict(nfnl.Verdict{Code: nfnl.Return}))
	}
	chains := []chain{
		{name: chainRefuse, rules: []*nfnl.Rule{
			nfnl.NewRule().Meta(nfnl.R0, unix.NFT_META_L4PROTO).Equal(nfnl.R0, []byte{unix.IPPROTO_TCP}).Reset(),
			nfnl.NewRule().Unreachable(f.proto),
		}},
		{name: chainFromHere, rules: []*nfnl.Rule{
			f.enter(nfnl.NewRule(), door{here: true}),
			jump(local(nfnl.NewRule(), unix.NFTA_FIB_F_DADDR), chainNodePorts+hereSuffix),
		}},
		{name: chainServices, rules: f.servicesRules(p)},
		base("prerouting", unix.NF_INET_PRE_ROUTING, priorityDestination, prerouting...),
		base("output", unix.NF_INET_LOCAL_OUT, priorityDestination, toServices),
		base("postrouting", unix.NF_INET_POST_ROUTING, prioritySource, f.postroutingRules()...),
	}
	if p.serviceIPs() == masqueradeOffCluster {
		rules := f.fromPods(p, nfnl.Verdict{Code: nfnl.Return})
		chains = append(chains, chain{name: chainOffCluster, rules: append(rules, setMark(nfnl.NewRule()))})
	}
	return append(chains, f.filterChains(p)...)
}

// servicesRules is where every new connection passes, whatever it is for.
func (f *family) servicesRules(p plot) []*nfnl.Rule {
	rules := []*nfnl.Rule{jump(local(nfnl.NewRule(), unix.NFTA_FIB_F_SADDR), chainFromHere)}
	rules = append(rules, f.fromPods(p, nfnl.Verdict{Code: nfnl.Jump, Chain: chainFromHere})...)
	return append(rules,
		f.enter(nfnl.NewRule(), door{}),
		jump(local(nfnl.NewRule(), unix.NFTA_FIB_F_DADDR), chainNodePorts),
		// What is left for an address that is only a service's is for a port that no service has.
		nfnl.NewRule().Payload(nfnl.R0, unix.NFT_PAYLOAD_NETWORK_HEADER, f.daddrOffset, f.addrLen).
			InSet(setServiceIPs, nfnl.R0).Verdict(nfnl.Verdict{Code: nfnl.Goto, Chain: chainRefuse}))
}

func (f *family) postroutingRules() []*nfnl.Rule {
	w := f.words()
	mark := nfnl.Host32(masqueradeMark)
	zero := nfnl.Host32(0)
	return []*nfnl.Rule{
		// What a pinning balancer left there is of no use any more, and no other's to see.
		nfnl.NewRule().Meta(nfnl.R0, unix.NFT_META_PRIORITY).Bitwise(nfnl.R0, nfnl.Host32(numberMark), zero).Equal(nfnl.R0, nfnl.Host32(numberMark)).
			Load(nfnl.R0, zero).SetMeta(unix.NFT_META_PRIORITY, nfnl.R0),
		nfnl.NewRule().Meta(nfnl.R0, unix.NFT_META_MARK).Bitwise(nfnl.R0, mark, zero).Equal(nfnl.R0, mark).
			// The mark goes, so that a tunnel's outer packet, which inherits it, is not masqueraded as well.
			Meta(nfnl.R0, unix.NFT_META_MARK).Bitwise(nfnl.R0, nfnl.Host32(1<<32-1), mark).SetMeta(unix.NFT_META_MARK, nfnl.R0).
			Masquerade(),
		// Only what was translated: an endpoint that calls itself directly must keep its source port.
		nfnl.NewRule().CtStatus(nfnl.R0).Bitwise(nfnl.R0, nfnl.Host32(ctStatusDNAT), zero).NotEqual(nfnl.R0, zero).
			Payload(nfnl.R0, unix.NFT_PAYLOAD_NETWORK_HEADER, f.saddrOffset, f.addrLen).
			Payload(nfnl.R0+w, unix.NFT_PAYLOAD_NETWORK_HEADER, f.daddrOffset, f.addrLen).
			Meta(nfnl.R0+2*w, unix.NFT_META_L4PROTO).
			Payload(nfnl.R0+2*w+1, unix.NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2).
			InSet(setHairpin, nfnl.R0).Masquerade(),
	}
}

const ctStatusDNAT = 1 << 5 // IPS_DST_NAT

// class is a set of node-port addresses.
type class struct {
	id       uint64
	prefixes []netip.Prefix // of one family
}

// nodePortChains are the chains that match node addresses: for traffic from anywhere and from here.
func (f *family) nodePortChains(classes []class) []chain {
	slices.SortFunc(classes, func(a, b class) int { return cmp.Compare(a.id, b.id) })
	var chains []chain
	for _, here := range []bool{false, true} {
		c := chain{name: chainNodePorts}
		if here {
			c.name += hereSuffix
		}
		for _, cl := range classes {
			for _, p := range cl.prefixes {
				if f.loopbackPrefix(p) && !f.localhost {
					continue // a listener of the agent serves it
				}
				r := f.match(nfnl.NewRule(), f.daddrOffset, p)
				if p.Bits() < f.loopback.Bits() && p.Overlaps(f.loopback) {
					r.Payload(nfnl.R0, unix.NFT_PAYLOAD_NETWORK_HEADER, f.daddrOffset, f.addrLen)
					f.mask(r, f.loopback)
					r.NotEqual(nfnl.R0, f.loopback.Addr().AsSlice())
				}
				c.rules = append(c.rules, f.enter(r, door{class: cl.id, here: here}))
			}
		}
		chains = append(chains, c)
	}
	return chains
}

// formatKey prints an element's key as nft does.
func formatKey(s *nfnl.Set, key []byte) string {
	var types []uint32
	for t := s.KeyType; t != 0; t >>= 6 {
		types = append(types, t&(1<<6-1))
	}
	slices.Reverse(types)
	var parts []string
	for _, t := range types {
		n := int(partLen(t))
		if len(key) < n {
			break
		}
		parts = append(parts, formatPart(t, key[:n]))
		key = key[n:]
	}
	return strings.Join(parts, " . ")
}

func formatPart(typ uint32, v []byte) string {
	switch typ {
	case typeIPv4, typeIPv6:
		a, _ := netip.AddrFromSlice(v) // its length is right
		return a.String()
	case typeProto:
		switch v[0] {
		case unix.IPPROTO_TCP:
			return "tcp"
		case unix.IPPROTO_UDP:
			return "udp"
		case unix.IPPROTO_SCTP:
			return "sctp"
		}
		return strconv.Itoa(int(v[0]))
	case typeDirection:
		return [...]string{"original", "reply"}[v[0]&1]
	case typeService:
		return strconv.Itoa(int(binary.BigEndian.Uint16(v)))
	case typeClassID:
		n := binary.NativeEndian.Uint32(v)
		return fmt.Sprintf("%x:%x", n>>16, n&0xffff)
	}
	return strconv.FormatUint(uint64(binary.NativeEndian.Uint32(v)), 10)
}
