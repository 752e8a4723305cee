package config_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// An alert on a metric that nobody exports never fires.
func TestAlertsAreAboutMetricsThatExist(t *testing.T) {
	var rules struct {
		Spec struct {
			Groups []struct {
				Rules []struct {
					Alert, Expr string
					Annotations map[string]string
				}
			}
		}
	}
	page, err := os.ReadFile(filepath.Join("prometheus", "rules.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(page, &rules); err != nil {
		t.Fatal(err)
	}
	exported := exportedMetrics(t)
	name := regexp.MustCompile(`serviceproxy_[a-z_]+`)
	alerts := 0
	for _, g := range rules.Spec.Groups {
		for _, r := range g.Rules {
			alerts++
			metrics := name.FindAllString(r.Expr, -1)
			if r.Alert == "" || len(metrics) == 0 || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
				t.Errorf("%q: an alert has a name, an expression about a metric of ours, a summary and a description", r.Alert)
			}
			for _, m := range metrics {
				if !exported[strings.TrimSuffix(m, "_bucket")] {
					t.Errorf("%s: nobody exports %s", r.Alert, m)
				}
			}
		}
	}
	if alerts < 5 {
		t.Errorf("found %d alerts: the search itself is broken", alerts)
	}
}

// exportedMetrics are the names in the controller's code that are metrics by their form, and the agent's, whose names are put together, in docs/metrics.md, which a test holds to the code.
func exportedMetrics(t *testing.T) map[string]bool {
	out := map[string]bool{}
	quoted := regexp.MustCompile(`"(serviceproxy_[a-z_]+[a-z])"`)
	err := filepath.WalkDir(filepath.Join("..", "controllers"), func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		code, err := os.ReadFile(path)
		for _, m := range quoted.FindAllStringSubmatch(string(code), -1) {
			out[m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join("..", "docs", "metrics.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `(serviceproxy_agent_[a-z_]+)`").FindAllStringSubmatch(string(page), -1) {
		out[m[1]] = true
	}
	return out
}
