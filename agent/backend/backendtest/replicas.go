package backendtest

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// replicas is how many further places "b" and "outside" each stand for: b1, b2 ... and outside1, outside2 ... A replica has addresses of its own and shares
// the rest with its place, so that a scenario may have a crowd of endpoints or of clients.
const replicas = 20

// find gives a place or a replica by its name.
func find(name string) place {
	if p, ok := places[name]; ok {
		return p
	}
	base := strings.TrimRight(name, "0123456789")
	n, err := strconv.Atoi(name[len(base):])
	if err != nil || n < 1 || n > replicas || base != "b" && base != "outside" {
		panic("no such place: " + name)
	}
	p := places[base]
	for family, a := range p.addrs {
		raw := a.AsSlice()
		raw[len(raw)-1] = byte(100 + n)
		p.addrs[family], _ = netip.AddrFromSlice(raw) // its length is right
	}
	return p
}

// replicasOf names the first n replicas of a place.
func replicasOf(name string, n int) (out []string) {
	for i := range n {
		out = append(out, name+strconv.Itoa(i+1))
	}
	return out
}

// space gives the namespace of a place or replica.
func (l *Lab) space(name string) *netns.NS { return l.spaces[strings.TrimRight(name, "0123456789")] }

// addReplicas makes the replicas. Each serves as a place does, under its own name.
func (l *Lab) addReplicas() {
	l.Helper()
	var there, here strings.Builder // commands in the namespace of the replicas, and of the node
	for _, base := range []string{"b", "outside"} {
		there.Reset()
		for _, name := range replicasOf(base, replicas) {
			for _, a := range find(name).addrs {
				flags := ""
				if a.Is6() {
					flags = "nodad" // else it is of no use for a second
				}
				fmt.Fprintf(&there, "ip addr add %s/%d dev eth0 %s\n", a, a.BitLen(), flags)
				if base == "b" {
					fmt.Fprintf(&here, "ip route add %s dev pod-b\n", a)
				}
			}
		}
		l.sh(l.spaces[base], there.String())
	}
	l.sh(l.node, here.String())
	for _, name := range replicasOf("b", replicas) {
		for _, a := range find(name).addrs {
			l.answer(l.space(name), name, netip.AddrPortFrom(a, serverPort))
		}
	}
}
