package v1alpha1

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// Validate gives all that is wrong with the configuration, whose defaults are filled in. Files and the network are not looked at.
func (c *AgentConfiguration) Validate() field.ErrorList {
	var wrong field.ErrorList
	if c.HostnameOverride != "" {
		wrong = append(wrong, checkName(field.NewPath("hostnameOverride"), c.HostnameOverride, "Node", validation.IsDNS1123Subdomain)...)
	}
	wrong = append(wrong, checkAddress(field.NewPath("healthzBindAddress"), c.HealthzBindAddress, 0)...)
	wrong = append(wrong, checkAddress(field.NewPath("metricsBindAddress"), c.MetricsBindAddress, 0)...)
	wrong = append(wrong, checkApart(listener{"healthzBindAddress", c.HealthzBindAddress}, listener{"metricsBindAddress", c.MetricsBindAddress})...)
	wrong = append(wrong, c.validateDetectLocal()...)
	for i, cidr := range c.ClusterCIDR {
		wrong = append(wrong, checkCIDR(field.NewPath("clusterCIDR").Index(i), cidr, c.ClusterCIDR[:i])...)
	}
	wrong = append(wrong, c.Conntrack.validate(field.NewPath("conntrack"))...)
	return append(wrong, c.Logging.validate(field.NewPath("logging"))...)
}

func (c *AgentConfiguration) validateDetectLocal() (wrong field.ErrorList) {
	mode, path := field.NewPath("detectLocalMode"), field.NewPath("detectLocal")
	bridge, prefix := path.Child("bridgeInterface"), path.Child("interfaceNamePrefix")
	switch c.DetectLocalMode {
	case LocalModeClusterCIDR, LocalModeNodeCIDR:
	case LocalModeBridgeInterface:
		wrong = append(wrong, checkInterface(bridge, c.DetectLocal.BridgeInterface, c.DetectLocalMode, "name of the bridge that pods are behind, such as cni0")...)
	case LocalModeInterfaceNamePrefix:
		wrong = append(wrong, checkInterface(prefix, c.DetectLocal.InterfaceNamePrefix, c.DetectLocalMode, "beginning of the names of pods' interfaces, such as veth")...)
	default:
		wrong = append(wrong, field.NotSupported(mode, c.DetectLocalMode,
			[]LocalMode{LocalModeClusterCIDR, LocalModeNodeCIDR, LocalModeBridgeInterface, LocalModeInterfaceNamePrefix}))
	}
	if c.DetectLocal.BridgeInterface != "" && c.DetectLocalMode != LocalModeBridgeInterface {
		wrong = append(wrong, unused(bridge, c.DetectLocal.BridgeInterface, LocalModeBridgeInterface))
	}
	if c.DetectLocal.InterfaceNamePrefix != "" && c.DetectLocalMode != LocalModeInterfaceNamePrefix {
		wrong = append(wrong, unused(prefix, c.DetectLocal.InterfaceNamePrefix, LocalModeInterfaceNamePrefix))
	}
	return wrong
}

func unused(path *field.Path, value string, mode LocalMode) *field.Error {
	return field.Invalid(path, value, fmt.Sprintf("is used with detectLocalMode %s only: set that, or leave this out", mode))
}

// checkInterface checks the name of an interface or its beginning. The kernel's names have at most 15 bytes.
func checkInterface(path *field.Path, name string, mode LocalMode, what string) field.ErrorList {
	if name == "" {
		return field.ErrorList{field.Required(path, fmt.Sprintf("detectLocalMode %s needs the %s", mode, what))}
	}
	if len(name) > 15 || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`/:*"\`, r) }) || name == "." || name == ".." {
		return field.ErrorList{field.Invalid(path, name, "must be the "+what+`: at most 15 characters, none of them / : * " \ or blank`)}
	}
	return nil
}

func checkCIDR(path *field.Path, value string, before []string) field.ErrorList {
	p, err := netip.ParsePrefix(value)
	if err != nil || p.Addr().Is4In6() {
		valid := "must be a CIDR such as 10.244.0.0/16"
		if strings.Contains(value, ":") {
			valid = "must be a CIDR such as fd00:244::/56"
		}
		return field.ErrorList{field.Invalid(path, value, valid)}
	}
	if p != p.Masked() {
		return field.ErrorList{field.Invalid(path, value, fmt.Sprintf("has bits set after its length: did you mean %s?", p.Masked()))}
	}
	for _, b := range before {
		if other, err := netip.ParsePrefix(b); err == nil && other.Masked() == p {
			return field.ErrorList{field.Duplicate(path, value)}
		}
	}
	return nil
}

const (
	maxConntrack = 1 << 20 // agent and kube-proxy stop here, so more would be a silent nothing
	maxTimeout   = 365 * 24 * time.Hour
)

func (c *Conntrack) validate(path *field.Path) field.ErrorList {
	var wrong field.ErrorList
	for _, limit := range []struct {
		name  string
		value *int32
	}{{"maxPerCore", c.MaxPerCore}, {"min", c.Min}} {
		if *limit.value < 0 || *limit.value > maxConntrack {
			wrong = append(wrong, field.Invalid(path.Child(limit.name), *limit.value, fmt.Sprintf("must be 0 to %d connections", maxConntrack)))
		}
	}
	for _, timeout := range []struct {
		name  string
		value time.Duration
	}{
		{"tcpEstablishedTimeout", c.TCPEstablishedTimeout.Duration}, {"tcpCloseWaitTimeout", c.TCPCloseWaitTimeout.Duration},
		{"udpTimeout", c.UDPTimeout.Duration}, {"udpStreamTimeout", c.UDPStreamTimeout.Duration},
	} {
		if timeout.value < 0 || timeout.value > maxTimeout || timeout.value%time.Second != 0 {
			wrong = append(wrong, field.Invalid(path.Child(timeout.name), timeout.value.String(), "must be full seconds from 0s to 8760h"))
		}
	}
	return wrong
}

func (l *Logging) validate(path *field.Path) field.ErrorList {
	var wrong field.ErrorList
	if l.Level != LogInfo && l.Level != LogDebug {
		wrong = append(wrong, field.NotSupported(path.Child("level"), l.Level, []LogLevel{LogInfo, LogDebug}))
	}
	if l.Format != LogText && l.Format != LogJSON {
		wrong = append(wrong, field.NotSupported(path.Child("format"), l.Format, []LogFormat{LogText, LogJSON}))
	}
	return wrong
}

// Validate gives all that is wrong with the configuration, whose defaults are filled in. Files and the network are not looked at.
func (c *ControllerConfiguration) Validate() field.ErrorList {
	var wrong field.ErrorList
	namespace := field.NewPath("namespace")
	switch {
	case c.Namespace != "":
		wrong = append(wrong, checkName(namespace, c.Namespace, "namespace", validation.IsDNS1123Label)...)
	case c.LeaderElection.LeaderElect || c.Webhook.BindAddress != Nowhere:
		wrong = append(wrong, field.Required(namespace,
			"this is no Pod, so it must be said where the Lease is (leaderElection.leaderElect) and the webhook's certificate (unless webhook.bindAddress is 0)"))
	}
	wrong = append(wrong, checkAddress(field.NewPath("healthzBindAddress"), c.HealthzBindAddress, 0)...)
	wrong = append(wrong, checkAddress(field.NewPath("metricsBindAddress"), c.MetricsBindAddress, 0)...)
	wrong = append(wrong, c.Webhook.validate(field.NewPath("webhook"))...)
	wrong = append(wrong, checkApart(listener{"healthzBindAddress", c.HealthzBindAddress}, listener{"metricsBindAddress", c.MetricsBindAddress},
		listener{"webhook.bindAddress", c.Webhook.BindAddress})...)
	if grace := c.KubeProxy.HandBackGracePeriod.Duration; grace < time.Second || grace > time.Hour {
		wrong = append(wrong, field.Invalid(field.NewPath("kubeProxy", "handBackGracePeriod"), grace.String(), "must be from 1s to 1h"))
	}
	return append(wrong, c.Logging.validate(field.NewPath("logging"))...)
}

// listener is a field and the address in it.
type listener struct{ field, address string }

// checkApart finds addresses of which one process cannot have both. Those that are no addresses are told of elsewhere.
func checkApart(all ...listener) (wrong field.ErrorList) {
	for i, l := range all {
		host, port, err := net.SplitHostPort(l.address)
		if err != nil || port == "0" { // 0: any that is free
			continue
		}
		for _, other := range all[:i] {
			at, taken, err := net.SplitHostPort(other.address)
			if err == nil && port == taken && (host == at || isEverywhere(host) || isEverywhere(at)) {
				wrong = append(wrong, field.Invalid(field.NewPath(l.field), l.address, "has the port of "+other.field+" "+other.address+": must have another"))
			}
		}
	}
	return wrong
}

func isEverywhere(host string) bool {
	a, err := netip.ParseAddr(host)
	return host == "" || err == nil && a.IsUnspecified()
}

func (w *Webhook) validate(path *field.Path) field.ErrorList {
	// API servers have to know the port.
	wrong := checkAddress(path.Child("bindAddress"), w.BindAddress, 1)
	if w.URL == "" {
		return wrong
	}
	at := path.Child("url")
	if w.BindAddress == Nowhere {
		return append(wrong, field.Invalid(at, w.URL, "must not be given if bindAddress is 0, because no webhook is served then"))
	}
	u, err := url.Parse(w.URL)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		return append(wrong, field.Invalid(at, w.URL, "must be https://HOST or https://HOST:PORT"))
	}
	if !isHost(u.Hostname()) {
		wrong = append(wrong, field.Invalid(at, w.URL, "its host must be an IP address or a DNS name in lower case"))
	}
	if port := u.Port(); port != "" && !isPort(port, 1) {
		wrong = append(wrong, field.Invalid(at, w.URL, "its port must be 1 to 65535"))
	}
	return wrong
}

func checkName(path *field.Path, value, of string, check func(string) []string) field.ErrorList {
	if problems := check(value); len(problems) > 0 {
		return field.ErrorList{field.Invalid(path, value, fmt.Sprintf("must be the name of a %s: %s", of, strings.Join(problems, "; ")))}
	}
	return nil
}

// checkAddress fails if value is no place to listen at.
func checkAddress(path *field.Path, value string, leastPort uint64) field.ErrorList {
	if value == Nowhere {
		return nil
	}
	host, port, err := net.SplitHostPort(value)
	if err != nil || (host != "" && !isHost(host)) || !isPort(port, leastPort) {
		return field.ErrorList{field.Invalid(path, value, fmt.Sprintf("must be HOST:PORT or :PORT with a port of %d to 65535, or 0 for nowhere", leastPort))}
	}
	return nil
}

func isHost(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil || len(validation.IsDNS1123Subdomain(s)) == 0
}

func isPort(s string, least uint64) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n >= least
}
