// Package process runs the programs of an embedded cluster, each with a log file, so that none outlives the process that
// started it, however that one ends.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// stopGrace is how long a program has to end when asked before it is killed.
const stopGrace = 10 * time.Second

// Spawner starts programs that the kernel kills as soon as this process is gone, SIGKILL included.
//
// The kernel ties that to the *thread* that forked (PR_SET_PDEATHSIG), not to the process, because of which all programs of
// a spawner are forked by one thread that lives until Close. Close thus kills what still runs.
type Spawner struct {
	work   chan func()
	closed chan struct{}
}

// NewSpawner starts the thread that forks.
func NewSpawner() *Spawner {
	s := &Spawner{work: make(chan func()), closed: make(chan struct{})}
	locked := make(chan struct{})
	go s.fork(locked)
	<-locked
	return s
}

// fork starts programs until Close, on a thread of its own that ends with it.
func (s *Spawner) fork(locked chan struct{}) {
	runtime.LockOSThread()
	if syscall.Gettid() == os.Getpid() {
		// The main thread never ends before its process: Go parks it instead. As long as it is held here, another goroutine
		// cannot get it.
		go s.fork(locked)
		<-locked
		runtime.UnlockOSThread()
		return
	}
	close(locked) // never unlocked: the thread ends with the goroutine
	for {
		select {
		case f := <-s.work:
			f()
		case <-s.closed:
			return
		}
	}
}

// Close kills every program that the spawner started and that still runs. Nothing can be started after.
func (s *Spawner) Close() { close(s.closed) }

func (s *Spawner) start(cmd *exec.Cmd, ns *netns.NS) (err error) {
	done := make(chan struct{})
	fork := func() {
		defer close(done)
		if ns == nil {
			err = cmd.Start()
			return
		}
		err = ns.Start(cmd)
	}
	select {
	case s.work <- fork:
		<-done
		return err
	case <-s.closed:
		return errors.New("the cluster is closed")
	}
}

// Run runs a program that ends by itself and gives its output. When the context ends it is killed, with its children.
func (s *Spawner) Run(ctx context.Context, cmd *exec.Cmd) ([]byte, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	cmd.WaitDelay = time.Second // a grandchild that holds our pipe shall not hold us
	if err := s.start(cmd, nil); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) //nolint:errcheck // it may have ended just now
	})
	defer stop()
	err := cmd.Wait()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return out.Bytes(), err
}

// Spec says what a Process runs.
type Spec struct {
	// Name is used in messages.
	Name string
	// Command is the program's path and arguments. It is called at each start.
	Command func(context.Context) ([]string, error)
	// Env is added to the environment.
	Env []string
	// LogFile takes stdout and stderr; a restart appends.
	LogFile string
	// NS is the network namespace to run in; nil: that of this process.
	NS *netns.NS
	// Ready tells whether the program works. Start polls it. Nil: it does as soon as it runs.
	Ready func(context.Context) error
	// StopSignal is how Stop asks the program to end; default SIGTERM.
	StopSignal syscall.Signal
	// Crashed is called when the program ends without having been asked to. Optional.
	Crashed func(error)
}

// Process is a program that can be started, stopped, killed and paused any number of times. Its methods are safe to call at
// any time from any goroutine.
type Process struct {
	spec    Spec
	spawner *Spawner

	mu  sync.Mutex
	run *run // nil before the first start
}

// run is one life of the program.
type run struct {
	cmd   *exec.Cmd
	done  chan struct{} // closed when it has ended
	asked bool          // guarded by Process.mu: to end
	err   error         // valid once done is closed
}

// New makes a process that does not run yet.
func New(s *Spawner, spec Spec) *Process {
	if spec.StopSignal == 0 {
		spec.StopSignal = syscall.SIGTERM
	}
	return &Process{spec: spec, spawner: s}
}

// Name is the process's name in messages.
func (p *Process) Name() string { return p.spec.Name }

// LogFile is where its output goes.
func (p *Process) LogFile() string { return p.spec.LogFile }

// Running tells whether the program runs now. A paused program runs.
func (p *Process) Running() bool {
	r := p.current()
	return r != nil && !r.ended()
}

// PID is the program's process ID, 0 if it does not run.
func (p *Process) PID() int {
	if r := p.current(); r != nil && !r.ended() {
		return r.cmd.Process.Pid
	}
	return 0
}

// Start starts the program and waits until it is ready. An error carries the end of its log; the program is then not running.
func (p *Process) Start(ctx context.Context) error {
	command, err := p.spec.Command(ctx)
	if err != nil {
		return fmt.Errorf("start %s: %w", p.spec.Name, err)
	}
	r, err := p.fork(command)
	if err != nil {
		return fmt.Errorf("start %s: %w", p.spec.Name, err)
	}
	if err := p.awaitReady(ctx, r); err != nil {
		if errors.Is(ctx.Err(), context.Canceled) { // who interrupts does not want to read logs
			return errors.Join(fmt.Errorf("start %s: %w", p.spec.Name, context.Cause(ctx)), p.Kill())
		}
		return errors.Join(fmt.Errorf("start %s: %w\n%s", p.spec.Name, err, p.Tail(15)), p.Kill())
	}
	return nil
}

func (p *Process) fork(command []string) (*run, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.run != nil && !p.run.ended() {
		return nil, errors.New("it runs already")
	}
	if err := os.MkdirAll(filepath.Dir(p.spec.LogFile), 0o755); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(p.spec.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()

	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), p.spec.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL,
		// A process group of its own, because Ctrl-C goes to the terminal's whole group and would end everything at once and in no order.
		Setpgid: true,
	}
	if err := p.spawner.start(cmd, p.spec.NS); err != nil {
		return nil, err
	}
	r := &run{cmd: cmd, done: make(chan struct{})}
	p.run = r
	go p.wait(r)
	return r, nil
}

func (p *Process) wait(r *run) {
	r.err = r.cmd.Wait()
	p.mu.Lock()
	asked := r.asked
	p.mu.Unlock()
	close(r.done)
	if !asked && p.spec.Crashed != nil {
		p.spec.Crashed(fmt.Errorf("%s ended by itself (%s)\n%s", p.spec.Name, r.cmd.ProcessState, p.Tail(15)))
	}
}

func (p *Process) awaitReady(ctx context.Context, r *run) error {
	if p.spec.Ready == nil {
		return nil
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		notReady := p.spec.Ready(ctx)
		if notReady == nil {
			return nil
		}
		select {
		case <-r.done:
			return fmt.Errorf("it ended (%s)", r.cmd.ProcessState)
		case <-ctx.Done():
			return fmt.Errorf("%w: not ready: %w", context.Cause(ctx), notReady)
		case <-tick.C:
		}
	}
}

// Stop asks the program to end, waits until it has, and kills it if it takes too long, which is an error. It is no
// error if the program does not run.
func (p *Process) Stop() error {
	r, err := p.end(p.spec.StopSignal)
	if r == nil || err != nil {
		return err
	}
	// A paused program gets its SIGTERM only when it goes on.
	if err := signal(r, syscall.SIGCONT); err != nil {
		return err
	}
	timeout := time.NewTimer(stopGrace)
	defer timeout.Stop()
	select {
	case <-r.done:
		return nil
	case <-timeout.C:
		return errors.Join(fmt.Errorf("%s did not end within %v of %s: killed", p.spec.Name, stopGrace, p.spec.StopSignal), p.Kill())
	}
}

// Kill ends the program with SIGKILL and waits until it is gone. It is no error if the program does not run.
func (p *Process) Kill() error {
	r, err := p.end(syscall.SIGKILL)
	if r == nil || err != nil {
		return err
	}
	<-r.done
	return nil
}

// Pause stops the program where it is (SIGSTOP), sockets and all, until Resume.
func (p *Process) Pause() error { return p.mustSignal(syscall.SIGSTOP) }

// Resume lets a paused program go on.
func (p *Process) Resume() error { return p.mustSignal(syscall.SIGCONT) }

// Tail gives the last lines of the log.
func (p *Process) Tail(lines int) string {
	log, err := os.ReadFile(p.spec.LogFile)
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimRight(log, "\n"), []byte("\n"))
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "the end of %s:", p.spec.LogFile)
	for _, l := range all {
		fmt.Fprintf(&b, "\n  %s", l)
	}
	return b.String()
}

func (p *Process) current() *run {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.run
}

// end sends a signal that means to end. The run is nil if there is none.
func (p *Process) end(sig syscall.Signal) (*run, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.run == nil || p.run.ended() {
		return nil, nil
	}
	p.run.asked = true
	return p.run, signal(p.run, sig)
}

func (p *Process) mustSignal(sig syscall.Signal) error {
	r := p.current()
	if r == nil || r.ended() {
		return fmt.Errorf("%s does not run", p.spec.Name)
	}
	return signal(r, sig)
}

// signal is no error if the program has just ended.
func signal(r *run, sig syscall.Signal) error {
	if err := r.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

func (r *run) ended() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}
