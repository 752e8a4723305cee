// Package e2e tests everything together on one embedded cluster of three nodes: a real API server, Kubernetes' own controllers, the
// controller and the agents as processes, real kernel rules, and TCP and UDP connections between namespaces.
//
// Specs keep apart by namespace, policy and ranges (see tenant), and leave nothing: each is checked for that when it ends.
package e2e

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-logr/logr"
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"github.com/onsi/gomega/format"
	ctrllog "sigs.k8s.io/controller-runtime/pkg/log"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/test/cluster"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

var (
	ctx = context.Background()
	c   *cluster.Cluster
	k8s client.Client

	crashes crashLog
)

const (
	// patience is how long anything may take on a busy machine.
	patience = 60 * time.Second
	// startTimeout bounds the start of the cluster, with everything built.
	startTimeout = 5 * time.Minute
)

func TestE2E(t *testing.T) {
	netns.RequireRoot(t)
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		t.Fatal("KUBEBUILDER_ASSETS is not set: export KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)")
	}
	format.MaxLength = 3000
	RegisterFailHandler(Fail)
	RunSpecs(t, "e2e")
}

var _ = BeforeSuite(func() {
	ctrllog.SetLogger(logr.Discard()) // the client's library would warn that nobody had set one
	SetDefaultEventuallyTimeout(patience)
	SetDefaultEventuallyPollingInterval(50 * time.Millisecond)
	SetDefaultConsistentlyDuration(time.Second)
	EnforceDefaultTimeoutsWhenUsingContexts()

	starting, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	var err error
	c, err = cluster.Start(starting, cluster.Options{
		Nodes: 3, Proxy: true, Progress: GinkgoWriter, Crashed: crashes.add,
		// Longer than any outage of the API server here, because afterwards every node would first count as dead.
		NodeMonitorGracePeriod: 2 * time.Minute,
	})
	Expect(err).NotTo(HaveOccurred())
	DeferCleanup(func() { Expect(c.Close()).To(Succeed()) })
	k8s = c.Client()
	startClients()
})

var _ = JustAfterEach(func() {
	if CurrentSpecReport().Failed() {
		showCluster()
	}
})

var _ = AfterEach(func() {
	Expect(crashes.take()).To(Succeed(), "a program ended by itself")
})

var _ = ReportAfterSuite("logs", func(r Report) {
	if r.SuiteSucceeded || c == nil {
		return
	}
	GinkgoWriter.Println("the cluster's logs are in", logCopy())
})

func logCopy() string { return filepath.Join(os.TempDir(), "serviceproxy-logs-e2e") }

// showCluster prints what one would look at first after a failure, and keeps the logs.
func showCluster() {
	for _, args := range [][]string{
		{"get", "spp,svca,nps,claim", "-A", "-o", "wide"},
		{"get", "pods,services,endpointslices", "-A", "-o", "wide"},
		{"get", "events.events.k8s.io", "-A", "--field-selector=type=Warning"},
	} {
		out, err := c.Kubectl(ctx, "", append(args, "--request-timeout=10s")...)
		GinkgoWriter.Printf("\n$ kubectl %s\n%s\n", strings.Join(args, " "), out)
		if err != nil {
			GinkgoWriter.Println(err)
		}
	}
	GinkgoWriter.Println(c.Controller.Tail(20))
	for _, n := range c.Nodes {
		GinkgoWriter.Println(n.Agent.Tail(15))
	}
	if err := c.SaveLogs(logCopy()); err != nil {
		GinkgoWriter.Println("keep the logs:", err)
	}
}

// crashLog collects programs of the cluster that ended without having been asked to.
type crashLog struct {
	mu   sync.Mutex
	errs []error
}

func (l *crashLog) add(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.errs = append(l.errs, err)
}

func (l *crashLog) take() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := errors.Join(l.errs...)
	l.errs = nil
	return err
}
