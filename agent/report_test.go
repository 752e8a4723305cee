package agent

import (
	"context"
	"encoding/json"
	"errors"
	"reflect"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// writes records what a reporter writes and when.
type writes struct {
	mu   sync.Mutex
	list []v1alpha1.NodeProxyStateStatus
	at   []time.Time
	err  error
}

func (w *writes) write(_ context.Context, status *v1alpha1.NodeProxyStateStatus) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		w.at = append(w.at, time.Now())
		return w.err
	}
	w.list, w.at = append(w.list, *status), append(w.at, time.Now())
	return nil
}

func (w *writes) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.at)
}

func (w *writes) last(t *testing.T) v1alpha1.NodeProxyStateStatus {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.list) == 0 {
		t.Fatal("nothing was written")
	}
	return w.list[len(w.list)-1]
}

func (w *writes) setErr(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
}

func startReporter(t *testing.T) (*reporter, *writes) {
	w := &writes{}
	r := newReporter(logr.Discard(), "v1", w.write)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go r.run(ctx)
	return r, w
}

func ordered(uid types.UID, interval time.Duration) *nodeState {
	return &nodeState{uid: uid, interval: interval, heartbeat: max(time.Minute, 10*interval)}
}

func held(assignments string) Report {
	return Report{Held: Marks{Assignments: assignments, EndpointSlices: "7"}, Services: 2, Endpoints: 3, LastApplied: time.Now()}
}

func TestOneWritePerIntervalOfTheNewest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := startReporter(t)
		const interval = 20 * time.Second
		r.found(ordered("a", interval))
		for i := range 1000 { // 100 s of changes
			r.publish(held(string(rune('0' + i%10))))
			pause(100 * time.Millisecond)
		}
		pause(interval)
		if n := w.count(); n < 5 || n > 6 {
			t.Errorf("%d writes in 100 s with an interval of 20 s", n)
		}
		for i, at := range w.at[1:] {
			if gap := at.Sub(w.at[i]); gap < interval {
				t.Errorf("two writes %v apart", gap)
			}
		}
		got := w.last(t)
		if got.AssignmentRevision != "9" || got.EndpointSliceRevision != "7" || got.Services != 2 || got.Endpoints != 3 || got.AgentVersion != "v1" {
			t.Errorf("wrote %+v", got)
		}
		if c := got.Conditions[0]; c.Type != v1alpha1.NodeProxyReady || c.Status != metav1.ConditionTrue {
			t.Errorf("condition: %+v", c)
		}
		n := w.count()
		r.publish(*r.latest)
		pause(9 * interval)
		if w.count() != n {
			t.Error("wrote although nothing changed")
		}
	})
}

// All nodes receive a change at the same moment; their writes must spread over the interval, and none may be later than its end.
func TestNodesDoNotWriteAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const nodes, interval = 200, 10 * time.Second
		var all []*writes
		var reporters []*reporter
		for range nodes {
			r, w := startReporter(t)
			r.found(ordered("a", interval))
			r.publish(held("1"))
			reporters, all = append(reporters, r), append(all, w)
		}
		pause(time.Minute)
		change := time.Now()
		for _, r := range reporters {
			r.publish(held("2"))
		}
		pause(interval)
		synctest.Wait()
		var bySecond [10]int
		for _, w := range all {
			at := w.at[len(w.at)-1]
			if at.Before(change) {
				t.Fatal("a report was later than the interval")
			}
			bySecond[min(int(at.Sub(change)/time.Second), 9)]++
		}
		if busiest := slices.Max(bySecond[:]); busiest > 45 { // 20 on average; 45 is more than five standard deviations away
			t.Errorf("%d of %d nodes wrote in the same second: %v", busiest, nodes, bySecond)
		}
	})
}

func TestNoObjectNoWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := startReporter(t)
		r.publish(held("1"))
		pause(time.Hour)
		if w.count() != 0 {
			t.Fatal("wrote to an object that does not exist")
		}
		r.found(ordered("a", time.Second))
		pause(2 * time.Second)
		if w.count() != 1 {
			t.Fatalf("%d writes once the object exists, want 1", w.count())
		}
		// Deleted and made again, by a Node that was: the new one knows nothing.
		r.lost()
		r.found(ordered("b", time.Second))
		pause(2 * time.Second)
		if w.count() != 2 {
			t.Fatalf("%d writes after the object was made again, want 2", w.count())
		}
		// Deleted while we write.
		w.setErr(apierrors.NewNotFound(schema.GroupResource{Resource: "nodeproxystates"}, thisNode))
		r.publish(held("2"))
		pause(time.Hour)
		if w.count() != 3 {
			t.Fatalf("%d writes to an object that is gone, want 1", w.count()-2)
		}
		w.setErr(nil)
		r.found(ordered("c", time.Second))
		pause(2 * time.Second)
		if got := w.last(t); got.AssignmentRevision != "2" {
			t.Errorf("wrote %+v", got)
		}
	})
}

// A quiet node costs one write per heartbeat, and tells nothing else by it.
func TestSignsOfLife(t *testing.T) {
	for _, c := range []struct{ interval, heartbeat time.Duration }{{200 * time.Millisecond, time.Minute}, {25600 * time.Millisecond, 256 * time.Second}} {
		synctest.Test(t, func(t *testing.T) {
			r, w := startReporter(t)
			r.found(ordered("a", c.interval))
			r.publish(held("1"))
			pause(100 * c.heartbeat)
			if n := w.count(); n < 90 || n > 101 {
				t.Errorf("%d writes in 100 heartbeats", n)
			}
			for i, at := range w.at[1:] {
				if gap := at.Sub(w.at[i]); gap < c.heartbeat || gap > c.heartbeat+c.interval {
					t.Errorf("two signs of life %v apart, want %v to %v", gap, c.heartbeat, c.heartbeat+c.interval)
				}
				now, before := w.list[i+1], w.list[i]
				if !now.HeartbeatTime.Time.Equal(at.Truncate(time.Second)) {
					t.Errorf("at %v it says %v", at, now.HeartbeatTime)
				}
				now.HeartbeatTime = before.HeartbeatTime
				if !reflect.DeepEqual(now, before) {
					t.Errorf("changed from %+v to %+v", before, now)
				}
			}
		})
	}
}

// The controller took the agent for dead, because its reports were on their way for long.
func TestTakenForDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := startReporter(t)
		state := ordered("a", time.Second)
		r.found(state)
		r.publish(held("1"))
		pause(2 * time.Second)
		n := w.count()
		judged := *state
		judged.conditions = []metav1.Condition{{Type: v1alpha1.NodeProxyReady, Status: metav1.ConditionUnknown, Reason: "AgentSilent", LastTransitionTime: metav1.Now()}}
		pause(10 * time.Second)
		back := time.Now()
		r.found(&judged)
		pause(2 * time.Second)
		ready := w.last(t).Conditions[0]
		if w.count() != n+1 || ready.Status != metav1.ConditionTrue || ready.LastTransitionTime.Time.Before(back) {
			t.Errorf("%d writes, the last %+v; want one that says since when it is ready again", w.count()-n, ready)
		}
		judged.conditions = w.last(t).Conditions // its own word comes back
		r.found(&judged)
		pause(30 * time.Second)
		if w.count() != n+1 {
			t.Errorf("%d writes, want 1", w.count()-n)
		}
	})
}

func TestFailedWritesAreTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := startReporter(t)
		r.found(ordered("a", 200*time.Millisecond))
		w.setErr(errors.New("connection refused"))
		r.publish(held("1"))
		pause(10 * time.Minute)
		if n := w.count(); n < 20 || n > 40 {
			t.Errorf("%d tries in ten minutes", n)
		}
		w.setErr(nil)
		pause(writeRetryMax + time.Second)
		if got := w.last(t); got.AssignmentRevision != "1" {
			t.Errorf("wrote %+v", got)
		}
	})
}

func TestNotReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := startReporter(t)
		o := ordered("a", time.Second)
		longAgo := metav1.NewTime(time.Now().Add(-time.Hour))
		o.conditions = []metav1.Condition{{Type: v1alpha1.NodeProxyReady, Status: metav1.ConditionTrue, Reason: "Programmed", LastTransitionTime: longAgo}}
		r.found(o)
		r.publish(held("1"))
		pause(2 * time.Second)
		if got := w.last(t).Conditions[0]; got.Status != metav1.ConditionTrue || !got.LastTransitionTime.Equal(&longAgo) {
			t.Errorf("a restart of the agent counts as a transition: %+v", got)
		}
		bad := held("1")
		bad.Reason, bad.Message = "ApplyFailed", string(make([]byte, 5000))
		r.publish(bad)
		pause(2 * time.Second)
		if got := w.last(t).Conditions[0]; got.Status != metav1.ConditionFalse || got.Reason != "ApplyFailed" || len(got.Message) != 1024 || got.LastTransitionTime.Equal(&longAgo) {
			t.Errorf("condition: %+v", got)
		}
	})
}

// The patch must replace all of the status: what is zero is left out of the value and must not stay in the object.
func TestStatusPatch(t *testing.T) {
	patch, err := statusPatch(&v1alpha1.NodeProxyStateStatus{AssignmentRevision: "5"})
	if err != nil {
		t.Fatal(err)
	}
	var got []map[string]any
	if err := json.Unmarshal(patch, &got); err != nil {
		t.Fatal(err)
	}
	if len(got) != 1 || got[0]["op"] != "add" || got[0]["path"] != "/status" || len(got[0]["value"].(map[string]any)) != 1 {
		t.Errorf("patch is %s", patch)
	}
}
