package main

import (
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	const pass = `{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"output","Package":"p","Output":"ok  \tp\t0.1s\n"}
{"Action":"pass","Package":"p"}
`
	for _, test := range []struct {
		name, in string
		noSkips  bool
		ok       bool
		out      string
	}{
		{"a passing package is one line", pass, true, true, "ok  \tp\t0.1s\n"},
		{"a failing test shows its output",
			`{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:1: no\n"}
{"Action":"fail","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
{"Action":"fail","Package":"p"}
`, false, false, "    a_test.go:1: no\nFAIL\tp\t0.1s\n"},
		{"a skipped test is named",
			`{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:1: needs root\n"}
{"Action":"skip","Package":"p","Test":"TestA"}
` + pass, false, true, "ok  \tp\t0.1s\nSKIPPED p TestA: a_test.go:1: needs root\n"},
		{"a skipped test fails where none may be",
			`{"Action":"skip","Package":"p","Test":"TestA"}` + "\n" + pass, true, false, "ok  \tp\t0.1s\nSKIPPED p TestA: \n"},
		{"a skipped spec is a skip",
			`{"Action":"output","Package":"p","Test":"TestA","Output":"Ran 4 of 5 Specs in 1 seconds\n"}
{"Action":"pass","Package":"p","Test":"TestA"}
` + pass, true, false, "ok  \tp\t0.1s\nSKIPPED p: Ran 4 of 5 Specs\n"},
		{"a suite that ran in full is not", `{"Action":"output","Package":"p","Output":"Ran 5 of 5 Specs in 1 seconds\n"}` + "\n" + pass, true, true, "ok  \tp\t0.1s\n"},
		{"a build failure fails",
			`{"ImportPath":"p","Action":"build-output","Output":"p.go:1: undefined: x\n"}
{"ImportPath":"p","Action":"build-fail"}
{"Action":"output","Package":"p","Output":"FAIL\tp [build failed]\n"}
{"Action":"fail","Package":"p"}
`, false, false, "p.go:1: undefined: x\nFAIL\tp [build failed]\n"},
		{"a test without an end fails", `{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN\n"}` + "\n" + pass, false, false, "ok  \tp\t0.1s\np TestA did not end\n=== RUN\n"},
		{"nothing run is a failure", "", false, false, ""},
		{"what go says passes through", "go: no such module\n" + pass, false, true, "go: no such module\nok  \tp\t0.1s\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out strings.Builder
			ok, err := report(strings.NewReader(test.in), &out, test.noSkips)
			if (ok && err == nil) != test.ok {
				t.Errorf("ok = %v, %v, want %v", ok, err, test.ok)
			}
			if out.String() != test.out {
				t.Errorf("printed %q, want %q", out.String(), test.out)
			}
		})
	}
}
