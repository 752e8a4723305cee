package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"golang.org/x/sync/errgroup"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

const (
	namespace   = "scale"
	nodeName    = "scale-node"
	nodeAddress = "192.0.2.10"
	podCIDR     = "10.128.0.0/9"
	// Kubernetes clients on loopback are dialled from the proxies' namespaces through a relay at this address.
	relayAddress = "127.0.0.1:6443"
)

// world is an API server with the objects that every proxy sees.
type world struct {
	env                 *envtest.Environment
	client              client.WithWatch
	config              *rest.Config
	dir                 string
	services, endpoints int
	// spare counts endpoint addresses given out by changes, so that each change brings a new one.
	spare int
}

func newWorld(ctx context.Context, assets string, services, endpoints int) (*world, error) {
	root, err := moduleRoot()
	if err != nil {
		return nil, err
	}
	env := &envtest.Environment{
		BinaryAssetsDirectory: assets,
		CRDDirectoryPaths:     []string{filepath.Join(root, "config", "crd", "bases")},
		ErrorIfCRDPathMissing: true,
	}
	env.ControlPlane.GetAPIServer().Configure().
		Set("service-cluster-ip-range", "10.96.0.0/12").
		// The relay is reached at an address of the proxy's own namespace.
		Set("max-requests-inflight", "2000").Set("max-mutating-requests-inflight", "1000")
	config, err := env.Start()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start API server: %w", err), env.Stop())
	}
	config.QPS = -1
	scheme := runtime.NewScheme()
	if err := clientgoscheme.AddToScheme(scheme); err != nil {
		return nil, err
	}
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	c, err := client.NewWithWatch(config, client.Options{Scheme: scheme})
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "scale-world-")
	if err != nil {
		return nil, err
	}
	return &world{env: env, client: c, config: config, dir: dir, services: services, endpoints: endpoints}, nil
}

func (w *world) close() {
	if err := w.env.Stop(); err != nil {
		progress("stop API server: %v", err)
	}
	os.RemoveAll(w.dir)
}

// moduleRoot finds the folder of go.mod from here upwards.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", fmt.Errorf("no go.mod here or above: run it inside the checkout")
		}
		dir = parent
	}
}

// fill creates the node, the Services with their EndpointSlices, and their ServiceAssignments.
func (w *world) fill(ctx context.Context) error {
	for _, o := range []client.Object{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}},
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName}, Spec: corev1.NodeSpec{PodCIDR: "10.244.0.0/24", PodCIDRs: []string{"10.244.0.0/24"}}},
		&v1alpha1.NodeProxyState{ObjectMeta: metav1.ObjectMeta{Name: nodeName}},
	} {
		if err := w.client.Create(ctx, o); err != nil {
			return err
		}
	}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName}}
	patch := fmt.Sprintf(`{"status":{"addresses":[{"type":"InternalIP","address":%q}]}}`, nodeAddress)
	if err := w.client.Status().Patch(ctx, node, client.RawPatch("application/merge-patch+json", []byte(patch))); err != nil {
		return err
	}
	start := time.Now()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i := range w.services {
		g.Go(func() error {
			svc, slice, assignment := w.objects(i)
			if err := w.client.Create(gctx, svc); err != nil {
				return err
			}
			assignment.Spec.ServiceUID = svc.UID
			if err := w.client.Create(gctx, slice); err != nil {
				return err
			}
			return w.client.Create(gctx, assignment)
		})
		if i > 0 && i%2500 == 0 {
			progress("  %d of %d services after %s", i, w.services, time.Since(start).Round(time.Second))
		}
	}
	return g.Wait()
}

func serviceName(i int) string { return fmt.Sprintf("svc-%05d", i) }

// serviceIP gives the address of service i: 10.100.0.1 and on.
func serviceIP(i int) string {
	i++
	return netip.AddrFrom4([4]byte{10, 100 + byte(i>>16), byte(i >> 8), byte(i)}).String()
}

// endpointIP gives the n-th endpoint address of all: 10.128.0.1 and on.
func endpointIP(n int) string {
	n++
	return netip.AddrFrom4([4]byte{10, 128 + byte(n>>16), byte(n >> 8), byte(n)}).String()
}

func (w *world) objects(i int) (*corev1.Service, *discoveryv1.EndpointSlice, *v1alpha1.ServiceAssignment) {
	meta := metav1.ObjectMeta{Namespace: namespace, Name: serviceName(i)}
	svc := &corev1.Service{ObjectMeta: *meta.DeepCopy(), Spec: corev1.ServiceSpec{
		ClusterIP: serviceIP(i),
		Ports:     []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080), Protocol: corev1.ProtocolTCP}},
	}}
	slice := &discoveryv1.EndpointSlice{ObjectMeta: *meta.DeepCopy(), AddressType: discoveryv1.AddressTypeIPv4,
		Ports: []discoveryv1.EndpointPort{{Name: new("http"), Port: new(int32(8080)), Protocol: new(corev1.ProtocolTCP)}}}
	slice.Labels = map[string]string{discoveryv1.LabelServiceName: meta.Name, discoveryv1.LabelManagedBy: "scale"}
	for j := range w.endpoints {
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
			Addresses:  []string{endpointIP(i*w.endpoints + j)},
			Conditions: discoveryv1.EndpointConditions{Ready: new(true), Serving: new(true), Terminating: new(false)},
			NodeName:   new(fmt.Sprintf("node-%d", j)),
			Zone:       new("zone-a"),
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: namespace, Name: fmt.Sprintf("%s-%d", meta.Name, j)},
		})
	}
	assignment := &v1alpha1.ServiceAssignment{ObjectMeta: *meta.DeepCopy(), Spec: v1alpha1.ServiceAssignmentSpec{
		PolicyName: "scale", ProxyMode: v1alpha1.ProxyModeNFTables, Scheduler: v1alpha1.SchedulerRandom,
		ServiceIPs: []v1alpha1.ServiceIP{{IP: serviceIP(i), Source: v1alpha1.ServiceIPSourceClusterIP}},
		Ports:      []v1alpha1.AssignmentPort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}},
	}}
	return svc, slice, assignment
}

// change replaces the last endpoint of service i by one that no service had before.
func (w *world) change(ctx context.Context, i int) error {
	n := w.services*w.endpoints + w.spare
	w.spare++
	patch := fmt.Sprintf(`[{"op":"replace","path":"/endpoints/%d/addresses","value":[%q]}]`, w.endpoints-1, endpointIP(n))
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: serviceName(i)}}
	return w.client.Patch(ctx, slice, client.RawPatch("application/json-patch+json", []byte(patch)))
}

// kubeconfig writes a kubeconfig that reaches the API server from inside a namespace that relay serves.
func (w *world) kubeconfig() (string, error) {
	user, err := w.env.ControlPlane.AddUser(envtest.User{Name: "scale", Groups: []string{"system:masters"}}, nil)
	if err != nil {
		return "", err
	}
	c := user.Config()
	config := clientcmdapi.NewConfig()
	config.Clusters["scale"] = &clientcmdapi.Cluster{Server: "https://" + relayAddress, CertificateAuthorityData: c.CAData}
	config.AuthInfos["scale"] = &clientcmdapi.AuthInfo{ClientCertificateData: c.CertData, ClientKeyData: c.KeyData}
	config.Contexts["scale"] = &clientcmdapi.Context{Cluster: "scale", AuthInfo: "scale"}
	config.CurrentContext = "scale"
	path := filepath.Join(w.dir, "kubeconfig")
	return path, clientcmd.WriteToFile(*config, path)
}

// relay passes connections from relayAddress inside the namespace on to the API server, until the namespace's listener is closed.
func (w *world) relay(ns *netns.NS) (net.Listener, error) {
	server, err := url.Parse(w.config.Host)
	if err != nil {
		return nil, err
	}
	if server.Host == "" {
		server.Host = w.config.Host
	}
	var l net.Listener
	if err := ns.Do(func() (err error) { l, err = net.Listen("tcp", relayAddress); return err }); err != nil {
		return nil, err
	}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer in.Close()
				out, err := net.Dial("tcp", server.Host)
				if err != nil {
					return
				}
				defer out.Close()
				go func() {
					defer out.Close()
					_, _ = io.Copy(out, in) // the other direction sees the end
				}()
				_, _ = io.Copy(in, out) // either side may end a connection
			}()
		}
	}()
	return l, nil
}
