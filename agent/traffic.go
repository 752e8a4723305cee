package agent

import (
	"bufio"
	"compress/gzip"
	"context"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// trafficMetrics serves what was forwarded for each Service, in Prometheus' text format. It has a path of its own, because there are five series for each
// service port that this node has forwarded anything for. They are written by hand: the client library would make every series an object at each scrape.
type trafficMetrics struct {
	mu       sync.Mutex
	counters []backend.TrafficCounter
}

// add takes the figures of a backend in, if it counts.
func (t *trafficMetrics) add(b backend.Backend) {
	if counter, ok := b.(backend.TrafficCounter); ok {
		t.mu.Lock()
		t.counters = append(t.counters, counter)
		t.mu.Unlock()
	}
}

// read gives what all backends forwarded, sorted by service.
func (t *trafficMetrics) read(ctx context.Context) ([]backend.Traffic, error) {
	t.mu.Lock()
	counters := slices.Clone(t.counters)
	t.mu.Unlock()
	sum := map[forwarding.ServiceKey]backend.Traffic{}
	for _, c := range counters {
		list, err := c.Traffic(ctx)
		if err != nil {
			return nil, err
		}
		for _, one := range list {
			was := sum[one.Service]
			one.Connections += was.Connections
			one.Original, one.Reply = one.Original.Add(was.Original), one.Reply.Add(was.Reply)
			sum[one.Service] = one
		}
	}
	return slices.SortedFunc(maps.Values(sum), func(a, b backend.Traffic) int { return a.Service.Compare(b.Service) }), nil
}

func (t *trafficMetrics) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	list, err := t.read(r.Context())
	if err != nil {
		http.Error(w, "could not read the counters of the kernel: "+err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	out := io.Writer(w)
	if strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		w.Header().Set("Content-Encoding", "gzip")
		z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed) // the level is valid
		defer z.Close()
		out = z
	}
	// If it fails, there is nobody left to tell.
	_ = writeTraffic(bufio.NewWriterSize(out, 64<<10), list)
}

// trafficFamilies are the metrics of a service: each gives its series, by direction if it has any.
var trafficFamilies = []struct {
	name, help string
	directed   bool
	value      func(t backend.Traffic, v backend.Volume) uint64
}{
	{"serviceproxy_service_connections_total", "Connections (of UDP: flows) that this node translated for the Service.", false,
		func(t backend.Traffic, _ backend.Volume) uint64 { return t.Connections }},
	{"serviceproxy_service_packets_total", "Packets that this node forwarded for the Service: original from clients to endpoints, reply from endpoints to clients.", true,
		func(_ backend.Traffic, v backend.Volume) uint64 { return v.Packets }},
	{"serviceproxy_service_bytes_total", "Bytes, with network headers, of the packets that this node forwarded for the Service: original from clients to endpoints, reply from endpoints to clients.", true,
		func(_ backend.Traffic, v backend.Volume) uint64 { return v.Bytes }},
}

// writeTraffic writes the series. Namespaces and names of Services have nothing to escape.
func writeTraffic(w *bufio.Writer, list []backend.Traffic) error {
	var line []byte
	for _, f := range trafficFamilies {
		line = append(line, "# HELP "+f.name+" "+f.help+"\n# TYPE "+f.name+" counter\n"...)
		for _, t := range list {
			if f.directed {
				line = appendSeries(line, f.name, t.Service, "original", f.value(t, t.Original))
				line = appendSeries(line, f.name, t.Service, "reply", f.value(t, t.Reply))
			} else {
				line = appendSeries(line, f.name, t.Service, "", f.value(t, backend.Volume{}))
			}
			if _, err := w.Write(line); err != nil {
				return err
			}
			line = line[:0]
		}
	}
	if _, err := w.Write(line); err != nil {
		return err
	}
	return w.Flush()
}

// appendSeries appends one line; a direction of "" is left out.
func appendSeries(line []byte, name string, k forwarding.ServiceKey, direction string, value uint64) []byte {
	line = append(line, name...)
	line = append(append(line, `{namespace="`...), k.Namespace...)
	line = append(append(line, `",service="`...), k.Name...)
	line = strconv.AppendUint(append(line, `",port="`...), uint64(k.Port), 10)
	line = append(append(line, `",protocol="`...), k.Protocol.String()...)
	if direction != "" {
		line = append(append(line, `",direction="`...), direction...)
	}
	line = strconv.AppendUint(append(line, `"} `...), value, 10)
	return append(line, '\n')
}
