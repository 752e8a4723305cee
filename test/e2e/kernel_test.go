package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"

	"github.com/serviceproxy/serviceproxy-operator/test/cluster"
)

// rules lists all that a node's kernel holds, as an administrator would.
func rules(n *cluster.Node) string {
	GinkgoHelper()
	return nft(n, "list", "ruleset")
}

// nft runs nft on a node.
func nft(n *cluster.Node, args ...string) string {
	GinkgoHelper()
	out, err := n.NS.Run("nft", args...)
	Expect(err).NotTo(HaveOccurred())
	return out
}

// snapshot is what a node's kernel holds, with handles, so that it differs even if something was removed and put back. The order of elements means
// nothing, so they are sorted.
func snapshot(n *cluster.Node) string {
	GinkgoHelper()
	var list struct {
		Nftables []map[string]map[string]any `json:"nftables"`
	}
	Expect(json.Unmarshal([]byte(nft(n, "-j", "-a", "list", "ruleset")), &list)).To(Succeed())
	var lines []string
	for _, entry := range list.Nftables {
		for kind, o := range entry {
			if elements, ok := o["elem"].([]any); ok {
				o["elem"] = sorted(elements)
			}
			line, err := json.Marshal(o)
			Expect(err).NotTo(HaveOccurred())
			lines = append(lines, kind+" "+string(line))
		}
	}
	return strings.Join(lines, "\n")
}

func sorted(elements []any) (out []string) {
	GinkgoHelper()
	for _, e := range elements {
		var b bytes.Buffer
		Expect(json.NewEncoder(&b).Encode(e)).To(Succeed())
		out = append(out, strings.TrimSpace(b.String()))
	}
	slices.Sort(out)
	return out
}

// agentCommand is the command line of a node's agent, which must be running.
func agentCommand(n *cluster.Node) []string {
	GinkgoHelper()
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(n.Agent.PID()), "cmdline"))
	Expect(err).NotTo(HaveOccurred())
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
}

// startOn runs a program in a node's namespace until the spec ends or stop is called. Its output is in the spec's.
func startOn(n *cluster.Node, command ...string) (stop func()) {
	GinkgoHelper()
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdout, cmd.Stderr = GinkgoWriter, GinkgoWriter
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the suite, which then stops it
	Expect(n.NS.Start(cmd)).To(Succeed())
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		Expect(cmd.Process.Kill()).To(Succeed())
		_ = cmd.Wait() // it was killed
	}
	DeferCleanup(stop)
	return stop
}

// ensureRunning starts a node's agent if the spec ended before it did.
func ensureRunning(n *cluster.Node) {
	if !n.Agent.Running() {
		Expect(n.Agent.Start(ctx)).To(Succeed())
	}
}
