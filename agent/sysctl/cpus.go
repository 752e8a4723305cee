package sysctl

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
)

// CPUs gives how many CPUs the machine has online, which may be more than this process may use: limits of the kernel are for the machine.
func CPUs() int {
	text, err := os.ReadFile("/sys/devices/system/cpu/online")
	if err == nil {
		if n, err := countList(strings.TrimSpace(string(text))); err == nil && n > 0 {
			return n
		}
	}
	return runtime.NumCPU()
}

// span is a range of numbers, both ends included.
type span struct{ first, last int }

// countList counts the numbers of a list such as 0-3,8.
func countList(list string) (n int, err error) {
	spans, err := parseList(list)
	for _, s := range spans {
		n += s.last - s.first + 1
	}
	return n, err
}

// parseList reads a list of numbers and ranges as the kernel writes them, such as 0-3,8. It may be empty.
func parseList(list string) (out []span, err error) {
	if list == "" {
		return nil, nil
	}
	for part := range strings.SplitSeq(list, ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		first, err := strconv.Atoi(from)
		if err != nil {
			return nil, fmt.Errorf("%q in the list %q is no number: %w", part, list, err)
		}
		last, err := strconv.Atoi(to)
		if err != nil || last < first {
			return nil, fmt.Errorf("%q in the list %q is no range", part, list)
		}
		out = append(out, span{first, last})
	}
	return out, nil
}
