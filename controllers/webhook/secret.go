package webhook

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// Keys of the Secret besides tls.crt and tls.key.
const (
	// keyBundle is what API servers are to trust.
	keyBundle = "ca.crt"
	// keySigning and keyNext are the private keys of two of the bundle's authorities: the one that signs, and the one that will.
	keySigning = "ca.key"
	keyNext    = "ca-next.key"
	// keyRetired is the last certificate that was signed by an authority of the bundle that signs no more.
	keyRetired = "tls-retired.crt"
)

// annotationPublished is on the Secret: the digest of the bundle that every webhook configuration holds, a slash, and since when.
const annotationPublished = "networking.serviceproxy.io/published"

// decode reads the Secret. What cannot be read is missing from the state, and named in the error.
func decode(secret *corev1.Secret, now time.Time) (state, error) {
	var s state
	var errs []error
	note := func(key string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", key, err))
		}
	}
	if secret.Labels[v1alpha1.LabelManagedBy] != v1alpha1.ManagedBy {
		note("label "+v1alpha1.LabelManagedBy, fmt.Errorf("is %q, must be %q", secret.Labels[v1alpha1.LabelManagedBy], v1alpha1.ManagedBy))
	}
	bundle, err := parseCertificates(secret.Data[keyBundle])
	note(keyBundle, err)
	serving, err := parseCertificates(secret.Data[corev1.TLSCertKey])
	note(corev1.TLSCertKey, err)
	signingKey, err := parseKey(secret.Data[keySigning])
	note(keySigning, err)
	if s.servingKey, err = parseKey(secret.Data[corev1.TLSPrivateKeyKey]); err != nil {
		note(corev1.TLSPrivateKeyKey, err)
	}
	if len(serving) > 0 && s.servingKey != nil {
		if !s.servingKey.PublicKey.Equal(serving[0].PublicKey) {
			note(corev1.TLSPrivateKeyKey, errors.New("is not the key of "+corev1.TLSCertKey))
		} else {
			s.serving = serving[0]
		}
	}
	s.signing, bundle = take(bundle, signingKey)
	if s.signing.cert == nil && s.serving != nil {
		note(keySigning, errors.New("is the key of none of "+keyBundle))
		s.signing, bundle = takeSigner(bundle, s.serving)
	}
	if secret.Data[keyNext] != nil {
		nextKey, err := parseKey(secret.Data[keyNext])
		note(keyNext, err)
		s.next, bundle = take(bundle, nextKey)
	}
	if secret.Data[keyRetired] != nil {
		retired, err := parseCertificates(secret.Data[keyRetired])
		note(keyRetired, err)
		if len(retired) > 0 {
			s.retiredServing = retired[0]
		}
	}
	s.retired = bundle
	s.published = publishedSince(secret, s.bundle(), now)
	return s, errors.Join(errs...)
}

// take takes the authority of a key out of the bundle.
func take(bundle []*x509.Certificate, key *ecdsa.PrivateKey) (authority, []*x509.Certificate) {
	i := slices.IndexFunc(bundle, func(c *x509.Certificate) bool { return key != nil && c.IsCA && key.PublicKey.Equal(c.PublicKey) })
	if i < 0 {
		return authority{}, bundle
	}
	return authority{bundle[i], key}, slices.Delete(slices.Clone(bundle), i, i+1)
}

// takeSigner takes the authority that signed a certificate, whose key is not known, out of the bundle.
func takeSigner(bundle []*x509.Certificate, signed *x509.Certificate) (authority, []*x509.Certificate) {
	i := slices.IndexFunc(bundle, func(c *x509.Certificate) bool { return signed.CheckSignatureFrom(c) == nil })
	if i < 0 {
		return authority{}, bundle
	}
	return authority{cert: bundle[i]}, slices.Delete(slices.Clone(bundle), i, i+1)
}

// encode writes the state into the Secret, and nothing of what it held before stays.
func encode(s state, secret *corev1.Secret) error {
	data := map[string][]byte{corev1.TLSCertKey: encodeCertificates(s.serving), keyBundle: encodeCertificates(s.bundle()...)}
	for name, key := range map[string]*ecdsa.PrivateKey{corev1.TLSPrivateKeyKey: s.servingKey, keySigning: s.signing.key, keyNext: s.next.key} {
		if key == nil {
			continue
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return fmt.Errorf("encode %s: %w", name, err)
		}
		data[name] = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	}
	if s.retiredServing != nil {
		data[keyRetired] = encodeCertificates(s.retiredServing)
	}
	secret.Data, secret.Type = data, corev1.SecretTypeTLS
	if secret.Labels == nil {
		secret.Labels = map[string]string{}
	}
	secret.Labels[v1alpha1.LabelManagedBy] = v1alpha1.ManagedBy
	return nil
}

func encodeCertificates(certs ...*x509.Certificate) (out []byte) {
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

func parseCertificates(text []byte) (out []*x509.Certificate, err error) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("must be certificates in PEM: %w", err)
		}
		out = append(out, cert)
	}
	if len(out) == 0 {
		return nil, errors.New("must be certificates in PEM, and there is none")
	}
	return out, nil
}

func parseKey(text []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("must be a key in PEM, and is none")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("must be a key in PKCS 8: %w", err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("must be an ECDSA key, is %T", key)
	}
	return ec, nil
}

// tlsCertificate is what a server presents.
func (s state) tlsCertificate() *tls.Certificate {
	return &tls.Certificate{Certificate: [][]byte{s.serving.Raw}, PrivateKey: s.servingKey, Leaf: s.serving}
}

func digest(bundle []*x509.Certificate) string {
	sum := sha256.Sum256(encodeCertificates(bundle...))
	return hex.EncodeToString(sum[:16])
}

// publishedSince reads since when the bundle has been published, zero if it has not. A moment that has not come yet is not believed.
func publishedSince(secret *corev1.Secret, bundle []*x509.Certificate, now time.Time) time.Time {
	of, since, _ := strings.Cut(secret.Annotations[annotationPublished], "/")
	at, err := time.Parse(time.RFC3339, since)
	if err != nil || of != digest(bundle) || at.After(now.Add(time.Minute)) {
		return time.Time{}
	}
	return at
}

// publish notes on the Secret that every webhook configuration holds the bundle from now on.
func publish(secret *corev1.Secret, bundle []*x509.Certificate, now time.Time) {
	if secret.Annotations == nil {
		secret.Annotations = map[string]string{}
	}
	// Stored with a resolution of a second: round up, or the grace is cut.
	secret.Annotations[annotationPublished] = digest(bundle) + "/" + now.Add(time.Second-1).Truncate(time.Second).UTC().Format(time.RFC3339)
}
