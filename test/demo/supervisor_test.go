package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
)

// fakeProgram is a program that runs once it was started, if it can be.
type fakeProgram struct {
	name    string
	running bool
	starts  int
	err     error
}

func (p *fakeProgram) Name() string  { return p.name }
func (p *fakeProgram) Running() bool { return p.running }

func (p *fakeProgram) Start(context.Context) error {
	p.starts++
	p.running = p.err == nil
	return p.err
}

func TestReviveStartsWhatEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended, running := &fakeProgram{name: "agent on node1"}, &fakeProgram{name: "agent on node2", running: true}
		broken := &fakeProgram{name: "controller", err: errors.New("no such file")}
		var out strings.Builder
		revive(t.Context(), &out, []program{broken, ended, running})
		if ended.starts != 1 || running.starts != 0 || broken.starts != 1 {
			t.Errorf("started %d, %d and %d times, want 1, 0 and 1", ended.starts, running.starts, broken.starts)
		}
		for _, want := range []string{"agent on node1: started again", "controller: no such file"} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("does not say %q:\n%s", want, &out)
			}
		}
		interrupted, cancel := context.WithCancel(t.Context())
		cancel()
		ended.running = false
		revive(interrupted, &out, []program{ended})
		if ended.starts != 1 {
			t.Error("a program was started although the cluster is about to go")
		}
	})
}
