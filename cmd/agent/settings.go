package main

import (
	"io"
	"log/slog"
	"net/netip"
	"slices"

	"github.com/go-logr/logr"

	"github.com/serviceproxy/serviceproxy-operator/agent"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/agent/sysctl"
	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
)

// settingsOf gives what the agent takes in while it runs, of a configuration that is valid.
func settingsOf(c *config.AgentConfiguration) agent.Settings {
	return agent.Settings{
		Pods:          podTraffic(c),
		NodeCIDR:      c.DetectLocalMode == config.LocalModeNodeCIDR,
		MasqueradeAll: c.MasqueradeAll,
		DropInvalid:   *c.DropInvalid,
		CountTraffic:  c.CountTraffic,
		Conntrack: sysctl.Conntrack{
			MaxPerCore:            *c.Conntrack.MaxPerCore,
			Min:                   *c.Conntrack.Min,
			TCPEstablishedTimeout: c.Conntrack.TCPEstablishedTimeout.Duration,
			TCPCloseWaitTimeout:   c.Conntrack.TCPCloseWaitTimeout.Duration,
			TCPBeLiberal:          c.Conntrack.TCPBeLiberal,
			UDPTimeout:            c.Conntrack.UDPTimeout.Duration,
			UDPStreamTimeout:      c.Conntrack.UDPStreamTimeout.Duration,
		},
	}
}

func podTraffic(c *config.AgentConfiguration) (pods forwarding.PodTraffic) {
	switch c.DetectLocalMode {
	case config.LocalModeClusterCIDR:
		for _, cidr := range c.ClusterCIDR {
			pods.Sources = append(pods.Sources, netip.MustParsePrefix(cidr))
		}
		slices.SortFunc(pods.Sources, netip.Prefix.Compare)
	case config.LocalModeBridgeInterface:
		pods.Interfaces = []string{c.DetectLocal.BridgeInterface}
	case config.LocalModeInterfaceNamePrefix:
		pods.Interfaces = []string{c.DetectLocal.InterfaceNamePrefix + "*"}
	}
	return pods
}

// warn says what a configuration leaves undone that its author may not have meant.
func warn(log logr.Logger, c *config.AgentConfiguration) {
	if c.DetectLocalMode == config.LocalModeClusterCIDR && len(c.ClusterCIDR) == 0 {
		log.Info("clusterCIDR (--cluster-cidr) is empty, so nothing is known to come from a pod or from outside: connections from outside of the cluster to service IPs are not masqueraded, "+
			"and those of pods to external addresses of Services with externalTrafficPolicy Local reach endpoints of this node only. Set it, or another detectLocalMode", "detectLocalMode", c.DetectLocalMode)
	}
}

var levels = map[config.LogLevel]slog.Level{config.LogInfo: slog.LevelInfo, config.LogDebug: slog.LevelDebug}

func newLogger(format config.LogFormat, level *slog.LevelVar, to io.Writer) logr.Logger {
	options := &slog.HandlerOptions{Level: level}
	if format == config.LogJSON {
		return logr.FromSlogHandler(slog.NewJSONHandler(to, options))
	}
	return logr.FromSlogHandler(slog.NewTextHandler(to, options))
}
