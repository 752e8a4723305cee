// Package enforcement keeps the API server from giving a Service what the policies say it must not have, also while no webhook of ours answers.
//
// It turns the ServiceProxyPolicies into two ValidatingAdmissionPolicies, which the API server evaluates by itself, after it allocated:
//
//   - serviceproxy-strict, only while a Strict policy exists: a new address or node port of a Service that a Strict policy covers lies in what
//     that policy declares. If it cannot be evaluated, the request is refused.
//   - serviceproxy-foreign: nobody gets an address or node port of another policy by asking for it. If it cannot be evaluated, the request passes.
//
// Compile is pure. It follows the allocator: precedence, what is coverable, and that the older of two overlapping policies has what both declare.
//
// Both judge only what a request adds, so whatever a Service holds stays valid: its deletion, its finalizers, its labels and every update that
// allocates nothing always pass. What the API server itself picked for a Service that no Strict policy covers passes too, wherever it lies: it is
// recorded as foreign. See docs/adr/0014-strict-by-admission-policy.md.
package enforcement
