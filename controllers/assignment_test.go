package controllers

import (
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/google/go-cmp/cmp"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

func TestCompileAssignment(t *testing.T) {
	type service = func(*corev1.Service)
	type policy = func(*v1alpha1.ServiceProxyPolicy)
	type want = func(*v1alpha1.ServiceAssignmentSpec)
	for _, tt := range []struct {
		name       string
		svc        service
		policy     policy
		additional []string
		vips       []string
		want       want
	}{
		{name: "plain ClusterIP Service", want: func(*v1alpha1.ServiceAssignmentSpec) {}},
		{name: "dual stack with additional addresses",
			svc:        func(s *corev1.Service) { s.Spec.ClusterIPs = []string{"10.96.0.5", "fd00:0:0::5"} },
			additional: []string{"10.99.0.1", "fd99::1"},
			want: func(a *v1alpha1.ServiceAssignmentSpec) {
				a.ServiceIPs = []v1alpha1.ServiceIP{{IP: "10.96.0.5", Source: "ClusterIP"}, {IP: "fd00::5", Source: "ClusterIP"},
					{IP: "10.99.0.1", Source: "Additional"}, {IP: "fd99::1", Source: "Additional"}}
			}},
		{name: "IPVS balances in turn unless told otherwise", policy: func(p *v1alpha1.ServiceProxyPolicy) { p.Spec.ProxyMode = "IPVS" },
			want: func(a *v1alpha1.ServiceAssignmentSpec) { a.ProxyMode, a.Scheduler = "IPVS", "RoundRobin" }},
		{name: "the policy's scheduler, nodes and node-port addresses",
			policy: func(p *v1alpha1.ServiceProxyPolicy) {
				p.Spec.Scheduler = "SourceHash"
				p.Spec.NodeSelector = metav1.LabelSelector{MatchLabels: map[string]string{"edge": "yes"}}
				p.Spec.NodePortAddresses = []string{"192.168.0.0/16"}
			},
			want: func(a *v1alpha1.ServiceAssignmentSpec) {
				a.Scheduler = "SourceHash"
				a.NodeSelector.MatchLabels = map[string]string{"edge": "yes"}
				a.NodePortAddresses = []string{"192.168.0.0/16"}
			}},
		{name: "several ports, node ports, a protocol by default",
			svc: func(s *corev1.Service) {
				s.Spec.Type = corev1.ServiceTypeNodePort
				s.Spec.Ports = []corev1.ServicePort{{Name: "http", Port: 80, NodePort: 30080}, {Name: "dns", Protocol: "UDP", Port: 53, NodePort: 30053}}
			},
			want: func(a *v1alpha1.ServiceAssignmentSpec) {
				a.Ports = []v1alpha1.AssignmentPort{{Name: "http", Protocol: "TCP", Port: 80, NodePort: 30080}, {Name: "dns", Protocol: "UDP", Port: 53, NodePort: 30053}}
			}},
		{name: "affinity with its timeout",
			svc: func(s *corev1.Service) {
				s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
				s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: ptr.To[int32](60)}}
			},
			want: func(a *v1alpha1.ServiceAssignmentSpec) { a.SessionAffinitySeconds = 60 }},
		{name: "affinity without a timeout", svc: func(s *corev1.Service) { s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP },
			want: func(a *v1alpha1.ServiceAssignmentSpec) { a.SessionAffinitySeconds = 10800 }},
		{name: "traffic policies and distribution",
			svc: func(s *corev1.Service) {
				s.Spec.InternalTrafficPolicy = ptr.To(corev1.ServiceInternalTrafficPolicyLocal)
				s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
				s.Spec.TrafficDistribution = ptr.To(corev1.ServiceTrafficDistributionPreferSameNode)
				s.Spec.HealthCheckNodePort = 31000
			},
			want: func(a *v1alpha1.ServiceAssignmentSpec) {
				a.InternalTrafficPolicy, a.ExternalTrafficPolicy = "Local", "Local"
				a.TrafficDistribution, a.HealthCheckNodePort = "PreferSameNode", 31000
			}},
		{name: "load-balancer addresses: VIP and unset, not Proxy, not host names; sloppy values made canonical",
			svc: func(s *corev1.Service) {
				s.Spec.Type = corev1.ServiceTypeLoadBalancer
				s.Spec.LoadBalancerSourceRanges = []string{" 10.1.2.3/8 ", "nonsense", "fd00::1/64"}
				s.Spec.ExternalIPs = []string{"203.000.113.010", "203.0.113.10", "nonsense"}
				s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "198.51.100.1"}, {Hostname: "lb.example"},
					{IP: "198.51.100.2", IPMode: ptr.To(corev1.LoadBalancerIPModeProxy)}, {IP: "2001:db8:0::1", IPMode: ptr.To(corev1.LoadBalancerIPModeVIP)}}
			},
			want: func(a *v1alpha1.ServiceAssignmentSpec) {
				a.LoadBalancerIPs = []string{"198.51.100.1", "2001:db8::1"}
				a.LoadBalancerSourceRanges = []string{"10.0.0.0/8", "fd00::/64"}
				a.ExternalIPs = []string{"203.0.113.10"}
			}},
		{name: "VIPs of our class, whatever the status says",
			svc: func(s *corev1.Service) {
				s.Spec.Type, s.Spec.LoadBalancerClass = corev1.ServiceTypeLoadBalancer, ptr.To(v1alpha1.LoadBalancerClass)
				s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "198.51.100.1"}}
			},
			vips: []string{"198.51.100.2", "2001:db8::2"},
			want: func(a *v1alpha1.ServiceAssignmentSpec) {
				a.LoadBalancerIPs = []string{"198.51.100.2", "2001:db8::2"}
			}},
		{name: "what is left of a load balancer does not count for a ClusterIP Service",
			svc: func(s *corev1.Service) {
				s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "198.51.100.1"}}
			},
			want: func(*v1alpha1.ServiceAssignmentSpec) {}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "u1"},
				Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, ClusterIP: "10.96.0.5", Ports: []corev1.ServicePort{{Protocol: "TCP", Port: 80}}}}
			policy := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: "p"},
				Spec: v1alpha1.ServiceProxyPolicySpec{NodePortAddresses: []string{"Primary"}}}
			want := v1alpha1.ServiceAssignmentSpec{
				PolicyName: "p", ServiceUID: "u1", ProxyMode: "NFTables", Scheduler: "Random",
				ServiceIPs:            []v1alpha1.ServiceIP{{IP: "10.96.0.5", Source: "ClusterIP"}},
				Ports:                 []v1alpha1.AssignmentPort{{Protocol: "TCP", Port: 80}},
				InternalTrafficPolicy: "Cluster", ExternalTrafficPolicy: "Cluster", NodePortAddresses: []string{"Primary"},
			}
			if tt.svc != nil {
				tt.svc(svc)
			}
			if tt.policy != nil {
				tt.policy(policy)
			}
			tt.want(&want)
			var additional, vips []netip.Addr
			for _, a := range tt.additional {
				additional = append(additional, netip.MustParseAddr(a))
			}
			for _, a := range tt.vips {
				vips = append(vips, netip.MustParseAddr(a))
			}
			before := svc.DeepCopy()
			if diff := cmp.Diff(want, CompileAssignment(svc, policy, additional, vips)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if !equality.Semantic.DeepEqual(before, svc) {
				t.Error("the Service was changed")
			}
		})
	}
}
