package controllers

import (
	"fmt"
	"slices"
	"strings"

	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// policyStatus says what is true of a policy. It is pure but for the transition times of conditions that change.
func policyStatus(policy *v1alpha1.ServiceProxyPolicy, v policyView, drained []drainedRange) v1alpha1.ServiceProxyPolicyStatus {
	out := v1alpha1.ServiceProxyPolicyStatus{ObservedGeneration: policy.Generation, Conditions: slices.Clone(policy.Status.Conditions), Nodes: v.nodes}
	out.Services = v1alpha1.PolicyServicesStatus{Covered: v.tally.covered, Assigned: v.tally.assigned, Programmed: v.tally.programmed, Waiting: v.tally.waiting,
		TakenOver: v.tally.takenOver, HandingBack: v.tally.handingBack}
	for _, family := range []v1alpha1.IPFamily{v1alpha1.IPv4, v1alpha1.IPv6} {
		if c, ok := v.families[family]; ok {
			out.Families = append(out.Families, v1alpha1.FamilyStatus{Family: family, AddressCounts: addressCounts(c)})
		}
	}
	if v.resolved != nil {
		for _, r := range v.resolved.Ranges {
			counts := v.ranges[r.Prefix]
			status := v1alpha1.ServiceRangeStatus{CIDR: r.Prefix.String(), Ready: r.Usable && !v.wholly(r.Prefix), Foreign: counts.Foreign, AddressCounts: addressCounts(counts)}
			if r.Use == v1alpha1.RangeUseClusterIP {
				status.ServiceCIDR = v.registered[r.Prefix]
			}
			out.ServiceRanges = append(out.ServiceRanges, status)
		}
		if p := v.ports; v.resolved.NodePorts.Size() > 0 {
			out.NodePorts = &v1alpha1.NodePortStatus{Total: int32(p.Total), Allocated: int32(p.Allocated + p.Foreign), Quarantined: int32(p.Quarantined), Free: int32(p.Free)}
		}
	}
	for _, d := range drained {
		if slices.ContainsFunc(out.ServiceRanges, func(s v1alpha1.ServiceRangeStatus) bool { return s.CIDR == d.prefix.String() }) {
			continue // a policy that is being deleted still declares it
		}
		out.ServiceRanges = append(out.ServiceRanges, v1alpha1.ServiceRangeStatus{CIDR: d.prefix.String(), ServiceCIDR: d.serviceCIDR,
			Foreign: int64(d.foreign), AddressCounts: v1alpha1.AddressCounts{Allocated: int64(d.claims)}})
	}
	if was := apimeta.FindStatusCondition(policy.Status.Conditions, v1alpha1.PolicyProgrammed); was != nil && was.ObservedGeneration == policy.Generation && was.Status == metav1.ConditionTrue {
		v.unsettled = false // it was settled once; a new leader has to look at all again, a Service that comes later shows by its assignment
	}
	for _, c := range v.conditions() {
		c.ObservedGeneration = policy.Generation
		apimeta.SetStatusCondition(&out.Conditions, c)
	}
	return out
}

func addressCounts(c allocator.Counts) v1alpha1.AddressCounts {
	return v1alpha1.AddressCounts{Total: c.Total, Allocated: c.Allocated + c.Foreign, Quarantined: c.Quarantined, Free: c.Free}
}

// Reasons of a policy's conditions besides those of an assignment.
const (
	reasonAccepted      = "Accepted"
	reasonInvalid       = "Invalid"
	reasonOverlapsNode  = "OverlapsNodeAddresses"
	reasonNoConflict    = "NoConflict"
	reasonOverlap       = "OverlapsOlderPolicy"
	reasonRegistered    = "Registered"
	reasonRegistering   = "Registering"
	reasonRefused       = "RegistrationRefused"
	reasonNotAccepted   = "NotAccepted"
	reasonNotServed     = "FamilyNotServed"
	reasonPortsOutside  = "NodePortRangeOutside"
	reasonAvailable     = "Available"
	reasonFull          = "RangeFull"
	reasonProgrammed    = "Programmed"
	reasonProgramming   = "Programming"
	reasonUnsupported   = "UnsupportedNodes"
	reasonNoNodes       = "NoNodes"
	reasonNoServices    = "NoServices"
	reasonReady         = "Ready"
	reasonDeletionWaits = "DeletionWaits"

	reasonTakenOver        = "TakenOver"
	reasonTakingOver       = "TakingOver"
	reasonNoKubeProxy      = "NoKubeProxy"
	reasonCoexist          = "Coexist"
	reasonNotEverywhere    = "WaitingForProgrammed"
	reasonNodesNotSelected = "NodesNotSelected"
	reasonAgentSilent      = "AgentSilent"
	reasonHandingBack      = "HandingBack"
	reasonHandedBack       = "HandedBack"
	reasonKubeProxyMissing = "KubeProxyMissing"
	reasonExclusive        = "Exclusive"
	reasonLocalPorts       = "OverlapsLocalPorts"
)

// conditions states each condition; Ready is the first of the others that is not as it should be. That nothing is left for a Service to come is not amiss as long as
// those that exist have all they are owed, nor is that a port may be taken some day.
func (v policyView) conditions() []metav1.Condition {
	all := []metav1.Condition{v.accepted(), v.conflicted(), v.rangesReady(), v.capacityAvailable(), v.programmed(), v.nodePortsExclusive()}
	ready := condition(v1alpha1.PolicyReady, true, reasonReady, "the policy is accepted, its ranges are ready and what it covers is programmed")
	for _, c := range all {
		if good := c.Type != v1alpha1.PolicyConflicted; (c.Status == metav1.ConditionTrue) != good && c.Reason != reasonFull && c.Reason != reasonLocalPorts {
			ready = condition(v1alpha1.PolicyReady, false, c.Reason, c.Message)
			break
		}
	}
	// A Service that both forward works, so that is not part of Ready.
	return append(all, v.takenOver(), ready)
}

func condition(kind string, status bool, reason, message string) metav1.Condition {
	c := metav1.Condition{Type: kind, Status: metav1.ConditionFalse, Reason: reason, Message: message}
	if status {
		c.Status = metav1.ConditionTrue
	}
	return c
}

func (v policyView) accepted() metav1.Condition {
	switch {
	case v.invalid != nil:
		return condition(v1alpha1.PolicyAccepted, false, reasonInvalid, v.invalid.Error())
	case v.clash != "":
		return condition(v1alpha1.PolicyAccepted, false, reasonOverlapsNode, v.clash+": no address of the policy is given out, because it would shadow pods or nodes")
	}
	return condition(v1alpha1.PolicyAccepted, true, reasonAccepted, "the policy makes sense in this cluster")
}

func (v policyView) conflicted() metav1.Condition {
	if len(v.conflicts) == 0 {
		return condition(v1alpha1.PolicyConflicted, false, reasonNoConflict, "no other policy has older rights to what this one declares")
	}
	var lines []string
	for _, c := range v.conflicts {
		lines = append(lines, c.String())
	}
	slices.Sort(lines)
	if len(lines) > maxNamed {
		lines = append(lines[:maxNamed:maxNamed], "...")
	}
	return condition(v1alpha1.PolicyConflicted, true, reasonOverlap, strings.Join(lines, "; ")+"; this policy gives out nothing of it")
}

func (v policyView) rangesReady() metav1.Condition {
	if v.resolved == nil || v.clash != "" {
		return condition(v1alpha1.PolicyRangesReady, false, reasonNotAccepted, "ranges are registered once the policy is accepted")
	}
	if v.refused != "" {
		return condition(v1alpha1.PolicyRangesReady, false, reasonRefused, "the API server refused to take a range as ServiceCIDR: "+v.refused)
	}
	var missing, unserved []string
	for _, r := range v.resolved.Ranges {
		switch {
		case !v.serves(r.Prefix):
			unserved = append(unserved, r.Prefix.String())
		case !r.Usable && !v.wholly(r.Prefix):
			missing = append(missing, r.Prefix.String())
		}
	}
	if len(unserved) > 0 {
		return condition(v1alpha1.PolicyRangesReady, false, reasonNotServed, fmt.Sprintf(
			"nothing of %s can be given out: this cluster's Services have addresses of %s only", strings.Join(unserved, ", "), v.served[0]))
	}
	if ports, can := v.resolved.NodePorts, v.resolved.NodePorts.Intersect(v.serverPorts); v.serverPorts.Size() > 0 && can != ports {
		return condition(v1alpha1.PolicyRangesReady, false, reasonPortsOutside, fmt.Sprintf(
			"nodePortRange is %s and the API server's range (--service-node-port-range) is %s, so only %d of its %d ports can be given out", ports, v.serverPorts, can.Size(), ports.Size()))
	}
	if len(missing) > 0 {
		return condition(v1alpha1.PolicyRangesReady, false, reasonRegistering, "waiting for the API servers to know "+strings.Join(missing, ", ")+" as ServiceCIDR")
	}
	return condition(v1alpha1.PolicyRangesReady, true, reasonRegistered, "the API server knows every ClusterIP range")
}

func (v policyView) capacityAvailable() metav1.Condition {
	full := v.full()
	switch {
	case v.tally.waiting == 0 && len(full) == 0:
		return condition(v1alpha1.PolicyCapacityAvailable, true, reasonAvailable, "no Service waits for an address or node port")
	case v.tally.waiting == 0:
		return condition(v1alpha1.PolicyCapacityAvailable, false, reasonFull, strings.Join(full, "; ")+"; no Service waits, and the next one would")
	case len(full) == 0:
		full = []string{"Services wait for addresses that were released just now, or whose range gives out nothing"}
	}
	return condition(v1alpha1.PolicyCapacityAvailable, false, reasonExhausted, strings.Join(full, "; ")+"; add a range to the policy or delete Services")
}

// full says of which kinds the policy declares something to be given out automatically and has nothing left.
func (v policyView) full() (out []string) {
	if v.resolved == nil {
		return nil
	}
	for _, use := range []v1alpha1.RangeUse{v1alpha1.RangeUseClusterIP, v1alpha1.RangeUseLoadBalancer} {
		for _, family := range []v1alpha1.IPFamily{v1alpha1.IPv4, v1alpha1.IPv6} {
			all := allocator.ExhaustedError{Policy: v.resolved.Name, Family: family, Use: use}
			free := false
			for _, r := range v.resolved.Ranges {
				if r.Use == use && allocator.FamilyOf(r.Prefix.Addr()) == family && r.Allocation == v1alpha1.RangeAllocationAutomatic {
					c := v.ranges[r.Prefix]
					all.Used, all.Total, free = all.Used+c.Total-c.Free, all.Total+c.Total, free || c.Free > 0
				}
			}
			if all.Total > 0 && !free {
				out = append(out, all.Error())
			}
		}
	}
	if p := v.ports; p.Total > 0 && p.Free == 0 {
		out = append(out, (&allocator.ExhaustedError{Policy: v.resolved.Name, Used: p.Total, Total: p.Total}).Error())
	}
	return out
}

func (v policyView) programmed() metav1.Condition {
	switch {
	case v.nodes.Unsupported > 0:
		return condition(v1alpha1.PolicyProgrammed, false, reasonUnsupported, "nodes that cannot do the policy's proxyMode: "+strings.Join(v.unsupported, "; "))
	case v.clusterSize > 0 && v.nodes.Selected == 0 && v.resolved != nil:
		return condition(v1alpha1.PolicyProgrammed, false, reasonNoNodes, fmt.Sprintf("nodeSelector matches none of the cluster's %d nodes, so nobody forwards the covered Services", v.clusterSize))
	case v.tally.programmed < v.tally.covered:
		return condition(v1alpha1.PolicyProgrammed, false, reasonProgramming, fmt.Sprintf(
			"%d of %d covered Services are programmed on every selected node that is Ready; kubectl get svca -A tells which", v.tally.programmed, v.tally.covered))
	case v.unsettled:
		return condition(v1alpha1.PolicyProgrammed, false, reasonProgramming, "not every Service that the policy may cover has been assigned since policies changed")
	case v.tally.covered == 0:
		return condition(v1alpha1.PolicyProgrammed, true, reasonNoServices, "the policy covers no Service")
	}
	return condition(v1alpha1.PolicyProgrammed, true, reasonProgrammed, "every covered Service is programmed on every selected node that is Ready")
}

// nodePortsExclusive warns of node ports that a node's kernel gives to outgoing connections as well: such a port may be taken when something has to listen at it, as
// for a health-check node port.
func (v policyView) nodePortsExclusive() metav1.Condition {
	switch n := len(v.localPorts); {
	case v.resolved == nil || v.resolved.NodePorts.Size() == 0:
		return condition(v1alpha1.PolicyNodePortsExclusive, true, reasonExclusive, "the policy declares no node ports")
	case n > 0:
		named := v.localPorts
		if n > maxNamed {
			named = append(named[:maxNamed:maxNamed], "...")
		}
		return condition(v1alpha1.PolicyNodePortsExclusive, false, reasonLocalPorts, fmt.Sprintf(
			"%d selected nodes give ports of nodePortRange %s to outgoing connections, too, so that one may be taken when it is needed: %s; set net.ipv4.ip_local_reserved_ports=%s "+
				"on these nodes (beside what is reserved there), or declare a range outside of theirs", n, v.resolved.NodePorts, strings.Join(named, ", "), v.resolved.NodePorts))
	}
	return condition(v1alpha1.PolicyNodePortsExclusive, true, reasonExclusive, "no selected node is known to give ports of nodePortRange to outgoing connections")
}

// takenOver says whether kube-proxy leaves all covered Services alone, and if not, why.
func (v policyView) takenOver() metav1.Condition {
	not := func(reason, message string, args ...any) metav1.Condition {
		return condition(v1alpha1.PolicyTakenOver, false, reason, fmt.Sprintf(message, args...))
	}
	t := v.tally
	covered := t.covered - t.handingBack - t.exempt
	both := max(covered-t.released, 0) // forwarded by kube-proxy as well
	early := min(both, max(t.covered-t.programmed, 0))
	unkept := t.takenOver
	if v.shared.keeps {
		unkept = 0
	}
	switch {
	case v.resolved == nil:
		return not(reasonNotAccepted, "nothing changes until the policy is accepted")
	case t.handingBack > 0, unkept > 0:
		return not(reasonHandingBack, "%d Services are kube-proxy's again and stay forwarded until it has had %s to forward them; %d are yet to be handed back", t.handingBack, v.grace, unkept)
	case v.terminating && t.takenOver > 0:
		return not(reasonKubeProxyMissing, "the %d Services that were taken over stay, because nodes without kube-proxy would forward them no more: %s; start kube-proxy there, or narrow the policy's selectors",
			t.takenOver, some(v.kubeProxy.without))
	case !v.resolved.TakesOver():
		return not(reasonCoexist, "kubeProxy: Coexist covers only Services that users labelled %s=%s, which kube-proxy ignores", v1alpha1.LabelServiceProxyName, v1alpha1.ServiceProxyName)
	case !v.kubeProxy.some:
		return condition(v1alpha1.PolicyTakenOver, true, reasonNoKubeProxy, "kube-proxy runs on no node, so there is nobody to take Services over from")
	case len(v.leftOut) > 0:
		return not(reasonNodesNotSelected, "kube-proxy goes on with the covered Services, because nodeSelector leaves nodes to it: %s; select all nodes, or set kubeProxy: Coexist and label Services", some(v.leftOut))
	case both > 0 && len(v.kubeProxy.silent) > 0:
		return not(reasonAgentSilent, "kube-proxy leaves %d of %d covered Services to us, and keeps the others while agents on Ready nodes do not report: %s", t.released, covered, some(v.kubeProxy.silent))
	case both > early:
		return not(reasonTakingOver, "kube-proxy leaves %d of %d covered Services to us", t.released, covered)
	case both > 0:
		return not(reasonNotEverywhere, "kube-proxy leaves %d of %d covered Services to us; the others are not forwarded by every Ready node yet: kubectl get svca -A tells which", t.released, covered)
	case v.unsettled: // who waits for a new policy to take over must not be told so before it covers anything
		return not(reasonNotEverywhere, "not every Service that the policy may cover has been assigned since policies changed")
	}
	but := ""
	if t.exempt > 0 {
		but = "; it goes on with " + kubernetesService + ", too, for nodes that boot"
	}
	return condition(v1alpha1.PolicyTakenOver, true, reasonTakenOver, fmt.Sprintf("kube-proxy leaves all %d covered Services to us%s", covered, but))
}

// some names the first few, and how many more there are.
func some(names []string) string {
	if more := len(names) - maxNamed; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:maxNamed], ", "), more)
	}
	return strings.Join(names, ", ")
}

// kubernetesService is the API server's own Service.
const kubernetesService = "default/kubernetes"

// setDeleting says in Ready what a deletion waits for, and what lets it end.
func setDeleting(status *v1alpha1.ServiceProxyPolicyStatus, policy *v1alpha1.ServiceProxyPolicy, claims, foreign int, v policyView) {
	services, others, back := "", "", ""
	if n := v.tally.handingBack; n > 0 {
		back = fmt.Sprintf(", %d of them on their way back to kube-proxy, which takes %s", n, v.grace)
	}
	if len(v.covers) > 0 {
		services = " (" + strings.Join(v.covers, ", ") + ")"
	}
	if foreign > 0 {
		others = " (kubectl get ipaddresses tells whose)"
	}
	end := "delete these Services, or narrow the policy's selectors so that they leave it"
	if slices.Contains(v.covers, kubernetesService) {
		end += ", which is the only way for " + kubernetesService + ": the API server makes it again"
	}
	c := condition(v1alpha1.PolicyReady, false, reasonDeletionWaits, fmt.Sprintf(
		"deletion waits: %d claims on addresses and node ports are left, %d covered Services%s%s, %d cluster IPs of other Services in its ranges%s; %s",
		claims, v.tally.covered, services, back, foreign, others, end))
	c.ObservedGeneration = policy.Generation
	apimeta.SetStatusCondition(&status.Conditions, c)
}
