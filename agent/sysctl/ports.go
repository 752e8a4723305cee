package sysctl

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

func (r PortRange) String() string { return fmt.Sprintf("%d-%d", r.First, r.Last) }

const (
	localPortRange     = "net/ipv4/ip_local_port_range"
	localReservedPorts = "net/ipv4/ip_local_reserved_ports"
	// maxPortRanges bounds how many ranges LocalPorts tells apart.
	maxPortRanges = 64
)

// LocalPorts gives the ports that the kernel may give to outgoing connections by itself, of either family: ip_local_port_range without
// ip_local_reserved_ports, in order. Gaps beyond the first 64 ranges are not told.
func (k Proc) LocalPorts() ([]PortRange, error) {
	text, err := os.ReadFile(k.path(localPortRange))
	if err != nil {
		return nil, err
	}
	ends := strings.Fields(string(text))
	if len(ends) != 2 {
		return nil, fmt.Errorf("kernel parameter %s is %q, which is no range", localPortRange, text)
	}
	var all PortRange
	for i, to := range []*uint16{&all.First, &all.Last} {
		port, err := strconv.ParseUint(ends[i], 10, 16)
		if err != nil {
			return nil, fmt.Errorf("kernel parameter %s: %w", localPortRange, err)
		}
		*to = uint16(port)
	}
	text, err = os.ReadFile(k.path(localReservedPorts))
	if err != nil {
		return nil, err
	}
	reserved, err := parseList(strings.TrimSpace(string(text)))
	if err != nil {
		return nil, fmt.Errorf("kernel parameter %s: %w", localReservedPorts, err)
	}
	return subtract(all, reserved), nil
}

// subtract gives what is left of a range.
func subtract(all PortRange, reserved []span) []PortRange {
	slices.SortFunc(reserved, func(a, b span) int { return a.first - b.first })
	var out []PortRange
	next := int(all.First)
	for _, r := range reserved {
		if r.first > int(all.Last) || len(out) == maxPortRanges-1 {
			break
		}
		if r.first > next {
			out = append(out, PortRange{uint16(next), uint16(r.first - 1)})
		}
		next = max(next, r.last+1)
	}
	if next <= int(all.Last) {
		out = append(out, PortRange{uint16(next), all.Last})
	}
	return out
}
