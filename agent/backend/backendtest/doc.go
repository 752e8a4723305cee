// Package backendtest is the judge of every dataplane: one table of scenarios, each of which sends real packets through a node that a dataplane programs,
// and compares what becomes of them with what the scenario says and with what forwarding.State.Lookup says.
//
// A scenario is written in the words of the API (assignments, endpoints, a node), so that the same table can judge anything that forwards Services.
package backendtest
