package controllers

import (
	"time"
)

// Options are what tests and large clusters set otherwise than by default. The zero value means the defaults.
type Options struct {
	// RangeGrace is how long after a ServiceCIDR became Ready its addresses are given out, so that every API server has seen it. Default 2s.
	RangeGrace time.Duration
	// StatusInterval is the shortest time between two writes of one policy's status. Default 500ms.
	StatusInterval time.Duration
	// LeakAge is how old a claim or reservation must be before it is taken for a leak: older than any request that may still
	// be under way (the API server's request timeout). Default 60s.
	LeakAge time.Duration
	// RetryWaiting is how often a Service that waits for an address is looked at again even if nothing was released. Default 1m.
	RetryWaiting time.Duration
	// HandBackGrace is how long kube-proxy is given to forward a Service that is handed back before we let go of it: longer than its full sync takes. Default 30s.
	HandBackGrace time.Duration
	// TakeOverRate is how many Services per second are taken over from kube-proxy or handed back. Default 20: as many as Kubernetes' EndpointSlice
	// controller, which copies the label, can follow by default.
	TakeOverRate float64
	// Namespace is where the controller runs and may create Services. Empty: the API server's range of node ports is not found out.
	Namespace string
	// Admission serves the admission of Services at the manager's webhook server. The manager's client should have no rate limit then.
	Admission bool
	// Workers is how many Services are reconciled at a time. Default 8.
	Workers int
}

func (o Options) withDefaults() Options {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&o.RangeGrace, 2*time.Second)
	def(&o.StatusInterval, 500*time.Millisecond)
	def(&o.LeakAge, time.Minute)
	def(&o.RetryWaiting, time.Minute)
	def(&o.HandBackGrace, 30*time.Second)
	if o.TakeOverRate == 0 {
		o.TakeOverRate = 20
	}
	if o.Workers == 0 {
		o.Workers = 8
	}
	return o
}
