// Package admission chooses the cluster IPs and node ports of Services while the API server admits them.
//
// The API server takes a Service's addresses for good when it stores the Service, so the choice has to be made before. The package is one mutating admission
// handler in three layers:
//
//   - plan.go, pure: what the API server would allocate for a request, by its own rules;
//   - route.go, pure: where each of these comes from: the ranges of the policy that covers the Service, or, for everything else, what no policy declares;
//   - claim.go, request.go, handler.go: takes it. Creating an AllocationClaim is taking the lock; whoever loses a race tries the next lock within the same call.
//
// What holds for every request:
//
//   - It only adds. What a Service has, or asks for, stays as it is.
//   - All or nothing: a call that denies its request, or finds that the Service exists already, deletes the claims that it made. If the API server refuses the
//     request afterwards they stay, and the claims reconciler deletes them.
//   - A request has no identity of its own and may come by several times (several webhooks, reinvocation): a token, in the Service's annotation and in the claims,
//     ties both together. A token that comes with a Service but belongs to no claim reserved for it was copied, and means nothing.
//   - A dry run takes nothing, fills in nothing and stamps nothing.
//   - Where the policy cannot give what it declares, BestEffort policies let the Service have something that no policy declares, and warn; Strict ones deny the
//     request. PreferDualStack under Strict falls back to one family.
//   - Where it cannot be told which policy covers a Service, it gets something that no policy declares, and a warning. Should the policy be Strict, its
//     ValidatingAdmissionPolicy refuses that.
package admission
