package webhook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
	webhookadmission "sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/admission"
	"github.com/serviceproxy/serviceproxy-operator/controllers/allocator"
)

// claiming is a webhook that makes a claim during each call, as admission does.
type claiming struct {
	client client.Client
	hold   atomic.Int64 // how long to wait first, in nanoseconds
	port   atomic.Int32
	made   atomic.Int64
}

func (h *claiming) Handle(ctx context.Context, _ webhookadmission.Request) webhookadmission.Response {
	select {
	case <-time.After(time.Duration(h.hold.Load())):
	case <-ctx.Done():
	}
	claim := allocator.NewClaim(allocator.Lock{Port: uint16(h.port.Add(1))}, allocator.Hold{Policy: "burst", Use: v1alpha1.ClaimUseNodePort, State: v1alpha1.ClaimReserved, Holder: allocator.Holder{Namespace: "burst"}})
	if err := h.client.Create(ctx, claim); err != nil {
		return webhookadmission.Errored(http.StatusServiceUnavailable, err)
	}
	h.made.Add(1)
	return webhookadmission.Allowed("")
}

var _ = Describe("The priority level of the controller", func() {
	It("lets claims through while a burst of Services waits for them", func() {
		const (
			controller = "system:serviceaccount:serviceproxy-system:serviceproxy-controller"
			user       = "system:serviceaccount:burst:deployer"
		)
		env := &envtest.Environment{CRDDirectoryPaths: crds, ErrorIfCRDPathMissing: true, ControlPlaneStopTimeout: time.Minute}
		env.ControlPlane.GetAPIServer().Configure().Set("max-requests-inflight", "15").Set("max-mutating-requests-inflight", "15").
			Set("service-cluster-ip-range", "10.0.0.0/20")
		config, err := env.Start()
		Expect(err).NotTo(HaveOccurred())
		DeferCleanup(env.Stop)
		// From here on the suite's own client is this cluster's.
		before := k8s
		DeferCleanup(func() { k8s = before })
		as := func(name string) (*rest.Config, client.Client) {
			added, err := env.AddUser(envtest.User{Name: name, Groups: []string{"system:serviceaccounts", "system:authenticated"}}, nil)
			Expect(err).NotTo(HaveOccurred())
			out := added.Config()
			out.QPS = -1
			c, err := client.New(out, client.Options{Scheme: scheme})
			Expect(err).NotTo(HaveOccurred())
			return out, c
		}
		k8s, err = client.New(config, client.Options{Scheme: scheme})
		Expect(err).NotTo(HaveOccurred())
		Expect(k8s.Create(ctx, &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "all"},
			RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "cluster-admin"},
			Subjects: []rbacv1.Subject{{Kind: rbacv1.UserKind, Name: controller, APIGroup: rbacv1.GroupName}, {Kind: rbacv1.UserKind, Name: user, APIGroup: rbacv1.GroupName}},
		})).To(Succeed())

		o := newOperator()
		controllerConfig, controllerClient := as(controller)
		_, users := as(user)
		handler := &claiming{client: controllerClient}
		handler.port.Store(29999)
		certificate := &Certificate{}
		mgr := o.newManager(controllerConfig, o.address, certificate)
		mgr.GetWebhookServer().Register(admission.Path, &webhook.Admission{Handler: handler})
		Expect(SetupWithManager(mgr, Options{Namespace: o.namespace, URL: "https://" + o.address, Certificate: certificate})).To(Succeed())
		run(mgr)
		makeNamespace("burst", map[string]string{"tenant": "burst"})
		makePolicy("burst", "burst", v1alpha1.EnforcementStrict)
		Eventually(entryNames).Should(HavePrefix("burst" + entryStrict))
		Eventually(func(g Gomega) { // and the API server has read it
			made := handler.made.Load()
			g.Expect(users.Create(ctx, newService("burst", "probe"), client.DryRunAll)).To(Succeed())
			g.Expect(handler.made.Load()).To(BeNumerically(">", made))
		}).Should(Succeed())

		burst := func(name string, size int) (failed int64, took time.Duration) {
			var failures atomic.Int64
			var creators sync.WaitGroup
			began := time.Now()
			for i := range size {
				creators.Go(func() {
					if err := users.Create(ctx, newService("burst", fmt.Sprintf("%s-%d", name, i))); err != nil {
						if failures.Add(1) == 1 {
							GinkgoWriter.Println(name, err)
						}
					}
				})
			}
			creators.Wait()
			GinkgoWriter.Printf("%s: %d creates, %d failed, %v\n", name, size, failures.Load(), time.Since(began))
			return failures.Load(), time.Since(began)
		}
		handler.hold.Store(int64(100 * time.Millisecond)) // by then, the burst has taken every seat that it can get
		failed, _ := burst("without", 24)
		handler.hold.Store(0)
		Expect(failed).To(BeNumerically(">", 0), "the level would not be needed")

		text, err := os.ReadFile(filepath.Join("..", "..", "config", "flowcontrol", "flowcontrol.yaml"))
		Expect(err).NotTo(HaveOccurred())
		for documents := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096); ; {
			object := &unstructured.Unstructured{}
			err := documents.Decode(&object.Object)
			if errors.Is(err, io.EOF) {
				break
			}
			Expect(err).NotTo(HaveOccurred())
			Expect(k8s.Create(ctx, object)).To(Succeed())
		}
		Eventually(func(g Gomega) { // and the API server has sorted its requests by it
			flow, err := flowOf(controllerConfig)
			g.Expect(err).NotTo(HaveOccurred())
			var schema unstructured.Unstructured
			schema.SetAPIVersion("flowcontrol.apiserver.k8s.io/v1")
			schema.SetKind("FlowSchema")
			g.Expect(k8s.Get(ctx, client.ObjectKey{Name: "serviceproxy-controller"}, &schema)).To(Succeed())
			g.Expect(flow).To(Equal(string(schema.GetUID())))
		}).Should(Succeed())
		made := handler.made.Load()
		failed, _ = burst("with", 300)
		Expect(failed).To(BeZero())
		Expect(handler.made.Load() - made).To(BeNumerically(">=", 300))
	})
})

// flowOf tells the FlowSchema that the API server sorts this user's requests by.
func flowOf(config *rest.Config) (uid string, err error) {
	h, err := rest.HTTPClientFor(config)
	if err != nil {
		return "", err
	}
	defer h.CloseIdleConnections()
	response, err := h.Get(config.Host + "/apis/networking.serviceproxy.io/v1alpha1/allocationclaims?limit=1")
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	return response.Header.Get("X-Kubernetes-PF-FlowSchema-UID"), nil
}
