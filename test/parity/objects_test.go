package parity

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/backendtest"
	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// nodeOf gives the world's Node.
func nodeOf(w backendtest.World) *corev1.Node {
	n := w.Node.DeepCopy()
	n.ResourceVersion = ""
	return n
}

// serviceCIDRs are the declared ranges, but for those of which the lab's service IPs are: they are declared anyway.
func serviceCIDRs(w backendtest.World) (out []*networkingv1.ServiceCIDR) {
	for i, r := range w.Ground.Ranges {
		if !slices.Contains(labRanges, r.String()) {
			out = append(out, &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("declared-%d", i)}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{r.String()}}})
		}
	}
	return out
}

// serviceOf gives the Service of which an assignment would be made.
func serviceOf(s *backendtest.Service) (*corev1.Service, error) {
	in := &s.Spec
	out := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name}}
	spec := &out.Spec
	for _, ip := range in.ServiceIPs {
		family := corev1.IPv4Protocol
		if strings.Contains(ip.IP, ":") {
			family = corev1.IPv6Protocol
		}
		if slices.Contains(spec.IPFamilies, family) || ip.Source == v1alpha1.ServiceIPSourceAdditional {
			return nil, fmt.Errorf("a Service of Kubernetes has no second address of a family: %w", errors.ErrUnsupported)
		}
		spec.ClusterIPs, spec.IPFamilies = append(spec.ClusterIPs, ip.IP), append(spec.IPFamilies, family)
	}
	spec.ClusterIP = spec.ClusterIPs[0]
	spec.IPFamilyPolicy = new(corev1.IPFamilyPolicySingleStack)
	if len(spec.ClusterIPs) == 2 {
		spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyRequireDualStack)
	}
	spec.ExternalIPs = in.ExternalIPs
	spec.Type = corev1.ServiceTypeClusterIP
	for _, p := range in.Ports {
		spec.Ports = append(spec.Ports, corev1.ServicePort{Name: strings.ToLower(p.Name), Protocol: p.Protocol, Port: p.Port, NodePort: p.NodePort})
		if p.NodePort != 0 {
			spec.Type = corev1.ServiceTypeNodePort
		}
	}
	if len(in.LoadBalancerIPs) > 0 {
		spec.Type = corev1.ServiceTypeLoadBalancer
		spec.AllocateLoadBalancerNodePorts = new(false)
		spec.LoadBalancerSourceRanges = in.LoadBalancerSourceRanges
		for _, ip := range in.LoadBalancerIPs {
			out.Status.LoadBalancer.Ingress = append(out.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip, IPMode: new(corev1.LoadBalancerIPModeVIP)})
		}
	}
	if in.InternalTrafficPolicy != "" {
		spec.InternalTrafficPolicy = new(in.InternalTrafficPolicy)
	}
	if spec.Type != corev1.ServiceTypeClusterIP || len(spec.ExternalIPs) > 0 {
		spec.ExternalTrafficPolicy = in.ExternalTrafficPolicy
	}
	if in.SessionAffinitySeconds > 0 {
		spec.SessionAffinity = corev1.ServiceAffinityClientIP
		spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: new(in.SessionAffinitySeconds)}}
	}
	return out, nil
}

// slicesOf gives the Service's EndpointSlices. Names of ports are in lower case, as the API wants them.
func slicesOf(s *backendtest.Service) []*discoveryv1.EndpointSlice {
	list := s.Slices()
	for _, slice := range list {
		for i := range slice.Ports {
			slice.Ports[i].Name = new(strings.ToLower(*slice.Ports[i].Name))
		}
	}
	return list
}

// configOf gives the configuration with which kube-proxy does what the world says, or says why it has none.
func (p *kubeProxy) configOf(w backendtest.World) (map[string]any, error) {
	addresses, err := nodePortAddresses(w)
	if err != nil {
		return nil, err
	}
	pace := map[string]any{"masqueradeAll": w.Ground.MasqueradeAll, "minSyncPeriod": "1ms", "syncPeriod": "30s"}
	config := map[string]any{
		"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
		"mode": p.mode, "iptables": pace, "nftables": pace, "hostnameOverride": w.Node.Name,
		"clientConnection":   map[string]any{"kubeconfig": p.dir + "/kubeconfig", "qps": 1000, "burst": 1000},
		"healthzBindAddress": "127.0.0.1:10256", "metricsBindAddress": "127.0.0.1:10249", "nodePortAddresses": addresses, "oomScoreAdj": 0,
		// Nothing of what belongs to the whole machine. tcpBeLiberal would have connection tracking find nothing invalid.
		"conntrack": map[string]any{"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s", "tcpBeLiberal": false},
	}
	pods := w.Ground.Pods
	switch {
	case len(pods.Sources) > 0 && len(pods.Interfaces) > 0, len(pods.Interfaces) > 1:
		return nil, fmt.Errorf("kube-proxy tells pods' traffic by one kind of sign only: %w", errors.ErrUnsupported)
	case len(pods.Interfaces) == 1:
		mode, field := "BridgeInterface", "bridgeInterface"
		name, prefix := strings.CutSuffix(pods.Interfaces[0], "*")
		if prefix {
			mode, field = "InterfaceNamePrefix", "interfaceNamePrefix"
		}
		config["detectLocalMode"], config["detectLocal"] = mode, map[string]any{field: name}
	default:
		var list []string
		for _, s := range pods.Sources {
			list = append(list, s.String())
		}
		config["detectLocalMode"], config["clusterCIDR"] = "ClusterCIDR", strings.Join(list, ",")
	}
	return config, nil
}

// nodePortAddresses gives the one list that kube-proxy has for all Services.
func nodePortAddresses(w backendtest.World) ([]string, error) {
	var all []string
	for i, s := range w.Services {
		if !slices.ContainsFunc(s.Spec.Ports, func(p v1alpha1.AssignmentPort) bool { return p.NodePort != 0 }) {
			continue
		}
		list, err := nodePortAddressesOf(w, s)
		if err != nil {
			return nil, err
		}
		if all != nil && !slices.Equal(all, list) {
			return nil, fmt.Errorf("kube-proxy serves all node ports at the same addresses, not those of Service %d elsewhere: %w", i, errors.ErrUnsupported)
		}
		all = list
	}
	if all == nil {
		all = []string{"primary"}
	}
	return all, nil
}

func nodePortAddressesOf(w backendtest.World, s *backendtest.Service) (out []string, err error) {
	asked := s.Spec.NodePortAddresses
	if len(asked) == 0 || slices.Equal(asked, []string{v1alpha1.NodePortAddressesPrimary}) {
		return []string{"primary"}, nil
	}
	node, problems := compile.ParseNode(w.Node)
	if len(problems) > 0 {
		return nil, fmt.Errorf("the world's node: %v", problems)
	}
	for _, a := range asked {
		switch a {
		case v1alpha1.NodePortAddressesPrimary: // beside others it must be spelled out
			for _, p := range node.Addresses {
				out = append(out, p.String())
			}
		case v1alpha1.NodePortAddressesLocalhost:
			out = append(out, "127.0.0.0/8", "::1/128")
		case v1alpha1.NodePortAddressesAll:
			out = append(out, "0.0.0.0/0", "::/0")
		default:
			out = append(out, a)
		}
	}
	return out, nil
}
