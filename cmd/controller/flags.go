package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
)

type flags struct {
	leaderElect                  bool
	namespace                    string
	metricsAddress, probeAddress string
	webhookAddress, webhookURL   string
	version                      bool
	verbosity                    int
}

// none is the address that means: do not listen.
const none = "0"

// servesWebhook says whether this process answers admission.
func (f flags) servesWebhook() bool { return f.webhookAddress != none }

// podNamespaceFile is where a pod finds the namespace that it runs in. POD_NAMESPACE goes before it.
const podNamespaceFile = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

func parseFlags(args []string) (flags, error) {
	var f flags
	fs := flag.NewFlagSet("controller", flag.ContinueOnError)
	if kubeconfig := flag.CommandLine.Lookup("kubeconfig"); kubeconfig != nil {
		fs.Var(kubeconfig.Value, kubeconfig.Name, kubeconfig.Usage) // registered by controller-runtime
	}
	fs.BoolVar(&f.leaderElect, "leader-elect", false, "let one replica of several work at a time; all of them answer admission")
	fs.StringVar(&f.namespace, "namespace", podNamespace(podNamespaceFile),
		"where this controller runs: the namespace of its Lease, of the webhook's certificate and of the Service serviceproxy-webhook; default: the pod's, also from POD_NAMESPACE")
	fs.StringVar(&f.metricsAddress, "metrics-bind-address", ":8080", "address of /metrics, 0 for none")
	fs.StringVar(&f.probeAddress, "health-probe-bind-address", ":8081", "address of /healthz and /readyz, 0 for none")
	fs.StringVar(&f.webhookAddress, "webhook-bind-address", ":9443", "address where API servers reach the admission webhook, 0 for none: the webhook's configuration is taken away then")
	fs.StringVar(&f.webhookURL, "webhook-url", "", "https://HOST:PORT of the webhook as API servers reach it, for a controller outside of the cluster; default: the Service serviceproxy-webhook")
	fs.BoolVar(&f.version, "version", false, "print the version and exit")
	fs.IntVar(&f.verbosity, "v", 0, "log verbosity: 0, or 1 for debugging")
	if err := fs.Parse(args); err != nil {
		return f, err
	}
	if fs.NArg() > 0 {
		return f, fmt.Errorf("unexpected argument %q: all settings are flags", fs.Arg(0))
	}
	if f.version {
		return f, nil
	}
	return f, errors.Join(f.checkNamespace(), checkAddress("--metrics-bind-address", f.metricsAddress), checkAddress("--health-probe-bind-address", f.probeAddress),
		f.checkWebhook())
}

// podNamespace is the namespace of the pod that this process runs in, empty if it runs in none.
func podNamespace(file string) string {
	fromFile, _ := os.ReadFile(file) // there is none outside of a pod, and what needs the namespace says so
	return cmp.Or(os.Getenv("POD_NAMESPACE"), strings.TrimSpace(string(fromFile)))
}

func (f flags) checkNamespace() error {
	if f.namespace == "" && (f.leaderElect || f.servesWebhook()) {
		return errors.New(`--namespace "": this is no pod, so it must name the namespace of the Lease (--leader-elect) and of the webhook's certificate (unless --webhook-bind-address=0)`)
	}
	if problems := validation.IsDNS1123Label(f.namespace); f.namespace != "" && len(problems) > 0 {
		return fmt.Errorf("--namespace %q: must be the name of a namespace: %s", f.namespace, strings.Join(problems, "; "))
	}
	return nil
}

// checkAddress fails if address is no place to listen at. The manager would find out only once everything else runs.
func checkAddress(name, address string) error {
	if address == none {
		return nil
	}
	if _, err := net.ResolveTCPAddr("tcp", address); err != nil || address == "" {
		return fmt.Errorf("%s %q: must be HOST:PORT or :PORT, or 0 for none", name, address)
	}
	return nil
}

func (f flags) checkWebhook() error {
	const bind = "--webhook-bind-address"
	if err := checkAddress(bind, f.webhookAddress); err != nil {
		return err
	}
	if _, port := f.webhookHostPort(); f.servesWebhook() && port == 0 {
		return fmt.Errorf("%s %q: must name a port from 1 to 65535, because API servers have to know it; or be 0 for none", bind, f.webhookAddress)
	}
	if f.webhookURL == "" {
		return nil
	}
	if !f.servesWebhook() {
		return fmt.Errorf("--webhook-url %q: must not be given together with %s=0, which serves no webhook", f.webhookURL, bind)
	}
	return checkWebhookURL(f.webhookURL)
}

// checkWebhookURL fails on what an API server refuses in a webhook's configuration.
func checkWebhookURL(value string) error {
	u, err := url.Parse(value)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.Trim(u.Path, "/") != "" {
		return fmt.Errorf("--webhook-url %q: must be https://HOST or https://HOST:PORT", value)
	}
	host := u.Hostname()
	if net.ParseIP(host) == nil && len(validation.IsDNS1123Subdomain(host)) > 0 {
		return fmt.Errorf("--webhook-url %q: its host must be an IP address or a DNS name in lower case", value)
	}
	if port := u.Port(); port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("--webhook-url %q: its port must be 1 to 65535", value)
		}
	}
	return nil
}

// webhookHostPort splits the webhook's address, which was checked, into what the webhook server wants.
func (f flags) webhookHostPort() (host string, port int) {
	address, err := net.ResolveTCPAddr("tcp", f.webhookAddress)
	if err != nil {
		return "", 0
	}
	if address.IP != nil {
		host = address.IP.String()
	}
	return host, address.Port
}
