// Command controller is the central controller of serviceproxy-operator: it allocates addresses, compiles assignments and reports what nodes have programmed.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"log/slog"
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
	webhookserver "sigs.k8s.io/controller-runtime/pkg/webhook"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers"
	"github.com/serviceproxy/serviceproxy-operator/controllers/enforcement"
	"github.com/serviceproxy/serviceproxy-operator/controllers/programmed"
	"github.com/serviceproxy/serviceproxy-operator/controllers/webhook"
)

// version is set by the linker; without it the module's own version is shown.
var version string

// +kubebuilder:rbac:groups=coordination.k8s.io,namespace=serviceproxy-system,resources=leases,verbs=get;create;update
// Leader election tells who leads by events of the core group, all else by those of events.k8s.io.
// +kubebuilder:rbac:groups="",namespace=serviceproxy-system,resources=events,verbs=create;patch

func main() {
	if err := run(ctrl.SetupSignalHandler(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "controller:", err)
		os.Exit(1)
	}
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
	var certificate webhook.Certificate
	mgr, err := newManager(config, f, &certificate)
	if err != nil {
		return err
	}
	if err := checkCRDs(mgr.GetRESTMapper()); err != nil {
		return err
	}
	if err := controllers.SetupWithManager(mgr, controllers.Options{Namespace: f.namespace, Admission: f.servesWebhook()}); err != nil {
		return err
	}
	if err := programmed.SetupWithManager(mgr, programmed.Options{}); err != nil {
		return fmt.Errorf("set up the reconciler of Programmed: %w", err)
	}
	if err := enforcement.SetupWithManager(mgr, enforcement.Options{Namespace: f.namespace}); err != nil {
		return err
	}
	if err := webhook.SetupWithManager(mgr, f.webhookOptions(&certificate)); err != nil {
		return err
	}
	return mgr.Start(ctx)
}

func newManager(config *rest.Config, f flags, certificate *webhook.Certificate) (ctrl.Manager, error) {
	// No limit of our own: somebody's request waits for what admission asks for, and the API server's priority and fairness (config/flowcontrol) protects it better.
	config.QPS = -1
	config.UserAgent = "serviceproxy-controller/" + buildVersion()
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	options := ctrl.Options{
		Scheme:                        scheme,
		Cache:                         cache.Options{DefaultTransform: cache.TransformStripManagedFields(), NewInformer: controllers.NewInformer, ByObject: webhook.Cache(f.namespace)},
		Metrics:                       metricsserver.Options{BindAddress: f.metricsAddress},
		HealthProbeBindAddress:        f.probeAddress,
		LeaderElection:                f.leaderElect,
		LeaderElectionID:              "serviceproxy-controller",
		LeaderElectionNamespace:       f.namespace,
		LeaderElectionReleaseOnCancel: true, // main ends right after the manager, so the next leader need not wait
		GracefulShutdownTimeout:       new(10 * time.Second),
	}
	if f.servesWebhook() {
		host, port := f.webhookHostPort()
		options.WebhookServer = webhookserver.NewServer(webhookserver.Options{Host: host, Port: port, TLSOpts: []func(*tls.Config){certificate.Configure}})
	}
	mgr, err := ctrl.NewManager(config, options)
	if err != nil {
		return nil, fmt.Errorf("reach the cluster at %s: %w", config.Host, err)
	}
	return mgr, errors.Join(mgr.AddHealthzCheck("ping", healthz.Ping), mgr.AddReadyzCheck("ping", healthz.Ping))
}

// webhookOptions say that this process serves the webhook with the certificate, unless a flag says that it serves none.
func (f flags) webhookOptions(certificate *webhook.Certificate) webhook.Options {
	if !f.servesWebhook() {
		certificate = nil
	}
	return webhook.Options{Namespace: f.namespace, URL: f.webhookURL, Certificate: certificate}
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
