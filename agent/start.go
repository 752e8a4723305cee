package agent

import (
	"context"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

// apiServer is the Service by which pods reach the API server.
var apiServer = types.NamespacedName{Namespace: "default", Name: "kubernetes"}

// essential says whether nearly nothing in a cluster gets anywhere without a Service: the API server's, and those that answer DNS. DNS is told by its port,
// because distributions call its Service as they like (kube-dns, coredns, rke2-coredns-rke2-coredns, dns-default in a namespace of its own) and an assignment
// does not carry its Service's labels. If something else has that port, it merely is early.
func essential(in input) bool {
	if in.assignment == nil {
		return false
	}
	if in.service == apiServer {
		return true
	}
	for _, p := range in.assignment.Ports {
		if p.Port == 53 && p.Protocol == forwarding.UDP {
			return true
		}
	}
	return false
}

// headStart programs what is essential of the first batch, before the rest of it is as much as compiled, and says whether it did: on a node that just came up,
// its pods and the kubelet's would else wait for thousands of Services that they do not need. It leaves alone every mode that may hold rules of an earlier run,
// because a state without the other Services would take them away.
func (l *loop) headStart(ctx context.Context, b batch) bool {
	start, services := time.Now(), 0
	for _, in := range b.inputs {
		if essential(in) {
			services++
			l.recompile(in)
		}
	}
	programmed := false
	for _, d := range l.planes {
		if d.want.Len() > 0 && d.blank(ctx) {
			programmed = d.program(ctx, l.nudge) || programmed
		}
	}
	if programmed {
		l.log.Info("Programmed the API server's Service and DNS before all others", "services", services, "took", time.Since(start))
	}
	return programmed
}

// blank says whether the kernel is known to hold nothing of the mode, as after a boot.
func (d *dataplane) blank(ctx context.Context) bool {
	if d.Blank == nil || d.backend != nil {
		return false
	}
	blank, err := d.Blank(ctx)
	if err != nil {
		d.log.Error(err, "Could not tell whether rules of an earlier run are in force; programming all Services at once", "mode", d.Name)
	}
	return blank && err == nil
}

// inherits says whether the kernel is known to hold rules of the mode before anything is programmed.
func (d *dataplane) inherits(ctx context.Context) bool {
	if d.Blank == nil || !d.available() {
		return false
	}
	blank, err := d.Blank(ctx)
	return err == nil && !blank // if it cannot be told, blank says so when it matters
}
