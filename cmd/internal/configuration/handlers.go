package configuration

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/pprof"
	"slices"
	"strings"
)

// Handlers gives what is served beside metrics, by path: /configz, the configuration in force as {"KIND": {...}} as programs of Kubernetes give theirs, with how it stands to its file; and
// /debug/pprof/, as long as profiling says so.
func (l *Live[C]) Handlers(profiling func(C) bool) map[string]http.Handler {
	enabled := func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return profiling(l.running)
	}
	return map[string]http.Handler{
		"/configz":      http.HandlerFunc(l.configz),
		"/debug/pprof/": onlyIf(enabled, profiles()),
	}
}

// WithIndex adds an answer to every path that none of the handlers has: the list of those that there are, together with other ones.
func WithIndex(handlers map[string]http.Handler, others ...string) map[string]http.Handler {
	there := slices.Sorted(maps.Keys(handlers))
	there = append(there, others...)
	slices.Sort(there)
	all := maps.Clone(handlers)
	all["/"] = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, fmt.Sprintf("there is no %s here, there are: %s", r.URL.Path, strings.Join(there, " ")), http.StatusNotFound)
	})
	return all
}

func (l *Live[C]) configz(w http.ResponseWriter, _ *http.Request) {
	l.mu.Lock()
	body, err := json.Marshal(map[string]any{strings.ToLower(l.program.Kind): l.running, "source": l.state})
	l.mu.Unlock()
	if err != nil {
		http.Error(w, fmt.Sprintf("write the configuration as JSON: %v", err), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_, _ = w.Write(body) // nothing can be done about a client that is gone
}

// profiles serves Go's profiles below /debug/pprof/.
func profiles() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}

func onlyIf(enabled func() bool, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !enabled() {
			http.Error(w, "profiles are served only with enableProfiling: true in the configuration", http.StatusNotFound)
			return
		}
		h.ServeHTTP(w, r)
	})
}
