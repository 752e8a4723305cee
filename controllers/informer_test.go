package controllers

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	toolscache "k8s.io/client-go/tools/cache"
)

func TestPatientRequestsOutlastAnOutage(t *testing.T) {
	nodes := schema.GroupResource{Resource: "nodes"}
	const outage = 10 * time.Minute
	for _, down := range []error{
		syscall.ECONNREFUSED,
		apierrors.NewForbidden(nodes, "", errors.New("no roles yet")),
		apierrors.NewInternalError(errors.New("etcd")),
		apierrors.NewServiceUnavailable("starting"),
	} {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			tries := 0
			answer := func() error {
				tries++
				if time.Since(start) < outage {
					return down
				}
				return nil
			}
			lw := patient(&toolscache.ListWatch{
				ListWithContextFunc:  func(context.Context, metav1.ListOptions) (runtime.Object, error) { return &corev1.NodeList{}, answer() },
				WatchFuncWithContext: func(context.Context, metav1.ListOptions) (watch.Interface, error) { return watch.NewFake(), answer() },
			}, &corev1.Node{})
			if _, err := lw.ListWithContext(t.Context(), metav1.ListOptions{}); err != nil {
				t.Fatal(err)
			}
			if late := time.Since(start) - outage; late > 8*time.Second {
				t.Errorf("answered %v after the outage", late)
			}
			if tries > 200 {
				t.Errorf("%d requests in %v", tries, outage)
			}
			start = time.Now()
			if _, err := lw.WatchWithContext(t.Context(), metav1.ListOptions{}); err != nil {
				t.Fatal(err)
			}
			if late := time.Since(start) - outage; late > 8*time.Second {
				t.Errorf("watch answered %v after the outage", late)
			}
		})
	}
}

func TestPatientRequestsPassOnAnswersAndEnd(t *testing.T) {
	for _, refused := range []error{
		apierrors.NewResourceExpired("too old"),
		apierrors.NewNotFound(schema.GroupResource{Resource: "serviceproxypolicies"}, ""),
		apierrors.NewTimeoutError("too large resource version", 1),
	} {
		lw := patient(&toolscache.ListWatch{
			ListWithContextFunc: func(context.Context, metav1.ListOptions) (runtime.Object, error) { return nil, refused },
		}, &corev1.Node{})
		if _, err := lw.ListWithContext(t.Context(), metav1.ListOptions{}); !errors.Is(err, refused) {
			t.Errorf("%v, want %v", err, refused)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		lw := patient(&toolscache.ListWatch{
			ListWithContextFunc: func(context.Context, metav1.ListOptions) (runtime.Object, error) { return nil, syscall.ECONNREFUSED },
		}, &corev1.Node{})
		if _, err := lw.ListWithContext(ctx, metav1.ListOptions{}); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
		if ctx.Err() == nil {
			t.Error("it gave up before the end")
		}
	})
}
