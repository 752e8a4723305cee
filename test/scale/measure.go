package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// program is a proxy to measure.
type program struct {
	path string
	args func(kubeconfig string) []string
}

func agentProgram(path string) program {
	return program{path, func(kubeconfig string) []string {
		return []string{"--kubeconfig", kubeconfig, "--node-name", nodeName, "--cluster-cidr", podCIDR}
	}}
}

func kubeProxyProgram(path string) program {
	return program{path, func(kubeconfig string) []string {
		return []string{"--kubeconfig", kubeconfig, "--hostname-override", nodeName, "--proxy-mode", "nftables", "--cluster-cidr", podCIDR,
			// Sysctls of the machine that a namespace cannot set.
			"--conntrack-max-per-core", "0", "--conntrack-min", "0", "--conntrack-tcp-timeout-established", "0", "--conntrack-tcp-timeout-close-wait", "0",
			"--nodeport-addresses", nodeAddress + "/32"}
	}}
}

// settled is how long the kernel's rules must have been at rest for a load to be over. kube-proxy's own minimum between two syncs is 1 s.
const settled = 3 * time.Second

// measure runs the proxy in a namespace of its own: a cold start, single changes, a steady load, a restart.
func measure(ctx context.Context, w *world, p program, o options, logFile string) (*result, error) {
	ns, err := netns.New()
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	for _, cmd := range [][]string{{"ip", "link", "set", "lo", "up"}, {"ip", "addr", "add", nodeAddress + "/32", "dev", "lo"}} {
		if _, err := ns.Run(cmd[0], cmd[1:]...); err != nil {
			return nil, err
		}
	}
	relay, err := w.relay(ns)
	if err != nil {
		return nil, err
	}
	defer relay.Close()
	kubeconfig, err := w.kubeconfig()
	if err != nil {
		return nil, err
	}
	commits, err := watchCommits(ns)
	if err != nil {
		return nil, err
	}
	defer commits.close()
	log, err := os.Create(logFile)
	if err != nil {
		return nil, err
	}
	defer log.Close()

	var r result
	proxy, err := start(ns, p, kubeconfig, log)
	if err != nil {
		return nil, err
	}
	defer func() { proxy.stop() }()
	if r.coldWall, r.coldCPU, err = loadTime(ctx, proxy, commits, w); err != nil {
		return nil, fmt.Errorf("cold start: %w", err)
	}
	progress("  loaded after %s", ms(r.coldWall))
	if err := singleChanges(ctx, w, proxy, commits, o, &r); err != nil {
		return nil, fmt.Errorf("single changes: %w", err)
	}
	if err := churn(ctx, w, proxy, commits, o, &r); err != nil {
		return nil, fmt.Errorf("steady load: %w", err)
	}
	if r.rss, r.peak, err = proxy.memory(); err != nil {
		return nil, err
	}
	proxy.stop()
	r.childPeak = proxy.childPeak.Load()

	progress("  restarting it")
	if proxy, err = start(ns, p, kubeconfig, log); err != nil {
		return nil, err
	}
	if r.restartWall, r.restartCPU, err = loadTime(ctx, proxy, commits, w); err != nil {
		return nil, fmt.Errorf("restart: %w", err)
	}
	return &r, nil
}

// loadTime waits until a new proxy serves: one change made after its start has reached the kernel and the rules are at rest. The cost of that
// change is in the figures; it is small beside a load. Wall time ends at the last commit.
func loadTime(ctx context.Context, p *process, c *commits, w *world) (wall, cpu time.Duration, err error) {
	start := p.started
	c.forget()
	// Without a write a restart might need none, and its end could not be seen.
	if err := w.change(ctx, 0); err != nil {
		return 0, 0, err
	}
	last, err := c.waitQuiet(ctx, p, 10*time.Minute)
	if err != nil {
		return 0, 0, err
	}
	cpu, err = p.cpu()
	return last.Sub(start), cpu, err
}

func singleChanges(ctx context.Context, w *world, p *process, c *commits, o options, r *result) error {
	before, err := p.cpu()
	if err != nil {
		return err
	}
	began := time.Now()
	for n := range o.changes {
		c.forget()
		if err := w.change(ctx, (n*7919)%w.services); err != nil {
			return err
		}
		answered := time.Now()
		first, err := c.waitFirst(ctx, p, time.Minute)
		if err != nil {
			return err
		}
		r.latencies = append(r.latencies, max(0, first.Sub(answered)))
		if _, err := c.waitQuiet(ctx, p, time.Minute); err != nil {
			return err
		}
	}
	after, err := p.cpu()
	if err != nil {
		return err
	}
	took := time.Since(began)
	// What the proxy uses when nothing changes is not the price of a change.
	idle, err := idleCPU(ctx, p, settled)
	if err != nil {
		return err
	}
	r.changeCPU = max(0, (after-before)-time.Duration(float64(took)*idle)) / time.Duration(o.changes)
	r.latencies = sorted(r.latencies)
	return nil
}

// idleCPU gives the share of a core that the proxy uses at rest.
func idleCPU(ctx context.Context, p *process, during time.Duration) (float64, error) {
	before, err := p.cpu()
	if err != nil {
		return 0, err
	}
	if err := pause(ctx, during); err != nil {
		return 0, err
	}
	after, err := p.cpu()
	return float64(after-before) / float64(during), err
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

func churn(ctx context.Context, w *world, p *process, c *commits, o options, r *result) error {
	before, err := p.cpu()
	if err != nil {
		return err
	}
	start := time.Now()
	tick := time.NewTicker(time.Second / time.Duration(o.churnRate))
	defer tick.Stop()
	for time.Since(start) < o.churnFor {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
		if err := w.change(ctx, (r.churnDone*104729)%w.services); err != nil {
			return err
		}
		r.churnDone++
	}
	took := time.Since(start)
	if _, err := c.waitQuiet(ctx, p, 5*time.Minute); err != nil {
		return err
	}
	after, err := p.cpu()
	if err != nil {
		return err
	}
	// Work that the load left behind counts, spread over the time of the load.
	r.churnCPU = float64(after-before) / float64(took)
	return nil
}

// process is a running proxy.
type process struct {
	cmd     *exec.Cmd
	started time.Time
	done    chan error    // its exit status, once
	ended   chan struct{} // closed when it has ended
	// childPeak is in bytes.
	childPeak atomic.Int64
}

func start(ns *netns.NS, p program, kubeconfig string, log *os.File) (*process, error) {
	cmd := exec.Command(p.path, p.args(kubeconfig)...)
	cmd.Stdout, cmd.Stderr = log, log
	pr := &process{cmd: cmd, started: time.Now(), done: make(chan error, 1), ended: make(chan struct{})}
	if err := ns.Start(cmd); err != nil {
		return nil, err
	}
	go pr.sampleChildren()
	go func() {
		pr.done <- cmd.Wait()
		close(pr.ended)
		close(pr.done)
	}()
	return pr, nil
}

// stop ends the proxy as a node's shutdown would, and waits for its end.
func (p *process) stop() {
	select {
	case <-p.ended:
		return
	default:
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		progress("stop %s: %v", p.cmd.Path, err)
	}
	select {
	case <-p.ended:
	case <-time.After(20 * time.Second):
		if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			progress("kill %s: %v", p.cmd.Path, err)
		}
		<-p.ended
	}
}

// cpu is the user and system time of the process and of its children, living or ended.
func (p *process) cpu() (time.Duration, error) {
	select {
	case err := <-p.done:
		return 0, fmt.Errorf("the proxy ended: %w", err)
	default:
	}
	total, err := cpuOf(strconv.Itoa(p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	// The kernel adds a child to its parent's time only when it has ended, which for a large `nft -f` is a minute later.
	for _, child := range p.children() {
		if t, err := cpuOf(child); err == nil { // else it has just ended
			total += t
		}
	}
	return total, nil
}

// cpuOf is the time of a process, which the kernel tells to the nanosecond, and of its ended children, which it tells in ticks.
func cpuOf(pid string) (time.Duration, error) {
	b, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), ") ") // the command's name may hold blanks
	fields := strings.Fields(rest)
	if len(fields) < 15 {
		return 0, fmt.Errorf("/proc/%s/stat has only %d fields", pid, len(fields))
	}
	var ticks int64
	for _, f := range fields[13:15] { // cutime, cstime
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	id, err := strconv.Atoi(pid)
	if err != nil {
		return 0, err
	}
	var own unix.Timespec
	const cpuClockSched = 2 // clock_getcpuclockid(3): a process's clock is ~pid<<3 | 2
	if err := unix.ClockGettime(int32(^id<<3|cpuClockSched), &own); err != nil {
		return 0, err
	}
	return time.Duration(own.Nano()) + time.Duration(ticks)*(time.Second/100), nil // USER_HZ is 100 wherever Go runs on Linux
}

// children gives the process ids of the living children, nil if there are none or the process has ended.
func (p *process) children() []string {
	// A child belongs to the thread that started it.
	threads := fmt.Sprintf("/proc/%d/task", p.cmd.Process.Pid)
	tasks, err := os.ReadDir(threads)
	if err != nil {
		return nil
	}
	var pids []string
	for _, task := range tasks {
		if b, err := os.ReadFile(filepath.Join(threads, task.Name(), "children")); err == nil {
			pids = append(pids, strings.Fields(string(b))...)
		}
	}
	return pids
}

func (p *process) memory() (rss, peak int64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		if name != "VmRSS" && name != "VmHWM" {
			continue
		}
		kib, err := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
		if err != nil {
			return 0, 0, err
		}
		if name == "VmRSS" {
			rss = kib << 10
		} else {
			peak = kib << 10
		}
	}
	return rss, peak, nil
}

// sampleChildren keeps the largest sum of resident memory that the process's children were seen to have, until the process ends.
func (p *process) sampleChildren() {
	page := int64(os.Getpagesize())
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-p.ended:
			return
		case <-tick.C:
		}
		var sum int64
		for _, pid := range p.children() {
			statm, err := os.ReadFile("/proc/" + pid + "/statm")
			if err != nil {
				continue // the child has ended
			}
			if f := strings.Fields(string(statm)); len(f) > 1 {
				if pages, err := strconv.ParseInt(f[1], 10, 64); err == nil {
					sum += pages * page
				}
			}
		}
		if sum > p.childPeak.Load() {
			p.childPeak.Store(sum)
		}
	}
}

// commits tells when the kernel committed nftables transactions in a namespace.
type commits struct {
	fd   int
	seen chan time.Time
}

func watchCommits(ns *netns.NS) (*commits, error) {
	c := &commits{seen: make(chan time.Time, 1<<16)}
	err := ns.Do(func() (err error) {
		if c.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER); err != nil {
			return err
		}
		if err := unix.Bind(c.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20); err != nil {
			return err
		}
		return unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.NFNLGRP_NFTABLES)
	})
	if err != nil {
		return nil, fmt.Errorf("listen for nftables notifications: %w", err)
	}
	go func() {
		buf := make([]byte, 1<<20)
		for {
			_, _, err := unix.Recvfrom(c.fd, buf, 0)
			if err == unix.ENOBUFS || err == unix.EINTR {
				err = nil // a burst that overflows the buffer is a commit like any other
			}
			if err != nil {
				return
			}
			select {
			case c.seen <- time.Now():
			default: // the waiter only needs to know that there was one
			}
		}
	}()
	return c, nil
}

func (c *commits) close() {
	if err := unix.Shutdown(c.fd, unix.SHUT_RDWR); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		progress("close notifications: %v", err)
	}
	if err := unix.Close(c.fd); err != nil {
		progress("close notifications: %v", err)
	}
}

// forget drops what was seen so far.
func (c *commits) forget() {
	for {
		select {
		case <-c.seen:
		default:
			return
		}
	}
}

func (c *commits) waitFirst(ctx context.Context, p *process, limit time.Duration) (time.Time, error) {
	select {
	case t := <-c.seen:
		return t, nil
	case err := <-p.done:
		return time.Time{}, fmt.Errorf("the proxy ended: %w", err)
	case <-ctx.Done():
		return time.Time{}, context.Cause(ctx)
	case <-time.After(limit):
		return time.Time{}, fmt.Errorf("the kernel's rules did not change within %s", limit)
	}
}

// waitQuiet waits until the rules and the proxy's CPU are at rest, and gives the time of the last commit, or now if there was none.
func (c *commits) waitQuiet(ctx context.Context, p *process, limit time.Duration) (time.Time, error) {
	deadline := time.Now().Add(limit)
	last := time.Now()
	cpu, err := p.cpu()
	if err != nil {
		return last, err
	}
	for time.Now().Before(deadline) {
		quiet := time.After(settled)
	listen:
		for {
			select {
			case last = <-c.seen:
				quiet = time.After(settled)
			case <-ctx.Done():
				return last, context.Cause(ctx)
			case <-quiet:
				break listen
			}
		}
		now, err := p.cpu()
		if err != nil {
			return last, err
		}
		if now-cpu < settled/10 { // less than a tenth of a core
			return last, nil
		}
		cpu = now
	}
	return last, fmt.Errorf("the proxy did not come to rest within %s", limit)
}
