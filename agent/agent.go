// Package agent runs on every node: it turns ServiceAssignments and EndpointSlices into what the node's kernel forwards, keeps that
// so, and reports what the kernel holds.
//
//	sources → store (compact, what changed) → loop: compile → a dataplane per proxy mode → kernel
//	                                            ↘ reporter → NodeProxyState; conntrack; health, metrics
//
// Start, failure, repair and a change of mode are one code path: a dataplane wants a state and holds another, or holds an unknown one.
// Nothing is programmed before every source has delivered its first list, nothing is taken away because a source fails, and
// stopping leaves the rules in force.
package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/loopback"
	"github.com/serviceproxy/serviceproxy-operator/agent/conntrack"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/agent/healthport"
	"github.com/serviceproxy/serviceproxy-operator/agent/kubeproxy"
	"github.com/serviceproxy/serviceproxy-operator/agent/localhost"
	"github.com/serviceproxy/serviceproxy-operator/agent/sysctl"
)

// Config is what an agent needs to run.
type Config struct {
	// NodeName is the name of the Node that the agent runs on.
	NodeName string
	// Version is reported as the agent's version.
	Version string
	// API says how to reach the API server.
	API *rest.Config
	// Settings are those at the start.
	Settings Settings
	// Changes brings other settings while the agent runs; each takes the place of all before. nil, or closed: they stay as they are.
	Changes <-chan Settings
	// Modes is the table of backends.
	Modes []Mode
	// Conntrack is the node's connection tracking, where UDP flows to endpoints that are gone are ended. nil: they are left to themselves.
	Conntrack *conntrack.Table
	// Health serves /healthz, /livez and /readyz, Metrics serves /metrics, /metrics/services, /proxyMode and Endpoints. nil: not served. Run closes them.
	Health, Metrics net.Listener
	// Endpoints are served beside metrics, by path.
	Endpoints map[string]http.Handler
	// Collectors are shown among the agent's metrics.
	Collectors []prometheus.Collector
	Log        logr.Logger
}

// Run works until ctx ends, which is no error; what the kernel holds then stays. It fails only if it cannot start or a server of its own fails.
func Run(ctx context.Context, c Config) error {
	clients, err := newClients(c.API)
	if err != nil {
		return fmt.Errorf("set up clients of the API server: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		running sync.WaitGroup
		failed  error // of the first server that fails; read once all have ended
		once    sync.Once
	)
	fail := func(err error) {
		once.Do(func() { failed = err })
		cancel()
	}

	s := newStore(c.Settings)
	m := newMetrics(s, c.Version)
	flows := conntrack.New(c.Log.WithName("conntrack"))
	flows.Observe = m.reconciled
	local := localhost.New(c.Log.WithName("localhost"), localhost.Host{Route: func() (bool, error) { return loopback.Route(sysctl.Node()) }})
	defer local.Close()
	changed := func(prev, next *forwarding.Service) {
		if c.Conntrack != nil {
			flows.Changed(prev, next)
		}
		local.Changed(prev, next)
		m.changed(prev, next)
	}
	m.registry.MustRegister(c.Collectors...)
	h := newHealth(s, m)
	r := newReporter(c.Log.WithName("report"), c.Version, clients.writer(c.NodeName))
	// As with kube-proxy, that the node is about to go is left out: its pods end one by one, and load balancers learn of that by the same port.
	checks := healthport.New(c.Log.WithName("healthport"), func() bool { _, ok := h.live(); return ok })
	defer checks.Close()
	modes := &proxyModes{}
	report := func(now Report) {
		r.publish(now)
		modes.publish(now)
	}
	l := newLoop(c.Log, s, c.Modes, m, h, listeners{changed: changed, checked: checks.Set, report: report})

	serve(ctx, &running, fail, "health", c.Health, h.handler())
	serve(ctx, &running, fail, "metrics", c.Metrics, serving(m.handlers(), map[string]http.Handler{"/proxyMode": modes}, c.Endpoints))
	for _, source := range clients.sources(c.Log, c.NodeName, s, r) {
		reflector := source.reflector(c.Log)
		// It is not waited for, because a reflector that is between two attempts to connect sits its delay of many seconds out. It only
		// fills the store, which nobody reads once the loop has ended.
		go reflector.RunWithContext(klog.NewContext(ctx, c.Log.WithName("watch")))
	}
	running.Go(func() { logWaiting(ctx, c.Log, waitingPeriod, c.API.Host, c.NodeName, h.lacks) })
	running.Go(func() { r.run(ctx) })
	beside := &neighbour{log: c.Log.WithName("kube-proxy"), find: kubeproxy.Find, answers: func() bool { return kubeproxy.Answers(c.Health, c.Metrics) }}
	running.Go(func() { beside.watch(ctx, r.beside) })
	kernel := make(chan sysctl.Conntrack)
	running.Go(func() { newTuner(c.Log.WithName("sysctl"), r.tuned).run(ctx, c.Settings.Conntrack, kernel) })
	running.Go(func() { follow(ctx, c.Log, c.Changes, s, kernel) })
	if c.Conntrack != nil {
		running.Go(func() { flows.Run(ctx, c.Conntrack) })
	}

	c.Log.Info("Started", "node", c.NodeName, "version", c.Version)
	err = l.run(ctx)
	running.Wait()
	c.Log.Info("Stopped; the rules stay in force", "node", c.NodeName)
	return errors.Join(failed, err)
}

// follow passes other settings on as they come, until there are no more or ctx ends.
func follow(ctx context.Context, log logr.Logger, changes <-chan Settings, s *store, kernel chan<- sysctl.Conntrack) {
	for {
		select {
		case <-ctx.Done():
			return
		case settings, open := <-changes:
			if !open {
				return
			}
			if waitFor := s.configure(settings); waitFor != "" {
				log.Info("The settings for all Services are not in force yet, those before them are: detectLocalMode NodeCIDR needs what is missing", "missing", waitFor)
			}
			select {
			case kernel <- settings.Conntrack:
			case <-ctx.Done():
				return
			}
		}
	}
}

// serve serves until ctx ends; if it fails before, it ends everything.
func serve(ctx context.Context, running *sync.WaitGroup, fail func(error), what string, ln net.Listener, handler http.Handler) {
	if ln == nil {
		return
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	running.Go(func() {
		if err := server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			fail(fmt.Errorf("serve %s at %s: %w", what, ln.Addr(), err))
		}
	})
	running.Go(func() {
		<-ctx.Done()
		// Probes are short: there is nothing to wait for.
		_ = server.Close()
	})
}
