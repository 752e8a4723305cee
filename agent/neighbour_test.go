package agent

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/go-logr/logr"

	"github.com/serviceproxy/serviceproxy-operator/agent/kubeproxy"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

func TestNeighbourIsToldOnlyWhenItChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		answers := []any{kubeproxy.Absent, kubeproxy.Absent, errors.New("no memory"), kubeproxy.NFTables, errors.New("no memory"), kubeproxy.NFTables, kubeproxy.Absent}
		var told []v1alpha1.KubeProxyPresence
		watchNeighbour(ctx, logr.Discard(), func() (kubeproxy.Mode, error) {
			next := answers[0]
			if answers = answers[1:]; len(answers) == 0 {
				cancel()
			}
			if err, failed := next.(error); failed {
				return "", err
			}
			return next.(kubeproxy.Mode), nil
		}, func(p v1alpha1.KubeProxyPresence) { told = append(told, p) })
		want := []v1alpha1.KubeProxyPresence{v1alpha1.KubeProxyAbsent, v1alpha1.KubeProxyNFTables, v1alpha1.KubeProxyAbsent}
		if !slices.Equal(told, want) {
			t.Errorf("told %q, want %q", told, want)
		}
	})
}

// The API takes these words only.
func TestNeighbourSpeaksTheAPIsLanguage(t *testing.T) {
	for mode, word := range map[kubeproxy.Mode]v1alpha1.KubeProxyPresence{kubeproxy.Absent: v1alpha1.KubeProxyAbsent, kubeproxy.IPTables: v1alpha1.KubeProxyIPTables,
		kubeproxy.IPVS: v1alpha1.KubeProxyIPVS, kubeproxy.NFTables: v1alpha1.KubeProxyNFTables} {
		if string(mode) != string(word) {
			t.Errorf("%s is %s to the API", mode, word)
		}
	}
}
