package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
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

func TestBadFlagsAreNamed(t *testing.T) {
	t.Setenv("POD_NAMESPACE", "")
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--leader-elect=perhaps"}, "leader-elect"},
		{[]string{"--no-such-flag"}, "no-such-flag"},
		{[]string{"start"}, `"start"`},
		{[]string{"--metrics-bind-address=8080"}, `--metrics-bind-address "8080": must be HOST:PORT or :PORT, or 0 for none`},
		{[]string{"--health-probe-bind-address="}, `--health-probe-bind-address ""`},
		{[]string{"--namespace="}, `--namespace ""`},
		{[]string{"--namespace=", "--webhook-bind-address=0", "--leader-elect"}, `--namespace ""`},
		{[]string{"--namespace=Net_Ops"}, `--namespace "Net_Ops": must be the name of a namespace`},
		{[]string{"--webhook-bind-address=9443"}, `--webhook-bind-address "9443": must be HOST:PORT or :PORT, or 0 for none`},
		{[]string{"--webhook-bind-address=:0"}, `--webhook-bind-address ":0": must name a port from 1 to 65535`},
		{[]string{"--webhook-url=http://192.0.2.1"}, `--webhook-url "http://192.0.2.1": must be https://HOST or https://HOST:PORT`},
		{[]string{"--webhook-url=https://192.0.2.1/mutate"}, `--webhook-url "https://192.0.2.1/mutate": must be https://HOST`},
		{[]string{"--webhook-url=https://under_score"}, `--webhook-url "https://under_score": its host must be an IP address or a DNS name`},
		{[]string{"--webhook-url=https://hooks:70000"}, `--webhook-url "https://hooks:70000": its port must be 1 to 65535`},
		{[]string{"--webhook-url=https://hooks", "--webhook-bind-address=0"}, `--webhook-url "https://hooks": must not be given together with --webhook-bind-address=0`},
	} {
		args := tt.args
		if !strings.HasPrefix(args[0], "--namespace=") {
			args = append([]string{"--namespace=net"}, args...)
		}
		if _, err := parseFlags(args); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: got %v, want an error that names %s", tt.args, err, tt.want)
		}
	}
}

func TestGoodFlags(t *testing.T) {
	t.Setenv("POD_NAMESPACE", "of-the-pod")
	f, err := parseFlags([]string{"--leader-elect", "--metrics-bind-address=0", "--health-probe-bind-address=:1234", "-v=1"})
	want := flags{leaderElect: true, namespace: "of-the-pod", metricsAddress: "0", probeAddress: ":1234", webhookAddress: ":9443", verbosity: 1}
	if err != nil || f != want {
		t.Errorf("got %+v, %v, want %+v", f, err, want)
	}
	f, err = parseFlags([]string{"--namespace=net", "--webhook-bind-address=127.0.0.1:8443", "--webhook-url=https://[2001:db8::1]:443/"})
	if host, port := f.webhookHostPort(); err != nil || f.namespace != "net" || host != "127.0.0.1" || port != 8443 {
		t.Errorf("got %+v, %v", f, err)
	}
	t.Setenv("POD_NAMESPACE", "")
	if f, err = parseFlags([]string{"--webhook-bind-address=0"}); err != nil || f.servesWebhook() {
		t.Errorf("without a webhook and without replicas no namespace is needed: got %+v, %v", f, err)
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
