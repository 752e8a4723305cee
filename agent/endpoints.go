package agent

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// proxyModes tells which proxy modes carry services now. Where kube-proxy has one mode per node, the agent has one per policy.
type proxyModes struct {
	now atomic.Pointer[string]
}

// publish takes over what a pass of the loop reports.
func (p *proxyModes) publish(r Report) {
	text := proxyModeOf(r.Modes)
	p.now.Store(&text)
}

// proxyModeOf gives the modes that forward services in kube-proxy's spelling (nftables, iptables, ipvs), sorted and separated by commas; none if there is none. So a node of which all services
// have one mode answers what kube-proxy would.
func proxyModeOf(modes []v1alpha1.NodeProxyMode) string {
	var carrying []string
	for _, m := range modes {
		if m.Services > 0 {
			carrying = append(carrying, strings.ToLower(string(m.Mode)))
		}
	}
	if len(carrying) == 0 {
		return "none"
	}
	slices.Sort(carrying)
	return strings.Join(carrying, ",")
}

func (p *proxyModes) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	text := "none"
	if now := p.now.Load(); now != nil {
		text = *now
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	fmt.Fprint(w, text) // no newline, as kube-proxy
}

// serving puts handlers by path together. Any other path is answered with the list of those that there are.
func serving(groups ...map[string]http.Handler) http.Handler {
	mux := http.NewServeMux()
	var there []string
	for _, handlers := range groups {
		for path, handler := range handlers {
			mux.Handle(path, handler)
			there = append(there, path)
		}
	}
	mux.HandleFunc("/", notThere(there))
	return mux
}

// notThere answers with the list of paths that there are.
func notThere(paths []string) http.HandlerFunc {
	there := strings.Join(slices.Sorted(slices.Values(paths)), " ")
	return func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, fmt.Sprintf("there is no %s here, there are: %s", r.URL.Path, there), http.StatusNotFound)
	}
}
