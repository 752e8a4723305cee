package webhook

import (
	"context"
	"fmt"
	"net/http"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// configurationReconciler keeps the MutatingWebhookConfiguration. It runs in the leader only.
type configurationReconciler struct {
	client   client.Client
	recorder events.EventRecorder
	to       target
	// serving fails while this process does not serve the webhook. Nil: it never will.
	serving func(*http.Request) error

	// What was last written and when. One reconcile runs at a time.
	written   []admissionregistrationv1.MutatingWebhook
	writtenAt time.Time
	// foreign is the version of a configuration that is not ours and of which it was said.
	foreign string
}

// +kubebuilder:rbac:groups=admissionregistration.k8s.io,resources=mutatingwebhookconfigurations,verbs=create
// +kubebuilder:rbac:groups=admissionregistration.k8s.io,resources=mutatingwebhookconfigurations,resourceNames=serviceproxy-webhook,verbs=get;list;watch;update;delete
// +kubebuilder:rbac:groups="",resources=namespaces,verbs=get;list;watch
// +kubebuilder:rbac:groups=networking.serviceproxy.io,resources=serviceproxypolicies,verbs=get;list;watch
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch

const (
	// repairPace is the shortest time between two repairs: whoever changes what we write will go on, and is not to be fought with all the API server has.
	repairPace = 2 * time.Second
	// servingRetry is how often it is looked whether this process serves.
	servingRetry = 500 * time.Millisecond
)

// Reconcile makes the configuration what the policies and the certificate want, and notes in the Secret that API servers are told of its bundle.
func (r *configurationReconciler) Reconcile(ctx context.Context, _ ctrl.Request) (ctrl.Result, error) {
	wanted, secret, err := r.wanted(ctx)
	if err != nil {
		return ctrl.Result{}, err
	}
	present := &admissionregistrationv1.MutatingWebhookConfiguration{}
	if err := r.client.Get(ctx, client.ObjectKey{Name: ConfigurationName}, present); apierrors.IsNotFound(err) {
		present = nil
	} else if err != nil {
		return ctrl.Result{}, fmt.Errorf("read the webhook configuration: %w", err)
	}
	if present != nil && present.Labels[v1alpha1.LabelManagedBy] != v1alpha1.ManagedBy {
		r.report(ctx, present)
		return ctrl.Result{}, nil
	}
	result, err := r.apply(ctx, present, wanted)
	if apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		return ctrl.Result{RequeueAfter: conflictRetry}, nil
	}
	if err != nil || !result.IsZero() || secret == nil {
		return result, err
	}
	return r.publish(ctx, secret)
}

// wanted is the configuration that there should be, nil for none, and the Secret whose bundle it holds, nil if there is none yet.
func (r *configurationReconciler) wanted(ctx context.Context) (*admissionregistrationv1.MutatingWebhookConfiguration, *corev1.Secret, error) {
	if r.serving == nil {
		return nil, nil, nil
	}
	var namespace corev1.Namespace
	if err := r.client.Get(ctx, client.ObjectKey{Name: r.to.namespace}, &namespace); err != nil {
		return nil, nil, fmt.Errorf("read the namespace that --namespace names: %w", err)
	}
	var policies v1alpha1.ServiceProxyPolicyList
	if err := r.client.List(ctx, &policies); err != nil {
		return nil, nil, fmt.Errorf("list policies: %w", err)
	}
	secret := &corev1.Secret{}
	if err := r.client.Get(ctx, client.ObjectKey{Namespace: r.to.namespace, Name: SecretName}, secret); apierrors.IsNotFound(err) {
		secret = nil
	} else if err != nil {
		return nil, nil, fmt.Errorf("read the webhook's certificate: %w", err)
	}
	// Nobody will answer any more once our namespace is gone.
	if len(policies.Items) == 0 || namespace.DeletionTimestamp != nil {
		return nil, secret, nil
	}
	wanted := &admissionregistrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{
		Name: ConfigurationName, Labels: map[string]string{v1alpha1.LabelManagedBy: v1alpha1.ManagedBy},
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Namespace", Name: namespace.Name, UID: namespace.UID}},
	}}
	if secret != nil {
		// Damage is the business of the certificate's reconciler, and not for API servers to know.
		if s, _ := decode(secret, time.Now()); s.serves(time.Now()) {
			wanted.Webhooks = entries(policies.Items, r.to, s.bundle())
		}
	}
	return wanted, secret, nil
}

// apply makes the present configuration, nil if there is none, the wanted one. The result says when to go on with what could not be done now.
func (r *configurationReconciler) apply(ctx context.Context, present, wanted *admissionregistrationv1.MutatingWebhookConfiguration) (ctrl.Result, error) {
	log := ctrl.LoggerFrom(ctx)
	switch {
	case wanted == nil && present == nil:
		return ctrl.Result{}, nil
	case wanted == nil:
		err := r.client.Delete(ctx, present, client.Preconditions{UID: &present.UID, ResourceVersion: &present.ResourceVersion})
		if err == nil {
			log.Info("Deleted the webhook configuration, because there is no policy or nobody who serves it")
		}
		return ctrl.Result{}, client.IgnoreNotFound(err)
	case len(wanted.Webhooks) == 0:
		return ctrl.Result{RequeueAfter: servingRetry}, nil // no certificate yet; what is there may still be right
	case present == nil:
		// The first to be asked is this process, if there is no other yet.
		if err := r.serving(nil); err != nil {
			log.V(1).Info("Waiting with the webhook configuration until this process serves", "reason", err.Error())
			return ctrl.Result{RequeueAfter: servingRetry}, nil
		}
		if wait := r.wait(wanted); wait > 0 {
			return ctrl.Result{RequeueAfter: wait}, nil
		}
		if err := r.client.Create(ctx, wanted); err != nil {
			return ctrl.Result{}, fmt.Errorf("create the webhook configuration: %w", err)
		}
		log.Info("Created the webhook configuration", "entries", len(wanted.Webhooks))
	default:
		merged := present.DeepCopy()
		merged.Webhooks, merged.OwnerReferences = wanted.Webhooks, wanted.OwnerReferences
		if equality.Semantic.DeepEqual(merged, present) {
			return ctrl.Result{}, nil
		}
		if wait := r.wait(wanted); wait > 0 {
			return ctrl.Result{RequeueAfter: wait}, nil
		}
		if err := r.client.Update(ctx, merged); err != nil {
			return ctrl.Result{}, fmt.Errorf("update the webhook configuration: %w", err)
		}
		log.Info("Updated the webhook configuration", "entries", len(wanted.Webhooks))
	}
	r.written, r.writtenAt = wanted.Webhooks, time.Now()
	return ctrl.Result{}, nil
}

// wait is how long to wait before the same is written again.
func (r *configurationReconciler) wait(wanted *admissionregistrationv1.MutatingWebhookConfiguration) time.Duration {
	if !equality.Semantic.DeepEqual(r.written, wanted.Webhooks) {
		return 0
	}
	return repairPace - time.Since(r.writtenAt)
}

// publish notes in the Secret that whatever configuration there is holds its bundle.
func (r *configurationReconciler) publish(ctx context.Context, secret *corev1.Secret) (ctrl.Result, error) {
	now := time.Now()
	s, _ := decode(secret, now)
	bundle := s.bundle()
	if len(bundle) == 0 || !s.published.IsZero() {
		return ctrl.Result{}, nil
	}
	noted := secret.DeepCopy()
	publish(noted, bundle, now)
	err := r.client.Update(ctx, noted)
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return ctrl.Result{RequeueAfter: conflictRetry}, nil
	} else if err != nil {
		return ctrl.Result{}, fmt.Errorf("note the published bundle in the webhook's Secret: %w", err)
	}
	return ctrl.Result{}, nil
}

// report says once of each version of a configuration that it is not ours.
func (r *configurationReconciler) report(ctx context.Context, foreign *admissionregistrationv1.MutatingWebhookConfiguration) {
	version := string(foreign.UID) + "/" + foreign.ResourceVersion
	if r.foreign == version {
		return
	}
	r.foreign = version
	const advice = "delete it, or give it the label " + v1alpha1.LabelManagedBy + "=" + v1alpha1.ManagedBy
	ctrl.LoggerFrom(ctx).Info("A MutatingWebhookConfiguration of our name is not ours: no Service gets an address of a policy at admission", "name", foreign.Name, "advice", advice)
	r.recorder.Eventf(foreign, nil, corev1.EventTypeWarning, "WebhookConfigurationNotOurs", "Configure",
		"It has the name that serviceproxy-operator needs, and is not its own: no Service gets an address of a policy at admission; %s", advice)
}
