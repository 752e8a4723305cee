package kubelet

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
)

const (
	// heartbeatInterval is how often the Lease is renewed and the Node's status checked.
	heartbeatInterval = 5 * time.Second
	leaseSeconds      = 40
	maxPods           = "200"
)

// SetReady makes the node report this as its Ready condition from now on, first of all now.
func (k *Kubelet) SetReady(ctx context.Context, ready bool) error {
	select {
	case k.health <- ready:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("node %s: its kubelet does not run: %w", k.node.Name, context.Cause(ctx))
	}
}

// heartbeat keeps the Node object and its Lease true.
func (k *Kubelet) heartbeat(ctx context.Context) {
	ready := true
	for {
		next := heartbeatInterval
		if err := k.beat(ctx, ready); err != nil {
			if ctx.Err() != nil {
				return
			}
			k.log.Warn("heartbeat failed, trying again", "error", err)
			next = time.Second
		}
		select {
		case <-ctx.Done():
			return
		case ready = <-k.health:
		case <-time.After(next):
		}
	}
}

func (k *Kubelet) beat(ctx context.Context, ready bool) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	nodes := k.client.CoreV1().Nodes()
	node, err := nodes.Get(ctx, k.node.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		node, err = nodes.Create(ctx, k.newNode(), metav1.CreateOptions{})
	}
	if err != nil {
		return err
	}
	if err := k.renewLease(ctx); err != nil {
		return err
	}
	if NodeReady(node) == ready && len(node.Status.Addresses) > 0 && !k.unknown(node) {
		return nil
	}
	status := k.nodeStatus(ready, metav1.Now())
	if len(node.Status.Addresses) > 0 {
		// They never change, and a strategic merge patch must not name two addresses of one type that are there already: the merge
		// key is the type alone, and it would double them.
		status.Addresses = nil
	}
	patch, err := json.Marshal(map[string]any{"status": status})
	if err != nil {
		return err
	}
	_, err = nodes.Patch(ctx, k.node.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	return err
}

// unknown tells whether the controller manager has given the node up.
func (k *Kubelet) unknown(node *corev1.Node) bool {
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionUnknown
		}
	}
	return true
}

func (k *Kubelet) newNode() *corev1.Node {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: k.node.Name, Labels: map[string]string{
		corev1.LabelHostname:   k.node.Name,
		corev1.LabelOSStable:   runtime.GOOS,
		corev1.LabelArchStable: runtime.GOARCH,
	}}}
	for i, r := range k.node.PodCIDRs {
		if i == 0 {
			node.Spec.PodCIDR = r.String()
		}
		node.Spec.PodCIDRs = append(node.Spec.PodCIDRs, r.String())
	}
	return node
}

func (k *Kubelet) nodeStatus(ready bool, now metav1.Time) corev1.NodeStatus {
	capacity := corev1.ResourceList{
		corev1.ResourceCPU:    resource.MustParse("64"),
		corev1.ResourceMemory: resource.MustParse("256Gi"),
		corev1.ResourcePods:   resource.MustParse(maxPods),
	}
	status := corev1.NodeStatus{
		Capacity: capacity, Allocatable: capacity,
		NodeInfo: corev1.NodeSystemInfo{
			KubeletVersion: "v0.0.0-serviceproxy-test", OperatingSystem: runtime.GOOS, Architecture: runtime.GOARCH,
			ContainerRuntimeVersion: "netns://1", OSImage: "network namespace",
		},
		Addresses: []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: k.node.Name}},
	}
	for _, a := range k.node.Addresses {
		status.Addresses = append(status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	condition := corev1.NodeCondition{
		Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady", Message: "the namespace is up",
		LastHeartbeatTime: now, LastTransitionTime: now,
	}
	if !ready {
		condition.Status, condition.Reason, condition.Message = corev1.ConditionFalse, "KubeletNotReady", "made not ready by a test"
	}
	status.Conditions = []corev1.NodeCondition{condition}
	return status
}

func (k *Kubelet) renewLease(ctx context.Context) error {
	leases := k.client.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	lease := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: k.node.Name, Namespace: corev1.NamespaceNodeLease},
		Spec: coordinationv1.LeaseSpec{
			HolderIdentity: ptr.To(k.node.Name), LeaseDurationSeconds: ptr.To[int32](leaseSeconds), RenewTime: ptr.To(metav1.NowMicro()),
		},
	}
	patch, err := json.Marshal(map[string]any{"spec": lease.Spec})
	if err != nil {
		return err
	}
	_, err = leases.Patch(ctx, k.node.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	if apierrors.IsNotFound(err) {
		_, err = leases.Create(ctx, lease, metav1.CreateOptions{})
	}
	return err
}
