// Command testreport reads `go test -json` and prints what a person wants of it: one line a package as it ends, the output of
// what failed, and what was skipped. It fails if a test failed and, with -no-skips, if one was skipped: a skipped test proves
// nothing, and nobody reads that it was.
//
//	go test -json ./... | testreport [-no-skips]
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
)

// event is a line of `go test -json`, see `go doc test2json`.
type event struct {
	Action, Package, Test, Output string
	ImportPath                    string // of build events
}

func main() {
	noSkips := flag.Bool("no-skips", false, "fail if a test was skipped")
	flag.Parse()
	ok, err := report(os.Stdin, os.Stdout, *noSkips)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
	}
	if !ok || err != nil {
		os.Exit(1)
	}
}

// report copies in to out, shortened, and says whether all is well.
func report(in io.Reader, out io.Writer, noSkips bool) (ok bool, err error) {
	ok = true
	packages := 0
	outputs := map[[2]string]*strings.Builder{} // by package and test, of what still runs
	var skipped []string
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil || e.Action == "" {
			fmt.Fprintln(out, lines.Text()) // not an event: go itself has something to say
			continue
		}
		key := [2]string{e.Package, e.Test}
		if outputs[key] == nil {
			outputs[key] = &strings.Builder{}
		}
		switch e.Action {
		case "build-output":
			fmt.Fprint(out, e.Output)
		case "build-fail":
			ok = false
		case "output":
			outputs[key].WriteString(e.Output)
		case "pass", "fail", "skip":
			text := outputs[key].String()
			delete(outputs, key)
			failed := e.Action == "fail"
			ok = ok && !failed
			if e.Test == "" {
				packages++
				skipped = append(skipped, ginkgoSkips(e.Package, text)...)
				fmt.Fprint(out, summary(text, failed))
				continue
			}
			if failed {
				fmt.Fprint(out, text)
			}
			skipped = append(skipped, ginkgoSkips(e.Package, text)...)
			if e.Action == "skip" {
				skipped = append(skipped, e.Package+" "+e.Test+": "+strings.Join(strings.Fields(text), " "))
			}
		}
	}
	if err := lines.Err(); err != nil {
		return false, err
	}
	for key, output := range outputs { // ended without a verdict: the process died
		if key[1] != "" {
			fmt.Fprintf(out, "%s %s did not end\n%s", key[0], key[1], output)
			ok = false
		}
	}
	if packages == 0 {
		return false, fmt.Errorf("no test was run")
	}
	for _, s := range skipped {
		fmt.Fprintln(out, "SKIPPED", s)
	}
	if noSkips && len(skipped) > 0 {
		return false, fmt.Errorf("%d tests or suites were skipped, and here none may be", len(skipped))
	}
	return ok, nil
}

var ginkgoRan = regexp.MustCompile(`Ran (\d+) of (\d+) Specs`)

// ginkgoSkips finds suites that ran fewer specs than they have: to go test they are one test that passed.
func ginkgoSkips(pkg, output string) []string {
	var out []string
	for _, m := range ginkgoRan.FindAllStringSubmatch(output, -1) {
		if m[1] != m[2] {
			out = append(out, pkg+": "+m[0])
		}
	}
	return out
}

// summary is the last line of a package's own output, "ok  package 1.2s", and all of it if the package failed.
func summary(text string, failed bool) string {
	if failed {
		return text
	}
	lines := strings.SplitAfter(strings.TrimSuffix(text, "\n"), "\n")
	return strings.TrimSuffix(lines[len(lines)-1], "\n") + "\n"
}
