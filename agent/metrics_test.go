package agent

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/agent/conntrack"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// TestMetricsAreClean: the metrics follow the conventions, but for a name that is kube-proxy's.
func TestMetricsAreClean(t *testing.T) {
	m := newMetrics(newStore(Settings{}), "v1")
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if p.Metric != metricsPrefix+"sync_proxy_rules_no_local_endpoints_total" {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

func expectMetric(t *testing.T, m *metrics, name, want string) {
	t.Helper()
	w := httptest.NewRecorder()
	m.handlers()["/metrics"].ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for line := range strings.Lines(w.Body.String()) {
		if value, ok := strings.CutPrefix(line, metricsPrefix+name+" "); ok {
			if value = strings.TrimSpace(value); value != want {
				t.Errorf("%s is %s, want %s", name, value, want)
			}
			return
		}
	}
	t.Errorf("there is no %s", name)
}

// TestSyncMetrics: a sync that reads the kernel back counts as full, one of what changed as partial.
func TestSyncMetrics(t *testing.T) {
	r := newRig(t, v1alpha1.ProxyModeNFTables)
	m := r.loop.metrics
	d := r.loop.planes[0]
	ctx, nudge := t.Context(), func() {}
	svc := func(ip string) *forwarding.Service {
		return &forwarding.Service{Key: forwarding.ServiceKey{Namespace: "ns", Name: ip, Port: 80, Protocol: forwarding.TCP}}
	}
	d.want = d.want.With(svc("a"))
	d.program(ctx, nudge)
	d.want = d.want.With(svc("b"))
	d.program(ctx, nudge)
	d.want = d.want.With(svc("c"))
	d.program(ctx, nudge)
	expectMetric(t, m, "sync_full_proxy_rules_duration_seconds_count", "1")
	expectMetric(t, m, "sync_partial_proxy_rules_duration_seconds_count", "2")
	d.want = d.want.On(forwarding.Ground{MasqueradeAll: true})
	d.program(ctx, nudge)
	expectMetric(t, m, "sync_full_proxy_rules_duration_seconds_count", "2")
}

func TestLastQueued(t *testing.T) {
	s := newStore(Settings{})
	m := newMetrics(s, "v1")
	expectMetric(t, m, "sync_proxy_rules_last_queued_timestamp_seconds", "0")
	before := time.Now()
	s.signal()
	if at := s.lastQueued(); at.Before(before.Truncate(0)) || at.After(time.Now()) {
		t.Errorf("queued at %v, want about %v", at, before)
	}
}

func TestNoLocalEndpoints(t *testing.T) {
	m := newMetrics(newStore(Settings{}), "v1")
	expect := func(internal, external string) {
		t.Helper()
		expectMetric(t, m, `sync_proxy_rules_no_local_endpoints_total{traffic_policy="internal"}`, internal)
		expectMetric(t, m, `sync_proxy_rules_no_local_endpoints_total{traffic_policy="external"}`, external)
	}
	elsewhere := forwarding.Target{Elsewhere: forwarding.IPv4}
	a := &forwarding.Service{Key: forwarding.ServiceKey{Name: "a"}, Internal: elsewhere}
	b := &forwarding.Service{Key: forwarding.ServiceKey{Name: "b"}, External: elsewhere, PreserveSource: true}
	fine := &forwarding.Service{Key: a.Key}
	expect("0", "0")
	m.changed(nil, a)
	m.changed(nil, b)
	expect("1", "1")
	m.changed(a, a)
	expect("1", "1")
	m.changed(nil, fine) // by another mode, which does not know it
	expect("0", "1")
	m.changed(b, nil)
	expect("0", "0")
}

func TestConntrackMetrics(t *testing.T) {
	m := newMetrics(newStore(Settings{}), "v1")
	m.reconciled(conntrack.Pass{Took: time.Millisecond, Ended: 3})
	m.reconciled(conntrack.Pass{Took: time.Millisecond, Ended: 2, Err: errors.New("no memory")})
	expectMetric(t, m, "conntrack_reconciler_deleted_entries_total", "5")
	expectMetric(t, m, "conntrack_reconciler_failures_total", "1")
	expectMetric(t, m, "conntrack_reconciler_sync_duration_seconds_count", "2")
}

// counting is a backend that counts.
type counting struct {
	backend.Backend
	traffic []backend.Traffic
	err     error
}

func (c *counting) Traffic(context.Context) ([]backend.Traffic, error) { return c.traffic, c.err }

func traffic(name string, n uint64) backend.Traffic {
	return backend.Traffic{
		Service:     forwarding.ServiceKey{Namespace: "shop", Name: name, Port: 80, Protocol: forwarding.TCP},
		Connections: n, Original: backend.Volume{Packets: 10 * n, Bytes: 100 * n}, Reply: backend.Volume{Packets: 20 * n, Bytes: 200 * n},
	}
}

// TestTrafficMetrics: what all backends counted is served as Prometheus reads it.
func TestTrafficMetrics(t *testing.T) {
	m := newMetrics(newStore(Settings{}), "v1")
	m.traffic.add(newFake()) // does not count
	m.traffic.add(&counting{traffic: []backend.Traffic{traffic("web", 1), traffic("api", 5)}})
	second := &counting{traffic: []backend.Traffic{traffic("web", 2)}}
	m.traffic.add(second)
	for _, encoding := range []string{"", "gzip"} {
		w := httptest.NewRecorder()
		req := httptest.NewRequest(http.MethodGet, "/metrics/services", nil)
		req.Header.Set("Accept-Encoding", encoding)
		m.handlers()["/metrics/services"].ServeHTTP(w, req)
		body := io.Reader(w.Body)
		if got := w.Header().Get("Content-Encoding"); got != encoding {
			t.Fatalf("encoded as %q, want %q", got, encoding)
		}
		if encoding == "gzip" {
			var err error
			if body, err = gzip.NewReader(body); err != nil {
				t.Fatal(err)
			}
		}
		text, err := io.ReadAll(body)
		if err != nil {
			t.Fatal(err)
		}
		const labels = `{namespace="shop",service="web",port="80",protocol="TCP"`
		for _, want := range []string{
			"serviceproxy_service_connections_total" + labels + "} 3\n",
			"serviceproxy_service_packets_total" + labels + `,direction="original"} 30` + "\n",
			"serviceproxy_service_packets_total" + labels + `,direction="reply"} 60` + "\n",
			"serviceproxy_service_bytes_total" + labels + `,direction="original"} 300` + "\n",
			"serviceproxy_service_bytes_total" + labels + `,direction="reply"} 600` + "\n",
		} {
			if !strings.Contains(string(text), want) {
				t.Errorf("there is no %s in\n%s", want, text)
			}
		}
		parser := expfmt.NewTextParser(model.UTF8Validation)
		families, err := parser.TextToMetricFamilies(bytes.NewReader(text))
		if err != nil || len(families) != 3 || len(families["serviceproxy_service_bytes_total"].Metric) != 4 {
			t.Errorf("read as %v: %v", families, err)
		}
		if problems, err := promlint.New(bytes.NewReader(text)).Lint(); err != nil || len(problems) > 0 {
			t.Errorf("%v, %v", problems, err)
		}
	}
	second.err = errors.New("no memory")
	w := httptest.NewRecorder()
	m.traffic.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics/services", nil))
	if w.Code != http.StatusInternalServerError || !strings.Contains(w.Body.String(), "no memory") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// TestBackendsAreCounted: what a mode's backend counts is served from when there is one.
func TestBackendsAreCounted(t *testing.T) {
	r := newRig(t, v1alpha1.ProxyModeNFTables)
	d := r.loop.planes[0]
	d.New = func() (backend.Backend, error) {
		return &counting{Backend: newFake(), traffic: []backend.Traffic{traffic("web", 1)}}, nil
	}
	if list, err := r.loop.metrics.traffic.read(t.Context()); len(list) != 0 || err != nil {
		t.Errorf("counted %v, %v before there is a backend", list, err)
	}
	d.want = d.want.With(&forwarding.Service{Key: forwarding.ServiceKey{Namespace: "shop", Name: "web", Port: 80, Protocol: forwarding.TCP}})
	d.program(t.Context(), func() {})
	if list, err := r.loop.metrics.traffic.read(t.Context()); len(list) != 1 || err != nil {
		t.Errorf("counted %v, %v", list, err)
	}
}

// TestCountTrafficReachesBackends: the setting is part of the ground that backends stand on.
func TestCountTrafficReachesBackends(t *testing.T) {
	for _, on := range []bool{false, true} {
		if g := groundOf(Settings{CountTraffic: on}, &compile.Node{}, nil); g.CountTraffic != on {
			t.Errorf("set to %t, backends are told %t", on, g.CountTraffic)
		}
	}
}

// BenchmarkTrafficMetrics writes the series of 10 000 Services.
func BenchmarkTrafficMetrics(b *testing.B) {
	m := newMetrics(newStore(Settings{}), "v1")
	c := &counting{}
	for i := range 10_000 {
		c.traffic = append(c.traffic, traffic(fmt.Sprintf("service-%d", i), uint64(i)))
	}
	m.traffic.add(c)
	b.ReportAllocs()
	for b.Loop() {
		w := httptest.NewRecorder()
		w.Body = nil
		m.traffic.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics/services", nil))
	}
}
