package nfnl

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"

	"golang.org/x/sys/unix"
)

// Reg is a 32-bit register. A value longer than four bytes takes the following ones too.
type Reg uint32

// R0 is the first of sixteen 32-bit registers.
const R0 Reg = unix.NFT_REG32_00

// Rule is a list of expressions in the kernel's encoding. Build one with NewRule and the methods, which return the rule itself.
type Rule struct{ exprs []byte }

// NewRule gives an empty rule.
func NewRule() *Rule { return &Rule{} }

// Fingerprint identifies what a rule does. The kernel gives expressions back in another form than it took them, so rules are
// compared by the fingerprint that they carry as their comment.
func (r *Rule) Fingerprint() string {
	h := fnv.New64a()
	h.Write(r.exprs) // a hash.Hash never fails
	return fmt.Sprintf("%016x", h.Sum64())
}

func (r *Rule) expr(name string, attrs func(buf []byte) []byte) *Rule {
	buf, e := openNest(r.exprs, unix.NFTA_LIST_ELEM)
	buf = appendString(buf, unix.NFTA_EXPR_NAME, name)
	buf, d := openNest(buf, unix.NFTA_EXPR_DATA)
	buf = attrs(buf)
	closeNest(buf, d)
	closeNest(buf, e)
	r.exprs = buf
	return r
}

func appendValue(buf []byte, attr uint16, v []byte) []byte {
	buf, n := openNest(buf, attr)
	buf = appendBytes(buf, unix.NFTA_DATA_VALUE, v)
	closeNest(buf, n)
	return buf
}

// Payload loads length bytes of a header: base is unix.NFT_PAYLOAD_NETWORK_HEADER or NFT_PAYLOAD_TRANSPORT_HEADER.
func (r *Rule) Payload(dst Reg, base, offset, length uint32) *Rule {
	return r.expr("payload", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_PAYLOAD_DREG, uint32(dst))
		b = appendU32(b, unix.NFTA_PAYLOAD_BASE, base)
		b = appendU32(b, unix.NFTA_PAYLOAD_OFFSET, offset)
		return appendU32(b, unix.NFTA_PAYLOAD_LEN, length)
	})
}

// Meta loads packet metadata such as unix.NFT_META_L4PROTO.
func (r *Rule) Meta(dst Reg, key uint32) *Rule {
	return r.expr("meta", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_META_DREG, uint32(dst))
		return appendU32(b, unix.NFTA_META_KEY, key)
	})
}

// SetMeta writes packet metadata.
func (r *Rule) SetMeta(key uint32, src Reg) *Rule {
	return r.expr("meta", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_META_KEY, key)
		return appendU32(b, unix.NFTA_META_SREG, uint32(src))
	})
}

// CtStatus loads the connection's status bits.
func (r *Rule) CtStatus(dst Reg) *Rule { return r.ct(dst, unix.NFT_CT_STATUS) }

// CtState loads what the packet is to its connection: one of the bits StateInvalid …
func (r *Rule) CtState(dst Reg) *Rule { return r.ct(dst, unix.NFT_CT_STATE) }

// Bits of CtState.
const (
	StateInvalid uint32 = 1 << 0
	StateNew     uint32 = 1 << 3
)

func (r *Rule) ct(dst Reg, key uint32) *Rule {
	return r.expr("ct", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_CT_DREG, uint32(dst))
		return appendU32(b, unix.NFTA_CT_KEY, key)
	})
}

// FibType loads the type (RTN_LOCAL …) of the route to an address: flag is unix.NFTA_FIB_F_SADDR or NFTA_FIB_F_DADDR.
func (r *Rule) FibType(dst Reg, flag uint32) *Rule {
	return r.expr("fib", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_FIB_DREG, uint32(dst))
		b = appendU32(b, unix.NFTA_FIB_RESULT, unix.NFT_FIB_RESULT_ADDRTYPE)
		return appendU32(b, unix.NFTA_FIB_FLAGS, flag)
	})
}

// Equal goes on if the register holds v.
func (r *Rule) Equal(src Reg, v []byte) *Rule { return r.cmp(src, unix.NFT_CMP_EQ, v) }

// NotEqual goes on if the register does not hold v.
func (r *Rule) NotEqual(src Reg, v []byte) *Rule { return r.cmp(src, unix.NFT_CMP_NEQ, v) }

func (r *Rule) cmp(src Reg, op uint32, v []byte) *Rule {
	return r.expr("cmp", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_CMP_SREG, uint32(src))
		b = appendU32(b, unix.NFTA_CMP_OP, op)
		return appendValue(b, unix.NFTA_CMP_DATA, v)
	})
}

// Bitwise computes (register & mask) ^ xor in place.
func (r *Rule) Bitwise(reg Reg, mask, xor []byte) *Rule {
	return r.expr("bitwise", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_BITWISE_SREG, uint32(reg))
		b = appendU32(b, unix.NFTA_BITWISE_DREG, uint32(reg))
		b = appendU32(b, unix.NFTA_BITWISE_LEN, uint32(len(mask)))
		b = appendValue(b, unix.NFTA_BITWISE_MASK, mask)
		return appendValue(b, unix.NFTA_BITWISE_XOR, xor)
	})
}

// InSet goes on if the key at src is in a set.
func (r *Rule) InSet(set string, src Reg) *Rule {
	return r.expr("lookup", func(b []byte) []byte {
		b = appendString(b, unix.NFTA_LOOKUP_SET, set)
		return appendU32(b, unix.NFTA_LOOKUP_SREG, uint32(src))
	})
}

// Map replaces the key at src by its value in a map, at dst. A miss ends the rule.
func (r *Rule) Map(set string, src, dst Reg) *Rule {
	return r.expr("lookup", func(b []byte) []byte {
		b = appendString(b, unix.NFTA_LOOKUP_SET, set)
		b = appendU32(b, unix.NFTA_LOOKUP_SREG, uint32(src))
		return appendU32(b, unix.NFTA_LOOKUP_DREG, uint32(dst))
	})
}

// VerdictMap does what a verdict map says for the key at src. A miss ends the rule.
func (r *Rule) VerdictMap(set string, src Reg) *Rule { return r.Map(set, src, unix.NFT_REG_VERDICT) }

// Random loads a random number below mod.
func (r *Rule) Random(dst Reg, mod uint32) *Rule {
	return r.expr("numgen", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_NG_DREG, uint32(dst))
		b = appendU32(b, unix.NFTA_NG_MODULUS, mod)
		b = appendU32(b, unix.NFTA_NG_TYPE, unix.NFT_NG_RANDOM)
		return appendU32(b, unix.NFTA_NG_OFFSET, 0)
	})
}

// Constant loads a number where nft has no syntax for one, in a concatenation: it is listed as a random number below one plus an offset.
func (r *Rule) Constant(dst Reg, v uint32) *Rule {
	return r.expr("numgen", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_NG_DREG, uint32(dst))
		b = appendU32(b, unix.NFTA_NG_MODULUS, 1)
		b = appendU32(b, unix.NFTA_NG_TYPE, unix.NFT_NG_RANDOM)
		return appendU32(b, unix.NFTA_NG_OFFSET, v)
	})
}

// Load loads a value.
func (r *Rule) Load(dst Reg, v []byte) *Rule {
	return r.expr("immediate", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_IMMEDIATE_DREG, uint32(dst))
		return appendValue(b, unix.NFTA_IMMEDIATE_DATA, v)
	})
}

// Remember adds the key and data in registers to a dynamic map, for so many milliseconds. An element that is there stays for as long again, with the
// data that it has. A full map ends the rule.
func (r *Rule) Remember(set string, key, data Reg, timeout uint64) *Rule {
	return r.dynset(set, unix.NFT_DYNSET_OP_UPDATE, key, data, timeout)
}

// Forget deletes the element of the key at a register from a dynamic map; the kernel wants a data register nevertheless.
func (r *Rule) Forget(set string, key, data Reg) *Rule {
	const opDelete = 2 // NFT_DYNSET_OP_DELETE
	return r.dynset(set, opDelete, key, data, 0)
}

func (r *Rule) dynset(set string, op uint32, key, data Reg, timeout uint64) *Rule {
	return r.expr("dynset", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_DYNSET_SREG_KEY, uint32(key))
		b = appendU32(b, unix.NFTA_DYNSET_SREG_DATA, uint32(data))
		b = appendU32(b, unix.NFTA_DYNSET_OP, op)
		if timeout != 0 {
			b = appendBytes(b, unix.NFTA_DYNSET_TIMEOUT, binary.BigEndian.AppendUint64(nil, timeout))
		}
		return appendString(b, unix.NFTA_DYNSET_SET_NAME, set)
	})
}

// Hash loads a hash below mod of the length bytes at src.
func (r *Rule) Hash(dst, src Reg, length, mod, seed uint32) *Rule {
	return r.expr("hash", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_HASH_SREG, uint32(src))
		b = appendU32(b, unix.NFTA_HASH_DREG, uint32(dst))
		b = appendU32(b, unix.NFTA_HASH_LEN, length)
		b = appendU32(b, unix.NFTA_HASH_MODULUS, mod)
		return appendU32(b, unix.NFTA_HASH_SEED, seed)
	})
}

// DNAT translates the destination to the address and port in registers.
func (r *Rule) DNAT(family Family, addr, port Reg) *Rule {
	return r.expr("nat", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_NAT_TYPE, unix.NFT_NAT_DNAT)
		b = appendU32(b, unix.NFTA_NAT_FAMILY, uint32(family))
		b = appendU32(b, unix.NFTA_NAT_REG_ADDR_MIN, uint32(addr))
		return appendU32(b, unix.NFTA_NAT_REG_PROTO_MIN, uint32(port))
	})
}

// Masquerade translates the source to the address of the outgoing device and a fully random port.
func (r *Rule) Masquerade() *Rule {
	const fullyRandom = 1 << 4 // NF_NAT_RANGE_PROTO_RANDOM_FULLY
	return r.expr("masq", func(b []byte) []byte { return appendU32(b, unix.NFTA_MASQ_FLAGS, fullyRandom) })
}

// Reset discards the packet and answers with a TCP reset.
func (r *Rule) Reset() *Rule { return r.reject(unix.NFT_REJECT_TCP_RST, 0) }

// Unreachable discards the packet and answers with ICMP port unreachable of the family.
func (r *Rule) Unreachable(family Family) *Rule {
	if family == unix.NFPROTO_IPV6 {
		return r.reject(unix.NFT_REJECT_ICMP_UNREACH, 4) // ICMPV6_PORT_UNREACH
	}
	return r.reject(unix.NFT_REJECT_ICMP_UNREACH, 3) // ICMP_PORT_UNREACH
}

func (r *Rule) reject(typ uint32, code byte) *Rule {
	return r.expr("reject", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_REJECT_TYPE, typ)
		return appendBytes(b, unix.NFTA_REJECT_ICMP_CODE, []byte{code})
	})
}

// Verdict ends the rule with a verdict.
func (r *Rule) Verdict(v Verdict) *Rule {
	return r.expr("immediate", func(b []byte) []byte {
		b = appendU32(b, unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT)
		b, n := openNest(b, unix.NFTA_IMMEDIATE_DATA)
		b = appendVerdict(b, v)
		closeNest(b, n)
		return b
	})
}

// Host32 gives a number as registers hold those that the kernel computes (marks, route types, status bits).
func Host32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
