package agent

import (
	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/anchor"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/nftables"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// Modes is the table of backends: every proxy mode that this agent has. Nothing else in the agent knows which there are.
func Modes() []Mode {
	shared := &Anchor{Release: anchor.Release, Remove: anchor.Remove}
	return []Mode{
		{
			Name:    v1alpha1.ProxyModeNFTables,
			Probe:   nftables.Probe,
			Blank:   nftables.Blank,
			Cleanup: nftables.Cleanup,
			Anchor:  shared,
			New:     func() (backend.Backend, error) { return nftables.New() },
		},
	}
}
