package agent

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr/funcr"
)

func TestLogWaiting(t *testing.T) {
	var lines []string
	log := funcr.New(func(_, args string) { lines = append(lines, args) }, funcr.Options{})
	answers := []string{"the list of EndpointSlices", "this agent's own Node", ""}
	lacks := func() string {
		defer func() { answers = answers[1:] }()
		return answers[0]
	}
	logWaiting(t.Context(), log, time.Millisecond, "https://10.0.0.1:6443", "node1", lacks)
	if len(lines) != 2 {
		t.Fatalf("%d lines instead of one for each time that something lacked: %q", len(lines), lines)
	}
	for i, want := range [][]string{{"the list of EndpointSlices"}, {"this agent's own Node"}} {
		for _, word := range append(slices.Clone(want), "https://10.0.0.1:6443", "node1") {
			if !strings.Contains(lines[i], word) {
				t.Errorf("line %d does not tell %s: %s", i, word, lines[i])
			}
		}
	}
}
