package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/kubeapi"
)

const (
	covered, plain = "covered", "plain" // namespaces: of the policy's Services, and of the others
	system         = "serviceproxy-system"
	policyName     = "tenant"
	filling        = 32 // creates at a time while nothing is measured
)

// world is an API server with a policy, and the controller's process.
type world struct {
	options
	server     *kubeapi.Server
	controller *exec.Cmd
	ended      chan struct{} // closed when the controller has ended
	metrics    string        // its address
	log        bytes.Buffer
	dir        string
	made       int
}

func newWorld(ctx context.Context, server *kubeapi.Server, o options) (_ *world, err error) {
	w := &world{options: o, server: server}
	if w.dir, err = os.MkdirTemp("", "admission-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.close()
			err = fmt.Errorf("%w; the controller's log:\n%s", err, w.log.String())
		}
	}()
	for _, name := range []string{covered, plain, system} {
		if err := server.Client.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"is": name}}}); err != nil {
			return nil, err
		}
	}
	if err := w.startController(); err != nil {
		return nil, err
	}
	p := &v1alpha1.ServiceProxyPolicy{ObjectMeta: metav1.ObjectMeta{Name: policyName}}
	p.Spec.NamespaceSelector = metav1.LabelSelector{MatchLabels: map[string]string{"is": covered}}
	p.Spec.ServiceRanges = []v1alpha1.ServiceRange{{CIDR: "10.200.0.0/16"}}
	p.Spec.NodePortRange = &v1alpha1.NodePortRange{Start: 20000, End: 29999}
	if err := server.Client.Create(ctx, p); err != nil {
		return nil, err
	}
	// The webhook answers once it is configured and the API server has taken notice.
	err = w.until(ctx, time.Minute, "the webhook answers", func() (bool, error) {
		svc := w.newService(covered)
		if err := server.Client.Create(ctx, svc); err != nil {
			return false, err
		}
		return svc.Annotations[v1alpha1.AnnotationReservation] != "", server.Client.Delete(ctx, svc)
	})
	return w, err
}

func (w *world) startController() error {
	kubeconfig := filepath.Join(w.dir, "kubeconfig")
	if err := w.server.WriteKubeconfig(kubeconfig, ""); err != nil {
		return err
	}
	var addresses []string
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer l.Close()
		addresses = append(addresses, l.Addr().String())
	}
	w.metrics = addresses[1]
	cmd := exec.Command(w.options.controller, "--kubeconfig="+kubeconfig, "--namespace="+system, "--metrics-bind-address="+w.metrics, "--health-probe-bind-address=0",
		"--webhook-bind-address="+addresses[0], "--webhook-url=https://"+addresses[0])
	cmd.Stdout, cmd.Stderr = &w.log, &w.log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("-controller: %w", err)
	}
	w.controller, w.ended = cmd, make(chan struct{})
	go func() {
		_ = cmd.Wait() // why it ended is in its log
		close(w.ended)
	}()
	return nil
}

func (w *world) close() {
	w.stopController()
	if w.log.Len() > 0 && w.options.log != "" {
		if err := os.WriteFile(w.options.log, w.log.Bytes(), 0o600); err != nil {
			progress("%v", err)
		}
	}
	os.RemoveAll(w.dir)
}

func (w *world) stopController() {
	if w.controller != nil {
		_ = w.controller.Process.Kill() // unless it has ended by itself
		<-w.ended
	}
}

// withoutController takes away the controller, and with it all that the API server asks about Services.
func (w *world) withoutController(ctx context.Context) error {
	w.stopController()
	ours := client.MatchingLabels{v1alpha1.LabelManagedBy: v1alpha1.ManagedBy}
	for _, kind := range []client.Object{&admissionregistrationv1.MutatingWebhookConfiguration{},
		&admissionregistrationv1.ValidatingAdmissionPolicyBinding{}, &admissionregistrationv1.ValidatingAdmissionPolicy{}} {
		if err := w.server.Client.DeleteAllOf(ctx, kind, ours); err != nil {
			return err
		}
	}
	return w.until(ctx, time.Minute, "the webhook is gone", func() (bool, error) {
		var left admissionregistrationv1.MutatingWebhookConfigurationList
		if err := w.server.Client.List(ctx, &left); err != nil || len(left.Items) > 0 {
			return false, err
		}
		// The API server takes notice a little later. A webhook that is still asked is down by now, which a Service shows by its time only.
		start := time.Now()
		svc := w.newService(covered)
		err := errors.Join(w.server.Client.Create(ctx, svc), w.server.Client.Delete(ctx, svc))
		return svc.Annotations[v1alpha1.AnnotationReservation] == "" && time.Since(start) < time.Second, err
	})
}

func (w *world) until(ctx context.Context, limit time.Duration, what string, is func() (bool, error)) error {
	err := wait.PollUntilContextTimeout(ctx, 100*time.Millisecond, limit, true, func(context.Context) (bool, error) {
		select {
		case <-w.ended:
			if w.controller.ProcessState.ExitCode() > 0 {
				return false, errors.New("the controller ended")
			}
		default:
		}
		return is()
	})
	if err != nil {
		return fmt.Errorf("wait until %s: %w", what, err)
	}
	return nil
}

// newService is the next Service. Every fifth has a node port.
func (w *world) newService(namespace string) *corev1.Service {
	w.made++
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("web-%06d", w.made)},
		Spec: corev1.ServiceSpec{Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Name: "http", Port: 80}}}}
	if w.made%5 == 0 {
		svc.Spec.Type = corev1.ServiceTypeNodePort
	}
	return svc
}

// fill creates the Services that are there already, and waits until the controller is done with them.
func (w *world) fill(ctx context.Context) (took time.Duration, err error) {
	services := make([]*corev1.Service, w.services)
	for i := range services {
		services[i] = w.newService(covered)
	}
	var once sync.Once
	start := time.Now()
	workqueue.ParallelizeUntil(ctx, filling, w.services, func(i int) {
		if e := w.server.Client.Create(ctx, services[i]); e != nil {
			once.Do(func() { err = e })
		}
	})
	took = time.Since(start)
	if err != nil {
		return took, fmt.Errorf("create Services: %w", err)
	}
	return took, w.settled(ctx, w.services)
}

// settled waits until the controller has done all that it does about n covered Services.
func (w *world) settled(ctx context.Context, n int) error {
	return w.until(ctx, 10*time.Minute, fmt.Sprintf("%d Services are assigned", n), func() (bool, error) {
		var p v1alpha1.ServiceProxyPolicy
		err := w.server.Client.Get(ctx, client.ObjectKey{Name: policyName}, &p)
		return p.Status.Services.Assigned >= int32(n), err
	})
}
