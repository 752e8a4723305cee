package parity

// Names of the reference columns.
const (
	upstreamIPTables = "kube-proxy iptables"
	upstreamNFTables = "kube-proxy nftables"
)

// reason says why proxies break rows. Each row that a proxy breaks has one, and each says nothing but what the run shows.
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
}
