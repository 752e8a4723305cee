// Package controllers turns ServiceProxyPolicies and Services into AllocationClaims and ServiceAssignments.
//
// Three reconcilers share one ledger, the in-memory view of who holds what that informers keep up to date:
//
//   - policies: registers ranges as ServiceCIDRs, holds a policy that is in use, keeps its status true;
//   - services: binds what admission reserved, records what else the API server gave, allocates what the policy owes, compiles the ServiceAssignment, lets go;
//   - claims: deletes claims that have rested long enough, reservations of requests that came to nothing, and what crashes left behind.
//
// The ledger only proposes. A claim is taken by creating the AllocationClaim, whose name is the address or port, and an additional service IP also
// by creating the IPAddress; so replicas, stale leaders and stale caches can never give one address to two Services. The order of writes is
// claim, IPAddress, assignment when allocating, and assignment, IPAddress, claim when letting go; a crash between two of them leaves
// something that the next reconcile completes or the claims reconciler deletes.
//
// Services are the truth and claims the record: what is lost of it is made again from Service.spec, and for an additional address from the assignment or the
// IPAddress that still shows it. Nothing is renumbered for that.
package controllers
