package main

import (
	"cmp"
	"flag"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/cmd/internal/configuration"
)

// program says how the controller is configured.
func program() configuration.Program[*config.ControllerConfiguration] {
	return configuration.Program[*config.ControllerConfiguration]{
		Name: "controller", Kind: config.ControllerKind,
		New:    func() *config.ControllerConfiguration { return &config.ControllerConfiguration{} },
		Define: define,
		Environment: func(c *config.ControllerConfiguration) {
			c.Namespace = cmp.Or(c.Namespace, podNamespace(podNamespaceFile))
		},
	}
}

// define defines the flags that set fields of the configuration.
func define(flags *flag.FlagSet, c *config.ControllerConfiguration) map[string]string {
	flags.StringVar(&c.ClientConnection.Kubeconfig, "kubeconfig", c.ClientConnection.Kubeconfig, "kubeconfig file (default: environment KUBECONFIG, else the Pod's service account, else ~/.kube/config)")
	flags.BoolVar(&c.LeaderElection.LeaderElect, "leader-elect", c.LeaderElection.LeaderElect, "let one replica of several work at a time; all of them answer admission")
	flags.StringVar(&c.Namespace, "namespace", c.Namespace,
		"where this controller runs: the namespace of its Lease, of the webhook's certificate and of the Service serviceproxy-webhook (default: environment POD_NAMESPACE, else the Pod's own)")
	flags.Var(configuration.Address{To: &c.MetricsBindAddress}, "metrics-bind-address", "address of /metrics and /configz, empty or 0 for none")
	flags.Var(configuration.Address{To: &c.HealthzBindAddress}, "health-probe-bind-address", "address of /healthz and /readyz, empty or 0 for none")
	flags.Var(configuration.Address{To: &c.Webhook.BindAddress}, "webhook-bind-address",
		"address where API servers reach the admission webhook, empty or 0 for none: the webhook's configuration is taken away then")
	flags.StringVar(&c.Webhook.URL, "webhook-url", c.Webhook.URL, "https://HOST:PORT of the webhook as API servers reach it, for a controller outside of the cluster; default: the Service serviceproxy-webhook")
	flags.DurationVar(&c.KubeProxy.HandBackGracePeriod.Duration, "hand-back-grace-period", c.KubeProxy.HandBackGracePeriod.Duration,
		"for how long nodes still forward a Service that was handed back to kube-proxy: longer than kube-proxy's full sync takes")
	flags.Var(verbosity{&c.Logging.Level}, "v", "log verbosity: 0, or 1 for debugging")
	return map[string]string{
		"kubeconfig":                "clientConnection.kubeconfig",
		"leader-elect":              "leaderElection.leaderElect",
		"namespace":                 "namespace",
		"metrics-bind-address":      "metricsBindAddress",
		"health-probe-bind-address": "healthzBindAddress",
		"webhook-bind-address":      "webhook.bindAddress",
		"webhook-url":               "webhook.url",
		"hand-back-grace-period":    "kubeProxy.handBackGracePeriod",
		"v":                         "logging.level",
	}
}

// verbosity is a flag that sets a log level by number.
type verbosity struct{ level *config.LogLevel }

func (v verbosity) String() string {
	if v.level != nil && *v.level == config.LogDebug {
		return "1"
	}
	return "0"
}

func (v verbosity) Set(value string) error {
	n, err := strconv.ParseUint(value, 10, 31)
	if err != nil {
		return fmt.Errorf("must be 0, or 1 for debugging")
	}
	*v.level = config.LogInfo
	if n > 0 {
		*v.level = config.LogDebug
	}
	return nil
}

// podNamespaceFile is where a pod finds the namespace that it runs in. POD_NAMESPACE goes before it.
const podNamespaceFile = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

// podNamespace is the namespace of the pod that this process runs in, empty if it runs in none.
func podNamespace(file string) string {
	fromFile, _ := os.ReadFile(file) // there is none outside of a pod, and what needs the namespace says so
	return cmp.Or(os.Getenv("POD_NAMESPACE"), strings.TrimSpace(string(fromFile)))
}

// servesWebhook says whether this process answers admission.
func servesWebhook(c *config.ControllerConfiguration) bool {
	return c.Webhook.BindAddress != config.Nowhere
}

// hostPort splits an address, which is valid, into what the webhook server wants.
func hostPort(address string) (host string, port int, err error) {
	host, text, err := net.SplitHostPort(address)
	if err != nil {
		return "", 0, err
	}
	port, err = strconv.Atoi(text)
	return host, port, err
}
