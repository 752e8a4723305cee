package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

const (
	attrStatus     = 3
	attrStatusMask = 26
	// statusDestination is set for flows whose destination is translated (IPS_DST_NAT).
	statusDestination = 1 << 5
)

// Translated says whether the table has a flow of any protocol whose destination is translated. The kernel shows no others, if it can (since Linux 5.8).
func (t *Table) Translated() (found bool, err error) {
	req := appendHeader(nil, msgGet, unix.NLM_F_DUMP, 0, unix.AF_UNSPEC)
	req = appendAttr(req, attrStatus, binary.BigEndian.AppendUint32(nil, statusDestination))
	req = appendAttr(req, attrStatusMask, binary.BigEndian.AppendUint32(nil, statusDestination))
	finish(req, 0)
	for range reads {
		found, err = t.anyTranslated(req)
		if found || !errors.Is(err, errIncomplete) {
			break
		}
	}
	if err != nil && !found {
		return false, fmt.Errorf("conntrack: %w", err)
	}
	return found, nil
}

func (t *Table) anyTranslated(req []byte) (found bool, err error) {
	t.seq++
	binary.NativeEndian.PutUint32(req[8:], t.seq)
	if err := t.send(req); err != nil {
		return false, err
	}
	incomplete := false
	for {
		p, err := t.receive(0)
		if errors.Is(err, unix.ENOBUFS) {
			incomplete = true
			continue
		}
		if err != nil {
			return found, err
		}
		for m := range messages(p) {
			switch {
			case m.seq != t.seq:
			case m.typ == unix.NLMSG_ERROR || m.typ == unix.NLMSG_DONE:
				errno := m.errno()
				if errno == unix.EINTR || errno == 0 && (incomplete || m.flags&unix.NLM_F_DUMP_INTR != 0) {
					return found, errIncomplete
				}
				if errno != 0 {
					return found, errno
				}
				return found, nil
			case m.typ == msgNew && len(m.body) > 4:
				for attr, v := range attributes(m.body[4:]) {
					found = found || attr == attrStatus && len(v) == 4 && binary.BigEndian.Uint32(v)&statusDestination != 0
				}
			}
		}
	}
}
