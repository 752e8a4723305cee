package v1alpha1_test

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	jsonpatch "github.com/evanphx/json-patch/v5"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/json"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// valid has an object of each kind that is accepted. The entries of the tables are merge patches of them.
var valid = map[string]string{
	"ServiceProxyPolicy": `
metadata: {name: tenant-a}
spec:
  serviceRanges: [{cidr: 10.99.0.0/16}]`,
	"ServiceAssignment": `
metadata: {name: web, namespace: default}
spec:
  policyName: tenant-a
  serviceUID: 6f0c1c6e-0d9c-4a57-9f2b-2f2f6a0d8c11
  proxyMode: NFTables
  scheduler: Random
  serviceIPs: [{ip: 10.99.13.178, source: ClusterIP}]
  ports: [{name: http, protocol: TCP, port: 80}]`,
	"AllocationClaim": `
metadata: {name: 10.99.13.178}
spec:
  address: 10.99.13.178
  use: ClusterIP
  policyName: tenant-a
  holder: {namespace: default, name: web, uid: 6f0c1c6e-0d9c-4a57-9f2b-2f2f6a0d8c11}
  state: Bound`,
	"NodeProxyState": `
metadata: {name: node1}
spec: {reportInterval: 1s}`,
}

// rejection is an object that the API server must refuse, and all that it must say about it.
type rejection struct {
	kind   string
	was    string // a merge patch; if set, the object exists like this and is updated
	object string // a merge patch
	causes []string
}

var rejections = slices.Concat(policyRejections(), assignmentRejections(), claimRejections(), nodeStateRejections())

func policyRejections() []rejection {
	const kind = "ServiceProxyPolicy"
	spec := func(spec string, causes ...string) rejection {
		return rejection{kind: kind, object: "spec: " + spec, causes: causes}
	}
	ranges := func(ranges string, causes ...string) rejection { return spec("{serviceRanges: "+ranges+"}", causes...) }
	const (
		notCIDR           = `must be a CIDR such as 10.99.0.0/16 or fd00:99::/112`
		canonicalReserved = `must be an IP address or a CIDR in canonical form, such as 10.99.0.10 or 10.99.0.0/28`
		prefixLength      = `prefix length must be 8 to 30 for IPv4 and 64 to 126 for IPv6`
		unicast           = `must be unicast addresses that can be routed: not of 0.0.0.0/8, 127.0.0.0/8 (loopback), ` +
			`169.254.0.0/16 (link-local), 224.0.0.0/3 (multicast, reserved), ::/8, fe80::/10 (link-local) or ff00::/8 (multicast)`
		nodePortAddress = `must be Primary, Localhost, All or a CIDR in canonical form, such as 192.168.0.0/24`
		selector        = `each entry must have operator In or NotIn with values, or Exists or DoesNotExist without`
		aDuration       = `must be a duration such as 60s, 5m or 1h30m`
	)
	out := []rejection{
		{kind: kind, object: "metadata: {name: " + strings.Repeat("x", 64) + "}", causes: []string{
			`Invalid value: metadata.name must be at most 63 characters, because it is used as a label value, and has 64`}},
		{kind: kind, object: "spec: null", causes: []string{`spec: Required value`}},
		spec(`{priority: -1000001}`, `spec.priority: Invalid value: -1000001: spec.priority in body should be greater than or equal to -1000000`),
		spec(`{priority: 1000001}`, `spec.priority: Invalid value: 1000001: spec.priority in body should be less than or equal to 1000000`),

		// Ranges.
		ranges(`[{}]`, `spec.serviceRanges[0].cidr: Required value`),
		ranges(`[{cidr: ab}]`, `spec.serviceRanges[0].cidr: Invalid value: "ab": `+notCIDR, `spec.serviceRanges[0].cidr: Invalid value: "ab": spec.serviceRanges[0].cidr in body should be at least 3 chars long`),
		ranges(`[{cidr: `+strings.Repeat("f", 44)+`}]`, `spec.serviceRanges[0].cidr: Too long: may not be more than 43 bytes`),
		spec(many("serviceRanges", 17, "{cidr: 10.%d.0.0/16}"), `spec.serviceRanges: Too many: 17: must have at most 16 items`),
		ranges(`[{cidr: 10.99.0.0/16}, {cidr: 10.99.0.0/16}]`, `spec.serviceRanges[1]: Duplicate value: {"cidr":"10.99.0.0/16"}`),
		ranges(`[{cidr: 10.99.0.0/16}, {cidr: 10.99.128.0/17}]`, `spec.serviceRanges: Invalid value: ranges must not overlap, and 10.99.128.0/17 lies inside another one`),
		ranges(`[{cidr: "fd00:99::/112"}, {cidr: 10.99.0.0/16}, {cidr: "fd00:99::/108"}]`, `spec.serviceRanges: Invalid value: ranges must not overlap, and fd00:99::/112 lies inside another one`),
		ranges(`[{cidr: 10.99.0.0/16, use: Both, allocation: Never}]`,
			`spec.serviceRanges[0].allocation: Unsupported value: "Never": supported values: "Automatic", "Manual", "Draining"`,
			`spec.serviceRanges[0].use: Unsupported value: "Both": supported values: "ClusterIP", "LoadBalancer"`),
		{kind: kind, was: "spec: {serviceRanges: [{cidr: 10.99.0.0/16, use: ClusterIP}]}", object: "spec: {serviceRanges: [{cidr: 10.99.0.0/16, use: LoadBalancer}]}", causes: []string{
			`spec.serviceRanges[0].use: Invalid value: is immutable, and was ClusterIP: set allocation Draining, take the range out of the policy when nothing holds an address of it, then add it again`}},

		// Reserved addresses.
		ranges(`[{cidr: 10.99.0.0/16, reserved: [10.98.0.1]}]`, `spec.serviceRanges[0].reserved: Invalid value: 10.98.0.1 does not lie inside the range 10.99.0.0/16`),
		ranges(`[{cidr: 10.99.0.0/16, reserved: [10.99.0.1, 10.96.0.0/12]}]`, `spec.serviceRanges[0].reserved: Invalid value: 10.96.0.0/12 does not lie inside the range 10.99.0.0/16`),
		ranges(`[{cidr: 10.99.0.0/16, reserved: ["fd00:99::1"]}]`, `spec.serviceRanges[0].reserved: Invalid value: fd00:99::1 does not lie inside the range 10.99.0.0/16`),
		ranges(`[{cidr: "fd00:99::/112", reserved: [10.99.0.300, "fd00:99::0:1", "fd00:99::1/120"]}]`,
			`spec.serviceRanges[0].reserved[0]: Invalid value: "10.99.0.300": `+canonicalReserved,
			`spec.serviceRanges[0].reserved[1]: Invalid value: "fd00:99::0:1": `+canonicalReserved,
			`spec.serviceRanges[0].reserved[2]: Invalid value: "fd00:99::1/120": `+canonicalReserved),
		ranges(`[{cidr: 10.99.0.0/16, reserved: [10.99.0.1, 10.99.0.1]}]`, `spec.serviceRanges[0].reserved[1]: Duplicate value: "10.99.0.1"`),
		ranges(`[{cidr: 10.99.0.0/16, reserved: [x, `+strings.Repeat("y", 44)+`]}]`,
			`spec.serviceRanges[0].reserved[0]: Invalid value: "x": spec.serviceRanges[0].reserved[0] in body should be at least 2 chars long`,
			`spec.serviceRanges[0].reserved[1]: Too long: may not be more than 43 bytes`),
		ranges(`[{cidr: 10.99.0.0/16, `+list("reserved", 65, "10.99.0.%d")+`}]`, `spec.serviceRanges[0].reserved: Too many: 65: must have at most 64 items`),

		// Node ports.
		spec(`{nodePortRange: {start: 31000, end: 30000}}`, `spec.nodePortRange: Invalid value: start 31000 must not be greater than end 30000`),
		spec(`{nodePortRange: {}}`, `spec.nodePortRange.end: Required value`, `spec.nodePortRange.start: Required value`),
		spec(`{nodePortRange: {start: 0, end: 0}}`,
			`spec.nodePortRange.end: Invalid value: 0: spec.nodePortRange.end in body should be greater than or equal to 1`,
			`spec.nodePortRange.start: Invalid value: 0: spec.nodePortRange.start in body should be greater than or equal to 1`),
		spec(`{nodePortRange: {start: 65536, end: 70000}}`,
			`spec.nodePortRange.end: Invalid value: 70000: spec.nodePortRange.end in body should be less than or equal to 65535`,
			`spec.nodePortRange.start: Invalid value: 65536: spec.nodePortRange.start in body should be less than or equal to 65535`),
		spec(`{nodePortAddresses: []}`, `spec.nodePortAddresses: Invalid value: 0: spec.nodePortAddresses in body should have at least 1 items`),
		spec(many("nodePortAddresses", 17, "10.%d.0.0/16"), `spec.nodePortAddresses: Too many: 17: must have at most 16 items`),
		spec(`{nodePortAddresses: [All, All]}`, `spec.nodePortAddresses[1]: Duplicate value: "All"`),
		spec(`{nodePortAddresses: [eth, primary, 192.168.0.1, 192.168.0.1/24]}`,
			`spec.nodePortAddresses[0]: Invalid value: "eth": `+nodePortAddress,
			`spec.nodePortAddresses[1]: Invalid value: "primary": `+nodePortAddress,
			`spec.nodePortAddresses[2]: Invalid value: "192.168.0.1": `+nodePortAddress,
			`spec.nodePortAddresses[3]: Invalid value: "192.168.0.1/24": `+nodePortAddress),
		spec(`{nodePortAddresses: [lo, `+strings.Repeat("y", 44)+`]}`,
			`spec.nodePortAddresses[0]: Invalid value: "lo": spec.nodePortAddresses[0] in body should be at least 3 chars long`,
			`spec.nodePortAddresses[1]: Too long: may not be more than 43 bytes`),

		// Words.
		spec(`{proxyMode: XDP, scheduler: Fair, enforcement: Never, kubeProxy: Fight}`,
			`spec.enforcement: Unsupported value: "Never": supported values: "BestEffort", "Strict"`,
			`spec.kubeProxy: Unsupported value: "Fight": supported values: "Coexist", "TakeOver"`,
			`spec.proxyMode: Unsupported value: "XDP": supported values: "NFTables", "IPTables", "IPVS", "Userspace", "EBPF"`,
			`spec.scheduler: Unsupported value: "Fair": supported values: "Random", "RoundRobin", "LeastConnection", "SourceHash", "Maglev"`),

		// Durations.
		spec(`{reuse: {quarantine: 24h1ms, stickyFor: 720.5h}}`,
			`spec.reuse.quarantine: Invalid value: "24h1ms": must be between 0s and 24h`,
			`spec.reuse.stickyFor: Invalid value: "720.5h": must be between 0s and 720h`),
		spec(`{reuse: {quarantine: 1 day, stickyFor: -1s}}`,
			`spec.reuse.quarantine: Invalid value: "1 day": `+aDuration,
			`spec.reuse.stickyFor: Invalid value: "-1s": `+aDuration),
		spec(`{reuse: {quarantine: 1000000h, stickyFor: ""}}`, // the first would overflow a Go duration
			`spec.reuse.quarantine: Invalid value: "1000000h": `+aDuration,
			`spec.reuse.stickyFor: Invalid value: "": `+aDuration),
		spec(`{reuse: {quarantine: 0.0000000000000000000s, stickyFor: 0.0000000000000000000s}}`,
			`spec.reuse.quarantine: Too long: may not be more than 20 bytes`,
			`spec.reuse.stickyFor: Too long: may not be more than 20 bytes`),
	}
	for _, r := range [][2]string{
		{"10.99.0.0", notCIDR},
		{"10.99.0.0/33", notCIDR},
		{"10.099.0.0/16", notCIDR},
		{"::ffff:10.99.0.0/112", notCIDR},
		{"10.99.13.0/16", "must be in canonical form: 10.99.0.0/16"},
		{"FD00:99::/112", "must be in canonical form: fd00:99::/112"},
		{"fd00:99:0:0:0::/112", "must be in canonical form: fd00:99::/112"},
		{"10.0.0.0/7", prefixLength},
		{"10.99.0.0/31", prefixLength},
		{"fd00::/63", prefixLength},
		{"fd00::/127", prefixLength},
		{"0.0.0.0/8", unicast},
		{"127.1.0.0/16", unicast},
		{"169.254.0.0/16", unicast},
		{"224.0.0.0/24", unicast},
		{"255.255.255.0/24", unicast},
		{"::/64", unicast},
		{"fe80::/64", unicast},
		{"ff05::/64", unicast},
	} {
		out = append(out, ranges(fmt.Sprintf("[{cidr: %q}]", r[0]), fmt.Sprintf("spec.serviceRanges[0].cidr: Invalid value: %q: %s", r[0], r[1])))
	}
	for _, r := range [][3]string{
		{"NFTables", "RoundRobin", "only Random and SourceHash; scheduler RoundRobin needs proxyMode IPVS or Userspace"},
		{"NFTables", "LeastConnection", "only Random and SourceHash; scheduler LeastConnection needs proxyMode IPVS or Userspace"},
		{"NFTables", "Maglev", "only Random and SourceHash; scheduler Maglev needs proxyMode IPVS or EBPF"},
		{"IPTables", "RoundRobin", "only Random; scheduler RoundRobin needs proxyMode IPVS or Userspace"},
		{"IPTables", "LeastConnection", "only Random; scheduler LeastConnection needs proxyMode IPVS or Userspace"},
		{"IPTables", "SourceHash", "only Random; scheduler SourceHash needs proxyMode NFTables, IPVS, Userspace or EBPF"},
		{"IPTables", "Maglev", "only Random; scheduler Maglev needs proxyMode IPVS or EBPF"},
		{"IPVS", "Random", "only RoundRobin, LeastConnection, SourceHash and Maglev; scheduler Random needs proxyMode NFTables, IPTables, Userspace or EBPF"},
		{"Userspace", "Maglev", "only Random, RoundRobin, LeastConnection and SourceHash; scheduler Maglev needs proxyMode IPVS or EBPF"},
		{"EBPF", "RoundRobin", "only Random, SourceHash and Maglev; scheduler RoundRobin needs proxyMode IPVS or Userspace"},
		{"EBPF", "LeastConnection", "only Random, SourceHash and Maglev; scheduler LeastConnection needs proxyMode IPVS or Userspace"},
	} {
		out = append(out, spec(fmt.Sprintf("{proxyMode: %s, scheduler: %s}", r[0], r[1]),
			fmt.Sprintf("spec.scheduler: Invalid value: proxyMode %s does not do scheduler %s, %s", r[0], r[1], r[2])))
	}
	for _, r := range []string{
		"{key: tier, operator: In}",
		"{key: tier, operator: NotIn, values: []}",
		"{key: tier, operator: Exists, values: [gold]}",
		"{key: tier, operator: DoesNotExist, values: [gold]}",
		"{key: tier, operator: Equals, values: [gold]}",
	} {
		for _, name := range []string{"namespaceSelector", "serviceSelector", "nodeSelector"} {
			out = append(out, spec("{"+name+": {matchExpressions: ["+r+"]}}", "spec."+name+".matchExpressions: Invalid value: "+selector))
		}
	}

	status := func(status string, causes ...string) rejection {
		return rejection{kind: kind, was: "{}", object: "status: " + status, causes: causes}
	}
	return append(out,
		status(`{families: [{}], serviceRanges: [{}], nodePorts: {}, services: {}, nodes: {}}`,
			`status.families[0].allocated: Required value`,
			`status.families[0].family: Required value`,
			`status.families[0].free: Required value`,
			`status.families[0].quarantined: Required value`,
			`status.families[0].total: Required value`,
			`status.nodePorts.allocated: Required value`,
			`status.nodePorts.free: Required value`,
			`status.nodePorts.quarantined: Required value`,
			`status.nodePorts.total: Required value`,
			`status.nodes.ready: Required value`,
			`status.nodes.selected: Required value`,
			`status.nodes.unsupported: Required value`,
			`status.serviceRanges[0].allocated: Required value`,
			`status.serviceRanges[0].cidr: Required value`,
			`status.serviceRanges[0].foreign: Required value`,
			`status.serviceRanges[0].free: Required value`,
			`status.serviceRanges[0].quarantined: Required value`,
			`status.serviceRanges[0].ready: Required value`,
			`status.serviceRanges[0].total: Required value`,
			`status.services.assigned: Required value`,
			`status.services.covered: Required value`,
			`status.services.programmed: Required value`,
			`status.services.waiting: Required value`),
		status(`{families: [`+counts("family: IPX")+`]}`, `status.families[0].family: Unsupported value: "IPX": supported values: "IPv4", "IPv6"`),
		status(`{families: [`+counts("family: IPv4")+`, `+counts("family: IPv4")+`]}`, `status.families[1]: Duplicate value: {"family":"IPv4"}`),
		status(`{families: [`+counts("family: IPv4")+`, `+counts("family: IPv6")+`, `+counts("family: IPv6")+`]}`, `status.families: Too many: 3: must have at most 2 items`, `status.families[2]: Duplicate value: {"family":"IPv6"}`),
		status(`{serviceRanges: [`+counts("cidr: a, ready: true, foreign: 0")+`, `+counts("cidr: a, ready: true, foreign: 0")+`]}`, `status.serviceRanges[1]: Duplicate value: {"cidr":"a"}`),
		status(`{serviceRanges: [`+counts("cidr: "+strings.Repeat("f", 44)+", ready: true, foreign: 0, serviceCIDR: "+strings.Repeat("f", 254))+`]}`,
			`status.serviceRanges[0].cidr: Too long: may not be more than 43 bytes`,
			`status.serviceRanges[0].serviceCIDR: Too long: may not be more than 253 bytes`),
		status(many("serviceRanges", 65, strings.ReplaceAll(counts("cidr: 10.PERCENT.0.0/16, ready: true, foreign: 0"), "PERCENT", "%d")), `status.serviceRanges: Too many: 65: must have at most 64 items`),
		status(many("conditions", 17, condition("C%d")), `status.conditions: Too many: 17: must have at most 16 items`),
		status(`{conditions: [`+condition("Ready")+`, `+condition("Ready")+`]}`, `status.conditions[1]: Duplicate value: {"type":"Ready"}`),
	)
}

func assignmentRejections() []rejection {
	const kind = "ServiceAssignment"
	spec := func(spec string, causes ...string) rejection {
		return rejection{kind: kind, object: "spec: " + spec, causes: causes}
	}
	status := func(status string, causes ...string) rejection {
		return rejection{kind: kind, was: "{}", object: "status: " + status, causes: causes}
	}
	const (
		canonical = "must be an IP address in canonical form"
		selector  = `each entry must have operator In or NotIn with values, or Exists or DoesNotExist without`
	)
	return []rejection{
		{kind: kind, object: "spec: null", causes: []string{`spec: Required value`}},
		spec(`{policyName: null, serviceUID: null, proxyMode: null, scheduler: null}`,
			`spec.policyName: Required value`, `spec.proxyMode: Required value`, `spec.scheduler: Required value`, `spec.serviceUID: Required value`),
		spec(`{policyName: "", serviceUID: ""}`,
			`spec.policyName: Invalid value: "": spec.policyName in body should be at least 1 chars long`,
			`spec.serviceUID: Invalid value: "": spec.serviceUID in body should be at least 1 chars long`),
		spec(`{policyName: `+strings.Repeat("x", 64)+`, serviceUID: `+strings.Repeat("x", 65)+`, trafficDistribution: `+strings.Repeat("x", 64)+`}`,
			`spec.policyName: Too long: may not be more than 63 bytes`,
			`spec.serviceUID: Too long: may not be more than 64 bytes`,
			`spec.trafficDistribution: Too long: may not be more than 63 bytes`),
		spec(`{proxyMode: XDP, scheduler: Fair, internalTrafficPolicy: Zone, externalTrafficPolicy: Zone}`,
			`spec.externalTrafficPolicy: Unsupported value: "Zone": supported values: "Cluster", "Local"`,
			`spec.internalTrafficPolicy: Unsupported value: "Zone": supported values: "Cluster", "Local"`,
			`spec.proxyMode: Unsupported value: "XDP": supported values: "NFTables", "IPTables", "IPVS", "Userspace", "EBPF"`,
			`spec.scheduler: Unsupported value: "Fair": supported values: "Random", "RoundRobin", "LeastConnection", "SourceHash", "Maglev"`),
		spec(`{sessionAffinitySeconds: -1, healthCheckNodePort: 0}`,
			`spec.healthCheckNodePort: Invalid value: 0: spec.healthCheckNodePort in body should be greater than or equal to 1`,
			`spec.sessionAffinitySeconds: Invalid value: -1: spec.sessionAffinitySeconds in body should be greater than or equal to 0`),
		spec(`{sessionAffinitySeconds: 86401, healthCheckNodePort: 65536}`,
			`spec.healthCheckNodePort: Invalid value: 65536: spec.healthCheckNodePort in body should be less than or equal to 65535`,
			`spec.sessionAffinitySeconds: Invalid value: 86401: spec.sessionAffinitySeconds in body should be less than or equal to 86400`),
		spec(`{nodeSelector: {matchExpressions: [{key: tier, operator: In}]}}`, `spec.nodeSelector.matchExpressions: Invalid value: `+selector),

		// Addresses.
		spec(`{serviceIPs: [{}]}`, `spec.serviceIPs[0].ip: Required value`, `spec.serviceIPs[0].source: Required value`),
		spec(`{serviceIPs: [{ip: x, source: Air}, {ip: `+strings.Repeat("f", 40)+`, source: ClusterIP}]}`,
			`spec.serviceIPs[0].ip: Invalid value: "x": spec.serviceIPs[0].ip in body should be at least 2 chars long`,
			`spec.serviceIPs[0].source: Unsupported value: "Air": supported values: "ClusterIP", "Additional"`,
			`spec.serviceIPs[1].ip: Too long: may not be more than 39 bytes`),
		spec(`{serviceIPs: [{ip: "FD00:99::1", source: ClusterIP}, {ip: 10.99.0.256, source: ClusterIP}]}`,
			`spec.serviceIPs[0].ip: Invalid value: "FD00:99::1": `+canonical,
			`spec.serviceIPs[1].ip: Invalid value: "10.99.0.256": `+canonical),
		spec(`{serviceIPs: [{ip: 10.99.0.1, source: ClusterIP}, {ip: 10.99.0.1, source: Additional}]}`, `spec.serviceIPs[1]: Duplicate value: {"ip":"10.99.0.1"}`),
		spec(many("serviceIPs", 9, "{ip: 10.99.0.%d, source: Additional}"), `spec.serviceIPs: Too many: 9: must have at most 8 items`),
		spec(`{externalIPs: ["fd00::0:1"], loadBalancerIPs: [192.0.2.1/32]}`,
			`spec.externalIPs[0]: Invalid value: "fd00::0:1": `+canonical,
			`spec.loadBalancerIPs[0]: Invalid value: "192.0.2.1/32": `+canonical),
		spec(`{externalIPs: [192.0.2.1, 192.0.2.1], loadBalancerIPs: [192.0.2.1, 192.0.2.1]}`,
			`spec.externalIPs[1]: Duplicate value: "192.0.2.1"`,
			`spec.loadBalancerIPs[1]: Duplicate value: "192.0.2.1"`),
		spec(`{externalIPs: [`+strings.Repeat("f", 40)+`], loadBalancerIPs: [`+strings.Repeat("f", 40)+`]}`,
			`spec.externalIPs[0]: Too long: may not be more than 39 bytes`,
			`spec.loadBalancerIPs[0]: Too long: may not be more than 39 bytes`),
		spec(`{`+list("externalIPs", 257, `"fd00::1:%d"`)+`, `+list("loadBalancerIPs", 257, `"fd00::1:%d"`)+`}`,
			`spec.externalIPs: Too many: 257: must have at most 256 items`,
			`spec.loadBalancerIPs: Too many: 257: must have at most 256 items`),
		spec(`{loadBalancerSourceRanges: [192.0.2.1]}`, `spec.loadBalancerSourceRanges[0]: Invalid value: "192.0.2.1": must be a CIDR such as 192.0.2.0/24`),
		spec(`{loadBalancerSourceRanges: [192.0.2.0/24, 192.0.2.0/24, `+strings.Repeat("f", 44)+`]}`,
			`spec.loadBalancerSourceRanges[1]: Duplicate value: "192.0.2.0/24"`,
			`spec.loadBalancerSourceRanges[2]: Too long: may not be more than 43 bytes`),
		spec(many("loadBalancerSourceRanges", 1025, `"fd00:0:0:%d::/64"`), `spec.loadBalancerSourceRanges: Too many: 1025: must have at most 1024 items`),
		spec(`{nodePortAddresses: [primary]}`, `spec.nodePortAddresses[0]: Invalid value: "primary": must be Primary, Localhost, All or a CIDR in canonical form, such as 192.168.0.0/24`),
		spec(`{nodePortAddresses: [Primary, Primary, `+strings.Repeat("f", 44)+`]}`,
			`spec.nodePortAddresses[1]: Duplicate value: "Primary"`,
			`spec.nodePortAddresses[2]: Too long: may not be more than 43 bytes`),
		spec(many("nodePortAddresses", 17, "10.%d.0.0/16"), `spec.nodePortAddresses: Too many: 17: must have at most 16 items`),

		// Ports.
		spec(`{ports: [{}]}`, `spec.ports[0].port: Required value`, `spec.ports[0].protocol: Required value`),
		spec(`{ports: [{name: `+strings.Repeat("x", 64)+`, protocol: ICMP, port: 0, nodePort: 0}, {protocol: TCP, port: 65536, nodePort: 65536}]}`,
			`spec.ports[0].name: Too long: may not be more than 63 bytes`,
			`spec.ports[0].nodePort: Invalid value: 0: spec.ports[0].nodePort in body should be greater than or equal to 1`,
			`spec.ports[0].port: Invalid value: 0: spec.ports[0].port in body should be greater than or equal to 1`,
			`spec.ports[0].protocol: Unsupported value: "ICMP": supported values: "TCP", "UDP", "SCTP"`,
			`spec.ports[1].nodePort: Invalid value: 65536: spec.ports[1].nodePort in body should be less than or equal to 65535`,
			`spec.ports[1].port: Invalid value: 65536: spec.ports[1].port in body should be less than or equal to 65535`),
		spec(`{ports: [{name: a, protocol: TCP, port: 80}, {name: b, protocol: TCP, port: 80}]}`, `spec.ports[1]: Duplicate value: {"port":80,"protocol":"TCP"}`),
		spec(many("ports", 1025, "{name: p%d, protocol: TCP, port: %[1]d}"), `spec.ports: Too many: 1025: must have at most 1024 items`),

		status(`{nodes: {}}`, `status.nodes.desired: Required value`, `status.nodes.programmed: Required value`),
		status(many("conditions", 9, condition("C%d")), `status.conditions: Too many: 9: must have at most 8 items`),
		status(`{conditions: [`+condition("Allocated")+`, `+condition("Allocated")+`]}`, `status.conditions[1]: Duplicate value: {"type":"Allocated"}`),
	}
}

func claimRejections() []rejection {
	const kind = "AllocationClaim"
	spec := func(spec string, causes ...string) rejection {
		return rejection{kind: kind, object: "spec: " + spec, causes: causes}
	}
	named := func(name, spec string, causes ...string) rejection {
		return rejection{kind: kind, object: "{metadata: {name: " + name + "}, spec: " + spec + "}", causes: causes}
	}
	change := func(was, is string, causes ...string) rejection {
		return rejection{kind: kind, was: "spec: " + was, object: "spec: " + is, causes: causes}
	}
	const (
		inFull = "the address that the claim locks, in full with dashes for colons, such as fd00-0099-0000-0000-0000-0000-0000-0001"
		lock   = `must not change while the claim of an AdditionalIP or LoadBalancerIP is Bound, because the claim is the address's lock: it is Released first`
		either = `spec: Invalid value: exactly one of address and nodePort must be set`
	)
	return []rejection{
		{kind: kind, object: "spec: null", causes: []string{`spec: Required value`}},
		spec(`{use: null, policyName: null, holder: null, state: null}`,
			`spec.holder: Required value`, `spec.policyName: Required value`, `spec.state: Required value`, `spec.use: Required value`),
		spec(`{use: Fun, policyName: "", holder: {namespace: ""}, state: Lost}`,
			`spec.holder.namespace: Invalid value: "": spec.holder.namespace in body should be at least 1 chars long`,
			`spec.policyName: Invalid value: "": spec.policyName in body should be at least 1 chars long`,
			`spec.state: Unsupported value: "Lost": supported values: "Reserved", "Bound", "Released"`,
			`spec.use: Unsupported value: "Fun": supported values: "ClusterIP", "AdditionalIP", "LoadBalancerIP", "NodePort", "HealthCheckNodePort"`),
		spec(`{policyName: `+strings.Repeat("x", 64)+`, reservationToken: `+strings.Repeat("x", 65)+`, holder: {namespace: `+strings.Repeat("x", 64)+`, name: `+strings.Repeat("x", 254)+`, uid: `+strings.Repeat("x", 65)+`}}`,
			`spec.holder.name: Too long: may not be more than 253 bytes`,
			`spec.holder.namespace: Too long: may not be more than 63 bytes`,
			`spec.holder.uid: Too long: may not be more than 64 bytes`,
			`spec.policyName: Too long: may not be more than 63 bytes`,
			`spec.reservationToken: Too long: may not be more than 64 bytes`),
		spec(`{holder: {namespace: null}}`, `spec.holder.namespace: Required value`),

		// What is claimed.
		spec(`{address: null}`, either),
		named("nodeport-30080", `{nodePort: 30080}`, either),
		spec(`{address: x}`, `spec.address: Invalid value: "x": must be an IP address such as 10.99.13.178 or fd00:99::1`, `spec.address: Invalid value: "x": spec.address in body should be at least 2 chars long`),
		spec(`{address: `+strings.Repeat("f", 40)+`}`, `spec.address: Too long: may not be more than 39 bytes`),
		named("nodeport-0", `{address: null, nodePort: 0, use: NodePort}`, `Invalid value: metadata.name must be nodeport-0, the node port that the claim locks`, `spec.nodePort: Invalid value: 0: spec.nodePort in body should be greater than or equal to 1`),
		named("nodeport-65536", `{address: null, nodePort: 65536, use: NodePort}`, `spec.nodePort: Invalid value: 65536: spec.nodePort in body should be less than or equal to 65535`),
		spec(`{address: 10.99.13.300}`, `spec.address: Invalid value: "10.99.13.300": must be an IP address such as 10.99.13.178 or fd00:99::1`),
		named("fd00-0099-0000-0000-0000-0000-0000-0001", `{address: "FD00:99::1"}`, `spec.address: Invalid value: "FD00:99::1": must be in canonical form: fd00:99::1`),
		spec(`{use: NodePort}`, `spec.use: Invalid value: must be ClusterIP, AdditionalIP or LoadBalancerIP for an address`),
		named("nodeport-30080", `{address: null, nodePort: 30080}`, `spec.use: Invalid value: must be NodePort or HealthCheckNodePort for a node port`),

		// The name is the lock.
		named("10.99.13.179", `{}`, `Invalid value: metadata.name must be 10.99.13.178, the address that the claim locks`),
		named("nodeport-80", `{}`, `Invalid value: metadata.name must be 10.99.13.178, the address that the claim locks`),
		named("nodeport-30081", `{address: null, nodePort: 30080, use: NodePort}`, `Invalid value: metadata.name must be nodeport-30080, the node port that the claim locks`),
		named("nodeport-030080", `{address: null, nodePort: 30080, use: NodePort}`, `Invalid value: metadata.name must be nodeport-30080, the node port that the claim locks`),
		named("web", `{address: null, nodePort: 30080, use: NodePort}`, `Invalid value: metadata.name must be nodeport-30080, the node port that the claim locks`),
		named("fd00-99--1", `{address: "fd00:99::1"}`, `Invalid value: metadata.name must be fd00:99::1, `+inFull),
		named("fd00-0099-0000-0000-0000-0000-0000-0002", `{address: "fd00:99::1"}`, `Invalid value: metadata.name must be fd00:99::1, `+inFull),
		named("fd00.0099.0000.0000.0000.0000.0000.0001", `{address: "fd00:99::1"}`, `Invalid value: metadata.name must be fd00:99::1, `+inFull),
		change(`{}`, `{address: 10.99.13.179}`,
			`Invalid value: metadata.name must be 10.99.13.179, the address that the claim locks`,
			`spec.address: Invalid value: is immutable: the claim's name locks it`),
		change(`{}`, `{address: null, nodePort: 30080, use: NodePort}`,
			`Invalid value: metadata.name must be nodeport-30080, the node port that the claim locks`,
			`spec.address: Invalid value: is immutable: the claim's name locks it`,
			`spec.nodePort: Invalid value: is immutable: the claim's name locks it`),

		// Who holds it.
		spec(`{holder: {uid: null}}`, `spec.holder: Invalid value: must have name and uid when state is Bound`),
		spec(`{holder: {name: null}}`, `spec.holder: Invalid value: must have name and uid when state is Bound`),
		spec(`{state: Released}`, `spec.expiresAt: Invalid value: must be set when state is Released, and only then`),
		spec(`{expiresAt: "2026-01-01T00:00:00Z"}`, `spec.expiresAt: Invalid value: must be set when state is Released, and only then`),
		change(`{state: Bound}`, `{state: Reserved}`, `spec.state: Invalid value: must not go from Bound back to Reserved: a Bound claim is Released first`),
		change(`{use: AdditionalIP}`, `{holder: {uid: another}}`, `spec.holder: Invalid value: `+lock),
		change(`{use: LoadBalancerIP}`, `{use: ClusterIP, holder: {uid: another}}`, `spec.holder: Invalid value: `+lock),
	}
}

func nodeStateRejections() []rejection {
	const kind = "NodeProxyState"
	spec := func(spec string, causes ...string) rejection {
		return rejection{kind: kind, object: "spec: " + spec, causes: causes}
	}
	status := func(status string, causes ...string) rejection {
		return rejection{kind: kind, was: "{}", object: "status: " + status, causes: causes}
	}
	return []rejection{
		spec(`{reportInterval: 99ms}`, `spec.reportInterval: Invalid value: "99ms": must be between 100ms and 5m`),
		spec(`{reportInterval: 5m0.1s}`, `spec.reportInterval: Invalid value: "5m0.1s": must be between 100ms and 5m`),
		spec(`{reportInterval: often}`, `spec.reportInterval: Invalid value: "often": must be a duration such as 200ms, 1s or 1m`),
		spec(`{reportInterval: 0.1000000000000000000s}`, `spec.reportInterval: Too long: may not be more than 20 bytes`),

		spec(`{serviceRanges: [ab]}`, `spec.serviceRanges[0]: Invalid value: "ab": spec.serviceRanges[0] in body should be at least 3 chars long`),
		spec(`{serviceRanges: [`+strings.Repeat("f", 44)+`]}`, `spec.serviceRanges[0]: Too long: may not be more than 43 bytes`),
		spec(`{serviceRanges: [10.99.0.0/16, 10.99.0.0/16]}`, `spec.serviceRanges[1]: Duplicate value: "10.99.0.0/16"`),
		spec(many("serviceRanges", 4097, "%d.0.0.0/8"), `spec.serviceRanges: Too many: 4097: must have at most 4096 items`),

		status(`{kubeProxy: Userspace}`, `status.kubeProxy: Unsupported value: "Userspace": supported values: "Absent", "Stopped", "IPTables", "IPVS", "NFTables"`),
		status(`{localPorts: [{}]}`, `status.localPorts[0].end: Required value`, `status.localPorts[0].start: Required value`),
		status(`{localPorts: [{start: 0, end: 0}]}`,
			`status.localPorts[0].end: Invalid value: 0: localPorts[0].end in body should be greater than or equal to 1`,
			`status.localPorts[0].start: Invalid value: 0: localPorts[0].start in body should be greater than or equal to 1`),
		status(`{localPorts: [{start: 65536, end: 65537}]}`,
			`status.localPorts[0].end: Invalid value: 65537: localPorts[0].end in body should be less than or equal to 65535`,
			`status.localPorts[0].start: Invalid value: 65536: localPorts[0].start in body should be less than or equal to 65535`),
		status(`{localPorts: [{start: 2, end: 1}]}`, `status.localPorts[0]: Invalid value: start 2 must not be greater than end 1`),
		status(many("localPorts", 65, "{start: %d, end: 65535}"), `status.localPorts: Too many: 65: must have at most 64 items`),
		status(`{assignmentRevision: "`+strings.Repeat("1", 65)+`", endpointSliceRevision: "`+strings.Repeat("1", 65)+`", agentVersion: `+strings.Repeat("v", 129)+`, bootID: `+strings.Repeat("b", 65)+`}`,
			`status.agentVersion: Too long: may not be more than 128 bytes`,
			`status.assignmentRevision: Too long: may not be more than 64 bytes`,
			`status.bootID: Too long: may not be more than 64 bytes`,
			`status.endpointSliceRevision: Too long: may not be more than 64 bytes`),
		status(`{modes: [{}]}`, `status.modes[0].available: Required value`, `status.modes[0].mode: Required value`, `status.modes[0].services: Required value`),
		status(`{modes: [{mode: XDP, available: false, services: 0, message: `+strings.Repeat("x", 1025)+`}]}`,
			`status.modes[0].message: Too long: may not be more than 1024 bytes`,
			`status.modes[0].mode: Unsupported value: "XDP": supported values: "NFTables", "IPTables", "IPVS", "Userspace", "EBPF"`),
		status(`{modes: [{mode: IPVS, available: false, services: 0}, {mode: IPVS, available: true, services: 0}]}`, `status.modes[1]: Duplicate value: {"mode":"IPVS"}`),
		status(many("modes", 9, "{mode: IPVS, available: false, services: %d}"), `status.modes: Too many: 9: must have at most 8 items`, `status.modes[1]: Duplicate value: {"mode":"IPVS"}`),
		status(many("conditions", 9, condition("C%d")), `status.conditions: Too many: 9: must have at most 8 items`),
		status(`{conditions: [`+condition("Ready")+`, `+condition("Ready")+`]}`, `status.conditions[1]: Duplicate value: {"type":"Ready"}`),
	}
}

// list writes a field that is a list of n items; format takes the item's number.
func list(field string, n int, format string) string {
	items := make([]string, n)
	for i := range items {
		items[i] = fmt.Sprintf(format, i+1)
	}
	return field + ": [" + strings.Join(items, ", ") + "]"
}

func many(field string, n int, format string) string { return "{" + list(field, n, format) + "}" }

func counts(more string) string {
	return "{total: 1, allocated: 0, quarantined: 0, free: 1, " + more + "}"
}

func condition(name string) string {
	return "{type: " + name + `, status: "True", reason: R, message: "", lastTransitionTime: "2026-01-01T00:00:00Z"}`
}

var _ = Describe("the API server", func() {
	for _, r := range rejections {
		It(fmt.Sprintf("rejects %s", r), func(ctx context.Context) {
			Expect(rejected(ctx, r)).To(ConsistOf(r.causes))
		})
	}

	It("has been seen to enforce every rule of the schemas", func() {
		open := rules()
		for _, r := range rejections {
			for _, cause := range r.causes {
				path, message, _ := strings.Cut(cause, ": ")
				if path == "Invalid value" { // a rule on the whole object
					path, message = "", cause
				}
				path = "." + regexp.MustCompile(`\[[0-9]+\]`).ReplaceAllString(path, "[*]")
				open = slices.DeleteFunc(open, func(rule rule) bool {
					return rule.kind == r.kind && "."+strings.TrimPrefix(rule.path, ".") == path &&
						slices.ContainsFunc(rule.said, func(said *regexp.Regexp) bool { return said.MatchString(message) })
				})
			}
		}
		var names []string
		for _, rule := range open {
			names = append(names, rule.String())
		}
		Expect(names).To(BeEmpty(), "these rules have no entry in the table that breaks them")
	})
})

// String is the object as a user might write it, cut to a line.
func (r rejection) String() string {
	s := r.kind + " " + r.object
	if r.was != "" && r.was != "{}" {
		s += " after " + r.was
	}
	if len(s) > 160 {
		s = s[:160] + "..."
	}
	return s
}

// rejected submits the object and returns what the API server says against it, sorted, each as "field: message".
func rejected(ctx context.Context, r rejection) []string {
	GinkgoHelper()
	var err error
	if r.was == "" {
		err = c.Create(ctx, object(r.kind, r.object), client.DryRunAll, client.FieldValidation(metav1.FieldValidationStrict))
	} else {
		was := object(r.kind, r.was)
		Expect(c.Create(ctx, was)).To(Succeed())
		DeferCleanup(func(ctx context.Context) { Expect(c.Delete(ctx, was)).To(Succeed()) })
		is := object(r.kind, r.was, r.object)
		is.SetResourceVersion(was.GetResourceVersion())
		if _, status := is.Object["status"]; status {
			err = c.Status().Update(ctx, is)
		} else {
			err = c.Update(ctx, is, client.DryRunAll, client.FieldValidation(metav1.FieldValidationStrict))
		}
	}
	var status *apierrors.StatusError
	Expect(errors.As(err, &status)).To(BeTrue(), "not rejected by the API server: %v", err)
	Expect(status.ErrStatus.Reason).To(Equal(metav1.StatusReasonInvalid), status.Error())
	var said []string
	for _, cause := range status.ErrStatus.Details.Causes {
		switch {
		case strings.Contains(cause.Message, "some validation rules were not checked"):
		case cause.Field == "<nil>":
			said = append(said, cause.Message)
		default:
			said = append(said, cause.Field+": "+cause.Message)
		}
	}
	slices.Sort(said)
	return said
}

// object is the kind's valid object with the merge patches on top.
func object(kind string, patches ...string) *unstructured.Unstructured {
	GinkgoHelper()
	text, err := yaml.YAMLToJSON([]byte(valid[kind]))
	Expect(err).NotTo(HaveOccurred())
	for _, patch := range patches {
		patch, err := yaml.YAMLToJSON([]byte(patch))
		Expect(err).NotTo(HaveOccurred(), "%s", patch)
		text, err = jsonpatch.MergePatch(text, patch)
		Expect(err).NotTo(HaveOccurred())
	}
	out := &unstructured.Unstructured{}
	Expect(json.Unmarshal(text, &out.Object)).To(Succeed())
	out.SetAPIVersion(v1alpha1.GroupVersion.String())
	out.SetKind(kind)
	return out
}
