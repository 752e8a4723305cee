// Package controlplane runs etcd, kube-apiserver and kube-controller-manager on the machine's loopback address.
package controlplane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/serviceproxy/serviceproxy-operator/test/cluster/internal/process"
)

// Config says how to run a control plane.
type Config struct {
	// Assets is the folder of the programs.
	Assets string
	// Dir takes keys, data and kubeconfigs; LogDir the logs.
	Dir, LogDir string
	Spawner     *process.Spawner
	// ServiceCIDRs are the API server's default service ranges, IPv4 first.
	ServiceCIDRs []string
	// NodeMonitorGracePeriod is how long a node may be silent before it is Unknown.
	NodeMonitorGracePeriod time.Duration
	// Crashed is called when a program ends without having been asked to.
	Crashed func(error)
}

// User is whom a client certificate stands for.
type User struct {
	Name   string
	Groups []string
}

// Admin may do everything.
var Admin = User{Name: "admin", Groups: []string{"system:masters"}}

// ControlPlane is a control plane. Its API server keeps address, keys and data over a restart.
type ControlPlane struct {
	Etcd, APIServer, ControllerManager *process.Process

	config Config
	ca     *authority
	etcd   string // URL
	port   int    // of the API server

	webhookPort int
}

// The controllers that an embedded cluster needs. All of them would cost a second more to start and memory for nothing: nothing
// here has volumes, quotas or a cloud.
var controllers = []string{
	"daemonset-controller", "deployment-controller", "endpointslice-controller", "endpointslice-mirroring-controller",
	"garbage-collector-controller", "namespace-controller", "node-lifecycle-controller", "pod-garbage-collector-controller",
	"replicaset-controller", "service-cidr-controller", "serviceaccount-controller", "statefulset-controller",
	"taint-eviction-controller",
}

// New prepares a control plane: keys, ports, command lines. Nothing runs yet.
func New(c Config) (*ControlPlane, error) {
	ca, err := newAuthority()
	if err != nil {
		return nil, err
	}
	if err := writePKI(filepath.Join(c.Dir, "pki"), ca); err != nil {
		return nil, fmt.Errorf("write keys: %w", err)
	}
	ports, err := freePorts(4)
	if err != nil {
		return nil, err
	}
	cp := &ControlPlane{config: c, ca: ca, etcd: loopback("http", ports[0]), port: ports[2], webhookPort: ports[3]}
	if err := cp.WriteKubeconfig(cp.managerKubeconfig(), Admin, cp.port); err != nil {
		return nil, err
	}
	cp.Etcd = cp.process("etcd", cp.etcdArgs(loopback("http", ports[1])), cp.etcdReady)
	cp.APIServer = cp.process("kube-apiserver", cp.apiServerArgs(), cp.apiServerReady)
	cp.ControllerManager = cp.process("kube-controller-manager", cp.controllerManagerArgs(), nil)
	return cp, nil
}

// Start starts everything and waits until it is ready.
func (cp *ControlPlane) Start(ctx context.Context) error {
	for _, p := range []*process.Process{cp.Etcd, cp.APIServer, cp.ControllerManager} {
		if err := p.Start(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Stop ends everything. Nobody will read the data again, so nothing is asked to end in good order.
func (cp *ControlPlane) Stop() error {
	return errors.Join(cp.ControllerManager.Kill(), cp.APIServer.Kill(), cp.Etcd.Kill())
}

// Port is the API server's port on the loopback address.
func (cp *ControlPlane) Port() int { return cp.port }

// WebhookPort is a port of the loopback address, kept for a webhook that the API server calls.
func (cp *ControlPlane) WebhookPort() int { return cp.webhookPort }

// WriteKubeconfig writes a kubeconfig with a certificate for this user and the API server at this port of the loopback address.
func (cp *ControlPlane) WriteKubeconfig(path string, u User, port int) error {
	cert, key, err := cp.ca.client(u)
	if err != nil {
		return err
	}
	config := clientcmdapi.NewConfig()
	config.Clusters["cluster"] = &clientcmdapi.Cluster{Server: loopback("https", port), CertificateAuthorityData: cp.ca.pem}
	config.AuthInfos[u.Name] = &clientcmdapi.AuthInfo{ClientCertificateData: cert, ClientKeyData: key}
	config.Contexts["cluster"] = &clientcmdapi.Context{Cluster: "cluster", AuthInfo: u.Name}
	config.CurrentContext = "cluster"
	return clientcmd.WriteToFile(*config, path)
}

// RESTConfig is a client configuration for this user, without a limit on its rate.
func (cp *ControlPlane) RESTConfig(u User) (*rest.Config, error) {
	cert, key, err := cp.ca.client(u)
	if err != nil {
		return nil, err
	}
	return &rest.Config{
		Host: loopback("https", cp.port), QPS: -1,
		TLSClientConfig: rest.TLSClientConfig{CAData: cp.ca.pem, CertData: cert, KeyData: key},
	}, nil
}

func (cp *ControlPlane) process(name string, args []string, ready func(context.Context) error) *process.Process {
	return process.New(cp.config.Spawner, process.Spec{
		Name: name,
		Command: func(context.Context) ([]string, error) {
			return append([]string{filepath.Join(cp.config.Assets, name)}, args...), nil
		},
		LogFile: filepath.Join(cp.config.LogDir, name+".log"),
		Ready:   ready,
		// kube-apiserver waits on SIGTERM for every watch to end by itself, a minute or more. Nothing is lost by this: the data is etcd's.
		StopSignal: syscall.SIGKILL,
		Crashed:    cp.config.Crashed,
	})
}

func (cp *ControlPlane) etcdArgs(peer string) []string {
	return []string{
		"--name=default", "--data-dir=" + filepath.Join(cp.config.Dir, "etcd"),
		"--listen-client-urls=" + cp.etcd, "--advertise-client-urls=" + cp.etcd,
		"--listen-peer-urls=" + peer, "--initial-advertise-peer-urls=" + peer, "--initial-cluster=default=" + peer,
		"--unsafe-no-fsync", // the data is thrown away with the cluster
		"--log-level=warn",
	}
}

func (cp *ControlPlane) apiServerArgs() []string {
	return []string{
		"--etcd-servers=" + cp.etcd,
		// The address to advertise would else be that of the machine's default route, and without one the API server would not start.
		"--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--secure-port=" + strconv.Itoa(cp.port),
		"--tls-cert-file=" + cp.pki("apiserver.crt"), "--tls-private-key-file=" + cp.pki("apiserver.key"),
		"--client-ca-file=" + cp.pki("ca.crt"),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + cp.pki("sa.key"), "--service-account-signing-key-file=" + cp.pki("sa.key"),
		"--service-cluster-ip-range=" + strings.Join(cp.config.ServiceCIDRs, ","),
		"--authorization-mode=Node,RBAC",
		"--allow-privileged=true",
		// Pods need no tokens here, and with the plugin none can be made before its namespace has got its account.
		"--disable-admission-plugins=ServiceAccount",
		// It would want to announce the loopback address as the endpoint of the Service kubernetes, which is not valid.
		"--endpoint-reconciler-type=none",
		"--profiling=false",
	}
}

func (cp *ControlPlane) controllerManagerArgs() []string {
	return []string{
		"--kubeconfig=" + cp.managerKubeconfig(),
		"--controllers=" + strings.Join(controllers, ","),
		"--leader-elect=false",
		"--secure-port=0",
		"--service-account-private-key-file=" + cp.pki("sa.key"), "--root-ca-file=" + cp.pki("ca.crt"),
		"--kube-api-qps=500", "--kube-api-burst=1000",
		"--node-monitor-period=1s", "--node-monitor-grace-period=" + cp.config.NodeMonitorGracePeriod.String(),
		"--profiling=false",
	}
}

func (cp *ControlPlane) managerKubeconfig() string {
	return filepath.Join(cp.config.Dir, "controller-manager.kubeconfig")
}

func (cp *ControlPlane) pki(name string) string { return filepath.Join(cp.config.Dir, "pki", name) }

func (cp *ControlPlane) etcdReady(ctx context.Context) error {
	return get(ctx, http.DefaultClient, cp.etcd+"/health")
}

func (cp *ControlPlane) apiServerReady(ctx context.Context) error {
	config, err := cp.RESTConfig(Admin)
	if err != nil {
		return err
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	return get(ctx, client, config.Host+"/readyz")
}

// get is nil if the URL answers 200.
func get(ctx context.Context, client *http.Client, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return errors.Join(fmt.Errorf("GET %s: %s: %s", url, resp.Status, body), err)
	}
	return nil
}

func loopback(scheme string, port int) string {
	return fmt.Sprintf("%s://127.0.0.1:%d", scheme, port)
}

// freePorts finds ports that nobody listens on, below the range that the kernel hands out to outgoing connections: from there one
// could be taken while the API server is down, and it would not come back.
func freePorts(n int) ([]int, error) {
	const first, last = 20000, 29999
	var ports []int
	for range 1000 {
		port := first + rand.IntN(last-first+1)
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			continue
		}
		defer l.Close() // only at the end, so that no port is found twice
		if ports = append(ports, port); len(ports) == n {
			return ports, nil
		}
	}
	return nil, fmt.Errorf("found no %d free ports between %d and %d on the loopback address", n, first, last)
}
