package main

import (
	"flag"
	"os"
	"strings"

	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/cmd/internal/configuration"
)

// program says how the agent is configured. cleanup is what the flag of that name says.
func program(cleanup *bool) configuration.Program[*config.AgentConfiguration] {
	return configuration.Program[*config.AgentConfiguration]{
		Name: "agent", Kind: config.AgentKind,
		New: func() *config.AgentConfiguration { return &config.AgentConfiguration{} },
		Define: func(flags *flag.FlagSet, c *config.AgentConfiguration) map[string]string {
			flags.BoolVar(cleanup, "cleanup", false, "remove everything that the agent put into this node's kernel and exit; open connections through services end")
			return define(flags, c)
		},
		Environment: func(c *config.AgentConfiguration) {
			if c.HostnameOverride == "" {
				c.HostnameOverride = os.Getenv("NODE_NAME")
			}
		},
	}
}

// define defines the flags that set fields of the configuration.
func define(flags *flag.FlagSet, c *config.AgentConfiguration) map[string]string {
	flags.StringVar(&c.HostnameOverride, "node-name", c.HostnameOverride, "name of the Node that the agent runs on (default: environment NODE_NAME)")
	flags.StringVar(&c.ClientConnection.Kubeconfig, "kubeconfig", c.ClientConnection.Kubeconfig, "kubeconfig file (default: environment KUBECONFIG, else the Pod's service account)")
	flags.Var((*cidrs)(&c.ClusterCIDR), "cluster-cidr", "ranges of the cluster's pods, separated by commas, of either or both families; traffic to service IPs from anywhere else is masqueraded")
	flags.Var(configuration.Address{To: &c.HealthzBindAddress}, "health-bind-address", "where /healthz, /livez and /readyz are served; empty or 0 for nowhere")
	flags.Var(configuration.Address{To: &c.MetricsBindAddress}, "metrics-bind-address", "where /metrics, /proxyMode and /configz are served; empty or 0 for nowhere")
	flags.StringVar((*string)(&c.Logging.Level), "log-level", string(c.Logging.Level), "info or debug")
	return map[string]string{
		"node-name":            "hostnameOverride",
		"kubeconfig":           "clientConnection.kubeconfig",
		"cluster-cidr":         "clusterCIDR",
		"health-bind-address":  "healthzBindAddress",
		"metrics-bind-address": "metricsBindAddress",
		"log-level":            "logging.level",
	}
}

// cidrs is a flag for ranges separated by commas.
type cidrs []string

func (c *cidrs) String() string { return strings.Join(*c, ",") }

func (c *cidrs) Set(list string) error {
	*c = cidrs{}
	if list == "" {
		return nil
	}
	for cidr := range strings.SplitSeq(list, ",") {
		*c = append(*c, strings.TrimSpace(cidr))
	}
	return nil
}
