package healthport

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr/testr"
	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
)

var (
	web       = types.NamespacedName{Namespace: "shop", Name: "web"}
	localhost = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
)

// freePort is one that nobody listens at.
func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return netip.MustParseAddrPort(l.Addr().String()).Port()
}

type result struct {
	code   int
	weight string
	body
}

// probe asks as a load balancer does, with a connection of its own.
func probe(host string, port uint16) (out result, err error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(fmt.Sprintf("http://%s/", netip.AddrPortFrom(netip.MustParseAddr(host), port)))
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	out.code, out.weight = resp.StatusCode, resp.Header.Get("X-Load-Balancing-Endpoint-Weight")
	return out, json.NewDecoder(resp.Body).Decode(&out.body)
}

func expect(t *testing.T, port uint16, code, endpoints int, healthy bool) {
	t.Helper()
	got, err := probe("127.0.0.1", port)
	if err != nil {
		t.Fatal(err)
	}
	if got.code != code || got.LocalEndpoints != endpoints || got.ServiceProxyHealthy != healthy || got.weight != fmt.Sprint(endpoints) ||
		got.Service.Namespace != "shop" || got.Service.Name != "web" {
		t.Errorf("got %+v, want code %d, %d endpoints, healthy %v", got, code, endpoints, healthy)
	}
}

func TestServers(t *testing.T) {
	var healthy atomic.Bool
	healthy.Store(true)
	s := New(testr.New(t), healthy.Load)
	defer s.Close()
	port := freePort(t)
	s.Set(web, compile.HealthCheck{Port: port, Addresses: localhost, Endpoints: 2})
	expect(t, port, http.StatusOK, 2, true)
	s.Set(web, compile.HealthCheck{Port: port, Addresses: localhost, Endpoints: 0})
	expect(t, port, http.StatusServiceUnavailable, 0, true)
	s.Set(web, compile.HealthCheck{Port: port, Addresses: localhost, Endpoints: 1})
	healthy.Store(false)
	expect(t, port, http.StatusServiceUnavailable, 1, false)
	healthy.Store(true)

	other := freePort(t)
	s.Set(web, compile.HealthCheck{Port: other, Addresses: localhost, Endpoints: 1})
	expect(t, other, http.StatusOK, 1, true)
	if got, err := probe("127.0.0.1", port); err == nil {
		t.Errorf("the former port still answers: %+v", got)
	}
	s.Set(web, compile.HealthCheck{})
	if got, err := probe("127.0.0.1", other); err == nil {
		t.Errorf("the port of a Service without one answers: %+v", got)
	}
}

// TestAnswerLikeKubeProxy compares an answer with what pkg/proxy/healthcheck/service_health.go in v1.37 writes.
func TestAnswerLikeKubeProxy(t *testing.T) {
	for _, c := range []struct {
		endpoints int
		healthy   bool
		code      int
	}{{2, true, 200}, {0, true, 503}, {2, false, 503}, {0, false, 503}} {
		s := New(testr.New(t), func() bool { return c.healthy })
		v := &server{service: web, check: compile.HealthCheck{Endpoints: c.endpoints}}
		for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost} { // kube-proxy does not mind either, nor the path
			w := httptest.NewRecorder()
			s.handler(v).ServeHTTP(w, httptest.NewRequest(method, "/any/path", nil))
			theirs := fmt.Sprintf(`{"service":{"namespace":"shop","name":"web"},"localEndpoints":%d,"serviceProxyHealthy":%t}`, c.endpoints, c.healthy)
			if got := strings.TrimSpace(w.Body.String()); w.Code != c.code || got != theirs {
				t.Errorf("%s %+v: %d %s, want %s", method, c, w.Code, got, theirs)
			}
			header := w.Result().Header
			for name, want := range map[string]string{"Content-Type": "application/json", "X-Content-Type-Options": "nosniff", "X-Load-Balancing-Endpoint-Weight": fmt.Sprint(c.endpoints)} {
				if got := header.Get(name); got != want {
					t.Errorf("%s %+v: %s is %q, want %q", method, c, name, got, want)
				}
			}
		}
	}
}

func TestAddresses(t *testing.T) {
	s := New(testr.New(t), func() bool { return true })
	defer s.Close()
	port := freePort(t)
	s.Set(web, compile.HealthCheck{Port: port, Addresses: []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}, Endpoints: 1})
	if _, err := probe("127.0.0.2", port); err != nil {
		t.Errorf("at an address where it is served: %v", err)
	}
	if got, err := probe("127.0.0.1", port); err == nil {
		t.Errorf("at another address: %+v", got)
	}
	s.Set(web, compile.HealthCheck{Port: port, Addresses: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, Endpoints: 1})
	if got, err := probe("127.0.0.1", port); err == nil {
		t.Errorf("at loopback, which is no part of all addresses: %+v", got)
	}
	s.Set(web, compile.HealthCheck{Port: port, Addresses: append(localhost, netip.MustParsePrefix("0.0.0.0/0")), Endpoints: 1})
	if _, err := probe("127.0.0.1", port); err != nil {
		t.Errorf("at loopback, which is listed: %v", err)
	}
}

// A port that somebody else has is served as soon as that one lets go of it.
func TestPortInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(testr.New(t), func() bool { return true })
		tries := 0
		s.listen = func(uint16) (net.Listener, error) {
			if tries++; tries < 3 {
				return nil, fmt.Errorf("try %d: in use", tries)
			}
			return pipe{make(chan struct{})}, nil
		}
		s.Set(web, compile.HealthCheck{Port: 1, Addresses: localhost, Endpoints: 1})
		for range 2 {
			<-time.After(retryListen)
			synctest.Wait()
		}
		if tries != 3 {
			t.Errorf("%d tries in %v, want 3", tries, 2*retryListen)
		}
		s.Close()
	})
}

// pipe is a listener to which nobody connects.
type pipe struct{ closed chan struct{} }

func (p pipe) Accept() (net.Conn, error) { <-p.closed; return nil, net.ErrClosed }
func (p pipe) Close() error              { close(p.closed); return nil }
func (p pipe) Addr() net.Addr            { return &net.TCPAddr{} }
