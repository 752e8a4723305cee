package parity

// promise is something that a Service is owed, and the rows of the table that show whether it is kept.
type promise struct {
	name string
	rows []string
}

// promises hold every row of backendtest.Table once.
var promises = []promise{
	{"Service IPs, external and load-balancer IPs, node ports", []string{
		"a service IP is reached from pods, the node, other nodes' pods and outside",
		"external and load-balancer IPs and node ports are reached from everywhere",
		"an endpoint on the node's own network is reached",
		"two Services share the number of a node port between protocols",
		"a program that listens on the node never gets what is for a node port",
		"a program that listens on the node never gets what is for a service IP",
		"every port of a Service leads to its own target port",
		"an external IP that is the node's own address takes its ports and no others",
		"the node reaches an endpoint of its own through the Service",
		"a ping to a service IP is refused, and others are left alone",
		"datagrams larger than the links' MTU come through",
		"large transfers come through",
	}},
	{"Without endpoints: refused at once", []string{
		"without endpoints connections are refused at once",
		"an unused port of a service IP refuses",
	}},
	{"Which endpoints: readiness, termination, topology", []string{
		"endpoints that terminate serve when no other is ready",
		"hints for the node, then for its zone, choose endpoints if every endpoint has them",
		"an endpoint that is said to be ready is used, whatever else is said of it (publishNotReadyAddresses)",
		"each family follows a Local policy by its own endpoints",
	}},
	{"externalTrafficPolicy", []string{
		"external traffic policy Local keeps the client's address and uses local endpoints",
		"external traffic policy Local without a local endpoint drops",
	}},
	{"internalTrafficPolicy", []string{
		"internal traffic policy Local uses local endpoints, or drops",
	}},
	{"Masquerading", []string{
		"a pod reaches itself through its Service",
		"all traffic through service IPs is masqueraded if that is wanted",
		"connections that go directly to an endpoint keep their source port",
	}},
	{"Which traffic is of pods", []string{
		"pods are told by the interface they come by",
		"pods are told by the prefix of the interfaces they come by",
		"where pods cannot be told nobody counts as being outside",
	}},
	{"Declared ranges", []string{
		"what no Service has of a declared range is silent",
		"an address of the node itself in a declared range stays the node's",
		"what another proxy translates in a declared range stays the other's",
	}},
	{"Session affinity", []string{
		"session affinity pins a client, whichever address of the Service it uses",
		"session affinity pins clients to many endpoints, not to one",
		"ports of one Service pin a client apart from one another",
		"session affinity lasts for its timeout after the last connection",
		"session affinity survives unrelated changes and a restart of the proxy",
		"a client pinned to an endpoint that is removed moves, and stays where it moved",
		"session affinity pins clients to endpoints on the node's own network too",
		"session affinity keeps to what traffic policies allow",
		"sessions begin and end with session affinity of their Service",
	}},
	{"loadBalancerSourceRanges", []string{
		"source ranges guard load-balancer IPs and nothing else",
		"source ranges allow each family by itself, and everything by a range of everything",
		"source ranges that hold the node's own address let the node in, also by the load-balancer IP itself",
		"Services that share source ranges are guarded each by itself",
		"source ranges hold together with external traffic policy Local",
	}},
	{"Where node ports are served", []string{
		"node ports are served at the chosen addresses only",
		"node ports are served at the node's primary addresses and at no others",
		"node ports follow the addresses of the Node",
		"node ports at All are served at every address but loopback, also at one that comes later",
		"node ports at chosen CIDRs are served at the addresses in them, as they come",
	}},
	{"Node ports of localhost", []string{
		"node ports at Localhost are reached from the node itself, at 127.0.0.1 and ::1, and by nobody else",
		"node ports at Localhost refuse without endpoints, and follow the endpoints",
		"session affinity holds at localhost too",
		"what others listen at at loopback is not reached from outside",
	}},
	{"Stale UDP flows", []string{
		"UDP flows leave an endpoint that is removed; those of other endpoints stay",
		"UDP flows end when their last endpoint is removed",
		"UDP flows end when their Service is deleted",
		"UDP flows that begin before there is an endpoint find the first one",
		"UDP flows that begin before there is the Service find it",
		"UDP flows stay with an endpoint that terminates as long as it serves, and not longer",
		"UDP flows stay with an endpoint that serves when new traffic prefers others",
		"UDP flows to the same endpoint of other Services are left alone",
		"UDP flows that something else than a Service translates are left alone",
	}},
	{"Invalid packets", []string{
		"packets that are part of no connection do not end translated connections",
	}},
	{"Open connections", []string{
		"open connections outlive changes of other Services",
		"open connections outlive endpoints that come and go beside theirs",
		"open connections outlive edits of their Service",
		"open connections outlive a restart of the proxy",
		"open TCP connections outlive the removal of the last Service",
		"open TCP connections to an endpoint that terminates or is removed are left alone",
		"rules that something else takes away come back, and open connections outlive it",
	}},
	{"Balancing, and changes under load", []string{
		"connections spread evenly over the endpoints",
		"connections spread evenly, and none is refused or lost, while the number of endpoints crosses powers of two",
		"an endpoint that is removed gets no connection more, and none fails",
		"an endpoint that is removed gets no connection more, and none fails, with session affinity",
		"500 new connections a second go through a hundred changes of endpoints: none fails or is lost",
		"new connections go through restarts of the proxy: none fails or is lost",
		"what others do to their own rules 50 times a second disturbs nothing, and theirs stay as they made them",
	}},
}
