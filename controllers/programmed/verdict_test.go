package programmed

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/resourceversion"
	"pgregory.net/rapid"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

var (
	nft  = v1alpha1.NodeProxyMode{Mode: v1alpha1.ProxyModeNFTables, Available: true}
	ipvs = v1alpha1.NodeProxyMode{Mode: v1alpha1.ProxyModeIPVS, Available: true}
	ebpf = v1alpha1.NodeProxyMode{Mode: v1alpha1.ProxyModeEBPF, Message: "no BTF"}
)

// holding is a ready node whose agent reported these marks.
func holding(name string, assignments, endpointSlices revision, modes ...v1alpha1.NodeProxyMode) *node {
	return &node{name: name, ready: true, reports: true, holds: marks{assignments, endpointSlices}, modes: modes}
}

func TestEvaluate(t *testing.T) {
	dead := holding("dead", "1", "1")
	dead.ready = false
	silent := &node{name: "silent", ready: true}
	goal := target{marks: marks{"100", "90"}}
	for _, tc := range []struct {
		name  string
		nodes []*node
		mode  v1alpha1.ProxyMode
		goal  target
		want  verdict
	}{
		{"all hold it", []*node{holding("a", "100", "90"), holding("b", "1000", "91")}, "NFTables", goal,
			verdict{ReasonProgrammed, "2 of 2 nodes hold this generation", 2, 2}},
		{"no node", nil, "NFTables", goal,
			verdict{ReasonNoNodes, "No node that is Ready matches the node selector disk=ssd", 0, 0}},
		{"only dead nodes", []*node{dead}, "NFTables", goal,
			verdict{ReasonNoNodes, "No node that is Ready matches the node selector disk=ssd", 0, 0}},
		{"a dead node does not block", []*node{holding("a", "100", "90"), dead}, "NFTables", goal,
			verdict{ReasonProgrammed, "1 of 1 nodes hold this generation", 1, 1}},
		{"one revision short of the assignment", []*node{holding("a", "99", "90"), holding("b", "100", "90")}, "NFTables", goal,
			verdict{ReasonWaitingForNodes, "1 of 2 nodes hold this generation; waiting for a (behind)", 2, 1}},
		{"one revision short of the slices", []*node{holding("a", "100", "89")}, "NFTables", goal,
			verdict{ReasonWaitingForNodes, "0 of 1 nodes hold this generation; waiting for a (behind)", 1, 0}},
		{"revisions compare as numbers", []*node{holding("a", "100", "9")}, "NFTables", target{marks: marks{"99", "10"}},
			verdict{ReasonWaitingForNodes, "0 of 1 nodes hold this generation; waiting for a (behind)", 1, 0}},
		{"an agent that does not report", []*node{holding("a", "100", "90"), silent}, "NFTables", goal,
			verdict{ReasonWaitingForNodes, "1 of 2 nodes hold this generation; waiting for silent (its agent does not report)", 2, 1}},
		{"three are named", []*node{holding("a", "1", "1"), silent, holding("c", "1", "1"), holding("d", "1", "1"), holding("e", "1", "1")}, "NFTables", goal,
			verdict{ReasonWaitingForNodes, "0 of 5 nodes hold this generation; waiting for a (behind), silent (its agent does not report), c (behind) and 2 more", 5, 0}},
		{"no ready endpoint, nodes counted", []*node{holding("a", "100", "90"), holding("b", "99", "90")}, "NFTables",
			target{marks: goal.marks, lacking: "port TCP http"},
			verdict{ReasonNoReadyEndpoints, "No endpoint is ready for port TCP http; 1 of 2 nodes hold this generation", 2, 1}},
		{"no slice at all", []*node{holding("a", "100", "")}, "NFTables", target{marks: marks{"100", ""}, lacking: "port TCP"},
			verdict{ReasonNoReadyEndpoints, "No endpoint is ready for port TCP; 1 of 1 nodes hold this generation", 1, 1}},
		{"a mode that a node cannot do", []*node{holding("a", "100", "90", nft, ipvs, ebpf), holding("b", "100", "90")}, "EBPF", goal,
			verdict{ReasonModeUnsupported, "Proxy mode EBPF is not available on a (no BTF; it can do NFTables, IPVS)", 2, 1}},
		{"a mode that an agent does not know", []*node{holding("a", "100", "90", ebpf)}, "Userspace", goal,
			verdict{ReasonModeUnsupported, "Proxy mode Userspace is not available on a (its agent does not know this mode; it can do no mode)", 1, 0}},
		{"a dead node's mode does not matter", []*node{{name: "dead", modes: []v1alpha1.NodeProxyMode{ebpf}}, holding("b", "100", "90")}, "EBPF", goal,
			verdict{ReasonProgrammed, "1 of 1 nodes hold this generation", 1, 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := evaluate(selection{"disk=ssd", tc.mode, tc.nodes}, survey(tc.nodes, tc.mode), tc.goal)
			if got != tc.want {
				t.Errorf("got  %+v\nwant %+v", got, tc.want)
			}
		})
	}
}

// A verdict is Programmed if and only if each node that counts, looked at by itself, has reached the target, and no port
// lacks an endpoint.
func TestEvaluateIsSound(t *testing.T) {
	revisions := rapid.SampledFrom([]revision{"", "8", "9", "10", "11", "99", "100"})
	rapid.Check(t, func(t *rapid.T) {
		nodes := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) *node {
			n := &node{
				name:    "n",
				ready:   rapid.IntRange(0, 4).Draw(t, "ready") > 0,
				reports: rapid.IntRange(0, 8).Draw(t, "reports") > 0,
				holds:   marks{revisions.Draw(t, "assignments"), revisions.Draw(t, "slices")},
			}
			if rapid.IntRange(0, 8).Draw(t, "modes") == 0 {
				n.modes = []v1alpha1.NodeProxyMode{nft, ebpf}
			}
			return n
		}), 0, 4).Draw(t, "nodes")
		goal := target{
			marks:   marks{rapid.SampledFrom([]revision{"9", "10", "99"}).Draw(t, "assignment"), revisions.Draw(t, "slice")},
			lacking: rapid.SampledFrom([]string{"", "", "", "port TCP"}).Draw(t, "lacking"),
		}
		mode := rapid.SampledFrom([]v1alpha1.ProxyMode{"NFTables", "EBPF"}).Draw(t, "mode")

		counting, holds := 0, 0
		for _, n := range nodes {
			if !n.ready {
				continue
			}
			counting++
			able := len(n.modes) == 0 || mode == "NFTables"
			if able && n.reports && atLeast(n.holds.assignments, goal.assignments) && atLeast(n.holds.slices, goal.slices) {
				holds++
			}
		}
		v := evaluate(selection{"", mode, nodes}, survey(nodes, mode), goal)
		want := counting > 0 && holds == counting && goal.lacking == ""
		if (v.reason == ReasonProgrammed) != want {
			t.Fatalf("%d of %d nodes hold it, lacking %q: %+v", holds, counting, goal.lacking, v)
		}
		if int(v.desired) != counting || int(v.programmed) != holds {
			t.Fatalf("counted %d of %d, want %d of %d", v.programmed, v.desired, holds, counting)
		}
	})
}

// atLeast compares revisions independently of the code under test.
func atLeast(a, b revision) bool {
	var x, y int
	_, _ = fmt.Sscan(string(a), &x) // the empty revision scans as 0
	_, _ = fmt.Sscan(string(b), &y)
	return x >= y
}

func TestParseRevision(t *testing.T) {
	for s, want := range map[string]revision{"1": "1", "18446744073709551616": "18446744073709551616", "": "", "0": "", "01": "", "-1": "", "x": ""} {
		if got := parseRevision(s); got != want {
			t.Errorf("parseRevision(%q) = %q, want %q", s, got, want)
		}
	}
}

func TestRevisionsAreOrderedAsTheAPIOrdersThem(t *testing.T) {
	digits := rapid.StringMatching(`[1-9][0-9]{0,24}`)
	rapid.Check(t, func(t *rapid.T) {
		a, b := digits.Draw(t, "a"), digits.Draw(t, "b")
		want, err := resourceversion.CompareResourceVersion(a, b)
		if err != nil {
			t.Fatal(err)
		}
		if got := revision(a).reached(revision(b)); got != (want >= 0) {
			t.Fatalf("%s reached %s: %v", a, b, got)
		}
	})
	if revision("").reached("1") || !revision("1").reached("") || !revision("").reached("") {
		t.Error("the empty revision is not before all others")
	}
}

func TestNextInterval(t *testing.T) {
	const ms = time.Millisecond
	for _, tc := range []struct {
		current time.Duration
		nodes   int
		want    time.Duration
	}{
		{0, 0, 200 * ms},
		{0, 3, 200 * ms},
		{0, 40, 200 * ms},
		{200 * ms, 41, 400 * ms},
		{400 * ms, 40, 400 * ms}, // stays: 40 nodes are too near the edge
		{400 * ms, 31, 400 * ms},
		{400 * ms, 30, 200 * ms},
		{0, 5000, 25600 * ms},
		{25600 * ms, 5001, 25600 * ms},
		{25600 * ms, 3, 200 * ms},
		{0, 60000, 5 * time.Minute},
		{0, 1000000, 5 * time.Minute},
	} {
		if got := nextInterval(tc.current, tc.nodes); got != tc.want {
			t.Errorf("nextInterval(%v, %d) = %v, want %v", tc.current, tc.nodes, got, tc.want)
		}
	}
}

// However nodes come and go: the agents' budget of 200 reports a second is kept, and one node that comes or goes at the
// edge of a step moves the interval at most once.
func TestNextIntervalKeepsTheBudgetAndDoesNotFlap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		current := time.Duration(0)
		for _, n := range rapid.SliceOfN(rapid.IntRange(0, 100_000), 1, 20).Draw(t, "nodes") {
			current = nextInterval(current, n)
			if current < longestInterval && time.Duration(n)*reportBudget > current {
				t.Fatalf("%d nodes report every %v: more than 200 a second", n, current)
			}
			if up := nextInterval(current, n+1); nextInterval(up, n) != up {
				t.Fatalf("flaps between %d and %d nodes: %v, %v", n, n+1, up, nextInterval(up, n))
			}
		}
	})
}

func TestMessagesStayShort(t *testing.T) {
	var nodes []*node
	why := v1alpha1.NodeProxyMode{Mode: "EBPF", Message: strings.Repeat("m", 1024)}
	for range 5000 {
		nodes = append(nodes, holding(strings.Repeat("n", 253), "1", "1", why))
	}
	// The limit of a condition's message is 32768 bytes; a write that exceeds it is refused.
	if m := evaluate(selection{"", "EBPF", nodes}, survey(nodes, "EBPF"), target{}).message; len(m) > 8192 {
		t.Errorf("message of %d bytes", len(m))
	}
}
