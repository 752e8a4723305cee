package webhook

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// Options say where the webhook is served.
type Options struct {
	// Namespace is where the Secret and the Service are. It must exist.
	Namespace string
	// URL is https://HOST:PORT where API servers reach the webhook. Empty: through the Service.
	URL string
	// Certificate is what the manager's webhook server uses. Nil: this process serves no webhook, and the configuration is taken away.
	Certificate *Certificate
	// Grace is how long an API server may go on with a configuration that was changed. Default 1m.
	Grace time.Duration
}

// Cache limits what the manager's cache holds to the objects of this package. For cache.Options.
func Cache(namespace string) map[client.Object]cache.ByObject {
	only := func(name string) fields.Selector { return fields.OneTermEqualSelector("metadata.name", name) }
	return map[client.Object]cache.ByObject{
		&corev1.Secret{}: {Namespaces: map[string]cache.Config{namespace: {}}, Field: only(SecretName)},
		&admissionregistrationv1.MutatingWebhookConfiguration{}: {Field: only(ConfigurationName)},
	}
}

// SetupWithManager registers the reconcilers of the certificate, in every replica, and of the configuration, in the leader; and a readiness check. The manager
// has Cache in its cache's options, a scheme that knows v1alpha1 and client-go's types, and a webhook server that uses the Certificate.
func SetupWithManager(mgr ctrl.Manager, o Options) error {
	to := target{namespace: o.Namespace, url: o.URL}
	configuration := &configurationReconciler{client: mgr.GetClient(), recorder: mgr.GetEventRecorder("serviceproxy-controller"), to: to}
	if o.Certificate != nil {
		started := mgr.GetWebhookServer().StartedChecker()
		configuration.serving = func(req *http.Request) error {
			if err := o.Certificate.ready(time.Now()); err != nil {
				return err
			}
			return started(req)
		}
		if err := mgr.AddReadyzCheck("webhook", configuration.serving); err != nil {
			return fmt.Errorf("register the readiness check of the webhook: %w", err)
		}
		expiry, err := newExpiry(metrics.Registry)
		if err != nil {
			return err
		}
		certificate := &certificateReconciler{client: mgr.GetClient(), served: o.Certificate, expiry: expiry,
			rotation: rotation{names: to.names(), grace: cmp.Or(o.Grace, time.Minute)}}
		if err := certificate.setup(mgr, o.Namespace); err != nil {
			return fmt.Errorf("set up the reconciler of the webhook's certificate: %w", err)
		}
	}
	if err := configuration.setup(mgr); err != nil {
		return fmt.Errorf("set up the reconciler of the webhook's configuration: %w", err)
	}
	return nil
}

func (r *certificateReconciler) setup(mgr ctrl.Manager, namespace string) error {
	the := types.NamespacedName{Namespace: namespace, Name: SecretName}
	return ctrl.NewControllerManagedBy(mgr).Named("webhook-certificate").
		For(&corev1.Secret{}). // the cache has no other
		WatchesRawSource(once(the)).
		// Whoever sees first that it is time renews.
		WithOptions(controller.Options{NeedLeaderElection: new(false), RateLimiter: retrySoon()}).
		Complete(r)
}

func (r *configurationReconciler) setup(mgr ctrl.Manager) error {
	the := types.NamespacedName{Name: ConfigurationName}
	same := handler.EnqueueRequestsFromMapFunc(func(context.Context, client.Object) []reconcile.Request {
		return []reconcile.Request{{NamespacedName: the}}
	})
	c := ctrl.NewControllerManagedBy(mgr).Named("webhook-configuration").
		For(&admissionregistrationv1.MutatingWebhookConfiguration{}). // the cache has no other
		Watches(&v1alpha1.ServiceProxyPolicy{}, same, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		WatchesRawSource(once(the)).
		WithOptions(controller.Options{RateLimiter: retrySoon()})
	if r.serving != nil {
		ours := predicate.NewPredicateFuncs(func(o client.Object) bool { return o.GetName() == r.to.namespace })
		c = c.Watches(&corev1.Secret{}, same).Watches(&corev1.Namespace{}, same, builder.WithPredicates(ours))
	}
	return c.Complete(r)
}

// retrySoon bounds how long to wait after an error: Services are refused or pass as they please meanwhile.
func retrySoon() workqueue.TypedRateLimiter[reconcile.Request] {
	return workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](50*time.Millisecond, 5*time.Second)
}

// once has a request reconciled at the start, for what does not exist yet.
func once(name types.NamespacedName) source.Source {
	return source.Func(func(_ context.Context, q workqueue.TypedRateLimitingInterface[reconcile.Request]) error {
		q.Add(reconcile.Request{NamespacedName: name})
		return nil
	})
}
