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
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"github.com/serviceproxy/serviceproxy-operator/agent"
	"github.com/serviceproxy/serviceproxy-operator/agent/conntrack"
	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/cmd/internal/configuration"
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

// reloadPeriod is how often the configuration file is looked at.
const reloadPeriod = 2 * time.Second

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var cleanup bool
	p := program(&cleanup)
	common, err := p.Parse(args, stderr)
	if err != nil {
		return err
	}
	if common.Version {
		_, err := fmt.Fprintln(stdout, versionOf())
		return err
	}
	live, err := configuration.Start(p, common.File, args)
	if err != nil {
		return err
	}
	c := live.Configuration()
	if common.Print {
		return configuration.Print(stdout, c)
	}
	var level slog.LevelVar
	level.Set(levels[c.Logging.Level])
	log := newLogger(c.Logging.Format, &level, stderr)
	klog.SetLogger(log.WithName("client-go"))

	if cleanup {
		log.Info("Removing everything that the agent put into this node's kernel; open connections through services end")
		return agent.Cleanup(ctx, log, agent.Modes())
	}
	if c.HostnameOverride == "" {
		return errors.New("--node-name \"\": must be the name of the Node that the agent runs on; hostnameOverride in the configuration or the environment variable NODE_NAME do as well")
	}
	warn(log, c)
	changes := make(chan agent.Settings)
	ac, err := agentConfig(c, log)
	if err != nil {
		return err
	}
	ac.Changes, ac.Endpoints, ac.Collectors = changes, live.Handlers(profiling), live.Collectors("serviceproxy_agent_")
	return follow(ctx, live, log, func(ctx context.Context, c *config.AgentConfiguration) {
		warn(log, c)
		level.Set(levels[c.Logging.Level])
		select {
		case changes <- settingsOf(c):
		case <-ctx.Done():
		}
	}, ac)
}

// follow runs the agent, and meanwhile follows the configuration file.
func follow(ctx context.Context, live *configuration.Live[*config.AgentConfiguration], log logr.Logger, apply func(context.Context, *config.AgentConfiguration), ac agent.Config) error {
	ctx, cancel := context.WithCancel(ctx)
	var following sync.WaitGroup
	following.Go(func() {
		live.Follow(ctx, log.WithName("configuration"), reloadPeriod, func(c *config.AgentConfiguration) { apply(ctx, c) })
	})
	err := agent.Run(ctx, ac)
	cancel()
	following.Wait()
	return err
}

func profiling(c *config.AgentConfiguration) bool { return c.EnableProfiling }

// agentConfig opens what the agent needs of its surroundings.
func agentConfig(c *config.AgentConfiguration, log logr.Logger) (agent.Config, error) {
	api, err := apiConfig(c.ClientConnection.Kubeconfig)
	if err != nil {
		return agent.Config{}, err
	}
	flows, err := conntrack.Open()
	if err != nil {
		log.Error(err, "No access to connection tracking: UDP flows to endpoints that are gone end only when their clients rest")
		flows = nil
	}
	health, err := listen("healthzBindAddress (--health-bind-address)", c.HealthzBindAddress)
	if err != nil {
		return agent.Config{}, err
	}
	metrics, err := listen("metricsBindAddress (--metrics-bind-address)", c.MetricsBindAddress)
	if err != nil {
		return agent.Config{}, err
	}
	return agent.Config{
		NodeName: c.HostnameOverride, Version: versionOf(), API: api, Settings: settingsOf(c), Modes: agent.Modes(),
		Conntrack: flows, Health: health, Metrics: metrics, Log: log,
	}, nil
}

func apiConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		kubeconfig = os.Getenv("KUBECONFIG")
	}
	if kubeconfig == "" {
		config, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("no clientConnection.kubeconfig (--kubeconfig) is given and this is no Pod with a service account: %w", err)
		}
		return config, nil
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("clientConnection.kubeconfig (--kubeconfig) %q: %w", kubeconfig, err)
	}
	return config, nil
}

// listen gives nil for nowhere.
func listen(name, address string) (net.Listener, error) {
	if address == config.Nowhere {
		return nil, nil
	}
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s %q: %w; must be a free HOST:PORT or :PORT of this node, or 0 for nowhere", name, address, err)
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
