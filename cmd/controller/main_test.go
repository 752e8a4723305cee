package main

import (
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
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--leader-elect=perhaps"}, "leader-elect"},
		{[]string{"--no-such-flag"}, "no-such-flag"},
		{[]string{"start"}, `"start"`},
		{[]string{"--metrics-bind-address=8080"}, `--metrics-bind-address "8080": must be HOST:PORT or :PORT, or 0 for none`},
		{[]string{"--health-probe-bind-address="}, `--health-probe-bind-address ""`},
	} {
		if _, err := parseFlags(tt.args); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: got %v, want an error that names %s", tt.args, err, tt.want)
		}
	}
	f, err := parseFlags([]string{"--leader-elect", "--metrics-bind-address=0", "--health-probe-bind-address=:1234", "-v=1"})
	if err != nil || !f.leaderElect || f.metricsAddress != "0" || f.probeAddress != ":1234" || f.verbosity != 1 {
		t.Errorf("got %+v, %v", f, err)
	}
}
