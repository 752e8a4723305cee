// Package programmed tells when a Service is live: it turns what the agents report into the condition Programmed.
//
// The protocol (docs/adr/0007-programmed-feedback.md): an agent writes two marks into the status of its NodeProxyState,
// the newest ServiceAssignment and the newest EndpointSlice resourceVersion up to which its kernel holds everything. This
// package remembers a target per generation of each ServiceAssignment, in the same terms. A generation is programmed when
// the marks of every node that counts have reached its target and each of its ports has a ready endpoint.
//
// The tracker holds the state and decides; it has no client and no clock. The feed brings it events and time, the
// statusWriter brings its verdicts to the API server, and nodeStates keeps one NodeProxyState per Node.
package programmed
