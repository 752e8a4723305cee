package main

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/audit"
)

// static is how many Services of a load ask for particular addresses, and how many for particular node ports. They come early, and ask for what is given
// out unasked only when nothing else is left.
const static = 30

// newService is the i-th Service of a load. All kinds come in turn; ten of them take ten IPv4 addresses and twelve node ports.
func newService(t audit.Tenant, i int) *corev1.Service {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: t.Namespace, Name: fmt.Sprintf("web-%04d", i)},
		Spec: corev1.ServiceSpec{Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Name: "http", Port: 80}}}}
	s := &svc.Spec
	switch i % 10 {
	case 0:
		s.Type, s.Ports = corev1.ServiceTypeNodePort, append(s.Ports, corev1.ServicePort{Name: "metrics", Port: 9090}, corev1.ServicePort{Name: "https", Port: 443})
	case 1:
		s.Type = corev1.ServiceTypeNodePort
	case 2: // one node port serves both
		s.Type, s.Ports = corev1.ServiceTypeNodePort, []corev1.ServicePort{{Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP}, {Name: "dns-tcp", Port: 53}}
	case 3:
		s.IPFamilyPolicy = new(corev1.IPFamilyPolicyPreferDualStack)
	case 4:
		svc.Name, svc.GenerateName = "", "generated-"
	case 5:
		if i/10 < static && t.Policy != "" {
			s.ClusterIP = nth(t.Prefixes[0].Addr(), 1+i/10).String()
		}
	case 6:
		s.Type, s.Ports = corev1.ServiceTypeNodePort, append(s.Ports, corev1.ServicePort{Name: "https", Port: 443})
	case 7:
		s.Type, s.IPFamilyPolicy = corev1.ServiceTypeNodePort, new(corev1.IPFamilyPolicyRequireDualStack)
	case 8: // a node port, and one for health checks
		s.Type, s.ExternalTrafficPolicy = corev1.ServiceTypeLoadBalancer, corev1.ServiceExternalTrafficPolicyLocal
	case 9:
		s.Type = corev1.ServiceTypeNodePort
		if i/10 < static && t.Policy != "" {
			s.Ports[0].NodePort = int32(t.Ports[0]) + int32(i/10)
		}
	}
	return svc
}

func nth(a netip.Addr, n int) netip.Addr {
	for range n {
		a = a.Next()
	}
	return a
}

// outcome is what became of a load.
type outcome struct {
	mu       sync.Mutex
	made     []*corev1.Service
	refused  []error // the API server would not give what admission chose. The client tried again.
	unserved int     // nobody answered in time, or no replica could reach the API server, and the policy is Strict. The client tried again.
	failed   []error // anything else, which the client took for an answer
	slowest  time.Duration
}

func (o *outcome) String() string {
	return fmt.Sprintf("%d made, %d refused, %d unserved, %d failed, the slowest took %s", len(o.made), len(o.refused), o.unserved, len(o.failed), o.slowest.Round(time.Millisecond))
}

// note takes the answer to one request, and says whether the client should try again.
func (o *outcome) note(svc *corev1.Service, took time.Duration, err error) (again bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.slowest = max(o.slowest, took)
	switch {
	case err == nil:
		o.made = append(o.made, svc)
	case apierrors.IsInvalid(err), alreadyAllocated.MatchString(err.Error()): // for a health-check node port it is a 500
		o.refused = append(o.refused, err)
		return true
	case apierrors.IsServiceUnavailable(err), apierrors.IsTimeout(err), apierrors.IsInternalError(err) && strings.Contains(err.Error(), "failed calling webhook"):
		o.unserved++
		return true
	default:
		o.failed = append(o.failed, fmt.Errorf("%s%s: %w", svc.Name, svc.GenerateName, err))
	}
	return false
}

// create makes a Service, as a client does that tries again when that may help.
func (r *race) create(svc *corev1.Service, out *outcome) {
	const attempts = 30
	timedOut := false
	for range attempts {
		attempt := svc.DeepCopy()
		start := time.Now()
		err := r.server.Client.Create(r.ctx, attempt)
		if timedOut && apierrors.IsAlreadyExists(err) { // it was made after all
			err = r.server.Client.Get(r.ctx, client.ObjectKeyFromObject(svc), attempt)
		}
		timedOut = timedOut || apierrors.IsTimeout(err)
		if !out.note(attempt, time.Since(start), err) {
			return
		}
		if alreadyAllocated.MatchString(err.Error()) && (svc.Spec.ClusterIP != "" || svc.Spec.Ports[0].NodePort != 0) {
			return // no use: the client wants this one and no other
		}
	}
	out.note(svc, 0, errors.New("not made in "+strconv.Itoa(attempts)+" attempts"))
}

// delete deletes a Service; from now on its claims may go.
func (r *race) delete(svc *corev1.Service) error {
	r.trail.Ending(svc.UID)
	return r.server.Client.Delete(r.ctx, svc, client.Preconditions{UID: &svc.UID})
}

// load has racers do count things at once. before is called in order with the number of each, and may slow them down or break something.
func load(count int, before func(i int), do func(i int)) {
	todo := make(chan int)
	var workers sync.WaitGroup
	for range racers {
		workers.Go(func() {
			for i := range todo {
				do(i)
			}
		})
	}
	for i := range count {
		before(i)
		todo <- i
	}
	close(todo)
	workers.Wait()
}

// creates makes the tenant's Services from first on.
func (r *race) creates(t audit.Tenant, first, count int, before func(i int)) *outcome {
	r.Helper()
	var out outcome
	start := time.Now()
	load(count, before, func(i int) { r.create(newService(t, first+i), &out) })
	r.Logf("%s: %d creates in %s: %s", t.Namespace, count, time.Since(start).Round(time.Millisecond), &out)
	return &out
}

// bypassed are the Services that came into being without the webhook, because none of its replicas answered and their policy is not Strict.
func bypassed(services []*corev1.Service) (out []*corev1.Service) {
	for _, svc := range services {
		if svc.Annotations[v1alpha1.AnnotationReservation] == "" {
			out = append(out, svc)
		}
	}
	return out
}

// What the API server says when it will not give something, because another Service has it.
var alreadyAllocated = regexp.MustCompile(`(?:failed to allocate IP (\S+): |nodePort: Invalid value: (\d+): |requested HealthCheck NodePort (\d+): )provided (?:IP|port) is already allocated`)

// spurious are the refusals that nothing explains. What explains one is a Service that got the address or port without the webhook: no replica can know of such a
// Service before it is there, so that it may be too late for a choice that was made just before.
func (r *race) spurious(refused []error, bypassed []*corev1.Service) (out []string) {
	r.Helper()
	var services corev1.ServiceList
	if len(refused) > 0 {
		r.Expect(r.server.Client.List(r.ctx, &services)).To(Succeed())
	}
	for _, err := range refused {
		m := alreadyAllocated.FindStringSubmatch(err.Error())
		if m == nil {
			out = append(out, err.Error())
			continue
		}
		has := func(svc *corev1.Service) bool {
			port := m[2] + m[3]
			return slices.Contains(svc.Spec.ClusterIPs, m[1]) || strconv.Itoa(int(svc.Spec.HealthCheckNodePort)) == port ||
				slices.ContainsFunc(svc.Spec.Ports, func(p corev1.ServicePort) bool { return strconv.Itoa(int(p.NodePort)) == port })
		}
		if slices.ContainsFunc(bypassed, has) {
			continue
		}
		holder := "nobody has it now"
		for i := range services.Items {
			if svc := &services.Items[i]; has(svc) {
				holder = fmt.Sprintf("%s/%s has it, made %s", svc.Namespace, svc.Name, svc.CreationTimestamp.UTC().Format(time.TimeOnly))
			}
		}
		out = append(out, err.Error()+" ("+holder+")")
	}
	return out
}
