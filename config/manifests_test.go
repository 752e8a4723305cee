// Package config_test holds the manifests to what they claim: a cluster takes them, and each program may do what it must and no more.
package config_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/yaml"

	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/controllers/webhook"
)

func TestDefaultInstall(t *testing.T) {
	assets := os.Getenv("KUBEBUILDER_ASSETS")
	if assets == "" {
		t.Fatal("KUBEBUILDER_ASSETS is not set: run `make test-envtest`, or `export KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)`")
	}
	environment := &envtest.Environment{}
	config, err := environment.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := environment.Stop(); err != nil {
			t.Error(err)
		}
	})
	c, err := client.New(config, client.Options{})
	if err != nil {
		t.Fatal(err)
	}

	for _, object := range kustomize(t, filepath.Join(assets, "kubectl"), "default") {
		if err := install(t.Context(), c, object); err != nil {
			t.Errorf("apply %s %s: %v", object.GetKind(), object.GetName(), err)
		}
	}
	for _, object := range kustomize(t, filepath.Join(assets, "kubectl"), "samples") {
		if err := install(t.Context(), c, object); err != nil {
			t.Errorf("apply sample %s: %v", object.GetName(), err)
		}
	}

	const ours, registration = "networking.serviceproxy.io", "admissionregistration.k8s.io"
	for _, test := range []struct {
		account, verb, group, resource, subresource, namespace string
		allowed                                                bool
		name                                                   string // of the object, empty for any
	}{
		{"agent", "watch", ours, "serviceassignments", "", "", true, ""},
		{"agent", "watch", "discovery.k8s.io", "endpointslices", "", "", true, ""},
		{"agent", "watch", "", "nodes", "", "", true, ""},
		{"agent", "watch", ours, "nodeproxystates", "", "", true, ""},
		{"agent", "patch", ours, "nodeproxystates", "status", "", true, ""},
		{"agent", "patch", ours, "nodeproxystates", "", "", false, ""},
		{"agent", "create", ours, "nodeproxystates", "", "", false, ""},
		{"agent", "patch", ours, "serviceassignments", "status", "", false, ""},
		{"agent", "update", ours, "serviceassignments", "", "", false, ""},
		{"agent", "update", "", "services", "", "", false, ""},
		{"agent", "patch", "", "nodes", "", "", false, ""},
		{"agent", "list", "", "secrets", "", "", false, ""},
		{"controller", "watch", "", "services", "", "", true, ""},
		{"controller", "create", ours, "allocationclaims", "", "", true, ""},
		{"controller", "create", ours, "serviceassignments", "", "default", true, ""},
		{"controller", "create", "networking.k8s.io", "servicecidrs", "", "", true, ""},
		{"controller", "create", "coordination.k8s.io", "leases", "", "serviceproxy-system", true, ""},
		{"controller", "create", "coordination.k8s.io", "leases", "", "default", false, ""},
		{"controller", "create", "", "events", "", "serviceproxy-system", true, ""},
		{"controller", "create", "", "events", "", "default", false, ""},
		{"controller", "create", "events.k8s.io", "events", "", "default", true, ""},
		{"controller", "update", ours, "nodeproxystates", "status", "", false, ""},
		{"controller", "patch", ours, "nodeproxystates", "status", "", true, ""},
		{"controller", "patch", "", "services", "", "", true, ""},
		{"controller", "delete", "", "services", "", "", false, ""},
		{"controller", "delete", ours, "serviceproxypolicies", "", "", false, ""},
		{"controller", "list", "", "secrets", "", "", false, ""},
		{"controller", "create", "", "secrets", "", "serviceproxy-system", true, ""},
		{"controller", "create", "", "secrets", "", "default", false, ""},
		{"controller", "list", "", "secrets", "", "serviceproxy-system", false, ""},
		{"controller", "get", "", "secrets", "", "serviceproxy-system", false, "another"},
		{"controller", "watch", "", "secrets", "", "serviceproxy-system", true, "serviceproxy-webhook-cert"},
		{"controller", "update", "", "secrets", "", "serviceproxy-system", true, "serviceproxy-webhook-cert"},
		{"controller", "create", registration, "mutatingwebhookconfigurations", "", "", true, ""},
		{"controller", "list", registration, "mutatingwebhookconfigurations", "", "", false, ""},
		{"controller", "watch", registration, "mutatingwebhookconfigurations", "", "", true, "serviceproxy-webhook"},
		{"controller", "delete", registration, "mutatingwebhookconfigurations", "", "", true, "serviceproxy-webhook"},
		{"controller", "update", registration, "mutatingwebhookconfigurations", "", "", false, "another"},
		{"controller", "update", registration, "validatingwebhookconfigurations", "", "", false, ""},
	} {
		review := func(ctx context.Context) (bool, error) {
			r := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
				User:   "system:serviceaccount:serviceproxy-system:serviceproxy-" + test.account,
				Groups: []string{"system:serviceaccounts", "system:authenticated"},
				ResourceAttributes: &authorizationv1.ResourceAttributes{
					Verb: test.verb, Group: test.group, Resource: test.resource, Subresource: test.subresource, Namespace: test.namespace, Name: test.name,
				},
			}}
			err := c.Create(ctx, r)
			return err == nil && r.Status.Allowed == test.allowed, err
		}
		// The authorizer reads the roles from a cache.
		if err := wait.PollUntilContextTimeout(t.Context(), 10*time.Millisecond, 10*time.Second, true, review); err != nil {
			t.Errorf("may the %s %s %s/%s %s %q in %q? want %v: %v", test.account, test.verb, test.group, test.resource, test.subresource, test.name, test.namespace, test.allowed, err)
		}
	}
}

// install applies the object as kubectl would, and waits for the API server to know the kinds that the objects before it defined.
func install(ctx context.Context, c client.Client, object *unstructured.Unstructured) error {
	var last error
	err := wait.PollUntilContextTimeout(ctx, 100*time.Millisecond, 10*time.Second, true, func(ctx context.Context) (bool, error) {
		if namespaced, err := c.IsObjectNamespaced(object); err == nil && namespaced && object.GetNamespace() == "" {
			object.SetNamespace("default")
		}
		last = c.Apply(ctx, client.ApplyConfigurationFromUnstructured(object), client.FieldOwner("install"))
		return last == nil || !strings.Contains(last.Error(), "no matches for kind"), nil
	})
	return errors.Join(err, last)
}

// kustomize builds a folder and checks that what it gives is labelled and, where it must be, in our namespace.
func kustomize(t *testing.T, kubectl, folder string) []*unstructured.Unstructured {
	t.Helper()
	command := exec.CommandContext(t.Context(), kubectl, "kustomize", folder)
	var stderr bytes.Buffer
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		t.Fatalf("kubectl kustomize %s: %v: %s", folder, err, stderr.String())
	}
	if stderr.Len() > 0 {
		t.Errorf("kubectl kustomize %s warns: %s", folder, stderr.String())
	}
	var objects []*unstructured.Unstructured
	documents := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(out), 4096)
	for {
		object := &unstructured.Unstructured{}
		if err := documents.Decode(&object.Object); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if namespace := object.GetNamespace(); namespace != "" && namespace != "serviceproxy-system" {
			t.Errorf("%s %s is in namespace %s", object.GetKind(), object.GetName(), namespace)
		}
		objects = append(objects, object)
	}
	if len(objects) == 0 {
		t.Fatalf("kubectl kustomize %s gives nothing", folder)
	}
	return objects
}

// TestPodSecurity: the agent is the only one with a capability, and has just one.
func TestPodSecurity(t *testing.T) {
	for file, want := range map[string]string{"manager/deployment.yaml": "", "agent/daemonset.yaml": "NET_ADMIN"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		object := &unstructured.Unstructured{}
		if err := utilyaml.Unmarshal(text, &object.Object); err != nil {
			t.Fatal(err)
		}
		containers, _, err := unstructured.NestedSlice(object.Object, "spec", "template", "spec", "containers")
		if err != nil || len(containers) != 1 {
			t.Fatalf("%s: %d containers: %v", file, len(containers), err)
		}
		container := containers[0].(map[string]any)
		drop, _, _ := unstructured.NestedStringSlice(container, "securityContext", "capabilities", "drop")
		add, _, _ := unstructured.NestedStringSlice(container, "securityContext", "capabilities", "add")
		if strings.Join(drop, " ") != "ALL" || strings.Join(add, " ") != want {
			t.Errorf("%s: drops %v and adds %v, want ALL and %q", file, drop, add, want)
		}
		if privileged, _, _ := unstructured.NestedBool(container, "securityContext", "privileged"); privileged {
			t.Errorf("%s is privileged", file)
		}
	}
}

// TestWebhookService: API servers find the webhook where the controller says that it is.
func TestWebhookService(t *testing.T) {
	var service corev1.Service
	var deployment appsv1.Deployment
	for file, into := range map[string]any{"webhook/service.yaml": &service, "manager/deployment.yaml": &deployment} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := yaml.UnmarshalStrict(text, into); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
	}
	if service.Name != webhook.ServiceName || service.Namespace != deployment.Namespace {
		t.Errorf("the Service is %s/%s, want %s in %s", service.Namespace, service.Name, webhook.ServiceName, deployment.Namespace)
	}
	if !labels.SelectorFromSet(service.Spec.Selector).Matches(labels.Set(deployment.Spec.Template.Labels)) {
		t.Errorf("the Service selects %v, the pods have %v", service.Spec.Selector, deployment.Spec.Template.Labels)
	}
	if port := service.Spec.Ports[0]; port.Port != 443 || port.TargetPort.StrVal != "webhook" {
		t.Errorf("the Service has port %d to %s, want 443 to webhook", port.Port, port.TargetPort.String())
	}
	listens := controllerConfiguration(t).Webhook.BindAddress
	container := deployment.Spec.Template.Spec.Containers[0]
	for _, port := range container.Ports {
		if port.Name == "webhook" && listens == fmt.Sprintf(":%d", port.ContainerPort) {
			return
		}
	}
	t.Errorf("no port of the container is named webhook and is where it listens: %v, %s", container.Ports, listens)
}

// shipped is a file of ours that holds a configuration: it must be right, and say what is not the default.
func shipped(t *testing.T, file, kind string, into any) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := config.Decode(text, kind, into); err != nil {
		t.Errorf("%s: %v", file, err)
	}
}

func agentConfiguration(t *testing.T) *config.AgentConfiguration {
	t.Helper()
	c := &config.AgentConfiguration{}
	shipped(t, "agent/agent.yaml", config.AgentKind, c)
	if len(c.ClusterCIDR) == 0 || c.HealthzBindAddress == "" || c.MetricsBindAddress == "" {
		t.Errorf("agent/agent.yaml does not say what users have to look at: %+v", c)
	}
	c.SetDefaults()
	if wrong := c.Validate(); len(wrong) > 0 {
		t.Errorf("agent/agent.yaml: %v", wrong.ToAggregate())
	}
	return c
}

func controllerConfiguration(t *testing.T) *config.ControllerConfiguration {
	t.Helper()
	c := &config.ControllerConfiguration{}
	shipped(t, "manager/controller.yaml", config.ControllerKind, c)
	if c.Namespace != "" || c.HealthzBindAddress == "" || c.MetricsBindAddress == "" || c.Webhook.BindAddress == "" || !c.LeaderElection.LeaderElect {
		t.Errorf("manager/controller.yaml does not say which ports of the node it takes, or says what the pod does: %+v", c)
	}
	c.Namespace = "of-the-pod"
	c.SetDefaults()
	if wrong := c.Validate(); len(wrong) > 0 {
		t.Errorf("manager/controller.yaml: %v", wrong.ToAggregate())
	}
	return c
}

// TestConfigurationFiles: each program reads the file that its ConfigMap holds, and reads it as a folder's, because what is mounted by subPath never changes.
func TestConfigurationFiles(t *testing.T) {
	assets := os.Getenv("KUBEBUILDER_ASSETS")
	if assets == "" {
		t.Fatal("KUBEBUILDER_ASSETS is not set: run `make test-envtest`, or `export KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)`")
	}
	agentConfiguration(t)
	controllerConfiguration(t)
	for folder, file := range map[string]string{"agent": "agent.yaml", "manager": "controller.yaml"} {
		contents := map[string]map[string]string{} // of ConfigMaps
		var pod corev1.PodSpec
		for _, object := range kustomize(t, filepath.Join(assets, "kubectl"), folder) {
			switch object.GetKind() {
			case "ConfigMap":
				contents[object.GetName()], _, _ = unstructured.NestedStringMap(object.Object, "data")
			case "DaemonSet", "Deployment":
				template, _, _ := unstructured.NestedMap(object.Object, "spec", "template", "spec")
				if err := runtime.DefaultUnstructuredConverter.FromUnstructured(template, &pod); err != nil {
					t.Fatal(err)
				}
			}
		}
		container := pod.Containers[0]
		volume := slices.IndexFunc(pod.Volumes, func(v corev1.Volume) bool { return v.ConfigMap != nil })
		if volume < 0 || contents[pod.Volumes[volume].ConfigMap.Name][file] == "" {
			t.Fatalf("%s: no volume has the ConfigMap with %s: %v", folder, file, pod.Volumes)
		}
		at := slices.IndexFunc(container.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == pod.Volumes[volume].Name && m.SubPath == "" })
		if at < 0 || !slices.Equal(container.Args, []string{"--config=" + container.VolumeMounts[at].MountPath + "/" + file}) {
			t.Errorf("%s: the arguments %v are not the file that is mounted: %v", folder, container.Args, container.VolumeMounts)
		}
	}
}

// TestHostPorts: both programs are in their node's network, beside what a node of Kubernetes runs, and probes ask where they listen.
func TestHostPorts(t *testing.T) {
	taken := map[int64]string{2379: "etcd", 2380: "etcd", 6443: "kube-apiserver", 10248: "kubelet", 10249: "kube-proxy", 10250: "kubelet", 10255: "kubelet",
		10256: "kube-proxy", 10257: "kube-controller-manager", 10258: "cloud-controller-manager", 10259: "kube-scheduler", 10260: "cloud-controller-manager"}
	agent, controller := agentConfiguration(t), controllerConfiguration(t)
	for file, addresses := range map[string]map[string]string{
		"manager/deployment.yaml": {"health": controller.HealthzBindAddress, "metrics": controller.MetricsBindAddress, "webhook": controller.Webhook.BindAddress},
		"agent/daemonset.yaml":    {"health": agent.HealthzBindAddress, "metrics": agent.MetricsBindAddress},
	} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var workload struct {
			Spec struct{ Template corev1.PodTemplateSpec }
		}
		if err := yaml.Unmarshal(text, &workload); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		pod := workload.Spec.Template.Spec
		if !pod.HostNetwork || len(pod.Containers) != 1 {
			t.Fatalf("%s: want one container in the node's network, got %d", file, len(pod.Containers))
		}
		container := pod.Containers[0]
		listens := map[string]int64{}
		for name, address := range addresses {
			port, err := strconv.ParseInt(address[strings.LastIndex(address, ":")+1:], 10, 32)
			if err != nil {
				t.Fatalf("%s: %s: %v", file, name, err)
			}
			if owner, found := taken[port]; found {
				t.Errorf("%s: %s at %s takes a port of %s", file, name, address, owner)
			}
			taken[port], listens[name] = file, port
		}
		health := slices.IndexFunc(container.Ports, func(p corev1.ContainerPort) bool { return p.Name == "health" })
		if health < 0 || int64(container.Ports[health].ContainerPort) != listens["health"] {
			t.Errorf("%s: port health of %v is not where it listens: %d", file, container.Ports, listens["health"])
		}
		for _, probe := range []*corev1.Probe{container.LivenessProbe, container.ReadinessProbe} {
			if probe == nil || probe.HTTPGet == nil || probe.HTTPGet.Port.StrVal != "health" {
				t.Errorf("%s: a probe does not ask port health: %v", file, probe)
			}
		}
	}
}
