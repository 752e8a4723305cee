package controllers

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

var errDead = errors.New("the controller is dead")

// dyingClient performs n writes and fails every later one, as if the process had been killed between two of them.
func dyingClient(n int64, died *atomic.Bool) func(client.Client) client.Client {
	var writes atomic.Int64
	return beforeWrites(func() error {
		if writes.Add(1) > n {
			died.Store(true)
			return errDead
		}
		return nil
	})
}

// writeCounter counts writes.
type writeCounter struct{ atomic.Int64 }

func (w *writeCounter) count(inner client.Client) client.Client {
	return beforeWrites(func() error { w.Add(1); return nil })(inner)
}

// beforeWrites calls alive before every write, which happens only if alive says nil.
func beforeWrites(alive func() error) func(client.Client) client.Client {
	return func(inner client.Client) client.Client {
		return interceptor.NewClient(watchless{inner}, interceptor.Funcs{
			Create: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.CreateOption) error {
				if err := alive(); err != nil {
					return err
				}
				return c.Create(ctx, obj, opts...)
			},
			Update: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.UpdateOption) error {
				if err := alive(); err != nil {
					return err
				}
				return c.Update(ctx, obj, opts...)
			},
			Patch: func(ctx context.Context, c client.WithWatch, obj client.Object, patch client.Patch, opts ...client.PatchOption) error {
				if err := alive(); err != nil {
					return err
				}
				return c.Patch(ctx, obj, patch, opts...)
			},
			Delete: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.DeleteOption) error {
				if err := alive(); err != nil {
					return err
				}
				return c.Delete(ctx, obj, opts...)
			},
			SubResourceUpdate: func(ctx context.Context, c client.Client, sub string, obj client.Object, opts ...client.SubResourceUpdateOption) error {
				if err := alive(); err != nil {
					return err
				}
				return c.SubResource(sub).Update(ctx, obj, opts...)
			},
			SubResourceApply: func(ctx context.Context, c client.Client, sub string, obj runtime.ApplyConfiguration, opts ...client.SubResourceApplyOption) error {
				if err := alive(); err != nil {
					return err
				}
				return c.SubResource(sub).Apply(ctx, obj, opts...)
			},
		})
	}
}

// watchless makes a manager's client, which watches through its cache only, fit the interceptor.
type watchless struct{ client.Client }

func (watchless) Watch(context.Context, client.ObjectList, ...client.ListOption) (watch.Interface, error) {
	return nil, errors.ErrUnsupported
}

// consistent checks that each Service has its own addresses, all of them claimed by it and reserved, and that nothing else is.
func (t *tenant) consistent(g Gomega, policy string, services []*corev1.Service, perService int) {
	holders := map[netip.Addr]string{}
	for _, svc := range services {
		a := t.assignment(svc.Name)
		g.Expect(a).NotTo(BeNil(), svc.Name)
		g.Expect(a.Spec.ServiceUID).To(Equal(svc.UID))
		ips := additionalIPs(a)
		g.Expect(ips).To(HaveLen(perService), svc.Name)
		for _, ip := range ips {
			g.Expect(holders).NotTo(HaveKey(ip), "%s has the address of %s", svc.Name, holders[ip])
			holders[ip] = svc.Name
			claim := claimOn(allocator.AddrLock(ip))
			g.Expect(claim).NotTo(BeNil())
			g.Expect(claim.Spec.State).To(Equal(v1alpha1.ClaimBound))
			g.Expect(claim.Spec.Holder.UID).To(Equal(svc.UID))
			var reservation networkingv1.IPAddress
			g.Expect(k8s.Get(ctx, client.ObjectKey{Name: ip.String()}, &reservation)).To(Succeed())
			g.Expect(reservation.Spec.ParentRef.Name).To(Equal(svc.Name))
		}
	}
	var claims v1alpha1.AllocationClaimList
	g.Expect(k8s.List(ctx, &claims, client.MatchingLabels{v1alpha1.LabelPolicy: policy})).To(Succeed())
	g.Expect(claims.Items).To(HaveLen(len(holders)), "claims that nobody uses")
	g.Expect(t.reservations()).To(HaveLen(len(holders)), "reservations that nobody uses")
	g.Expect(t.assignments()).To(HaveLen(len(services)))
}

var _ = Describe("a controller that is killed", func() {
	It("after any write leaves nothing that the next one does not complete or collect", func() {
		t := newTenant()
		for n := int64(0); ; n++ {
			Expect(n).To(BeNumerically("<=", 30), "writes for two Services: 16 of allocation, 2 ServiceCIDRs, a finalizer and statuses of the policy")
			policy := t.policy(fmt.Sprint("-", n), ranges(t.v4, t.v6))
			services := []*corev1.Service{
				t.service("a", func(s *corev1.Service) { s.Spec.IPFamilyPolicy = ptr.To(corev1.IPFamilyPolicyRequireDualStack) }),
				t.service("b", func(s *corev1.Service) { s.Spec.IPFamilyPolicy = ptr.To(corev1.IPFamilyPolicyRequireDualStack) }),
			}
			var died atomic.Bool
			stop := startManager(quick, dyingClient(n, &died))
			Eventually(func() bool { // killed, or so far that it had no more to write
				if died.Load() {
					return true
				}
				done := 0
				for _, a := range t.assignments() {
					if len(additionalIPs(&a)) == 2 && len(a.Status.Conditions) > 0 {
						done++
					}
				}
				return done == len(services)
			}).Should(BeTrue())
			stop()
			complete := !died.Load()
			// One Service goes and one comes again while no controller runs.
			Expect(k8s.Delete(ctx, services[0])).To(Succeed())
			services[0] = t.service("a", func(s *corev1.Service) { s.Spec.IPFamilyPolicy = ptr.To(corev1.IPFamilyPolicyRequireDualStack) })
			stop = startManager(quick, nil)
			Eventually(func(g Gomega) { t.consistent(g, policy.Name, services, 2) }).Should(Succeed(), "killed after write %d", n)
			Expect(k8s.Delete(ctx, services[0])).To(Succeed())
			Expect(k8s.Delete(ctx, services[1])).To(Succeed())
			Expect(k8s.Delete(ctx, policy)).To(Succeed())
			Eventually(func(g Gomega) {
				t.consistent(g, policy.Name, nil, 0)
				g.Expect(apierrors.IsNotFound(k8s.Get(ctx, client.ObjectKeyFromObject(policy), policy))).To(BeTrue(), "the policy is still there")
			}).Should(Succeed())
			stop()
			if complete {
				Expect(n).To(BeNumerically(">", 10), "writes of a full run")
				return
			}
		}
	})
})

var _ = Describe("two controllers at once, without leader election", func() {
	It("never give one address twice, and agree on one per Service", func() {
		t := newTenant()
		policy := t.policy("", ranges(t.v4))
		startManager(quick, nil)
		startManager(quick, nil)
		Eventually(policyCondition(policy, v1alpha1.PolicyRangesReady)).Should(HavePrefix("True"))
		const n = 200
		services := make([]*corev1.Service, n)
		for i := range services {
			services[i] = t.newService(fmt.Sprintf("web-%03d", i), nil)
		}
		workqueue.ParallelizeUntil(ctx, 16, n, func(i int) {
			defer GinkgoRecover()
			Expect(k8s.Create(ctx, services[i])).To(Succeed())
		})
		Eventually(func(g Gomega) { t.consistent(g, policy.Name, services, 1) }).WithTimeout(60 * time.Second).WithPolling(500 * time.Millisecond).Should(Succeed())
	})
})
