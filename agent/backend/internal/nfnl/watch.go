package nfnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Watch reports changes of tables by others.
type Watch struct {
	file    *os.File
	changed func()
	tables  []string
	done    chan struct{}
}

// NewWatch calls changed, from a goroutine of its own, whenever a transaction of a socket other than own touches a table of one of the names in
// any family, and whenever notifications were lost. It watches the namespace in which it is called.
func NewWatch(own *Conn, changed func(), tables ...string) (*Watch, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open nf_tables watch: %w", err)
	}
	w := &Watch{file: os.NewFile(uintptr(fd), "nf_tables watch"), changed: changed, tables: tables, done: make(chan struct{})}
	err = errors.Join(
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20),
		ignorePort(fd, own.PortID()),
		w.Resume())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("watch nf_tables: %w", err), w.file.Close())
	}
	go w.run()
	return w, nil
}

// ignorePort lets the kernel discard what own transactions cause before it wakes anybody: a socket filter on the port ID in
// the header of a notification's first message. All messages of one notification are of one transaction.
func ignorePort(fd int, port uint32) error {
	// Filters load in network byte order what netlink writes in the machine's.
	swapped := binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, port))
	const portOffset = 12
	prog := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: portOffset},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: swapped},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: 1<<32 - 1},
	}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]})
}

// Pause stops the kernel from composing notifications, which costs half as much again as a bulk load itself. Resume goes on; what happened between is not reported.
func (w *Watch) Pause() error { return w.membership(unix.NETLINK_DROP_MEMBERSHIP) }

// Resume ends Pause.
func (w *Watch) Resume() error { return w.membership(unix.NETLINK_ADD_MEMBERSHIP) }

func (w *Watch) membership(option int) error {
	raw, err := w.file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.SOL_NETLINK, option, unix.NFNLGRP_NFTABLES)
	})
	if err := errors.Join(err, failed); err != nil {
		return fmt.Errorf("change nf_tables notifications: %w", err)
	}
	return nil
}

// Close ends the watch and waits for its goroutine.
func (w *Watch) Close() error {
	err := w.file.Close()
	<-w.done
	return err
}

func (w *Watch) run() {
	defer close(w.done)
	buf := make([]byte, 64<<10)
	for {
		n, err := w.file.Read(buf)
		switch {
		case errors.Is(err, unix.ENOBUFS): // notifications were lost: anything may have happened
			w.changed()
		case err != nil:
			return
		case w.concerns(buf[:n]):
			w.changed()
		}
	}
}

func (w *Watch) concerns(datagram []byte) bool {
	for m := range messages(datagram) {
		if m.typ>>8 != unix.NFNL_SUBSYS_NFTABLES || m.typ&0xff == unix.NFT_MSG_NEWGEN || len(m.body) < sizeofNfgenmsg {
			continue
		}
		for attr, v := range attributes(m.body[sizeofNfgenmsg:]) {
			if attr == unix.NFTA_TABLE_NAME && slices.Contains(w.tables, cString(v)) { // 1 is the table's name in every kind of message
				return true
			}
		}
	}
	return false
}
