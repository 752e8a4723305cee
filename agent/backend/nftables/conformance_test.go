package nftables

import (
	"testing"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/backendtest"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// TestConformance holds this backend to the table that every backend is held to.
func TestConformance(t *testing.T) {
	script := func(name, script string) backendtest.Breakage {
		return backendtest.Breakage{Name: name, Do: func(node *netns.NS) error {
			_, err := node.Run("nft", script)
			return err
		}}
	}
	backendtest.Run(t, backendtest.Backend(func() (backend.Backend, error) { return New() },
		script("an element is taken away", "delete element ip serviceproxy services { 10.99.0.1 . tcp . 80 }"),
		script("endpoints are taken away", "flush map ip serviceproxy services.0; flush map ip6 serviceproxy services.0"),
		script("a chain is emptied", "flush chain ip serviceproxy services"),
		script("a rule of somebody's is in front of ours", "insert rule ip6 serviceproxy services drop"),
		script("the table is taken away", "delete table ip serviceproxy; delete table ip6 serviceproxy"),
	))
}
