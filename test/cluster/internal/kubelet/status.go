package kubelet

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ReadyAnnotation on a Pod, set to "false", makes it not ready, as a failing readiness probe would.
const ReadyAnnotation = "serviceproxy.io/ready"

// podState is what a kubelet knows of a Pod besides the object.
type podState struct {
	addresses []netip.Addr // of the pod
	node      []netip.Addr // of its node
	exited    bool         // all containers have ended
	problem   string       // why the pod does not run; empty: it runs
}

// podStatus is the part of a Pod's status that a kubelet owns. Pure: what did not change keeps its times.
func podStatus(pod *corev1.Pod, state podState, now metav1.Time) corev1.PodStatus {
	status := corev1.PodStatus{
		Phase:     corev1.PodRunning,
		StartTime: pod.Status.StartTime,
	}
	if status.StartTime == nil {
		status.StartTime = &now
	}
	for i, a := range state.node {
		if i == 0 {
			status.HostIP = a.String()
		}
		status.HostIPs = append(status.HostIPs, corev1.HostIP{IP: a.String()})
	}
	for i, a := range state.addresses {
		if i == 0 {
			status.PodIP = a.String()
		}
		status.PodIPs = append(status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	running := !state.exited && state.problem == ""
	switch {
	case state.exited:
		status.Phase = corev1.PodSucceeded
	case state.problem != "":
		status.Phase = corev1.PodPending
	}
	healthy := running && pod.Annotations[ReadyAnnotation] != "false"
	for _, c := range pod.Spec.Containers {
		status.ContainerStatuses = append(status.ContainerStatuses, containerStatus(c, *status.StartTime, state, healthy, now))
	}
	for _, c := range []struct {
		kind corev1.PodConditionType
		true bool
	}{
		{corev1.PodScheduled, true},
		{corev1.PodReadyToStartContainers, running},
		{corev1.PodInitialized, true},
		{corev1.ContainersReady, healthy},
		{corev1.PodReady, healthy && gatesOpen(pod)},
	} {
		status.Conditions = append(status.Conditions, podCondition(pod, c.kind, c.true, now))
	}
	return status
}

func containerStatus(c corev1.Container, started metav1.Time, state podState, ready bool, now metav1.Time) corev1.ContainerStatus {
	running := !state.exited && state.problem == ""
	cs := corev1.ContainerStatus{Name: c.Name, Image: c.Image, ImageID: c.Image, Ready: ready, Started: &running}
	switch {
	case state.exited:
		cs.State.Terminated = &corev1.ContainerStateTerminated{Reason: "Completed", StartedAt: started, FinishedAt: now}
	case state.problem != "":
		cs.State.Waiting = &corev1.ContainerStateWaiting{Reason: "CreateContainerError", Message: state.problem}
	default:
		cs.State.Running = &corev1.ContainerStateRunning{StartedAt: started}
	}
	return cs
}

func podCondition(pod *corev1.Pod, kind corev1.PodConditionType, holds bool, now metav1.Time) corev1.PodCondition {
	c := corev1.PodCondition{Type: kind, Status: corev1.ConditionFalse, LastTransitionTime: now}
	if holds {
		c.Status = corev1.ConditionTrue
	}
	if old := findCondition(pod, kind); old != nil && old.Status == c.Status {
		c.LastTransitionTime = old.LastTransitionTime
	}
	return c
}

// gatesOpen tells whether every readiness gate of the Pod is.
func gatesOpen(pod *corev1.Pod) bool {
	for _, gate := range pod.Spec.ReadinessGates {
		if c := findCondition(pod, gate.ConditionType); c == nil || c.Status != corev1.ConditionTrue {
			return false
		}
	}
	return true
}

func findCondition(pod *corev1.Pod, kind corev1.PodConditionType) *corev1.PodCondition {
	i := slices.IndexFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == kind })
	if i < 0 {
		return nil
	}
	return &pod.Status.Conditions[i]
}

// statusHolds tells whether the Pod's status says already what its kubelet means to say.
func statusHolds(pod *corev1.Pod, want corev1.PodStatus) bool {
	have := pod.Status
	if have.Phase != want.Phase || have.PodIP != want.PodIP || have.HostIP != want.HostIP ||
		!equality.Semantic.DeepEqual(have.PodIPs, want.PodIPs) || len(have.ContainerStatuses) != len(want.ContainerStatuses) {
		return false
	}
	for i, c := range want.ContainerStatuses {
		h := have.ContainerStatuses[i]
		if h.Name != c.Name || h.Ready != c.Ready ||
			(h.State.Running == nil) != (c.State.Running == nil) || (h.State.Waiting == nil) != (c.State.Waiting == nil) {
			return false
		}
	}
	for _, c := range want.Conditions {
		if h := findCondition(pod, c.Type); h == nil || h.Status != c.Status {
			return false
		}
	}
	return true
}
