package agent

import (
	"context"
	"time"

	"github.com/go-logr/logr"

	"github.com/serviceproxy/serviceproxy-operator/agent/kubeproxy"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

const (
	// neighbourPeriod is how often it is looked whether kube-proxy is on the node. It costs some system calls.
	neighbourPeriod = 10 * time.Second
	// neighbourPatience is how long a kube-proxy that runs may be silent, because it is replaced by another, until it counts as stopped.
	neighbourPatience = time.Minute
)

// neighbour is kube-proxy as this node's agent sees it. The controller takes Services over only from one that runs, and hands them back only to such a one: rules
// that a kube-proxy left when it ended forward what they say, but nobody would add to them what is handed back.
type neighbour struct {
	log logr.Logger
	// find says in which mode its rules are in the kernel, answers whether somebody listens where it does.
	find    func() (kubeproxy.Mode, error)
	answers func() bool
	// heard is when somebody did last.
	heard time.Time
}

// watch tells what is known of kube-proxy, at once and whenever that changes, until ctx ends.
func (n *neighbour) watch(ctx context.Context, tell func(v1alpha1.KubeProxyPresence)) {
	var told v1alpha1.KubeProxyPresence
	failing := false
	for {
		found, err := n.look()
		switch now := v1alpha1.KubeProxyPresence(found); {
		case err != nil:
			if !failing {
				n.log.Error(err, "It is not known whether kube-proxy runs on this node, so nothing is taken over from it on its account; trying again", "every", neighbourPeriod)
			}
		case now != told:
			n.log.Info("Looked for kube-proxy", "found", now)
			told = now
			tell(now)
		}
		failing = err != nil
		if !sleep(ctx, neighbourPeriod) {
			return
		}
	}
}

func (n *neighbour) look() (kubeproxy.Mode, error) {
	found, err := n.find()
	if err != nil || found == kubeproxy.Absent {
		return found, err
	}
	if n.answers() {
		n.heard = time.Now()
	}
	if time.Since(n.heard) >= neighbourPatience {
		return kubeproxy.Stopped, nil
	}
	return found, nil
}

// beside makes p what is known of kube-proxy on this node.
func (r *reporter) beside(p v1alpha1.KubeProxyPresence) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.kubeProxy = p
	r.signal()
}
