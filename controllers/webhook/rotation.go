package webhook

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net/netip"
	"slices"
	"time"
)

// Lifetimes. What is renewed is renewed after two thirds of its life, so a third is left to find out why it was not.
const (
	authorityLife = 5 * 365 * 24 * time.Hour
	servingLife   = 365 * 24 * time.Hour
	// backdate is how far before its making a certificate begins, for API servers whose clocks are behind.
	backdate = time.Hour
)

// authority is a certificate authority of ours. Without a key it signs no more.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// state is all that there is of certificates at a moment. Functions that take one do not change it.
type state struct {
	// signing signs what is served.
	signing authority
	// next is trusted already and signs once every API server has had time to learn of it. Its cert is nil if there is none.
	next authority
	// retired sign no more. They are trusted until retiredServing, the last certificate that one of them signed, has expired: until then a replica that was paused or
	// cut off may still serve it.
	retired        []*x509.Certificate
	retiredServing *x509.Certificate
	serving        *x509.Certificate
	servingKey     *ecdsa.PrivateKey
	// published is since when every webhook configuration trusts all of bundle, zero if that is not known.
	published time.Time
}

// bundle lists the authorities that API servers are to trust, the oldest first.
func (s state) bundle() []*x509.Certificate {
	out := slices.Clone(s.retired)
	for _, a := range []authority{s.signing, s.next} {
		if a.cert != nil {
			out = append(out, a.cert)
		}
	}
	slices.SortStableFunc(out, func(a, b *x509.Certificate) int {
		if c := a.NotBefore.Compare(b.NotBefore); c != 0 {
			return c
		}
		return bytes.Compare(a.Raw, b.Raw)
	})
	return out
}

// serves says whether the state has a certificate to serve now.
func (s state) serves(now time.Time) bool {
	return s.serving != nil && s.servingKey != nil && valid(s.serving, now) && s.signing.cert != nil && valid(s.signing.cert, now) &&
		s.serving.CheckSignatureFrom(s.signing.cert) == nil
}

func valid(c *x509.Certificate, now time.Time) bool {
	return !now.Before(c.NotBefore) && now.Before(c.NotAfter)
}

// due is when two thirds of a certificate's life are over.
func due(c *x509.Certificate) time.Time {
	return c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) / 3 * 2)
}

// rotation decides what becomes of certificates.
type rotation struct {
	// names are what API servers call the webhook by: DNS names and IP addresses.
	names []string
	// grace is how long an API server may go on with a webhook configuration after it was changed.
	grace time.Duration
}

// next is the state that is to follow on s at a moment, s itself if nothing is to be done, with what was done for the log; and when to look again. It draws
// keys, and is pure otherwise. It fails only if names cannot be in a certificate.
//
// As long as s is kept and the leader publishes bundles, whatever was served and has not expired verifies against every bundle that is or was within the grace.
func (r rotation) next(s state, now time.Time) (state, []string, time.Time, error) {
	if reason := s.lost(now); reason != "" {
		s, err := r.startOver(now)
		if err != nil {
			return s, nil, time.Time{}, err
		}
		return s, []string{"new authority and certificate at once: " + reason}, r.again(s, now), nil
	}
	var done []string
	if len(s.retired) > 0 && (s.retiredServing == nil || !now.Before(s.retiredServing.NotAfter)) {
		s.retired, s.retiredServing, s.published = nil, nil, time.Time{}
		done = append(done, "stop trusting the former authority: all that it signed has expired")
	}
	if s.next.cert != nil && !valid(s.next.cert, now) {
		s.next, s.published = authority{}, time.Time{}
		done = append(done, "forget the next authority, which has expired before it signed anything")
	}
	if s.next.cert == nil && (s.signing.key == nil || !now.Before(due(s.signing.cert))) {
		next, err := newAuthority(now)
		if err != nil {
			return s, nil, time.Time{}, err
		}
		s.next, s.published = next, time.Time{}
		done = append(done, "trust the next authority")
	}
	reason := r.renewal(s, now)
	if s.next.cert != nil && r.grown(s, now) {
		s.retired = append(slices.Clone(s.retired), s.signing.cert)
		s.retiredServing = latest(s.retiredServing, s.serving)
		s.signing, s.next = s.next, authority{}
		reason = "the next authority has been trusted for long enough"
	}
	if reason != "" && s.signing.key != nil {
		var err error
		if s, err = r.renew(s, now); err != nil {
			return s, nil, time.Time{}, err
		}
		done = append(done, "new certificate: "+reason)
	}
	return s, done, r.again(s, now), nil
}

// lost says why nothing of the state can be continued, empty if it can.
func (s state) lost(now time.Time) string {
	switch {
	case s.signing.cert == nil:
		return "there is no authority"
	case !valid(s.signing.cert, now):
		return fmt.Sprintf("the authority is valid from %s to %s only", s.signing.cert.NotBefore.Format(time.RFC3339), s.signing.cert.NotAfter.Format(time.RFC3339))
	case s.signing.key == nil && !s.serves(now):
		return "there is neither a certificate nor the authority's key"
	}
	return ""
}

// renewal says why another serving certificate is needed, empty if it is not.
func (r rotation) renewal(s state, now time.Time) string {
	if !s.serves(now) {
		return "there is no valid one of the authority"
	}
	for _, name := range r.names {
		if s.serving.VerifyHostname(name) != nil {
			return "it was not for " + name
		}
	}
	if !now.Before(due(s.serving)) {
		return "two thirds of its life are over"
	}
	return ""
}

// grown says whether every API server trusts the next authority.
func (r rotation) grown(s state, now time.Time) bool {
	return !s.published.IsZero() && !now.Before(s.published.Add(r.grace))
}

func latest(a, b *x509.Certificate) *x509.Certificate {
	if a == nil || b != nil && b.NotAfter.After(a.NotAfter) {
		return b
	}
	return a
}

// again is when there will be something to do if nobody publishes anything until then.
func (r rotation) again(s state, now time.Time) time.Time {
	at := s.serving.NotAfter
	consider := func(t time.Time) {
		if t.After(now) && t.Before(at) {
			at = t
		}
	}
	consider(due(s.serving))
	if s.next.cert == nil {
		consider(due(s.signing.cert))
	} else if !s.published.IsZero() {
		consider(s.published.Add(r.grace))
	}
	if s.retiredServing != nil {
		consider(s.retiredServing.NotAfter)
	}
	return at
}

func (r rotation) startOver(now time.Time) (s state, err error) {
	if s.signing, err = newAuthority(now); err != nil {
		return s, err
	}
	return r.renew(s, now)
}

// renew has the authority sign another serving certificate.
//
// Before the old one is due, its names stay: replicas that are reached by different names would otherwise take them from one another forever.
func (r rotation) renew(s state, now time.Time) (state, error) {
	names := slices.Clone(r.names)
	if s.serves(now) && now.Before(due(s.serving)) {
		names = append(names, s.serving.DNSNames...)
		for _, ip := range s.serving.IPAddresses {
			names = append(names, ip.String())
		}
	}
	slices.Sort(names)
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: ServiceName},
		NotBefore:   now.Add(-backdate),
		NotAfter:    now.Add(servingLife),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if template.NotAfter.After(s.signing.cert.NotAfter) {
		template.NotAfter = s.signing.cert.NotAfter
	}
	for _, name := range slices.Compact(names) {
		if a, err := netip.ParseAddr(name); err == nil {
			template.IPAddresses = append(template.IPAddresses, a.AsSlice())
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	var err error
	s.serving, s.servingKey, err = issue(template, &s.signing)
	return s, err
}

func newAuthority(now time.Time) (authority, error) {
	template := &x509.Certificate{
		// API servers find the signer of a certificate by this name and by its key's identifier, which x509 makes of the key.
		Subject:               pkix.Name{CommonName: ServiceName + "-ca"},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(authorityLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	cert, key, err := issue(template, nil)
	return authority{cert, key}, err
}

// issue makes a certificate of the template for a new key. Without a signer it signs itself.
func issue(template *x509.Certificate, signer *authority) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("generate key: %w", err)
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return nil, nil, fmt.Errorf("draw serial number: %w", err)
	}
	if signer == nil {
		signer = &authority{template, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer.cert, key.Public(), signer.key)
	if err != nil {
		return nil, nil, fmt.Errorf("sign certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	return cert, key, err
}
