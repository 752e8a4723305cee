package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// asAgent in the environment makes this test binary the agent.
const asAgent = "TEST_AS_AGENT"

func TestMain(m *testing.M) {
	if os.Getenv(asAgent) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// process is an agent's process in a network namespace, without a cluster.
type process struct {
	t    *testing.T
	ns   *netns.NS
	file string // its configuration
	cmd  *exec.Cmd
	mu   sync.Mutex
	log  bytes.Buffer
}

func (p *process) Write(line []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(line)
}

func (p *process) logged() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

const nobodysKubeconfig = `apiVersion: v1
kind: Config
current-context: c
contexts: [{name: c, context: {cluster: c, user: u}}]
users: [{name: u}]
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}]
`

func startProcess(t *testing.T, content string) *process {
	t.Helper()
	p := &process{t: t, ns: netns.NewT(t), file: filepath.Join(t.TempDir(), "agent.yaml")}
	if out, err := p.ns.Run("ip", "link", "set", "lo", "up"); err != nil {
		t.Fatal(err, out)
	}
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(kubeconfig, []byte(nobodysKubeconfig), 0o600); err != nil {
		t.Fatal(err)
	}
	p.configure(content)
	p.cmd = exec.Command(os.Args[0], "--config="+p.file, "--kubeconfig="+kubeconfig, "--node-name=node")
	p.cmd.Env = append(os.Environ(), asAgent+"=1")
	p.cmd.Stdout, p.cmd.Stderr = p, p
	if err := p.ns.Start(p.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.cmd.Process.Signal(syscall.SIGTERM) // unless it has ended, which the test has noticed then
		if err := p.cmd.Wait(); err != nil {
			t.Errorf("the agent ends with %v", err)
		}
		if t.Failed() {
			t.Log(p.logged())
		}
	})
	return p
}

// configure replaces the file as a whole.
func (p *process) configure(content string) {
	p.t.Helper()
	err := os.WriteFile(p.file+".new", []byte(header+content), 0o600)
	if err := errors.Join(err, os.Rename(p.file+".new", p.file)); err != nil {
		p.t.Fatal(err)
	}
}

// get asks the agent at its loopback address.
func (p *process) get(path string) (int, string) {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		err = p.ns.Do(func() error {
			var dialer net.Dialer
			conn, err = dialer.DialContext(ctx, network, address)
			return err
		})
		return conn, err
	}}
	answer, err := (&http.Client{Transport: transport}).Get("http://127.0.0.1:10249" + path)
	if err != nil {
		return 0, err.Error()
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		return 0, err.Error()
	}
	return answer.StatusCode, string(body)
}

// eventually waits for what is asked for.
func (p *process) eventually(what string, holds func() bool) {
	p.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !holds() {
		if time.Now().After(deadline) {
			p.t.Fatalf("not within a minute: %s", what)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (p *process) configz() (c struct {
	AgentConfiguration config.AgentConfiguration
	Source             struct {
		Problem      string
		AfterRestart []string
	}
}) {
	_, body := p.get("/configz")
	_ = json.Unmarshal([]byte(body), &c) // what cannot be read is not what is waited for
	return c
}

func (p *process) closeWait() string {
	out, err := p.ns.Run("cat", "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait")
	return strings.TrimSpace(fmt.Sprint(out, errorOrNothing(err)))
}

func errorOrNothing(err error) string {
	if err != nil {
		return err.Error()
	}
	return ""
}

// An agent takes in what it can of a changed file, down to the kernel, and serves at its metrics address what it is told to.
func TestAnAgentFollowsItsFile(t *testing.T) {
	netns.RequireRoot(t)
	p := startProcess(t, "clusterCIDR: [10.1.0.0/16]\n")
	p.eventually("the agent serves", func() bool { code, _ := p.get("/proxyMode"); return code == http.StatusOK })
	if _, body := p.get("/proxyMode"); body != "none" {
		t.Errorf("/proxyMode without a Service: %q", body)
	}
	if code, body := p.get("/"); code != http.StatusNotFound || !strings.Contains(body, "/configz /debug/pprof/ /metrics ") {
		t.Errorf("/: %d %s", code, body)
	}
	if code, _ := p.get("/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("profiles are served though nobody asked: %d", code)
	}
	p.eventually("conntrack is as kube-proxy has it", func() bool { return p.closeWait() == "3600" })

	p.configure("clusterCIDR: [10.2.0.0/16]\nmetricsBindAddress: 127.0.0.1:1\nenableProfiling: true\nconntrack: {tcpCloseWaitTimeout: 2h}\nlogging: {level: debug}\n")
	p.eventually("the changed file is in force", func() bool {
		c := p.configz()
		return len(c.AgentConfiguration.ClusterCIDR) == 1 && c.AgentConfiguration.ClusterCIDR[0] == "10.2.0.0/16" && strings.Join(c.Source.AfterRestart, " ") == "metricsBindAddress"
	})
	p.eventually("the kernel has it", func() bool { return p.closeWait() == "7200" })
	if code, _ := p.get("/debug/pprof/cmdline"); code != http.StatusOK {
		t.Errorf("profiles: %d", code)
	}
	if log := p.logged(); !strings.Contains(log, "takes effect after a restart") {
		t.Error("nobody is told that a new address takes effect after a restart")
	}

	p.configure("clusterCIDR: [10.3.0.0]\n")
	p.eventually("the wrong file is told of", func() bool {
		return strings.Contains(p.configz().Source.Problem, `clusterCIDR[0]: Invalid value: "10.3.0.0"`)
	})
	if c := p.configz(); c.AgentConfiguration.ClusterCIDR[0] != "10.2.0.0/16" {
		t.Errorf("the wrong file changed something: %+v", c)
	}
	if _, body := p.get("/metrics"); !strings.Contains(body, "serviceproxy_agent_config_last_reload_successful 0") {
		t.Error("no metric tells of the wrong file")
	}
}
