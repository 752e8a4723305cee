package agent

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

func ask(h http.Handler, path string) (int, string) {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Code, w.Body.String()
}

func TestProxyMode(t *testing.T) {
	p := &proxyModes{}
	if code, body := ask(p, "/proxyMode"); code != http.StatusOK || body != "none" {
		t.Errorf("before the first pass: %d %q", code, body)
	}
	for _, tt := range []struct {
		services map[v1alpha1.ProxyMode]int32
		want     string
	}{
		{map[v1alpha1.ProxyMode]int32{v1alpha1.ProxyModeNFTables: 3, v1alpha1.ProxyModeIPVS: 0}, "nftables"},
		{map[v1alpha1.ProxyMode]int32{v1alpha1.ProxyModeNFTables: 3, v1alpha1.ProxyModeIPTables: 1}, "iptables,nftables"},
		{map[v1alpha1.ProxyMode]int32{v1alpha1.ProxyModeNFTables: 0}, "none"},
	} {
		var r Report
		for mode, n := range tt.services {
			r.Modes = append(r.Modes, v1alpha1.NodeProxyMode{Mode: mode, Available: true, Services: n})
		}
		p.publish(r)
		if _, body := ask(p, "/proxyMode"); body != tt.want {
			t.Errorf("%v: %q, want %q", tt.services, body, tt.want)
		}
	}
}

func TestWhatIsNotServedNamesWhatIs(t *testing.T) {
	h := serving(map[string]http.Handler{"/proxyMode": &proxyModes{}, "/configz": http.NotFoundHandler()})
	if code, body := ask(h, "/proxymode"); code != http.StatusNotFound || !strings.Contains(body, "/proxymode") || !strings.Contains(body, "/configz /proxyMode") {
		t.Errorf("got %d %q", code, body)
	}
	if code, body := ask((&health{}).handler(), "/health"); code != http.StatusNotFound || !strings.Contains(body, "/healthz /livez /readyz") {
		t.Errorf("got %d %q", code, body)
	}
	if code, _ := ask(h, "/proxyMode"); code != http.StatusOK {
		t.Errorf("got %d", code)
	}
}
