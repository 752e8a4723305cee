package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

const (
	// defaultReportInterval holds until the controller says otherwise.
	defaultReportInterval = time.Second
	writeTimeout          = 10 * time.Second
	writeRetryMax         = 30 * time.Second
)

// reporter writes this node's NodeProxyState: its newest state, if that is news or as a sign of life, and at most once per interval.
//
// All nodes receive a change at the same moment. If each wrote when it is done, they would write all at once; so every
// agent writes only at moments of its own, an interval apart, whose phase is random. All together write at an even rate, and no report waits longer than an interval.
type reporter struct {
	log     logr.Logger
	version string
	bootID  string
	// write replaces the status of this node's object.
	write func(context.Context, *v1alpha1.NodeProxyStateStatus) error

	news chan struct{} // something below changed

	mu       sync.Mutex
	latest   *Report
	uid      types.UID // of the object; empty if there is none
	interval time.Duration
	// heartbeat is how long nothing is written at the most.
	heartbeat time.Duration
	// conditions are the object's, so that a restart of the agent is no transition.
	conditions []metav1.Condition
	kernel     *kernelReport // nil until it is known
	kubeProxy  v1alpha1.KubeProxyPresence
}

func newReporter(log logr.Logger, version string, write func(context.Context, *v1alpha1.NodeProxyStateStatus) error) *reporter {
	return &reporter{log: log, version: version, bootID: bootID(), write: write, interval: defaultReportInterval, heartbeat: time.Minute, news: make(chan struct{}, 1)}
}

// bootID identifies the running kernel's boot the way kubelets do; empty if the kernel does not tell.
func bootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // without it a reboot goes unnoticed until this agent reports, which is all that is lost
	return strings.TrimSpace(string(id))
}

// publish makes r the newest report.
func (r *reporter) publish(report Report) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.latest = &report
	r.signal()
}

// tuned makes k what is known of the kernel.
func (r *reporter) tuned(k kernelReport) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.kernel = &k
	r.signal()
}

func (r *reporter) signal() {
	select {
	case r.news <- struct{}{}:
	default:
	}
}

// The reporter writes only while the controller has an object for this node, and learns the interval from it.

// found says that there is an object, and what it says.
func (r *reporter) found(in *nodeState) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.uid != in.uid {
		r.uid, r.conditions = in.uid, slices.Clone(in.conditions)
		r.signal()
	}
	if in.interval != r.interval || in.heartbeat != r.heartbeat {
		r.interval, r.heartbeat = in.interval, in.heartbeat
		r.signal()
	}
	if meta.IsStatusConditionPresentAndEqual(in.conditions, v1alpha1.NodeProxyReady, metav1.ConditionUnknown) {
		// The controller took this agent for dead. It hears at once that it is not, and the condition when that was.
		r.conditions = slices.Clone(in.conditions)
		r.signal()
	}
}

// lost says that there is no object.
func (r *reporter) lost() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.uid = ""
}

// written is the newest report that the API server has: what it says, but for the time, to which object it went and when.
type written struct {
	status *v1alpha1.NodeProxyStateStatus
	to     types.UID
	at     time.Time
}

// due gives the status to write, the object it is for and the interval; nil if there is nothing to write or no object to write it to. wait is how long there will be nothing, if
// nothing happens; 0 for ever.
func (r *reporter) due(last written) (status *v1alpha1.NodeProxyStateStatus, to types.UID, interval, wait time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.latest == nil || r.uid == "" {
		return nil, "", r.interval, 0
	}
	status = r.status()
	if last.status != nil && last.to == r.uid && reflect.DeepEqual(last.status, status) {
		if wait = r.heartbeat - time.Since(last.at); wait > 0 {
			return nil, "", r.interval, wait
		}
	}
	return status, r.uid, r.interval, 0
}

// run writes until ctx ends.
func (r *reporter) run(ctx context.Context) {
	var (
		last     written
		failures int
		beat     beat
	)
	for {
		status, _, interval, wait := r.due(last)
		if status == nil {
			if !r.rest(ctx, wait) {
				return
			}
			continue
		}
		if !sleep(ctx, beat.next(time.Now(), interval)+writeDelay(failures, interval)) {
			return
		}
		// What happened while it waited is part of the same write.
		status, uid, _, _ := r.due(last)
		if status == nil {
			continue
		}
		now := time.Now()
		sent := *status
		sent.HeartbeatTime = &metav1.Time{Time: now.Truncate(time.Second)} // the API keeps seconds
		writeCtx, cancel := context.WithTimeout(ctx, writeTimeout)
		err := r.write(writeCtx, &sent)
		cancel()
		switch {
		case err == nil:
			last, failures = written{status, uid, now}, 0
		case ctx.Err() != nil:
			return
		case apierrors.IsNotFound(err): // the watch will tell when there is one again
			r.lost()
			last = written{}
		default:
			failures++
			r.log.Error(err, "Could not report what this node's kernel holds; trying again", "failures", failures)
		}
	}
}

// rest waits for news, or until the time is over if it is not 0, and says whether ctx still lives.
func (r *reporter) rest(ctx context.Context, most time.Duration) bool {
	var over <-chan time.Time
	if most > 0 {
		timer := time.NewTimer(most)
		defer timer.Stop()
		over = timer.C
	}
	select {
	case <-ctx.Done():
		return false
	case <-r.news:
	case <-over:
	}
	return true
}

// status is the newest report in the API's form. Called with the lock held.
func (r *reporter) status() *v1alpha1.NodeProxyStateStatus {
	l := r.latest
	status := &v1alpha1.NodeProxyStateStatus{
		AssignmentRevision:    l.Held.Assignments,
		EndpointSliceRevision: l.Held.EndpointSlices,
		Modes:                 slices.Clone(l.Modes),
		Services:              int32(l.Services),
		Endpoints:             int32(l.Endpoints),
		DriftRepairs:          l.DriftRepairs,
		KubeProxy:             r.kubeProxy,
		BootID:                r.bootID,
		AgentVersion:          r.version,
	}
	for i := range status.Modes {
		status.Modes[i].Message = truncate(status.Modes[i].Message, 1024)
	}
	if !l.LastApplied.IsZero() {
		at := metav1.NewTime(l.LastApplied.Truncate(time.Second)) // the API keeps seconds
		status.LastAppliedTime = &at
	}
	ready := metav1.Condition{Type: v1alpha1.NodeProxyReady, Status: metav1.ConditionTrue, Reason: "Programmed", Message: "the kernel holds what it should"}
	if l.Reason != "" {
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, l.Reason, truncate(l.Message, 1024)
	}
	meta.SetStatusCondition(&r.conditions, ready)
	if k := r.kernel; k != nil {
		status.LocalPorts = apiPorts(k.localPorts)
		tuned := metav1.Condition{Type: v1alpha1.NodeProxyKernelTuned, Status: metav1.ConditionTrue, Reason: "Tuned", Message: "the kernel's parameters are at least what the agent's configuration asks for"}
		if k.problem != "" {
			tuned.Status, tuned.Reason, tuned.Message = metav1.ConditionFalse, "ParametersTooLow", truncate(k.problem, 1024)
		}
		meta.SetStatusCondition(&r.conditions, tuned)
	}
	status.Conditions = slices.Clone(r.conditions)
	return status
}

func truncate(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return s[:most-3] + "..."
}

// statusPatch replaces the whole status, unlike a merge patch, which would keep what is left out because it is zero.
func statusPatch(status *v1alpha1.NodeProxyStateStatus) ([]byte, error) {
	type operation struct {
		Op    string `json:"op"`
		Path  string `json:"path"`
		Value any    `json:"value"`
	}
	return json.Marshal([]operation{{"add", "/status", status}})
}

// writer gives the function with which a reporter writes to the API server.
func (c *clients) writer(nodeName string) func(context.Context, *v1alpha1.NodeProxyStateStatus) error {
	return func(ctx context.Context, status *v1alpha1.NodeProxyStateStatus) error {
		patch, err := statusPatch(status)
		if err != nil {
			return fmt.Errorf("encode status: %w", err)
		}
		return c.serviceproxy.Patch(types.JSONPatchType).Resource("nodeproxystates").Name(nodeName).SubResource("status").
			Body(patch).Do(ctx).Error()
	}
}

// beat is a series of moments an interval apart with a random phase.
type beat struct {
	interval time.Duration
	at       time.Time // one of the moments
}

// next gives how long it is until the next moment. A new interval gets a new phase.
func (b *beat) next(now time.Time, interval time.Duration) time.Duration {
	if b.interval != interval {
		b.interval, b.at = interval, now.Add(rand.N(interval))
	}
	if passed := now.Sub(b.at); passed >= 0 {
		b.at = b.at.Add((passed/interval + 1) * interval)
	}
	return b.at.Sub(now)
}

// writeDelay is how much longer to wait after failures in a row.
func writeDelay(failures int, interval time.Duration) time.Duration {
	if failures == 0 {
		return 0
	}
	return min(interval<<min(failures-1, 10), writeRetryMax)
}

// sleep waits and says whether ctx still lives.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
