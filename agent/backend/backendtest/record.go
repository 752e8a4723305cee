package backendtest

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// recordsEnv names a folder in which Run leaves what it found, so that who compares subjects need not run the table again.
const recordsEnv = "BACKENDTEST_RECORDS"

func resultOf(t *testing.T, row string) Result {
	r := Result{Row: row, Outcome: Kept, Tries: 1}
	switch {
	case t.Failed():
		r.Outcome, r.Log = Broken, "see the test's own output"
	case t.Skipped():
		r.Outcome = NotApplicable
	}
	return r
}

// record leaves results under the name of the test's program: nftables.test for the package nftables.
func record(t *testing.T, results []Result) {
	t.Helper()
	dir := os.Getenv(recordsEnv)
	if dir == "" {
		return
	}
	text, err := json.Marshal(results)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, filepath.Base(os.Args[0])+".json"), text, 0o644)
	}
	if err != nil {
		t.Fatalf("record the results: %v", err)
	}
}

// Recorded gives what Run has found in another program of the same test run; nothing if it did not run, or not all of the table.
func Recorded(program string) []Result {
	text, err := os.ReadFile(filepath.Join(os.Getenv(recordsEnv), program+".json"))
	var out []Result
	if os.Getenv(recordsEnv) == "" || err != nil || json.Unmarshal(text, &out) != nil {
		return nil
	}
	for _, s := range Table() {
		if !slices.ContainsFunc(out, func(r Result) bool { return r.Row == s.Name }) {
			return nil
		}
	}
	return out
}
