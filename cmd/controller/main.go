// Command controller is the central controller of serviceproxy-operator: it allocates addresses, compiles assignments and reports what nodes have programmed.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers"
	"github.com/serviceproxy/serviceproxy-operator/controllers/programmed"
)

// version is set by the linker; without it the module's own version is shown.
var version string

// +kubebuilder:rbac:groups=coordination.k8s.io,namespace=serviceproxy-system,resources=leases,verbs=get;create;update

func main() {
	if err := run(ctrl.SetupSignalHandler(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "controller:", err)
		os.Exit(1)
	}
}

type flags struct {
	leaderElect                  bool
	leaderNamespace              string
	metricsAddress, probeAddress string
	version                      bool
	verbosity                    int
}

func parseFlags(args []string) (flags, error) {
	var f flags
	fs := flag.NewFlagSet("controller", flag.ContinueOnError)
	if kubeconfig := flag.CommandLine.Lookup("kubeconfig"); kubeconfig != nil {
		fs.Var(kubeconfig.Value, kubeconfig.Name, kubeconfig.Usage) // registered by controller-runtime
	}
	fs.BoolVar(&f.leaderElect, "leader-elect", false, "let one replica of several work at a time")
	fs.StringVar(&f.leaderNamespace, "leader-election-namespace", "", "namespace of the leader's Lease; default: the namespace this pod runs in")
	fs.StringVar(&f.metricsAddress, "metrics-bind-address", ":8080", "address of /metrics, 0 for none")
	fs.StringVar(&f.probeAddress, "health-probe-bind-address", ":8081", "address of /healthz and /readyz, 0 for none")
	fs.BoolVar(&f.version, "version", false, "print the version and exit")
	fs.IntVar(&f.verbosity, "v", 0, "log verbosity: 0, or 1 for debugging")
	if err := fs.Parse(args); err != nil {
		return f, err
	}
	if fs.NArg() > 0 {
		return f, fmt.Errorf("unexpected argument %q: all settings are flags", fs.Arg(0))
	}
	return f, errors.Join(checkAddress("--metrics-bind-address", f.metricsAddress), checkAddress("--health-probe-bind-address", f.probeAddress))
}

// checkAddress fails if address is no place to listen at. The manager would find out only once everything else runs.
func checkAddress(name, address string) error {
	if address == "0" {
		return nil
	}
	if _, err := net.ResolveTCPAddr("tcp", address); err != nil || address == "" {
		return fmt.Errorf("%s %q: must be HOST:PORT or :PORT, or 0 for none", name, address)
	}
	return nil
}

func run(ctx context.Context, args []string) error {
	f, err := parseFlags(args)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if f.version {
		fmt.Println(buildVersion())
		return nil
	}
	// logr's V(n) is slog's level -n.
	ctrl.SetLogger(logr.FromSlogHandler(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.Level(-f.verbosity)})))
	config, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("find the cluster (--kubeconfig, KUBECONFIG or a pod's service account): %w", err)
	}
	mgr, err := newManager(config, f)
	if err != nil {
		return err
	}
	if err := checkCRDs(mgr.GetRESTMapper()); err != nil {
		return err
	}
	if err := controllers.SetupWithManager(mgr, controllers.Options{}); err != nil {
		return err
	}
	if err := programmed.SetupWithManager(mgr, programmed.Options{}); err != nil {
		return fmt.Errorf("set up the reconciler of Programmed: %w", err)
	}
	return mgr.Start(ctx)
}

func newManager(config *rest.Config, f flags) (ctrl.Manager, error) {
	// Writes are one claim and one assignment per Service; the API server's priority and fairness protects it better than a limit here.
	config.QPS, config.Burst = 500, 1000
	config.UserAgent = "serviceproxy-controller/" + buildVersion()
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	mgr, err := ctrl.NewManager(config, ctrl.Options{
		Scheme:                        scheme,
		Cache:                         cache.Options{DefaultTransform: cache.TransformStripManagedFields(), NewInformer: controllers.NewInformer},
		Metrics:                       metricsserver.Options{BindAddress: f.metricsAddress},
		HealthProbeBindAddress:        f.probeAddress,
		LeaderElection:                f.leaderElect,
		LeaderElectionID:              "serviceproxy-controller",
		LeaderElectionNamespace:       f.leaderNamespace,
		LeaderElectionReleaseOnCancel: true, // main ends right after the manager, so the next leader need not wait
		GracefulShutdownTimeout:       new(10 * time.Second),
	})
	if err != nil {
		return nil, fmt.Errorf("reach the cluster at %s: %w", config.Host, err)
	}
	return mgr, errors.Join(mgr.AddHealthzCheck("ping", healthz.Ping), mgr.AddReadyzCheck("ping", healthz.Ping))
}

// checkCRDs fails with what to do about it if a CRD is missing; informers would only log and wait.
func checkCRDs(mapper meta.RESTMapper) error {
	for _, kind := range []string{"ServiceProxyPolicy", "ServiceAssignment", "AllocationClaim", "NodeProxyState"} {
		gk := schema.GroupKind{Group: v1alpha1.GroupVersion.Group, Kind: kind}
		_, err := mapper.RESTMapping(gk, v1alpha1.GroupVersion.Version)
		if meta.IsNoMatchError(err) {
			return fmt.Errorf("the cluster does not know %s %s: install the CRDs first (kubectl apply -f config/crd/bases)", v1alpha1.GroupVersion, kind)
		} else if err != nil {
			return fmt.Errorf("ask the cluster for %s: %w", kind, err)
		}
	}
	return nil
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}
