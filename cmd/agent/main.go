// Command agent runs on every node and makes its kernel forward the Services that the controller assigned.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/go-logr/logr"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/serviceproxy/serviceproxy-operator/agent"
	"github.com/serviceproxy/serviceproxy-operator/agent/conntrack"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// version is set by the linker (-X main.version=...).
var version = ""

// gcPercent is lower than Go's default of 100: nearly all of the agent's memory is long-lived and small changes make little garbage,
// so collecting at half again the live heap costs next to no CPU and keeps the peak of the first load down. GOGC in the environment wins.
const gcPercent = 50

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

// options are the flags.
type options struct {
	nodeName, kubeconfig, clusterCIDR    string
	healthAddress, metricsAddress, level string
	cleanup, version                     bool
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	flags := flag.NewFlagSet("agent", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&o.nodeName, "node-name", os.Getenv("NODE_NAME"), "name of the Node that the agent runs on (default: environment NODE_NAME)")
	flags.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig file (default: environment KUBECONFIG, else the Pod's service account)")
	flags.StringVar(&o.clusterCIDR, "cluster-cidr", "", "ranges of the cluster's pods, separated by commas, of either or both families; traffic to service IPs from anywhere else is masqueraded")
	flags.StringVar(&o.healthAddress, "health-bind-address", ":10256", "where /healthz, /livez and /readyz are served; empty for nowhere")
	flags.StringVar(&o.metricsAddress, "metrics-bind-address", "127.0.0.1:10249", "where /metrics is served; empty for nowhere")
	flags.StringVar(&o.level, "log-level", "info", "info or debug")
	flags.BoolVar(&o.cleanup, "cleanup", false, "remove everything that the agent put into this node's kernel and exit; open connections through services end")
	flags.BoolVar(&o.version, "version", false, "print the version and exit")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q: the agent takes flags only", flags.Arg(0))
	}
	return o, nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := parse(args, stderr)
	if err != nil {
		return err
	}
	if o.version {
		_, err := fmt.Fprintln(stdout, versionOf())
		return err
	}
	clusterCIDRs, err := parseCIDRs(o.clusterCIDR)
	if err != nil {
		return fmt.Errorf("--cluster-cidr %w", err)
	}
	log, err := newLogger(o.level, stderr)
	if err != nil {
		return err
	}
	klog.SetLogger(log.WithName("client-go"))

	modes := agent.Modes()
	if o.cleanup {
		log.Info("Removing everything that the agent put into this node's kernel; open connections through services end")
		return agent.Cleanup(ctx, log, modes)
	}
	if o.nodeName == "" {
		return errors.New("--node-name \"\": must be the name of the Node that the agent runs on; the environment variable NODE_NAME does as well")
	}
	api, err := apiConfig(o.kubeconfig)
	if err != nil {
		return err
	}
	flows, err := conntrack.Open()
	if err != nil {
		log.Error(err, "No access to connection tracking: UDP flows to endpoints that are gone end only when their clients rest")
		flows = nil
	}
	health, err := listen("--health-bind-address", o.healthAddress)
	if err != nil {
		return err
	}
	metrics, err := listen("--metrics-bind-address", o.metricsAddress)
	if err != nil {
		return err
	}
	return agent.Run(ctx, agent.Config{
		NodeName: o.nodeName, Settings: agent.Settings{Pods: forwarding.PodTraffic{Sources: clusterCIDRs}}, Version: versionOf(), API: api, Modes: modes, Conntrack: flows, Health: health, Metrics: metrics, Log: log,
	})
}

// parseCIDRs reads ranges separated by commas.
func parseCIDRs(list string) ([]netip.Prefix, error) {
	const valid = "must be CIDRs such as 10.244.0.0/16, separated by commas"
	if list == "" {
		return nil, nil
	}
	var out []netip.Prefix
	for s := range strings.SplitSeq(list, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(s))
		if err != nil {
			return nil, fmt.Errorf("%q: %q is no CIDR: %s", list, s, valid)
		}
		if p != p.Masked() {
			return nil, fmt.Errorf("%q: %s has bits set after its length, did you mean %s? %s", list, p, p.Masked(), valid)
		}
		out = append(out, p)
	}
	return out, nil
}

func newLogger(level string, to io.Writer) (logr.Logger, error) {
	levels := map[string]slog.Level{"info": slog.LevelInfo, "debug": slog.LevelDebug}
	min, ok := levels[level]
	if !ok {
		return logr.Logger{}, fmt.Errorf("--log-level %q: must be info or debug", level)
	}
	return logr.FromSlogHandler(slog.NewTextHandler(to, &slog.HandlerOptions{Level: min})), nil
}

func apiConfig(kubeconfig string) (*rest.Config, error) {
	flagged := kubeconfig != ""
	if !flagged {
		kubeconfig = os.Getenv("KUBECONFIG")
	}
	if kubeconfig == "" {
		config, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("no --kubeconfig is given and this is no Pod with a service account: %w", err)
		}
		return config, nil
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("--kubeconfig %q: %w", kubeconfig, err)
	}
	return config, nil
}

// listen gives nil for an empty address.
func listen(name, address string) (net.Listener, error) {
	if address == "" {
		return nil, nil
	}
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s %q: %w; must be a free HOST:PORT or :PORT of this node, or empty for nowhere", name, address, err)
	}
	return ln, nil
}

func versionOf() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}
