package backendtest

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Outcome is what became of a row of the table.
type Outcome string

const (
	Kept          Outcome = "kept"
	Broken        Outcome = "broken"
	NotApplicable Outcome = "not applicable"
)

// Result is what became of one row for one subject.
type Result struct {
	Row     string
	Outcome Outcome
	// Log is what the row said, in all of its tries.
	Log   string
	Tries int
	Took  time.Duration
}

// Lenience is how a row is judged.
type Lenience uint8

const (
	// Strict rows have one try.
	Strict Lenience = iota
	// Lenient rows that break are tried again, three times in all: of a subject that is not ours we want to know what it can do, not how often it loses a race.
	Lenient
	// Doomed rows are known to break: they have one try, in which nobody waits long.
	Doomed
)

// Judge runs the whole table as Run does, and tells what became of each row where Run fails.
func Judge(t testing.TB, start Starter, lenience func(row string) Lenience, each func(Result)) {
	lab := newLab(t, start)
	lab.addReplicas()
	for _, s := range Table() {
		began := time.Now()
		r := Result{Row: s.Name, Outcome: Broken}
		how, tries := lenience(s.Name), 1
		if how == Lenient {
			tries = 3
		}
		for r.Outcome == Broken && r.Tries < tries {
			r.Tries++
			var log string
			r.Outcome, log = attempt(t, lab, s, how == Doomed)
			r.Log += log
		}
		r.Took = time.Since(began)
		each(r)
	}
}

// attempt runs a row once.
func attempt(t testing.TB, lab *Lab, s Scenario, hasty bool) (Outcome, string) {
	a := &try{TB: t, name: t.Name() + "/" + s.Name, hasty: hasty}
	var cancel context.CancelFunc
	a.ctx, cancel = context.WithCancel(t.Context())
	same := *lab
	same.TB = a
	done := make(chan struct{})
	go func() { // FailNow and SkipNow end a goroutine
		defer close(done)
		defer a.cleanUp()
		defer cancel()
		s.Run(&same)
	}()
	<-done
	switch {
	case a.Failed():
		return Broken, a.log.String()
	case a.Skipped():
		return NotApplicable, a.log.String()
	}
	return Kept, a.log.String()
}

// settled is how long flows may take to find the right place: they are ended beside the path that programs the rules.
func (l *Lab) settled() time.Duration {
	if a, ok := l.TB.(*try); ok && a.hasty {
		return 2 * time.Second
	}
	return 15 * time.Second
}

// try is the testing.TB of one try of a row: what happens to it does not happen to the test that it is a part of.
type try struct {
	testing.TB
	name string
	ctx  context.Context
	// hasty says that it will break, so that nobody should wait long for it.
	hasty bool

	mu              sync.Mutex // for what follows
	failed, skipped bool
	log             strings.Builder
	cleanups        []func()
}

func (a *try) Name() string             { return a.name }
func (a *try) Context() context.Context { return a.ctx }
func (a *try) Helper()                  {}

func (a *try) Cleanup(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cleanups = append(a.cleanups, f)
}

func (a *try) cleanUp() {
	a.mu.Lock()
	list := slices.Clone(a.cleanups)
	a.mu.Unlock()
	for _, f := range slices.Backward(list) {
		f()
	}
}

func (a *try) mark(failed, skipped bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.failed, a.skipped = a.failed || failed, a.skipped || skipped
}

func (a *try) Failed() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.failed
}

func (a *try) Skipped() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.skipped
}

func (a *try) Fail()    { a.mark(true, false) }
func (a *try) FailNow() { a.Fail(); runtime.Goexit() }
func (a *try) SkipNow() { a.mark(false, true); runtime.Goexit() }

func (a *try) Log(args ...any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	fmt.Fprintln(&a.log, args...)
}

func (a *try) Logf(format string, args ...any)   { a.Log(fmt.Sprintf(format, args...)) }
func (a *try) Error(args ...any)                 { a.Log(args...); a.Fail() }
func (a *try) Errorf(format string, args ...any) { a.Logf(format, args...); a.Fail() }
func (a *try) Fatal(args ...any)                 { a.Log(args...); a.FailNow() }
func (a *try) Fatalf(format string, args ...any) { a.Logf(format, args...); a.FailNow() }
func (a *try) Skip(args ...any)                  { a.Log(args...); a.SkipNow() }
func (a *try) Skipf(format string, args ...any)  { a.Logf(format, args...); a.SkipNow() }
