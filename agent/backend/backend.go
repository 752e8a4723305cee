// Package backend is the contract between the agent's run loop and the dataplanes below it.
package backend

import (
	"context"
	"errors"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// Backend programs one dataplane of this node. Its methods are called by one goroutine at a time.
//
// A backend owns what carries its name in the kernel (its table, its chains) and touches nothing else. Stopping the agent leaves
// the rules: a backend has no Stop, only Close.
type Backend interface {
	// Apply makes the kernel match next. prev is the state that the last successful Apply established, or nil. With prev nil the
	// backend trusts nothing but what it reads back, and changes only what differs. Apply is idempotent, adds before it
	// deletes, and costs in proportion to the difference of the two states (after nil: to the size of the kernel's state). On error the kernel holds prev, next
	// or something between, and the caller passes nil the next time.
	Apply(ctx context.Context, prev *forwarding.State, next forwarding.State) error

	// Verify reads the kernel back and tells where it differs from want. It never writes.
	Verify(ctx context.Context, want forwarding.State) ([]Drift, error)

	// Drifted is sent to when something else may have changed what the backend owns. The caller then verifies, and repairs with Apply(nil, next).
	// One pending signal stands for any number.
	Drifted() <-chan struct{}

	// Close lets go of sockets. The rules stay.
	Close() error
}

// ErrDraining says that the cleanup of a mode has removed all but what keeps connections open that the mode translated. Doing it again later removes that
// too, once they have ended.
var ErrDraining = errors.New("connections that were translated are still open")

// Drift is one difference between the kernel and what it should hold.
type Drift struct {
	// Object names what differs in the dataplane's own words, for example "map cluster-v4 element 10.99.0.1 . tcp . 80".
	Object string
	// Problem says how: "missing", "unexpected" or "differs: ...".
	Problem string
}

func (d Drift) String() string { return d.Object + ": " + d.Problem }

// TrafficCounter is a Backend that can count what it forwards.
type TrafficCounter interface {
	// Traffic gives what was forwarded for each service since the backend was made, in no particular order; nothing for services without any traffic, and nothing
	// unless the ground of the state that Apply established says CountTraffic. Unlike the other methods it may be called at any time, from any goroutine. What
	// is counted of a frontend between the last call and its end is lost; otherwise no figure of a service falls for as long as it has the service.
	Traffic(ctx context.Context) ([]Traffic, error)
}

// Traffic is what was forwarded for one service.
type Traffic struct {
	Service forwarding.ServiceKey
	// Connections are those that were translated. UDP and others without connections: flows.
	Connections uint64
	// Original is what clients sent, Reply what endpoints answered.
	Original, Reply Volume
}

// Volume is an amount of traffic: packets as the kernel forwards them, which may each stand for several on the wire (GSO), and their bytes with network headers.
type Volume struct{ Packets, Bytes uint64 }

// Add gives the sum of both.
func (v Volume) Add(o Volume) Volume { return Volume{v.Packets + o.Packets, v.Bytes + o.Bytes} }
