package parity

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/backendtest"
)

// madeOf is what the results of a reference follow from, besides kube-proxy and the kernel: the table, what it compares with, and what tells kube-proxy of
// its worlds. Nothing that programs a kernel for us is in it.
var madeOf = []string{
	"agent/backend/backendtest", "agent/compile", "agent/forwarding", "api/v1alpha1", "test/parity", "test/netns", "test/relay",
	"hack/tools/kubernetes/go.mod", "hack/tools/kubernetes/go.sum", "go.sum",
}

// memory keeps what was found of a reference between runs, because most changes cannot touch it and finding it takes minutes. It is a file in the folder
// PARITY_CACHE, whose name tells what the results follow from; without that variable nothing is kept and everything is found anew.
type memory string

func remember(t *testing.T, column string) memory {
	t.Helper()
	dir := os.Getenv("PARITY_CACHE")
	if dir == "" {
		return ""
	}
	sum := sha256.New()
	for _, path := range madeOf {
		err := filepath.WalkDir(filepath.Join(moduleRoot, path), func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			content, err := os.Open(path)
			if err != nil {
				return err
			}
			defer content.Close()
			fmt.Fprintln(sum, path)
			_, err = io.Copy(sum, content)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	var kernel unix.Utsname
	if err := unix.Uname(&kernel); err != nil {
		t.Fatal(err)
	}
	sum.Write(kernel.Release[:])
	return memory(filepath.Join(dir, fmt.Sprintf("%s-%x.json", strings.ReplaceAll(column, " ", "-"), sum.Sum(nil)[:8])))
}

// recall gives what an earlier run found, nil if there was none.
func (m memory) recall(t *testing.T) []backendtest.Result {
	t.Helper()
	content, err := os.ReadFile(string(m))
	if m == "" || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var list []backendtest.Result
	if err == nil {
		err = json.Unmarshal(content, &list)
	}
	if err != nil {
		t.Fatalf("what an earlier run found cannot be read, delete it: %v", err)
	}
	return list
}

// keep keeps results for later runs.
func (m memory) keep(t *testing.T, list []backendtest.Result) {
	t.Helper()
	if m == "" {
		return
	}
	content, err := json.Marshal(list)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(string(m)), 0o755)
	}
	if err == nil {
		err = os.WriteFile(string(m)+".tmp", content, 0o600)
	}
	if err == nil {
		err = os.Rename(string(m)+".tmp", string(m))
	}
	if err != nil {
		t.Fatal(err)
	}
}
