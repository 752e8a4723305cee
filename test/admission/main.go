// Command admission measures what it costs a client that addresses and node ports are chosen at admission.
//
// It starts an API server and one controller, makes many Services that a policy covers, and then creates more at a steady rate: first with the webhook, then,
// with the webhook and the controller gone, without. Both are timed by the client, from the moment the request was due, so that a server that falls behind
// cannot hide it. It also reports the API server's and the controller's own histograms of the same requests, and CPU time.
//
//	make build
//	export KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)
//	go run ./test/admission -services 10000 -rate 100 -for 20s
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/go-logr/logr"
	"sigs.k8s.io/controller-runtime/pkg/log"

	"github.com/serviceproxy/serviceproxy-operator/test/kubeapi"
)

type options struct {
	services   int
	rate       int
	during     time.Duration
	controller string
	log        string
}

func main() {
	var o options
	flag.IntVar(&o.services, "services", 10000, "number of Services that are there already")
	flag.IntVar(&o.rate, "rate", 100, "creates per second")
	flag.DurationVar(&o.during, "for", 20*time.Second, "how long the creates go on, with the webhook and without")
	flag.StringVar(&o.controller, "controller", "bin/serviceproxy-controller", "the controller to measure")
	flag.StringVar(&o.log, "log", "", "file for the controller's log (default: shown only if something fails)")
	flag.Parse()
	log.SetLogger(logr.Discard()) // of what is used here, which else complains that it has none
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "admission:", err)
		os.Exit(1)
	}
}

// phase is what was measured while Services were created at the steady rate.
type phase struct {
	created        latencies // as the client saw it
	hook, handler  histogram // as the API server and the controller saw it
	apiServer, own time.Duration
	late           time.Duration // how long after it was due the latest request was sent
}

func run(o options) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if o.rate < 1 || o.services < 1 || o.during < time.Second {
		return errors.New("-services and -rate must be at least 1, -for at least 1s")
	}
	progress("starting an API server and the controller")
	server, err := kubeapi.Start(map[string]string{
		"service-cluster-ip-range": "10.96.0.0/12", "service-node-port-range": "20000-32767",
		"profiling": "false",
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	w, err := newWorld(ctx, server, o)
	if err != nil {
		return err
	}
	defer w.close()
	busy := busyCores()
	progress("filling it with %d Services", o.services)
	took, err := w.fill(ctx)
	if err != nil {
		return err
	}
	progress("filled at %.0f Services per second; %d creates per second for %s with the webhook", float64(o.services)/took.Seconds(), o.rate, o.during)
	with, err := w.measure(ctx, covered, true)
	if err != nil {
		return err
	}
	if err := w.withoutController(ctx); err != nil {
		return err
	}
	progress("and for %s without", o.during)
	without, err := w.measure(ctx, plain, false)
	if err != nil {
		return err
	}
	print(os.Stdout, o, busy, with, without)
	return nil
}

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "admission: "+format+"\n", args...)
}

func print(out io.Writer, o options, busy float64, with, without *phase) {
	fmt.Fprintf(out, "%d Services, %d creates/s for %s, %s, %d CPUs, of which %.1f were busy before\n\n", o.services, o.rate, o.during, runtime.Version(), runtime.NumCPU(), busy)
	fmt.Fprintln(out, "| | p50 | p90 | p99 | max |\n|---|---|---|---|---|")
	row := func(name string, q func(float64) string) {
		fmt.Fprintf(out, "| %s | %s | %s | %s | %s |\n", name, q(.5), q(.9), q(.99), q(1))
	}
	row("a create, with the webhook", func(q float64) string { return ms(with.created.quantile(q)) })
	row("a create, without", func(q float64) string { return ms(without.created.quantile(q)) })
	row("ratio", func(q float64) string {
		return fmt.Sprintf("%.2f", float64(with.created.quantile(q))/float64(without.created.quantile(q)))
	})
	row("admission, as the controller saw it", with.handler.quantile)
	row("admission, as the API server saw it", with.hook.quantile)
	fmt.Fprintf(out, "\n| CPU time per create | with | without |\n|---|---|---|\n")
	creates := time.Duration(len(with.created))
	fmt.Fprintf(out, "| kube-apiserver and etcd | %s | %s |\n", ms(with.apiServer/creates), ms(without.apiServer/time.Duration(len(without.created))))
	fmt.Fprintf(out, "| controller, all that it does about the Service | %s | |\n", ms(with.own/creates))
	fmt.Fprintf(out, "\nThe latest request was sent %s after it was due with the webhook, %s without.\n", ms(with.late), ms(without.late))
}

func ms(d time.Duration) string {
	text := fmt.Sprintf("%.2f ms", float64(d)/1e6)
	if d >= 100*time.Millisecond {
		text = fmt.Sprintf("%.0f ms", float64(d)/1e6)
	}
	return strings.TrimSpace(text)
}
