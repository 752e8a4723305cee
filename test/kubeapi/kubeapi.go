// Package kubeapi runs a kube-apiserver for tests: with etcd, our CRDs, and of kube-controller-manager what makes ServiceCIDRs ready.
package kubeapi

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// Server is a running API server. Config and Client are of an administrator, and without a limit on their rate.
type Server struct {
	Config *rest.Config
	Client client.WithWatch

	env    *envtest.Environment
	warned warnings
	// stopControllers ends kube-controller-manager, nil before it runs.
	stopControllers func() error
}

// Start starts everything. args are flags of kube-apiserver without their dashes. KUBEBUILDER_ASSETS names the folder of the programs.
func Start(args map[string]string) (_ *Server, err error) {
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		return nil, errors.New("KUBEBUILDER_ASSETS is not set: export KUBEBUILDER_ASSETS=$(hack/tools/kubernetes/build.sh)")
	}
	root, err := moduleRoot()
	if err != nil {
		return nil, err
	}
	s := &Server{env: &envtest.Environment{
		CRDDirectoryPaths:     []string{filepath.Join(root, "config", "crd", "bases")},
		ErrorIfCRDPathMissing: true,
		// Machines may be busy, and kube-apiserver waits on SIGTERM for every watch to end by itself.
		ControlPlaneStartTimeout: time.Minute, ControlPlaneStopTimeout: time.Minute,
	}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Stop())
		}
	}()
	for name, value := range maps.All(args) {
		s.env.ControlPlane.GetAPIServer().Configure().Set(name, value)
	}
	if s.Config, err = s.env.Start(); err != nil {
		return nil, fmt.Errorf("start API server: %w", err)
	}
	s.Config.QPS, s.Config.WarningHandler = -1, &s.warned
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	if s.Client, err = client.NewWithWatch(s.Config, client.Options{Scheme: scheme}); err != nil {
		return nil, err
	}
	s.stopControllers, err = StartControllers(s.env, "service-cidr-controller")
	return s, err
}

// StartControllers runs controllers of kube-controller-manager, by the names it has for them, beside an API server of envtest. stop ends them.
func StartControllers(env *envtest.Environment, names ...string) (stop func() error, err error) {
	dir, err := os.MkdirTemp("", "kube-controller-manager-")
	if err != nil {
		return nil, err
	}
	remove := func() error { return os.RemoveAll(dir) }
	admin, err := env.AddUser(envtest.User{Name: "kube-controller-manager", Groups: []string{"system:masters"}}, nil)
	if err != nil {
		return nil, errors.Join(err, remove())
	}
	config, err := admin.KubeConfig()
	if err != nil {
		return nil, errors.Join(err, remove())
	}
	kubeconfig := filepath.Join(dir, "kubeconfig")
	if err := os.WriteFile(kubeconfig, config, 0o600); err != nil {
		return nil, errors.Join(err, remove())
	}
	manager := exec.Command(filepath.Join(os.Getenv("KUBEBUILDER_ASSETS"), "kube-controller-manager"), "--kubeconfig="+kubeconfig, "--leader-elect=false", "--secure-port=0",
		"--controllers="+strings.Join(names, ","))
	if err := manager.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start kube-controller-manager: %w", err), remove())
	}
	return func() error {
		killed := manager.Process.Kill()
		_ = manager.Wait() // it was killed
		return errors.Join(killed, remove())
	}, nil
}

// WriteKubeconfig writes an administrator's kubeconfig. address is HOST:PORT of a relay before the API server on the loopback address, empty for none.
func (s *Server) WriteKubeconfig(path, address string) error {
	user, err := s.env.AddUser(envtest.User{Name: filepath.Base(path), Groups: []string{"system:masters"}}, nil)
	if err != nil {
		return err
	}
	c := user.Config()
	if address != "" {
		c.Host = "https://" + address
	}
	config := clientcmdapi.NewConfig()
	// The server's certificate is for localhost, by whatever address it is reached.
	config.Clusters["test"] = &clientcmdapi.Cluster{Server: c.Host, CertificateAuthorityData: c.CAData, TLSServerName: "localhost"}
	config.AuthInfos["test"] = &clientcmdapi.AuthInfo{ClientCertificateData: c.CertData, ClientKeyData: c.KeyData}
	config.Contexts["test"] = &clientcmdapi.Context{Cluster: "test", AuthInfo: "test"}
	config.CurrentContext = "test"
	return clientcmd.WriteToFile(*config, path)
}

// Address is HOST:PORT of the API server.
func (s *Server) Address() string {
	return s.env.ControlPlane.GetAPIServer().SecureServing.HostPort()
}

// Warnings are the warnings that came with answers to Client, and how often each did.
func (s *Server) Warnings() map[string]int {
	s.warned.mu.Lock()
	defer s.warned.mu.Unlock()
	return maps.Clone(s.warned.seen)
}

// warnings collects them.
type warnings struct {
	mu   sync.Mutex
	seen map[string]int
}

// HandleWarningHeader implements rest.WarningHandler.
func (w *warnings) HandleWarningHeader(_ int, _, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.seen == nil {
		w.seen = map[string]int{}
	}
	w.seen[text]++
}

// Stop ends everything.
func (s *Server) Stop() error {
	var stopped error
	if s.stopControllers != nil {
		stopped = s.stopControllers()
	}
	return errors.Join(stopped, s.env.Stop())
}

// moduleRoot finds the folder of go.mod from here upwards.
func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("no go.mod here or above: run it inside the checkout")
		}
	}
}
