package programmed

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// quietNode is a NodeProxyState whose agent the test plays.
type quietNode struct {
	t       *testing.T
	client  client.Client
	silence *silence
}

func newQuietNode(t *testing.T, interval time.Duration, labels map[string]string) *quietNode {
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	c := fake.NewClientBuilder().WithScheme(scheme).WithStatusSubresource(&v1alpha1.NodeProxyState{}).WithObjects(&v1alpha1.NodeProxyState{
		ObjectMeta: metav1.ObjectMeta{Name: "node1", UID: "1", Labels: labels},
		Spec:       v1alpha1.NodeProxyStateSpec{ReportInterval: &metav1.Duration{Duration: interval}},
	}).Build()
	return &quietNode{t, c, newSilence(c)}
}

func (q *quietNode) state() *v1alpha1.NodeProxyState {
	q.t.Helper()
	var s v1alpha1.NodeProxyState
	if err := q.client.Get(q.t.Context(), client.ObjectKey{Name: "node1"}, &s); err != nil {
		q.t.Fatal(err)
	}
	return &s
}

// report does what an agent does: it replaces the whole status.
func (q *quietNode) report(sent time.Time) {
	q.t.Helper()
	s := q.state()
	s.Status = v1alpha1.NodeProxyStateStatus{AssignmentRevision: "5", HeartbeatTime: &metav1.Time{Time: sent},
		Conditions: []metav1.Condition{{Type: v1alpha1.NodeProxyReady, Status: metav1.ConditionTrue, Reason: "Programmed"}, {Type: v1alpha1.NodeProxyKernelTuned, Status: metav1.ConditionTrue}}}
	if err := q.client.Status().Update(q.t.Context(), s); err != nil {
		q.t.Fatal(err)
	}
}

// look reconciles and gives when it wants to do so again.
func (q *quietNode) look() time.Duration {
	q.t.Helper()
	result, err := q.silence.Reconcile(q.t.Context(), ctrl.Request{NamespacedName: types.NamespacedName{Name: "node1"}})
	if err != nil {
		q.t.Fatal(err)
	}
	return result.RequeueAfter
}

func (q *quietNode) expect(what string, status metav1.ConditionStatus, reason string) *metav1.Condition {
	q.t.Helper()
	s := q.state()
	c := meta.FindStatusCondition(s.Status.Conditions, v1alpha1.NodeProxyReady)
	if c == nil || c.Status != status || c.Reason != reason || s.Status.AssignmentRevision != "5" || len(s.Status.Conditions) != 2 {
		q.t.Fatalf("%s: %+v, want %s %s and all else as the agent wrote it", what, s.Status, status, reason)
	}
	return c
}

var byUs = map[string]string{managedByLabel: v1alpha1.ManagedBy}

func TestSilentAgent(t *testing.T) {
	for _, c := range []struct{ interval, patience time.Duration }{{200 * time.Millisecond, 3 * time.Minute}, {25600 * time.Millisecond, 768 * time.Second}} {
		synctest.Test(t, func(t *testing.T) {
			q := newQuietNode(t, c.interval, byUs)
			if q.look() != 0 {
				t.Error("waits for an agent that never was there")
			}
			q.report(time.Now().Add(-time.Hour)) // its clock is slow
			for range 10 {
				if again := q.look(); again != c.patience {
					t.Errorf("looks again after %v, want %v", again, c.patience)
				}
				time.Sleep(c.patience - time.Second)
				if again := q.look(); again != time.Second {
					t.Errorf("looks again after %v, want 1s", again)
				}
				q.expect("in time", metav1.ConditionTrue, "Programmed")
				q.report(time.Now().Add(-time.Hour))
			}
			q.look()
			last := q.state().Status.HeartbeatTime
			time.Sleep(c.patience)
			if again := q.look(); again != 0 {
				t.Errorf("looks again after %v although the next heartbeat is an event", again)
			}
			silent := q.expect("silent", metav1.ConditionUnknown, reasonSilent)
			if !strings.Contains(silent.Message, last.UTC().Format(time.RFC3339)) {
				t.Errorf("the message does not say since when: %s", silent.Message)
			}
			version := q.state().ResourceVersion
			time.Sleep(time.Hour)
			q.look()
			if q.state().ResourceVersion != version {
				t.Error("tells the same again")
			}
			q.report(time.Now().Add(-time.Hour))
			if again := q.look(); again != c.patience {
				t.Errorf("looks again after %v, want %v", again, c.patience)
			}
			q.expect("back", metav1.ConditionTrue, "Programmed")

			// Another leader has not heard it yet, which is not the agent's fault.
			q.silence = newSilence(q.client)
			time.Sleep(c.patience)
			if again := q.look(); again != c.patience {
				t.Errorf("after a change of leaders it looks again after %v, want %v", again, c.patience)
			}
			q.expect("after a change of leaders", metav1.ConditionTrue, "Programmed")
		})
	}
}

func TestSilenceOfOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQuietNode(t, time.Second, nil) // not ours
		q.report(time.Now())
		q.look()
		time.Sleep(time.Hour)
		q.look()
		q.expect("an object that is not ours", metav1.ConditionTrue, "Programmed")
	})
}

// What is remembered of a node goes with its NodeProxyState.
func TestSilenceForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQuietNode(t, time.Second, byUs)
		q.report(time.Now())
		q.look()
		if err := q.client.Delete(t.Context(), q.state()); err != nil {
			t.Fatal(err)
		}
		if q.look() != 0 || len(q.silence.heard) != 0 {
			t.Errorf("remembers %v", q.silence.heard)
		}
	})
}
