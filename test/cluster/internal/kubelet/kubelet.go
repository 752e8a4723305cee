// Package kubelet stands in for kubelet, scheduler, container runtime and network plugin of an embedded cluster. Pods bound to a
// node get a network namespace, an address of each family from the node's pod ranges and an echo server on their container
// ports; Node and Pod status are kept true.
package kubelet

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/ptr"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// Node is the node that a kubelet looks after.
type Node struct {
	Name      string
	NS        *netns.NS
	Addresses []netip.Addr   // InternalIPs, primary family first
	PodCIDRs  []netip.Prefix // one per family, in the same order
}

// Kubelet looks after one node.
type Kubelet struct {
	node   Node
	client kubernetes.Interface
	log    *slog.Logger
	pods   cache.SharedIndexInformer
	queue  workqueue.TypedRateLimitingInterface[types.NamespacedName]
	seen   func(pod types.NamespacedName, ns *netns.NS)

	mu        sync.Mutex
	sandboxes map[types.NamespacedName]*sandbox
	pool      *ipam

	health chan bool // what Ready should say from now on
}

// New makes a kubelet. podChanged, if not nil, is told of each Pod that got a namespace of its own, and (nil) that lost it.
// The factory must not have been started yet.
func New(node Node, client kubernetes.Interface, factory informers.SharedInformerFactory, log *slog.Logger,
	podChanged func(pod types.NamespacedName, ns *netns.NS),
) (*Kubelet, error) {
	if podChanged == nil {
		podChanged = func(types.NamespacedName, *netns.NS) {}
	}
	k := &Kubelet{
		node: node, client: client, log: log.With("node", node.Name), seen: podChanged,
		pods:      factory.Core().V1().Pods().Informer(),
		queue:     workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[types.NamespacedName]()),
		sandboxes: map[types.NamespacedName]*sandbox{},
		pool:      newIPAM(node.PodCIDRs),
		health:    make(chan bool),
	}
	enqueue := func(o any) {
		if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
			o = gone.Obj
		}
		if pod, ok := o.(*corev1.Pod); ok && pod.Spec.NodeName == node.Name {
			k.queue.Add(types.NamespacedName{Namespace: pod.Namespace, Name: pod.Name})
		}
	}
	_, err := k.pods.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: enqueue, UpdateFunc: func(_, o any) { enqueue(o) }, DeleteFunc: enqueue,
	})
	return k, err
}

// Run registers the node and looks after it until the context ends. Then its pods are gone, and its Node object is as it was.
func (k *Kubelet) Run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { k.heartbeat(ctx) })
	if cache.WaitForCacheSync(ctx.Done(), k.pods.HasSynced) {
		for range 2 {
			wg.Go(func() {
				for k.work(ctx) {
				}
			})
		}
	}
	<-ctx.Done()
	k.queue.ShutDown()
	wg.Wait()
	k.mu.Lock()
	defer k.mu.Unlock()
	for pod := range k.sandboxes {
		k.remove(pod)
	}
}

// PodNS is the namespace of a Pod that runs on this node, nil if there is none.
func (k *Kubelet) PodNS(pod types.NamespacedName) *netns.NS {
	k.mu.Lock()
	defer k.mu.Unlock()
	if s := k.sandboxes[pod]; s != nil {
		return s.ns
	}
	return nil
}

func (k *Kubelet) work(ctx context.Context) bool {
	key, quit := k.queue.Get()
	if quit {
		return false
	}
	defer k.queue.Done(key)
	if err := k.sync(ctx, key); err != nil {
		if ctx.Err() == nil {
			k.log.Warn("pod not in order, trying again", "pod", key, "error", err)
		}
		k.queue.AddRateLimited(key)
		return true
	}
	k.queue.Forget(key)
	return true
}

// sync makes one Pod's sandbox and status what they should be.
func (k *Kubelet) sync(ctx context.Context, key types.NamespacedName) error {
	var pod *corev1.Pod
	if o, exists, err := k.pods.GetStore().GetByKey(key.String()); err != nil {
		return err
	} else if exists && o.(*corev1.Pod).Spec.NodeName == k.node.Name {
		pod = o.(*corev1.Pod)
	}
	state, done := k.syncSandbox(key, pod)
	if pod == nil || done {
		return nil
	}
	if err := k.writeStatus(ctx, pod, state); err != nil {
		return err
	}
	if state.problem != "" {
		return errors.New(state.problem)
	}
	if pod.DeletionTimestamp != nil && state.exited {
		// The status has gone out, and the sandbox goes before the object: whoever sees the Pod gone finds nothing of it any more.
		k.mu.Lock()
		k.remove(key)
		k.mu.Unlock()
		err := k.client.CoreV1().Pods(key.Namespace).Delete(ctx, key.Name, metav1.DeleteOptions{
			GracePeriodSeconds: ptr.To[int64](0), Preconditions: metav1.NewUIDPreconditions(string(pod.UID)),
		})
		return ignoreGone(err)
	}
	return nil
}

// syncSandbox makes, stops or removes the Pod's sandbox. done: there is nothing to report, the Pod has run its course.
func (k *Kubelet) syncSandbox(key types.NamespacedName, pod *corev1.Pod) (_ podState, done bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.sandboxes[key]
	if s != nil && (pod == nil || pod.UID != s.uid) {
		k.remove(key) // deleted by force; perhaps another one took its name
		s = nil
	}
	if pod == nil {
		return podState{}, true
	}
	state := podState{node: k.node.Addresses}
	if pod.DeletionTimestamp != nil {
		if s == nil {
			state.exited = true
			return state, false
		}
		s.stop(pod, func() { k.queue.Add(key) })
		state.addresses, state.exited = s.addresses, s.hasExited()
		return state, false
	}
	if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		k.remove(key)
		return state, true
	}
	if s == nil {
		var err error
		if s, err = newSandbox(pod, k.node, k.pool); err != nil {
			state.problem = err.Error()
			return state, false
		}
		k.sandboxes[key] = s
		if s.host != 0 {
			k.seen(key, s.ns)
		}
	}
	state.addresses = s.addresses
	return state, false
}

// remove removes a Pod's sandbox if there is one. The caller holds the lock.
func (k *Kubelet) remove(key types.NamespacedName) {
	s := k.sandboxes[key]
	if s == nil {
		return
	}
	delete(k.sandboxes, key)
	if s.host != 0 {
		k.seen(key, nil)
	}
	if err := s.close(k.node, k.pool); err != nil {
		k.log.Error("remove pod", "pod", key, "error", err)
	}
}

func (k *Kubelet) writeStatus(ctx context.Context, pod *corev1.Pod, state podState) error {
	status := podStatus(pod, state, metav1.Now())
	if statusHolds(pod, status) {
		return nil
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": pod.UID}, // not another Pod of the same name
		"status":   status,
	})
	if err != nil {
		return err
	}
	_, err = k.client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	return ignoreGone(err)
}

// ignoreGone: an object that is gone, or replaced, needs no more of us.
func ignoreGone(err error) error {
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return err
}
