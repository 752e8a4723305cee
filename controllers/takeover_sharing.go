package controllers

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// sharing is how a policy shares the cluster with kube-proxy by now.
type sharing struct {
	// keeps: what was taken over stays so. takes: Services are taken over.
	keeps, takes bool
	// handsBack: kube-proxy gets what the policy, which is being deleted, took over.
	handsBack bool
}

// hosts says where kube-proxy is.
type hosts struct {
	some, all bool // of the nodes that are Ready
	absent    bool // from all of the cluster's nodes, for sure
	without   []string
	silent    []string // the Ready nodes whose agents do not report: what is decided now may not reach them
}

// kubeProxyHosts looks where kube-proxy runs. Callers hold mu.
func (l *ledger) kubeProxyHosts() hosts {
	h := hosts{absent: true}
	for name, n := range l.nodes {
		if !n.exists {
			continue
		}
		present := n.kubeProxy.Runs()
		h.some = h.some || present
		h.absent = h.absent && n.kubeProxy == v1alpha1.KubeProxyAbsent
		if !present && n.ready {
			h.without = append(h.without, name)
		}
		if !n.reports && n.ready {
			h.silent = append(h.silent, name)
		}
	}
	h.all = h.some && len(h.without) == 0
	slices.Sort(h.without)
	slices.Sort(h.silent)
	return h
}

// leftOut names the nodes that a policy does not select. Callers hold mu.
func (l *ledger) leftOut(p *allocator.Policy) (out []string) {
	if p.SelectsAllNodes() {
		return nil
	}
	for name, n := range l.nodes {
		if n.exists && !p.SelectsNode(n.labels) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// leavesOut says whether there are such nodes. It costs little where there are many. Callers hold mu.
func (l *ledger) leavesOut(p *allocator.Policy) bool {
	if p.SelectsAllNodes() {
		return false
	}
	for _, n := range l.nodes {
		if n.exists && !p.SelectsNode(n.labels) {
			return true
		}
	}
	return false
}

// share settles how policies share the cluster with kube-proxy. Callers hold mu.
func (l *ledger) share() {
	l.unshared = false
	l.kubeProxy = l.kubeProxyHosts()
	clear(l.shared)
	for i, p := range l.resolved {
		if back := p.Terminating && p.TakesOver() && l.kubeProxy.all; back != p.HandsBack {
			changed := *p // others read it without mu
			changed.HandsBack = back
			p = &changed
			l.resolved[i] = p
		}
		s := sharing{keeps: p.TakesOver() && !p.HandsBack && !l.leavesOut(p), handsBack: p.HandsBack}
		// An assignment that was Programmed once stays so when a node joins or an agent dies. There only kube-proxy would follow what comes next.
		s.takes = s.keeps && !p.Terminating && l.kubeProxy.some && len(l.kubeProxy.silent) == 0
		l.shared[p.Name] = s
	}
}

// sharing is how a policy shares the cluster with kube-proxy now.
func (l *ledger) sharing(policy string) sharing {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.shared[policy]
}

// kubeProxyAwaited says whether kube-proxy is to be given time to forward a Service. One that was taken over proves that there was one.
func (l *ledger) kubeProxyAwaited(takenOver bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.kubeProxy.some || takenOver && !l.kubeProxy.absent
}

// announce has the Services of a policy reconciled if how it shares the cluster with kube-proxy changed since it last did.
func (l *ledger) announce(policy string) {
	changed, services := l.announced(policy)
	if services != nil {
		for _, key := range changed { // without mu: admission must not wait for thousands of them
			services.Add(reconcile.Request{NamespacedName: key})
		}
	}
}

func (l *ledger) announced(policy string) (out []types.NamespacedName, services queue) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now, exists := l.shared[policy]
	was, told := l.told[policy]
	if !exists {
		delete(l.told, policy)
		return nil, nil
	}
	l.told[policy] = now
	if now == was || !told && !now.takes && !now.handsBack {
		return nil, nil
	}
	onlyTakes := now.keeps == was.keeps && now.handsBack == was.handsBack
	if onlyTakes && !now.takes {
		return nil, nil // nothing follows from that
	}
	for key, a := range l.assignments {
		if a.policy == policy && (!onlyTakes || a.label == unlabelled) {
			out = append(out, key)
		}
	}
	return out, l.serviceQueue
}

// label says who keeps kube-proxy from forwarding a Service.
type label int

const (
	unlabelled label = iota
	labelledByUser
	labelledByUs
)

func labelOf(svc *corev1.Service) label {
	switch {
	case svc == nil || svc.Labels[v1alpha1.LabelServiceProxyName] != v1alpha1.ServiceProxyName:
		return unlabelled
	case allocator.TakenOver(svc):
		return labelledByUs
	}
	return labelledByUser
}

// noteLabel follows a Service's label. Callers hold mu.
func (l *ledger) noteLabel(key types.NamespacedName, now label) {
	if l.labels[key] == now {
		return
	}
	if now == unlabelled {
		delete(l.labels, key)
	} else {
		l.labels[key] = now
	}
	if a, known := l.assignments[key]; known {
		l.count(a, -1)
		a.label = now
		l.assignments[key] = a
		l.count(a, 1)
		l.touch(a.policy)
	}
}
