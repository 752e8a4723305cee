package parity

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/backendtest"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

func TestTry(t *testing.T) {
	netns.RequireRoot(t)
	for _, mode := range []string{"iptables", "nftables"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			backendtest.Judge(t, startKubeProxy(mode, filepath.Join(os.Getenv("KUBEBUILDER_ASSETS"), "kube-proxy"), t.TempDir()), 1, func(r backendtest.Result) {
				t.Logf("%6.2f %5.2f %s %s\n%s", time.Since(began).Seconds(), r.Took.Seconds(), r.Outcome, r.Row, r.Log)
			})
		})
	}
}
