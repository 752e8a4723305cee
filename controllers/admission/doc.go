// Package admission chooses the cluster IPs and node ports of Services while the API server admits them.
package admission
