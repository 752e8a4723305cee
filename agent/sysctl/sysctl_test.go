package sysctl

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// The values are those of kube-proxy's table of tests (pkg/proxy/conntrack/sysctls_test.go) but for what it lowers.
func TestParameters(t *testing.T) {
	off := Conntrack{}
	for _, c := range []struct {
		name string
		in   Conntrack
		cpus int
		want string
	}{
		{"all off", off, 4, ""},
		{"defaults, few CPUs: the floor", DefaultConntrack(), 2, "max=131072 buckets=32768 tcp_timeout_established=86400 tcp_timeout_close_wait=3600"},
		{"defaults, many CPUs", DefaultConntrack(), 16, "max=524288 buckets=131072 tcp_timeout_established=86400 tcp_timeout_close_wait=3600"},
		{"defaults, very many CPUs: the cap", DefaultConntrack(), 128, "max=1048576 buckets=262144 tcp_timeout_established=86400 tcp_timeout_close_wait=3600"},
		{"no limit: the floor does not count", Conntrack{Min: 5}, 2, ""},
		{"no floor", Conntrack{MaxPerCore: 100}, 2, "max=200 buckets=50"},
		{"the cap beats the floor only if the CPUs reach it", Conntrack{MaxPerCore: 100, Min: 2 << 20}, 2, "max=2097152 buckets=524288"},
		{"times", Conntrack{UDPTimeout: 30 * time.Second, UDPStreamTimeout: 5 * time.Minute, TCPBeLiberal: true}, 2, "udp_timeout=30 udp_timeout_stream=300 tcp_be_liberal=1"},
		{"less than a second is nothing", Conntrack{TCPEstablishedTimeout: time.Millisecond}, 2, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, p := range c.in.Parameters(c.cpus) {
				got = append(got, strings.TrimPrefix(p.String(), "net/netfilter/nf_conntrack_"))
			}
			if s := strings.Join(got, " "); s != c.want {
				t.Errorf("got %s, want %s", s, c.want)
			}
		})
	}
}

// tree is a /proc/sys in a folder.
func tree(t *testing.T, files map[string]string) Proc {
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Proc(root)
}

func TestRaiseNeverLowers(t *testing.T) {
	proc := tree(t, map[string]string{"net/a": "60\n", "net/machine": "60\n", "net/words": "off\n"})
	if err := os.Chmod(proc.path("net/machine"), 0o444); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		p      Parameter
		raised bool
		err    error
		after  string
	}{
		{Parameter{"net/a", 59}, false, nil, "60\n"},
		{Parameter{"net/a", 60}, false, nil, "60\n"},
		{Parameter{"net/a", 3600}, true, nil, "3600"},
		{Parameter{"net/a", 3600}, false, nil, "3600"},
		{Parameter{"net/a", 1}, false, nil, "3600"},
		{Parameter{"net/machine", 50}, false, nil, "60\n"}, // high enough: nobody needs to write it
		{Parameter{"net/machine", 70}, false, ErrNotHere, "60\n"},
		{Parameter{"net/none", 70}, false, fs.ErrNotExist, ""},
	} {
		raised, err := proc.Raise(step.p)
		if raised != step.raised || !errors.Is(err, step.err) {
			t.Errorf("%s: raised %t, error %v; want %t, %v", step.p, raised, err, step.raised, step.err)
		}
		if err != nil && !strings.Contains(err.Error(), step.p.Name) {
			t.Errorf("%s: the error does not name it: %v", step.p, err)
		}
		if text, _ := os.ReadFile(proc.path(step.p.Name)); string(text) != step.after {
			t.Errorf("%s: holds %q afterwards, want %q", step.p, text, step.after)
		}
	}
	if _, err := proc.Raise(Parameter{"net/words", 1}); err == nil || !strings.Contains(err.Error(), "net/words") {
		t.Errorf("a parameter that is no number: %v", err)
	}
}

// In a network namespace what is the namespace's can be raised, and what is the machine's cannot.
func TestInNetworkNamespace(t *testing.T) {
	ns := netns.NewT(t)
	const closeWait = "net/netfilter/nf_conntrack_tcp_timeout_close_wait"
	outside, err := Kernel.Get(conntrackMax)
	if err != nil {
		t.Skipf("this machine has no connection tracking: %v", err)
	}
	if err := ns.Do(func() error {
		raised, err := Kernel.Raise(Parameter{closeWait, 7200})
		if err != nil || !raised {
			return fmt.Errorf("raised %t, error %w", raised, err)
		}
		if now, err := Kernel.Get(closeWait); err != nil || now != 7200 {
			return fmt.Errorf("it is %d afterwards (error %w)", now, err)
		}
		for _, name := range []string{conntrackMax, conntrackBuckets} {
			if raised, err := Kernel.Raise(Parameter{name, 1 << 30}); raised || !errors.Is(err, ErrNotHere) {
				return fmt.Errorf("%s: raised %t, error %w, want ErrNotHere", name, raised, err)
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if now, err := Kernel.Get(conntrackMax); err != nil || now != outside {
		t.Errorf("the machine's limit was %d and is %d (%v)", outside, now, err)
	}
}

// A container that is not privileged has /proc/sys mounted read-only.
func TestReadOnlyProc(t *testing.T) {
	netns.RequireRoot(t)
	if os.Getenv("READ_ONLY_PROC") == "" {
		cmd := exec.Command("unshare", "--net", "--mount", "--propagation", "private", "sh", "-ec",
			`mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys; exec "$0" -test.run='^TestReadOnlyProc$' -test.v`, os.Args[0])
		cmd.Env = append(os.Environ(), "READ_ONLY_PROC=1")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: TestReadOnlyProc") {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	raised, err := Kernel.Raise(Parameter{"net/ipv4/conf/all/route_localnet", 1})
	if raised || !errors.Is(err, syscall.EROFS) {
		t.Errorf("raised %t, error %v, want that the file system is read-only", raised, err)
	}
}

func TestLocalPorts(t *testing.T) {
	for _, c := range []struct{ all, reserved, want string }{
		{"32768\t60999\n", "\n", "32768-60999"},
		{"1024 65535", "30000-32767", "1024-29999 32768-65535"},
		{"30000 40000", "30000-40000", ""},
		{"30000 40000", "1-29999,40001-50000", "30000-40000"},
		{"30000 40000", "29000-30009,30020,39990-65535", "30010-30019 30021-39989"},
		{"30000 40000", "35000,31000", "30000-30999 31001-34999 35001-40000"}, // the kernel sorts them, which nobody promises
		{"1 65535", "65535", "1-65534"},
	} {
		ports, err := tree(t, map[string]string{localPortRange: c.all, localReservedPorts: c.reserved}).LocalPorts()
		var got []string
		for _, p := range ports {
			got = append(got, p.String())
		}
		if s := strings.Join(got, " "); err != nil || s != c.want {
			t.Errorf("%q without %q: %s (%v), want %s", c.all, c.reserved, s, err, c.want)
		}
	}
	for _, bad := range []string{"", "1", "one two", "1 70000"} {
		if ports, err := tree(t, map[string]string{localPortRange: bad, localReservedPorts: ""}).LocalPorts(); err == nil {
			t.Errorf("%q gives %v", bad, ports)
		}
	}
	var many []string
	for i := range 200 {
		many = append(many, fmt.Sprint(20000+2*i))
	}
	ports, err := tree(t, map[string]string{localPortRange: "10000 60000", localReservedPorts: strings.Join(many, ",")}).LocalPorts()
	if err != nil || len(ports) != maxPortRanges || ports[len(ports)-1].Last != 60000 {
		t.Errorf("%d ranges (%v), the last is %v; want %d that reach to the end", len(ports), err, ports[len(ports)-1], maxPortRanges)
	}
}

func TestLocalPortsOfKernel(t *testing.T) {
	ns := netns.NewT(t)
	for name, value := range map[string]string{localPortRange: "20000 30000", localReservedPorts: "25000-26000"} {
		if _, err := ns.Run("sh", "-c", fmt.Sprintf("echo %s > %s", value, Kernel.path(name))); err != nil {
			t.Fatal(err)
		}
	}
	if err := ns.Do(func() error {
		got, err := Kernel.LocalPorts()
		if want := []PortRange{{20000, 24999}, {26001, 30000}}; err == nil && !slices.Equal(got, want) {
			err = fmt.Errorf("got %v, want %v", got, want)
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

func TestCPUs(t *testing.T) {
	for list, want := range map[string]int{"0": 1, "0-3": 4, "0-3,8-11,15": 9, "": 0} {
		if n, err := countList(list); err != nil || n != want {
			t.Errorf("%q: %d, %v, want %d", list, n, err, want)
		}
	}
	for _, bad := range []string{"a", "3-1", "1-", ",", "0-3,"} {
		if n, err := countList(bad); err == nil {
			t.Errorf("%q: %d", bad, n)
		}
	}
	if CPUs() < 1 {
		t.Error("no CPU")
	}
}
