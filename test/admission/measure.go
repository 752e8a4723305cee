package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
)

// latencies are sorted.
type latencies []time.Duration

func (l latencies) quantile(q float64) time.Duration {
	return l[min(len(l)-1, int(q*float64(len(l))))]
}

// measure creates Services in the namespace at the steady rate.
func (w *world) measure(ctx context.Context, namespace string, webhook bool) (*phase, error) {
	services := make([]*corev1.Service, int(w.during.Seconds()*float64(w.rate)))
	for i := range services {
		services[i] = w.newService(namespace)
	}
	var r phase
	before, err := w.counters(ctx, webhook)
	if err != nil {
		return nil, err
	}
	if r.created, r.late, err = w.create(ctx, services); err != nil {
		return nil, err
	}
	if webhook {
		if err := w.settled(ctx, w.services+len(services)); err != nil {
			return nil, err
		}
	}
	after, err := w.counters(ctx, webhook)
	if err != nil {
		return nil, err
	}
	r.apiServer, r.own = after.apiServer-before.apiServer, after.controller-before.controller
	r.hook, r.handler = after.hook.minus(before.hook), after.handler.minus(before.handler)
	return &r, nil
}

// create sends each request when it is due, whether or not those before are answered.
func (w *world) create(ctx context.Context, services []*corev1.Service) (took latencies, late time.Duration, err error) {
	took = make(latencies, len(services))
	errs := make([]error, len(services))
	var wg sync.WaitGroup
	start := time.Now()
	for i, svc := range services {
		due := start.Add(time.Duration(i) * time.Second / time.Duration(w.rate))
		select {
		case <-ctx.Done():
			return nil, 0, context.Cause(ctx)
		case <-time.After(time.Until(due)):
		}
		late = max(late, time.Since(due))
		wg.Go(func() {
			errs[i] = w.server.Client.Create(ctx, svc)
			took[i] = time.Since(due)
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return nil, 0, fmt.Errorf("create a Service: %w", err)
		}
	}
	slices.Sort(took)
	return took, late, nil
}

// counters are what grows while Services are created.
type counters struct {
	apiServer, controller time.Duration // CPU time
	hook, handler         histogram
}

func (w *world) counters(ctx context.Context, webhook bool) (c counters, err error) {
	for _, pid := range children() {
		name, err := os.ReadFile("/proc/" + pid + "/comm")
		if err != nil {
			continue // it has just ended
		}
		used, err := cpuOf(pid)
		if err != nil {
			return c, err
		}
		switch command := strings.TrimSpace(string(name)); {
		case command == "kube-apiserver", command == "etcd":
			c.apiServer += used
		case pid == strconv.Itoa(w.controller.Process.Pid):
			c.controller += used
		}
	}
	if !webhook {
		return c, nil
	}
	httpClient, err := rest.HTTPClientFor(w.server.Config)
	if err != nil {
		return c, err
	}
	if c.hook, err = scrape(ctx, httpClient, "https://"+w.server.Address()+"/metrics", "apiserver_admission_webhook_admission_duration_seconds",
		map[string]string{"operation": "CREATE", "type": "admit"}); err != nil {
		return c, err
	}
	c.handler, err = scrape(ctx, http.DefaultClient, "http://"+w.metrics+"/metrics", "serviceproxy_admission_duration_seconds", map[string]string{"operation": "CREATE"})
	return c, err
}

// children are the process ids of the processes that this one started.
func children() (pids []string) {
	tasks, _ := filepath.Glob("/proc/self/task/*/children") // the pattern is well formed
	for _, task := range tasks {
		if b, err := os.ReadFile(task); err == nil {
			pids = append(pids, strings.Fields(string(b))...)
		}
	}
	return pids
}

// cpuOf is the user and system time of a process, in ticks of 10 ms.
func cpuOf(pid string) (time.Duration, error) {
	b, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), ") ") // the command's name may hold blanks
	return ticks(strings.Fields(rest)[11:13])
}

func ticks(fields []string) (sum time.Duration, err error) {
	for _, f := range fields {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, err
		}
		sum += time.Duration(n) * (time.Second / 100) // USER_HZ is 100 wherever Go runs on Linux
	}
	return sum, nil
}

// busyCores is how many of the machine's CPUs were busy during a second, with whatever else it does.
func busyCores() float64 {
	read := func() (busy time.Duration) {
		b, err := os.ReadFile("/proc/stat")
		if err != nil {
			return 0
		}
		first, _, _ := strings.Cut(string(b), "\n")
		fields := strings.Fields(first)[1:]
		busy, err = ticks(append(fields[:3:3], fields[5:8]...)) // all but idle and iowait
		if err != nil {
			return 0
		}
		return busy
	}
	before := read()
	time.Sleep(time.Second)
	return (read() - before).Seconds()
}

// histogram is how many requests took at most how long, in the order of the bounds.
type histogram []bucket

type bucket struct {
	atMost float64 // seconds; +Inf at last
	count  uint64
}

// scrape adds up the histograms of that name that have all the labels. It is empty if there is none yet.
func scrape(ctx context.Context, from *http.Client, url, name string, labels map[string]string) (histogram, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := from.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", url, err)
	}
	var out histogram
	for _, m := range families[name].GetMetric() {
		matching := 0
		for _, l := range m.GetLabel() {
			if labels[l.GetName()] == l.GetValue() && l.GetValue() != "" {
				matching++
			}
		}
		if matching == len(labels) {
			out = out.plus(m.GetHistogram())
		}
	}
	return out, nil
}

func (h histogram) plus(m *dto.Histogram) histogram {
	if h == nil {
		h = make(histogram, len(m.GetBucket()))
	}
	for i, b := range m.GetBucket() {
		h[i].atMost = b.GetUpperBound()
		h[i].count += b.GetCumulativeCount()
	}
	return h
}

func (h histogram) minus(before histogram) histogram {
	out := slices.Clone(h)
	for i := range before {
		out[i].count -= before[i].count
	}
	return out
}

// quantile is the bound of the bucket in which the quantile lies.
func (h histogram) quantile(q float64) string {
	if len(h) == 0 || h[len(h)-1].count == 0 {
		return "unknown"
	}
	rank := uint64(q * float64(h[len(h)-1].count))
	for i, b := range h {
		if b.count >= rank {
			if i == len(h)-1 {
				return fmt.Sprintf("> %s", ms(time.Duration(h[i-1].atMost*1e9)))
			}
			return fmt.Sprintf("≤ %s", ms(time.Duration(b.atMost*1e9)))
		}
	}
	return "unknown"
}
