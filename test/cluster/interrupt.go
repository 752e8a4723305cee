package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// startTimeout bounds the start of a test's cluster: many times what it takes on a busy machine with everything built.
const startTimeout = 10 * time.Minute

// Interrupts are the signals that ask a program to end.
var Interrupts = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP}

// StartInterruptible is Start for programs that handle no signals themselves: a signal that asks the program to end, during the
// start or later, first closes the cluster.
func StartInterruptible(ctx context.Context, o Options) (*Cluster, error) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, Interrupts...)
	starting, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	started := make(chan *Cluster, 1)
	go func() {
		sig := <-signals
		cancel(fmt.Errorf("interrupted by %s", sig))
		if c := <-started; c != nil {
			if err := c.Close(); err != nil {
				fmt.Fprintln(os.Stderr, "close the cluster:", err)
			}
		}
		signal.Stop(signals)
		signal.Reset(sig)
		if err := syscall.Kill(os.Getpid(), sig.(syscall.Signal)); err != nil {
			os.Exit(1)
		}
	}()
	c, err := Start(starting, o)
	started <- c // after an error nil: nothing is left to close
	return c, err
}

// StartT starts a cluster for a test and closes it after. If the test fails, the logs are kept, and the test's log tells where.
// For tests of package testing: ginkgo handles signals itself, a ginkgo suite uses Start and Close.
func StartT(t testing.TB, o Options) *Cluster {
	t.Helper()
	netns.RequireRoot(t)
	if o.Progress == nil {
		o.Progress = t.Output()
	}
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	c, err := StartInterruptible(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var err error
		if t.Failed() {
			kept := filepath.Join(os.TempDir(), "serviceproxy-logs-"+strings.NewReplacer("/", "-", " ", "-").Replace(t.Name()))
			err = c.SaveLogs(kept)
			t.Log("the cluster's logs are in", kept)
		}
		if err := errors.Join(err, c.Close()); err != nil {
			t.Errorf("close the cluster: %v", err)
		}
	})
	return c
}
