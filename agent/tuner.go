package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/go-logr/logr"

	"github.com/serviceproxy/serviceproxy-operator/agent/sysctl"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

const (
	// tuneEvery is how often the tuner tries again what it could not do, and looks at the node's local ports.
	tuneEvery = 30 * time.Second
	// tunePatience is how long a parameter may be missing without anybody being told: the kernel's module comes with the first rules.
	tunePatience = time.Minute
)

// kernelReport is what the tuner tells of the node's kernel.
type kernelReport struct {
	// problem says which parameters could not be raised and why, "" if all could.
	problem string
	// localPorts are the ports that the kernel gives to outgoing connections.
	localPorts []sysctl.PortRange
}

func (r kernelReport) equal(o kernelReport) bool {
	return r.problem == o.problem && slices.Equal(r.localPorts, o.localPorts)
}

// tuner raises the node's kernel parameters to what the settings ask for: once for each change of the settings, because whoever lowers one afterwards means it. It
// tells of what it could not do, which is no reason to stop: forwarding works without.
type tuner struct {
	log  logr.Logger
	proc sysctl.Proc
	cpus int
	tell func(kernelReport)

	wanted sysctl.Conntrack
	since  time.Time          // of wanted
	open   []sysctl.Parameter // those of wanted that are not settled
	told   kernelReport
}

func newTuner(log logr.Logger, tell func(kernelReport)) *tuner {
	return &tuner{log: log, proc: sysctl.Node(), cpus: sysctl.CPUs(), tell: tell}
}

// run works until ctx ends. It starts with these settings and goes on with those that come.
func (t *tuner) run(ctx context.Context, first sysctl.Conntrack, changes <-chan sysctl.Conntrack) {
	ticker := time.NewTicker(tuneEvery)
	defer ticker.Stop()
	t.want(first)
	t.look(true)
	for {
		select {
		case <-ctx.Done():
			return
		case wanted := <-changes:
			if wanted != t.wanted {
				t.want(wanted)
				t.look(false)
			}
		case <-ticker.C:
			t.look(false)
		}
	}
}

func (t *tuner) want(c sysctl.Conntrack) {
	t.wanted, t.since, t.open = c, time.Now(), c.Parameters(t.cpus)
}

// look does what can be done now and tells what is new.
func (t *tuner) look(first bool) {
	report := kernelReport{problem: t.raise()}
	ports, err := t.proc.LocalPorts()
	if err != nil && first {
		t.log.Error(err, "Could not read which ports the kernel gives to outgoing connections; nobody will be warned of node ports among them")
	}
	if report.localPorts = ports; !first && report.equal(t.told) {
		return
	}
	if report.problem != "" && report.problem != t.told.problem {
		t.log.Error(nil, "Kernel parameters are lower than they should be; forwarding goes on", "problem", report.problem)
	}
	t.told = report
	t.tell(report)
}

// raise tries what is open and says what could not be done.
func (t *tuner) raise() string {
	var open []sysctl.Parameter
	var problems []string
	for _, p := range t.open {
		raised, err := t.proc.Raise(p)
		switch {
		case raised:
			t.log.Info("Raised a kernel parameter", "parameter", p.Name, "value", p.AtLeast)
		case err == nil:
		case errors.Is(err, sysctl.ErrNotHere):
			t.log.Info("Left a kernel parameter as it is", "parameter", p.Name, "wanted", p.AtLeast, "reason", err.Error())
		case errors.Is(err, fs.ErrNotExist):
			open = append(open, p)
			if time.Since(t.since) >= tunePatience {
				problems = append(problems, fmt.Sprintf("%s: this kernel does not have it; is the module nf_conntrack loaded?", p))
			}
		default:
			open = append(open, p)
			problems = append(problems, fmt.Sprintf("%s: %v", p, err))
		}
	}
	if t.open = open; len(problems) == 0 {
		return ""
	}
	return strings.Join(problems, "; ") + ". The agent must be able to write to /proc/sys (as a privileged container can); or raise them on the node, or switch them off in the agent's configuration (conntrack)"
}

// apiPorts gives ranges of ports in the API's form.
func apiPorts(list []sysctl.PortRange) []v1alpha1.NodePortRange {
	var out []v1alpha1.NodePortRange
	for _, r := range list {
		out = append(out, v1alpha1.NodePortRange{Start: max(int32(r.First), 1), End: int32(r.Last)})
	}
	return out
}
