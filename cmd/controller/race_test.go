package main

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/audit"
)

// leakDeadline is how long a reservation that came to nothing may stay.
const leakDeadline = 2 * time.Minute

// Two replicas answer admission while the API server is asked for many Services at once, and one of them is killed, stopped for a while, cut off from the API
// server. Nobody gets what another has, nobody is refused for no reason, and what is recorded is what there is.
func TestTwoReplicasRace(t *testing.T) {
	t.Parallel() // most of its time is waiting
	r := newRace(t)
	leader, other := r.replicas[0], r.replicas[1]
	strict := func(s *v1alpha1.ServiceProxyPolicySpec) { s.Enforcement = v1alpha1.EnforcementStrict }
	kill, partition, pause := r.tenant("kill", nil), r.tenant("partition", nil), r.tenant("pause", strict)
	churn := r.tenant("churn", func(s *v1alpha1.ServiceProxyPolicySpec) { strict(s); s.Reuse.Quarantine = &metav1.Duration{} })
	nobody := audit.Tenant{Namespace: "nobody"} // whom no policy covers
	r.namespace(nobody.Namespace)
	r.answers()
	// during breaks something between two requests, which it makes so long after one another that others go on all the while.
	during := func(first, last int, lasts time.Duration, begin, end func()) func(int) {
		return func(i int) {
			switch {
			case i == first:
				begin()
			case i == last:
				end()
			}
			if first <= i && i < last {
				time.Sleep(lasts / time.Duration(last-first))
			}
		}
	}

	// Nothing is broken: nobody is refused, although addresses and ports are given out again the moment they are free.
	before := r.creates(churn, 0, 150, func(int) {})
	replaced := r.replace(churn, before.made[:120], 150)
	steered := r.creates(nobody, 0, 150, func(int) {})
	for _, o := range []*outcome{before, replaced, steered} {
		r.answered(o, nil)
	}
	r.Expect(bypassed(slices.Concat(before.made, replaced.made))).To(BeEmpty(), "the policy is Strict")
	r.Expect(r.world().Foreign()).To(BeZero(), "what policies declare and others have")
	both := [2]int64{r.webhook.Target(0).Carried(), r.webhook.Target(1).Carried()}
	r.Expect(both).To(HaveEach(BeNumerically(">", 1)), "both replicas were asked")

	// The leader dies, and stays dead until the load is over.
	killed := r.creates(kill, 0, 1000, func(i int) {
		if i == 500 {
			leader.stop()
		}
	})
	around := bypassed(killed.made)
	r.Expect(len(around)).To(BeNumerically("<=", racers), "only what the dead replica had in hand goes without it")
	r.answered(killed, around)
	leader.start()

	// The other one, now the leader, stops for longer than its Lease lasts. It wakes up with an old view of everything, and requests in hand that are long over.
	paused := r.creates(pause, 0, 200, during(40, 160, 17*time.Second,
		func() { r.Expect(other.signal(syscall.SIGSTOP)).To(Succeed()) },
		func() { r.Expect(other.signal(syscall.SIGCONT)).To(Succeed()) }))
	r.Expect(bypassed(paused.made)).To(BeEmpty(), "the policy is Strict")
	r.answered(paused, around)

	// And one is asked, but cannot ask the API server.
	cut := r.creates(partition, 0, 150, during(30, 120, 12*time.Second, leader.api.Target(0).Hold, leader.api.Target(0).Resume))
	around = append(around, bypassed(cut.made)...)
	r.answered(cut, around)
	r.Logf("%d of %d Services came into being without the webhook", len(around), len(killed.made)+len(cut.made))

	r.soundWithin(leakDeadline)
}

// replace deletes Services and creates as many others at once.
func (r *race) replace(t audit.Tenant, olds []*corev1.Service, first int) *outcome {
	r.Helper()
	var out outcome
	start := time.Now()
	load(2*len(olds), func(int) {}, func(i int) {
		if i%2 == 1 {
			r.create(newService(t, first+i/2), &out)
		} else if err := r.delete(olds[i/2]); err != nil {
			out.note(olds[i/2], 0, fmt.Errorf("delete: %w", err))
		}
	})
	r.Logf("%s: %d deletes and creates in %s: %s", t.Namespace, 2*len(olds), time.Since(start).Round(time.Millisecond), &out)
	return &out
}

// answered checks that every client got its Service, and that nobody was refused without a reason.
func (r *race) answered(o *outcome, bypassed []*corev1.Service) {
	r.Helper()
	var failed []string
	for _, err := range o.failed {
		failed = append(failed, err.Error())
	}
	r.Expect(failed).To(BeEmpty())
	r.Expect(r.spurious(o.refused, bypassed)).To(BeEmpty(), "refusals that nothing explains, of %d", len(o.refused))
}

// catchUp is how long a busy machine may take to record what was given out.
const catchUp = 5 * time.Minute

// soundWithin waits until all that Services have is recorded, and then until nothing else is, which takes as long as a reservation that came to nothing may stay.
func (r *race) soundWithin(limit time.Duration) {
	r.Helper()
	start := time.Now()
	unrecorded := func() []string {
		return slices.DeleteFunc(r.world().Faults(), func(fault string) bool {
			return !strings.Contains(fault, " has it") || strings.Contains(fault, " has it not")
		})
	}
	r.Eventually(unrecorded).WithTimeout(catchUp).WithPolling(time.Second).Should(BeEmpty())
	r.Logf("all is recorded %s after the last request", time.Since(start).Round(time.Second))
	start = time.Now()
	r.Eventually(func() []string { return r.world().Faults() }).WithTimeout(limit).WithPolling(time.Second).Should(BeEmpty())
	r.Expect(r.trail.Faults()).To(BeEmpty())
	w := r.world()
	addresses, ports := w.Outside()
	r.Logf("sound after %s: %d Services, %d claims; %d addresses and %d node ports that the API server chose", time.Since(start).Round(time.Second),
		len(w.Services), len(w.Claims), addresses, ports)
}

func (r *race) world() audit.World {
	r.Helper()
	w, err := audit.Read(r.ctx, r.server.Client, r.tenants)
	r.Expect(err).NotTo(HaveOccurred())
	return w
}
