package nfnl

import "encoding/binary"

// Field is an expression in the annotation from which nft learns how to print the parts of a key.
type Field []byte

// Typeof gives the annotation of a map whose key and value are concatenations of such fields. Without it nft prints a raw
// number with its bytes swapped, and cannot load again what it listed. The numbers are those of nft's userdata format.
func Typeof(key, value []Field) []byte {
	var u []byte
	u = appendTLV(u, 0, word(0)) // key byte order: unspecified, the fields tell
	u = appendTLV(u, 1, word(0)) // data byte order
	u = appendTLV(u, 3, concat(key))
	u = appendTLV(u, 2, word(0)) // elements are not merged
	u = appendTLV(u, 4, concat(value))
	return appendTLV(u, 6, word(0)) // values are not intervals
}

// Numbers of expressions in nft's annotation.
const (
	etypePayload = 7
	etypeMeta    = 9
	etypeConcat  = 13
	etypeNumgen  = 23
)

// Fields for Typeof. TCPPort stands for the port of any protocol: nft 1.0.6 cannot load a map again that it listed with
// `typeof th dport` ("conflicting protocols specified: ip vs. th"), and the type of the two is the same.
var (
	IPv4Source      = payloadField(12, 11)
	IPv6Source      = payloadField(13, 8)
	IPv4Destination = payloadField(12, 12)
	IPv6Destination = payloadField(13, 9)
	TCPPort         = payloadField(8, 2)
	L4Proto         = field(etypeMeta, appendTLV(nil, 0, word(16)))
	Priority        = field(etypeMeta, appendTLV(nil, 0, word(2)))
	Number          = field(etypeNumgen, appendTLV(appendTLV(appendTLV(nil, 0, word(1)), 1, word(2)), 2, word(0)))
)

func payloadField(protocol, field_ uint32) Field {
	return field(etypePayload, appendTLV(appendTLV(nil, 0, word(protocol)), 1, word(field_)))
}

func field(etype uint32, data []byte) Field {
	return appendTLV(appendTLV(nil, 0, word(etype)), 1, data)
}

func concat(fields []Field) []byte {
	if len(fields) == 1 {
		return fields[0]
	}
	var list []byte
	for i, f := range fields {
		list = appendTLV(list, byte(i), f)
	}
	return field(etypeConcat, list)
}

func word(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

func appendTLV(buf []byte, typ byte, v []byte) []byte {
	return append(append(buf, typ, byte(len(v))), v...)
}
