package controllers

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

func TestMetricsOfPolicies(t *testing.T) {
	g := NewWithT(t)
	registry := prometheus.NewPedanticRegistry()
	g.Expect(collectFrom(newLedger(quick.withDefaults()), registry)).To(Succeed())
	g.Expect(gathered(g, registry)).To(BeEmpty(), "nothing is said before everything is known")

	claim := func(addr, policy string, state v1alpha1.ClaimState) *v1alpha1.AllocationClaim {
		c := allocator.NewClaim(allocator.AddrLock(netip.MustParseAddr(addr)), allocator.Hold{Policy: policy, State: state, Use: v1alpha1.ClaimUseClusterIP})
		c.Spec.ExpiresAt = &metav1.Time{Time: time.Now().Add(time.Hour)}
		return c
	}
	node := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{NodePort: 30003}}}}
	assignment := &v1alpha1.ServiceAssignment{ObjectMeta: metav1.ObjectMeta{Name: "web", Labels: ourLabels("a")}, Spec: v1alpha1.ServiceAssignmentSpec{PolicyName: "a"},
		Status: v1alpha1.ServiceAssignmentStatus{Conditions: []metav1.Condition{{Type: v1alpha1.AssignmentAllocated, Status: "True"}}}}
	l := told(declaring("a", time.Hour, &v1alpha1.NodePortRange{Start: 30000, End: 30009}, clusterIPRange("10.1.0.0/28"), vipRange("10.2.0.0/29")),
		declaring("b", time.Minute, nil, clusterIPRange("10.1.0.0/29")), serviceCIDR("a-x7", ourLabels("a"), "10.1.0.0/28"), node,
		claim("10.1.0.1", "a", v1alpha1.ClaimBound), claim("10.1.0.2", "a", v1alpha1.ClaimReleased), claim("10.1.0.3", "b", v1alpha1.ClaimBound),
		&networkingv1.IPAddress{ObjectMeta: metav1.ObjectMeta{Name: "10.1.0.4"}})
	l.setServerPorts(allocator.PortRange{First: 30002, Last: 32767})
	l.onAssignment(nil, assignment)
	g.Expect(collectFrom(l, registry)).To(Succeed(), "a second manager in one process")
	g.Expect(gathered(g, registry)).To(Equal(`serviceproxy_node_port_capacity{policy="a"} 8
serviceproxy_node_ports{policy="a",state="allocated"} 0
serviceproxy_node_ports{policy="a",state="foreign"} 1
serviceproxy_node_ports{policy="a",state="free"} 7
serviceproxy_node_ports{policy="a",state="quarantined"} 0
serviceproxy_policy_conflicts{policy="a"} 0
serviceproxy_policy_conflicts{policy="b"} 1
serviceproxy_range_addresses{cidr="10.1.0.0/28",policy="a",state="allocated",use="ClusterIP"} 1
serviceproxy_range_addresses{cidr="10.1.0.0/28",policy="a",state="foreign",use="ClusterIP"} 2
serviceproxy_range_addresses{cidr="10.1.0.0/28",policy="a",state="free",use="ClusterIP"} 10
serviceproxy_range_addresses{cidr="10.1.0.0/28",policy="a",state="quarantined",use="ClusterIP"} 1
serviceproxy_range_addresses{cidr="10.1.0.0/29",policy="b",state="allocated",use="ClusterIP"} 1
serviceproxy_range_addresses{cidr="10.1.0.0/29",policy="b",state="foreign",use="ClusterIP"} 2
serviceproxy_range_addresses{cidr="10.1.0.0/29",policy="b",state="free",use="ClusterIP"} 0
serviceproxy_range_addresses{cidr="10.1.0.0/29",policy="b",state="quarantined",use="ClusterIP"} 1
serviceproxy_range_addresses{cidr="10.2.0.0/29",policy="a",state="allocated",use="LoadBalancer"} 0
serviceproxy_range_addresses{cidr="10.2.0.0/29",policy="a",state="foreign",use="LoadBalancer"} 0
serviceproxy_range_addresses{cidr="10.2.0.0/29",policy="a",state="free",use="LoadBalancer"} 6
serviceproxy_range_addresses{cidr="10.2.0.0/29",policy="a",state="quarantined",use="LoadBalancer"} 0
serviceproxy_range_capacity{cidr="10.1.0.0/28",policy="a",use="ClusterIP"} 14
serviceproxy_range_capacity{cidr="10.1.0.0/29",policy="b",use="ClusterIP"} 0
serviceproxy_range_capacity{cidr="10.2.0.0/29",policy="a",use="LoadBalancer"} 6
serviceproxy_services{policy="a",state="assigned"} 1
serviceproxy_services{policy="a",state="covered"} 1
serviceproxy_services{policy="a",state="handing-back"} 0
serviceproxy_services{policy="a",state="programmed"} 0
serviceproxy_services{policy="a",state="taken-over"} 0
serviceproxy_services{policy="a",state="waiting"} 0
serviceproxy_services{policy="b",state="assigned"} 0
serviceproxy_services{policy="b",state="covered"} 0
serviceproxy_services{policy="b",state="handing-back"} 0
serviceproxy_services{policy="b",state="programmed"} 0
serviceproxy_services{policy="b",state="taken-over"} 0
serviceproxy_services{policy="b",state="waiting"} 0
`))
}

// gathered is what a scrape says, sorted, without the help.
func gathered(g Gomega, r prometheus.Gatherer) string {
	families, err := r.Gather()
	g.Expect(err).NotTo(HaveOccurred())
	var out strings.Builder
	for _, f := range families {
		g.Expect(f.GetHelp()).NotTo(BeEmpty())
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			fmt.Fprintf(&out, "%s{%s} %v\n", f.GetName(), strings.Join(labels, ","), m.GetGauge().GetValue())
		}
	}
	return out.String()
}
