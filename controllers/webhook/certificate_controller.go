package webhook

import (
	"context"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// certificateReconciler keeps the Secret as rotation wants it, and serves what is in it.
type certificateReconciler struct {
	client   client.Client
	served   *Certificate
	expiry   prometheus.Gauge
	rotation rotation
}

// +kubebuilder:rbac:groups="",namespace=serviceproxy-system,resources=secrets,verbs=create
// +kubebuilder:rbac:groups="",namespace=serviceproxy-system,resources=secrets,resourceNames=serviceproxy-webhook-cert,verbs=get;list;watch;update;delete

const (
	// lookAgain is how long the certificate is left alone at the most: a timer does not count the time that a machine sleeps.
	lookAgain = time.Hour
	// conflictRetry is when to look again after another replica was faster, if the cache has not shown it until then.
	conflictRetry = 200 * time.Millisecond
)

// Reconcile serves what the Secret has, and does the next step of its rotation if it is time.
func (r *certificateReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	now := time.Now()
	present := &corev1.Secret{}
	if err := r.client.Get(ctx, req.NamespacedName, present); apierrors.IsNotFound(err) {
		present = nil
	} else if err != nil {
		return ctrl.Result{}, fmt.Errorf("read Secret %s: %w", req, err)
	}
	wanted := &corev1.Secret{}
	if present != nil {
		wanted = present.DeepCopy()
	}
	wanted.Namespace, wanted.Name = req.Namespace, req.Name
	s, damage := decode(wanted, now)
	if s.serves(now) {
		r.serve(s)
	}
	s, done, again, err := r.rotation.next(s, now)
	if err != nil {
		return ctrl.Result{}, err
	}
	if err := encode(s, wanted); err != nil {
		return ctrl.Result{}, err
	}
	if present == nil || !sameSecret(present, wanted) {
		err := r.write(ctx, present, wanted)
		if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
			return ctrl.Result{RequeueAfter: conflictRetry}, nil
		} else if err != nil {
			return ctrl.Result{}, fmt.Errorf("write Secret %s: %w", req, err)
		}
		log := ctrl.LoggerFrom(ctx).WithValues("done", done, "expires", s.serving.NotAfter)
		if present != nil && damage != nil {
			log.Info("Repaired the webhook's certificate, which could not be used as it was", "damage", damage.Error())
		} else {
			log.Info("Renewed the webhook's certificate")
		}
		r.serve(s)
	}
	return ctrl.Result{RequeueAfter: min(max(again.Sub(now), conflictRetry), lookAgain)}, nil
}

func (r *certificateReconciler) serve(s state) {
	r.served.use(s)
	r.expiry.Set(float64(s.serving.NotAfter.Unix()))
}

func sameSecret(a, b *corev1.Secret) bool {
	return a.Type == b.Type && equality.Semantic.DeepEqual(a.Data, b.Data) && equality.Semantic.DeepEqual(a.Labels, b.Labels)
}

// write replaces what is present by what is wanted, unless somebody else wrote in between.
func (r *certificateReconciler) write(ctx context.Context, present, wanted *corev1.Secret) error {
	if present == nil {
		return r.client.Create(ctx, wanted)
	}
	if present.Type == wanted.Type && (present.Immutable == nil || !*present.Immutable) {
		return r.client.Update(ctx, wanted)
	}
	// Neither the type nor what is immutable can be changed.
	if err := r.client.Delete(ctx, present, client.Preconditions{UID: &present.UID, ResourceVersion: &present.ResourceVersion}); client.IgnoreNotFound(err) != nil {
		return err
	}
	fresh := &corev1.Secret{Type: wanted.Type, Data: wanted.Data}
	fresh.Namespace, fresh.Name, fresh.Labels = wanted.Namespace, wanted.Name, wanted.Labels
	return r.client.Create(ctx, fresh)
}
