package parity

// Names of the reference columns.
const (
	upstreamIPTables = "kube-proxy iptables"
	upstreamNFTables = "kube-proxy nftables"
)

// reason says why proxies break rows, or why rows do not apply to them. Each such cell of the page has one, and no other has.
type reason struct {
	proxies []string
	rows    []string
	why     string
}

var (
	iptablesOnly = []string{upstreamIPTables}
	nftablesOnly = []string{upstreamNFTables}
	bothModes    = []string{upstreamIPTables, upstreamNFTables}
)

var reasons = []reason{
	{iptablesOnly, []string{"without endpoints connections are refused at once"},
		"Connections of the node itself to an external or load-balancer IP are not refused but leave by the default route: the rules that refuse such addresses are in " +
			"the chains INPUT and FORWARD only."},
	{iptablesOnly, []string{"an unused port of a service IP refuses"},
		"There are rules for the ports of Services, and none for the other ports of their addresses: what is sent there leaves by the default route."},
	{bothModes, []string{"UDP flows end when their last endpoint is removed"},
		"Flows of a node port are not ended once no endpoint is left. kube-proxy recognizes them by the number of the port alone, and would otherwise end those of other hosts too."},
	{bothModes, []string{"UDP flows end when their Service is deleted", "UDP flows to the same endpoint of other Services are left alone"},
		"Flows are looked for by the Services that there are: those of one that was deleted go on for as long as the client sends. (The second row deletes a Service too.)"},
	{bothModes, []string{"UDP flows that something else than a Service translates are left alone"},
		"A flow belongs to a node port for kube-proxy if it goes to a port of that number, whatever the address."},
	{iptablesOnly, []string{"rules that something else takes away come back, and open connections outlive it"},
		"kube-proxy looks once in a sync period, 30 s by default, whether its chains are still there, and then writes all of them anew. The row waits for 5 s."},
	{nftablesOnly, []string{"rules that something else takes away come back, and open connections outlive it"},
		"Nothing looks whether the rules are still there. They come back with a change that fails because of it."},
	{bothModes, []string{"node ports at chosen CIDRs are served at the addresses in them, as they come"},
		"kube-proxy looks which addresses the node has when it writes its rules: one that comes later is served from the next change of a Service, or the next sync period, on."},
	{iptablesOnly, []string{"node ports at All are served at every address but loopback, also at one that comes later"},
		"All addresses include 127.0.0.1, unless `localhostNodePorts` is off; we serve loopback where it is asked for by name. An address that comes later is served at once " +
			"here, because no rule names it."},
	{nftablesOnly, []string{"node ports at Localhost are reached from the node itself, at 127.0.0.1 and ::1, and by nobody else",
		"node ports at Localhost refuse without endpoints, and follow the endpoints", "session affinity holds at localhost too"},
		"The nftables mode does not serve node ports at loopback addresses. (v1.37 has a listener for TCP behind a feature gate that is alpha and off.)"},
	{iptablesOnly, []string{"node ports at Localhost are reached from the node itself, at 127.0.0.1 and ::1, and by nobody else",
		"node ports at Localhost refuse without endpoints, and follow the endpoints", "session affinity holds at localhost too"},
		"Only 127.0.0.1 is served, not ::1: the kernel does not route that address away from the loopback interface. And packets that come to 127.0.0.1 from a neighbour " +
			"pass the rule that should stop them, because it excepts what was translated."},
	{bothModes, []string{"a program that listens on the node never gets what is for a service IP"},
		"Ports of a service IP that the Service does not have are not refused where the address is one of the node's own."},
	{bothModes, []string{"two Services share the number of a node port between protocols"},
		"The API server gives the number of a node port to one Service, whatever the protocol."},
	{iptablesOnly, []string{"a program that listens on the node never gets what is for a node port"},
		"Where externalTrafficPolicy Local leaves nothing to forward to, the number of the node port is dropped at every address of the node, also at those where node ports are not served."},
	{iptablesOnly, []string{"what no Service has of a declared range is silent"},
		"The iptables mode knows no ranges: what no Service has leaves by the default route."},
	{nftablesOnly, []string{"what no Service has of a declared range is silent"},
		"It is silent, and stays so: the last step of the row takes the declaration back, which Kubernetes cannot do for the range that its service IPs are of."},
	{nftablesOnly, []string{"an address of the node itself in a declared range stays the node's"},
		"Addresses of declared ranges that no Service has are dropped in the chains output and forward, whether or not they are the node's own."},
	{iptablesOnly, []string{"a ping to a service IP is refused, and others are left alone"},
		"There is no rule for ICMP: the ping leaves by the default route."},
	{nftablesOnly, []string{"packets that are part of no connection do not end translated connections"},
		"The nftables mode has no rule against packets that connection tracking finds invalid, with which the iptables mode prevents this."},
}
