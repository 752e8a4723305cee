package parity

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/backendtest"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/nftables"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

var update = flag.Bool("update", false, "write docs/parity.md instead of comparing it")

const (
	moduleRoot = "../.."
	pagePath   = moduleRoot + "/docs/parity.md"
)

// column is a proxy that is compared.
type column struct {
	name string
	// reference says that it is not ours: it may break rows, if reasons says why.
	reference bool
	// conformance is the program of the tests that hold it to the same table anyway, if there is one: what they found is not found again.
	conformance string
	start       backendtest.Starter
}

// columns are all of them. A mode of ours is added here, and nowhere else.
func columns(t *testing.T) []column {
	program := filepath.Join(assets(t), "kube-proxy")
	return []column{
		{name: "nftables", conformance: "nftables.test", start: backendtest.Backend(func() (backend.Backend, error) { return nftables.New() },
			backendtest.Breakage{Name: "the tables are taken away", Do: func(node *netns.NS) error {
				_, err := node.Run("nft", "delete table ip serviceproxy; delete table ip6 serviceproxy")
				return err
			}})},
		{name: upstreamIPTables, reference: true, start: startKubeProxy("iptables", program, t.TempDir())},
		{name: upstreamNFTables, reference: true, start: startKubeProxy("nftables", program, t.TempDir())},
	}
}

// assets gives the folder of the Kubernetes programs.
func assets(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("KUBEBUILDER_ASSETS")
	if _, err := os.Stat(filepath.Join(dir, "kube-proxy")); dir == "" || err != nil {
		t.Fatal("KUBEBUILDER_ASSETS names no folder with kube-proxy: export KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)")
	}
	return dir
}

func TestMain(m *testing.M) {
	flag.Parse()
	// All columns side by side, whatever the number of processors: they mostly wait.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	m.Run()
}

// results are what became of each row for each column.
type results struct {
	mu  sync.Mutex
	all map[string]map[string]backendtest.Result // by column and row
}

func (r *results) add(column string, result backendtest.Result) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.all[column] == nil {
		r.all[column] = map[string]backendtest.Result{}
	}
	r.all[column][result.Row] = result
}

// TestParity runs the whole table against every column, and the tests that prove what a node is owed, and compares the page with what came out.
func TestParity(t *testing.T) {
	netns.RequireRoot(t)
	list := columns(t)
	found := results{all: map[string]map[string]backendtest.Result{}}
	var proved map[proof]bool
	t.Run("run", func(t *testing.T) {
		for _, c := range list {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				judge(t, c, &found)
			})
		}
		t.Run("node", func(t *testing.T) {
			t.Parallel()
			proved = runProofs(t)
		})
	})
	if t.Failed() {
		return // the page would say what is not so
	}
	version, err := exec.Command(filepath.Join(assets(t), "kube-proxy"), "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	comparePage(t, render(page{columns: list, results: found.all, proved: proved, upstream: strings.TrimSpace(string(version))}))
}

// judge judges one column. Ours has to keep every row; a reference has to keep those that reasons does not name, and no other.
func judge(t *testing.T, c column, found *results) {
	lenience := func(row string) backendtest.Lenience {
		switch {
		case !c.reference:
			return backendtest.Strict
		case reasonFor(c.name, row) != nil:
			return backendtest.Doomed
		}
		return backendtest.Lenient
	}
	check := func(r backendtest.Result) {
		found.add(c.name, r)
		first, _, _ := strings.Cut(r.Log, "\n")
		t.Logf("%s: %s after %.1f s and %d tries: %s: %s", c.name, r.Outcome, r.Took.Seconds(), r.Tries, r.Row, first)
		switch doomed := reasonFor(c.name, r.Row) != nil; {
		case r.Outcome != backendtest.Kept && !doomed:
			t.Errorf("%s, %q: %s\n%s", c.name, r.Row, r.Outcome, r.Log)
		case r.Outcome == backendtest.Kept && doomed:
			t.Errorf("reasons_test.go says why %s does not keep %q, but it does", c.name, r.Row)
		}
	}
	list := backendtest.Recorded(c.conformance)
	var known memory
	if c.reference {
		known = remember(t, c.name)
		list = known.recall(t)
	}
	if len(list) > 0 {
		for _, r := range list {
			check(r)
		}
		return
	}
	backendtest.Judge(t, c.start, lenience, func(r backendtest.Result) {
		list = append(list, r)
		check(r)
	})
	if !t.Failed() {
		known.keep(t, list)
	}
}

// reasonFor gives why a column breaks a row, or nil.
func reasonFor(column, row string) *reason {
	for i, r := range reasons {
		if slices.Contains(r.proxies, column) && slices.Contains(r.rows, row) {
			return &reasons[i]
		}
	}
	return nil
}

func comparePage(t *testing.T, want string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(pagePath, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	got, err := os.ReadFile(pagePath)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("docs/parity.md is not what the run shows, run make parity (-want +got):\n%s", diff)
	}
}

// TestRows holds the lists of this package to the table.
func TestRows(t *testing.T) {
	times := map[string]int{}
	for _, p := range promises {
		for _, row := range p.rows {
			times[row]++
		}
	}
	table := map[string]bool{}
	for _, s := range backendtest.Table() {
		if table[s.Name] {
			t.Errorf("the table has two rows %q", s.Name)
		}
		table[s.Name] = true
		if n := times[s.Name]; n != 1 {
			t.Errorf("%q is under %d promises: put it under one in rows_test.go", s.Name, n)
		}
	}
	for row := range times {
		if !table[row] {
			t.Errorf("rows_test.go names %q, which the table has not", row)
		}
	}
	explained := map[string]bool{}
	for _, r := range reasons {
		for _, row := range r.rows {
			if !table[row] {
				t.Errorf("reasons_test.go names %q, which the table has not", row)
			}
			for _, c := range r.proxies {
				key := fmt.Sprint(c, ": ", row)
				if explained[key] {
					t.Errorf("reasons_test.go explains twice: %s", key)
				}
				explained[key] = true
			}
		}
	}
}
