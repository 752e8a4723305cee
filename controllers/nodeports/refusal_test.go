package nodeports

import (
	"errors"
	"fmt"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

func refusal(path, message string) error {
	p := field.NewPath("spec").Child("ports").Index(0).Child("nodePort")
	if path != "" {
		p = field.NewPath("spec").Child(path)
	}
	return apierrors.NewInvalid(schema.GroupKind{Kind: "Service"}, "serviceproxy-probe-x", field.ErrorList{field.Invalid(p, 1, message)})
}

func TestRangeOf(t *testing.T) {
	const says = "provided port is not in the valid range. The range of valid ports is "
	for _, tt := range []struct {
		err   error
		want  allocator.PortRange
		inUse bool
	}{
		{refusal("", says+"30000-32767"), allocator.PortRange{First: 30000, Last: 32767}, false},
		{refusal("", says+"31000-31000"), allocator.PortRange{First: 31000, Last: 31000}, false},
		{refusal("", says+"1-65535."), allocator.PortRange{First: 1, Last: 65535}, false},
		{refusal("", says+"30000-327670"), allocator.PortRange{}, false}, // no port
		{refusal("", says+"32767-30000"), allocator.PortRange{}, false},
		{refusal("", says+"0-10"), allocator.PortRange{}, false},
		{refusal("", says), allocator.PortRange{}, false},
		{refusal("", "provided port is already allocated"), allocator.PortRange{}, true},
		{refusal("clusterIPs", says+"30000-32767"), allocator.PortRange{}, false},
		{refusal("clusterIPs", "provided IP is already allocated"), allocator.PortRange{}, false},
		{apierrors.NewForbidden(schema.GroupResource{Resource: "services"}, "x", errors.New(says+"30000-32767")), allocator.PortRange{}, false},
		{&apierrors.StatusError{}, allocator.PortRange{}, false},
		{errors.New(says + "30000-32767"), allocator.PortRange{}, false},
		{nil, allocator.PortRange{}, false},
	} {
		t.Run(fmt.Sprint(tt.err), func(t *testing.T) {
			if got, ok := rangeOf(tt.err); got != tt.want || ok != (tt.want != allocator.PortRange{}) {
				t.Errorf("got %v, %v, want %v", got, ok, tt.want)
			}
			if got := isInUse(tt.err); got != tt.inUse {
				t.Errorf("in use: got %v", got)
			}
		})
	}
}
