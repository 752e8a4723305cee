package configuration

import (
	"context"
	"encoding/json"
	"flag"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/go-logr/logr/funcr"
	"github.com/prometheus/client_golang/prometheus"

	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
)

const header = "apiVersion: config.networking.serviceproxy.io/v1alpha1\nkind: AgentConfiguration\n"

func agentProgram() Program[*config.AgentConfiguration] {
	return Program[*config.AgentConfiguration]{
		Name: "agent", Kind: config.AgentKind,
		New: func() *config.AgentConfiguration { return &config.AgentConfiguration{} },
		Define: func(flags *flag.FlagSet, c *config.AgentConfiguration) map[string]string {
			flags.Var(Address{&c.MetricsBindAddress}, "metrics-bind-address", "")
			flags.BoolVar(&c.MasqueradeAll, "masquerade-all", c.MasqueradeAll, "")
			return map[string]string{"metrics-bind-address": "metricsBindAddress", "masquerade-all": "masqueradeAll"}
		},
		Environment: func(*config.AgentConfiguration) {},
	}
}

// mount is a ConfigMap mounted as the kubelet does: agent.yaml -> ..data/agent.yaml, ..data -> a folder with a name of its own, which is swapped.
type mount struct {
	t    *testing.T
	dir  string
	next int
}

func newMount(t *testing.T, content string) *mount {
	m := &mount{t: t, dir: t.TempDir()}
	m.set(content)
	if err := os.Symlink(filepath.Join("..data", "agent.yaml"), m.file()); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *mount) file() string { return filepath.Join(m.dir, "agent.yaml") }

func (m *mount) set(content string) {
	m.t.Helper()
	m.next++
	folder := "..2026_" + string(rune('a'+m.next))
	if err := os.Mkdir(filepath.Join(m.dir, folder), 0o700); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(m.dir, folder, "agent.yaml"), []byte(content), 0o600); err != nil {
		m.t.Fatal(err)
	}
	data := filepath.Join(m.dir, "..data")
	old, _ := os.Readlink(data) // none, the first time
	if err := os.Symlink(folder, data+"_tmp"); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Rename(data+"_tmp", data); err != nil {
		m.t.Fatal(err)
	}
	if old != "" {
		if err := os.RemoveAll(filepath.Join(m.dir, old)); err != nil {
			m.t.Fatal(err)
		}
	}
}

// follower plays the program: each look twice, as a file must have settled.
type follower struct {
	*Live[*config.AgentConfiguration]
	applied []config.AgentConfiguration
	log     []string
}

func follow(t *testing.T, file string, args ...string) *follower {
	t.Helper()
	live, err := Start(agentProgram(), file, args)
	if err != nil {
		t.Fatal(err)
	}
	return &follower{Live: live}
}

func (f *follower) settle() {
	log := funcr.New(func(_, args string) { f.log = append(f.log, args) }, funcr.Options{})
	for range 2 {
		f.look(log, func(c *config.AgentConfiguration) { f.applied = append(f.applied, *c) })
	}
}

func (f *follower) logged(t *testing.T, want string) {
	t.Helper()
	if !slices.ContainsFunc(f.log, func(line string) bool { return strings.Contains(line, want) }) {
		t.Errorf("the log does not say %q: %q", want, f.log)
	}
	f.log = nil
}

func (f *follower) metric(t *testing.T, name string) float64 {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(f.Collectors("test_")...)
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() == "test_"+name {
			return family.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}

func (f *follower) get(t *testing.T, path string) (int, string) {
	t.Helper()
	mux := http.NewServeMux()
	for p, h := range f.Handlers(func(c *config.AgentConfiguration) bool { return c.EnableProfiling }) {
		mux.Handle(p, h)
	}
	w := httptest.NewRecorder()
	mux.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Code, w.Body.String()
}

type configz struct {
	AgentConfiguration config.AgentConfiguration
	Source             state
}

func (f *follower) configz(t *testing.T) (c configz) {
	t.Helper()
	code, body := f.get(t, "/configz")
	if err := json.Unmarshal([]byte(body), &c); err != nil || code != http.StatusOK {
		t.Fatalf("/configz: %d %s: %v", code, body, err)
	}
	return c
}

func TestFollowingAConfigMap(t *testing.T) {
	m := newMount(t, header+"clusterCIDR: [10.1.0.0/16]\nmetricsBindAddress: :1\n")
	f := follow(t, m.file())
	f.settle()
	if len(f.applied) > 0 || len(f.log) > 0 {
		t.Fatalf("nothing has changed: %v, %v", f.applied, f.log)
	}

	m.set(header + "clusterCIDR: [10.2.0.0/16]\nmetricsBindAddress: :2\nenableProfiling: true\n")
	f.settle()
	if len(f.applied) != 1 || f.applied[0].ClusterCIDR[0] != "10.2.0.0/16" || f.applied[0].MetricsBindAddress != ":1" {
		t.Errorf("applied %+v", f.applied)
	}
	if !slices.ContainsFunc(f.log, func(line string) bool {
		return strings.Contains(line, "after a restart") && strings.Contains(line, "metricsBindAddress")
	}) {
		t.Errorf("nobody is told what waits for a restart: %v", f.log)
	}
	f.logged(t, "enableProfiling, clusterCIDR")
	c := f.configz(t)
	if c.AgentConfiguration.ClusterCIDR[0] != "10.2.0.0/16" || c.AgentConfiguration.MetricsBindAddress != ":1" || !slices.Equal(c.Source.AfterRestart, []string{"metricsBindAddress"}) {
		t.Errorf("/configz says %+v", c)
	}
	if n := f.metric(t, "config_fields_after_restart"); n != 1 {
		t.Errorf("%v fields wait for a restart", n)
	}

	// Back to what is running: nothing waits any more.
	m.set(header + "clusterCIDR: [10.2.0.0/16]\nmetricsBindAddress: :1\nenableProfiling: true\n# a comment\n")
	f.settle()
	if c := f.configz(t); len(f.applied) != 1 || len(c.Source.AfterRestart) > 0 {
		t.Errorf("applied %d times, /configz says %+v", len(f.applied), c)
	}
}

func TestAWrongOrMissingFileChangesNothing(t *testing.T) {
	right := header + "clusterCIDR: [10.1.0.0/16]\n"
	m := newMount(t, right)
	f := follow(t, m.file())
	unchanged := func(problem string) {
		t.Helper()
		c := f.configz(t)
		if len(f.applied) > 0 || c.AgentConfiguration.ClusterCIDR[0] != "10.1.0.0/16" || !strings.Contains(c.Source.Problem, problem) || f.metric(t, "config_last_reload_successful") != 0 {
			t.Errorf("applied %v; /configz says %+v", f.applied, c)
		}
		f.logged(t, problem)
	}

	m.set(header + "clusterCIDR: [10.2.0.0]\n")
	f.settle()
	unchanged(`clusterCIDR[0]: Invalid value`)
	if f.settle(); len(f.log) > 0 {
		t.Errorf("said again: %v", f.log)
	}
	if err := os.Remove(m.file()); err != nil {
		t.Fatal(err)
	}
	f.settle()
	unchanged("no such file")

	if err := os.Symlink(filepath.Join("..data", "agent.yaml"), m.file()); err != nil {
		t.Fatal(err)
	}
	m.set(right)
	f.settle()
	if c := f.configz(t); len(f.applied) > 0 || c.Source.Problem != "" || f.metric(t, "config_last_reload_successful") != 1 {
		t.Errorf("right again: applied %v; /configz says %+v", f.applied, c)
	}
	f.logged(t, "Read the configuration file again")
}

// An editor that writes in place leaves half a file for a moment.
func TestHalfAFileIsNotTaken(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.yaml")
	write := func(content string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(header + "clusterCIDR: [10.1.0.0/16]\nmasqueradeAll: true\n")
	f := follow(t, file)
	look := func() {
		f.look(logr.Discard(), func(c *config.AgentConfiguration) { f.applied = append(f.applied, *c) })
	}
	write(header + "clusterCIDR: [10.2.0.0/16]\n")
	look()
	write(header + "clusterCIDR: [10.2.0.0/16]\nmasqueradeAll: true\n")
	look()
	look()
	if len(f.applied) != 1 || !f.applied[0].MasqueradeAll || f.applied[0].ClusterCIDR[0] != "10.2.0.0/16" {
		t.Errorf("applied %+v", f.applied)
	}
}

func TestFlagsWinOverAChangedFile(t *testing.T) {
	m := newMount(t, header+"masqueradeAll: true\n")
	f := follow(t, m.file(), "--masquerade-all=false")
	m.set(header + "masqueradeAll: true\nclusterCIDR: [10.2.0.0/16]\n")
	f.settle()
	if len(f.applied) != 1 || f.applied[0].MasqueradeAll {
		t.Errorf("applied %+v", f.applied)
	}
}

func TestFollowEndsWithItsContext(t *testing.T) {
	m := newMount(t, header)
	f := follow(t, m.file())
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	m.set(header + "masqueradeAll: true\n")
	f.Follow(ctx, logr.Discard(), time.Millisecond, func(c *config.AgentConfiguration) {
		f.applied = append(f.applied, *c)
		cancel()
	})
	if len(f.applied) != 1 || !f.applied[0].MasqueradeAll {
		t.Errorf("applied %+v", f.applied)
	}
}

func TestProfilesOnlyIfEnabled(t *testing.T) {
	m := newMount(t, header)
	f := follow(t, m.file())
	if code, body := f.get(t, "/debug/pprof/"); code != http.StatusNotFound || !strings.Contains(body, "enableProfiling") {
		t.Errorf("got %d %s", code, body)
	}
	m.set(header + "enableProfiling: true\n")
	f.settle()
	for _, path := range []string{"/debug/pprof/", "/debug/pprof/goroutine?debug=1", "/debug/pprof/cmdline"} {
		if code, body := f.get(t, path); code != http.StatusOK || body == "" {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
}

func TestWithoutAFile(t *testing.T) {
	f := follow(t, "", "--metrics-bind-address=")
	f.Follow(t.Context(), logr.Discard(), time.Millisecond, nil) // returns at once
	if c := f.configz(t); c.AgentConfiguration.MetricsBindAddress != config.Nowhere || c.Source.File != "" {
		t.Errorf("/configz says %+v", c)
	}
	if len(f.Collectors("test_")) > 0 {
		t.Error("there are metrics of a file that there is not")
	}
}

func TestIndex(t *testing.T) {
	mux := http.NewServeMux()
	for path, h := range WithIndex(map[string]http.Handler{"/configz": http.NotFoundHandler()}, "/metrics", "/apple") {
		mux.Handle(path, h)
	}
	w := httptest.NewRecorder()
	mux.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/config", nil))
	if w.Code != http.StatusNotFound || !strings.Contains(w.Body.String(), "there is no /config here, there are: /apple /configz /metrics") {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
}
