package docs_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// metricName matches the whole name of a metric, as a literal in the code.
var metricName = regexp.MustCompile(`^serviceproxy_[a-z0-9_]*[a-z0-9]$`)

// metricRow matches a row of a table of metrics.
var metricRow = regexp.MustCompile("(?m)^\\| `(serviceproxy_[a-z0-9_]+)` \\| (counter|gauge|histogram)")

const agentPrefix = "serviceproxy_agent_"

// prefixed are the functions that make metrics of the agent by the rest of their name, with the type of what they make.
var prefixed = map[string]string{"counter": "counter", "counterBy": "counter", "gauge": "gauge", "gaugeBy": "gauge", "gaugeOf": "gauge", "histogram": "histogram"}

// TestEveryMetricIsExplained: the page has a row for each metric, of its type as far as the code tells in one place, and none for others.
func TestEveryMetricIsExplained(t *testing.T) {
	page, err := os.ReadFile("metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]string{}
	for _, row := range metricRow.FindAllStringSubmatch(string(page), -1) {
		documented[row[1]] = row[2]
	}
	found := map[string]string{}
	for _, dir := range []string{"../agent", "../controllers", "../cmd"} {
		if err := collectMetrics(dir, found); err != nil {
			t.Fatal(err)
		}
	}
	// One of each way in which the code names a metric; without them the search itself is broken.
	for _, known := range []string{"serviceproxy_reclaimed_total", "serviceproxy_range_capacity", "serviceproxy_service_bytes_total",
		agentPrefix + "drift_repairs_total", agentPrefix + "config_fields_after_restart"} {
		if _, ok := found[known]; !ok {
			t.Errorf("the search for metrics does not find %s in the code any more", known)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(found)) {
		switch typ, ok := documented[name]; {
		case !ok:
			t.Errorf("%s is not explained in docs/metrics.md", name)
		case found[name] != "" && found[name] != typ:
			t.Errorf("docs/metrics.md has %s as a %s, it is a %s", name, typ, found[name])
		}
	}
	for name := range documented {
		if _, ok := found[name]; !ok {
			t.Errorf("docs/metrics.md has %s, the code has not", name)
		}
	}
}

// collectMetrics adds the metrics that the Go code below dir makes, tests left out, with their types if they are known.
func collectMetrics(dir string, into map[string]string) error {
	return filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.BasicLit:
				if name := literal(n); metricName.MatchString(name) && into[name] == "" {
					into[name] = "" // of a type that is told elsewhere
				}
			case *ast.CallExpr:
				typ, ok := prefixed[lastName(n.Fun)]
				if ok && len(n.Args) > 1 && literal(n.Args[0]) != "" && literal(n.Args[1]) != "" { // name and help
					into[agentPrefix+literal(n.Args[0])] = typ
				}
			}
			return true
		})
		return nil
	})
}

// literal returns the string that an expression is by itself, "" for any other.
func literal(e ast.Expr) string {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return ""
	}
	value, err := strconv.Unquote(lit.Value)
	if err != nil {
		return ""
	}
	return value
}
