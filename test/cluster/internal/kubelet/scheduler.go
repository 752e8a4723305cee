package kubelet

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// NewScheduler makes a scheduler. The factory must not have been started yet.
func NewScheduler(client kubernetes.Interface, factory informers.SharedInformerFactory, log *slog.Logger) (*Scheduler, error) {
	s := &Scheduler{
		client: client, log: log, wake: make(chan struct{}, 1), bound: map[types.UID]string{},
		pods:  factory.Core().V1().Pods().Informer(),
		nodes: factory.Core().V1().Nodes().Informer(),
	}
	wake := cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { s.signal() },
		UpdateFunc: func(any, any) { s.signal() },
		DeleteFunc: func(any) { s.signal() },
	}
	for _, i := range []cache.SharedIndexInformer{s.pods, s.nodes} {
		if _, err := i.AddEventHandler(wake); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// Scheduler binds pending Pods to nodes: to the Ready, schedulable node that fits the Pod's nodeSelector and runs the fewest of
// its siblings, then the fewest Pods, then comes first by name.
type Scheduler struct {
	client      kubernetes.Interface
	log         *slog.Logger
	pods, nodes cache.SharedIndexInformer
	wake        chan struct{}
	bound       map[types.UID]string // Pods that we bound and that the cache may still show as pending → node
}

func (s *Scheduler) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Run binds Pods until the context ends.
func (s *Scheduler) Run(ctx context.Context) {
	if !cache.WaitForCacheSync(ctx.Done(), s.pods.HasSynced, s.nodes.HasSynced) {
		return
	}
	for {
		retry := time.Hour
		if !s.pass(ctx) {
			retry = time.Second
		}
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-time.After(retry):
		}
	}
}

// pass binds every pending Pod that fits somewhere. It tells whether no request failed.
func (s *Scheduler) pass(ctx context.Context) bool {
	var pods, pending []*corev1.Pod
	seen := map[types.UID]bool{}
	for _, o := range s.pods.GetStore().List() {
		pod := o.(*corev1.Pod)
		seen[pod.UID] = true
		if pod.Spec.NodeName != "" {
			delete(s.bound, pod.UID)
		}
		pods = append(pods, pod)
		if pod.Spec.NodeName == "" && s.bound[pod.UID] == "" && pod.DeletionTimestamp == nil && len(pod.Spec.SchedulingGates) == 0 {
			pending = append(pending, pod)
		}
	}
	maps.DeleteFunc(s.bound, func(uid types.UID, _ string) bool { return !seen[uid] })
	slices.SortFunc(pending, func(a, b *corev1.Pod) int {
		if c := a.CreationTimestamp.Compare(b.CreationTimestamp.Time); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	ok := true
	for _, pod := range pending {
		node := choose(pod, s.candidates(), pods, s.bound)
		if node == "" {
			continue // a node that becomes fit wakes us
		}
		err := s.client.CoreV1().Pods(pod.Namespace).Bind(ctx, &corev1.Binding{
			ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
			Target:     corev1.ObjectReference{Kind: "Node", Name: node},
		}, metav1.CreateOptions{})
		switch {
		case err == nil:
			s.bound[pod.UID] = node
		case apierrors.IsNotFound(err), apierrors.IsConflict(err):
		default:
			if ctx.Err() == nil {
				s.log.Warn("cannot bind pod", "pod", pod.Namespace+"/"+pod.Name, "node", node, "error", err)
			}
			ok = false
		}
	}
	return ok
}

func (s *Scheduler) candidates() []*corev1.Node {
	var nodes []*corev1.Node
	for _, o := range s.nodes.GetStore().List() {
		if n := o.(*corev1.Node); !n.Spec.Unschedulable && NodeReady(n) {
			nodes = append(nodes, n)
		}
	}
	slices.SortFunc(nodes, func(a, b *corev1.Node) int { return strings.Compare(a.Name, b.Name) })
	return nodes
}

// choose picks the node for a pod, or none. Pure. bound overrides the node of pods that still look pending.
func choose(pod *corev1.Pod, nodes []*corev1.Node, pods []*corev1.Pod, bound map[types.UID]string) string {
	type load struct{ siblings, pods int }
	loads := map[string]load{}
	owner := metav1.GetControllerOf(pod)
	for _, p := range pods {
		node := p.Spec.NodeName
		if node == "" {
			node = bound[p.UID]
		}
		if node == "" || p.DeletionTimestamp != nil || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			continue
		}
		l := loads[node]
		l.pods++
		if o := metav1.GetControllerOf(p); owner != nil && o != nil && o.UID == owner.UID {
			l.siblings++
		}
		loads[node] = l
	}
	best := ""
	for _, n := range nodes {
		if !labels.SelectorFromSet(pod.Spec.NodeSelector).Matches(labels.Set(n.Labels)) {
			continue
		}
		l, b := loads[n.Name], loads[best]
		if best == "" || l.siblings < b.siblings || l.siblings == b.siblings && l.pods < b.pods {
			best = n.Name
		}
	}
	return best
}

// NodeReady tells whether the node's Ready condition is True.
func NodeReady(n *corev1.Node) bool {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
