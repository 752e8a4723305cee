package kubelet

import (
	"net/netip"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
)

func TestIPAMHandsOutAddressesInTurn(t *testing.T) {
	pool := newIPAM([]netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")})
	host, addresses, err := pool.take()
	if err != nil {
		t.Fatal(err)
	}
	if addresses[0].String() != "10.244.1.2" || addresses[1].String() != "fd00:10:244:1::2" {
		t.Errorf("first addresses: %v", addresses)
	}
	pool.release(host)
	if _, addresses, err = pool.take(); err != nil || addresses[0].String() != "10.244.1.3" {
		t.Errorf("a released address must rest: got %v, %v", addresses, err)
	}
	seen := map[string]bool{"10.244.1.3": true}
	for range 252 { // .2 and .4 to .254
		_, addresses, err := pool.take()
		if err != nil {
			t.Fatal(err)
		}
		a := addresses[0].String()
		if seen[a] || a == "10.244.1.255" || a == "10.244.1.1" || a == "10.244.1.0" {
			t.Fatalf("%s handed out", a)
		}
		seen[a] = true
	}
	if _, addresses, err := pool.take(); err == nil {
		t.Errorf("%v handed out from a full range", addresses)
	}
}

func TestChoose(t *testing.T) {
	node := func(name string, labels map[string]string) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
	}
	pod := func(owner types.UID, on string) *corev1.Pod {
		p := &corev1.Pod{Spec: corev1.PodSpec{NodeName: on}}
		if owner != "" {
			p.OwnerReferences = []metav1.OwnerReference{{UID: owner, Controller: ptr.To(true)}}
		}
		return p
	}
	nodes := []*corev1.Node{node("a", nil), node("b", map[string]string{"disk": "ssd"}), node("c", nil)}
	ending := pod("x", "a")
	ending.DeletionTimestamp = &metav1.Time{Time: time.Now()}
	pending := pod("x", "")
	pending.UID = "pending"
	selecting := pod("x", "")
	selecting.Spec.NodeSelector = map[string]string{"disk": "ssd"}
	nowhere := pod("x", "")
	nowhere.Spec.NodeSelector = map[string]string{"disk": "tape"}
	for _, tt := range []struct {
		name  string
		pod   *corev1.Pod
		nodes []*corev1.Node
		pods  []*corev1.Pod
		bound map[types.UID]string
		want  string
	}{
		{"the first of equals", pod("x", ""), nodes, nil, nil, "a"},
		{"fewest siblings before fewest pods", pod("x", ""), nodes[:2], []*corev1.Pod{pod("x", "a"), pod("y", "b"), pod("y", "b")}, nil, "b"},
		{"fewest pods among equal siblings", pod("x", ""), nodes[:2], []*corev1.Pod{pod("y", "a")}, nil, "b"},
		{"pods without an owner have no siblings", pod("", ""), nodes[:2], []*corev1.Pod{pod("", "a")}, nil, "b"},
		{"pods that end do not count", pod("x", ""), nodes, []*corev1.Pod{ending}, nil, "a"},
		{"a binding that the cache does not show yet counts", pod("x", ""), nodes[:2], []*corev1.Pod{pending}, map[types.UID]string{"pending": "a"}, "b"},
		{"nodeSelector", selecting, nodes, []*corev1.Pod{pod("x", "b")}, nil, "b"},
		{"no node fits", nowhere, nodes, nil, nil, ""},
		{"no nodes", pod("x", ""), nil, nil, nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := choose(tt.pod, tt.nodes, tt.pods, tt.bound); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestPodStatus(t *testing.T) {
	early, late := metav1.NewTime(time.Unix(100, 0)), metav1.NewTime(time.Unix(200, 0))
	state := podState{addresses: []netip.Addr{netip.MustParseAddr("10.244.1.2")}, node: []netip.Addr{netip.MustParseAddr("172.30.0.11")}}
	newPod := func() *corev1.Pod {
		return &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "echo"}}}}
	}
	exited, broken := state, state
	exited.exited = true
	broken.problem = "no address"
	notReady, gated := newPod(), newPod()
	notReady.Annotations = map[string]string{ReadyAnnotation: "false"}
	gated.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: "example.com/gate"}}
	open := gated.DeepCopy()
	open.Status.Conditions = []corev1.PodCondition{{Type: "example.com/gate", Status: corev1.ConditionTrue}}
	for _, tt := range []struct {
		name                   string
		pod                    *corev1.Pod
		state                  podState
		phase                  corev1.PodPhase
		containersReady, ready corev1.ConditionStatus
	}{
		{"running", newPod(), state, corev1.PodRunning, corev1.ConditionTrue, corev1.ConditionTrue},
		{"made not ready", notReady, state, corev1.PodRunning, corev1.ConditionFalse, corev1.ConditionFalse},
		{"a closed readiness gate", gated, state, corev1.PodRunning, corev1.ConditionTrue, corev1.ConditionFalse},
		{"an open readiness gate", open, state, corev1.PodRunning, corev1.ConditionTrue, corev1.ConditionTrue},
		{"exited", newPod(), exited, corev1.PodSucceeded, corev1.ConditionFalse, corev1.ConditionFalse},
		{"cannot run", newPod(), broken, corev1.PodPending, corev1.ConditionFalse, corev1.ConditionFalse},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pod := tt.pod.DeepCopy()
			status := podStatus(pod, tt.state, early)
			if statusHolds(pod, status) {
				t.Error("an empty status is taken for the right one")
			}
			gates := pod.Status.Conditions
			pod.Status = status
			pod.Status.Conditions = append(pod.Status.Conditions, gates...)
			if status.Phase != tt.phase || status.PodIP != "10.244.1.2" || status.HostIP != "172.30.0.11" {
				t.Errorf("phase %s, pod IP %s, host IP %s", status.Phase, status.PodIP, status.HostIP)
			}
			for kind, want := range map[corev1.PodConditionType]corev1.ConditionStatus{corev1.ContainersReady: tt.containersReady, corev1.PodReady: tt.ready} {
				if c := findCondition(pod, kind); c == nil || c.Status != want {
					t.Errorf("%s: %+v, want %s", kind, c, want)
				}
			}
			again := podStatus(pod, tt.state, late)
			if !statusHolds(pod, again) {
				t.Error("the same status would be written again")
			}
			for _, c := range again.Conditions {
				if !c.LastTransitionTime.Equal(&early) {
					t.Errorf("%s changed its time without changing", c.Type)
				}
			}
		})
	}
}
