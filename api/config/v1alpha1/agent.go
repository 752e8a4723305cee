package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// AgentKind is the kind of an AgentConfiguration.
const AgentKind = "AgentConfiguration"

// AgentConfiguration configures the agent of a node.
type AgentConfiguration struct {
	metav1.TypeMeta `json:",inline"`

	// hostnameOverride is the name of the Node that the agent runs on. Default: the environment variable NODE_NAME, which the DaemonSet sets.
	HostnameOverride string `json:"hostnameOverride"`

	// clientConnection says how to reach the API server.
	ClientConnection ClientConnection `json:"clientConnection"`

	// healthzBindAddress is where /healthz, /livez and /readyz are served: HOST:PORT, :PORT for all addresses of the node, or 0 for nowhere. Load balancers of
	// clouds ask nodes at port 10256. Default: :10256.
	HealthzBindAddress string `json:"healthzBindAddress"`

	// metricsBindAddress is where /metrics, /metrics/services, /proxyMode and /configz are served: HOST:PORT, :PORT for all addresses of the node, or 0 for nowhere.
	// Default: 127.0.0.1:10249.
	MetricsBindAddress string `json:"metricsBindAddress"`

	// enableProfiling serves Go's profiles below /debug/pprof/ at metricsBindAddress. Default: false.
	EnableProfiling bool `json:"enableProfiling" apply:"live"`

	// detectLocalMode is how the traffic of pods is told from other traffic. Other traffic is masqueraded on its way through a cluster IP; that of pods to an external address
	// of a Service with externalTrafficPolicy Local may go to endpoints on other nodes. ClusterCIDR: its source is in clusterCIDR. NodeCIDR: its source is in
	// the Node's spec.podCIDRs. BridgeInterface: it comes in by detectLocal.bridgeInterface. InterfaceNamePrefix: it comes in by an interface whose name begins with
	// detectLocal.interfaceNamePrefix. Default: ClusterCIDR.
	DetectLocalMode LocalMode `json:"detectLocalMode" apply:"live"`

	// detectLocal belongs to detectLocalMode.
	DetectLocal DetectLocal `json:"detectLocal"`

	// clusterCIDR lists the ranges of the cluster's pods, of either or both families, such as [10.244.0.0/16, fd00:244::/56]. It is used with detectLocalMode
	// ClusterCIDR only. Default: none, so that nothing is known to come from a pod or from outside.
	ClusterCIDR []string `json:"clusterCIDR" apply:"live"`

	// masqueradeAll gives every connection through a service IP an address of the node as its source. Some pod networks need it. Default: false.
	MasqueradeAll bool `json:"masqueradeAll" apply:"live"`

	// dropInvalid drops packets on their way through the node that connection tracking takes for part of no connection: the client of a service
	// would see them untranslated and end its connection. Default: true, unless conntrack.tcpBeLiberal is true.
	DropInvalid *bool `json:"dropInvalid" apply:"live"`

	// countTraffic counts packets, bytes and connections of every Service and serves them at metricsBindAddress, /metrics/services. Only proxy mode NFTables can; it costs
	// a few percent of the CPU time of forwarding. Default: false.
	CountTraffic bool `json:"countTraffic" apply:"live"`

	// conntrack is what connection tracking should be able to hold.
	Conntrack Conntrack `json:"conntrack"`

	// logging says what is logged.
	Logging Logging `json:"logging"`
}

// LocalMode says how the traffic of pods is told from other traffic.
type LocalMode string

// Local modes, those of kube-proxy.
const (
	LocalModeClusterCIDR         LocalMode = "ClusterCIDR"
	LocalModeNodeCIDR            LocalMode = "NodeCIDR"
	LocalModeBridgeInterface     LocalMode = "BridgeInterface"
	LocalModeInterfaceNamePrefix LocalMode = "InterfaceNamePrefix"
)

// DetectLocal belongs to LocalMode.
type DetectLocal struct {
	// bridgeInterface is the name of the bridge that pods are behind. Required with, and used only with, detectLocalMode BridgeInterface. Default: none.
	BridgeInterface string `json:"bridgeInterface" apply:"live"`
	// interfaceNamePrefix is what the names of pods' interfaces on the node begin with, such as veth or cali. Required with, and used only with, detectLocalMode
	// InterfaceNamePrefix. Default: none.
	InterfaceNamePrefix string `json:"interfaceNamePrefix" apply:"live"`
}

// Conntrack is what the node's connection tracking should be able to hold and for how long. Values of the kernel that are higher already stay.
type Conntrack struct {
	// maxPerCore is how many connections are tracked per CPU core, at least min and at most 1048576 in all; 0 leaves the kernel's limit as it is. Default: 32768.
	MaxPerCore *int32 `json:"maxPerCore" apply:"live"`
	// min is how many connections are tracked at least, however few cores there are. Default: 131072.
	Min *int32 `json:"min" apply:"live"`
	// tcpEstablishedTimeout is how long an idle TCP connection is kept, in full seconds; 0s leaves the kernel's value. Default: 24h.
	TCPEstablishedTimeout *Duration `json:"tcpEstablishedTimeout" apply:"live"`
	// tcpCloseWaitTimeout is how long a TCP connection is kept that only one side has closed, in full seconds; 0s leaves the kernel's value. Default: 1h.
	TCPCloseWaitTimeout *Duration `json:"tcpCloseWaitTimeout" apply:"live"`
	// tcpBeLiberal keeps packets outside of a TCP connection's window from being taken for invalid. Switching it off again leaves the kernel's value. Default: false.
	TCPBeLiberal bool `json:"tcpBeLiberal" apply:"live"`
	// udpTimeout is how long an idle UDP flow is kept that was never answered, in full seconds; 0s leaves the kernel's value. Default: 0s.
	UDPTimeout Duration `json:"udpTimeout" apply:"live"`
	// udpStreamTimeout is how long an idle UDP flow is kept that was answered, in full seconds; 0s leaves the kernel's value. Default: 0s.
	UDPStreamTimeout Duration `json:"udpStreamTimeout" apply:"live"`
}
