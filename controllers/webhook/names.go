package webhook

import (
	"net/url"
	"strings"

	"github.com/serviceproxy/serviceproxy-operator/controllers/admission"
)

const (
	// ServiceName is the Service in front of all replicas. API servers reach the webhook through it unless there is a URL.
	ServiceName = "serviceproxy-webhook"
	// SecretName is the Secret that holds the certificate.
	SecretName = "serviceproxy-webhook-cert"
	// ConfigurationName is the MutatingWebhookConfiguration.
	ConfigurationName = "serviceproxy-webhook"
)

// ExcludedNamespaces are those whose Services never wait for this operator, however dead it is: the cluster's own, and the one that it is repaired in.
func ExcludedNamespaces(own string) []string { return []string{"kube-system", own} }

// target is where API servers reach the webhook.
type target struct {
	namespace string // of the Service
	url       string // without path, empty for the Service
}

// names are what API servers expect the certificate to be for.
func (t target) names() []string {
	service := ServiceName + "." + t.namespace + ".svc"
	names := []string{service, service + ".cluster.local"}
	if u, err := url.Parse(t.url); err == nil && u.Hostname() != "" {
		names = append(names, u.Hostname())
	}
	return names
}

// at is the URL of the webhook itself.
func (t target) at() string { return strings.TrimSuffix(t.url, "/") + admission.Path }
