package nftables

import (
	"testing"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/backendtest"
)

// TestConformance holds this backend to the table that every backend is held to.
func TestConformance(t *testing.T) {
	backendtest.Run(t, backendtest.Backend(func() (backend.Backend, error) { return New() }))
}
