package docs_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	// A claim is followed by the number of its proof: [7].
	proofUsed = regexp.MustCompile(`\[(\d+)\]`)
	// A row of the table of proofs: | 7 | `file_test.go`: name of the test |, or several of those, separated by semicolons.
	proofRow  = regexp.MustCompile(`(?m)^\| (\d+) \| (.+) \|$`)
	proofTest = regexp.MustCompile("^`([^`]+)`: (.+)$")
)

func TestEveryClaimAboutAllocationHasATest(t *testing.T) {
	page, err := os.ReadFile("allocation.md")
	if err != nil {
		t.Fatal(err)
	}
	text, proofs, found := strings.Cut(string(page), "\n## Proof\n")
	if !found {
		t.Fatal("the page has no section Proof")
	}
	used := map[string]bool{}
	for _, m := range proofUsed.FindAllStringSubmatch(text, -1) {
		used[m[1]] = true
	}
	given := map[string]bool{}
	for _, row := range proofRow.FindAllStringSubmatch(proofs, -1) {
		number := row[1]
		if given[number] {
			t.Errorf("[%s] stands for two rows", number)
		}
		given[number] = true
		if !used[number] {
			t.Errorf("[%s] proves nothing that the page says", number)
		}
		for proof := range strings.SplitSeq(row[2], "; ") {
			checkProof(t, number, proof)
		}
	}
	if len(given) < 20 {
		t.Errorf("found %d proofs: the search itself is broken", len(given))
	}
	for number := range used {
		if !given[number] {
			t.Errorf("[%s] has no row among the proofs", number)
		}
	}
}

// checkProof fails unless proof names a file of tests and a test in it.
func checkProof(t *testing.T, number, proof string) {
	t.Helper()
	m := proofTest.FindStringSubmatch(proof)
	if m == nil {
		t.Errorf("[%s] %q: must be `file_test.go`: name of a test", number, proof)
		return
	}
	code, err := os.ReadFile(filepath.Join("..", m[1]))
	if err != nil || !strings.HasSuffix(m[1], "_test.go") {
		t.Errorf("[%s] %s is no file of tests (%v)", number, m[1], err)
		return
	}
	// A function, or a spec, entry or sub-test by its name.
	if !strings.Contains(string(code), "\nfunc "+m[2]+"(") && !strings.Contains(string(code), `"`+m[2]+`"`) {
		t.Errorf("[%s] %s has no test %q", number, m[1], m[2])
	}
}
