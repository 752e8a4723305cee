package controllers

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/util/flowcontrol"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/webhook"

	"github.com/serviceproxy/serviceproxy-operator/controllers/admission"
	"github.com/serviceproxy/serviceproxy-operator/controllers/nodeports"
)

// SetupWithManager registers the reconcilers of policies, Services and claims. The manager's scheme must know v1alpha1 and client-go's types.
func SetupWithManager(mgr ctrl.Manager, options Options) error {
	options = options.withDefaults()
	l := newLedger(options)
	if err := mgr.Add(ledgerRunner{l, mgr.GetCache()}); err != nil {
		return fmt.Errorf("register ledger: %w", err)
	}
	if err := mgr.AddReadyzCheck("ledger", l.ready); err != nil {
		return fmt.Errorf("register the readiness check of the ledger: %w", err)
	}
	if err := collectFrom(l, metrics.Registry); err != nil {
		return err
	}
	recorder := mgr.GetEventRecorder("serviceproxy-controller")
	services := &serviceReconciler{client: mgr.GetClient(), live: mgr.GetAPIReader(), ledger: l, recorder: recorder, options: options,
		pace: newPace(options.TakeOverRate, l.reconcile), relabelled: flowcontrol.NewBackOff(relabelFirst, relabelMost)}
	if err := mgr.Add(services.pace); err != nil {
		return fmt.Errorf("register the pace of taking Services over: %w", err)
	}
	if err := services.setup(mgr); err != nil {
		return fmt.Errorf("set up the reconciler of Services: %w", err)
	}
	policies := &policyReconciler{client: mgr.GetClient(), live: mgr.GetAPIReader(), ledger: l, recorder: recorder, options: options}
	if err := policies.setup(mgr); err != nil {
		return fmt.Errorf("set up the reconciler of policies: %w", err)
	}
	claims := &claimReconciler{client: mgr.GetClient(), live: mgr.GetAPIReader(), ledger: l, options: options}
	if err := claims.setup(mgr); err != nil {
		return fmt.Errorf("set up the reconciler of claims: %w", err)
	}
	if options.Admission {
		handler, err := admission.New(admission.Options{Ledger: admissionLedger{l, mgr.GetClient(), mgr.GetAPIReader()}, Client: mgr.GetClient(), Live: mgr.GetAPIReader()})
		if err != nil {
			return fmt.Errorf("set up admission: %w", err)
		}
		mgr.GetWebhookServer().Register(admission.Path, &webhook.Admission{Handler: handler})
	}
	if options.Namespace != "" {
		finder := &nodeports.Finder{Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Namespace: options.Namespace, Log: mgr.GetLogger().WithName("nodeports"),
			Wanted: l.wantsServerPorts, Changed: l.portsWanted, Found: l.setServerPorts, Address: admissionLedger{l, mgr.GetClient(), mgr.GetAPIReader()}.nowhere}
		if err := mgr.Add(finder); err != nil {
			return fmt.Errorf("register the finder of the node port range: %w", err)
		}
	}
	return nil
}

// ledgerRunner runs the ledger in every replica: a new leader starts with a full one.
type ledgerRunner struct {
	ledger    *ledger
	informers cache.Cache
}

func (r ledgerRunner) Start(ctx context.Context) error { return r.ledger.run(ctx, r.informers) }
func (r ledgerRunner) NeedLeaderElection() bool        { return false }

// ready fails until the ledger has seen everything that existed when it started. For /readyz, of every replica: each answers admission from its own ledger.
func (l *ledger) ready(*http.Request) error {
	select {
	case <-l.synced:
		return nil
	default:
		return errors.New("not all that is held was read yet")
	}
}

// wakeups lets the ledger add to a controller's queue, and keeps the controller from starting before the ledger knows all that is held: held beats new.
type wakeups struct {
	ledger *ledger
	attach func(queue)
}

func (w wakeups) Start(_ context.Context, q queue) error {
	if w.attach != nil {
		w.ledger.mu.Lock()
		defer w.ledger.mu.Unlock()
		w.attach(q)
	}
	return nil
}

func (wakeups) String() string { return "ledger" }

// WaitForSync returns when the ledger has seen everything that existed when it started.
func (w wakeups) WaitForSync(ctx context.Context) error {
	select {
	case <-w.ledger.synced:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("ledger: %w", ctx.Err())
	}
}

// retryConflicts tries again soon, without an error in the log, when a write was refused because the cache lagged: that is how optimistic
// locking is meant to end.
type retryConflicts struct{ reconcile.Reconciler }

const conflictRetry = 50 * time.Millisecond

func (r retryConflicts) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	result, err := r.Reconciler.Reconcile(ctx, req)
	if apierrors.IsConflict(err) {
		ctrl.LoggerFrom(ctx).V(1).Info("The cache lagged, trying again", "conflict", err.Error())
		return ctrl.Result{RequeueAfter: conflictRetry}, nil
	}
	return result, err
}
