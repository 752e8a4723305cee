package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/schema"

	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/cmd/internal/configuration"
)

func TestCheckCRDsSaysWhatIsMissing(t *testing.T) {
	mapper := meta.NewDefaultRESTMapper([]schema.GroupVersion{v1alpha1.GroupVersion})
	for _, kind := range []string{"ServiceProxyPolicy", "ServiceAssignment", "AllocationClaim"} {
		mapper.Add(v1alpha1.GroupVersion.WithKind(kind), meta.RESTScopeRoot)
	}
	err := checkCRDs(mapper)
	if err == nil || !strings.Contains(err.Error(), "NodeProxyState") || !strings.Contains(err.Error(), "install the CRDs") {
		t.Errorf("got %v", err)
	}
	mapper.Add(v1alpha1.GroupVersion.WithKind("NodeProxyState"), meta.RESTScopeRoot)
	if err := checkCRDs(mapper); err != nil {
		t.Errorf("with all CRDs: %v", err)
	}
}

// configured is what the controller does with its arguments before it asks for a cluster.
func configured(args []string) (*config.ControllerConfiguration, error) {
	p := program()
	common, err := p.Parse(args, &bytes.Buffer{})
	if err != nil {
		return nil, err
	}
	live, err := configuration.Start(p, common.File, args)
	if err != nil {
		return nil, err
	}
	return live.Configuration(), nil
}

func TestBadFlagsAreNamed(t *testing.T) {
	t.Setenv("POD_NAMESPACE", "")
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--leader-elect=perhaps"}, "leader-elect"},
		{[]string{"--no-such-flag"}, "no-such-flag"},
		{[]string{"-v=loud"}, "must be 0, or 1 for debugging"},
		{[]string{"start"}, `"start"`},
		{[]string{"--metrics-bind-address=8080"}, `--metrics-bind-address: Invalid value: "8080": must be HOST:PORT or :PORT with a port of 0 to 65535, or 0 for nowhere`},
		{[]string{"--namespace="}, `--namespace: Required value`},
		{[]string{"--namespace=", "--webhook-bind-address=0", "--leader-elect"}, `--namespace: Required value`},
		{[]string{"--namespace=Net_Ops"}, `--namespace: Invalid value: "Net_Ops": must be the name of a namespace`},
		{[]string{"--webhook-bind-address=9443"}, `--webhook-bind-address: Invalid value: "9443": must be HOST:PORT or :PORT with a port of 1 to 65535, or 0 for nowhere`},
		{[]string{"--webhook-bind-address=:0"}, `--webhook-bind-address: Invalid value: ":0": must be HOST:PORT or :PORT with a port of 1 to 65535`},
		{[]string{"--webhook-url=http://192.0.2.1"}, `--webhook-url: Invalid value: "http://192.0.2.1": must be https://HOST or https://HOST:PORT`},
		{[]string{"--webhook-url=https://192.0.2.1/mutate"}, `--webhook-url: Invalid value: "https://192.0.2.1/mutate": must be https://HOST`},
		{[]string{"--webhook-url=https://under_score"}, `--webhook-url: Invalid value: "https://under_score": its host must be an IP address or a DNS name`},
		{[]string{"--webhook-url=https://hooks:70000"}, `--webhook-url: Invalid value: "https://hooks:70000": its port must be 1 to 65535`},
		{[]string{"--webhook-url=https://hooks", "--webhook-bind-address=0"}, `--webhook-url: Invalid value: "https://hooks": must not be given if bindAddress is 0`},
	} {
		args := tt.args
		if !strings.HasPrefix(args[0], "--namespace=") {
			args = append([]string{"--namespace=net"}, args...)
		}
		if _, err := configured(args); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: got %v, want an error that names %s", tt.args, err, tt.want)
		}
	}
	if _, err := configured(nil); err == nil || !strings.Contains(err.Error(), "namespace (--namespace): Required value") {
		t.Errorf("outside of a pod: got %v", err)
	}
}

func TestGoodFlags(t *testing.T) {
	t.Setenv("POD_NAMESPACE", "of-the-pod")
	want := &config.ControllerConfiguration{Namespace: "of-the-pod", LeaderElection: config.LeaderElection{LeaderElect: true}, MetricsBindAddress: config.Nowhere, HealthzBindAddress: ":1234",
		Logging: config.Logging{Level: config.LogDebug}}
	want.SetDefaults()
	c, err := configured([]string{"--leader-elect", "--metrics-bind-address=0", "--health-probe-bind-address=:1234", "-v=1"})
	if diff := cmp.Diff(want, c); err != nil || diff != "" {
		t.Errorf("%v, %s", err, diff)
	}
	c, err = configured([]string{"--namespace=net", "--webhook-bind-address=127.0.0.1:8443", "--webhook-url=https://[2001:db8::1]:443/"})
	if err != nil || c.Namespace != "net" {
		t.Errorf("got %+v, %v", c, err)
	} else if host, port, err := hostPort(c.Webhook.BindAddress); err != nil || host != "127.0.0.1" || port != 8443 {
		t.Errorf("got %s, %d, %v", host, port, err)
	}
	t.Setenv("POD_NAMESPACE", "")
	if c, err = configured([]string{"--webhook-bind-address=0"}); err != nil || servesWebhook(c) {
		t.Errorf("without a webhook and without replicas no namespace is needed: got %+v, %v", c, err)
	}
}

func TestFlagsWinOverTheFile(t *testing.T) {
	t.Setenv("POD_NAMESPACE", "of-the-pod")
	name := filepath.Join(t.TempDir(), "controller.yaml")
	file := "apiVersion: config.networking.serviceproxy.io/v1alpha1\nkind: ControllerConfiguration\n" +
		"namespace: of-the-file\nleaderElection: {leaderElect: true}\nmetricsBindAddress: :1\nwebhook: {bindAddress: ':2'}\nlogging: {level: debug, format: json}\nenableProfiling: true\n"
	if err := os.WriteFile(name, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := configured([]string{"--config=" + name})
	if err != nil || c.Namespace != "of-the-file" || !c.LeaderElection.LeaderElect || c.MetricsBindAddress != ":1" || c.Webhook.BindAddress != ":2" || c.Logging.Level != config.LogDebug || !c.EnableProfiling {
		t.Errorf("of the file: %+v, %v", c, err)
	}
	c, err = configured([]string{"--config=" + name, "--namespace=net", "--leader-elect=false", "--metrics-bind-address=:3", "--webhook-bind-address=", "-v=0"})
	if err != nil || c.Namespace != "net" || c.LeaderElection.LeaderElect || c.MetricsBindAddress != ":3" || servesWebhook(c) || c.Logging.Level != config.LogInfo || c.Logging.Format != config.LogJSON {
		t.Errorf("of the flags: %+v, %v", c, err)
	}
}

func TestPodNamespace(t *testing.T) {
	file := filepath.Join(t.TempDir(), "namespace")
	t.Setenv("POD_NAMESPACE", "")
	if got := podNamespace(file); got != "" {
		t.Errorf("outside of a pod: got %q", got)
	}
	if err := os.WriteFile(file, []byte("from-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := podNamespace(file); got != "from-file" {
		t.Errorf("got %q", got)
	}
	t.Setenv("POD_NAMESPACE", "from-environment")
	if got := podNamespace(file); got != "from-environment" {
		t.Errorf("got %q", got)
	}
}
