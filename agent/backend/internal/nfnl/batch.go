// Package nfnl speaks nf_tables over netlink: it encodes transactions, sends them, reads tables back and watches for changes.
//
// It knows the kernel's messages and nothing about services. Encoding appends to one buffer, so that a transaction costs neither
// an allocation per object nor a process; see docs/adr/0008-own-netlink-encoder.md.
package nfnl

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Family is the protocol family of a table: unix.NFPROTO_IPV4 or unix.NFPROTO_IPV6.
type Family uint8

// Table names one table.
type Table struct {
	Family Family
	Name   string
}

// Hook makes a base chain.
type Hook struct {
	Type     string // "nat", "filter"
	Num      uint32 // unix.NF_INET_PRE_ROUTING …
	Priority int32
}

// Set describes a set, or with Map or Verdicts a map. Key and data lengths are bytes, every part of a concatenation padded to four.
type Set struct {
	Table
	Name string
	// KeyType and DataType are nft's numbers of data types: the kernel keeps them for those who list the table.
	KeyType, KeyLen   uint32
	DataType, DataLen uint32
	Map, Verdicts     bool
	// Dynamic lets rules add elements that expire (see Rule.Remember), at most Size of them.
	Dynamic bool
	Size    uint32
	// Interval makes it a set of ranges of keys: see AddBound.
	Interval bool
	// Counted makes each element count the packets that rules find it for.
	Counted bool
	// Userdata is nft's own annotation (see Typeof); it decides how a listing prints keys.
	Userdata []byte
}

// SameShape says whether the kernel could hold the elements of both: everything but names and annotations is equal.
func (s *Set) SameShape(o *Set) bool {
	return s.KeyType == o.KeyType && s.KeyLen == o.KeyLen && s.Map == o.Map && s.Verdicts == o.Verdicts && s.Dynamic == o.Dynamic && s.Interval == o.Interval && s.Counted == o.Counted &&
		(s.Verdicts || (s.DataType == o.DataType && s.DataLen == o.DataLen))
}

// Verdict is the value of an element in a verdict map.
type Verdict struct {
	Code  int32
	Chain string // with Jump and Goto
}

// Verdict codes, as in linux/netfilter.h and nf_tables.h.
const (
	Drop   int32 = 0
	Accept int32 = 1
	Jump   int32 = -3
	Goto   int32 = -4
	Return int32 = -5
)

// Flags of a set that this package uses, and the data type that makes a map hold verdicts.
const (
	setFlagInterval = 0x4
	setFlagMap      = 0x8
	setFlagTimeout  = 0x10
	setFlagEval     = 0x20
	dataTypeVerdict = 0xffffff00
)

// elemFlagEnd marks an element that is the end of an interval (NFT_SET_ELEM_INTERVAL_END).
const elemFlagEnd = 0x1

// maxNest bounds a list of elements: the length of a netlink attribute is 16 bits.
const maxNest = 60000

// Batch encodes one transaction. The zero value is ready; Reset keeps the buffer for the next.
type Batch struct {
	buf  []byte
	msgs int

	setID uint32
	// The element list that is still open, so that further elements of the same set join it.
	open               *Set
	openType           uint16
	openMsg, openItems int
	// Start of the newest complete message: the one that is asked to be acknowledged.
	last int
}

// Reset empties the batch and keeps its buffer.
func (b *Batch) Reset() { *b = Batch{buf: b.buf[:0], setID: b.setID} }

// keepBuffer bounds the buffers that are kept between transactions: one big load must not hold its memory for good.
const keepBuffer = 256 << 10

// Shrink empties the batch and lets go of a big buffer.
func (b *Batch) Shrink() {
	b.Reset()
	if cap(b.buf) > keepBuffer {
		b.buf = nil
	}
}

// Size gives the bytes encoded so far.
func (b *Batch) Size() int { return len(b.buf) }

// Empty says whether nothing was encoded.
func (b *Batch) Empty() bool { return len(b.buf) == 0 }

// Append adds all of another batch behind this one.
func (b *Batch) Append(o *Batch) {
	if o.Empty() {
		return
	}
	b.closeElements()
	o.closeElements()
	b.last = len(b.buf) + o.last
	b.msgs += o.msgs
	b.buf = append(b.buf, o.buf...)
}

const (
	createFlag = unix.NLM_F_CREATE
	appendFlag = unix.NLM_F_CREATE | unix.NLM_F_APPEND
)

func (b *Batch) begin(typ, flags uint16, family Family) int {
	b.closeElements()
	start := len(b.buf)
	b.buf = appendHeader(b.buf, unix.NFNL_SUBSYS_NFTABLES<<8|typ, flags, uint8(family), 0)
	b.msgs++
	return start
}

func (b *Batch) end(start int) {
	binary.NativeEndian.PutUint32(b.buf[start:], uint32(len(b.buf)-start))
	b.last = start
}

// appendHeader appends the netlink and nfnetlink headers with length, sequence and port left 0.
func appendHeader(buf []byte, typ, flags uint16, family uint8, resource uint16) []byte {
	buf = append(buf, 0, 0, 0, 0)
	buf = binary.NativeEndian.AppendUint16(buf, typ)
	buf = binary.NativeEndian.AppendUint16(buf, flags|unix.NLM_F_REQUEST)
	buf = append(buf, 0, 0, 0, 0, 0, 0, 0, 0)
	return append(buf, family, unix.NFNETLINK_V0, byte(resource>>8), byte(resource))
}

// AddTable creates a table unless it is there.
func (b *Batch) AddTable(t Table) {
	m := b.begin(unix.NFT_MSG_NEWTABLE, createFlag, t.Family)
	b.buf = appendString(b.buf, unix.NFTA_TABLE_NAME, t.Name)
	b.buf = appendU32(b.buf, unix.NFTA_TABLE_FLAGS, 0)
	b.end(m)
}

// DeleteTable deletes a table with all it holds.
func (b *Batch) DeleteTable(t Table) {
	m := b.begin(unix.NFT_MSG_DELTABLE, 0, t.Family)
	b.buf = appendString(b.buf, unix.NFTA_TABLE_NAME, t.Name)
	b.end(m)
}

// AddChain creates a chain unless it is there; hook nil makes a regular one.
func (b *Batch) AddChain(t Table, name string, hook *Hook) {
	m := b.begin(unix.NFT_MSG_NEWCHAIN, createFlag, t.Family)
	b.buf = appendString(b.buf, unix.NFTA_CHAIN_TABLE, t.Name)
	b.buf = appendString(b.buf, unix.NFTA_CHAIN_NAME, name)
	if hook != nil {
		n := b.nest(unix.NFTA_CHAIN_HOOK)
		b.buf = appendU32(b.buf, unix.NFTA_HOOK_HOOKNUM, hook.Num)
		b.buf = appendU32(b.buf, unix.NFTA_HOOK_PRIORITY, uint32(hook.Priority))
		b.closeNest(n)
		b.buf = appendU32(b.buf, unix.NFTA_CHAIN_POLICY, uint32(Accept))
		b.buf = appendString(b.buf, unix.NFTA_CHAIN_TYPE, hook.Type)
	}
	b.end(m)
}

// DeleteChain deletes a chain that nothing refers to, with its rules.
func (b *Batch) DeleteChain(t Table, name string) {
	m := b.begin(unix.NFT_MSG_DELCHAIN, 0, t.Family)
	b.buf = appendString(b.buf, unix.NFTA_CHAIN_TABLE, t.Name)
	b.buf = appendString(b.buf, unix.NFTA_CHAIN_NAME, name)
	b.end(m)
}

// FlushChain deletes a chain's rules.
func (b *Batch) FlushChain(t Table, name string) {
	m := b.begin(unix.NFT_MSG_DELRULE, 0, t.Family)
	b.buf = appendString(b.buf, unix.NFTA_RULE_TABLE, t.Name)
	b.buf = appendString(b.buf, unix.NFTA_RULE_CHAIN, name)
	b.end(m)
}

// AppendRule appends a rule to a chain. The rule carries its Fingerprint as a comment, by which Rules recognises it.
func (b *Batch) AppendRule(t Table, chain string, r *Rule) {
	m := b.begin(unix.NFT_MSG_NEWRULE, appendFlag, t.Family)
	b.buf = appendString(b.buf, unix.NFTA_RULE_TABLE, t.Name)
	b.buf = appendString(b.buf, unix.NFTA_RULE_CHAIN, chain)
	n := b.nest(unix.NFTA_RULE_EXPRESSIONS)
	b.buf = append(b.buf, r.exprs...)
	b.closeNest(n)
	comment := append([]byte(r.Fingerprint()), 0)
	b.buf = appendBytes(b.buf, unix.NFTA_RULE_USERDATA, append([]byte{ruleComment, byte(len(comment))}, comment...))
	b.end(m)
}

// ruleComment is nft's type number (NFTNL_UDATA_RULE_COMMENT) for a comment in a rule's user data.
const ruleComment = 0

// AddSet creates a set or map unless it is there.
func (b *Batch) AddSet(s *Set) {
	m := b.begin(unix.NFT_MSG_NEWSET, createFlag, s.Family)
	b.buf = appendString(b.buf, unix.NFTA_SET_TABLE, s.Table.Name)
	b.buf = appendString(b.buf, unix.NFTA_SET_NAME, s.Name)
	var flags uint32
	if s.Map || s.Verdicts {
		flags |= setFlagMap
	}
	if s.Dynamic {
		flags |= setFlagTimeout | setFlagEval
	}
	if s.Interval {
		flags |= setFlagInterval
	}
	b.buf = appendU32(b.buf, unix.NFTA_SET_FLAGS, flags)
	b.buf = appendU32(b.buf, unix.NFTA_SET_KEY_TYPE, s.KeyType)
	b.buf = appendU32(b.buf, unix.NFTA_SET_KEY_LEN, s.KeyLen)
	switch {
	case s.Verdicts:
		b.buf = appendU32(b.buf, unix.NFTA_SET_DATA_TYPE, dataTypeVerdict)
	case s.Map:
		b.buf = appendU32(b.buf, unix.NFTA_SET_DATA_TYPE, s.DataType)
		b.buf = appendU32(b.buf, unix.NFTA_SET_DATA_LEN, s.DataLen)
	}
	if s.Dynamic {
		n := b.nest(unix.NFTA_SET_DESC)
		b.buf = appendU32(b.buf, unix.NFTA_SET_DESC_SIZE, s.Size)
		b.closeNest(n)
	}
	if s.Counted {
		b.buf = appendCounted(b.buf)
	}
	b.setID++ // the kernel wants one, though everything here refers to sets by name
	b.buf = appendU32(b.buf, unix.NFTA_SET_ID, b.setID)
	if len(s.Userdata) > 0 {
		b.buf = appendBytes(b.buf, unix.NFTA_SET_USERDATA, s.Userdata)
	}
	b.end(m)
}

// DeleteSet deletes a set that no rule refers to, with its elements.
func (b *Batch) DeleteSet(s *Set) {
	m := b.begin(unix.NFT_MSG_DELSET, 0, s.Family)
	b.buf = appendString(b.buf, unix.NFTA_SET_TABLE, s.Table.Name)
	b.buf = appendString(b.buf, unix.NFTA_SET_NAME, s.Name)
	b.end(m)
}

// elementList opens the element list of a set, or goes on with the open one.
func (b *Batch) elementList(typ, flags uint16, s *Set) {
	if b.open == s && b.openType == typ && len(b.buf)-b.openItems < maxNest {
		return
	}
	m := b.begin(typ, flags, s.Family)
	b.buf = appendString(b.buf, unix.NFTA_SET_ELEM_LIST_TABLE, s.Table.Name)
	b.buf = appendString(b.buf, unix.NFTA_SET_ELEM_LIST_SET, s.Name)
	b.openItems = b.nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	b.open, b.openType, b.openMsg = s, typ, m
}

func (b *Batch) closeElements() {
	if b.open == nil {
		return
	}
	b.closeNest(b.openItems)
	b.end(b.openMsg)
	b.open = nil
}

// AddElement adds an element; data is nil for a plain set. An element that is there already with other data fails the transaction.
func (b *Batch) AddElement(s *Set, key, data []byte) {
	b.elementList(unix.NFT_MSG_NEWSETELEM, createFlag, s)
	e := b.nest(unix.NFTA_LIST_ELEM)
	b.value(unix.NFTA_SET_ELEM_KEY, key)
	if data != nil {
		b.value(unix.NFTA_SET_ELEM_DATA, data)
	}
	b.closeNest(e)
}

// AddVerdict adds an element to a verdict map.
func (b *Batch) AddVerdict(s *Set, key []byte, v Verdict) {
	b.elementList(unix.NFT_MSG_NEWSETELEM, createFlag, s)
	e := b.nest(unix.NFTA_LIST_ELEM)
	b.value(unix.NFTA_SET_ELEM_KEY, key)
	d := b.nest(unix.NFTA_SET_ELEM_DATA)
	b.buf = appendVerdict(b.buf, v)
	b.closeNest(d)
	b.closeNest(e)
}

// AddBound adds a bound of an interval to an interval set: its first key, or with end the first key behind it. An interval that reaches to the last key of all
// has no end, and comes last. Both bounds of an interval come one after the other, and go only with FlushSet: newer kernels take bounds for what belongs
// together by their order in a message.
func (b *Batch) AddBound(s *Set, key []byte, end bool) {
	b.elementList(unix.NFT_MSG_NEWSETELEM, createFlag, s)
	e := b.nest(unix.NFTA_LIST_ELEM)
	if end {
		b.buf = appendU32(b.buf, unix.NFTA_SET_ELEM_FLAGS, elemFlagEnd)
	}
	b.value(unix.NFTA_SET_ELEM_KEY, key)
	b.closeNest(e)
}

// FlushSet deletes all elements of a set.
func (b *Batch) FlushSet(s *Set) {
	m := b.begin(unix.NFT_MSG_DELSETELEM, 0, s.Family)
	b.buf = appendString(b.buf, unix.NFTA_SET_ELEM_LIST_TABLE, s.Table.Name)
	b.buf = appendString(b.buf, unix.NFTA_SET_ELEM_LIST_SET, s.Name)
	b.end(m)
}

// DeleteElement deletes an element of a set or map.
func (b *Batch) DeleteElement(s *Set, key []byte) {
	b.elementList(unix.NFT_MSG_DELSETELEM, 0, s)
	e := b.nest(unix.NFTA_LIST_ELEM)
	b.value(unix.NFTA_SET_ELEM_KEY, key)
	b.closeNest(e)
}

func (b *Batch) value(attr uint16, v []byte) {
	n := b.nest(attr)
	b.buf = appendBytes(b.buf, unix.NFTA_DATA_VALUE, v)
	b.closeNest(n)
}

func (b *Batch) nest(attr uint16) int { var n int; b.buf, n = openNest(b.buf, attr); return n }
func (b *Batch) closeNest(start int)  { closeNest(b.buf, start) }
func openNest(buf []byte, a uint16) ([]byte, int) {
	return appendAttrHeader(buf, a|unix.NLA_F_NESTED, 0), len(buf)
}

// closeNest writes the length of a nest. Nests stay below 64 KiB because elementList begins a new message before.
func closeNest(buf []byte, start int) {
	binary.NativeEndian.PutUint16(buf[start:], uint16(len(buf)-start))
}

func appendAttrHeader(buf []byte, attr uint16, payload int) []byte {
	buf = binary.NativeEndian.AppendUint16(buf, uint16(unix.SizeofNlAttr+payload))
	return binary.NativeEndian.AppendUint16(buf, attr)
}

func appendBytes(buf []byte, attr uint16, v []byte) []byte {
	buf = append(appendAttrHeader(buf, attr, len(v)), v...)
	return pad(buf, len(v))
}

func appendString(buf []byte, attr uint16, v string) []byte {
	buf = append(append(appendAttrHeader(buf, attr, len(v)+1), v...), 0)
	return pad(buf, len(v)+1)
}

func appendU32(buf []byte, attr uint16, v uint32) []byte {
	return binary.BigEndian.AppendUint32(appendAttrHeader(buf, attr, 4), v)
}

func pad(buf []byte, n int) []byte {
	const zero = "\x00\x00\x00"
	return append(buf, zero[:-n&3]...)
}

func appendVerdict(buf []byte, v Verdict) []byte {
	buf, n := openNest(buf, unix.NFTA_DATA_VERDICT)
	buf = appendU32(buf, unix.NFTA_VERDICT_CODE, uint32(v.Code))
	if v.Chain != "" {
		buf = appendString(buf, unix.NFTA_VERDICT_CHAIN, v.Chain)
	}
	closeNest(buf, n)
	return buf
}

// frame numbers the messages from seq, asks an acknowledgement of the last one and gives them wrapped in batch begin and, if
// commit, batch end. generation, if not 0, makes the kernel refuse (ERESTART) when its rule set is not of that generation.
func (b *Batch) frame(out []byte, seq, generation uint32, commit bool) (framed []byte, lastSeq uint32) {
	b.closeElements()
	out = appendHeader(out[:0], unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	if generation != 0 {
		out = appendU32(out, unix.NFNL_BATCH_GENID, generation)
	}
	binary.NativeEndian.PutUint32(out, uint32(len(out)))
	binary.NativeEndian.PutUint32(out[8:], seq)

	flags := binary.NativeEndian.Uint16(b.buf[b.last+6:])
	binary.NativeEndian.PutUint16(b.buf[b.last+6:], flags|unix.NLM_F_ACK)
	for at := 0; at < len(b.buf); at += int(binary.NativeEndian.Uint32(b.buf[at:])) {
		seq++
		binary.NativeEndian.PutUint32(b.buf[at+8:], seq)
	}
	out = append(out, b.buf...)
	lastSeq = seq
	if commit {
		at := len(out)
		out = appendHeader(out, unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
		binary.NativeEndian.PutUint32(out[at:], uint32(len(out)-at))
		binary.NativeEndian.PutUint32(out[at+8:], seq+1)
	}
	return out, lastSeq
}

// describe names the message of a sequence number in a framed batch, for errors.
func describe(framed []byte, seq uint32) string {
	for len(framed) >= unix.SizeofNlMsghdr {
		size := binary.NativeEndian.Uint32(framed)
		if int(size) > len(framed) || size < unix.SizeofNlMsghdr {
			break
		}
		if binary.NativeEndian.Uint32(framed[8:]) == seq {
			return describeMessage(framed[:size])
		}
		framed = framed[size:]
	}
	return "transaction"
}

var messageNames = [...]string{
	unix.NFT_MSG_NEWTABLE: "add table", unix.NFT_MSG_DELTABLE: "delete table",
	unix.NFT_MSG_NEWCHAIN: "add chain", unix.NFT_MSG_DELCHAIN: "delete chain",
	unix.NFT_MSG_NEWRULE: "add rule to chain", unix.NFT_MSG_DELRULE: "flush chain",
	unix.NFT_MSG_NEWSET: "add set", unix.NFT_MSG_DELSET: "delete set",
	unix.NFT_MSG_NEWSETELEM: "add elements to", unix.NFT_MSG_DELSETELEM: "delete elements of",
}

func describeMessage(msg []byte) string {
	typ := binary.NativeEndian.Uint16(msg[4:])
	if typ>>8 != unix.NFNL_SUBSYS_NFTABLES || len(msg) < unix.SizeofNlMsghdr+sizeofNfgenmsg {
		return "transaction"
	}
	name := "message"
	if t := int(typ & 0xff); t < len(messageNames) && messageNames[t] != "" {
		name = messageNames[t]
	}
	for attr, v := range attributes(msg[unix.SizeofNlMsghdr+sizeofNfgenmsg:]) {
		// In every kind of message the first strings are the table and then the object.
		if attr > unix.NFTA_CHAIN_NAME {
			break
		}
		if s, _, ok := bytes.Cut(v, []byte{0}); ok && len(s) > 0 {
			name += " " + string(s)
		}
	}
	return name
}
