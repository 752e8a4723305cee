package agent

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"

	"github.com/serviceproxy/serviceproxy-operator/agent/kubeproxy"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

func TestNeighbourIsToldOnlyWhenItChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		answers := []any{kubeproxy.Absent, kubeproxy.Absent, errors.New("no memory"), kubeproxy.NFTables, errors.New("no memory"), kubeproxy.NFTables, kubeproxy.Absent}
		var told []v1alpha1.KubeProxyPresence
		n := neighbour{log: logr.Discard(), answers: func() bool { return true }}
		n.find = func() (kubeproxy.Mode, error) {
			next := answers[0]
			if answers = answers[1:]; len(answers) == 0 {
				cancel()
			}
			if err, failed := next.(error); failed {
				return "", err
			}
			return next.(kubeproxy.Mode), nil
		}
		n.watch(ctx, func(p v1alpha1.KubeProxyPresence) { told = append(told, p) })
		want := []v1alpha1.KubeProxyPresence{v1alpha1.KubeProxyAbsent, v1alpha1.KubeProxyNFTables, v1alpha1.KubeProxyAbsent}
		if !slices.Equal(told, want) {
			t.Errorf("told %q, want %q", told, want)
		}
	})
}

// Rules without a kube-proxy that answers are those of one that ended, unless it did so just now: it may be replaced by another.
func TestNeighbourThatDoesNotAnswerHasStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		runs := func() bool { // from 1 min to 2 min after the start, and again after 2 min 30 s
			since := time.Since(start)
			return since >= time.Minute && since < 2*time.Minute || since >= 150*time.Second && since < 5*time.Minute
		}
		type change struct {
			after time.Duration
			to    v1alpha1.KubeProxyPresence
		}
		var told []change
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		n := neighbour{log: logr.Discard(), answers: runs, find: func() (kubeproxy.Mode, error) { return kubeproxy.IPTables, nil }}
		n.watch(ctx, func(p v1alpha1.KubeProxyPresence) { told = append(told, change{time.Since(start), p}) })
		want := []change{{0, v1alpha1.KubeProxyStopped}, {time.Minute, v1alpha1.KubeProxyIPTables}, {350 * time.Second, v1alpha1.KubeProxyStopped}}
		if !slices.Equal(told, want) {
			t.Errorf("told %v, want %v", told, want)
		}
	})
}

// The API takes these words only.
func TestNeighbourSpeaksTheAPIsLanguage(t *testing.T) {
	for mode, word := range map[kubeproxy.Mode]v1alpha1.KubeProxyPresence{kubeproxy.Absent: v1alpha1.KubeProxyAbsent, kubeproxy.Stopped: v1alpha1.KubeProxyStopped, kubeproxy.IPTables: v1alpha1.KubeProxyIPTables,
		kubeproxy.IPVS: v1alpha1.KubeProxyIPVS, kubeproxy.NFTables: v1alpha1.KubeProxyNFTables} {
		if string(mode) != string(word) {
			t.Errorf("%s is %s to the API", mode, word)
		}
	}
}
