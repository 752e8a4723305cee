package parity

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// runProofs runs the tests that nodePromises name, and fails for each that is not there or does not pass.
func runProofs(t *testing.T) map[proof]bool {
	t.Helper()
	var packages, tests []string
	wanted := map[proof]bool{}
	for _, promise := range nodePromises {
		for _, x := range promise.proofs {
			wanted[x] = true
			packages, tests = append(packages, "./"+x.pkg), append(tests, x.test)
		}
	}
	slices.Sort(packages)
	slices.Sort(tests)
	// Not from the cache: some look at the kernel, of which go does not know that it has changed.
	args := append([]string{"test", "-json", "-count=1", "-run", "^(" + strings.Join(slices.Compact(tests), "|") + ")$"}, slices.Compact(packages)...)
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir = moduleRoot
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	err := cmd.Run() // what failed is in the output
	proved := map[proof]bool{}
	module := modulePath(t)
	for line := range bytes.Lines(output.Bytes()) {
		var e struct{ Action, Package, Test string }
		if json.Unmarshal(line, &e) == nil && e.Action == "pass" {
			proved[proof{strings.TrimPrefix(e.Package, module+"/"), e.Test}] = true
		}
	}
	for x := range wanted {
		if !proved[x] {
			t.Errorf("%s %s is not there or does not pass", x.pkg, x.test)
		}
	}
	if t.Failed() {
		t.Logf("go %s: %v\n%s", strings.Join(args, " "), err, output.Bytes())
	}
	return proved
}

func modulePath(t *testing.T) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-m")
	cmd.Dir = moduleRoot
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}
