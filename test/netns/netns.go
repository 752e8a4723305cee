// Package netns gives tests network namespaces of their own, so that they can change firewalls, routes and sysctls without
// touching the machine's.
//
// A namespace is anonymous: it is held by a file descriptor of this process and is gone with it, however it ends. Pin gives it
// a name that `ip netns` knows, for people to look into.
package netns

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// NS is a network namespace.
type NS struct {
	file *os.File
	pin  string
}

// New makes an empty namespace: nothing but a loopback device, which is down. Needs CAP_SYS_ADMIN.
func New() (*NS, error) {
	type result struct {
		file *os.File
		err  error
	}
	ch := make(chan result)
	go func() {
		// Never unlocked: the thread stays in the new namespace and ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ch <- result{nil, fmt.Errorf("make a network namespace (needs root): %w", err)}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		ch <- result{f, err}
	}()
	r := <-ch
	if r.err != nil {
		return nil, r.err
	}
	return &NS{file: r.file}, nil
}

// Fd is the namespace's file descriptor, valid until Close.
func (n *NS) Fd() int { return int(n.file.Fd()) }

// Do calls f on a thread inside the namespace. Sockets that f opens stay in the namespace; goroutines that it starts do not run in it.
func (n *NS) Do(f func() error) error {
	runtime.LockOSThread()
	host, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer host.Close()
	if err := unix.Setns(n.Fd(), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace: %w", err)
	}
	defer func() {
		// A thread that cannot go back stays locked, so that no other goroutine ever runs on it.
		if unix.Setns(int(host.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return f()
}

// Start starts a command inside the namespace.
func (n *NS) Start(cmd *exec.Cmd) error { return n.Do(cmd.Start) }

// Run runs a command inside the namespace and gives its combined output.
func (n *NS) Run(name string, args ...string) (string, error) {
	var out []byte
	err := n.Do(func() (err error) {
		out, err = exec.Command(name, args...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%s %q: %w: %s", name, args, err, out)
		}
		return err
	})
	return string(out), err
}

// Pin gives the namespace a name for `ip netns exec NAME`. Close takes it back.
func (n *NS) Pin(name string) error {
	if err := os.MkdirAll("/run/netns", 0o755); err != nil {
		return err
	}
	path := filepath.Join("/run/netns", name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", n.Fd()), path, "none", unix.MS_BIND, ""); err != nil {
		os.Remove(path)
		return fmt.Errorf("name network namespace %s: %w", name, err)
	}
	n.pin = path
	return nil
}

// Close lets go of the namespace. It ends when no process and no socket is in it any more.
func (n *NS) Close() error {
	if n.pin != "" {
		if err := unix.Unmount(n.pin, unix.MNT_DETACH); err != nil {
			return err
		}
		if err := os.Remove(n.pin); err != nil {
			return err
		}
	}
	return n.file.Close()
}

// RequireRoot ends a test that cannot run without root: as a failure in CI (environment CI set), as a skip that says so elsewhere.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	const why = "needs root: it makes network namespaces and programs their kernel; run it with sudo"
	if os.Getenv("CI") != "" {
		t.Fatal(why)
	}
	t.Skip(why)
}

// NewT makes a namespace with loopback up for one test and closes it after.
func NewT(t testing.TB) *NS {
	t.Helper()
	RequireRoot(t)
	n, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("close network namespace: %v", err)
		}
	})
	if _, err := n.Run("ip", "link", "set", "lo", "up"); err != nil {
		t.Fatal(err)
	}
	return n
}
