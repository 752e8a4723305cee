package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/controlplane"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/fabric"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/kubelet"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/process"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// module is this project's, by which its root folder is known.
const module = "github.com/serviceproxy/serviceproxy-operator"

// systemNamespace is where the manifests put our own objects.
const systemNamespace = "serviceproxy-system"

type step struct {
	what string
	do   func(context.Context) error
}

// steps are how a cluster starts. Each may rely on those before it.
func (c *Cluster) steps() []step {
	steps := []step{
		{"tools are there", c.prepare},
		{fmt.Sprintf("network: a switch, %d nodes, a host outside", c.options.Nodes), c.wire},
		{"control plane: etcd, kube-apiserver, kube-controller-manager", c.startControlPlane},
		{"custom resources, roles", c.install},
		{"nodes are Ready", c.startNodes},
	}
	if c.options.Proxy {
		steps = append(steps, step{"serviceproxy: the controller, and the agent on every node", c.startProxy})
	}
	return steps
}

// prepare takes the name and finds or builds the programs.
func (c *Cluster) prepare(ctx context.Context) (err error) {
	if c.root, err = moduleRoot(); err != nil {
		return err
	}
	if c.Assets, err = c.kubernetesTools(ctx); err != nil {
		return err
	}
	if c.state, err = openState(c.options.Name); err != nil {
		return err
	}
	c.Dir = c.state.dir
	if err := os.MkdirAll(c.LogDir(), 0o755); err != nil {
		return err
	}
	if c.logFile, err = os.Create(filepath.Join(c.LogDir(), "kubelets.log")); err != nil {
		return err
	}
	c.log = slog.New(slog.NewTextHandler(c.logFile, nil))
	c.spawner = process.NewSpawner()
	building, stop := context.WithCancel(context.Background())
	c.build = sync.OnceValues(func() (string, error) { return c.buildPrograms(building) })
	c.stopBuild = func() {
		stop()
		c.build() //nolint:errcheck // nobody waits for it any more; it ends before the folder goes
	}
	if c.options.Proxy {
		go c.build() //nolint:errcheck // it is asked again, and answers the same
	}
	return nil
}

// kubernetesTools gives the folder of kube-apiserver and its like, which are built if they are not there.
func (c *Cluster) kubernetesTools(ctx context.Context) (string, error) {
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, filepath.Join(c.root, "hack/tools/kubernetes/build.sh"))
	cmd.Stderr = &stderr
	if c.options.Progress != nil {
		cmd.Stderr = c.options.Progress
	}
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("hack/tools/kubernetes/build.sh: %w %s", err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// buildPrograms builds the controller and the agent from this checkout, as `make build` does: with its version, and from its build cache.
func (c *Cluster) buildPrograms(ctx context.Context) (string, error) {
	if ctx.Err() != nil {
		return "", errors.New("the cluster is closed")
	}
	bin := filepath.Join(c.Dir, "bin")
	cmd := exec.Command("make", "--silent", "--no-print-directory", "build", "BIN="+bin)
	cmd.Dir = c.root
	// What a make above us was told is not meant for this one, and the jobs of its job server are no longer ours.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "MAKEFLAGS=") || strings.HasPrefix(v, "MFLAGS=") || strings.HasPrefix(v, "MAKELEVEL=")
	})
	if out, err := c.spawner.Run(ctx, cmd); err != nil {
		return "", fmt.Errorf("build the controller and the agent: %w\n%s", err, out)
	}
	return bin, nil
}

// program is the command line of one of our programs.
func (c *Cluster) program(name string, args ...string) func(context.Context) ([]string, error) {
	return func(context.Context) ([]string, error) {
		bin, err := c.build()
		return append([]string{filepath.Join(bin, "serviceproxy-"+name)}, args...), err
	}
}

func (c *Cluster) wire(context.Context) (err error) {
	if c.fabric, err = fabric.NewSwitch(routers()...); err != nil {
		return err
	}
	if c.outside, err = c.fabric.NewHost("outside", outsideAddresses()...); err != nil {
		return err
	}
	if err := c.state.pin("outside", c.outside); err != nil {
		return err
	}
	for i := 1; i <= c.options.Nodes; i++ {
		n := &Node{Name: fmt.Sprintf("node%d", i), Addresses: nodeAddresses(i), PodCIDRs: podCIDRs(i), cluster: c}
		if n.NS, err = c.fabric.NewHost(n.Name, onNodeNetwork(n.Addresses)...); err != nil {
			return err
		}
		if err := c.state.pin(n.Name, n.NS); err != nil {
			return errors.Join(err, n.NS.Close())
		}
		c.Nodes = append(c.Nodes, n)
	}
	return c.route()
}

// route gives every node routes to the others' pods, and a default route, as any machine has: without one the kernel refuses a
// connection to a Service before the rules that would translate its address have seen it.
func (c *Cluster) route() error {
	for _, n := range c.Nodes {
		for _, router := range routers() {
			everything := netip.PrefixFrom(router.Addr(), 0).Masked()
			if err := fabric.AddRoute(n.NS, everything, router.Addr()); err != nil {
				return fmt.Errorf("%s: %w", n.Name, err)
			}
		}
		for _, other := range c.Nodes {
			if other == n {
				continue
			}
			for i, pods := range other.PodCIDRs {
				if err := fabric.AddRoute(n.NS, pods, other.Addresses[i]); err != nil {
					return fmt.Errorf("%s: %w", n.Name, err)
				}
			}
		}
	}
	return nil
}

func (c *Cluster) startControlPlane(ctx context.Context) (err error) {
	c.plane, err = controlplane.New(controlplane.Config{
		Assets: c.Assets, Dir: c.Dir, LogDir: c.LogDir(), Spawner: c.spawner,
		ServiceCIDRs:           serviceCIDRs,
		NodeMonitorGracePeriod: c.options.NodeMonitorGracePeriod,
		Crashed:                c.options.Crashed,
	})
	if err != nil {
		return err
	}
	c.APIServer, c.ControllerManager = c.plane.APIServer, c.plane.ControllerManager
	if c.config, err = c.plane.RESTConfig(controlplane.Admin); err != nil {
		return err
	}
	c.Kubeconfig = filepath.Join(c.Dir, "kubeconfig")
	if err := c.plane.WriteKubeconfig(c.Kubeconfig, controlplane.Admin, c.plane.Port()); err != nil {
		return err
	}
	if err := c.prepareController(); err != nil {
		return err
	}
	return c.plane.Start(ctx)
}

func (c *Cluster) prepareController() error {
	kubeconfig := filepath.Join(c.Dir, "controller.kubeconfig")
	if err := c.plane.WriteKubeconfig(kubeconfig, serviceAccount("serviceproxy-controller"), c.plane.Port()); err != nil {
		return err
	}
	webhook := net.JoinHostPort("127.0.0.1", strconv.Itoa(c.plane.WebhookPort()))
	args := append([]string{
		"--kubeconfig=" + kubeconfig, "--namespace=" + systemNamespace, "--leader-elect=false",
		"--metrics-bind-address=127.0.0.1:0", "--health-probe-bind-address=127.0.0.1:0",
		"--webhook-bind-address=" + webhook, "--webhook-url=https://" + webhook,
	}, c.options.ControllerArgs...)
	c.Controller = process.New(c.spawner, process.Spec{
		Name:    "controller",
		Command: c.program("controller", args...),
		LogFile: filepath.Join(c.LogDir(), "controller.log"),
		Crashed: c.options.Crashed,
	})
	return nil
}

// install creates what kubectl apply -k config/default would, except the controller and the agents themselves: custom resource definitions,
// our namespace, roles. It waits until the API server serves the custom resources.
func (c *Cluster) install(ctx context.Context) error {
	scheme := runtime.NewScheme()
	err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme), apiextensionsv1.AddToScheme(scheme))
	if err != nil {
		return err
	}
	if c.client, err = client.New(c.config, client.Options{Scheme: scheme}); err != nil {
		return err
	}
	manifests, err := c.Kubectl(ctx, "", "kustomize", filepath.Join(c.root, "config/default"))
	if err != nil {
		return err
	}
	if err := c.createAll(ctx, strings.NewReader(manifests)); err != nil {
		return err
	}
	return poll(ctx, c.crdsEstablished)
}

// processes are the kinds of what runs here as processes.
var processes = []string{"Deployment", "DaemonSet"}

// createAll creates every object of a stream of YAML documents that does not run as a process.
func (c *Cluster) createAll(ctx context.Context, manifests io.Reader) error {
	decoder := yaml.NewYAMLOrJSONDecoder(manifests, 4096)
	for {
		var o unstructured.Unstructured
		if err := decoder.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		if len(o.Object) == 0 || slices.Contains(processes, o.GetKind()) {
			continue
		}
		if err := c.client.Create(ctx, &o); err != nil {
			return fmt.Errorf("create %s %s: %w", o.GetKind(), o.GetName(), err)
		}
	}
}

func (c *Cluster) crdsEstablished(ctx context.Context) error {
	var crds apiextensionsv1.CustomResourceDefinitionList
	if err := c.client.List(ctx, &crds); err != nil {
		return err
	}
	for _, crd := range crds.Items {
		if !slices.ContainsFunc(crd.Status.Conditions, func(cond apiextensionsv1.CustomResourceDefinitionCondition) bool {
			return cond.Type == apiextensionsv1.Established && cond.Status == apiextensionsv1.ConditionTrue
		}) {
			return fmt.Errorf("custom resource %s is not served yet", crd.Name)
		}
	}
	return nil
}

// startNodes starts kubelets and scheduler and waits until every node is Ready.
func (c *Cluster) startNodes(ctx context.Context) error {
	config := c.RESTConfig()
	config.Wrap(func(rt http.RoundTripper) http.RoundTripper { return outlast{rt} })
	clientset, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	running, stop := context.WithCancel(context.Background())
	c.stopKubelets = stop
	factory := informers.NewSharedInformerFactory(clientset, 0)
	scheduler, err := kubelet.NewScheduler(clientset, factory, c.log)
	if err != nil {
		return err
	}
	for _, n := range c.Nodes {
		if err := n.prepare(clientset, factory); err != nil {
			return fmt.Errorf("%s: %w", n.Name, err)
		}
	}
	factory.StartWithContext(running)
	c.kubelets.Go(func() { scheduler.Run(running) })
	for _, n := range c.Nodes {
		n.powerOn(running)
	}
	c.kubelets.Go(func() {
		<-running.Done()
		factory.Shutdown()
	})
	return c.awaitNodes(ctx)
}

func (c *Cluster) awaitNodes(ctx context.Context) error {
	return poll(ctx, func(ctx context.Context) error {
		var nodes corev1.NodeList
		if err := c.client.List(ctx, &nodes); err != nil {
			return err
		}
		ready := 0
		for i := range nodes.Items {
			if kubelet.NodeReady(&nodes.Items[i]) {
				ready++
			}
		}
		if ready < len(c.Nodes) {
			return fmt.Errorf("%d of %d nodes are Ready", ready, len(c.Nodes))
		}
		return nil
	})
}

// poll tries until there is no error or the context ends.
func poll(ctx context.Context, try func(context.Context) error) error {
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (c *Cluster) startProxy(ctx context.Context) error {
	if err := c.Controller.Start(ctx); err != nil {
		return err
	}
	for _, n := range c.Nodes {
		if err := n.Agent.Start(ctx); err != nil {
			return err
		}
	}
	return nil
}

// serviceAccount is the user that a service account of ours is to the API server, so that the controller and the agents may do here what
// config/rbac lets them do, and no more.
func serviceAccount(name string) controlplane.User {
	return controlplane.User{
		Name:   "system:serviceaccount:" + systemNamespace + ":" + name,
		Groups: []string{"system:serviceaccounts", "system:serviceaccounts:" + systemNamespace},
	}
}

// podChanged keeps the names of the pods' namespaces.
func (c *Cluster) podChanged(pod types.NamespacedName, ns *netns.NS) {
	name := pod.Namespace + "." + pod.Name
	err := c.state.unpin(name)
	if ns != nil && err == nil {
		err = c.state.pin(name, ns)
	}
	if err != nil {
		c.log.Error("name the namespace of a pod", "pod", pod, "error", err)
	}
}

// moduleRoot finds this project's root folder from the current one.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		mod, err := os.ReadFile(filepath.Join(d, "go.mod"))
		if err == nil && strings.HasPrefix(string(mod), "module "+module+"\n") {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("%s is not inside a checkout of %s: its CRDs and programs are needed", dir, module)
		}
	}
}
