// Command controller is the central controller of serviceproxy-operator: it allocates addresses, compiles assignments and reports what nodes have programmed.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"runtime/debug"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	webhookserver "sigs.k8s.io/controller-runtime/pkg/webhook"

	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/cmd/internal/configuration"
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
	p := program()
	common, err := p.Parse(args, os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if common.Version {
		fmt.Println(buildVersion())
		return nil
	}
	// The controller does not follow its file, because a restart costs it nothing: another replica leads, and nodes go on forwarding.
	live, err := configuration.Start(p, common.File, args)
	if err != nil {
		return err
	}
	c := live.Configuration()
	if common.Print {
		return configuration.Print(os.Stdout, c)
	}
	ctrl.SetLogger(newLogger(c.Logging))
	api, err := apiConfig(c.ClientConnection.Kubeconfig)
	if err != nil {
		return err
	}
	var certificate webhook.Certificate
	handlers := live.Handlers(func(c *config.ControllerConfiguration) bool { return c.EnableProfiling })
	mgr, err := newManager(api, c, handlers, &certificate)
	if err != nil {
		return err
	}
	if err := checkCRDs(mgr.GetRESTMapper()); err != nil {
		return err
	}
	if err := controllers.SetupWithManager(mgr, controllers.Options{Namespace: c.Namespace, Admission: servesWebhook(c), HandBackGrace: c.KubeProxy.HandBackGracePeriod.Duration}); err != nil {
		return err
	}
	if err := programmed.SetupWithManager(mgr, programmed.Options{}); err != nil {
		return fmt.Errorf("set up the reconciler of Programmed: %w", err)
	}
	if err := enforcement.SetupWithManager(mgr, enforcement.Options{Namespace: c.Namespace}); err != nil {
		return err
	}
	if err := webhook.SetupWithManager(mgr, webhookOptions(c, &certificate)); err != nil {
		return err
	}
	return mgr.Start(ctx)
}

func newLogger(l config.Logging) logr.Logger {
	options := &slog.HandlerOptions{Level: slog.LevelInfo}
	if l.Level == config.LogDebug {
		options.Level = slog.LevelDebug
	}
	if l.Format == config.LogJSON {
		return logr.FromSlogHandler(slog.NewJSONHandler(os.Stderr, options))
	}
	return logr.FromSlogHandler(slog.NewTextHandler(os.Stderr, options))
}

func apiConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig != "" {
		api, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
		if err != nil {
			return nil, fmt.Errorf("clientConnection.kubeconfig (--kubeconfig) %q: %w", kubeconfig, err)
		}
		return api, nil
	}
	api, err := ctrl.GetConfig()
	if err != nil {
		return nil, fmt.Errorf("find the cluster (clientConnection.kubeconfig, --kubeconfig, KUBECONFIG or a pod's service account): %w", err)
	}
	return api, nil
}

// newManager makes a manager that serves handlers beside its metrics.
func newManager(api *rest.Config, c *config.ControllerConfiguration, handlers map[string]http.Handler, certificate *webhook.Certificate) (ctrl.Manager, error) {
	// No limit of our own: somebody's request waits for what admission asks for, and the API server's priority and fairness (config/flowcontrol) protects it better.
	api.QPS = -1
	api.UserAgent = "serviceproxy-controller/" + buildVersion()
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	options := ctrl.Options{
		Scheme:                        scheme,
		Cache:                         cache.Options{DefaultTransform: cache.TransformStripManagedFields(), NewInformer: controllers.NewInformer, ByObject: webhook.Cache(c.Namespace)},
		Metrics:                       metricsserver.Options{BindAddress: c.MetricsBindAddress, ExtraHandlers: configuration.WithIndex(handlers, "/metrics")},
		HealthProbeBindAddress:        c.HealthzBindAddress,
		LeaderElection:                c.LeaderElection.LeaderElect,
		LeaderElectionID:              "serviceproxy-controller",
		LeaderElectionNamespace:       c.Namespace,
		LeaderElectionReleaseOnCancel: true, // main ends right after the manager, so the next leader need not wait
		GracefulShutdownTimeout:       new(10 * time.Second),
	}
	if servesWebhook(c) {
		host, port, err := hostPort(c.Webhook.BindAddress)
		if err != nil {
			return nil, err
		}
		options.WebhookServer = webhookserver.NewServer(webhookserver.Options{Host: host, Port: port, TLSOpts: []func(*tls.Config){certificate.Configure}})
	}
	mgr, err := ctrl.NewManager(api, options)
	if err != nil {
		return nil, fmt.Errorf("reach the cluster at %s: %w", api.Host, err)
	}
	return mgr, errors.Join(mgr.AddHealthzCheck("ping", healthz.Ping), mgr.AddReadyzCheck("ping", healthz.Ping))
}

// webhookOptions say that this process serves the webhook with the certificate, unless the configuration says that it serves none.
func webhookOptions(c *config.ControllerConfiguration, certificate *webhook.Certificate) webhook.Options {
	if !servesWebhook(c) {
		certificate = nil
	}
	return webhook.Options{Namespace: c.Namespace, URL: c.Webhook.URL, Certificate: certificate}
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
