package agent

import (
	"context"
	"time"

	"github.com/go-logr/logr"

	"github.com/serviceproxy/serviceproxy-operator/agent/kubeproxy"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// neighbourPeriod is how often it is looked whether kube-proxy's rules are in the kernel. It costs some system calls.
const neighbourPeriod = 10 * time.Second

// watchNeighbour tells where kube-proxy is, at once and whenever that changes, until ctx ends. The controller takes Services over only from a kube-proxy that is there.
func watchNeighbour(ctx context.Context, log logr.Logger, find func() (kubeproxy.Mode, error), tell func(v1alpha1.KubeProxyPresence)) {
	var told v1alpha1.KubeProxyPresence
	failing := false
	for {
		found, err := find()
		switch now := v1alpha1.KubeProxyPresence(found); {
		case err != nil:
			if !failing {
				log.Error(err, "It is not known whether kube-proxy runs on this node, so nothing is taken over from it on its account; trying again", "every", neighbourPeriod)
			}
		case now != told:
			log.Info("Looked for kube-proxy's rules in the kernel", "found", now)
			told = now
			tell(now)
		}
		failing = err != nil
		if !sleep(ctx, neighbourPeriod) {
			return
		}
	}
}

// beside makes p what is known of kube-proxy on this node.
func (r *reporter) beside(p v1alpha1.KubeProxyPresence) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.kubeProxy = p
	r.signal()
}
