package v1alpha1

// ProxyMode is how a node's kernel (or the agent itself) forwards a Service.
// +kubebuilder:validation:Enum=NFTables;IPTables;IPVS;Userspace;EBPF
type ProxyMode string

const (
	ProxyModeNFTables  ProxyMode = "NFTables"
	ProxyModeIPTables  ProxyMode = "IPTables"
	ProxyModeIPVS      ProxyMode = "IPVS"
	ProxyModeUserspace ProxyMode = "Userspace"
	ProxyModeEBPF      ProxyMode = "EBPF"
)

// Scheduler is how an endpoint is chosen for a new connection.
// +kubebuilder:validation:Enum=Random;RoundRobin;LeastConnection;SourceHash;Maglev
type Scheduler string

const (
	// SchedulerRandom picks an endpoint uniformly at random.
	SchedulerRandom Scheduler = "Random"
	// SchedulerRoundRobin picks the endpoints in turn.
	SchedulerRoundRobin Scheduler = "RoundRobin"
	// SchedulerLeastConnection picks the endpoint with the fewest open connections from this node.
	SchedulerLeastConnection Scheduler = "LeastConnection"
	// SchedulerSourceHash picks by a hash of the client's address.
	SchedulerSourceHash Scheduler = "SourceHash"
	// SchedulerMaglev picks by a consistent hash, so that few clients move when endpoints change.
	SchedulerMaglev Scheduler = "Maglev"
)

// IPFamily is IPv4 or IPv6.
// +kubebuilder:validation:Enum=IPv4;IPv6
type IPFamily string

const (
	IPv4 IPFamily = "IPv4"
	IPv6 IPFamily = "IPv6"
)

// Values of nodePortAddresses besides CIDRs.
const (
	// NodePortAddressesPrimary serves node ports on the node's primary address of each family (its InternalIPs).
	NodePortAddressesPrimary = "Primary"
	// NodePortAddressesLocalhost serves node ports on the loopback addresses.
	NodePortAddressesLocalhost = "Localhost"
	// NodePortAddressesAll serves node ports on every address of the node but loopback.
	NodePortAddressesAll = "All"
)
