package webhook

import (
	"crypto/x509"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

var start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

const serviceDNS = ServiceName + ".net.svc"

// world is a cluster in which API servers lag behind the configuration, and replicas behind the Secret.
type world struct {
	t        *testing.T
	rotation rotation
	now      time.Time
	secret   *corev1.Secret
	// trusted are the bundles that an API server may have, with when they were replaced, zero for the newest.
	trusted []trusted
	// served are all certificates that a replica may still serve.
	served []*x509.Certificate
	// kinds counts what was done.
	kinds map[string]int
}

type trusted struct {
	bundle   []*x509.Certificate
	replaced time.Time
}

func newWorld(t *testing.T) *world {
	return &world{t: t, now: start, secret: &corev1.Secret{}, kinds: map[string]int{},
		rotation: rotation{names: target{namespace: "net", url: "https://192.0.2.7:8443"}.names(), grace: time.Minute}}
}

func (w *world) state() state {
	s, _ := decode(w.secret, w.now)
	return s
}

// replica is a look of any replica at the Secret.
func (w *world) replica() time.Time {
	w.t.Helper()
	s, done, again, err := w.rotation.next(w.state(), w.now)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, what := range done {
		w.kinds[what]++
	}
	if err := encode(s, w.secret); err != nil {
		w.t.Fatal(err)
	}
	if back := w.state(); len(back.bundle()) != len(s.bundle()) || !back.serving.Equal(s.serving) || !s.published.IsZero() && back.published != s.published {
		w.t.Fatalf("%v: the Secret does not hold the state that it was written from", w.now)
	}
	if len(w.served) == 0 || !w.served[len(w.served)-1].Equal(s.serving) {
		w.served = append(w.served, s.serving)
	}
	if !again.After(w.now) {
		w.t.Fatalf("%v: to look again at %v, which is not later", w.now, again)
	}
	return again
}

// leader writes the configuration and notes it.
func (w *world) leader() {
	bundle := w.state().bundle()
	if n := len(w.trusted); n > 0 && !slices.EqualFunc(w.trusted[n-1].bundle, bundle, (*x509.Certificate).Equal) {
		w.trusted[n-1].replaced = w.now
		w.trusted = append(w.trusted, trusted{bundle: bundle})
	} else if n == 0 {
		w.trusted = append(w.trusted, trusted{bundle: bundle})
	}
	if w.state().published.IsZero() {
		publish(w.secret, bundle, w.now)
	}
}

// check fails unless whatever a replica may serve verifies against whatever an API server may trust.
func (w *world) check() {
	w.t.Helper()
	w.trusted = slices.DeleteFunc(w.trusted, func(b trusted) bool {
		return !b.replaced.IsZero() && w.now.After(b.replaced.Add(w.rotation.grace-time.Second))
	})
	w.served = slices.DeleteFunc(w.served, func(c *x509.Certificate) bool { return !valid(c, w.now) })
	if len(w.served) == 0 {
		w.t.Fatalf("%v: nothing is served", w.now)
	}
	for _, b := range w.trusted {
		roots := x509.NewCertPool()
		for _, c := range b.bundle {
			roots.AddCert(c)
		}
		for i, c := range w.served {
			if _, err := c.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: w.now}); err != nil {
				w.t.Fatalf("%v: the certificate number %d of %d, valid from %v to %v, is not trusted by a bundle of %d: %v", w.now, i+1, len(w.served), c.NotBefore, c.NotAfter, len(b.bundle), err)
			}
			for _, name := range []string{serviceDNS, serviceDNS + ".cluster.local", "192.0.2.7"} {
				if err := c.VerifyHostname(name); err != nil {
					w.t.Fatalf("%v: %v", w.now, err)
				}
			}
		}
	}
}

// At every moment of ten years, whatever a replica serves that has not expired, however stale, is trusted by every API server, however stale.
func TestRotationWithoutDowntime(t *testing.T) {
	w := newWorld(t)
	rng := rand.New(rand.NewPCG(1, 2))
	w.replica()
	w.leader()
	authorities, certificates := map[string]bool{}, map[string]bool{}
	for end := start.AddDate(10, 0, 0); w.now.Before(end); {
		again := w.replica()
		w.check()
		// Someone looks at random times, and sometimes nobody does for two weeks; the leader comes late.
		step := time.Duration(rng.Int64N(int64(14 * 24 * time.Hour)))
		if w.state().next.cert != nil {
			step = time.Duration(rng.Int64N(int64(20 * time.Second)))
		}
		if w.now = w.now.Add(step); w.now.After(again) && rng.IntN(2) == 0 {
			w.now = again
		}
		w.check()
		if rng.IntN(3) == 0 {
			w.leader()
			w.check()
		}
		authorities[w.state().signing.cert.SerialNumber.String()] = true
		certificates[w.state().serving.SerialNumber.String()] = true
	}
	t.Logf("%d authorities, %d certificates, what was done: %v", len(authorities), len(certificates), w.kinds)
	if n := len(authorities); n < 3 || n > 4 || len(certificates) < 15 || len(certificates) > 20 {
		t.Errorf("%d authorities and %d certificates in ten years, want 3 or 4, and about 17", len(authorities), len(certificates))
	}
}

// What is due is done when it is, and nothing before.
func TestRotationLooksWhenItIsTime(t *testing.T) {
	w := newWorld(t)
	w.replica()
	w.leader()
	const tolerance = 5 * time.Second
	for range 12 {
		before := w.state()
		again := w.replica()
		w.now = again.Add(-tolerance)
		if w.replica(); !w.state().serving.Equal(before.serving) || len(w.state().bundle()) != len(before.bundle()) {
			t.Fatalf("%v: something was done before it was time", w.now)
		}
		w.now = again
		w.replica()
		if w.state().serving.Equal(before.serving) && len(w.state().bundle()) == len(before.bundle()) {
			t.Fatalf("%v: nothing was done when it was time", w.now)
		}
		w.leader()
	}
}

func TestUnpublishedAuthorityNeverSigns(t *testing.T) {
	w := newWorld(t)
	w.replica()
	w.leader()
	first := w.state().signing.cert
	w.now = due(first)
	for range 100 { // the leader is away
		w.replica()
		if w.now = w.now.Add(24 * time.Hour); !w.state().signing.cert.Equal(first) {
			t.Fatalf("%v: an authority signs that no API server was told of", w.now)
		}
	}
	if w.state().next.cert == nil {
		t.Fatal("no next authority although it is due")
	}
	w.leader()
	w.replica()
	if !w.state().signing.cert.Equal(first) {
		t.Error("an authority signs before every API server had time to trust it")
	}
	w.now = w.now.Add(w.rotation.grace + time.Second)
	w.replica()
	if w.state().signing.cert.Equal(first) {
		t.Error("the next authority does not sign although it is trusted")
	}
}

// Whatever becomes of the Secret, the next look makes something of it that serves; what can be continued without an interruption is.
func TestDamagedSecret(t *testing.T) {
	other := newWorld(t)
	other.replica()
	for _, test := range []struct {
		name     string
		damage   func(*corev1.Secret)
		survives bool // API servers go on trusting what is served
	}{
		{"nothing", func(*corev1.Secret) {}, true},
		{"empty", func(s *corev1.Secret) { s.Data = nil }, false},
		{"foreign", func(s *corev1.Secret) { s.Data = other.secret.DeepCopy().Data }, false},
		{"foreign authority", func(s *corev1.Secret) {
			s.Data[keyBundle], s.Data[keySigning] = other.secret.Data[keyBundle], other.secret.Data[keySigning]
		}, false},
		{"foreign key", func(s *corev1.Secret) { s.Data[keySigning] = other.secret.Data[keySigning] }, true},
		{"foreign bundle", func(s *corev1.Secret) { s.Data[keyBundle] = other.secret.Data[keyBundle] }, false},
		{"foreign bundle too", func(s *corev1.Secret) { s.Data[keyBundle] = append(s.Data[keyBundle], other.secret.Data[keyBundle]...) }, true},
		{"foreign certificate", func(s *corev1.Secret) { s.Data[corev1.TLSCertKey] = other.secret.Data[corev1.TLSCertKey] }, true},
		{"truncated certificate", func(s *corev1.Secret) { s.Data[corev1.TLSCertKey] = s.Data[corev1.TLSCertKey][:100] }, true},
		{"truncated key", func(s *corev1.Secret) { s.Data[corev1.TLSPrivateKeyKey] = s.Data[corev1.TLSPrivateKeyKey][:60] }, true},
		{"no key", func(s *corev1.Secret) { delete(s.Data, corev1.TLSPrivateKeyKey) }, true},
		{"no bundle", func(s *corev1.Secret) { delete(s.Data, keyBundle) }, false},
		{"no signing key", func(s *corev1.Secret) { delete(s.Data, keySigning) }, true},
		{"neither key", func(s *corev1.Secret) { delete(s.Data, keySigning); delete(s.Data, corev1.TLSPrivateKeyKey) }, false},
		{"nonsense", func(s *corev1.Secret) {
			for k := range s.Data {
				s.Data[k] = []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
			}
		}, false},
		{"nonsense besides", func(s *corev1.Secret) {
			s.Data[keyNext], s.Data[keyRetired], s.Data["extra"] = []byte("x"), []byte("y"), []byte("z")
		}, true},
		{"nonsense published", func(s *corev1.Secret) { s.Annotations = map[string]string{annotationPublished: "yes"} }, true},
		{"no label", func(s *corev1.Secret) { s.Labels = nil }, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			w.replica()
			w.leader()
			test.damage(w.secret)
			if !test.survives {
				w.served, w.trusted = nil, nil
			} else if test.name == "truncated key" || test.name == "no key" {
				w.served = nil // nobody can serve it any more
			}
			for range 5 {
				again := w.replica()
				w.leader()
				w.check()
				if s := w.state(); !s.serves(w.now) {
					t.Fatalf("%v: does not serve", w.now)
				}
				w.now = minTime(again, w.now.Add(time.Hour))
			}
			s, err := decode(w.secret, w.now)
			if err != nil || s.signing.key == nil || w.secret.Data["extra"] != nil {
				t.Errorf("not repaired: %v", err)
			}
		})
	}
}

func minTime(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

func TestNamesChange(t *testing.T) {
	w := newWorld(t)
	w.replica()
	w.leader()
	authority := w.state().signing.cert
	elsewhere := rotation{names: target{namespace: "net", url: "https://hooks.example.com"}.names(), grace: time.Minute}
	here := w.rotation
	changes := 0
	for i := range 10 { // two replicas that are reached by different names look in turn
		w.rotation = []rotation{here, elsewhere}[i%2]
		before := w.state().serving
		w.replica()
		if !w.state().serving.Equal(before) {
			changes++
		}
	}
	s := w.state()
	if changes != 1 || s.serving.VerifyHostname("hooks.example.com") != nil || s.serving.VerifyHostname("192.0.2.7") != nil || !s.signing.cert.Equal(authority) {
		t.Errorf("%d new certificates, the last for %v %v, want one for the names of both", changes, s.serving.DNSNames, s.serving.IPAddresses)
	}
	w.rotation = elsewhere
	w.now = due(s.serving)
	w.replica()
	if w.state().serving.VerifyHostname("192.0.2.7") == nil {
		t.Error("a name that nobody uses any more is kept for good")
	}
}

func TestExpiredAuthority(t *testing.T) {
	w := newWorld(t)
	w.replica()
	w.leader()
	w.now = w.state().signing.cert.NotAfter.Add(time.Hour) // the operator was off for years
	w.served, w.trusted = nil, nil
	w.replica()
	w.leader()
	w.check()
}

func FuzzDecode(f *testing.F) {
	w := newWorld(&testing.T{})
	w.replica()
	f.Add(w.secret.Data[corev1.TLSCertKey], w.secret.Data[corev1.TLSPrivateKeyKey], w.secret.Data[keyBundle], w.secret.Data[keySigning], []byte{}, []byte{}, "x/y")
	f.Fuzz(func(t *testing.T, cert, key, bundle, signing, next, retired []byte, published string) {
		secret := &corev1.Secret{Data: map[string][]byte{corev1.TLSCertKey: cert, corev1.TLSPrivateKeyKey: key, keyBundle: bundle, keySigning: signing, keyNext: next, keyRetired: retired}}
		secret.Annotations = map[string]string{annotationPublished: published}
		s, _ := decode(secret, start)
		s, _, _, err := w.rotation.next(s, start)
		if err != nil || !s.serves(start) {
			t.Errorf("does not serve: %v", err)
		}
	})
}
