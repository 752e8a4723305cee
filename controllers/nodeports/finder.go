// Package nodeports finds out the API server's range of node ports.
//
// No API tells it, and dry run does not check it. So a Service is created with a node port that hardly any range has: the refusal names the range and leaves nothing.
package nodeports

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// LabelProbe is on every Service that was created to find out something, with the value "nodeports". None outlives its request but after a crash.
const LabelProbe = "networking.serviceproxy.io/probe"

const (
	// again is how often the range is looked at: API servers are restarted with other flags.
	again = 10 * time.Minute
	// retry is how soon a look that failed for no lasting reason is repeated.
	retry = 15 * time.Second
	// abandoned is how old a probe must be to be nobody's: older than any request of another replica.
	abandoned = time.Minute
)

// Finder finds out the range while somebody wants to know it. It runs in every replica, because each gives out node ports.
type Finder struct {
	// Client writes Services in Namespace, Live lists them past any cache.
	Client client.Client
	Live   client.Reader
	// Namespace is where the controller runs.
	Namespace string
	// Wanted says whether anybody wants to know the range. Changed gets a value when that may have changed.
	Wanted  func() bool
	Changed <-chan struct{}
	// Address chooses the cluster IP of a probe, so that the API server does not take one that it could give to a tenant's Service in the same moment. Not ok: the
	// API server may choose.
	Address func() (netip.Addr, bool)
	// Found is told the range each time that it was found.
	Found func(allocator.PortRange)
	Log   logr.Logger

	complaint string // what was logged last
}

// +kubebuilder:rbac:groups="",namespace=serviceproxy-system,resources=services,verbs=create;delete

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (*Finder) NeedLeaderElection() bool { return false }

// Start looks until ctx ends. It returns nil.
func (f *Finder) Start(ctx context.Context) error {
	timer := time.NewTimer(0) // fires when the next look is due
	defer timer.Stop()
	due := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
			due = true
		case <-f.Changed:
		}
		if due && f.Wanted() {
			timer.Reset(f.look(ctx))
			due = false
		}
	}
}

// look finds the range once, and says when to look again.
func (f *Finder) look(ctx context.Context) time.Duration {
	err := f.removeAbandoned(ctx)
	var found allocator.PortRange
	if err == nil {
		found, err = f.find(ctx)
	}
	if err == nil {
		f.complaint = ""
		f.Found(found)
		return again
	}
	if ctx.Err() != nil {
		return again
	}
	// It goes on meanwhile with what it knows. One line, as long as it fails for the same reason.
	if complaint := "not found: " + string(apierrors.ReasonForError(err)); complaint != f.complaint {
		f.complaint = complaint
		f.Log.Info("The API server's range of node ports cannot be found out, so policies' nodePortRanges are not checked against it, and Services that no policy covers get node ports from all of it", "namespace", f.Namespace, "because", err.Error())
	}
	if apierrors.IsForbidden(err) || apierrors.IsNotFound(err) {
		return again // until somebody grants the right, or makes the namespace
	}
	return retry
}

// find asks with the lowest port that there is, and if the API server has that in its range, with the highest.
func (f *Finder) find(ctx context.Context) (allocator.PortRange, error) {
	for _, port := range []int32{1, 65535} {
		probe := f.probe(port)
		err := f.Client.Create(ctx, probe)
		if err == nil {
			cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			err := f.remove(cleanup, probe)
			cancel()
			if err != nil {
				return allocator.PortRange{}, err
			}
			continue
		}
		if found, ok := rangeOf(err); ok {
			return found, nil
		}
		if !isInUse(err) {
			return allocator.PortRange{}, fmt.Errorf("create a Service with node port %d: %w", port, err)
		}
	}
	return allocator.PortRange{First: 1, Last: 65535}, nil
}

func (f *Finder) probe(port int32) *corev1.Service {
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: f.Namespace, GenerateName: "serviceproxy-probe-",
			Labels: map[string]string{v1alpha1.LabelManagedBy: v1alpha1.ManagedBy, LabelProbe: "nodeports"}},
		Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, Ports: []corev1.ServicePort{{Port: 1, NodePort: port}}},
	}
	if addr, ok := f.Address(); ok {
		svc.Spec.ClusterIP, svc.Spec.ClusterIPs = addr.String(), []string{addr.String()}
	}
	return svc
}

// removeAbandoned deletes the probes that a process left which came to an end between creating and deleting them.
func (f *Finder) removeAbandoned(ctx context.Context) error {
	var list corev1.ServiceList
	if err := f.Live.List(ctx, &list, client.InNamespace(f.Namespace), client.MatchingLabels{v1alpha1.LabelManagedBy: v1alpha1.ManagedBy, LabelProbe: "nodeports"}); err != nil {
		return fmt.Errorf("list earlier probes: %w", err)
	}
	for i := range list.Items {
		if probe := &list.Items[i]; time.Since(probe.CreationTimestamp.Time) > abandoned {
			if err := f.remove(ctx, probe); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *Finder) remove(ctx context.Context, probe *corev1.Service) error {
	err := f.Client.Delete(ctx, probe, client.Preconditions{UID: &probe.UID})
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete probe %s: %w", probe.Name, err)
	}
	return nil
}
