// Command scale measures whole proxies side by side: the agent of this project and, as its peer, kube-proxy in nftables mode.
//
// It starts an API server, fills it with services × endpoints, and then runs each proxy as a real process in a network
// namespace of its own, one after the other, against the same objects. It reports, for the whole process and its children: CPU and
// wall time of a cold start, of a restart with the rules in place, CPU and latency of one endpoint changed, CPU at a steady
// rate of changes, and resident memory.
//
//	go run ./test/scale -services 10000            # needs root; KUBEBUILDER_ASSETS names the folder of etcd, kube-apiserver, kube-proxy
//
// Latency is from the API server's answer to the change until the kernel commits a transaction of the proxy, seen by a
// listener of nftables notifications in the namespace, which is the same for every proxy.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

type options struct {
	services, endpoints int
	proxies             string
	changes             int
	churnRate           int
	churnFor            time.Duration
	agent               string
	keepLogs            string
}

func main() {
	var o options
	flag.IntVar(&o.services, "services", 10000, "number of Services")
	flag.IntVar(&o.endpoints, "endpoints", 10, "endpoints of each Service")
	flag.StringVar(&o.proxies, "proxies", "serviceproxy,kube-proxy", "which proxies to measure, in this order")
	flag.IntVar(&o.changes, "changes", 20, "how many single changes to measure, each after the last has settled")
	flag.IntVar(&o.churnRate, "churn", 50, "changes per second of the steady load")
	flag.DurationVar(&o.churnFor, "churn-for", 20*time.Second, "how long the steady load lasts")
	flag.StringVar(&o.agent, "agent", "bin/serviceproxy-agent", "the agent to measure")
	flag.StringVar(&o.keepLogs, "logs", "", "folder for the proxies' logs (default: a temporary one, removed at the end)")
	flag.Parse()
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "scale:", err)
		os.Exit(1)
	}
}

func run(o options) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if os.Geteuid() != 0 {
		return errors.New("needs root: it makes network namespaces and programs their kernel")
	}
	assets := os.Getenv("KUBEBUILDER_ASSETS")
	if assets == "" {
		return errors.New("KUBEBUILDER_ASSETS is unset: set it to $(hack/tools/kubernetes/build.sh etcd kube-apiserver kube-proxy)")
	}
	logs := o.keepLogs
	if logs == "" {
		dir, err := os.MkdirTemp("", "scale-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		logs = dir
	}
	programs := map[string]program{"serviceproxy": agentProgram(o.agent), "kube-proxy": kubeProxyProgram(filepath.Join(assets, "kube-proxy"))}
	var names []string
	for name := range strings.SplitSeq(o.proxies, ",") {
		p, ok := programs[name]
		if !ok {
			return fmt.Errorf("-proxies: %q is unknown; valid: serviceproxy, kube-proxy", name)
		}
		if _, err := os.Stat(p.path); err != nil {
			return fmt.Errorf("-proxies: %s: %w", name, err)
		}
		names = append(names, name)
	}

	progress("starting an API server")
	world, err := newWorld(ctx, assets, o.services, o.endpoints)
	if err != nil {
		return err
	}
	defer world.close()
	progress("filling it with %d services × %d endpoints", o.services, o.endpoints)
	if err := world.fill(ctx); err != nil {
		return err
	}
	results := map[string]*result{}
	for _, name := range names {
		progress("measuring %s", name)
		r, err := measure(ctx, world, programs[name], o, filepath.Join(logs, name+".log"))
		if err != nil {
			return fmt.Errorf("%s: %w (log: %s, kept with -logs)", name, err, filepath.Join(logs, name+".log"))
		}
		results[name] = r
	}
	print(o, names, results)
	return nil
}

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "scale: "+format+"\n", args...)
}

// result holds what one proxy cost. CPU counts user and system time of the process and of its children.
type result struct {
	coldCPU, coldWall       time.Duration
	restartCPU, restartWall time.Duration
	changeCPU               time.Duration   // per change
	latencies               []time.Duration // sorted
	churnCPU                float64         // cores
	churnDone               int             // changes really made
	rss, peak               int64           // bytes, of the process
	childPeak               int64           // bytes, of its children together
}

func print(o options, names []string, results map[string]*result) {
	fmt.Printf("%d services × %d endpoints, %s, %d CPUs, kernel %s\n\n", o.services, o.endpoints, runtime.Version(), runtime.NumCPU(), kernelRelease())
	rows := []struct {
		what string
		cell func(*result) string
	}{
		{"cold start, wall", func(r *result) string { return ms(r.coldWall) }},
		{"cold start, CPU", func(r *result) string { return ms(r.coldCPU) }},
		{"restart with the rules in place, wall", func(r *result) string { return ms(r.restartWall) }},
		{"restart with the rules in place, CPU", func(r *result) string { return ms(r.restartCPU) }},
		{"one endpoint changed, CPU of the whole process", func(r *result) string { return ms(r.changeCPU) }},
		{"one endpoint changed, latency, median", func(r *result) string { return ms(quantile(r.latencies, 0.5)) }},
		{"one endpoint changed, latency, max", func(r *result) string { return ms(quantile(r.latencies, 1)) }},
		{fmt.Sprintf("%d changes/s, CPU", o.churnRate), func(r *result) string { return fmt.Sprintf("%.1f %% of a core", 100*r.churnCPU) }},
		{"resident memory after it", func(r *result) string { return mib(r.rss) }},
		{"peak resident memory", func(r *result) string { return mib(r.peak) }},
		{"peak resident memory of its children", func(r *result) string { return mib(r.childPeak) }},
	}
	fmt.Printf("| |%s|\n|---|%s\n", strings.Join(names, "|"), strings.Repeat("---|", len(names)))
	for _, row := range rows {
		fmt.Printf("| %s |", row.what)
		for _, name := range names {
			fmt.Printf(" %s |", row.cell(results[name]))
		}
		fmt.Println()
	}
}

func ms(d time.Duration) string {
	if d < 10*time.Millisecond {
		return fmt.Sprintf("%.2f ms", float64(d)/1e6)
	}
	return fmt.Sprintf("%.0f ms", float64(d)/1e6)
}

func mib(b int64) string { return fmt.Sprintf("%.0f MiB", float64(b)/(1<<20)) }

// quantile of a sorted slice.
func quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	return d[min(len(d)-1, int(q*float64(len(d))))]
}

func sorted(d []time.Duration) []time.Duration { return slices.Sorted(slices.Values(d)) }

func kernelRelease() string {
	var u syscall.Utsname
	if err := syscall.Uname(&u); err != nil {
		return "unknown"
	}
	var b strings.Builder
	for _, c := range u.Release {
		if c == 0 {
			break
		}
		b.WriteByte(byte(c))
	}
	return b.String()
}
