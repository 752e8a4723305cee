package backendtest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/go-logr/logr/funcr"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	loopbackrouting "github.com/serviceproxy/serviceproxy-operator/agent/backend/loopback"
	"github.com/serviceproxy/serviceproxy-operator/agent/conntrack"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/agent/localhost"
	"github.com/serviceproxy/serviceproxy-operator/agent/sysctl"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// Subject is what is judged: something that forwards Services on a node.
type Subject interface {
	// Program makes the node forward the world, and returns when it does. A world that the subject cannot be told of is errors.ErrUnsupported.
	Program(World) error
	// Restart ends the subject as a crash would, and starts another that finds what the first one left.
	Restart() error
	// Close ends it.
	Close() error
}

// Breaker is a Subject that notices when something else changes its rules, and repairs them. It is optional: rows about it are not applicable to a Subject
// without it.
type Breaker interface {
	// Break changes the subject's rules behind its back, in one way after the other, and after each waits until the subject has repaired them.
	Break() error
}

// Starter starts a subject in a node's network namespace.
type Starter func(node *netns.NS) (Subject, error)

// Breakage is a way in which something else may change a backend's rules.
type Breakage struct {
	Name string
	Do   func(node *netns.NS) error
}

// Backend gives the starter of a backend, together with what the agent runs beside it. open makes a backend; it is called on a thread in the node's
// namespace. Each of the breakages must leave the kernel different from what the backend wants.
func Backend(open func() (backend.Backend, error), breakages ...Breakage) Starter {
	return func(node *netns.NS) (Subject, error) {
		s := &backendSubject{node: node, open: open, breakages: breakages, repaired: make(chan struct{}, 1)}
		err := s.start()
		return s, err
	}
}

// backendSubject does with a backend what the agent does.
type backendSubject struct {
	node      *netns.NS
	open      func() (backend.Backend, error)
	breakages []Breakage
	repaired  chan struct{} // one pending signal stands for any number of repairs

	stop    context.CancelFunc
	running sync.WaitGroup
	table   *conntrack.Table
	cleaner *conntrack.Cleaner
	local   *localhost.Proxy

	mu      sync.Mutex // for what follows
	backend backend.Backend
	// applied is what the kernel holds, nil if that is unknown; settled is what the last success established since the start, and outlives failures.
	applied       *forwarding.State
	settled, last forwarding.State

	trouble sync.Mutex // by itself, because what is told of changes may complain at once
	failed  error      // of what runs beside
}

var _ Breaker = (*backendSubject)(nil)

func (s *backendSubject) start() (err error) {
	s.applied, s.settled = nil, forwarding.State{}
	err = s.node.Do(func() (err error) {
		if s.table, err = conntrack.Open(); err != nil {
			return err
		}
		s.backend, err = s.open()
		return err
	})
	if err != nil {
		return err
	}
	failing := funcr.New(func(_, line string) { s.fail(errors.New(line)) }, funcr.Options{Verbosity: -1}) // errors only
	s.cleaner = conntrack.New(failing)
	s.local = localhost.New(failing, localhost.Host{Do: s.node.Do, Route: func() (bool, error) { return loopbackrouting.Route(sysctl.Kernel) }})
	var ctx context.Context
	ctx, s.stop = context.WithCancel(context.Background())
	s.running.Go(func() { s.cleaner.Run(ctx, s.table) })
	drifted := s.backend.Drifted()
	s.running.Go(func() { s.watch(ctx, drifted) })
	return nil
}

// end ends what start started, as a crash would: nothing is finished.
func (s *backendSubject) end() error {
	s.stop()
	s.running.Wait()
	s.local.Close()
	s.table.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.trouble.Lock()
	defer s.trouble.Unlock()
	return errors.Join(s.failed, s.backend.Close())
}

func (s *backendSubject) fail(err error) {
	s.trouble.Lock()
	defer s.trouble.Unlock()
	s.failed = errors.Join(s.failed, err)
}

// watch looks at the kernel when something may have changed it, and repairs it.
func (s *backendSubject) watch(ctx context.Context, drifted <-chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-drifted:
		}
		if err := s.repair(ctx); err != nil && ctx.Err() == nil {
			s.fail(fmt.Errorf("repair: %w", err))
		}
	}
}

func (s *backendSubject) repair(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.applied == nil {
		return nil // about to be read back anyway
	}
	drifts, err := s.backend.Verify(ctx, *s.applied)
	if err != nil || len(drifts) == 0 {
		return err
	}
	s.applied = nil
	if err := s.apply(ctx); err != nil {
		return err
	}
	select {
	case s.repaired <- struct{}{}:
	default:
	}
	return nil
}

func (s *backendSubject) Program(w World) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = w.State()
	return s.program(context.Background())
}

// program makes the kernel hold last, and reads it back.
func (s *backendSubject) program(ctx context.Context) error {
	if err := s.apply(ctx); err != nil {
		return err
	}
	drifts, err := s.backend.Verify(ctx, s.last)
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	if len(drifts) > 0 {
		return fmt.Errorf("after an Apply the kernel differs: %v", drifts)
	}
	return nil
}

func (s *backendSubject) apply(ctx context.Context) error {
	next := s.last
	if err := s.backend.Apply(ctx, s.applied, next); err != nil {
		s.applied = nil
		return fmt.Errorf("apply: %w", err)
	}
	for c := range forwarding.Changes(s.settled, next) {
		s.cleaner.Changed(c.Prev, c.Next)
		s.local.Changed(c.Prev, c.Next)
	}
	s.applied, s.settled = &next, next
	return nil
}

func (s *backendSubject) Restart() error {
	if err := s.end(); err != nil {
		return fmt.Errorf("end: %w", err)
	}
	if err := s.start(); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.program(context.Background())
}

// Break implements Breaker.
func (s *backendSubject) Break() error {
	if len(s.breakages) == 0 {
		return errors.New("the backend's conformance test names no breakage")
	}
	for _, b := range s.breakages {
		select {
		case <-s.repaired:
		default:
		}
		if err := b.Do(s.node); err != nil {
			return fmt.Errorf("%s: %w", b.Name, err)
		}
		select {
		case <-s.repaired:
		case <-time.After(10 * time.Second):
			return fmt.Errorf("%s: not repaired within 10 s", b.Name)
		}
	}
	return nil
}

func (s *backendSubject) Close() error { return s.end() }
