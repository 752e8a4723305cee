package parity

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/backendtest"
)

// cluster is an API server that holds the world of one kube-proxy.
type cluster struct {
	env    *envtest.Environment
	client client.Client
	// held is what it holds of worlds, by kind and name, as it was wanted.
	held   map[string]client.Object
	marker marker
}

// serviceRanges are the API server's own, which the lab does not use: their first address is the kubernetes Service's. labRanges hold the lab's service IPs.
const serviceRanges = "10.100.0.0/24,fd00:100::/108"

var labRanges = []string{"10.99.0.0/16", "fd00:99::/64"}

// startCluster starts an API server, and writes a kubeconfig with which it is reached at an address where a relay listens.
func startCluster(kubeconfig, relayAddress string) (_ *cluster, err error) {
	c := &cluster{held: map[string]client.Object{}, env: &envtest.Environment{ControlPlaneStartTimeout: 2 * time.Minute, ControlPlaneStopTimeout: time.Minute}}
	c.env.ControlPlane.GetAPIServer().Configure().Set("service-cluster-ip-range", serviceRanges)
	config, err := c.env.Start()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start API server: %w", err), c.env.Stop())
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.env.Stop())
		}
	}()
	config.QPS = -1
	if c.client, err = client.New(config, client.Options{Scheme: clientgoscheme.Scheme}); err != nil {
		return nil, err
	}
	user, err := c.env.AddUser(envtest.User{Name: "kube-proxy", Groups: []string{"system:masters"}}, nil)
	if err != nil {
		return nil, err
	}
	u := user.Config()
	out := clientcmdapi.NewConfig()
	out.Clusters["lab"] = &clientcmdapi.Cluster{Server: "https://" + relayAddress, CertificateAuthorityData: u.CAData, TLSServerName: "localhost"}
	out.AuthInfos["lab"] = &clientcmdapi.AuthInfo{ClientCertificateData: u.CertData, ClientKeyData: u.KeyData}
	out.Contexts["lab"] = &clientcmdapi.Context{Cluster: "lab", AuthInfo: "lab"}
	out.CurrentContext = "lab"
	return c, errors.Join(clientcmd.WriteToFile(*out, kubeconfig), c.declareRanges())
}

// declareRanges declares the lab's ranges, does what kube-controller-manager would do to make them ready, and waits until the API server takes addresses of them.
func (c *cluster) declareRanges() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	ranges := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "lab"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: labRanges}}
	if err := c.client.Create(ctx, ranges); err != nil {
		return err
	}
	ranges.Status.Conditions = []metav1.Condition{{Type: networkingv1.ServiceCIDRConditionReady, Status: metav1.ConditionTrue, Reason: "Lab", LastTransitionTime: metav1.Now()}}
	if err := c.client.Status().Update(ctx, ranges); err != nil {
		return err
	}
	for {
		err := c.client.Create(ctx, markerObjects(firstMarker)[0], client.DryRunAll)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the API server does not take addresses of the lab's ranges: %w", err)
		case <-time.After(interval):
		}
	}
}

func (c *cluster) address() string {
	return c.env.ControlPlane.GetAPIServer().SecureServing.HostPort()
}

func (c *cluster) stop() error { return c.env.Stop() }

// apply makes the API server hold a world and nothing else, but for the marker. It says whether something changed that kube-proxy should be started again for.
// settle is called where the next step must wait until the proxy has taken the last one in.
func (c *cluster) apply(w backendtest.World, settle func() error) (restart bool, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), programmed)
	defer cancel()
	wanted := map[string]client.Object{}
	var order []string
	want := func(list ...client.Object) {
		for _, o := range list {
			key := fmt.Sprintf("%T %s", o, o.GetName())
			wanted[key] = o
			order = append(order, key)
		}
	}
	want(nodeOf(w))
	for _, r := range serviceCIDRs(w) {
		want(r)
	}
	for _, s := range w.Services {
		svc, err := serviceOf(s)
		if err != nil {
			return false, err
		}
		want(svc)
		for _, slice := range slicesOf(s) {
			want(slice)
		}
	}
	for key, o := range wanted {
		restart = restart || atStart(o) && !equality.Semantic.DeepEqual(c.held[key], o)
	}
	for key, o := range c.held {
		restart = restart || atStart(o) && wanted[key] == nil
	}
	// First what goes: its addresses and ports may be somebody else's next. Of a Service it is the Service that goes first, as when somebody deletes one.
	for _, services := range []bool{true, false} {
		deleted, err := c.deleteOthers(ctx, wanted, services)
		if err != nil {
			return false, err
		}
		if deleted && services {
			if err := settle(); err != nil {
				return false, err
			}
		}
	}
	// An object may want what another one lets go of only when its turn comes: then its own comes again.
	for len(order) > 0 {
		var again []string
		var refused error
		for _, key := range order {
			o, old := wanted[key], c.held[key]
			if old != nil && equality.Semantic.DeepEqual(old, o) {
				continue
			}
			err := c.put(ctx, o, old)
			switch {
			case apierrors.IsInvalid(err):
				again, refused = append(again, key), err
				continue
			case err != nil:
				return false, fmt.Errorf("%s: %w", key, err)
			}
			c.held[key] = o
		}
		if len(again) == len(order) {
			return false, fmt.Errorf("the API server refuses it: %w: %w", errors.ErrUnsupported, refused)
		}
		order = again
	}
	return restart, nil
}

// deleteOthers deletes what is held and not wanted any more: the Services, or all else. It says whether there was any.
func (c *cluster) deleteOthers(ctx context.Context, wanted map[string]client.Object, services bool) (deleted bool, err error) {
	for key, old := range c.held {
		if wanted[key] != nil || isService(old) != services {
			continue
		}
		if err := c.client.Delete(ctx, old); err != nil {
			return false, err
		}
		delete(c.held, key)
		deleted = true
	}
	return deleted, nil
}

// atStart says whether kube-proxy is started again when an object changes: it would take the change in, and nothing in its rules would tell when it has.
func atStart(o client.Object) bool {
	switch o.(type) {
	case *corev1.Node, *networkingv1.ServiceCIDR:
		return true
	}
	return false
}

// put creates an object, or makes the one that is there the same, with its status.
func (c *cluster) put(ctx context.Context, wanted, old client.Object) error {
	o := wanted.DeepCopyObject().(client.Object)
	if old != nil {
		live := wanted.DeepCopyObject().(client.Object)
		if err := c.client.Get(ctx, client.ObjectKeyFromObject(wanted), live); err != nil {
			return err
		}
		o.SetResourceVersion(live.GetResourceVersion())
		err := c.client.Update(ctx, o)
		if apierrors.IsInvalid(err) && isService(o) { // its addresses cannot change
			if err := c.client.Delete(ctx, live); err != nil {
				return err
			}
			o, old = wanted.DeepCopyObject().(client.Object), nil
		} else if err != nil {
			return err
		}
	}
	if old == nil {
		if err := c.client.Create(ctx, o); err != nil {
			return err
		}
	}
	switch in := wanted.(type) {
	case *corev1.Node:
		o.(*corev1.Node).Status = *in.Status.DeepCopy()
	case *corev1.Service:
		if old == nil && len(in.Status.LoadBalancer.Ingress) == 0 {
			return nil
		}
		o.(*corev1.Service).Status = *in.Status.DeepCopy()
	default:
		return nil
	}
	return c.client.Status().Update(ctx, o)
}

func isService(o client.Object) bool {
	_, ok := o.(*corev1.Service)
	return ok
}

// marker is a Service with one endpoint, by which the rules tell what they hold: each time it has another port.
type marker struct {
	service, endpoint [2]netip.Addr
	port              uint16
}

var firstMarker = marker{
	service:  [2]netip.Addr{netip.MustParseAddr("10.99.255.254"), netip.MustParseAddr("fd00:99::f:fffe")},
	endpoint: [2]netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("2001:2::1")},
	port:     1024,
}

// mark changes the marker. kube-proxy learns of Services and EndpointSlices by streams of their own, because of which both change.
func (c *cluster) mark(ctx context.Context) error {
	first := c.marker.port == 0
	if first {
		c.marker = firstMarker
	}
	if c.marker.port++; c.marker.port > 60000 {
		c.marker.port = firstMarker.port
	}
	for _, o := range markerObjects(c.marker) {
		if first {
			if err := c.client.Create(ctx, o); err != nil {
				return fmt.Errorf("marker: %w", err)
			}
			continue
		}
		live := o.DeepCopyObject().(client.Object)
		if err := c.client.Get(ctx, client.ObjectKeyFromObject(o), live); err != nil {
			return fmt.Errorf("marker: %w", err)
		}
		o.SetResourceVersion(live.GetResourceVersion())
		if err := c.client.Update(ctx, o); err != nil {
			return fmt.Errorf("marker: %w", err)
		}
	}
	return nil
}

// markerObjects gives the Service of a marker and its EndpointSlices.
func markerObjects(m marker) []client.Object {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceDefault, Name: "marker"}}
	svc.Spec.ClusterIPs = []string{m.service[0].String(), m.service[1].String()}
	svc.Spec.ClusterIP = svc.Spec.ClusterIPs[0]
	svc.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
	svc.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack)
	svc.Spec.Ports = []corev1.ServicePort{{Protocol: corev1.ProtocolTCP, Port: int32(m.port)}}
	objects := []client.Object{svc}
	for family, kind := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
		objects = append(objects, &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: svc.Namespace, Name: "marker-" + strings.ToLower(string(kind)), Labels: map[string]string{discoveryv1.LabelServiceName: svc.Name}},
			AddressType: kind, Endpoints: []discoveryv1.Endpoint{{Addresses: []string{m.endpoint[family].String()}}},
			Ports: []discoveryv1.EndpointPort{{Name: new(""), Protocol: new(corev1.ProtocolTCP), Port: new(int32(m.port))}},
		})
	}
	return objects
}
