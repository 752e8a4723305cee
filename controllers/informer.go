package controllers

import (
	"context"
	"errors"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	toolscache "k8s.io/client-go/tools/cache"
	ctrl "sigs.k8s.io/controller-runtime"
)

// NewInformer makes an informer that is back within seconds after an outage of the API server. For cache.Options.
//
// Left alone, an informer waits for up to a minute between two tries, and that cannot be set. So it is not left to try again: its
// requests succeed late instead of failing.
func NewInformer(lw toolscache.ListerWatcher, example runtime.Object, resync time.Duration, indexers toolscache.Indexers) toolscache.SharedIndexInformer {
	return toolscache.NewSharedIndexInformer(patient(lw, example), example, resync, indexers)
}

// patient makes requests that are repeated until the API server can answer them.
func patient(lw toolscache.ListerWatcher, example runtime.Object) *toolscache.ListWatch {
	inner := toolscache.ToListerWatcherWithContext(lw)
	return &toolscache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return untilAnswered(ctx, example, func() (runtime.Object, error) { return inner.ListWithContext(ctx, o) })
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return untilAnswered(ctx, example, func() (watch.Interface, error) { return inner.WatchWithContext(ctx, o) })
		},
	}
}

// retryRequest is how long to wait between two tries: with the jitter, which spreads the informers, at most twice the cap.
var retryRequest = wait.Backoff{Duration: 250 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 10, Cap: 4 * time.Second}

func untilAnswered[T any](ctx context.Context, example runtime.Object, request func() (T, error)) (T, error) {
	backoff, failures := retryRequest, 0
	log := ctrl.Log.WithName("watch").WithValues("type", fmt.Sprintf("%T", example))
	for {
		answer, err := request()
		if err == nil && failures > 0 {
			log.Info("The API server answers again", "failures", failures)
		}
		if err == nil || !isOutage(err) || ctx.Err() != nil {
			return answer, err
		}
		if failures++; failures == 1 {
			log.Error(err, "The API server does not answer; trying again until it does")
		}
		select {
		case <-ctx.Done():
			return answer, err
		case <-time.After(backoff.Step()):
		}
	}
}

// isOutage says whether a request failed because the API server is not there or not yet itself: right after its start it knows no roles and
// forbids everything. What an answer means that it gives otherwise, a version that is too old for example, is for the informer to decide.
func isOutage(err error) bool {
	for _, is := range []func(error) bool{
		apierrors.IsForbidden, apierrors.IsUnauthorized, apierrors.IsTooManyRequests, apierrors.IsInternalError, apierrors.IsServiceUnavailable,
	} {
		if is(err) {
			return true
		}
	}
	var answered apierrors.APIStatus
	return !errors.As(err, &answered)
}
