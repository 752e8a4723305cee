package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

const (
	// stateRoot has one folder per cluster and beside it the lock that its process holds for as long as it lives. It is not in
	// /run, which may be mounted noexec, and not below TMPDIR, where a later run with another TMPDIR would not find what a killed one left.
	stateRoot = "/var/tmp/serviceproxy-cluster"
	// pinRoot is where `ip netns` looks for names.
	pinRoot = "/run/netns"
)

// state is what a cluster leaves in the file system while it runs: its folder, and names for its namespaces. A process that is killed
// leaves nothing else: its namespaces are anonymous and its children die with it.
type state struct {
	name string
	dir  string
	lock *os.File
}

// openState takes the name for this process, after it has removed what dead processes left under any name.
func openState(name string) (*state, error) {
	if err := secureRoot(); err != nil {
		return nil, err
	}
	if err := Sweep(); err != nil {
		return nil, fmt.Errorf("clean up after a killed run: %w", err)
	}
	lock, err := acquire(name)
	if errors.Is(err, errHeld) {
		return nil, fmt.Errorf("a cluster named %q is up already (process %s)", name, ownerText(name))
	}
	if err != nil {
		return nil, err
	}
	s := &state{name: name, dir: filepath.Join(stateRoot, name), lock: lock}
	if err := os.MkdirAll(s.netnsDir(), 0o700); err != nil {
		return nil, errors.Join(err, s.close())
	}
	if err := os.WriteFile(filepath.Join(s.dir, "pid"), []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// secureRoot makes the root folder. Since it lies in a folder that everyone may write to, it must not be someone else's.
func secureRoot() error {
	if err := os.Mkdir(stateRoot, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(stateRoot)
	if err != nil {
		return err
	}
	owner := info.Sys().(*syscall.Stat_t).Uid
	if !info.IsDir() || int(owner) != os.Geteuid() || info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s is not a folder that only we can write to (%s, owner %d): remove it", stateRoot, info.Mode(), owner)
	}
	return nil
}

// pin gives a namespace the name NAME-suffix for `ip netns exec`, for as long as this process lives.
//
// The name is a link to the file descriptor that holds the namespace, not a mount as `ip netns add` makes: a mount would keep the
// namespace of a killed process alive, and nobody could tell it from someone else's of that name.
func (s *state) pin(suffix string, ns *netns.NS) error {
	inner := filepath.Join(s.netnsDir(), suffix)
	if err := os.Symlink(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd()), inner); err != nil {
		return err
	}
	if err := os.MkdirAll(pinRoot, 0o755); err != nil {
		return err
	}
	return os.Symlink(inner, filepath.Join(pinRoot, s.pinName(suffix)))
}

// unpin takes a name back. It is no error if there is none.
func (s *state) unpin(suffix string) error {
	var errs []error
	for _, path := range []string{filepath.Join(pinRoot, s.pinName(suffix)), filepath.Join(s.netnsDir(), suffix)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (s *state) pinName(suffix string) string { return s.name + "-" + suffix }

func (s *state) netnsDir() string { return filepath.Join(s.dir, "netns") }

// close removes everything and gives the name back.
func (s *state) close() error { return remove(s.name, s.lock) }

// Sweep removes what clusters of killed processes left in the file system. Clusters that are up are not touched, nor are namespaces that
// are not ours.
func Sweep() error {
	entries, err := os.ReadDir(stateRoot)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		// A folder without a lock is of a process that was killed while it removed it.
		name := strings.TrimSuffix(e.Name(), lockSuffix)
		lock, err := acquire(name)
		if errors.Is(err, errHeld) {
			continue
		}
		if err == nil {
			err = remove(name, lock)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// remove removes a cluster's names and folder, and at last its lock, which the caller holds.
func remove(name string, lock *os.File) error {
	dir := filepath.Join(stateRoot, name)
	var errs []error
	pins, err := os.ReadDir(pinRoot)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, p := range pins {
		path := filepath.Join(pinRoot, p.Name())
		target, err := os.Readlink(path)
		if err != nil || !strings.HasPrefix(target, dir+"/") {
			continue // not a link, or not ours
		}
		errs = append(errs, os.Remove(path))
	}
	errs = append(errs, os.RemoveAll(dir))
	if err := errors.Join(errs...); err != nil {
		return errors.Join(err, lock.Close()) // the lock file stays, so that the next run tries again
	}
	return errors.Join(os.Remove(lock.Name()), lock.Close())
}

const lockSuffix = ".lock"

// errHeld: a living process holds the name.
var errHeld = errors.New("held by a living process")

// acquire takes the lock of a name, or fails with errHeld.
func acquire(name string) (*os.File, error) {
	path := filepath.Join(stateRoot, name+lockSuffix)
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, errHeld
			}
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		// Its holder may have removed the file between our open and our lock: then we hold a lock that nobody else sees.
		mine, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		if current, err := os.Stat(path); err == nil && os.SameFile(mine, current) {
			return f, nil
		}
		f.Close()
	}
}

// Owner gives the process that runs the cluster of this name, 0 if it is not up.
func Owner(name string) (pid int, err error) {
	if _, err := os.Stat(filepath.Join(stateRoot, name+lockSuffix)); errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	lock, err := acquire(name)
	if err == nil {
		return 0, remove(name, lock) // dead: what it left goes now
	}
	if !errors.Is(err, errHeld) {
		return 0, err
	}
	b, err := os.ReadFile(filepath.Join(stateRoot, name, "pid"))
	if err != nil {
		return 0, fmt.Errorf("cluster %q is coming up or going down: %w", name, err)
	}
	return strconv.Atoi(string(b))
}

func ownerText(name string) string {
	pid, err := Owner(name)
	if err != nil {
		return "unknown: " + err.Error()
	}
	return strconv.Itoa(pid)
}
