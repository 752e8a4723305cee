package webhook

import (
	"crypto/tls"
	"errors"
	"sync/atomic"
)

// Certificate is what this process serves its webhook with, once it has one. The zero value has none; all methods may be called concurrently.
type Certificate struct {
	current atomic.Pointer[tls.Certificate]
}

// Configure makes a server use the certificate, whichever it is when a connection begins.
func (c *Certificate) Configure(config *tls.Config) {
	config.MinVersion = tls.VersionTLS13
	config.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		if current := c.current.Load(); current != nil {
			return current, nil
		}
		return nil, errNoCertificate
	}
}

var errNoCertificate = errors.New("the webhook's certificate has not been read from its Secret yet")
