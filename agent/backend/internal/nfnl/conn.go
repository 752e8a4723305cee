package nfnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

const sizeofNfgenmsg = 4

// ErrUnknown says that the kernel's answer to a transaction was lost: it may or may not hold it.
var ErrUnknown = errors.New("the kernel's answer was lost")

// ErrChanged says that the rule set is no longer the one that a guarded transaction or a read was based on.
var ErrChanged = errors.New("the rule set changed meanwhile")

// Conn is a netlink socket to nf_tables of the network namespace in which it was dialled. Its methods are for one goroutine at a time.
type Conn struct {
	fd     int
	portID uint32
	seq    uint32
	recv   []byte
	frame  []byte
}

const (
	// A transaction is one message to the socket, so the send buffer bounds it. The kernel allocates it when it is used.
	sendBuffer = 1 << 30
	recvBuffer = 8 << 20
)

// Dial opens a socket. It needs CAP_NET_ADMIN.
func Dial() (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open nf_tables socket: %w", err)
	}
	c := &Conn{fd: fd, recv: make([]byte, 256<<10)}
	if err := c.setUp(); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return c, nil
}

func (c *Conn) setUp() error {
	if err := unix.Bind(c.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("bind nf_tables socket: %w", err)
	}
	addr, err := unix.Getsockname(c.fd)
	if err != nil {
		return fmt.Errorf("bind nf_tables socket: %w", err)
	}
	if nl, ok := addr.(*unix.SockaddrNetlink); ok {
		c.portID = nl.Pid
	}
	for _, o := range []struct {
		level, name, value int
		what               string
	}{
		{unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer, "send buffer"},
		{unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, recvBuffer, "receive buffer"},
		{unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1, "extended errors"},
		{unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1, "capped errors"},
	} {
		if err := unix.SetsockoptInt(c.fd, o.level, o.name, o.value); err != nil {
			return fmt.Errorf("set %s of nf_tables socket: %w", o.what, err)
		}
	}
	return nil
}

// Close closes the socket. What was committed stays.
func (c *Conn) Close() error { return unix.Close(c.fd) }

// PortID is the socket's netlink address, with which the kernel marks notifications of its transactions.
func (c *Conn) PortID() uint32 { return c.portID }

// Commit sends a transaction; the kernel holds all of it or nothing. With a generation other than 0 it fails with ErrChanged unless the
// rule set is still of that generation. ErrUnknown says that the outcome is not known. An empty batch is not sent.
func (c *Conn) Commit(b *Batch, generation uint32) error {
	if b.Empty() {
		return nil
	}
	return c.transact(b, generation, true)
}

// Try lets the kernel check a transaction and take nothing of it.
func (c *Conn) Try(b *Batch) error { return c.transact(b, 0, false) }

func (c *Conn) transact(b *Batch, generation uint32, commit bool) error {
	first := c.seq + 1
	var last uint32
	c.frame, last = b.frame(c.frame, first, generation, commit)
	c.seq = last + 1
	if err := c.send(c.frame); err != nil {
		return fmt.Errorf("send %d bytes to nf_tables: %w", len(c.frame), err)
	}
	err := c.answer(first, last)
	if cap(c.frame) > keepBuffer {
		c.frame = nil
	}
	return err
}

func (c *Conn) send(p []byte) error {
	for {
		err := unix.Sendto(c.fd, p, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if err != unix.EINTR {
			return err
		}
	}
}

// answer reads what the kernel says about the messages first (batch begin) to last. The kernel has answered everything by the
// time that send returns, so nothing left to read means that an answer was lost.
func (c *Conn) answer(first, last uint32) error {
	var failed error
	for {
		n, err := c.receive(unix.MSG_DONTWAIT)
		if err != nil {
			if errors.Is(err, unix.EAGAIN) && failed != nil {
				return failed
			}
			return errors.Join(failed, fmt.Errorf("%w: %w", ErrUnknown, err))
		}
		for m := range messages(c.recv[:n]) {
			if int32(m.seq-first) < 0 || m.typ != unix.NLMSG_ERROR || len(m.body) < 4 {
				continue // left over from an earlier transaction
			}
			errno := syscall.Errno(-int32(binary.NativeEndian.Uint32(m.body)))
			if errno != 0 && failed == nil {
				failed = c.failure(errno, m, first)
			}
			// An error about batch begin is about the whole: nothing after it was looked at, or the commit itself failed.
			if m.seq == last || (m.seq == first && errno != 0) {
				return failed
			}
		}
	}
}

func (c *Conn) failure(errno syscall.Errno, m message, first uint32) error {
	if errno == unix.ERESTART {
		return ErrChanged
	}
	what := "transaction"
	if m.seq != first {
		what = describe(c.frame, m.seq)
	}
	if text := m.extAck(); text != "" {
		return fmt.Errorf("nf_tables: %s: %w (%s)", what, errno, text)
	}
	return fmt.Errorf("nf_tables: %s: %w", what, errno)
}

func (c *Conn) receive(flags int) (int, error) {
	for {
		n, _, err := unix.Recvfrom(c.fd, c.recv, flags|unix.MSG_TRUNC)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, err
		case n > len(c.recv):
			return 0, fmt.Errorf("netlink message of %d bytes exceeds the buffer", n)
		}
		return n, nil
	}
}

// Generation gives the number that every transaction in this network namespace, of whoever, increases by one.
func (c *Conn) Generation() (uint32, error) {
	var generation uint32
	err := c.get(unix.NFT_MSG_GETGEN, 0, 0, nil, func(_ Family, body []byte) {
		for attr, v := range attributes(body) {
			if attr == unix.NFTA_GEN_ID && len(v) == 4 {
				generation = binary.BigEndian.Uint32(v)
			}
		}
	})
	if err != nil {
		return 0, fmt.Errorf("read nf_tables generation: %w", err)
	}
	return generation, nil
}

// NextGeneration gives the generation that follows: the kernel leaves out 0.
func NextGeneration(g uint32) uint32 {
	if g++; g == 0 {
		g++
	}
	return g
}
