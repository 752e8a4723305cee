// Package sysctl sees to it that parameters of the node's kernel are at least what a service proxy needs. Nothing is ever lowered: what a node's
// administrator, or another program, set higher had a reason. Only the agent's cleanup gives back what it raised itself.
package sysctl

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Proc is the directory that has the kernel's parameters as files.
type Proc string

// Kernel has the parameters of the running kernel: those under net are the calling thread's network namespace's.
const Kernel Proc = "/proc/sys"

// mounted is where a container finds them if it may change them: its own /proc/sys is read-only. config/agent has the node's /proc/sys/net mounted there, as Cilium does.
const mounted Proc = "/host/proc/sys"

// Node gives the running kernel's parameters where this process may change those under net, in a container, too.
func Node() Proc {
	if _, err := os.Stat(mounted.path("net")); err == nil {
		return mounted
	}
	return Kernel
}

// ErrNotHere says that a parameter belongs to the whole machine and cannot be set from a network namespace other than the machine's first.
var ErrNotHere = errors.New("it belongs to the whole machine and cannot be set in a network namespace of its own")

// Parameter is one parameter of the kernel and the least value that is wanted of it.
type Parameter struct {
	// Name is the parameter's path below /proc/sys, such as net/netfilter/nf_conntrack_max.
	Name    string
	AtLeast int
}

func (p Parameter) String() string { return p.Name + "=" + strconv.Itoa(p.AtLeast) }

// Get reads a parameter.
func (k Proc) Get(name string) (int, error) {
	text, err := os.ReadFile(k.path(name))
	if err != nil {
		return 0, err
	}
	value, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, fmt.Errorf("kernel parameter %s is no number: %w", name, err)
	}
	return value, nil
}

// Raise sees to it that a parameter is at least the value, and says whether it wrote it. An error is fs.ErrNotExist if this kernel does not have the parameter
// (its module may not be loaded yet), and ErrNotHere if it cannot be set from this network namespace.
func (k Proc) Raise(p Parameter) (raised bool, err error) {
	current, err := k.Get(p.Name)
	if err != nil {
		return false, fmt.Errorf("read kernel parameter %s: %w", p.Name, err)
	}
	if current >= p.AtLeast {
		return false, nil
	}
	if err := k.write(p); err != nil {
		return false, fmt.Errorf("raise kernel parameter %s from %d to %d: %w", p.Name, current, p.AtLeast, err)
	}
	return true, nil
}

// Restore gives a parameter the value back that it had before Raise.
func (k Proc) Restore(name string, value int) error {
	if err := k.write(Parameter{name, value}); err != nil {
		return fmt.Errorf("set kernel parameter %s back to %d: %w", name, value, err)
	}
	return nil
}

func (k Proc) write(p Parameter) error {
	path := k.path(p.Name)
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o200 == 0 { // how the kernel shows a machine's parameter inside a namespace: not even root may write it
		return ErrNotHere
	}
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = file.WriteString(strconv.Itoa(p.AtLeast))
	return errors.Join(err, file.Close())
}

func (k Proc) path(name string) string { return filepath.Join(string(k), filepath.FromSlash(name)) }
