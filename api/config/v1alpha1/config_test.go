package v1alpha1_test

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
)

const agentHeader = "apiVersion: config.networking.serviceproxy.io/v1alpha1\nkind: AgentConfiguration\n"

// read is what the agent does with a file.
func read(file string) (*config.AgentConfiguration, string) {
	c := &config.AgentConfiguration{}
	var problems []string
	if err := config.Decode([]byte(file), config.AgentKind, c); err != nil {
		problems = append(problems, err.Error())
	}
	c.SetDefaults()
	for _, wrong := range c.Validate() {
		problems = append(problems, wrong.Error())
	}
	return c, strings.Join(problems, "\n")
}

func TestGoodFile(t *testing.T) {
	c, problems := read(agentHeader + `
hostnameOverride: node-1
metricsBindAddress: "0"
healthzBindAddress: "[::1]:10266"
clusterCIDR: [10.244.0.0/16, "fd00:244::/56"]
conntrack:
  maxPerCore: 0
  udpTimeout: 1m
dropInvalid: false
logging: {level: debug, format: json}
`)
	if problems != "" {
		t.Fatal(problems)
	}
	if c.HostnameOverride != "node-1" || c.MetricsBindAddress != config.Nowhere || len(c.ClusterCIDR) != 2 || *c.Conntrack.MaxPerCore != 0 || *c.DropInvalid ||
		c.Conntrack.UDPTimeout.Duration != time.Minute || c.Logging.Level != config.LogDebug {
		t.Errorf("got %+v", c)
	}
	if *c.Conntrack.Min != 131072 || c.Conntrack.TCPEstablishedTimeout.Duration != 24*time.Hour || c.DetectLocalMode != config.LocalModeClusterCIDR {
		t.Errorf("defaults: %+v", c)
	}
}

// What is printed can be read again, and is the same.
func TestPrintedIsReadable(t *testing.T) {
	for kind, fresh := range map[string]func() interface{ SetDefaults() }{
		config.AgentKind:      func() interface{ SetDefaults() } { return &config.AgentConfiguration{} },
		config.ControllerKind: func() interface{ SetDefaults() } { return &config.ControllerConfiguration{} },
	} {
		printed, again := fresh(), fresh()
		printed.SetDefaults()
		text, err := yaml.Marshal(printed)
		if err != nil {
			t.Fatal(err)
		}
		if err := config.Decode(text, kind, again); err != nil || !reflect.DeepEqual(printed, again) {
			t.Errorf("%s\nis read as %+v, %v", text, again, err)
		}
	}
}

func TestDropInvalidFollowsLiberalTracking(t *testing.T) {
	for file, want := range map[string]bool{"": true, "conntrack: {tcpBeLiberal: true}": false, "conntrack: {tcpBeLiberal: true}\ndropInvalid: true": true} {
		if c, problems := read(agentHeader + file); problems != "" || *c.DropInvalid != want {
			t.Errorf("%q: %v, %s", file, *c.DropInvalid, problems)
		}
	}
}

// Every message names the field, its value and what would be valid.
func TestBadFiles(t *testing.T) {
	for _, tt := range []struct {
		file string
		want []string // each a line, in whole
	}{
		{"", []string{"must hold the fields of one object, beginning with apiVersion: config.networking.serviceproxy.io/v1alpha1 and kind: AgentConfiguration"}},
		{"clusterCIDR: []", []string{"[apiVersion: Required value: must be config.networking.serviceproxy.io/v1alpha1, kind: Required value: must be AgentConfiguration]"}},
		{"apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ipvs\n", []string{
			`[apiVersion: Unsupported value: "kubeproxy.config.k8s.io/v1alpha1": supported values: "config.networking.serviceproxy.io/v1alpha1", ` +
				`kind: Unsupported value: "KubeProxyConfiguration": supported values: "AgentConfiguration"]`}},
		{agentHeader + "---\n# nothing\n---\n" + agentHeader, []string{"has 2 YAML documents: must be one"}},
		{agentHeader + "clusterCIDR: [", []string{"is no YAML: yaml: line 3: did not find expected node content"}},
		// All at once.
		{agentHeader + `metricsBindAdress: ":1"
nftables: {masqueradeAll: true}
conntrack: {maxPerCpu: 1, tcpTimeout: 2h}
logging: {level: loud}
clusterCIDR: [10.244.0.0/16, 10.244.0.0, 10.1.2.3/16, "fd00::", 10.244.0.0/16]
`, []string{
			"metricsBindAdress: Unknown field, did you mean metricsBindAddress?",
			"nftables: Unknown field, valid here: clientConnection, clusterCIDR, conntrack, countTraffic, detectLocal, detectLocalMode, dropInvalid, enableProfiling, healthzBindAddress, " +
				"hostnameOverride, logging, masqueradeAll, metricsBindAddress",
			"conntrack.maxPerCpu: Unknown field, did you mean conntrack.maxPerCore?",
			"conntrack.tcpTimeout: Unknown field, did you mean conntrack.udpTimeout?",
			`logging.level: Unsupported value: "loud": supported values: "info", "debug"`,
			`clusterCIDR[1]: Invalid value: "10.244.0.0": must be a CIDR such as 10.244.0.0/16`,
			`clusterCIDR[2]: Invalid value: "10.1.2.3/16": has bits set after its length: did you mean 10.1.0.0/16?`,
			`clusterCIDR[3]: Invalid value: "fd00::": must be a CIDR such as fd00:244::/56`,
			`clusterCIDR[4]: Duplicate value: "10.244.0.0/16"`,
		}},
		{agentHeader + "maxPerCore: 5", []string{"maxPerCore: Unknown field, did you mean conntrack.maxPerCore?"}},
		{agentHeader + "masqueradeAll: true\nmasqueradeAll: false", []string{"a field is given twice:", `line 4: key "masqueradeAll" already set in map`}},
		{agentHeader + "clusterCIDR: 10.244.0.0/16", []string{`clusterCIDR: Invalid value: "10.244.0.0/16": must be a list`}},
		{agentHeader + "masqueradeAll: maybe", []string{`masqueradeAll: Invalid value: "maybe": must be true or false`}},
		{agentHeader + "conntrack: {udpTimeout: soon}", []string{`conntrack.udpTimeout: Invalid value: "soon": must be a duration such as 90s, 10m or 24h`}},
		{agentHeader + "conntrack: {tcpCloseWaitTimeout: 60}", []string{`conntrack.tcpCloseWaitTimeout: Invalid value: 60: must be a duration such as 90s, 10m or 24h`}},
		{agentHeader + "conntrack: {min: 99999999999}", []string{`conntrack.min: Invalid value: 99999999999: must be a whole number of at most 2147483647`}},
		{agentHeader + "conntrack: {min: -1, maxPerCore: 2000000, udpStreamTimeout: 10ms, udpTimeout: -1s}", []string{
			"conntrack.min: Invalid value: -1: must be 0 to 1048576 connections",
			"conntrack.maxPerCore: Invalid value: 2000000: must be 0 to 1048576 connections",
			`conntrack.udpStreamTimeout: Invalid value: "10ms": must be full seconds from 0s to 8760h`,
			`conntrack.udpTimeout: Invalid value: "-1s": must be full seconds from 0s to 8760h`,
		}},
		{agentHeader + "detectLocalMode: Bridge", []string{
			`detectLocalMode: Unsupported value: "Bridge": supported values: "ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"`}},
		{agentHeader + "detectLocalMode: BridgeInterface\ndetectLocal: {interfaceNamePrefix: veth}", []string{
			"detectLocal.bridgeInterface: Required value: detectLocalMode BridgeInterface needs the name of the bridge that pods are behind, such as cni0",
			`detectLocal.interfaceNamePrefix: Invalid value: "veth": is used with detectLocalMode InterfaceNamePrefix only: set that, or leave this out`,
		}},
		{agentHeader + "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: 'veth*'}", []string{`detectLocal.interfaceNamePrefix: Invalid value: "veth*"`}},
		{agentHeader + "metricsBindAddress: '10249'\nhealthzBindAddress: 'a:b'\nhostnameOverride: Node_1", []string{
			`metricsBindAddress: Invalid value: "10249": must be HOST:PORT or :PORT with a port of 0 to 65535, or 0 for nowhere`,
			`healthzBindAddress: Invalid value: "a:b": must be HOST:PORT`,
			`hostnameOverride: Invalid value: "Node_1": must be the name of a Node`,
		}},
		{agentHeader + "healthzBindAddress: '[::]:10249'", []string{`metricsBindAddress: Invalid value: "127.0.0.1:10249": has the port of healthzBindAddress [::]:10249: must have another`}},
	} {
		_, problems := read(tt.file)
		lines := strings.Split(problems, "\n")
		for _, want := range tt.want {
			found := false
			for _, line := range lines {
				found = found || strings.HasPrefix(strings.TrimSpace(line), want)
			}
			if !found {
				t.Errorf("%s\ngives\n%s\nwhich lacks\n%s", tt.file, problems, want)
			}
		}
		if len(lines) != len(tt.want) && !strings.Contains(problems, "given twice") {
			t.Errorf("%s\ngives %d problems, want %d:\n%s", tt.file, len(lines), len(tt.want), problems)
		}
	}
}

func TestBadControllerFile(t *testing.T) {
	const header = "apiVersion: config.networking.serviceproxy.io/v1alpha1\nkind: ControllerConfiguration\n"
	for file, want := range map[string]string{
		"":                   "namespace: Required value",
		"namespace: Net_Ops": `namespace: Invalid value: "Net_Ops": must be the name of a namespace`,
		"namespace: a\nwebhook: {bindAddress: ':0'}":                                                                            `webhook.bindAddress: Invalid value: ":0": must be HOST:PORT or :PORT with a port of 1 to 65535, or 0 for nowhere`,
		"namespace: a\nwebhook: {url: 'http://a'}":                                                                              `webhook.url: Invalid value: "http://a": must be https://HOST or https://HOST:PORT`,
		"namespace: a\nwebhook: {url: 'https://a:70000'}":                                                                       `webhook.url: Invalid value: "https://a:70000": its port must be 1 to 65535`,
		"namespace: a\nwebhook: {url: 'https://a', bindAddress: '0'}":                                                           `webhook.url: Invalid value: "https://a": must not be given if bindAddress is 0`,
		"namespace: a\nlogging: {format: xml}":                                                                                  `logging.format: Unsupported value: "xml": supported values: "text", "json"`,
		"namespace: a\nkubeProxy: {handBackGracePeriod: 100ms}":                                                                 `kubeProxy.handBackGracePeriod: Invalid value: "100ms": must be from 1s to 1h`,
		"namespace: a\nwebhook: {bindAddress: ':8080'}":                                                                         `webhook.bindAddress: Invalid value: ":8080": has the port of metricsBindAddress :8080: must have another`,
		"namespace: a\nleaderElection: {leaderElect: true}":                                                                     "",
		"namespace: a\nhealthzBindAddress: 127.0.0.1:1\nmetricsBindAddress: 127.0.0.2:1\nwebhook: {bindAddress: '127.0.0.3:1'}": "",
		"namespace: a\nhealthzBindAddress: '127.0.0.1:0'\nmetricsBindAddress: '127.0.0.1:0'":                                    "",
		"webhook: {bindAddress: '0'}":                                                                                           "",
		"webhook: {bindAddress: '0'}\nleaderElection: {leaderElect: true}":                                                      "namespace: Required value",
	} {
		c := &config.ControllerConfiguration{}
		if err := config.Decode([]byte(header+file), config.ControllerKind, c); err != nil {
			t.Errorf("%s: %v", file, err)
		}
		c.SetDefaults()
		got := ""
		for _, wrong := range c.Validate() {
			got += wrong.Error() + "\n"
		}
		if (want == "" && got != "") || !strings.HasPrefix(got, want) || strings.Count(got, "\n") > 1 {
			t.Errorf("%s: got %q, want %q", file, got, want)
		}
	}
}

func TestAdopt(t *testing.T) {
	running, problems := read(agentHeader + "clusterCIDR: [10.244.0.0/16]\nmetricsBindAddress: :1\nhealthzBindAddress: :2")
	wanted, more := read(agentHeader + "clusterCIDR: [10.1.0.0/16]\nmetricsBindAddress: :3\nhealthzBindAddress: :2\nconntrack: {min: 5}\nlogging: {format: json}\ndropInvalid: false")
	if problems+more != "" {
		t.Fatal(problems, more)
	}
	adopted, waiting := config.Adopt(running, wanted)
	if got := strings.Join(adopted, " "); got != "clusterCIDR dropInvalid conntrack.min" {
		t.Errorf("adopted %s", got)
	}
	if got := strings.Join(waiting, " "); got != "metricsBindAddress logging.format" {
		t.Errorf("waiting: %s", got)
	}
	if running.ClusterCIDR[0] != "10.1.0.0/16" || *running.DropInvalid || *running.Conntrack.Min != 5 || running.MetricsBindAddress != ":1" || running.Logging.Format != config.LogText {
		t.Errorf("got %+v", running)
	}
	if adopted, waiting := config.Adopt(running, wanted); adopted != nil || len(waiting) != 2 {
		t.Errorf("again: %v, %v", adopted, waiting)
	}
}
