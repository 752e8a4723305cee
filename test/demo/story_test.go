package main

import (
	"errors"
	"io"
	"strings"
	"testing"
	"time"
)

func TestJudgeMove(t *testing.T) {
	deleted := time.Unix(1000, 0)
	known := map[string]bool{"old": true, "other": true}
	at := func(ms int, pod string, err error) call {
		return call{at: deleted.Add(time.Duration(ms) * time.Millisecond), pod: pod, err: err}
	}
	for _, tt := range []struct {
		name  string
		calls []call
		says  []string
		err   string
	}{
		{
			name:  "traffic moves",
			calls: []call{at(-5, "old", nil), at(30, "old", nil), at(60, "other", nil), at(120, "new", nil), at(130, "new", nil)},
			says:  []string{"the last new connection to it:         30 ms", "in its place:    120 ms", "calls since then: 5, failed: 0", "no call failed"},
		},
		{
			name:  "a call fails",
			calls: []call{at(30, "old", nil), at(60, "", errors.New("connection refused")), at(120, "new", nil)},
			says:  []string{"calls since then: 3, failed: 1"},
			err:   "60ms after the deletion: connection refused",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			err := (&story{out: &out}).judgeMove(tt.calls, "old", known, deleted)
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || err.Error() != tt.err) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
			for _, want := range tt.says {
				if !strings.Contains(out.String(), want) {
					t.Errorf("does not say %q:\n%s", want, &out)
				}
			}
		})
	}
}

func TestOnlyTerminalsGetColours(t *testing.T) {
	if isTerminal(io.Discard) || isTerminal(&strings.Builder{}) {
		t.Error("not a terminal")
	}
	if got := (&story{}).paint("31", "text"); got != "text" {
		t.Errorf("got %q", got)
	}
}
