package admission

import (
	"net/netip"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/equality"

	corev1 "k8s.io/api/core/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

func equalServices(a, b *corev1.Service) bool { return equality.Semantic.DeepEqual(a, b) }

func TestRoute(t *testing.T) {
	policy := func(strict bool, ports allocator.PortRange, ranges ...string) *allocator.Policy {
		p := &allocator.Policy{Name: "p", Strict: strict, NodePorts: ports}
		for _, text := range ranges {
			prefix, how, _ := strings.Cut(text, " ")
			r := allocator.Range{Prefix: netip.MustParsePrefix(prefix), Use: v1alpha1.RangeUseClusterIP, Allocation: v1alpha1.RangeAllocationAutomatic}
			switch how {
			case "Manual", "Draining":
				r.Allocation = v1alpha1.RangeAllocation(how)
			case "LoadBalancer":
				r.Use = v1alpha1.RangeUseLoadBalancer
			case "reserved":
				r.Excluded = []netip.Prefix{prefixOf("10.9.0.9/32")}
			}
			p.Ranges = append(p.Ranges, r)
		}
		return p
	}
	ports := allocator.PortRange{First: 31000, Last: 31099}
	ip := func(family v1alpha1.IPFamily, named string) want {
		w := want{use: v1alpha1.ClaimUseClusterIP, family: family}
		if named != "" {
			w.named = allocator.AddrLock(netip.MustParseAddr(named))
		}
		return w
	}
	port := func(named uint16) want {
		return want{use: v1alpha1.ClaimUseNodePort, ports: []int{0}, named: allocator.PortLock(named)}
	}
	second := want{use: v1alpha1.ClaimUseClusterIP, family: v1alpha1.IPv6, index: 1, optional: true}
	for name, tc := range map[string]struct {
		want   want
		policy *allocator.Policy
		owner  string // of what is named
		source source
		says   string // in warning or denial
		denied bool
	}{
		"no policy":                        {want: ip(v1alpha1.IPv4, ""), source: steered},
		"no policy, named":                 {want: ip(v1alpha1.IPv4, "10.96.0.1"), source: fromRequest},
		"no policy, named of a policy":     {want: ip(v1alpha1.IPv4, "10.9.0.1"), owner: "q", source: fromRequest, says: "spec.clusterIPs[0]: 10.9.0.1 lies in RANGE, which policy q declares"},
		"policy":                           {want: ip(v1alpha1.IPv4, ""), policy: policy(true, ports, "10.9.0.0/24"), source: fromPolicy},
		"policy, node port":                {want: port(0), policy: policy(true, ports), source: fromPolicy},
		"policy without node ports":        {want: port(0), policy: policy(true, allocator.PortRange{}, "10.9.0.0/24"), source: steered},
		"policy without ranges":            {want: ip(v1alpha1.IPv4, ""), policy: policy(true, ports), source: steered},
		"policy for load balancers only":   {want: ip(v1alpha1.IPv4, ""), policy: policy(true, ports, "10.9.0.0/24 LoadBalancer"), source: steered},
		"another family, best effort":      {want: ip(v1alpha1.IPv6, ""), policy: policy(false, ports, "10.9.0.0/24"), source: steered, says: "policy p gives out no IPv6 addresses of itself (10.9.0.0/24)"},
		"another family, strict":           {want: ip(v1alpha1.IPv6, ""), policy: policy(true, ports, "10.9.0.0/24"), denied: true, says: "spec.clusterIPs[0]: policy p gives out no IPv6"},
		"another family, strict, optional": {want: second, policy: policy(true, ports, "10.9.0.0/24"), source: dropped, says: "no IPv6"},
		"another family, effort, optional": {want: second, policy: policy(false, ports, "10.9.0.0/24"), source: steered, says: "no IPv6"},
		"manual, strict":                   {want: ip(v1alpha1.IPv4, ""), policy: policy(true, ports, "10.9.0.0/24 Manual"), denied: true, says: "10.9.0.0/24 Manual"},
		"manual, named":                    {want: ip(v1alpha1.IPv4, "10.9.0.1"), policy: policy(true, ports, "10.9.0.0/24 Manual"), owner: "p", source: recorded},
		"named":                            {want: ip(v1alpha1.IPv4, "10.9.0.1"), policy: policy(true, ports, "10.9.0.0/24"), owner: "p", source: recorded},
		"named node port":                  {want: port(31005), policy: policy(true, ports), owner: "p", source: recorded},
		"named of a load balancer's range": {want: ip(v1alpha1.IPv4, "10.9.0.1"), policy: policy(true, ports, "10.9.0.0/24 LoadBalancer"), owner: "p", source: fromRequest},
		"draining, strict":                 {want: ip(v1alpha1.IPv4, "10.9.0.1"), policy: policy(true, ports, "10.9.0.0/24 Draining"), owner: "p", denied: true, says: "which policy p drains, which is Strict"},
		"draining, best effort":            {want: ip(v1alpha1.IPv4, "10.9.0.1"), policy: policy(false, ports, "10.9.0.0/24 Draining"), owner: "p", source: recorded, says: "drains"},
		"reserved, strict":                 {want: ip(v1alpha1.IPv4, "10.9.0.9"), policy: policy(true, ports, "10.9.0.0/24 reserved"), owner: "p", denied: true, says: "reserved in range 10.9.0.0/24"},
		"reserved, best effort":            {want: ip(v1alpha1.IPv4, "10.9.0.9"), policy: policy(false, ports, "10.9.0.0/24 reserved"), owner: "p", source: recorded, says: "reserved"},
		"outside, strict":                  {want: ip(v1alpha1.IPv4, "10.96.0.1"), policy: policy(true, ports, "10.9.0.0/24"), denied: true, says: "10.96.0.1 belongs to no policy; policy p is Strict and has 10.9.0.0/24"},
		"outside, best effort":             {want: ip(v1alpha1.IPv4, "10.96.0.1"), policy: policy(false, ports, "10.9.0.0/24"), source: fromRequest},
		"outside, node port, strict":       {want: port(30001), policy: policy(true, ports), denied: true, says: "spec.ports[0].nodePort: node port 30001 belongs to no policy; policy p is Strict and has node ports 31000-31099"},
		"outside, the policy has no ports": {want: port(30001), policy: policy(true, allocator.PortRange{}, "10.9.0.0/24"), source: fromRequest},
		"of another, strict":               {want: ip(v1alpha1.IPv4, "10.8.0.1"), policy: policy(true, ports, "10.9.0.0/24"), owner: "q", denied: true, says: "belongs to policy q (RANGE)"},
		"of another, best effort":          {want: ip(v1alpha1.IPv4, "10.8.0.1"), policy: policy(false, ports, "10.9.0.0/24"), owner: "q", source: fromRequest, says: "which policy q declares"},
		"its own, but an older policy's":   {want: ip(v1alpha1.IPv4, "10.9.0.1"), policy: policy(false, ports, "10.9.0.0/24"), owner: "older", source: fromRequest, says: "policy older"},
	} {
		t.Run(name, func(t *testing.T) {
			got := routeOf(tc.want, tc.policy, func(l allocator.Lock) (string, string) {
				if l != tc.want.named {
					t.Errorf("asked for the owner of %s", l)
				}
				if tc.owner == "" {
					return "", ""
				}
				return tc.owner, "RANGE"
			})
			said := got.warning + got.denial
			if got.source != tc.source || (got.denial != "") != tc.denied || !strings.Contains(said, tc.says) || (tc.says == "") != (said == "") {
				t.Errorf("got %+v", got)
			}
		})
	}
}

func prefixOf(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestFirstFamily(t *testing.T) {
	of := func(use v1alpha1.RangeUse, how v1alpha1.RangeAllocation, ranges ...string) *allocator.Policy {
		p := &allocator.Policy{}
		for _, r := range ranges {
			p.Ranges = append(p.Ranges, allocator.Range{Prefix: prefixOf(r), Use: use, Allocation: how})
		}
		return p
	}
	const c, auto = v1alpha1.RangeUseClusterIP, v1alpha1.RangeAllocationAutomatic
	for name, tc := range map[string]struct {
		policy *allocator.Policy
		served []v1alpha1.IPFamily
		want   v1alpha1.IPFamily
	}{
		"no policy":                      {nil, both, v1alpha1.IPv4},
		"no ranges":                      {of(c, auto), both, v1alpha1.IPv4},
		"the default's":                  {of(c, auto, "10.9.0.0/24", "fd00:9::/112"), both, v1alpha1.IPv4},
		"the other's only":               {of(c, auto, "fd00:9::/112"), both, v1alpha1.IPv6},
		"the other's, which is unserved": {of(c, auto, "fd00:9::/112"), v4Only, v1alpha1.IPv4},
		"the other's, manual":            {of(c, v1alpha1.RangeAllocationManual, "fd00:9::/112"), both, v1alpha1.IPv4},
		"the other's, load balancers'":   {of(v1alpha1.RangeUseLoadBalancer, auto, "fd00:9::/112"), both, v1alpha1.IPv4},
	} {
		if got := firstFamily(tc.policy, tc.served); got != tc.want {
			t.Errorf("%s: got %s", name, got)
		}
	}
}
