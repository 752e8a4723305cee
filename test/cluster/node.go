package cluster

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"strings"

	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"

	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/controlplane"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/kubelet"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/process"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// Node is a node of the cluster.
type Node struct {
	Name string
	// NS is its network namespace.
	NS *netns.NS
	// Addresses are its InternalIPs, IPv4 first, PodCIDRs its pods' ranges in the same order.
	Addresses []netip.Addr
	PodCIDRs  []netip.Prefix
	// Kubeconfig is the agent's own: its API server address works inside NS only.
	Kubeconfig string
	// Agent runs inside NS.
	Agent *Process
	// KubeProxy runs inside NS once the test starts it; nil without Options.KubeProxy.
	KubeProxy *Process

	cluster *Cluster
	kubelet *kubelet.Kubelet
	relay   *relay
	off     context.CancelFunc // stops the kubelet
	gone    chan struct{}      // closed when the kubelet has ended
}

// SetReady makes the node's kubelet report this as its Ready condition from now on.
func (n *Node) SetReady(ctx context.Context, ready bool) error { return n.kubelet.SetReady(ctx, ready) }

// PowerOff makes the node die: cable out, agent and pods gone, and no word to the API server, which finds out after the grace period
// (Options.NodeMonitorGracePeriod). It does not come back.
func (n *Node) PowerOff() error {
	err := n.cluster.fabric.SetCable(n.Name, false)
	err = errors.Join(err, n.Agent.Kill())
	if n.KubeProxy != nil {
		err = errors.Join(err, n.KubeProxy.Kill())
	}
	n.off()
	<-n.gone
	return err
}

// prepare makes what runs on the node.
func (n *Node) prepare(client kubernetes.Interface, factory informers.SharedInformerFactory) (err error) {
	c := n.cluster
	n.Kubeconfig = filepath.Join(c.Dir, n.Name+".kubeconfig")
	if err := c.plane.WriteKubeconfig(n.Kubeconfig, serviceAccount("serviceproxy-agent"), relayPort); err != nil {
		return err
	}
	args := append([]string{
		"--node-name=" + n.Name, "--kubeconfig=" + n.Kubeconfig, "--cluster-cidr=" + strings.Join(clusterCIDRs, ","),
	}, c.options.AgentArgs...)
	if c.options.KubeProxy != "" { // as in config/agent
		args = append([]string{"--health-bind-address=:10266", "--metrics-bind-address=127.0.0.1:10269"}, args...)
	}
	n.Agent = process.New(c.spawner, process.Spec{
		Name:    "agent on " + n.Name,
		Command: c.program("agent", args...),
		LogFile: filepath.Join(c.LogDir(), "agent-"+n.Name+".log"),
		NS:      n.NS,
		Crashed: c.options.Crashed,
	})
	if err := n.prepareKubeProxy(); err != nil {
		return err
	}
	n.kubelet, err = kubelet.New(kubelet.Node{Name: n.Name, NS: n.NS, Addresses: n.Addresses, PodCIDRs: n.PodCIDRs},
		client, factory, c.log, c.podChanged)
	if err != nil {
		return err
	}
	n.relay, err = newRelay(n.NS, c.plane.Port())
	return err
}

// prepareKubeProxy makes the node's kube-proxy, if there is to be one. Conntrack's limits, which are the machine's and not the node's, it leaves alone.
func (n *Node) prepareKubeProxy() error {
	c := n.cluster
	if c.options.KubeProxy == "" {
		return nil
	}
	kubeconfig := filepath.Join(c.Dir, n.Name+".kube-proxy.kubeconfig")
	if err := c.plane.WriteKubeconfig(kubeconfig, controlplane.User{Name: "system:kube-proxy"}, relayPort); err != nil {
		return err
	}
	n.KubeProxy = process.New(c.spawner, process.Spec{
		Name: "kube-proxy on " + n.Name,
		Command: func(context.Context) ([]string, error) {
			return []string{
				filepath.Join(c.Assets, "kube-proxy"), "--kubeconfig=" + kubeconfig, "--hostname-override=" + n.Name, "--proxy-mode=" + c.options.KubeProxy,
				"--cluster-cidr=" + strings.Join(clusterCIDRs, ","), "--conntrack-max-per-core=0", "--conntrack-min=0",
				"--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0",
			}, nil
		},
		LogFile: filepath.Join(c.LogDir(), "kube-proxy-"+n.Name+".log"),
		NS:      n.NS,
		Crashed: c.options.Crashed,
	})
	return nil
}

// powerOn runs the kubelet until the context ends.
func (n *Node) powerOn(ctx context.Context) {
	ctx, n.off = context.WithCancel(ctx)
	n.gone = make(chan struct{})
	n.cluster.kubelets.Go(func() {
		defer close(n.gone)
		n.kubelet.Run(ctx)
	})
}
