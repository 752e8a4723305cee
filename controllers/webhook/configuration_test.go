package webhook

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/relay"
)

const all = entryAll + " Ignore"

var _ = Describe("The webhook configuration", func() {
	It("is there while a policy is, and has one entry more for each that is Strict", func() {
		o := newOperator()
		o.start()
		Eventually(func() error {
			return k8s.Get(ctx, client.ObjectKey{Namespace: o.namespace, Name: SecretName}, &corev1.Secret{})
		}).Should(Succeed())
		Consistently(entryNames).Should(Equal("none"))

		makePolicy("best", "a", v1alpha1.EnforcementBestEffort)
		Eventually(entryNames).Should(Equal(all))
		makePolicy("strict", "b", v1alpha1.EnforcementStrict)
		Eventually(entryNames).Should(Equal("strict" + entryStrict + " Fail, " + all))
		first := makePolicy("first", "c", v1alpha1.EnforcementStrict)
		first.Spec.Priority, first.Spec.KubeProxy = 7, v1alpha1.KubeProxyCoexist
		first.Spec.ServiceSelector.MatchLabels = map[string]string{"exposed": "yes"}
		Expect(k8s.Update(ctx, first)).To(Succeed())
		Eventually(entryNames).Should(Equal("first" + entryStrict + " Fail, strict" + entryStrict + " Fail, " + all))

		// The order may be right before the update arrives: policies of one second are in the order of their names.
		Eventually(func() map[string]string { return configuration().Webhooks[0].ObjectSelector.MatchLabels }).Should(Equal(map[string]string{"exposed": "yes"}))

		c := configuration()
		Expect(c.OwnerReferences).To(HaveLen(1))
		Expect(c.OwnerReferences[0].Name).To(Equal(o.namespace))
		entry := c.Webhooks[0]
		Expect(entry.NamespaceSelector.MatchLabels).To(Equal(map[string]string{"tenant": "c"}))
		Expect(entry.NamespaceSelector.MatchExpressions).To(ConsistOf(metav1.LabelSelectorRequirement{Key: "kubernetes.io/metadata.name", Operator: "NotIn", Values: []string{"kube-system", o.namespace}}))
		Expect(entry.ObjectSelector.MatchExpressions).To(ConsistOf(metav1.LabelSelectorRequirement{Key: "service.kubernetes.io/service-proxy-name", Operator: "In", Values: []string{"serviceproxy.io"}}))
		for _, w := range c.Webhooks {
			Expect(*w.TimeoutSeconds).To(BeNumerically("<=", 3))
			Expect(*w.SideEffects).To(Equal(admissionregistrationv1.SideEffectClassNoneOnDryRun))
		}

		Expect(k8s.DeleteAllOf(ctx, &v1alpha1.ServiceProxyPolicy{})).To(Succeed())
		Eventually(entryNames).Should(Equal("none"))
	})

	It("is repaired", func() {
		o := newOperator()
		o.start()
		makePolicy("repaired", "a", v1alpha1.EnforcementStrict)
		want := "repaired" + entryStrict + " Fail, " + all
		Eventually(entryNames).Should(Equal(want))
		c := configuration()
		uid := c.UID
		c.Webhooks[0].FailurePolicy = new(admissionregistrationv1.Ignore)
		c.Webhooks[1].ClientConfig.CABundle = c.Webhooks[0].ClientConfig.CABundle[:0]
		c.OwnerReferences = nil
		Expect(k8s.Update(ctx, c)).To(Succeed())
		Eventually(func(g Gomega) {
			c = configuration()
			g.Expect(entryNames()).To(Equal(want))
			g.Expect(c.Webhooks[1].ClientConfig.CABundle).NotTo(BeEmpty())
			g.Expect(c.OwnerReferences).To(HaveLen(1))
		}).Should(Succeed())
		Expect(c.UID).To(Equal(uid))
		Expect(k8s.Delete(ctx, c)).To(Succeed())
		Eventually(entryNames).Should(Equal(want))

		version := configuration().ResourceVersion
		Consistently(func() string { return configuration().ResourceVersion }).Should(Equal(version), "it is written although nothing changed")
	})

	It("is left alone if it is not ours", func() {
		o := newOperator()
		foreign := &admissionregistrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: ConfigurationName}}
		Expect(k8s.Create(ctx, foreign)).To(Succeed())
		o.start()
		p := makePolicy("alone", "a", v1alpha1.EnforcementStrict)
		Eventually(func(g Gomega) {
			var list eventsv1.EventList
			g.Expect(k8s.List(ctx, &list)).To(Succeed())
			g.Expect(list.Items).To(ContainElement(And(HaveField("Reason", "WebhookConfigurationNotOurs"), HaveField("Regarding.UID", foreign.UID))))
		}).Should(Succeed())
		Expect(k8s.Delete(ctx, p)).To(Succeed())
		Consistently(func() string { return configuration().ResourceVersion }).Should(Equal(foreign.ResourceVersion))

		makePolicy("later", "a", v1alpha1.EnforcementStrict)
		Expect(k8s.Delete(ctx, foreign)).To(Succeed())
		Eventually(entryNames).Should(Equal("later" + entryStrict + " Fail, " + all))
	})

	It("goes with the namespace of the operator, and with a process that serves no webhook", func() {
		o := newOperator()
		_, stop := o.start()
		makePolicy("goes", "a", v1alpha1.EnforcementStrict)
		Eventually(entryNames).ShouldNot(Equal("none"))
		stop()
		Consistently(entryNames).ShouldNot(Equal("none"), "other replicas may serve it")
		_, stop = o.startAt(restConfig, freeAddress(), false)
		Eventually(entryNames).Should(Equal("none"))
		stop()

		_, stop = o.start()
		Eventually(entryNames).ShouldNot(Equal("none"))
		stop()
		Expect(k8s.Delete(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: o.namespace}})).To(Succeed())
		Eventually(entryNames).Should(Equal("none"), "nobody is left to delete it but the garbage collector")
	})

	It("asks for what allocates, and for nothing else", func() {
		o := newOperator()
		o.start()
		a := tenant("asked")
		makePolicy("asked", a, v1alpha1.EnforcementBestEffort)
		Eventually(entryNames).Should(Equal(all))
		o.enforced(a)
		creates := func(namespace, name string, change func(*corev1.Service)) {
			GinkgoHelper()
			Expect(k8s.Create(ctx, newService(namespace, name, change))).To(Succeed())
		}
		nothing := func(*corev1.Service) {}
		for _, namespace := range []string{"kube-system", o.namespace} {
			creates(namespace, "excluded", nothing)
			Expect(o.stub.take()).To(BeEmpty(), namespace)
		}
		var apiServer corev1.Service
		Expect(k8s.Get(ctx, client.ObjectKey{Namespace: "default", Name: "kubernetes"}, &apiServer)).To(Succeed())
		apiServer.Spec.Ports[0].Port++
		Expect(k8s.Update(ctx, &apiServer, client.DryRunAll)).To(Succeed())
		creates(a, "elsewhere", func(s *corev1.Service) {
			s.Spec = corev1.ServiceSpec{Type: "ExternalName", ExternalName: "example.com"}
		})
		creates(a, "headless", func(s *corev1.Service) { s.Spec.ClusterIP = "None" })
		Expect(o.stub.take()).To(BeEmpty())

		By("another proxy's Service, which is kept out of the policies' ranges")
		creates(a, "foreign", func(s *corev1.Service) {
			s.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "cilium"}
		})
		Expect(o.stub.take()).To(HaveLen(1), "by the entry that nobody needs to answer")

		creates(a, "ours", func(s *corev1.Service) {
			s.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "serviceproxy.io"}
		})
		creates("default", "kubernetes-too", nothing)
		Expect(k8s.Create(ctx, newService(a, "", func(s *corev1.Service) { s.GenerateName = "generated-" }))).To(Succeed())
		Expect(k8s.Create(ctx, newService(a, "dry"), client.DryRunAll)).To(Succeed())
		calls := o.stub.take()
		Expect(calls).To(HaveLen(4))
		Expect(calls[3]).To(Equal(call{a + "/dry", "CREATE", true}))
		Expect(k8s.Delete(ctx, newService("default", "kubernetes-too"))).To(Succeed())
		Expect(o.stub.take()).To(BeEmpty())
	})

	It("asks for the UPDATEs that change what is allocated", func() {
		o := newOperator()
		o.start()
		a := tenant("updated")
		makePolicy("updated", a, v1alpha1.EnforcementStrict)
		Eventually(entryNames).Should(HavePrefix("updated" + entryStrict))
		o.enforced(a)
		many := func(s *corev1.Service) {
			s.Spec.Type = "NodePort"
			s.Spec.Ports = nil
			for i := range int32(400) {
				s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: fmt.Sprintf("p%d", i), Port: 1000 + i})
			}
		}
		balanced := func(s *corev1.Service) { s.Spec.Type = "LoadBalancer" }
		local := func(s *corev1.Service) { balanced(s); s.Spec.ExternalTrafficPolicy = "Local" }
		external := func(s *corev1.Service) {
			s.Spec = corev1.ServiceSpec{Type: "ExternalName", ExternalName: "example.com"}
		}
		// A PUT by somebody who knows nothing of what was allocated.
		bare := func(s *corev1.Service) {
			s.Spec.ClusterIP, s.Spec.ClusterIPs, s.Spec.IPFamilies, s.Spec.IPFamilyPolicy, s.Spec.HealthCheckNodePort = "", nil, nil, nil, 0
			for i := range s.Spec.Ports {
				s.Spec.Ports[i].NodePort = 0
			}
		}
		and := func(changes ...func(*corev1.Service)) func(*corev1.Service) {
			return func(s *corev1.Service) {
				for _, change := range changes {
					change(s)
				}
			}
		}
		port := func(s *corev1.Service) {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "more", Port: 81})
		}
		for i, test := range []struct {
			name           string
			before, change func(*corev1.Service)
			asks           bool
		}{
			{"nothing", and(), and(), false},
			{"labels and annotations", and(), func(s *corev1.Service) {
				s.Labels, s.Annotations = map[string]string{"a": "b"}, map[string]string{"c": "d"}
			}, false},
			{"selector, affinity and target ports", and(), func(s *corev1.Service) {
				s.Spec.Selector, s.Spec.SessionAffinity, s.Spec.Ports[0].TargetPort.IntVal = map[string]string{"a": "b"}, "ClientIP", 8080
			}, false},
			{"a PUT of nothing", and(), bare, false},
			{"a PUT of nothing to node ports", local, bare, false},
			{"a PUT of nothing to many ports", many, bare, false},
			{"a label of many ports", many, func(s *corev1.Service) { s.Labels = map[string]string{"a": "b"} }, false},
			{"one of many ports", many, func(s *corev1.Service) { s.Spec.Ports[399].Port = 9999 }, true},
			{"one of many ports by a PUT", many, and(bare, func(s *corev1.Service) { s.Spec.Ports[399].Port = 9999 }), true},
			{"to NodePort", and(), func(s *corev1.Service) { s.Spec.Type = "NodePort" }, true},
			{"to NodePort by a PUT", and(), and(bare, func(s *corev1.Service) { s.Spec.Type = "NodePort" }), true},
			{"from LoadBalancer", balanced, and(bare, func(s *corev1.Service) {
				s.Spec.Type, s.Spec.AllocateLoadBalancerNodePorts, s.Spec.ExternalTrafficPolicy = "ClusterIP", nil, ""
			}), true},
			{"from ExternalName", external, func(s *corev1.Service) { s.Spec = newService("", "").Spec }, true},
			{"to ExternalName", and(), external, false},
			{"another port", balanced, port, true},
			{"another port by a PUT", balanced, and(bare, port), true},
			{"another node port", balanced, func(s *corev1.Service) { s.Spec.Ports[0].NodePort = 32111 }, true},
			{"traffic policy", balanced, func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = "Local" }, true},
			{"no node ports", balanced, func(s *corev1.Service) { s.Spec.AllocateLoadBalancerNodePorts = new(false) }, true},
			{"families", and(), func(s *corev1.Service) { s.Spec.IPFamilyPolicy = new(corev1.IPFamilyPolicyPreferDualStack) }, true},
		} {
			svc := newService(a, fmt.Sprintf("s%d", i), test.before)
			Expect(k8s.Create(ctx, svc)).To(Succeed(), test.name)
			o.stub.take()
			test.change(svc)
			Expect(k8s.Update(ctx, svc)).To(Succeed(), test.name)
			asked := 0
			if test.asks {
				asked = 2 // the Strict entry and the one for all
			}
			Expect(o.stub.take()).To(HaveLen(asked), test.name)
			Expect(k8s.Delete(ctx, svc)).To(Succeed(), test.name)
		}
	})
})

var _ = Describe("Without an operator", func() {
	It("Services of BestEffort policies pass, those of Strict ones are refused, and what exists can be worked with", func() {
		o := newOperator()
		_, stop := o.start()
		best, strict := tenant("best"), tenant("strict")
		makePolicy("best-effort", best, v1alpha1.EnforcementBestEffort)
		makePolicy("demanding", strict, v1alpha1.EnforcementStrict)
		Eventually(entryNames).Should(Equal("demanding" + entryStrict + " Fail, " + all))
		o.enforced(strict)
		svc := newService(strict, "old", func(s *corev1.Service) { s.Finalizers = []string{"example.com/hold"}; s.Spec.Type = "NodePort" })
		Expect(k8s.Create(ctx, svc)).To(Succeed())
		stop()

		began := time.Now()
		Expect(k8s.Create(ctx, newService(best, "new"))).To(Succeed())
		GinkgoWriter.Printf("a create under BestEffort took %v with nobody listening\n", time.Since(began))
		Expect(time.Since(began)).To(BeNumerically("<", time.Second))
		for _, how := range [][]client.CreateOption{nil, {client.DryRunAll}} {
			err := k8s.Create(ctx, newService(strict, "new"), how...)
			Expect(err).To(MatchError(ContainSubstring(`failed calling webhook "demanding` + entryStrict + `"`)))
		}

		Expect(k8s.Create(ctx, newService(strict, "another-proxys", func(s *corev1.Service) {
			s.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "cilium"}
		}))).To(Succeed())

		svc.Labels = map[string]string{"edited": "yes"}
		Expect(k8s.Update(ctx, svc)).To(Succeed())
		svc.Spec.Ports[0].NodePort, svc.Spec.ClusterIP, svc.Spec.ClusterIPs = 0, "", nil
		Expect(k8s.Update(ctx, svc)).To(Succeed(), "a PUT that leaves out what was allocated")
		Expect(k8s.Delete(ctx, svc)).To(Succeed())
		Expect(k8s.Get(ctx, client.ObjectKeyFromObject(svc), svc)).To(Succeed())
		svc.Finalizers = nil
		Expect(k8s.Update(ctx, svc)).To(Succeed())

		held := newService(best, "held")
		Expect(k8s.Create(ctx, held)).To(Succeed())
		for _, name := range []string{best, strict} {
			Expect(k8s.Delete(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}})).To(Succeed())
		}
		for _, name := range []string{best, strict} {
			Eventually(func() error { return k8s.Get(ctx, client.ObjectKey{Name: name}, &corev1.Namespace{}) }).Should(MatchError(ContainSubstring("not found")))
		}
	})

	It("BestEffort waits no longer than the timeout for one that hangs", func() {
		o := newOperator()
		_, stop := o.start()
		best := tenant("hung")
		makePolicy("hung", best, v1alpha1.EnforcementBestEffort)
		Eventually(entryNames).Should(Equal(all))
		o.enforced(best)
		stop()
		hung, err := net.Listen("tcp", o.address) // the kernel accepts, and nobody answers
		Expect(err).NotTo(HaveOccurred())
		defer hung.Close()
		began := time.Now()
		Expect(k8s.Create(ctx, newService(best, "new"))).To(Succeed())
		Expect(time.Since(began)).To(And(BeNumerically(">", 2*time.Second), BeNumerically("<", 5*time.Second)))
	})
})

var _ = Describe("With two replicas of which one falls silent", func() {
	It("an API server soon asks the other", func() {
		o := newOperator()
		addresses := []string{freeAddress(), freeAddress()}
		front, err := relay.New(addresses...)
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(front.Close)
		o.address = front.Address()
		for _, address := range addresses {
			o.startAt(restConfig, address, true)
		}
		strict := tenant("silent")
		makePolicy("silent", strict, v1alpha1.EnforcementStrict)
		Eventually(entryNames).Should(HavePrefix("silent" + entryStrict))
		o.enforced(strict)
		// As if its readiness probe had noticed at once. What is connected already stays so.
		for i := range 2 {
			asked := front.Target(i).Carried()
			front.Target(i).SetReady(true)
			front.Target(1 - i).SetReady(false)
			front.Target(1 - i).Hold()
			failed := 0
			Eventually(func() error {
				err := k8s.Create(ctx, newService(strict, fmt.Sprintf("s%d-%d", i, failed)))
				if err != nil {
					failed++
				}
				return err
			}).WithTimeout(40 * time.Second).Should(Succeed())
			Expect(failed).To(BeNumerically("<=", 2), "more than the requests that wait on the connections of two entries")
			GinkgoWriter.Printf("%d creates failed, %d connections to the other replica\n", failed, front.Target(i).Carried()-asked)
			front.Target(1 - i).Resume()
		}
	})
})

var _ = Describe("The certificate", func() {
	secretOf := func(o *operator) *corev1.Secret {
		GinkgoHelper()
		var secret corev1.Secret
		Expect(k8s.Get(ctx, client.ObjectKey{Namespace: o.namespace, Name: SecretName}, &secret)).To(Succeed())
		return &secret
	}
	signer := func(o *operator) string {
		GinkgoHelper()
		s, _ := decode(secretOf(o), time.Now())
		return s.signing.cert.SerialNumber.String()
	}

	It("is one for all replicas, and all follow it", func() {
		o := newOperator()
		var replicas []*Certificate
		for i := range 3 {
			address := o.address
			if i > 0 {
				address = freeAddress()
			}
			c, _ := o.startAt(restConfig, address, true)
			replicas = append(replicas, c)
		}
		serial := func(c *Certificate) func() string {
			return func() string {
				if current := c.current.Load(); current != nil {
					return current.Leaf.SerialNumber.String()
				}
				return ""
			}
		}
		inSecret := func() string {
			s, err := decode(secretOf(o), time.Now())
			Expect(err).NotTo(HaveOccurred())
			return s.serving.SerialNumber.String()
		}
		agree := func() string {
			GinkgoHelper()
			var agreed string
			Eventually(func(g Gomega) {
				agreed = inSecret()
				for _, c := range replicas {
					g.Expect(serial(c)()).To(Equal(agreed))
				}
			}).Should(Succeed())
			return agreed
		}
		Eventually(serial(replicas[0])).ShouldNot(BeEmpty())
		first := agree()
		Consistently(inSecret).Should(Equal(first))
		damaged := secretOf(o)
		damaged.Data[corev1.TLSCertKey] = []byte("edited")
		Expect(k8s.Update(ctx, damaged)).To(Succeed())
		Eventually(func(g Gomega) {
			_, err := decode(secretOf(o), time.Now())
			g.Expect(err).NotTo(HaveOccurred())
		}).Should(Succeed())
		second := agree()
		Expect(second).NotTo(Equal(first))
		Expect(k8s.Delete(ctx, secretOf(o))).To(Succeed())
		Eventually(func() error {
			return k8s.Get(ctx, client.ObjectKey{Namespace: o.namespace, Name: SecretName}, &corev1.Secret{})
		}).Should(Succeed())
		Expect(agree()).NotTo(Equal(second))
	})

	It("replaces a Secret of another make", func() {
		o := newOperator()
		Expect(k8s.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: o.namespace, Name: SecretName}, Immutable: new(true), StringData: map[string]string{"a": "b"}})).To(Succeed())
		c, _ := o.start()
		Eventually(func() error { return c.ready(time.Now()) }).Should(Succeed())
		Expect(secretOf(o).Type).To(Equal(corev1.SecretTypeTLS))
		families, err := metrics.Registry.Gather()
		Expect(err).NotTo(HaveOccurred())
		Expect(families).To(ContainElement(And(HaveField("GetName()", "serviceproxy_webhook_certificate_expiry_timestamp_seconds"),
			HaveField("GetMetric()", ConsistOf(HaveField("GetGauge().GetValue()", BeNumerically("~", time.Now().Add(servingLife).Unix(), 60)))))))
	})

	It("is rotated with its authority while Services are created under Strict, and none of them fails", func() {
		o := newOperator()
		_, stop := o.start()
		strict := tenant("rotated")
		makePolicy("rotated", strict, v1alpha1.EnforcementStrict)
		Eventually(entryNames).Should(HavePrefix("rotated" + entryStrict))
		o.enforced(strict)
		first := signer(o)

		// An authority without its key cannot renew anything, so the next one takes over at once: the way of every rotation, only years sooner.
		secret := secretOf(o)
		delete(secret.Data, keySigning)
		Expect(k8s.Update(ctx, secret)).To(Succeed())
		creating, enough := context.WithCancel(ctx)
		defer enough()
		var created, failed atomic.Int64
		var creators sync.WaitGroup
		for i := range 4 {
			creators.Go(func() {
				for n := 0; creating.Err() == nil; n++ {
					svc := newService(strict, fmt.Sprintf("s%d-%d", i, n))
					if err := k8s.Create(ctx, svc); err != nil {
						failed.Add(1)
						GinkgoWriter.Println(err)
						continue
					}
					created.Add(1)
					if err := k8s.Delete(ctx, svc); err != nil { // there are not so many addresses
						GinkgoWriter.Println(err)
					}
				}
			})
		}
		bundles := map[int]bool{}
		Eventually(func(g Gomega) {
			s, _ := decode(secretOf(o), time.Now())
			bundles[len(s.bundle())] = true
			g.Expect(signer(o)).NotTo(Equal(first))
		}).Should(Succeed())
		after := created.Load()
		Eventually(created.Load).Should(BeNumerically(">", after+50))
		enough()
		creators.Wait()
		Expect(failed.Load()).To(BeZero())
		Expect(bundles).To(HaveKey(2), "both authorities were trusted for some time")
		GinkgoWriter.Printf("%d Services created during a rotation, none failed\n", created.Load())

		stop() // so that the API server connects anew, and sees the new certificate only
		o.start()
		Eventually(func() error { return k8s.Create(ctx, newService(strict, "after")) }).Should(Succeed())
	})
})
