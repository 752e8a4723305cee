package nodeports

import (
	"regexp"
	"slices"
	"strconv"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// validPorts is how the API server names its range (k8s.io/kubernetes pkg/registry/core/service/portallocator, ErrNotInRange).
var validPorts = regexp.MustCompile(`The range of valid ports is (\d+)-(\d+)(\D|$)`)

// rangeOf reads the API server's range from its refusal of a node port. It is not ok if that is not what it says.
func rangeOf(refusal error) (out allocator.PortRange, ok bool) {
	for _, c := range causes(refusal) {
		m := validPorts.FindStringSubmatch(c.Message)
		if m == nil {
			continue
		}
		first, errFirst := strconv.ParseUint(m[1], 10, 16)
		last, errLast := strconv.ParseUint(m[2], 10, 16)
		if errFirst != nil || errLast != nil || first < 1 || first > last {
			continue
		}
		return allocator.PortRange{First: uint16(first), Last: uint16(last)}, true
	}
	return out, false
}

// isInUse says whether a node port was refused because somebody has it, and so lies in the range.
func isInUse(refusal error) bool {
	return slices.ContainsFunc(causes(refusal), func(c metav1.StatusCause) bool {
		return strings.Contains(c.Message, "provided port is already allocated")
	})
}

// causes are those of a refusal that are about a node port.
func causes(err error) []metav1.StatusCause {
	status, ok := err.(apierrors.APIStatus) // a wrapped one is not the API server's answer to the probe
	if !ok || !apierrors.IsInvalid(err) || status.Status().Details == nil {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(status.Status().Details.Causes), func(c metav1.StatusCause) bool {
		return !strings.HasSuffix(c.Field, ".nodePort")
	})
}
