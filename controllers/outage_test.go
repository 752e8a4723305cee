package controllers

import (
	"context"
	"reflect"
	"sync"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	toolscache "k8s.io/client-go/tools/cache"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// breakable makes informers of which those of one kind can lose their connection. When they have it again the past is compacted, so that a list is
// all they learn of the time between: as after an outage of the API server.
type breakable struct {
	kind runtime.Object

	mu      sync.Mutex
	open    chan struct{} // closed while connected
	lost    bool          // something was missed since the last list
	watches []watch.Interface
}

func newBreakable(kind runtime.Object) *breakable {
	b := &breakable{kind: kind, open: make(chan struct{})}
	close(b.open)
	return b
}

func (b *breakable) disconnect() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.open, b.lost = make(chan struct{}), true
	for _, w := range b.watches {
		w.Stop()
	}
	b.watches = nil
}

func (b *breakable) connect() {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.open)
}

func (b *breakable) connected(ctx context.Context) error {
	b.mu.Lock()
	open := b.open
	b.mu.Unlock()
	select {
	case <-open:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (b *breakable) newInformer(lw toolscache.ListerWatcher, example runtime.Object, resync time.Duration, indexers toolscache.Indexers) toolscache.SharedIndexInformer {
	if reflect.TypeOf(example) != reflect.TypeOf(b.kind) {
		return NewInformer(lw, example, resync, indexers)
	}
	inner := toolscache.ToListerWatcherWithContext(lw)
	return NewInformer(&toolscache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			if err := b.connected(ctx); err != nil {
				return nil, err
			}
			b.mu.Lock()
			b.lost = false
			b.mu.Unlock()
			return inner.ListWithContext(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			if err := b.connected(ctx); err != nil {
				return nil, err
			}
			lists := o.SendInitialEvents != nil && *o.SendInitialEvents
			b.mu.Lock()
			defer b.mu.Unlock()
			if b.lost && !lists {
				return nil, apierrors.NewResourceExpired("compacted")
			}
			b.lost = false
			w, err := inner.WatchWithContext(ctx, o)
			if err == nil {
				b.watches = append(b.watches, w)
			}
			return w, err
		},
	}, example, resync, indexers)
}

var _ = Describe("claims made and deleted while their watch is broken", func() {
	It("keep no policy from going, however long it is until they would count as leaks", func() {
		options := quick
		options.LeakAge = time.Hour
		claims := newBreakable(&v1alpha1.AllocationClaim{})
		DeferCleanup(runManagerWith(options, func(o *ctrl.Options) { o.Cache.NewInformer = claims.newInformer }))
		t := newTenant()
		p := t.policy("", ranges(t.v4))
		Eventually(policyCondition(p, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		claims.disconnect()
		svc := t.service("inside", func(s *corev1.Service) { s.Spec.ClusterIP = t.address(20).String() })
		older := t.service("older", nil)
		t.allocated(svc)
		additional := additionalIPs(t.allocated(older))[0]
		Expect(claimOn(allocator.AddrLock(t.address(20)))).NotTo(BeNil())
		Expect(k8s.DeleteAllOf(ctx, &corev1.Service{}, client.InNamespace(t.name))).To(Succeed())
		Eventually(func() any { return claimOn(allocator.AddrLock(t.address(20))) }).Should(BeNil())
		Eventually(func() any { return claimOn(allocator.AddrLock(additional)) }).Should(BeNil())
		Expect(k8s.Delete(ctx, p)).To(Succeed())
		claims.connect()
		Eventually(gone(p)).Should(BeTrue())
	})
})
