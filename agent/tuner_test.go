package agent

import (
	"context"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/serviceproxy/serviceproxy-operator/agent/sysctl"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// TestTuner follows a node from before its kernel knows connection tracking, through what cannot be written and another configuration.
func TestTuner(t *testing.T) {
	root := t.TempDir()
	set := func(name, text string) {
		path := filepath.Join(root, "net", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	get := func(name string) string {
		text, _ := os.ReadFile(filepath.Join(root, "net/netfilter/nf_conntrack_"+name))
		return strings.TrimSpace(string(text))
	}
	set("ipv4/ip_local_port_range", "32768 60999\n")
	set("ipv4/ip_local_reserved_ports", "\n")
	synctest.Test(t, func(t *testing.T) {
		r, w := startReporter(t)
		r.found(ordered("a", time.Second))
		r.publish(held("1"))
		tune := newTuner(logr.Discard(), r.tuned)
		tune.proc, tune.cpus = sysctl.Proc(root), 2
		changes := make(chan sysctl.Conntrack)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			tune.run(ctx, sysctl.DefaultConntrack(), changes)
			close(done)
		}()
		defer func() {
			cancel()
			<-done
		}()
		says := func(what, reason, message, ports string) {
			t.Helper()
			pause(tuneEvery + 2*time.Second) // it looks, and the reporter writes
			status := w.last(t)
			c := meta.FindStatusCondition(status.Conditions, v1alpha1.NodeProxyKernelTuned)
			if c == nil || c.Reason != reason || !strings.HasPrefix(c.Message, message) {
				t.Errorf("%s: %+v, want %s %s", what, c, reason, message)
			}
			var got []string
			for _, p := range status.LocalPorts {
				got = append(got, sysctl.PortRange{First: uint16(p.Start), Last: uint16(p.End)}.String())
			}
			expect(t, what+": local ports", strings.Join(got, " "), ports)
		}
		says("the module is not loaded yet", "Tuned", "", "32768-60999")
		says("nor after a minute", "ParametersTooLow", "net/netfilter/nf_conntrack_max=131072: this kernel does not have it", "32768-60999")

		set("netfilter/nf_conntrack_max", "65536\n")
		set("netfilter/nf_conntrack_buckets", "65536\n")
		set("netfilter/nf_conntrack_tcp_timeout_established", "432000\n")
		if err := os.Mkdir(filepath.Join(root, "net/netfilter/nf_conntrack_tcp_timeout_close_wait"), 0o755); err != nil { // root may write any file
			t.Fatal(err)
		}
		says("one cannot be had", "ParametersTooLow", "net/netfilter/nf_conntrack_tcp_timeout_close_wait=3600: read kernel parameter", "32768-60999")
		expect(t, "limit", get("max"), "131072")
		expect(t, "table, which is larger", get("buckets"), "65536")
		expect(t, "established, which is longer", get("tcp_timeout_established"), "432000")

		if err := os.Remove(filepath.Join(root, "net/netfilter/nf_conntrack_tcp_timeout_close_wait")); err != nil {
			t.Fatal(err)
		}
		set("netfilter/nf_conntrack_tcp_timeout_close_wait", "60\n")
		set("ipv4/ip_local_reserved_ports", "33000-34000\n")
		says("now it can", "Tuned", "", "32768-32999 34001-60999")
		expect(t, "close wait", get("tcp_timeout_close_wait"), "3600")

		set("netfilter/nf_conntrack_tcp_timeout_close_wait", "90\n") // by hand, on purpose
		before := w.last(t)
		says("somebody lowered it", "Tuned", "", "32768-32999 34001-60999")
		expect(t, "close wait", get("tcp_timeout_close_wait"), "90")
		after := w.last(t)
		after.HeartbeatTime = before.HeartbeatTime
		if !reflect.DeepEqual(after, before) {
			t.Errorf("reports %+v after %+v although nothing changed", after, before)
		}
		changes <- sysctl.Conntrack{MaxPerCore: 1 << 18}
		pause(time.Second)
		expect(t, "the limit after another configuration", get("max"), "524288")
		expect(t, "and the table", get("buckets"), "131072")
		expect(t, "close wait, which is switched off now", get("tcp_timeout_close_wait"), "90")
	})
}
