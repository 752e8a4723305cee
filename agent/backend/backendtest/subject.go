package backendtest

import (
	"context"
	"fmt"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// Subject is what is judged: something that forwards Services on a node.
type Subject interface {
	// Program makes the node forward the world, and returns when it does.
	Program(World) error
	// Restart ends the subject as a crash would, and starts another that finds what the first one left.
	Restart() error
	// Close ends it.
	Close() error
}

// Starter starts a subject in a node's network namespace.
type Starter func(node *netns.NS) (Subject, error)

// Backend gives the starter of a backend. The function that makes one is called on a thread in the node's namespace.
func Backend(open func() (backend.Backend, error)) Starter {
	return func(node *netns.NS) (Subject, error) {
		s := &backendSubject{node: node, open: open}
		err := s.start()
		return s, err
	}
}

type backendSubject struct {
	node    *netns.NS
	open    func() (backend.Backend, error)
	backend backend.Backend
	// applied is nil until the first success after a start.
	applied *forwarding.State
	last    forwarding.State
}

func (s *backendSubject) start() error {
	s.applied = nil
	return s.node.Do(func() (err error) { s.backend, err = s.open(); return err })
}

func (s *backendSubject) Program(w World) error {
	s.last = w.State()
	return s.apply()
}

// apply programs last, and reads it back.
func (s *backendSubject) apply() error {
	ctx := context.Background()
	if err := s.backend.Apply(ctx, s.applied, s.last); err != nil {
		s.applied = nil
		return fmt.Errorf("apply: %w", err)
	}
	applied := s.last
	s.applied = &applied
	drifts, err := s.backend.Verify(ctx, s.last)
	if err != nil {
		return fmt.Errorf("verify: %w", err)
	}
	if len(drifts) > 0 {
		return fmt.Errorf("after an Apply the kernel differs: %v", drifts)
	}
	return nil
}

func (s *backendSubject) Restart() error {
	if err := s.backend.Close(); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	if err := s.start(); err != nil {
		return err
	}
	return s.apply()
}

func (s *backendSubject) Close() error { return s.backend.Close() }
