// Command demo tells the story of a Service on a cluster of three nodes inside this machine, and exits 0 only if all of it held.
//
//	go run ./test/demo          the story; then everything is gone                  (make demo)
//	go run ./test/demo --keep   the same, but the cluster stays up in the background (make demo KEEP=1)
//	go run ./test/demo --down   ends the cluster that --keep left                   (make demo-down)
//
// Run it anywhere inside a checkout, as root: nodes and pods are network namespaces. kube-apiserver and its like come from
// hack/tools/kubernetes/build.sh, which it calls (KUBEBUILDER_ASSETS is honoured). Nothing of the machine's own network is touched.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/go-logr/logr"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/serviceproxy/serviceproxy-operator/test/cluster"
)

// clusterName is the cluster's, and the prefix of its namespaces' names.
const clusterName = "demo"

// storyTimeout bounds everything but the building of tools.
const storyTimeout = 15 * time.Minute

func main() {
	keep := flag.Bool("keep", false, "leave the cluster up in the background when the story has been told")
	down := flag.Bool("down", false, "end the cluster that --keep left")
	flag.Parse()
	ctrllog.SetLogger(logr.Discard()) // the client's library would warn, in the middle of the story, that nobody had set one
	if flag.NArg() > 0 || *keep && *down {
		fmt.Fprintln(os.Stderr, "usage: demo [--keep | --down]")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), cluster.Interrupts...)
	ctx = endWithGoRun(ctx)

	var err error
	switch {
	case os.Getenv(supervisorEnv) != "":
		err = supervise(ctx)
	case *down:
		err = takeDown(ctx)
	case *keep:
		err = startSupervisor(ctx)
	default:
		err = run(ctx, os.Stdout)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// run tells the story from beginning to end and leaves nothing.
func run(ctx context.Context, out io.Writer) error {
	c, err := tell(ctx, out, make(crashes, 1))
	if c == nil {
		return err
	}
	if err == nil {
		fmt.Fprintln(out, "\nThe story held. Taking the cluster down.")
	}
	return errors.Join(err, c.Close())
}

// tell starts a cluster and tells the story, which a program that crashes ends. The caller closes the cluster, which is nil only after an error.
// After an error the logs are kept.
func tell(ctx context.Context, out io.Writer, ended crashes) (*cluster.Cluster, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, storyTimeout, fmt.Errorf("not done after %v", storyTimeout))
	defer cancel()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	go func() {
		select {
		case err := <-ended:
			fail(err)
		case <-ctx.Done():
		}
	}()
	s := &story{out: out, colours: isTerminal(out)}
	s.scene("A cluster of three nodes on this machine")
	c, err := cluster.Start(ctx, cluster.Options{Name: clusterName, Nodes: 3, Proxy: true, Progress: indented{out}, Crashed: ended.add})
	if err != nil {
		return nil, err
	}
	s.c = c
	if err := s.tell(ctx); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = errors.Join(err, cause)
		}
		logs := filepath.Join(os.TempDir(), "serviceproxy-demo-logs")
		s.failed(ctx, err, logs)
		return c, errors.Join(errors.New("the story did not hold"), c.SaveLogs(logs))
	}
	return c, nil
}

// endWithGoRun gives a context that ends with `go run`, if that is our parent: go run passes no SIGTERM on, so that an interrupted
// make would leave the demo behind, talking to nobody.
func endWithGoRun(ctx context.Context) context.Context {
	parent := os.Getppid()
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", parent))
	if err != nil || strings.TrimSpace(string(name)) != "go" {
		return ctx
	}
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		for range time.Tick(200 * time.Millisecond) {
			if os.Getppid() != parent {
				cancel(errors.New("go run has ended"))
				return
			}
		}
	}()
	return ctx
}

// indented writes every line with some space before it.
type indented struct{ io.Writer }

func (w indented) Write(p []byte) (int, error) {
	_, err := fmt.Fprint(w.Writer, indent(string(p)))
	return len(p), err
}

func indent(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString("    " + line)
	}
	return b.String()
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
