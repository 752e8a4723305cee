package process

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// shell makes a process that runs a script.
func shell(t *testing.T, script string, change func(*Spec)) *Process {
	t.Helper()
	s := NewSpawner()
	spec := Spec{
		Name:    "script",
		Command: func(context.Context) ([]string, error) { return []string{"/bin/sh", "-c", script}, nil },
		LogFile: filepath.Join(t.TempDir(), "log"),
	}
	if change != nil {
		change(&spec)
	}
	p := New(s, spec)
	t.Cleanup(func() {
		if err := p.Kill(); err != nil {
			t.Error(err)
		}
		s.Close()
	})
	return p
}

func TestProcessLivesAndDiesAsAsked(t *testing.T) {
	p := shell(t, "trap 'echo bye; exit' TERM; touch $READY; while :; do sleep 0.01; done", nil)
	ready := filepath.Join(t.TempDir(), "ready")
	p.spec.Env = []string{"READY=" + ready}
	p.spec.Ready = func(context.Context) error { _, err := os.Stat(ready); return err }
	p.spec.Crashed = func(err error) { t.Errorf("asked to end, but: %v", err) }
	for range 2 { // it can be started again
		if err := p.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := p.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "it runs already") {
			t.Errorf("second start: %v", err)
		}
		if err := p.Pause(); err != nil {
			t.Error(err)
		}
		if !p.Running() || p.PID() == 0 {
			t.Error("a paused program runs")
		}
		if err := p.Stop(); err != nil {
			t.Errorf("stop a paused program: %v", err)
		}
		if p.Running() || p.PID() != 0 {
			t.Error("it still runs after Stop")
		}
		if err := os.Remove(ready); err != nil {
			t.Fatal(err)
		}
	}
	if tail := p.Tail(5); strings.Count(tail, "bye") != 2 {
		t.Errorf("both lives must be in the log: %s", tail)
	}
	if err := errors.Join(p.Stop(), p.Kill()); err != nil {
		t.Errorf("ending what does not run: %v", err)
	}
	if err := p.Pause(); err == nil {
		t.Error("paused what does not run")
	}
}

func TestStartTellsWhyAProgramDidNotGetReady(t *testing.T) {
	p := shell(t, "echo cannot bind port; exit 3", func(s *Spec) {
		s.Ready = func(context.Context) error { return errors.New("no answer") }
		s.Crashed = func(error) {}
	})
	err := p.Start(t.Context())
	if err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "cannot bind port") {
		t.Errorf("got %v", err)
	}
}

func TestCrashIsReported(t *testing.T) {
	crashed := make(chan error, 1)
	p := shell(t, "exit 7", func(s *Spec) { s.Crashed = func(err error) { crashed <- err } })
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-crashed:
		if !strings.Contains(err.Error(), "exit status 7") {
			t.Errorf("got %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("nobody was told")
	}
}

func TestClosedSpawnerKillsAndStartsNothing(t *testing.T) {
	s := NewSpawner()
	died := make(chan error, 1)
	p := New(s, Spec{
		Name:    "sleeper",
		Command: func(context.Context) ([]string, error) { return []string{"/bin/sleep", "1000"}, nil },
		LogFile: filepath.Join(t.TempDir(), "log"),
		Crashed: func(err error) { died <- err },
	})
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.Close()
	select {
	case err := <-died:
		if !strings.Contains(err.Error(), "killed") {
			t.Errorf("got %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("it lives on")
	}
	if err := p.Start(t.Context()); err == nil {
		t.Error("started with a closed spawner")
	}
}

func TestRunIsKilledWithItsChildren(t *testing.T) {
	s := NewSpawner()
	defer s.Close()
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := s.Run(ctx, exec.Command("/bin/sh", "-c", "sleep 1000; echo")); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if out, err := s.Run(t.Context(), exec.Command("/bin/echo", "done")); err != nil || string(out) != "done\n" {
		t.Errorf("got %q, %v", out, err)
	}
}
