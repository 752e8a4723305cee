package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	watchtools "k8s.io/client-go/tools/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/audit"
	"github.com/serviceproxy/serviceproxy-operator/test/kubeapi"
	"github.com/serviceproxy/serviceproxy-operator/test/relay"
)

// controllerNamespace is where the replicas keep their Lease and certificate.
const controllerNamespace = "serviceproxy-system"

// racers is how many clients create Services at a time.
const racers = 50

// race is an API server, and two controllers that answer its webhook at one address, as the replicas of a Deployment behind a Service do.
type race struct {
	*GomegaWithT
	*testing.T
	ctx      context.Context
	server   *kubeapi.Server
	webhook  *relay.Relay
	replicas []*replica
	tenants  []audit.Tenant
	trail    audit.Trail
}

// replica is one controller, that is started again when it ends, as a kubelet does.
type replica struct {
	args    []string
	api     *relay.Relay  // between it and the API server
	webhook *relay.Target // itself
	probe   string        // URL

	mu      sync.Mutex
	process *os.Process
	ended   chan struct{} // closed when process has ended
	stopped bool
	log     bytes.Buffer // of all its processes
}

func newRace(t *testing.T) *race {
	t.Helper()
	r := &race{GomegaWithT: NewWithT(t), T: t, ctx: t.Context()}
	var err error
	r.server, err = kubeapi.Start(map[string]string{
		"service-cluster-ip-range": "10.96.0.0/16,fd00:96::/112", "service-node-port-range": "20000-32767",
	})
	r.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() {
		if t.Failed() {
			for text, times := range r.server.Warnings() {
				t.Logf("%d times the API server warned: %s", times, text)
			}
		}
		NewWithT(t).Expect(r.server.Stop()).To(Succeed())
	})
	r.namespace(controllerNamespace)
	addresses := freeAddresses(t, 4)
	r.webhook, err = relay.New(addresses[:2]...)
	r.Expect(err).NotTo(HaveOccurred())
	t.Cleanup(func() { r.webhook.Close() })
	for i := range 2 {
		r.replicas = append(r.replicas, r.newReplica(i, addresses[i], addresses[2+i]))
	}
	// The first is the leader: the second starts only when the first holds the Lease.
	r.replicas[0].start()
	r.Eventually(func() (string, error) {
		var lease coordinationv1.Lease
		if err := r.server.Client.Get(r.ctx, client.ObjectKey{Namespace: controllerNamespace, Name: "serviceproxy-controller"}, &lease); err != nil {
			return "", client.IgnoreNotFound(err)
		}
		return *lease.Spec.HolderIdentity, nil
	}).WithTimeout(time.Minute).WithPolling(50 * time.Millisecond).ShouldNot(BeEmpty())
	r.replicas[1].start()
	for _, p := range r.replicas {
		r.Eventually(p.ready).WithArguments(r.ctx).WithTimeout(time.Minute).WithPolling(250 * time.Millisecond).Should(BeTrue())
	}
	r.follow()
	return r
}

func (r *race) newReplica(i int, webhook, probe string) *replica {
	api, err := relay.New(r.server.Address())
	r.Expect(err).NotTo(HaveOccurred())
	r.Cleanup(func() { api.Close() })
	kubeconfig := filepath.Join(r.TempDir(), fmt.Sprintf("replica-%d", i))
	r.Expect(r.server.WriteKubeconfig(kubeconfig, api.Address())).To(Succeed())
	p := &replica{api: api, webhook: r.webhook.Target(i), probe: "http://" + probe + "/readyz", args: []string{
		"--kubeconfig=" + kubeconfig, "--leader-elect", "--namespace=" + controllerNamespace, "--metrics-bind-address=0", "--health-probe-bind-address=" + probe,
		"--webhook-bind-address=" + webhook, "--webhook-url=https://" + r.webhook.Address()}}
	r.Cleanup(func() {
		p.stop()
		if r.Failed() {
			path := filepath.Join(r.ArtifactDir(), fmt.Sprintf("replica-%d.log", i)) // kept by go test -artifacts
			r.Expect(os.WriteFile(path, p.log.Bytes(), 0o600)).To(Succeed())
			r.Logf("the end of what replica %d logged (all of it: %s):\n%s", i, path, tail(p.log.String(), 40))
		}
	})
	probing, stop := context.WithCancel(r.ctx)
	done := make(chan struct{})
	go func() { defer close(done); p.probeUntil(probing) }()
	r.Cleanup(func() { stop(); <-done })
	return p
}

func tail(text string, lines int) string {
	all := strings.Split(text, "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// freeAddresses finds ports of the loopback address that nobody listens on.
func freeAddresses(t *testing.T, n int) (out []string) {
	t.Helper()
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() // only at the end, so that no port is found twice
		out = append(out, l.Addr().String())
	}
	return out
}

// start starts a process, and another one whenever it ends by itself.
func (p *replica) start() {
	p.mu.Lock()
	defer p.mu.Unlock()
	cmd := exec.Command(os.Args[0], p.args...)
	cmd.Env = append(os.Environ(), asController+"=1")
	cmd.Stdout, cmd.Stderr = &p.log, &p.log
	if err := cmd.Start(); err != nil {
		panic(err) // this very program cannot be started
	}
	p.process, p.ended, p.stopped = cmd.Process, make(chan struct{}), false
	go func(ended chan struct{}) {
		_ = cmd.Wait() // why it ended is in its log
		close(ended)
		p.mu.Lock()
		again := !p.stopped
		p.mu.Unlock()
		if again {
			p.start()
		}
	}(p.ended)
}

// stop kills the process. It returns when it has ended.
func (p *replica) stop() {
	p.mu.Lock()
	if p.stopped || p.process == nil {
		p.mu.Unlock()
		return
	}
	p.stopped = true
	_ = p.process.Kill() // unless it has just ended by itself
	ended := p.ended
	p.mu.Unlock()
	<-ended
}

func (p *replica) signal(s syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.process.Signal(s)
}

func (p *replica) ready(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.probe, nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// probeUntil plays a kubelet's readiness probe: three failures in a row take a replica out of the Service.
func (p *replica) probeUntil(ctx context.Context) {
	for failures := 0; ctx.Err() == nil; {
		if failures++; p.ready(ctx) {
			failures = 0
		}
		p.webhook.SetReady(failures < 3)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// follow shows every change of a claim to the trail, for as long as the test runs.
func (r *race) follow() {
	var claims v1alpha1.AllocationClaimList
	r.Expect(r.server.Client.List(r.ctx, &claims)).To(Succeed())
	r.Expect(claims.Items).To(BeEmpty())
	// The API server ends watches when it likes: one of a CRD that is new soon.
	w, err := watchtools.NewRetryWatcherWithContext(r.ctx, claims.ResourceVersion, watcher(func(o metav1.ListOptions) (watch.Interface, error) {
		return r.server.Client.Watch(r.ctx, &v1alpha1.AllocationClaimList{}, &client.ListOptions{Raw: &o})
	}))
	r.Expect(err).NotTo(HaveOccurred())
	r.Cleanup(w.Stop)
	go func() {
		for event := range w.ResultChan() {
			if claim, ok := event.Object.(*v1alpha1.AllocationClaim); ok {
				r.trail.See(event.Type, claim)
			} else if r.ctx.Err() == nil {
				r.Errorf("the watch of claims: %v", event.Object)
			}
		}
	}()
}

// watcher watches from where the options say.
type watcher func(metav1.ListOptions) (watch.Interface, error)

func (w watcher) WatchWithContext(_ context.Context, o metav1.ListOptions) (watch.Interface, error) {
	return w(o)
}

func (r *race) namespace(name string) {
	r.Expect(r.server.Client.Create(r.ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"tenant": name}}})).To(Succeed())
}

// tenant makes the next tenant: a namespace, and a policy with a /22, an IPv6 range, and 1 200 node ports of its own.
func (r *race) tenant(name string, change func(*v1alpha1.ServiceProxyPolicySpec)) audit.Tenant {
	r.Helper()
	r.namespace(name)
	n := len(r.tenants)
	first := uint16(20000 + 1200*n)
	t := audit.Tenant{Namespace: name, Policy: name, Ports: [2]uint16{first, first + 1199},
		Prefixes: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 99, byte(4 * n), 0}), 22), netip.MustParsePrefix(fmt.Sprintf("fd00:99:0:%x::/112", n))}}
	p := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}}
	p.Spec.NamespaceSelector = metav1.LabelSelector{MatchLabels: map[string]string{"tenant": name}}
	p.Spec.NodePortRange = &v1alpha1.NodePortRange{Start: int32(t.Ports[0]), End: int32(t.Ports[1])}
	for _, prefix := range t.Prefixes {
		p.Spec.ServiceRanges = append(p.Spec.ServiceRanges, v1alpha1.ServiceRange{CIDR: prefix.String()})
	}
	if change != nil {
		change(&p.Spec)
	}
	r.Expect(r.server.Client.Create(r.ctx, p)).To(Succeed())
	r.tenants = append(r.tenants, t)
	return t
}

// answers waits until every tenant's ranges are ready, and the webhook chooses from them.
func (r *race) answers() {
	r.Helper()
	for _, t := range r.tenants {
		r.Eventually(func() (bool, error) {
			var p v1alpha1.ServiceProxyPolicy
			err := r.server.Client.Get(r.ctx, client.ObjectKey{Name: t.Policy}, &p)
			return apimeta.IsStatusConditionTrue(p.Status.Conditions, v1alpha1.PolicyRangesReady), err
		}).WithTimeout(time.Minute).WithPolling(100 * time.Millisecond).Should(BeTrue())
		r.Eventually(func() (bool, error) {
			svc := newService(t, 0)
			svc.Name = "probe"
			if err := r.server.Client.Create(r.ctx, svc); err != nil {
				return false, err
			}
			return svc.Annotations[v1alpha1.AnnotationReservation] != "" && t.Prefixes[0].Contains(netip.MustParseAddr(svc.Spec.ClusterIP)), r.delete(svc)
		}).WithTimeout(30*time.Second).WithPolling(100*time.Millisecond).Should(BeTrue(), "admission chooses for "+t.Namespace)
	}
}
