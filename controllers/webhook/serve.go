package webhook

import (
	"crypto/tls"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// Certificate is what this process serves its webhook with, once it has one. The zero value has none; all methods may be called concurrently.
type Certificate struct {
	current atomic.Pointer[tls.Certificate]
}

// Configure makes a server use the certificate, whichever it is when a connection begins.
func (c *Certificate) Configure(config *tls.Config) {
	config.MinVersion = tls.VersionTLS13
	// No HTTP/2, because an API server would send everything over one connection, and notices only after 45 seconds that a replica does not answer on it. Of
	// HTTP/1.1 it gives up the connection with the request that timed out, and the next one may lead to another replica.
	config.NextProtos = []string{"http/1.1"}
	config.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
		if current := c.current.Load(); current != nil {
			return current, nil
		}
		return nil, errNoCertificate
	}
}

var errNoCertificate = errors.New("the webhook's certificate has not been read from its Secret yet")

// use serves the state's certificate from the next connection on.
func (c *Certificate) use(s state) { c.current.Store(s.tlsCertificate()) }

// ready fails while there is nothing to serve.
func (c *Certificate) ready(now time.Time) error {
	current := c.current.Load()
	if current == nil {
		return errNoCertificate
	}
	if !valid(current.Leaf, now) {
		return fmt.Errorf("the webhook's certificate is valid from %s to %s only", current.Leaf.NotBefore.Format(time.RFC3339), current.Leaf.NotAfter.Format(time.RFC3339))
	}
	return nil
}
