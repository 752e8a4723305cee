package nfnl

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"syscall"

	"golang.org/x/sys/unix"
)

// attrTypeMask takes the flags NLA_F_NESTED and NLA_F_NET_BYTEORDER off an attribute type.
const attrTypeMask = 0x3fff

// message is one netlink message.
type message struct {
	typ, flags uint16
	seq, port  uint32
	body       []byte
}

// messages walks the messages of a datagram.
func messages(p []byte) iter.Seq[message] {
	return func(yield func(message) bool) {
		for len(p) >= unix.SizeofNlMsghdr {
			size := int(binary.NativeEndian.Uint32(p))
			if size < unix.SizeofNlMsghdr || size > len(p) {
				return
			}
			m := message{
				typ: binary.NativeEndian.Uint16(p[4:]), flags: binary.NativeEndian.Uint16(p[6:]),
				seq: binary.NativeEndian.Uint32(p[8:]), port: binary.NativeEndian.Uint32(p[12:]),
				body: p[unix.SizeofNlMsghdr:size],
			}
			if !yield(m) {
				return
			}
			p = p[min((size+3)&^3, len(p)):]
		}
	}
}

// extAck gives the kernel's own words about an error, if it has any.
func (m message) extAck() string {
	const header = 4 + unix.SizeofNlMsghdr // errno and the header of what it is about
	if m.flags&unix.NLM_F_ACK_TLVS == 0 || len(m.body) < header {
		return ""
	}
	for attr, v := range attributes(m.body[header:]) {
		if attr == unix.NLMSGERR_ATTR_MSG {
			return cString(v)
		}
	}
	return ""
}

// attributes walks netlink attributes; flags are taken off their types.
func attributes(p []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(p) >= unix.SizeofNlAttr {
			size := int(binary.NativeEndian.Uint16(p))
			if size < unix.SizeofNlAttr || size > len(p) {
				return
			}
			if !yield(binary.NativeEndian.Uint16(p[2:])&attrTypeMask, p[unix.SizeofNlAttr:size]) {
				return
			}
			p = p[min((size+3)&^3, len(p)):]
		}
	}
}

func cString(v []byte) string { s, _, _ := bytes.Cut(v, []byte{0}); return string(s) }

func u32(v []byte) uint32 {
	if len(v) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(v)
}

// get sends one request and gives the body of every answer to each. With NLM_F_DUMP in flags it is a dump; ErrChanged
// says that a dump is not of one generation.
func (c *Conn) get(typ, flags uint16, family Family, attrs []byte, each func(family Family, body []byte)) error {
	c.seq++
	req := appendHeader(nil, unix.NFNL_SUBSYS_NFTABLES<<8|typ, flags, uint8(family), 0)
	req = append(req, attrs...)
	binary.NativeEndian.PutUint32(req, uint32(len(req)))
	binary.NativeEndian.PutUint32(req[8:], c.seq)
	if err := c.send(req); err != nil {
		return err
	}
	changed := false
	for {
		n, err := c.receive(0)
		if err != nil {
			return err
		}
		for m := range messages(c.recv[:n]) {
			if m.seq != c.seq {
				continue
			}
			changed = changed || m.flags&unix.NLM_F_DUMP_INTR != 0
			switch {
			case m.typ == unix.NLMSG_ERROR || m.typ == unix.NLMSG_DONE:
				errno := syscall.Errno(0)
				if len(m.body) >= 4 {
					errno = syscall.Errno(-int32(binary.NativeEndian.Uint32(m.body)))
				}
				switch {
				case errno == unix.EINTR || (errno == 0 && changed):
					return ErrChanged
				case errno != 0:
					return errno
				}
				return nil
			case len(m.body) >= sizeofNfgenmsg:
				each(Family(m.body[0]), m.body[sizeofNfgenmsg:])
				if flags&unix.NLM_F_DUMP == 0 {
					return nil
				}
			}
		}
	}
}

// Chain is a chain as the kernel holds it.
type Chain struct {
	Name string
	Hook *Hook // nil for a regular chain
	// Rules are the fingerprints that its rules carry; "" is a rule that this package did not write.
	Rules []string
}

// HasTable says whether a table exists.
func (c *Conn) HasTable(t Table) (bool, error) {
	err := c.get(unix.NFT_MSG_GETTABLE, 0, t.Family, appendString(nil, unix.NFTA_TABLE_NAME, t.Name), func(Family, []byte) {})
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read table %s: %w", t.Name, err)
	}
	return true, nil
}

// Chains gives the chains of a table with their rules, and whether the table exists. Like all that reads here it gives with ErrChanged what it
// has read nevertheless, which may lack things.
func (c *Conn) Chains(t Table) (chains map[string]*Chain, exists bool, err error) {
	if exists, err := c.HasTable(t); !exists {
		return nil, false, err
	}
	chains = map[string]*Chain{}
	err = c.get(unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP, t.Family, nil, func(f Family, body []byte) {
		if table, ch := parseChain(body); table == t.Name && f == t.Family {
			chains[ch.Name] = ch
		}
	})
	changed := errors.Is(err, ErrChanged)
	if err != nil && !changed {
		return nil, true, fmt.Errorf("read chains: %w", err)
	}
	err = c.get(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, t.Family, appendString(nil, unix.NFTA_RULE_TABLE, t.Name), func(f Family, body []byte) {
		table, chain, fingerprint := parseRule(body)
		if ch := chains[chain]; ch != nil && table == t.Name && f == t.Family {
			ch.Rules = append(ch.Rules, fingerprint)
		}
	})
	if err == nil && changed {
		err = ErrChanged
	}
	if err != nil {
		return chains, true, fmt.Errorf("read rules: %w", err)
	}
	return chains, true, nil
}

func parseChain(body []byte) (table string, ch *Chain) {
	ch = &Chain{}
	var hook Hook
	for attr, v := range attributes(body) {
		switch attr {
		case unix.NFTA_CHAIN_TABLE:
			table = cString(v)
		case unix.NFTA_CHAIN_NAME:
			ch.Name = cString(v)
		case unix.NFTA_CHAIN_TYPE:
			hook.Type = cString(v)
		case unix.NFTA_CHAIN_HOOK:
			ch.Hook = &hook
			for a, h := range attributes(v) {
				switch a {
				case unix.NFTA_HOOK_HOOKNUM:
					hook.Num = u32(h)
				case unix.NFTA_HOOK_PRIORITY:
					hook.Priority = int32(u32(h))
				}
			}
		}
	}
	return table, ch
}

func parseRule(body []byte) (table, chain, fingerprint string) {
	for attr, v := range attributes(body) {
		switch attr {
		case unix.NFTA_RULE_TABLE:
			table = cString(v)
		case unix.NFTA_RULE_CHAIN:
			chain = cString(v)
		case unix.NFTA_RULE_USERDATA:
			if len(v) > 2 && v[0] == ruleComment {
				fingerprint = cString(v[2:])
			}
		}
	}
	return table, chain, fingerprint
}

// Sets gives the sets and maps of a table.
func (c *Conn) Sets(t Table) (map[string]*Set, error) {
	sets := map[string]*Set{}
	err := c.get(unix.NFT_MSG_GETSET, unix.NLM_F_DUMP, t.Family, appendString(nil, unix.NFTA_SET_TABLE, t.Name), func(f Family, body []byte) {
		if s := parseSet(f, body); s.Table == t {
			sets[s.Name] = s
		}
	})
	if err != nil {
		return sets, fmt.Errorf("read sets: %w", err)
	}
	return sets, nil
}

func parseSet(f Family, body []byte) *Set {
	s := &Set{}
	s.Family = f
	for attr, v := range attributes(body) {
		switch attr {
		case unix.NFTA_SET_TABLE:
			s.Table.Name = cString(v)
		case unix.NFTA_SET_NAME:
			s.Name = cString(v)
		case unix.NFTA_SET_FLAGS:
			s.Dynamic = u32(v)&setFlagEval != 0
			s.Interval = u32(v)&setFlagInterval != 0
		case setExpr:
			s.Counted = true
		case unix.NFTA_SET_KEY_TYPE:
			s.KeyType = u32(v)
		case unix.NFTA_SET_KEY_LEN:
			s.KeyLen = u32(v)
		case unix.NFTA_SET_DATA_TYPE:
			s.DataType = u32(v)
			s.Verdicts = s.DataType == dataTypeVerdict
			s.Map = !s.Verdicts
		case unix.NFTA_SET_DATA_LEN:
			s.DataLen = u32(v)
		}
	}
	return s
}

var seenSeed = maphash.MakeSeed()

// Element is an element of a set or map. The slices are valid during the call that is given it.
type Element struct {
	Key, Data []byte
	Verdict   Verdict
	// End says that it is the end of an interval; see Batch.AddBound.
	End bool
	// Packets and Bytes are what it counted; see Set.Counted.
	Packets, Bytes uint64
}

// Elements gives the elements of a set or map to each.
//
// A dump comes in parts, and for the next part the kernel walks its hash table again and skips as many elements as it has given. If
// the table is being resized, which happens behind the back of transactions and generations, the order changes: some elements
// come twice and as many never. So one that comes twice is an ErrChanged.
func (c *Conn) Elements(s *Set, each func(Element)) error {
	seen := map[uint64]struct{}{} // hashes of keys: two that agree by chance cost one more read
	twice := false
	attrs := appendString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, s.Table.Name)
	attrs = appendString(attrs, unix.NFTA_SET_ELEM_LIST_SET, s.Name)
	err := c.get(unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP, s.Family, attrs, func(_ Family, body []byte) {
		for attr, list := range attributes(body) {
			if attr != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				continue
			}
			for _, p := range attributes(list) {
				e := parseElement(p)
				h := maphash.Bytes(seenSeed, e.Key)
				if e.End { // another interval may begin there
					h = ^h
				}
				if _, again := seen[h]; again {
					twice = true
				}
				seen[h] = struct{}{}
				each(e)
			}
		}
	})
	if err == nil && twice {
		err = ErrChanged
	}
	if err != nil {
		return fmt.Errorf("read elements of %s: %w", s.Name, err)
	}
	return nil
}

func parseElement(p []byte) Element {
	var e Element
	for attr, v := range attributes(p) {
		switch attr {
		case unix.NFTA_SET_ELEM_KEY:
			for _, value := range attributes(v) {
				e.Key = value
			}
		case unix.NFTA_SET_ELEM_FLAGS:
			e.End = u32(v)&elemFlagEnd != 0
		case unix.NFTA_SET_ELEM_EXPR:
			e.Packets, e.Bytes = parseCounter(v)
		case unix.NFTA_SET_ELEM_DATA:
			for a, value := range attributes(v) {
				if a == unix.NFTA_DATA_VERDICT {
					e.Verdict = parseVerdict(value)
					continue
				}
				e.Data = value
			}
		}
	}
	return e
}

func parseVerdict(p []byte) (verdict Verdict) {
	for attr, v := range attributes(p) {
		switch attr {
		case unix.NFTA_VERDICT_CODE:
			verdict.Code = int32(u32(v))
		case unix.NFTA_VERDICT_CHAIN:
			verdict.Chain = cString(v)
		}
	}
	return verdict
}
