// Package parity compares what is promised of a Service, row by row, with what proxies keep: each mode of this project and, for reference, kube-proxy. Its test
// runs the table of backendtest against all of them and writes docs/parity.md.
package parity
