// Package healthport serves the health-check node ports of Services: where an external load balancer asks whether a node has endpoints of a Service with
// external traffic policy Local, so that it sends traffic to those only.
package healthport

import (
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/agent/compile"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// retryListen is how long a port that is in use is left alone before it is tried again. It is short because kube-proxy lets go of the port of a Service that is taken over
// from it, and load balancers ask there every few seconds.
const retryListen = 500 * time.Millisecond

// Servers serves the health-check node ports of all Services. Its methods may be called concurrently.
type Servers struct {
	log     logr.Logger
	healthy func() bool
	listen  func(port uint16) (net.Listener, error)

	mu      sync.Mutex
	closed  bool
	servers map[types.NamespacedName]*server
}

// New makes Servers. healthy says whether the node's proxy is up to date: while it is not, no Service is reported to have endpoints here.
func New(log logr.Logger, healthy func() bool) *Servers {
	listen := func(port uint16) (net.Listener, error) { return net.Listen("tcp", ":"+strconv.Itoa(int(port))) }
	return &Servers{log: log, healthy: healthy, listen: listen, servers: map[types.NamespacedName]*server{}}
}

// server is the port of one Service. All fields but service belong to Servers' mutex.
type server struct {
	service  types.NamespacedName
	check    compile.HealthCheck
	listener net.Listener
	http     *http.Server
	retry    *time.Timer // set while the port could not be had
}

// Set makes a Service's port answer from check; without a port it is not served any more. It does not wait for anything.
func (s *Servers) Set(service types.NamespacedName, check compile.HealthCheck) {
	s.mu.Lock()
	defer s.mu.Unlock()
	have := s.servers[service]
	if s.closed || have == nil && check.Port == 0 || have != nil && have.check.Equal(check) {
		return
	}
	if have != nil && have.check.Port == check.Port {
		have.check = check
		return
	}
	if have != nil {
		s.stop(have)
	}
	if check.Port == 0 {
		delete(s.servers, service)
		return
	}
	have = &server{service: service, check: check}
	s.servers[service] = have
	s.start(have)
}

// start listens, or sees to it that it is tried again. Callers hold mu.
func (s *Servers) start(v *server) {
	listener, err := s.listen(v.check.Port)
	if err != nil {
		if v.retry == nil { // else it was said
			s.log.Error(err, "A health-check node port cannot be served, so load balancers send this node nothing for the Service; trying again",
				"service", v.service.String(), "port", v.check.Port, "every", retryListen)
		}
		v.retry = time.AfterFunc(retryListen, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.servers[v.service] == v && !s.closed {
				s.start(v)
			}
		})
		return
	}
	v.listener, v.retry = listener, nil
	v.http = &http.Server{Handler: s.handler(v), ReadHeaderTimeout: 10 * time.Second}
	go func(serving *http.Server) {
		if err := serving.Serve(at{listener, s.servedAt(v)}); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error(err, "A health-check node port is not served any more", "service", v.service.String())
		}
	}(v.http)
}

// stop closes the port. Callers hold mu.
func (s *Servers) stop(v *server) {
	if v.retry != nil {
		v.retry.Stop()
	}
	if v.http != nil {
		// Probes are short: there is nothing to wait for.
		_ = v.http.Close()
	}
}

// Close ends all.
func (s *Servers) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, v := range s.servers {
		s.stop(v)
	}
}

// servedAt says whether a port is served at one of the node's addresses.
func (s *Servers) servedAt(v *server) func(netip.Addr) bool {
	return func(a netip.Addr) bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return forwarding.NodePortAt(v.check.Addresses, a)
	}
}

// at is a listener on every address that hangs up on connections to addresses where the port is not served. Listening at each address by itself would mean
// to follow the node's addresses.
type at struct {
	net.Listener
	served func(netip.Addr) bool
}

func (l at) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if to, err := netip.ParseAddrPort(c.LocalAddr().String()); err == nil && l.served(to.Addr().Unmap().WithZone("")) {
			return c, nil
		}
		_ = c.Close() // it was not meant for us
	}
}

// body is kube-proxy's, which load balancers' operators know.
type body struct {
	Service struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
	} `json:"service"`
	LocalEndpoints      int  `json:"localEndpoints"`
	ServiceProxyHealthy bool `json:"serviceProxyHealthy"`
}

// handler answers 200 if the Service has ready endpoints here and the node's proxy is up to date, else 503.
func (s *Servers) handler(v *server) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		b := body{ServiceProxyHealthy: s.healthy()}
		b.Service.Namespace, b.Service.Name = v.service.Namespace, v.service.Name
		s.mu.Lock()
		b.LocalEndpoints = v.check.Endpoints
		s.mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(b.LocalEndpoints))
		if b.LocalEndpoints == 0 || !b.ServiceProxyHealthy {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		// Nothing can be done about a prober that is gone before its answer.
		_ = json.NewEncoder(w).Encode(b)
	})
}
