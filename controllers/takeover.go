package controllers

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// kube-proxy ignores a Service that carries the label service-proxy-name. What follows moves Services from it to us and back, so that at each moment
// somebody forwards them on every node:
//
//	there  every node forwards the Service → label it and note that the label is ours
//	back   take the label away → keep the assignment as it is for a while, in which both forward → let go
//
// What was done is in the objects only, so whoever leads next goes on from any point:
//
//	Service: label and AnnotationTakenOver     taken over
//	ServiceAssignment: AnnotationHandingBack   handed back, kube-proxy is given time since then
//
// The reconciler of Services does all of it, because it sees one Service at one time only.

// +kubebuilder:rbac:groups="",resources=services,verbs=patch
// +kubebuilder:rbac:groups=discovery.k8s.io,resources=endpointslices,verbs=list

const (
	// moveTimeout bounds a move, from its first live read to its write: far less than a lease lasts, so that what a leader read is not
	// written after another one began to lead.
	moveTimeout = 5 * time.Second
	// slicesRetry is how often it is looked whether the EndpointSlices lost the label too.
	slicesRetry = 2 * time.Second
	// relabelFirst and relabelMost are how long a Service whose label somebody removed again is left to kube-proxy, which takes twice as long each time. Both forward
	// it meanwhile; who fights for the label must neither keep every kube-proxy busy nor those waiting that are not fought for.
	relabelFirst, relabelMost = time.Second, 5 * time.Minute
)

// isExempt says whether a Service is never taken over: agents on nodes that just booted reach the API server by this one, and somebody has to forward it before they do.
func isExempt(key types.NamespacedName) bool { return key.String() == kubernetesService }

// takeOver labels a Service that every node forwards, if its policy takes Services over. It says after how long to try again, zero if something else will tell.
func (r *serviceReconciler) takeOver(ctx context.Context, svc *corev1.Service, policy *allocator.Policy, assignment *v1alpha1.ServiceAssignment) (time.Duration, error) {
	key := client.ObjectKeyFromObject(svc)
	_, labelled := svc.Labels[v1alpha1.LabelServiceProxyName]
	if labelled || isExempt(key) || !r.ledger.sharing(policy.Name).takes || !onEveryNode(assignment) {
		return 0, nil
	}
	if id := key.String(); r.relabelled.IsInBackOffSinceUpdate(id, time.Now()) {
		return r.relabelled.Get(id), nil
	}
	if !r.pace.pass(key) {
		return 0, nil
	}
	ctx, cancel := context.WithTimeout(ctx, moveTimeout)
	defer cancel()
	// The version guards the Service. The rest of what this was decided by is read past the cache: kube-proxy must not be sent away while nobody else forwards.
	var now *v1alpha1.ServiceAssignment
	if found, err := get(ctx, r.live, key, &now); err != nil {
		return 0, err
	} else if !found || now.UID != assignment.UID || now.DeletionTimestamp != nil || now.Spec.PolicyName != policy.Name || !onEveryNode(now) {
		return 0, nil // an event is on its way
	}
	var asks *v1alpha1.ServiceProxyPolicy
	if found, err := get(ctx, r.live, types.NamespacedName{Name: policy.Name}, &asks); err != nil {
		return 0, err
	} else if !found || string(asks.UID) != policy.UID || asks.DeletionTimestamp != nil || asks.Spec.KubeProxy == v1alpha1.KubeProxyCoexist {
		return 0, nil
	}
	if err := r.relabel(ctx, svc, v1alpha1.ServiceProxyName, policy.Name); err != nil {
		return 0, fmt.Errorf("take over from kube-proxy: %w", err)
	}
	r.relabelled.Next(key.String(), time.Now())
	return 0, nil
}

// handBack gives a Service that leaves its policy, or that its policy may not keep from kube-proxy any more, back to kube-proxy. It says for how long nodes must
// go on forwarding it, zero if they need not. policy is the one that covers the Service now, nil if none does; assignment is nil if there is none.
func (r *serviceReconciler) handBack(ctx context.Context, svc *corev1.Service, policy *allocator.Policy, assignment *v1alpha1.ServiceAssignment) (time.Duration, error) {
	_, claimed := svc.Annotations[v1alpha1.AnnotationTakenOver]
	if policy != nil && (r.ledger.sharing(policy.Name).keeps || !claimed && !isHandingBack(assignment)) {
		return 0, nil
	}
	forwarded := assignment != nil && assignment.Spec.ServiceUID == svc.UID && isOurs(assignment.Labels) && hasAddresses(svc)
	if claimed {
		if !r.pace.pass(client.ObjectKeyFromObject(svc)) {
			return untilPassed, nil
		}
		if forwarded {
			if err := r.markHandingBack(ctx, assignment); err != nil {
				return 0, err
			}
		}
		if err := r.relabel(ctx, svc, "", ""); err != nil {
			return 0, fmt.Errorf("hand back to kube-proxy: %w", err)
		}
		if forwarded && r.ledger.kubeProxyAwaited(true) {
			return r.options.HandBackGrace, nil
		}
		return 0, nil
	}
	if !forwarded || !isHandingBack(assignment) && !r.ledger.kubeProxyAwaited(false) {
		return 0, nil
	}
	if !isHandingBack(assignment) {
		// The user took the label away, or kube-proxy has been forwarding the Service all along. Which of them it was cannot be told.
		return r.options.HandBackGrace, r.markHandingBack(ctx, assignment)
	}
	return r.handingBackFor(ctx, assignment)
}

// follow keeps what nodes forward of a Service that leaves as the Service is, while all that its policy decided stays: kube-proxy ignores the Service until its turn comes, so
// nobody else forwards a port that it gets meanwhile.
func (r *serviceReconciler) follow(ctx context.Context, svc *corev1.Service, a *v1alpha1.ServiceAssignment) error {
	if a == nil || a.Spec.ServiceUID != svc.UID || !isOurs(a.Labels) || !hasAddresses(svc) {
		return nil
	}
	policy := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: a.Spec.PolicyName}, Spec: v1alpha1.ServiceProxyPolicySpec{
		ProxyMode: a.Spec.ProxyMode, Scheduler: a.Spec.Scheduler, NodeSelector: a.Spec.NodeSelector, NodePortAddresses: a.Spec.NodePortAddresses}}
	var additional, vips []netip.Addr
	for _, ip := range a.Spec.ServiceIPs {
		if addr, err := netip.ParseAddr(ip.IP); err == nil && ip.Source == v1alpha1.ServiceIPSourceAdditional {
			additional = append(additional, addr)
		}
	}
	for _, ip := range a.Spec.LoadBalancerIPs {
		if addr, err := netip.ParseAddr(ip); err == nil {
			vips = append(vips, addr)
		}
	}
	want := CompileAssignment(svc, policy, additional, vips)
	if isHandingBack(a) {
		want.HealthCheckNodePort = 0 // given up already
	}
	if equality.Semantic.DeepEqual(a.Spec, want) {
		return nil
	}
	updated := a.DeepCopy()
	updated.Spec = want
	if err := r.client.Update(ctx, updated); err != nil {
		return fmt.Errorf("update the assignment of a Service that is handed back: %w", err)
	}
	return nil
}

// untilPassed is for how long a Service waits at most for its turn to be labelled. Its turn has it reconciled, so this is only in case that gets lost.
const untilPassed = time.Hour

func hasAddresses(svc *corev1.Service) bool {
	return svc.Spec.Type != corev1.ServiceTypeExternalName && svc.Spec.ClusterIP != corev1.ClusterIPNone
}

func isHandingBack(assignment *v1alpha1.ServiceAssignment) bool {
	return assignment != nil && assignment.Annotations[v1alpha1.AnnotationHandingBack] != ""
}

// markHandingBack notes since when kube-proxy has time. A mark of a moment ago, as an earlier leader may have left it just before it took the label away, is good. The health-check node port is given up at once: kube-proxy tries to listen there when it sees the Service, and then not
// before its next full sync.
func (r *serviceReconciler) markHandingBack(ctx context.Context, assignment *v1alpha1.ServiceAssignment) error {
	since, err := time.Parse(time.RFC3339, assignment.Annotations[v1alpha1.AnnotationHandingBack])
	if err == nil && time.Since(since) < r.options.HandBackGrace/10 && assignment.Spec.HealthCheckNodePort == 0 {
		return nil
	}
	marked := assignment.DeepCopy()
	if marked.Annotations == nil {
		marked.Annotations = map[string]string{}
	}
	marked.Annotations[v1alpha1.AnnotationHandingBack] = time.Now().UTC().Format(time.RFC3339Nano)
	marked.Spec.HealthCheckNodePort = 0
	if err := r.client.Update(ctx, marked); err != nil {
		return fmt.Errorf("mark the assignment as handed back: %w", err)
	}
	return nil
}

// handingBackFor says how much of kube-proxy's time is left. It does not end before Kubernetes took the label off the EndpointSlices too, because to kube-proxy a Service
// without endpoints is one to refuse.
func (r *serviceReconciler) handingBackFor(ctx context.Context, assignment *v1alpha1.ServiceAssignment) (time.Duration, error) {
	since, err := time.Parse(time.RFC3339, assignment.Annotations[v1alpha1.AnnotationHandingBack])
	if err != nil { // somebody else wrote it
		return r.options.HandBackGrace, r.markHandingBack(ctx, assignment)
	}
	// By another replica's clock it may have begun in the future.
	if left := min(time.Until(since.Add(r.options.HandBackGrace)), r.options.HandBackGrace); left > 0 {
		return left, nil
	}
	var slices discoveryv1.EndpointSliceList
	if err := r.live.List(ctx, &slices, client.InNamespace(assignment.Namespace), client.MatchingLabels{
		discoveryv1.LabelServiceName: assignment.Name, discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io", v1alpha1.LabelServiceProxyName: v1alpha1.ServiceProxyName,
	}); err != nil {
		return 0, fmt.Errorf("list EndpointSlices: %w", err)
	}
	if len(slices.Items) == 0 {
		return 0, nil
	}
	ctrl.LoggerFrom(ctx).V(1).Info("Kubernetes has not taken the label off the EndpointSlices yet; kube-proxy gets its time from then on", "slices", len(slices.Items))
	return slicesRetry, r.markHandingBack(ctx, assignment)
}

// relabel sets the label and the annotation that claims it, or removes both if they are empty. A label that another proxy set meanwhile stays. It fails with a conflict if the
// Service is not the one that was judged.
func (r *serviceReconciler) relabel(ctx context.Context, svc *corev1.Service, label, policy string) error {
	orNull := func(s string) any {
		if s == "" {
			return nil
		}
		return s
	}
	metadata := map[string]any{"uid": svc.UID, "resourceVersion": svc.ResourceVersion, "annotations": map[string]any{v1alpha1.AnnotationTakenOver: orNull(policy)}}
	if have, labelled := svc.Labels[v1alpha1.LabelServiceProxyName]; !labelled || have == v1alpha1.ServiceProxyName {
		metadata["labels"] = map[string]any{v1alpha1.LabelServiceProxyName: orNull(label)}
	}
	body, err := json.Marshal(map[string]any{"metadata": metadata})
	if err != nil {
		return err
	}
	return client.IgnoreNotFound(r.client.Patch(ctx, svc.DeepCopy(), client.RawPatch(types.MergePatchType, body)))
}
