package agent

import (
	"net/netip"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/nftables"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// Dataplanes is what the backends must know of the node besides what they forward.
type Dataplanes struct {
	// ClusterCIDRs are the ranges of the cluster's pods.
	ClusterCIDRs []netip.Prefix
}

// Modes is the table of backends: every proxy mode that this agent has. Nothing else in the agent knows which there are.
func Modes(d Dataplanes) []Mode {
	return []Mode{
		{
			Name:    v1alpha1.ProxyModeNFTables,
			Probe:   nftables.Probe,
			Cleanup: nftables.Cleanup,
			New: func() (backend.Backend, error) {
				return nftables.New(nftables.Config{ClusterCIDRs: d.ClusterCIDRs})
			},
		},
	}
}
