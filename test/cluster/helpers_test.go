package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	. "github.com/onsi/gomega"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// workload is a Deployment of four pods and its Service.
type workload struct {
	deployment *appsv1.Deployment
	service    *corev1.Service
}

func newWeb() workload {
	labels := map[string]string{"app": "web"}
	return workload{
		deployment: &appsv1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
			Spec: appsv1.DeploymentSpec{
				Replicas: ptr.To[int32](4),
				Selector: &metav1.LabelSelector{MatchLabels: labels},
				Template: corev1.PodTemplateSpec{
					ObjectMeta: metav1.ObjectMeta{Labels: labels},
					Spec:       corev1.PodSpec{Containers: []corev1.Container{webContainer(8080)}},
				},
			},
		},
		service: &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"},
			Spec: corev1.ServiceSpec{
				Selector:       labels,
				IPFamilyPolicy: ptr.To(corev1.IPFamilyPolicyRequireDualStack),
				Ports:          []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromString("tcp")}},
			},
		},
	}
}

func webContainer(port int32) corev1.Container {
	return corev1.Container{Name: "echo", Image: "echo", Ports: []corev1.ContainerPort{
		{Name: "tcp", Protocol: corev1.ProtocolTCP, ContainerPort: port}, {Name: "udp", Protocol: corev1.ProtocolUDP, ContainerPort: port},
	}}
}

func (w workload) objects() []client.Object { return []client.Object{w.deployment, w.service} }

// running waits until the Deployment has so many ready Pods and no others, and gives them.
func (w workload) running(t *testing.T, c *Cluster, n int) []corev1.Pod {
	t.Helper()
	var pods corev1.PodList
	NewWithT(t).Eventually(func() (ready []string) {
		if err := c.Client().List(t.Context(), &pods, client.MatchingLabels{"app": "web"}); err != nil {
			return []string{err.Error()}
		}
		for _, p := range pods.Items {
			state := p.Name + " " + string(p.Status.Phase)
			for _, cond := range p.Status.Conditions {
				if cond.Type == corev1.PodReady && cond.Status == corev1.ConditionTrue && p.DeletionTimestamp == nil {
					state = "ready"
				}
			}
			ready = append(ready, state)
		}
		return ready
	}).WithTimeout(patience).Should(And(HaveLen(n), HaveEach("ready")))
	return pods.Items
}

// endpoints gives the Service's endpoints of one family and whether they are ready.
func (w workload) endpoints(t *testing.T, c *Cluster, family discoveryv1.AddressType) map[string]bool {
	ready := map[string]bool{}
	for _, e := range w.slices(t, c, family) {
		ready[e.Addresses[0]] = *e.Conditions.Ready
	}
	return ready
}

// terminating tells whether the endpoint at this address is.
func (w workload) terminating(t *testing.T, c *Cluster, address string) bool {
	for _, e := range w.slices(t, c, discoveryv1.AddressTypeIPv4) {
		if e.Addresses[0] == address {
			return *e.Conditions.Terminating && !*e.Conditions.Ready
		}
	}
	return false
}

func (w workload) slices(t *testing.T, c *Cluster, family discoveryv1.AddressType) (endpoints []discoveryv1.Endpoint) {
	var slices discoveryv1.EndpointSliceList
	if err := c.Client().List(t.Context(), &slices, client.MatchingLabels{discoveryv1.LabelServiceName: "web"}); err != nil {
		t.Log(err)
	}
	for _, s := range slices.Items {
		if s.AddressType == family {
			endpoints = append(endpoints, s.Endpoints...)
		}
	}
	return endpoints
}

func (w workload) setReady(t *testing.T, c *Cluster, pod *corev1.Pod, ready bool) {
	t.Helper()
	patch := fmt.Sprintf(`{"metadata":{"annotations":{%q:%q}}}`, ReadyAnnotation, strconv.FormatBool(ready))
	NewWithT(t).Expect(c.Client().Patch(t.Context(), pod, client.RawPatch("application/merge-patch+json", []byte(patch)))).To(Succeed())
}

// nodeReady gives a node's Ready condition.
func nodeReady(t *testing.T, c *Cluster, name string) corev1.ConditionStatus {
	t.Helper()
	var node corev1.Node
	NewWithT(t).Expect(c.Client().Get(t.Context(), client.ObjectKey{Name: name}, &node)).To(Succeed())
	for _, cond := range node.Status.Conditions {
		if cond.Type == corev1.NodeReady {
			return cond.Status
		}
	}
	return "missing"
}

// machine describes the machine's own network, which no cluster may change.
func machine(t *testing.T) string {
	t.Helper()
	script := `ip -o -4 addr; ip -o -6 addr; ip -br link; ip route; ip -6 route; ip rule; nft list ruleset
		cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding /proc/sys/net/ipv4/conf/*/rp_filter /proc/sys/net/ipv4/conf/*/route_localnet`
	out, err := exec.Command("sh", "-c", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// Lifetimes of advertised addresses run.
	var lines []string
	for line := range strings.Lines(string(out)) {
		line, _, _ = strings.Cut(line, " valid_lft")
		line, _, _ = strings.Cut(line, " expires ")
		lines = append(lines, strings.TrimSpace(line))
	}
	return strings.Join(lines, "\n")
}

// nothingLeft checks that nothing is left of this process's cluster of that name, or of any other.
func nothingLeft(t *testing.T, name string) {
	t.Helper()
	g := NewWithT(t)
	g.Expect(filepath.Join(stateRoot, name)).NotTo(BeAnExistingFile())
	g.Expect(filepath.Join(stateRoot, name+lockSuffix)).NotTo(BeAnExistingFile())
	g.Expect(pins(t, name)).To(BeEmpty())
	g.Expect(childrenOf(t, os.Getpid())).To(BeEmpty())
	fds, err := os.ReadDir("/proc/self/fd")
	g.Expect(err).NotTo(HaveOccurred())
	for _, fd := range fds {
		if target, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name())); err == nil {
			g.Expect(target).NotTo(HavePrefix("net:["), "a namespace is still open")
		}
	}
}

// pins are the names of namespaces that start with a cluster's name.
func pins(t *testing.T, name string) (found []string) {
	t.Helper()
	entries, err := os.ReadDir(pinRoot)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), name+"-") {
			found = append(found, e.Name())
		}
	}
	return found
}

func childrenOf(t *testing.T, pid int) (children []int) {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has just ended
		}
		// PID (NAME) STATE PPID ...; a name may contain anything, even parentheses.
		stat := string(b)
		fields := strings.Fields(stat[strings.LastIndex(stat, ")")+1:])
		first, _, _ := strings.Cut(stat, " ")
		child, err := strconv.Atoi(first)
		if err == nil && fields[1] == strconv.Itoa(pid) {
			children = append(children, child)
		}
	}
	return children
}

func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(b), ") Z ")
}

// writerFunc is a writer that is called with what is written.
type writerFunc func(string)

func (f writerFunc) Write(p []byte) (int, error) {
	f(string(p))
	return len(p), nil
}
