package nfnl

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Sets whose elements count (Set.Counted) hold a counter for each element: every packet for which a rule finds the element in the set is counted. A counter
// begins at 0 with its element.

// setExpr is NFTA_SET_EXPR, an expression that each element of a set gets.
const setExpr = 17

// appendCounted appends the attribute that makes the elements of a set count.
func appendCounted(buf []byte) []byte {
	buf, e := openNest(buf, setExpr)
	buf = appendString(buf, unix.NFTA_EXPR_NAME, "counter")
	buf, d := openNest(buf, unix.NFTA_EXPR_DATA)
	closeNest(buf, d)
	closeNest(buf, e)
	return buf
}

// parseCounter reads the counter of an element; zeros if the expression is another.
func parseCounter(p []byte) (packets, bytes uint64) {
	for attr, v := range attributes(p) {
		if attr != unix.NFTA_EXPR_DATA {
			continue
		}
		for a, n := range attributes(v) {
			switch {
			case len(n) < 8:
			case a == unix.NFTA_COUNTER_PACKETS:
				packets = binary.BigEndian.Uint64(n)
			case a == unix.NFTA_COUNTER_BYTES:
				bytes = binary.BigEndian.Uint64(n)
			}
		}
	}
	return packets, bytes
}

// CtDirection loads which way a packet of a connection goes: 0 as its first packet, 1 as the answers to it.
func (r *Rule) CtDirection(dst Reg) *Rule { return r.ct(dst, unix.NFT_CT_DIRECTION) }

// CtDestination loads the address that the first packet of a connection was sent to, before translation.
func (r *Rule) CtDestination(dst Reg, family Family) *Rule {
	if family == unix.NFPROTO_IPV6 {
		return r.ctOriginal(dst, unix.NFT_CT_DST_IP6)
	}
	return r.ctOriginal(dst, unix.NFT_CT_DST_IP)
}

// CtDestinationPort loads the port that the first packet of a connection was sent to, before translation. nft 1.0.6 only takes it in a concatenation behind
// a comparison of the protocol.
func (r *Rule) CtDestinationPort(dst Reg) *Rule { return r.ctOriginal(dst, unix.NFT_CT_PROTO_DST) }

func (r *Rule) ctOriginal(dst Reg, key uint32) *Rule {
	return r.expr("ct", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_CT_DREG, uint32(dst))
		b = appendU32(b, unix.NFTA_CT_KEY, key)
		return appendBytes(b, unix.NFTA_CT_DIRECTION, []byte{0})
	})
}
