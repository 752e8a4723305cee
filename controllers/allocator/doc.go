// Package allocator decides which policy covers a Service and which addresses and node ports it gets.
//
// It is pure: no client, no clock, no log, and randomness is passed in. The caller feeds a Space with the policies and with what is
// held (claims) or taken (the API server's own locks), and asks it for grants. A Space only proposes: the lock is the AllocationClaim
// that the caller creates under the name Lock.Name, because names in the API server are the only thing that all replicas share.
// The controller and an admission webhook use it alike.
package allocator
