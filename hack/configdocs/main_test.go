package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
)

var root = filepath.Join("..", "..")

func TestDocsAreUpToDate(t *testing.T) {
	want, err := render(filepath.Join(root, "api", "config", "v1alpha1"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(root, "docs", "configuration.md"))
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Error("docs/configuration.md is not what the comments in api/config/v1alpha1 make: run make generate")
	}
}

// Every field says in its comment what it is, beginning with its name, and its default, which is the true one.
func TestEveryFieldIsDocumented(t *testing.T) {
	comments, err := read(filepath.Join(root, "api", "config", "v1alpha1"))
	if err != nil {
		t.Fatal(err)
	}
	agent, controller := &config.AgentConfiguration{}, &config.ControllerConfiguration{}
	agent.SetDefaults()
	controller.SetDefaults()
	for _, f := range append(config.Fields(agent), config.Fields(controller)...) {
		comment := comments[key(f)]
		name := f.Path[strings.LastIndexByte(f.Path, '.')+1:]
		if !strings.HasPrefix(comment, name+" ") {
			t.Errorf("%s: the comment does not begin with %s: %q", f.Path, name, comment)
		}
		want := "Default: " + shown(f.Value)
		if !strings.Contains(comment, want) {
			t.Errorf("%s: the comment does not say %q: %q", f.Path, want, comment)
		}
		if text := shown(f.Value); text == "" && strings.Contains(comment, "Default: .") {
			t.Errorf("%s: the comment does not say what the default is: %q", f.Path, comment)
		}
	}
}
