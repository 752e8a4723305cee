// Package docs_test holds the documents to the code.
package docs_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// reasonName matches what the code calls a reason: constants such as reasonReady or ReasonNoNodes, and the field Reason.
var reasonName = regexp.MustCompile(`^[rR]eason([A-Z]|$)`)

// reasonValue matches the words that conditions and events carry.
var reasonValue = regexp.MustCompile(`^[A-Z][A-Za-z]+$`)

func TestEveryReasonIsExplained(t *testing.T) {
	page, err := os.ReadFile("troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]token.Position{}
	for _, dir := range []string{"../api/v1alpha1", "../controllers", "../agent"} {
		if err := collectReasons(dir, found); err != nil {
			t.Fatal(err)
		}
	}
	// One of each way in which the code states a reason; without them the search itself is broken.
	for _, known := range []string{"NoReadyEndpoints", "DeletionWaits", "ApplyFailed", "AssignmentNotOurs"} {
		if _, ok := found[known]; !ok {
			t.Errorf("the search for reasons does not find %s in the code any more", known)
		}
	}
	for reason, at := range found {
		if !strings.Contains(string(page), "`"+reason+"`") {
			t.Errorf("%s: reason %s is not explained in docs/troubleshooting.md", at, reason)
		}
	}
}

// collectReasons adds the reasons that the Go code below dir states, tests left out.
func collectReasons(dir string, into map[string]token.Position) error {
	return filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		files := token.NewFileSet()
		file, err := parser.ParseFile(files, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			for _, value := range reasonsOf(n) {
				into[value] = files.Position(n.Pos())
			}
			return true
		})
		return nil
	})
}

// reasonsOf returns the reasons that n states by itself: as a constant, a field of a literal, an assignment or an event.
func reasonsOf(n ast.Node) []string {
	var out []string
	pair := func(name, value ast.Expr) {
		if reasonName.MatchString(lastName(name)) {
			out = append(out, words(value)...)
		}
	}
	switch n := n.(type) {
	case *ast.ValueSpec:
		for i := range n.Values {
			pair(n.Names[i], n.Values[i])
		}
	case *ast.KeyValueExpr:
		pair(n.Key, n.Value)
	case *ast.AssignStmt:
		if len(n.Lhs) == len(n.Rhs) {
			for i := range n.Rhs {
				pair(n.Lhs[i], n.Rhs[i])
			}
		}
	case *ast.CallExpr:
		if lastName(n.Fun) == "Eventf" && len(n.Args) > 3 {
			out = append(out, words(n.Args[3])...)
		}
	}
	return out
}

func lastName(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return e.Sel.Name
	}
	return ""
}

// words returns the reason that e is if it is a literal, and nothing otherwise.
func words(e ast.Expr) []string {
	literal, ok := e.(*ast.BasicLit)
	if !ok || literal.Kind != token.STRING {
		return nil
	}
	value, err := strconv.Unquote(literal.Value)
	if err != nil || !reasonValue.MatchString(value) {
		return nil
	}
	return []string{value}
}
