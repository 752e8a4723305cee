// Package cluster is a Kubernetes cluster inside one process, for the end-to-end tests and the demo: a real etcd, kube-apiserver and
// kube-controller-manager, nodes as network namespaces joined by a switch, and a stand-in for kubelet that gives each Pod a
// namespace, addresses and a server that tells who answered. The controller and the agents run in it as real processes.
//
// The network, as NODE1 and a pod on it see it (IPv6 likewise: fd00:172:30::/64, fd00:10:244:N::/64, fd00:10:96::/112):
//
//	172.30.0.10+N   node N            172.30.0.100  the outside host, which knows no route to pods or Services
//	10.244.N.0/24   pods of node N    10.96.0.0/16  the API server's own service range
//	127.0.0.1:6443  the API server, on every node
//
// The API server and the controller, whose admission webhook it calls, run on the machine's own loopback address.
//
// Nothing of it touches the machine's addresses, routes, firewall or sysctls. A cluster that is closed leaves nothing; one whose process
// was killed leaves a folder and some dangling names, which the next cluster to start removes.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/controlplane"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/fabric"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/kubelet"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/process"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// Options say what cluster to start. The zero value is a cluster of one node without controller and agents.
type Options struct {
	// Name names the cluster's folder and, as a prefix, its namespaces for `ip netns exec NAME-node1`. One cluster of a name is up at a
	// time. Default: one that is not in use.
	Name string
	// Nodes is how many there are, node1 to nodeN. Default 1, at most 80.
	Nodes int
	// Proxy starts the controller, and the agent on each node.
	Proxy bool
	// KubeProxy makes a kube-proxy of this mode, nftables or iptables, for each node, and the agents leave it its ports. It is for the test to start. Empty: there is none.
	KubeProxy string
	// ControllerArgs and AgentArgs are added to their command lines.
	ControllerArgs, AgentArgs []string
	// NodeMonitorGracePeriod is how long a node may be silent before it is Unknown. Default: Kubernetes' 50 s.
	NodeMonitorGracePeriod time.Duration
	// Progress gets a line for each step of the start. Optional.
	Progress io.Writer
	// Crashed is called when a program of the cluster ends without having been asked to. Default: a line on stderr.
	Crashed func(error)
}

// Process is a program of the cluster. It can be started, stopped, killed, paused and resumed at will; its output is in a log file.
type Process = process.Process

// ReadyAnnotation on a Pod, set to "false", makes it not ready, as a failing readiness probe would.
const ReadyAnnotation = kubelet.ReadyAnnotation

// Cluster is a cluster that is up.
type Cluster struct {
	// Kubeconfig is the path of an administrator's, Dir the cluster's folder. Both are gone after Close.
	Kubeconfig, Dir string
	// Assets is the folder of kubectl and its like.
	Assets string
	// APIServer and ControllerManager can be stopped and started again; data, address and keys stay.
	APIServer, ControllerManager *Process
	// Controller is ours.
	Controller *Process
	// Nodes are node1 to nodeN.
	Nodes []*Node

	options Options
	root    string // of the module
	state   *state
	spawner *process.Spawner
	plane   *controlplane.ControlPlane
	fabric  *fabric.Switch
	outside *netns.NS
	client  client.Client
	config  *rest.Config
	log     *slog.Logger
	logFile *os.File

	build     func() (string, error) // gives the folder of our programs
	stopBuild func()                 // and waits

	stopKubelets context.CancelFunc
	kubelets     sync.WaitGroup

	closing sync.Once
	closed  error
}

// Start starts a cluster and waits until its nodes are Ready. The context bounds the start only: the cluster is up until Close. After
// an error nothing is left. Needs root.
func Start(ctx context.Context, o Options) (_ *Cluster, err error) {
	o, err = o.complete()
	if err != nil {
		return nil, err
	}
	c := &Cluster{options: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	begin := time.Now()
	for _, step := range c.steps() {
		start := time.Now()
		if err := step.do(ctx); err != nil {
			return nil, fmt.Errorf("%s: %w", step.what, err)
		}
		c.progress("%-66s %5.1f s", step.what, time.Since(start).Seconds())
	}
	c.progress("%-66s %5.1f s", "the cluster is up", time.Since(begin).Seconds())
	return c, nil
}

// Client is an administrator's client, without a cache, for all of Kubernetes' types and ours.
func (c *Cluster) Client() client.Client { return c.client }

// RESTConfig is an administrator's client configuration.
func (c *Cluster) RESTConfig() *rest.Config { return rest.CopyConfig(c.config) }

// Outside is the host outside of the cluster: on the nodes' network, without routes to pods or Services.
func (c *Cluster) Outside() *netns.NS { return c.outside }

// Node is the node with this name, nil if there is none.
func (c *Cluster) Node(name string) *Node {
	i := slices.IndexFunc(c.Nodes, func(n *Node) bool { return n.Name == name })
	if i < 0 {
		return nil
	}
	return c.Nodes[i]
}

// Pod is the network namespace of a Pod that runs, nil if there is none.
func (c *Cluster) Pod(namespace, name string) *netns.NS {
	for _, n := range c.Nodes {
		if ns := n.kubelet.PodNS(types.NamespacedName{Namespace: namespace, Name: name}); ns != nil {
			return ns
		}
	}
	return nil
}

// Exec is the name by which `ip netns exec` enters a namespace of this cluster: a node's name, "outside", or NAMESPACE.NAME of a Pod.
func (c *Cluster) Exec(what string) string { return c.state.pinName(what) }

// Kubectl runs the real kubectl as the administrator and gives what it prints.
func (c *Cluster) Kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(c.Assets, "kubectl"), append([]string{"--kubeconfig=" + c.Kubeconfig}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("kubectl %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// LogDir is the folder of all programs' logs.
func (c *Cluster) LogDir() string { return filepath.Join(c.Dir, "logs") }

// SaveLogs copies the logs into a folder, which Close does not remove.
func (c *Cluster) SaveLogs(to string) error {
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	return os.CopyFS(to, os.DirFS(c.LogDir()))
}

// Close ends the cluster and removes all of it. Later calls do nothing and give the first one's error.
func (c *Cluster) Close() error {
	c.closing.Do(func() { c.closed = c.close() })
	return c.closed
}

func (c *Cluster) close() error {
	var errs []error
	for _, p := range c.proxyProcesses() {
		errs = append(errs, p.Kill())
	}
	if c.stopKubelets != nil {
		c.stopKubelets()
		c.kubelets.Wait()
	}
	for _, n := range c.Nodes {
		if n.relay != nil {
			errs = append(errs, n.relay.close())
		}
	}
	if c.plane != nil {
		errs = append(errs, c.plane.Stop())
	}
	if c.spawner != nil {
		c.stopBuild()
		c.spawner.Close()
	}
	for _, n := range c.Nodes {
		errs = append(errs, n.NS.Close())
	}
	if c.outside != nil {
		errs = append(errs, c.outside.Close())
	}
	if c.fabric != nil {
		errs = append(errs, c.fabric.Close())
	}
	if c.logFile != nil {
		errs = append(errs, c.logFile.Close())
	}
	if c.state != nil {
		errs = append(errs, c.state.close())
	}
	return errors.Join(errs...)
}

// proxyProcesses are the controller, the agents and kube-proxies, as far as there are any yet.
func (c *Cluster) proxyProcesses() []*Process {
	all := []*Process{c.Controller}
	for _, n := range c.Nodes {
		all = append(all, n.Agent, n.KubeProxy)
	}
	return slices.DeleteFunc(all, func(p *Process) bool { return p == nil })
}

func (c *Cluster) progress(format string, args ...any) {
	if c.options.Progress != nil {
		// Who does not want to see it does not hinder us.
		fmt.Fprintf(c.options.Progress, format+"\n", args...)
	}
}

var validName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)

func (o Options) complete() (Options, error) {
	if os.Geteuid() != 0 {
		return o, errors.New("start a cluster: needs root, because nodes and pods are network namespaces; run it with sudo")
	}
	if o.Name == "" {
		o.Name = fmt.Sprintf("test-%d-%04x", os.Getpid(), rand.IntN(1<<16))
	}
	if !validName.MatchString(o.Name) {
		return o, fmt.Errorf("cluster name %q: must be lower-case letters, digits and dashes, at most 32", o.Name)
	}
	if o.Nodes == 0 {
		o.Nodes = 1
	}
	if o.Nodes < 0 || o.Nodes > maxNodes {
		return o, fmt.Errorf("%d nodes: must be 1 to %d", o.Nodes, maxNodes)
	}
	if o.KubeProxy != "" && o.KubeProxy != "nftables" && o.KubeProxy != "iptables" {
		return o, fmt.Errorf("kube-proxy's mode %q: must be nftables or iptables", o.KubeProxy)
	}
	if o.NodeMonitorGracePeriod == 0 {
		o.NodeMonitorGracePeriod = 50 * time.Second
	}
	if o.Crashed == nil {
		o.Crashed = func(err error) { fmt.Fprintln(os.Stderr, err) }
	}
	return o, nil
}
