package controllers

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
	"github.com/serviceproxy/serviceproxy-operator/controllers/instrument"
)

// What a replica says about policies. Every replica says the same about the same moment: take the max over them, not the sum.
var (
	rangeAddresses = prometheus.NewDesc("serviceproxy_range_addresses",
		"Number of addresses of a policy's range by state: allocated (held by Services of the policy), foreign (held by others), quarantined (released a while ago), free.",
		[]string{"policy", "cidr", "use", "state"}, nil)
	rangeCapacity = prometheus.NewDesc("serviceproxy_range_capacity",
		"Number of addresses of a policy's range that can be given out at all, in use or not.", []string{"policy", "cidr", "use"}, nil)
	nodePortsByState = prometheus.NewDesc("serviceproxy_node_ports",
		"Number of node ports of a policy's range by state: allocated (held by Services of the policy), foreign (held by others), quarantined (released a while ago), free.",
		[]string{"policy", "state"}, nil)
	nodePortCapacity = prometheus.NewDesc("serviceproxy_node_port_capacity",
		"Number of node ports of a policy's range that can be given out at all, in use or not.", []string{"policy"}, nil)
	policyServices = prometheus.NewDesc("serviceproxy_services",
		"Number of Services that a policy covers (covered), and of these, those that have all they are owed (assigned), that wait for an address (waiting), that every selected node forwards (programmed), that were taken over from kube-proxy (taken-over) and that are being handed back to it (handing-back).",
		[]string{"policy", "state"}, nil)
	policyConflicts = prometheus.NewDesc("serviceproxy_policy_conflicts",
		"Number of overlaps of a policy's ranges with those of older policies, which have what both declare.", []string{"policy"}, nil)
)

// ledgerCollector reads the ledger when it is scraped, so that nothing has to be counted twice.
type ledgerCollector struct{ ledger atomic.Pointer[ledger] }

// collectFrom registers a collector of the ledger. Metrics are the process's: where one is registered already, by an earlier manager, it turns to this ledger.
func collectFrom(l *ledger, r prometheus.Registerer) error {
	c := &ledgerCollector{}
	c.ledger.Store(l) // it may be read as soon as it is registered
	if err := instrument.Register(r, &c); err != nil {
		return err
	}
	c.ledger.Store(l) // by now c may be an earlier manager's
	return nil
}

// Describe implements prometheus.Collector.
func (*ledgerCollector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{rangeAddresses, rangeCapacity, nodePortsByState, nodePortCapacity, policyServices, policyConflicts} {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (c *ledgerCollector) Collect(out chan<- prometheus.Metric) {
	for _, m := range c.ledger.Load().measure(time.Now()) {
		out <- m
	}
}

// measure states what is known of the policies at one moment. Before the ledger knows what is held, that is nothing: half a count would raise alarms.
func (l *ledger) measure(now time.Time) (out []prometheus.Metric) {
	if l.ready(nil) != nil {
		return nil
	}
	gauge := func(d *prometheus.Desc, n int64, labels ...string) {
		out = append(out, prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(n), labels...))
	}
	states := func(d *prometheus.Desc, c allocator.Counts, labels ...string) {
		labels = labels[:len(labels):len(labels)]
		gauge(d, c.Allocated, append(labels, "allocated")...)
		gauge(d, c.Foreign, append(labels, "foreign")...)
		gauge(d, c.Quarantined, append(labels, "quarantined")...)
		gauge(d, c.Free, append(labels, "free")...)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refresh(now)
	conflicts := map[string]int64{}
	for _, c := range l.conflicts {
		conflicts[c.Policy]++
	}
	for _, p := range l.resolved {
		for _, r := range p.Ranges {
			counts := l.space.RangeCounts(p.Name, r.Prefix)
			states(rangeAddresses, counts, p.Name, r.Prefix.String(), string(r.Use))
			gauge(rangeCapacity, counts.Total, p.Name, r.Prefix.String(), string(r.Use))
		}
		if p.NodePorts.Size() > 0 {
			counts := l.space.PortCounts(p.Name)
			states(nodePortsByState, counts, p.Name)
			gauge(nodePortCapacity, counts.Total, p.Name)
		}
		gauge(policyConflicts, conflicts[p.Name], p.Name)
	}
	for name := range l.policies {
		var t tally
		if have := l.tallies[name]; have != nil {
			t = *have
		}
		gauge(policyServices, int64(t.covered), name, "covered")
		gauge(policyServices, int64(t.assigned), name, "assigned")
		gauge(policyServices, int64(t.waiting), name, "waiting")
		gauge(policyServices, int64(t.programmed), name, "programmed")
		gauge(policyServices, int64(t.takenOver), name, "taken-over")
		gauge(policyServices, int64(t.handingBack), name, "handing-back")
	}
	return out
}
