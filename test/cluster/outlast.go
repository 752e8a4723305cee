package cluster

import (
	"errors"
	"net/http"
	"syscall"
	"time"
)

// outlast repeats reads until the API server is there. Left alone, the stand-ins' informers would wait for up to a minute after an
// outage before they try again, while a test waits for them.
type outlast struct{ http.RoundTripper }

func (o outlast) RoundTrip(req *http.Request) (*http.Response, error) {
	for {
		resp, err := o.RoundTripper.RoundTrip(req)
		if req.Method != http.MethodGet || !errors.Is(err, syscall.ECONNREFUSED) {
			return resp, err
		}
		select {
		case <-req.Context().Done():
			return nil, req.Context().Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}
