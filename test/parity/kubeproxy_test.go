package parity

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	"sigs.k8s.io/yaml"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/backendtest"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
	"github.com/serviceproxy/serviceproxy-operator/test/relay"
)

const (
	// relayAddress is where kube-proxy finds the API server, in the node's namespace.
	relayAddress = "127.0.0.1:6443"
	// programmed is how long kube-proxy has to program a world on a busy machine.
	programmed = 30 * time.Second
)

// kubeProxy is kube-proxy on the lab's node.
type kubeProxy struct {
	mode    string
	program string
	node    *netns.NS
	cluster *cluster
	relay   *relay.Relay
	dir     string

	config  map[string]any // what it runs with
	running *process       // nil before the first world
	// lost says that its rules may be gone, so that another must put them back.
	lost bool
}

var _ backendtest.Breaker = (*kubeProxy)(nil)

// startKubeProxy gives the starter of kube-proxy in one of its modes. It has an API server of its own: the worlds of two proxies cannot share one, because their
// Services have the same addresses.
func startKubeProxy(mode, program, dir string) backendtest.Starter {
	return func(node *netns.NS) (_ backendtest.Subject, err error) {
		p := &kubeProxy{mode: mode, program: program, node: node, dir: dir}
		defer func() {
			if err != nil {
				err = errors.Join(err, p.Close())
			}
		}()
		if p.cluster, err = startCluster(filepath.Join(dir, "kubeconfig"), relayAddress); err != nil {
			return nil, err
		}
		var listener net.Listener
		if err := node.Do(func() (err error) { listener, err = net.Listen("tcp", relayAddress); return err }); err != nil {
			return nil, err
		}
		p.relay = relay.On(listener, p.cluster.address())
		return p, nil
	}
}

// Program implements backendtest.Subject. What kube-proxy reads when it starts makes it start again if it changes, as an administrator would have to.
func (p *kubeProxy) Program(w backendtest.World) error {
	config, err := p.configOf(w)
	if err != nil {
		return err
	}
	changed, err := p.cluster.apply(w, func() error {
		if p.running == nil || p.lost {
			return nil
		}
		return p.mark()
	})
	if err != nil {
		return err
	}
	if p.running != nil && !p.lost && !changed && equality.Semantic.DeepEqual(config, p.config) {
		return p.mark()
	}
	p.config, p.lost = config, false
	return p.Restart()
}

// Restart implements backendtest.Subject.
func (p *kubeProxy) Restart() error {
	if err := p.stop(); err != nil {
		return err
	}
	text, err := yaml.Marshal(p.config)
	if err != nil {
		return err
	}
	path := filepath.Join(p.dir, "config.yaml")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		return err
	}
	if p.running, err = start(p.node, p.program, "--config="+path); err != nil {
		return err
	}
	return p.mark()
}

// Break implements backendtest.Breaker: takes its rules away, as `nft flush ruleset` or `iptables -F` does.
func (p *kubeProxy) Break() error {
	p.lost = true
	script := "nft delete table ip kube-proxy; nft delete table ip6 kube-proxy"
	if p.mode == "iptables" {
		// It may be writing at the same time, then a chain that is to go is used again.
		script = "for t in iptables ip6tables; do for i in $(seq 20); do $t -t nat -F && $t -t nat -X && break; test $i -lt 20; done; done"
	}
	if _, err := p.node.Run("sh", "-ec", script); err != nil {
		return err
	}
	const wait = 5 * time.Second
	for deadline := time.Now().Add(wait); time.Now().Before(deadline); time.Sleep(interval) {
		if held, err := p.holds(p.cluster.marker); err != nil || held {
			return err
		}
	}
	return fmt.Errorf("its rules were taken away and are not back after %s", wait)
}

// Close implements backendtest.Subject.
func (p *kubeProxy) Close() error {
	err := p.stop()
	if p.relay != nil {
		err = errors.Join(err, p.relay.Close())
	}
	if p.cluster != nil {
		err = errors.Join(err, p.cluster.stop())
	}
	return err
}

func (p *kubeProxy) stop() error {
	if p.running == nil {
		return nil
	}
	err := p.running.kill()
	p.running = nil
	return err
}

// mark changes the marker last of all, and waits until it is seen in the rules: then everything before it is in them too.
func (p *kubeProxy) mark() error {
	ctx, cancel := context.WithTimeout(context.Background(), programmed)
	defer cancel()
	if err := p.cluster.mark(ctx); err != nil {
		return err
	}
	for {
		held, err := p.holds(p.cluster.marker)
		if err != nil || held {
			return err
		}
		select {
		case <-p.running.ended:
			return fmt.Errorf("kube-proxy has ended: %s", p.running.tail())
		case <-ctx.Done():
			return fmt.Errorf("kube-proxy has not programmed what it was told %s ago: %s", programmed, p.running.tail())
		case <-time.After(interval):
		}
	}
}

// interval is how often the rules are looked at.
const interval = 40 * time.Millisecond

// holds says whether the rules of both families lead to a marker.
func (p *kubeProxy) holds(m marker) (bool, error) {
	for family, addr := range m.service {
		var out string
		var wants []string
		var err error
		endpoint := netip.AddrPortFrom(m.endpoint[family], m.port).String()
		switch p.mode {
		case "iptables":
			out, err = p.node.Run([]string{"iptables-save", "ip6tables-save"}[family], "-t", "nat")
			wants = []string{fmt.Sprintf("-d %s/%d ", addr, addr.BitLen()), fmt.Sprintf("--dport %d ", m.port), "--to-destination " + endpoint + "\n"}
		default:
			// Before its first sync there is no table, which is an error of nft only.
			out, _ = p.node.Run("nft", "list", "table", []string{"ip", "ip6"}[family], "kube-proxy")
			wants = []string{fmt.Sprintf("%s . tcp . %d : goto", addr, m.port), "dnat to " + endpoint + "\n"}
		}
		if err != nil {
			return false, err
		}
		for _, want := range wants {
			if !strings.Contains(out, want) {
				return false, nil
			}
		}
	}
	return true, nil
}

// process is a program that runs in the node's namespace.
type process struct {
	cmd   *exec.Cmd
	log   *logBuffer
	ended chan struct{} // closed when it has
}

func start(node *netns.NS, program string, args ...string) (*process, error) {
	p := &process{cmd: exec.Command(program, args...), log: &logBuffer{}, ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	// It ends with the thread that started it, which waits for it: so it cannot outlive the test, however that ends.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		defer close(p.ended)
		_ = node.Do(func() error { // how it ends is seen by who waits for its rules
			err := p.cmd.Start()
			started <- err
			if err != nil {
				return err
			}
			return p.cmd.Wait()
		})
	}()
	return p, <-started
}

// kill ends it as a crash would, and waits until it is gone.
func (p *process) kill() error {
	err := p.cmd.Process.Kill()
	<-p.ended
	if errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("%s had ended by itself: %s", filepath.Base(p.cmd.Path), p.tail())
	}
	return err
}

func (p *process) tail() string { return p.log.tail() }
