package agent

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/agent/sysctl"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

func newState(ranges ...string) *v1alpha1.NodeProxyState {
	return &v1alpha1.NodeProxyState{ObjectMeta: metav1.ObjectMeta{Name: thisNode, UID: "1"}, Spec: v1alpha1.NodeProxyStateSpec{ServiceRanges: ranges}}
}

// words writes prefixes one after the other.
func words(list []netip.Prefix) string {
	var out []string
	for _, p := range list {
		out = append(out, p.String())
	}
	return strings.Join(out, " ")
}

func TestDeclaredRanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		nft := r.modes[0]
		web := newSlice("web", "10.1.0.1")
		r.sync(newAssignment("web", "10.99.0.1"), web) // without a NodeProxyState
		pause(time.Second)
		expect(t, "kernel", endpointsIn(nft, "web"), "of 10.1.0.1")
		expect(t, "ranges before any are declared", words(nft.standsOn().Ranges), "")

		r.put(newState("fd00:99::/112", "10.99.0.0/16", "10.99.0.0/33", "10.98.7.0/16", "0.0.0.0/0", "10.99.0.0/16", "::ffff:10.97.0.0/112"))
		pause(time.Second)
		expect(t, "ranges", words(nft.standsOn().Ranges), "10.99.0.0/16 fd00:99::/112")
		for i, bad := range map[int]string{2: "10.99.0.0/33", 3: "10.98.7.0/16", 4: "0.0.0.0/0", 6: "::ffff:10.97.0.0/112"} {
			if r.logs(fmt.Sprintf(`"kind"="NodeProxyState" "object"="/%s"`, thisNode)) != 4 || r.logs(fmt.Sprintf(`"field"="spec.serviceRanges[%d]" "value"=%q`, i, bad)) != 1 {
				t.Errorf("%s is not logged once as bad", bad)
			}
		}
		applies, _ := nft.counts()
		again := newState("10.99.0.0/16", "fd00:99::/112")
		again.Status.Services = 7 // the agent's own report comes back
		r.put(again)
		pause(time.Second)
		if n, _ := nft.counts(); n != applies {
			t.Error("ranges that are the same were programmed again")
		}

		r.remove(again)
		web.Endpoints = newSlice("web", "10.1.0.2").Endpoints
		r.put(web)
		pause(time.Second)
		expect(t, "kernel", endpointsIn(nft, "web"), "of 10.1.0.2")
		expect(t, "ranges of an object that is gone", words(nft.standsOn().Ranges), "10.99.0.0/16 fd00:99::/112")
		r.put(newState())
		pause(time.Second)
		expect(t, "ranges once there are none", words(nft.standsOn().Ranges), "")
	})
}

// A restart must not take ranges away and put them back: the first program has them, because nothing is programmed before the first list is there.
func TestRangesAreThereFromTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		r.must(r.nodes.Replace([]any{newNode("a")}, "1"))
		r.must(r.assignments.Replace([]any{newAssignment("web", "10.99.0.1")}, "2"))
		r.must(r.slices.Replace(nil, "3"))
		pause(time.Minute)
		if _, _, lacks := r.store.pending(); lacks != "the list of NodeProxyStates" {
			t.Errorf("lacks %q", lacks)
		}
		r.must(r.states.Replace([]any{newState("10.99.0.0/16")}, "4"))
		pause(time.Second)
		expect(t, "ranges", words(r.modes[0].standsOn().Ranges), "10.99.0.0/16")
		if n, _ := r.modes[0].counts(); n != 1 {
			t.Errorf("%d applies, want 1", n)
		}
	})
}

func podCIDRs(n *corev1.Node, cidrs ...string) *corev1.Node {
	n.Spec.PodCIDRs = cidrs
	return n
}

func TestNodeCIDR(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		r.store.configure(Settings{NodeCIDR: true})
		defer r.run()()
		nft := r.modes[0]
		r.sync(newAssignment("web", "10.99.0.1"), newSlice("web", "10.1.0.1"))
		pause(time.Minute)
		if n, _ := nft.counts(); n != 0 {
			t.Fatal("programmed although it is not known whose traffic is a pod's")
		}
		if _, _, lacks := r.store.pending(); lacks != "spec.podCIDRs of this agent's own Node" {
			t.Errorf("lacks %q", lacks)
		}
		r.put(podCIDRs(newNode("a"), "10.1.0.0/24", "fd00:1::/64"))
		pause(time.Second)
		expect(t, "kernel", endpointsIn(nft, "web"), "of 10.1.0.1")
		expect(t, "pods", words(nft.standsOn().Pods.Sources), "10.1.0.0/24 fd00:1::/64")
		r.put(podCIDRs(newNode("a"), "10.1.7.0/24"))
		pause(time.Second)
		expect(t, "pods after a change", words(nft.standsOn().Pods.Sources), "10.1.7.0/24")

		// The Node is made anew: its pods go on.
		r.remove(newNode("a"))
		r.put(newNode("a"))
		pause(time.Second)
		expect(t, "pods of a Node that was just made anew", words(nft.standsOn().Pods.Sources), "10.1.7.0/24")
		r.put(podCIDRs(newNode("a"), "10.1.8.0/24"))
		pause(time.Second)
		expect(t, "pods once it has a range again", words(nft.standsOn().Pods.Sources), "10.1.8.0/24")
	})
}

func TestSettingsChangeWhileItRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		nft := r.modes[0]
		changes, kernel := make(chan Settings), make(chan sysctl.Conntrack, 10)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			follow(ctx, r.loop.log, changes, r.store, kernel)
			close(ended)
		}()
		defer func() {
			cancel()
			<-ended
		}()
		web := newSlice("web", "10.1.0.1")
		r.sync(newAssignment("web", "10.99.0.1"), web)
		pause(time.Second)
		held := r.report().Held

		cluster := netip.MustParsePrefix("10.244.0.0/16")
		changes <- Settings{MasqueradeAll: true, DropInvalid: true, Pods: forwarding.PodTraffic{Sources: []netip.Prefix{cluster}, Interfaces: []string{"cni0"}},
			Conntrack: sysctl.Conntrack{Min: 7}}
		pause(time.Second)
		want := forwarding.Ground{MasqueradeAll: true, DropInvalid: true, Pods: forwarding.PodTraffic{Sources: []netip.Prefix{cluster}, Interfaces: []string{"cni0"}}}
		if got := nft.standsOn(); !got.Equal(want) {
			t.Errorf("stands on %+v, want %+v", got, want)
		}
		if got := <-kernel; got.Min != 7 {
			t.Errorf("the kernel's settings are %+v", got)
		}
		if got := r.report(); got.Held != held || got.Reason != "" {
			t.Errorf("report: %+v", got)
		}

		// It asks for what the Node does not have: what is in force stays so, and Services go on.
		changes <- Settings{NodeCIDR: true}
		web.Endpoints = newSlice("web", "10.1.0.2").Endpoints
		r.put(web)
		pause(time.Second)
		expect(t, "kernel", endpointsIn(nft, "web"), "of 10.1.0.2")
		if got := nft.standsOn(); !got.Equal(want) {
			t.Errorf("stands on %+v although nothing better is known", got)
		}
		if r.logs(`"missing"="spec.podCIDRs of this agent's own Node"`) != 1 {
			t.Error("nobody is told that the settings are not in force")
		}
		r.put(podCIDRs(newNode("a"), "10.1.0.0/24"))
		pause(time.Second)
		if got := nft.standsOn(); words(got.Pods.Sources) != "10.1.0.0/24" || got.MasqueradeAll {
			t.Errorf("stands on %+v, want the Node's pods", got)
		}
		close(changes) // the configuration is not followed any more
		<-ended
	})
}

// A Node's addresses and labels change while the agent runs.
func TestNodeChangesWhileItRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		nft := r.modes[0]
		edge := newAssignment("edge", "10.99.0.1")
		edge.Spec.NodeSelector = metav1.LabelSelector{MatchLabels: map[string]string{"edge": "yes"}}
		edge.Spec.Ports[0].NodePort, edge.Spec.NodePortAddresses = 30080, []string{"Primary"}
		edge.Spec.ExternalTrafficPolicy, edge.Spec.HealthCheckNodePort = corev1.ServiceExternalTrafficPolicyLocal, 32000
		slice := newSlice("edge", "10.1.0.1")
		slice.Endpoints[0].NodeName = new(thisNode)
		r.sync(edge, slice)
		pause(time.Second)
		expect(t, "a node that is not selected", nft.names(), "")

		node := newNode("a")
		node.Labels["edge"] = "yes"
		r.put(node)
		pause(time.Second)
		expect(t, "selected", endpointsIn(nft, "edge"), "of 10.1.0.1")
		expect(t, "node port at", words(nft.get("edge").NodePortAddresses), "192.168.0.1/32")
		if got := r.check("edge"); got.Port != 32000 || got.Endpoints != 1 {
			t.Errorf("health check %+v", got)
		}

		node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.168.0.2"}, {Type: corev1.NodeInternalIP, Address: "192.168.0.3"}}
		r.put(node)
		pause(time.Second)
		expect(t, "node port at other addresses", words(nft.get("edge").NodePortAddresses), "192.168.0.2/32 192.168.0.3/32")
		expect(t, "health check at other addresses", words(r.check("edge").Addresses), "192.168.0.2/32 192.168.0.3/32")

		delete(node.Labels, "edge")
		r.put(node)
		pause(time.Second)
		expect(t, "not selected any more", nft.names(), "")
		if got := r.check("edge"); got.Port != 0 {
			t.Errorf("health check %+v on a node that is not selected", got)
		}
		node.Labels["edge"] = "yes"
		r.put(node)
		pause(time.Second)
		expect(t, "selected again", endpointsIn(nft, "edge"), "of 10.1.0.1")
	})
}

// asked gives the answer of a probe.
func asked(r *rig, path string) (code int, body string) {
	w := httptest.NewRecorder()
	r.loop.health.handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	if h := w.Result().Header; h.Get("Content-Type") != "application/json" || h.Get("X-Content-Type-Options") != "nosniff" {
		r.t.Errorf("%s has headers %v", path, h)
	}
	return w.Code, strings.TrimSpace(w.Body.String())
}

// TestHealthLikeKubeProxy plays what happens to a node. The code and the fields are those of pkg/proxy/healthcheck in v1.37; problem is ours.
func TestHealthLikeKubeProxy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		nft := r.modes[0]
		web := newSlice("web", "10.1.0.1")
		r.sync(newAssignment("web", "10.99.0.1"), web)
		pause(time.Second)
		at := func(t time.Time) string { return t.Format(time.RFC3339Nano) }
		var updated time.Time // when the kernel last held all it should
		body := func(last time.Time, eligible string, healthy bool, problem string) string {
			family := fmt.Sprintf(`{"lastUpdated":%q,"healthy":%t}`, at(updated), healthy)
			out := fmt.Sprintf(`{"lastUpdated":%q,"currentTime":%q,%s"healthy":%t,"status":{"IPv4":%s,"IPv6":%s}`, at(last), at(time.Now()), eligible, healthy, family, family)
			if problem != "" {
				out += fmt.Sprintf(`,"problem":%q`, problem)
			}
			return out + "}"
		}
		const eligible, leaving = `"nodeEligible":true,`, `"nodeEligible":false,`
		step := func(what string, healthz int, node string, livez int, problem string) {
			t.Helper()
			r.loop.health.mu.Lock()
			updated = r.loop.health.lastUpdated
			r.loop.health.mu.Unlock()
			for _, probe := range []struct {
				path, node string
				code       int
			}{{"/healthz", node, healthz}, {"/livez", "", livez}} {
				last, healthy, says := time.Now(), livez == 200, problem
				if probe.code != 200 {
					last = updated
				}
				if probe.path == "/livez" && livez == 200 {
					says = ""
				}
				code, got := asked(r, probe.path)
				if want := body(last, probe.node, healthy, says); code != probe.code || got != want {
					t.Errorf("%s: %s is %d %s\nwant %d %s", what, probe.path, code, got, probe.code, want)
				}
			}
		}
		step("all is well", 200, eligible, 200, "")
		pause(time.Hour)
		step("nothing happened for long", 200, eligible, 200, "")

		const going = "the node is going away"
		node := newNode("a")
		node.Spec.Taints = []corev1.Taint{{Key: "node.kubernetes.io/unschedulable"}}
		r.put(node)
		pause(minInterval)
		step("another taint", 200, eligible, 200, "")
		node.Spec.Taints = append(node.Spec.Taints, corev1.Taint{Key: "ToBeDeletedByClusterAutoscaler", Effect: corev1.TaintEffectNoSchedule})
		r.put(node)
		pause(minInterval)
		step("tainted by the autoscaler", 503, leaving, 200, going)
		node.Spec.Taints = nil
		r.put(node)
		pause(minInterval)
		step("the autoscaler thought better of it", 200, eligible, 200, "")
		now := metav1.Now()
		node.DeletionTimestamp = &now
		r.put(node)
		pause(minInterval)
		step("being deleted", 503, leaving, 200, going)
		r.remove(node)
		pause(minInterval)
		step("gone", 503, leaving, 200, going)
		r.put(newNode("a"))
		pause(minInterval)
		step("made anew", 200, eligible, 200, "")

		// The kernel does not answer at all: no failure is ever returned.
		hang := make(chan struct{})
		nft.mu.Lock()
		nft.hang = hang
		nft.mu.Unlock()
		hung := time.Now()
		web.Endpoints = newSlice("web", "10.1.0.2").Endpoints
		r.put(web)
		pause(healthTimeout - time.Second)
		step("an update waits, not for long", 200, eligible, 200, "")
		pause(time.Second)
		step("an update waits for long", 503, eligible, 503, "an update has been waiting for the kernel for 1m0s")
		if !updated.Before(hung) {
			t.Errorf("lastUpdated is %v although the kernel hangs since %v", updated, hung)
		}
		close(hang)
		synctest.Wait()
		step("the kernel is back", 200, eligible, 200, "")
		if !updated.Equal(time.Now()) {
			t.Errorf("lastUpdated is %v, want now", updated)
		}
	})
}

// Before the first list nothing is known of the node, and the families were never up to date.
func TestHealthBodyBeforeTheFirstSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		if code, body := asked(r, "/healthz"); code != 200 || strings.Contains(body, "status") || !strings.Contains(body, `"problem":"waiting for the list of ServiceAssignments"`) {
			t.Errorf("%d %s", code, body)
		}
	})
}

// An agent that starts while the API server is away is healthy for as long as what an earlier run left forwards, and else for a minute.
func TestHealthWhileTheFirstSyncTakesLong(t *testing.T) {
	for _, inherits := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, v1alpha1.ProxyModeNFTables)
			if inherits {
				s := &forwarding.Service{Key: forwarding.ServiceKey{Namespace: "shop", Name: "web", Port: 80, Protocol: forwarding.TCP}}
				r.modes[0].kernel[s.Key] = s
			}
			defer r.run()()
			pause(healthTimeout - time.Second)
			if code := probe(r, "/healthz"); code != 200 {
				t.Errorf("inherits %t: %d within the first minute", inherits, code)
			}
			pause(time.Hour)
			want := map[bool]int{true: 200, false: 503}[inherits]
			if code, body := asked(r, "/healthz"); code != want || !strings.Contains(body, "waiting for the list") {
				t.Errorf("inherits %t: %d %s, want %d", inherits, code, body, want)
			}
			if probe(r, "/livez") != 200 || probe(r, "/readyz") != 503 {
				t.Errorf("inherits %t: a restart would not help, and nobody knows what is in force", inherits)
			}
			r.sync()
			pause(time.Second)
			if probe(r, "/healthz") != 200 || probe(r, "/readyz") != 200 {
				t.Errorf("inherits %t: not healthy after the first sync", inherits)
			}
		})
	}
}

// Whatever a node's probes say, the order of its feeds must not matter: a Node that comes while it is tainted is not eligible either.
func TestTaintedFromTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, v1alpha1.ProxyModeNFTables)
		defer r.run()()
		node := newNode("a")
		node.Spec.Taints = []corev1.Taint{{Key: "ToBeDeletedByClusterAutoscaler"}}
		r.sync()
		r.must(r.nodes.Replace([]any{node}, r.next()))
		pause(time.Second)
		if code, body := asked(r, "/healthz"); code != 503 || !strings.Contains(body, `"nodeEligible":false`) {
			t.Errorf("%d %s", code, body)
		}
		if code := probe(r, "/livez"); code != 200 {
			t.Errorf("/livez minds the node: %d", code)
		}
	})
}
