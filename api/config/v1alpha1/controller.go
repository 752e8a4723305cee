package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ControllerKind is the kind of a ControllerConfiguration.
const ControllerKind = "ControllerConfiguration"

// ControllerConfiguration configures the central controller.
type ControllerConfiguration struct {
	metav1.TypeMeta `json:",inline"`

	// namespace is where the controller runs: the namespace of its Lease, of the webhook's certificate and of the Service serviceproxy-webhook.
	// Default: the environment variable POD_NAMESPACE, else the Pod's own.
	Namespace string `json:"namespace"`

	// clientConnection says how to reach the API server.
	ClientConnection ClientConnection `json:"clientConnection"`

	// leaderElection lets several replicas run.
	LeaderElection LeaderElection `json:"leaderElection"`

	// healthzBindAddress is where /healthz and /readyz are served: HOST:PORT, :PORT for all addresses of the node, or 0 for nowhere. Default: :8081.
	HealthzBindAddress string `json:"healthzBindAddress"`

	// metricsBindAddress is where /metrics and /configz are served: HOST:PORT, :PORT for all addresses of the node, or 0 for nowhere. Default: :8080.
	MetricsBindAddress string `json:"metricsBindAddress"`

	// enableProfiling serves Go's profiles below /debug/pprof/ at metricsBindAddress. Default: false.
	EnableProfiling bool `json:"enableProfiling"`

	// webhook is where API servers ask about Services that are created and changed.
	Webhook Webhook `json:"webhook"`

	// kubeProxy says how Services are moved from kube-proxy and back.
	KubeProxy KubeProxy `json:"kubeProxy"`

	// logging says what is logged.
	Logging Logging `json:"logging"`
}

// KubeProxy says how Services are moved from kube-proxy and back.
type KubeProxy struct {
	// handBackGracePeriod is for how long nodes still forward a Service that was handed back, so that kube-proxy has time to forward it: longer than kube-proxy's full sync takes.
	// From 1s to 1h. Default: 30s.
	HandBackGracePeriod Duration `json:"handBackGracePeriod"`
}

// LeaderElection lets several replicas run.
type LeaderElection struct {
	// leaderElect lets one replica of several work at a time; all of them answer admission. Default: false.
	LeaderElect bool `json:"leaderElect"`
}

// Webhook is where API servers ask about Services that are created and changed.
type Webhook struct {
	// bindAddress is where the webhook is served: HOST:PORT, :PORT for all addresses of the node, or 0 for nowhere: the webhook's configuration is taken away then.
	// Default: :9443.
	BindAddress string `json:"bindAddress"`
	// url is https://HOST:PORT of the webhook as API servers reach it, for a controller outside of the cluster. Default: none, which is the Service
	// serviceproxy-webhook.
	URL string `json:"url"`
}
