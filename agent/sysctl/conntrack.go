package sysctl

import "time"

// Conntrack is what the kernel's connection tracking should be able to hold and for how long. The names and the meaning of 0 are those of
// KubeProxyConntrackConfiguration; unlike kube-proxy's, no value here lowers what the kernel has.
type Conntrack struct {
	// MaxPerCore is how many connections are tracked per CPU of the node at least; 0 leaves the limit and ignores Min.
	MaxPerCore int32
	// Min is the limit's least value, whatever the number of CPUs.
	Min int32
	// TCPEstablishedTimeout is how long an idle TCP connection is kept; 0 leaves it.
	TCPEstablishedTimeout time.Duration
	// TCPCloseWaitTimeout is how long a connection that only the client has closed is kept; 0 leaves it.
	TCPCloseWaitTimeout time.Duration
	// TCPBeLiberal has packets outside of a connection's window not be taken for invalid.
	TCPBeLiberal bool
	// UDPTimeout and UDPStreamTimeout are how long an idle UDP flow is kept that was not answered, or was; 0 leaves them.
	UDPTimeout, UDPStreamTimeout time.Duration
}

// DefaultConntrack gives kube-proxy's defaults.
func DefaultConntrack() Conntrack {
	return Conntrack{
		MaxPerCore:            32 * 1024,
		Min:                   128 * 1024,
		TCPEstablishedTimeout: 24 * time.Hour,
		// A half-closed connection lasts for as long as the local program keeps its socket open. Forgotten after the kernel's minute, its last packets
		// would go out untranslated (kubernetes#32551).
		TCPCloseWaitTimeout: time.Hour,
	}
}

const (
	conntrackMax     = "net/netfilter/nf_conntrack_max"
	conntrackBuckets = "net/netfilter/nf_conntrack_buckets"
	tcpEstablished   = "net/netfilter/nf_conntrack_tcp_timeout_established"
	tcpCloseWait     = "net/netfilter/nf_conntrack_tcp_timeout_close_wait"
	tcpBeLiberal     = "net/netfilter/nf_conntrack_tcp_be_liberal"
	udp              = "net/netfilter/nf_conntrack_udp_timeout"
	udpStream        = "net/netfilter/nf_conntrack_udp_timeout_stream"

	// conntrackCap bounds the limit that follows from the number of CPUs: an entry takes about 300 bytes.
	conntrackCap = 1 << 20
	// perBucket is how many entries share a bucket of the hash table when it is full, as the kernel chooses it itself.
	perBucket = 4
)

// Parameters gives what a node with so many CPUs needs. The limit comes first: the table's size is of use only with it.
func (c Conntrack) Parameters(cpus int) []Parameter {
	var out []Parameter
	if limit := c.limit(cpus); limit > 0 {
		out = append(out, Parameter{conntrackMax, limit}, Parameter{conntrackBuckets, limit / perBucket})
	}
	for _, timeout := range []struct {
		name string
		is   time.Duration
	}{{tcpEstablished, c.TCPEstablishedTimeout}, {tcpCloseWait, c.TCPCloseWaitTimeout}, {udp, c.UDPTimeout}, {udpStream, c.UDPStreamTimeout}} {
		if seconds := int(timeout.is / time.Second); seconds > 0 {
			out = append(out, Parameter{timeout.name, seconds})
		}
	}
	if c.TCPBeLiberal {
		out = append(out, Parameter{tcpBeLiberal, 1})
	}
	return out
}

func (c Conntrack) limit(cpus int) int {
	if c.MaxPerCore <= 0 {
		return 0
	}
	scaled := int(c.MaxPerCore) * cpus
	if scaled > conntrackCap {
		return conntrackCap // as kube-proxy: the cap beats even a greater Min
	}
	return max(scaled, int(c.Min))
}
