package main

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/agent/sysctl"
	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
)

// Every error on a flag names the flag, the value and what would be valid.
func TestBadFlags(t *testing.T) {
	t.Setenv("NODE_NAME", "")
	t.Setenv("KUBECONFIG", "")
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	kubeconfig := t.TempDir() + "/kubeconfig"
	for _, tc := range []struct {
		args []string
		want []string
	}{
		{nil, []string{"--node-name", "NODE_NAME"}},
		{[]string{"--cluster-cidr", "10.244.0.0"}, []string{"--cluster-cidr", `"10.244.0.0"`, "10.244.0.0/16"}},
		{[]string{"--cluster-cidr", "10.244.1.0/16"}, []string{"--cluster-cidr", "did you mean 10.244.0.0/16"}},
		{[]string{"--cluster-cidr", "10.244.0.0/16,fd00::"}, []string{"--cluster-cidr[1]", `"fd00::"`, "fd00:244::/56"}},
		{[]string{"--log-level", "loud"}, []string{"--log-level", `"loud"`, `"info", "debug"`}},
		{[]string{"--metrics-bind-address", "10249"}, []string{"--metrics-bind-address", `"10249"`, "HOST:PORT"}},
		{[]string{"--config", kubeconfig}, []string{"--config", kubeconfig, "no such file"}},
		{[]string{"start"}, []string{`"start"`}},
		{[]string{"--no-such-flag"}, []string{"no-such-flag"}},
		{[]string{"--node-name", "a"}, []string{"--kubeconfig"}},
		{[]string{"--node-name", "a", "--kubeconfig", kubeconfig}, []string{"--kubeconfig", kubeconfig}},
	} {
		err := run(context.Background(), tc.args, &bytes.Buffer{}, &bytes.Buffer{})
		if err == nil {
			t.Errorf("%q: no error", tc.args)
			continue
		}
		for _, want := range tc.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q: %q does not name %q", tc.args, err, want)
			}
		}
	}
	if _, err := listen("healthzBindAddress", busy.Addr().String()); err == nil ||
		!strings.Contains(err.Error(), "healthzBindAddress") || !strings.Contains(err.Error(), busy.Addr().String()) || !strings.Contains(err.Error(), "free") {
		t.Errorf("a port in use: %v", err)
	}
	if ln, err := listen("metricsBindAddress", "0"); ln != nil || err != nil {
		t.Errorf("nowhere: %v, %v", ln, err)
	}
}

const header = "apiVersion: config.networking.serviceproxy.io/v1alpha1\nkind: AgentConfiguration\n"

// printed is the configuration that a file and arguments make.
func printed(t *testing.T, file string, args ...string) *config.AgentConfiguration {
	t.Helper()
	name := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(name, []byte(header+file), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := run(t.Context(), append([]string{"--config=" + name, "--print-config"}, args...), &out, &bytes.Buffer{}); err != nil {
		t.Fatal(err)
	}
	c := &config.AgentConfiguration{}
	if err := config.Decode(out.Bytes(), config.AgentKind, c); err != nil {
		t.Fatalf("what is printed is no configuration: %v\n%s", err, out.Bytes())
	}
	return c
}

func TestFlagsWinOverTheFile(t *testing.T) {
	t.Setenv("NODE_NAME", "of-the-environment")
	const file = "clusterCIDR: [10.1.0.0/16]\nmetricsBindAddress: :1\nhealthzBindAddress: :2\nlogging: {level: debug}\nclientConnection: {kubeconfig: /of/the/file}\n"
	c := printed(t, file)
	if c.HostnameOverride != "of-the-environment" || c.ClusterCIDR[0] != "10.1.0.0/16" || c.MetricsBindAddress != ":1" || c.HealthzBindAddress != ":2" ||
		c.Logging.Level != config.LogDebug || c.ClientConnection.Kubeconfig != "/of/the/file" {
		t.Errorf("of the file: %+v", c)
	}
	if c := printed(t, file+"hostnameOverride: of-the-file"); c.HostnameOverride != "of-the-file" {
		t.Errorf("the environment won over the file: %s", c.HostnameOverride)
	}
	c = printed(t, file+"hostnameOverride: of-the-file", "--node-name=a", "--cluster-cidr=10.244.0.0/16, fd00:244::/56", "--metrics-bind-address=", "--health-bind-address=:10256",
		"--log-level=info", "--kubeconfig=/of/the/flag")
	if c.HostnameOverride != "a" || !slices.Equal(c.ClusterCIDR, []string{"10.244.0.0/16", "fd00:244::/56"}) || c.MetricsBindAddress != config.Nowhere || c.HealthzBindAddress != ":10256" ||
		c.Logging.Level != config.LogInfo || c.ClientConnection.Kubeconfig != "/of/the/flag" {
		t.Errorf("of the flags: %+v", c)
	}
}

// Problems of the file name the file, and all of them are told at once.
func TestBadFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(name, []byte(header+"masqueradeAl: true\nclusterCIDR: [10.244.0.0]\nlogging: {level: loud}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := run(t.Context(), []string{"--config=" + name, "--log-level=louder"}, &bytes.Buffer{}, &bytes.Buffer{})
	want := "--config " + name + ": masqueradeAl: Unknown field, did you mean masqueradeAll?\n" +
		"--config " + name + `: clusterCIDR[0]: Invalid value: "10.244.0.0": must be a CIDR such as 10.244.0.0/16` + "\n" +
		`--log-level: Unsupported value: "louder": supported values: "info", "debug"`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
}

func TestSettings(t *testing.T) {
	for file, want := range map[string]forwarding.PodTraffic{
		"clusterCIDR: ['fd00:244::/56', 10.244.0.0/16]":                                                        {Sources: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/56")}},
		"detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}\nclusterCIDR: [10.244.0.0/16]": {Interfaces: []string{"cni0"}},
		"detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: veth}":                       {Interfaces: []string{"veth*"}},
		"detectLocalMode: NodeCIDR": {},
		"":                          {},
	} {
		c := printed(t, file)
		s := settingsOf(c)
		if !s.Pods.Equal(want) || s.NodeCIDR != (c.DetectLocalMode == config.LocalModeNodeCIDR) {
			t.Errorf("%s: %+v, want %+v", file, s, want)
		}
	}
	s := settingsOf(printed(t, "masqueradeAll: true\ncountTraffic: true"))
	if !s.MasqueradeAll || !s.DropInvalid || !s.CountTraffic || s.Conntrack != sysctl.DefaultConntrack() {
		t.Errorf("got %+v", s)
	}
}

func TestVersion(t *testing.T) {
	var out bytes.Buffer
	if err := run(context.Background(), []string{"--version"}, &out, &bytes.Buffer{}); err != nil || strings.TrimSpace(out.String()) == "" {
		t.Errorf("printed %q, %v", out.String(), err)
	}
}
