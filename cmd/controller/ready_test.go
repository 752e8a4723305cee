package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	. "github.com/onsi/gomega"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/webhook"
)

// A replica gets no admission requests before it can answer them: it is not ready without a certificate, which it cannot keep while its namespace is missing.
func TestReadyWithCertificate(t *testing.T) {
	c := newCluster(t)
	serve, probe := freeAddress(t), freeAddress(t)
	running, stop := context.WithCancel(c.ctx)
	done := make(chan error, 1)
	go func() {
		done <- run(running, []string{"--kubeconfig=" + c.kubeconfig, "--namespace=late", "--metrics-bind-address=0", "--health-probe-bind-address=" + probe,
			"--webhook-bind-address=" + serve, "--webhook-url=https://" + serve})
	}()
	t.Cleanup(func() {
		stop()
		NewWithT(t).Expect(<-done).To(Succeed())
	})
	c.policy(func(*v1alpha1.ServiceProxyPolicySpec) {})
	ready := func() string {
		response, err := http.Get(fmt.Sprintf("http://%s/readyz", probe))
		if err != nil {
			return err.Error()
		}
		defer response.Body.Close()
		body, _ := io.ReadAll(response.Body)
		return response.Status + " " + string(body)
	}
	c.Eventually(ready).Should(And(HavePrefix("500"), ContainSubstring("[+]ledger ok"), ContainSubstring("[-]webhook failed")))
	c.Consistently(ready, 500*time.Millisecond).Should(HavePrefix("500"))
	var configuration admissionregistrationv1.MutatingWebhookConfiguration
	c.Expect(c.Get(c.ctx, client.ObjectKey{Name: webhook.ConfigurationName}, &configuration)).NotTo(Succeed(), "nobody can serve it")

	c.Expect(c.Create(c.ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "late"}})).To(Succeed())
	c.Eventually(ready).Should(HavePrefix("200"))
	c.Eventually(func() error {
		return c.Get(c.ctx, client.ObjectKey{Name: webhook.ConfigurationName}, &configuration)
	}).Should(Succeed())
	if url := configuration.Webhooks[0].ClientConfig.URL; url == nil || !strings.HasPrefix(*url, "https://"+serve+"/") {
		t.Errorf("API servers are told %v, want %s", url, serve)
	}
}

// freeAddress is one that nobody listens at.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
