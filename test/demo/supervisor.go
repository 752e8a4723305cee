package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/test/cluster"
)

const (
	// supervisorEnv, in the environment, makes this program the one that holds the cluster when the demo has ended.
	supervisorEnv = "SERVICEPROXY_DEMO_SUPERVISOR"
	// The supervisor's ends of two pipes: what it reads ends when the demo is killed before the story is over, and it writes told when it is.
	watchFD, tellFD = 3, 4
	told            = "told\n"

	downTimeout = 60 * time.Second
)

// startSupervisor starts a supervisor and lets it tell the story.
func startSupervisor(ctx context.Context) error {
	watched, hold, err := os.Pipe()
	if err != nil {
		return err
	}
	defer hold.Close()
	listen, tell, err := os.Pipe()
	if err != nil {
		return err
	}
	defer listen.Close()

	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{watched, tell}
	cmd.Env = append(os.Environ(), supervisorEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // lives on without the terminal
	err = cmd.Start()
	watched.Close()
	tell.Close()
	if err != nil {
		return err
	}
	interrupted := context.AfterFunc(ctx, func() { hold.Close() })
	defer interrupted()
	if line, err := bufio.NewReader(listen).ReadString('\n'); err == nil && line == told {
		return nil
	}
	return errors.Join(errors.New("the cluster is not up"), cmd.Wait())
}

// supervise tells the story and then holds the cluster until it is asked to end.
func supervise(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	over := make(chan struct{})
	go func() {
		// It never gives a byte, only ends.
		io.Copy(io.Discard, os.NewFile(watchFD, "watch")) //nolint:errcheck // it ends when the other end does
		select {
		case <-over:
		default:
			cancel(errors.New("interrupted"))
		}
	}()
	ended := make(crashes, 1)
	c, err := tell(ctx, os.Stdout, ended)
	if err != nil {
		if c != nil {
			err = errors.Join(err, c.Close())
		}
		return err
	}
	thingsToTry(os.Stdout, c)
	close(over)
	if err := letGo(c); err != nil {
		return errors.Join(err, c.Close())
	}
	programs := []program{c.Controller}
	for _, n := range c.Nodes {
		programs = append(programs, n.Agent)
	}
	for {
		select {
		case <-ctx.Done():
			return c.Close()
		case err := <-ended:
			fmt.Println(err)
			revive(ctx, os.Stdout, programs)
		}
	}
}

// crashes has what is known of a program that ended by itself. One stands for any number.
type crashes chan error

func (c crashes) add(err error) {
	select {
	case c <- err:
	default:
	}
}

// program is one that is to run for as long as the cluster.
type program interface {
	Name() string
	Running() bool
	Start(context.Context) error
}

// reviveAfter is how long a program that ended stays so.
const reviveAfter = time.Second

// revive starts what does not run any more, as a Deployment and a DaemonSet would, and says so.
func revive(ctx context.Context, out io.Writer, programs []program) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(reviveAfter):
	}
	for _, p := range programs {
		if p.Running() {
			continue
		}
		how := "started again, as its DaemonSet or Deployment would"
		if err := p.Start(ctx); err != nil {
			how = err.Error()
		}
		fmt.Fprintf(out, "%s %s: %s\n", time.Now().Format(time.TimeOnly), p.Name(), how)
	}
}

// letGo tells the demo that it may end, and lets go of its terminal.
func letGo(c *cluster.Cluster) error {
	log, err := os.Create(filepath.Join(c.LogDir(), "supervisor.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	for _, fd := range []int{1, 2} {
		if err := unix.Dup3(int(log.Fd()), fd, 0); err != nil {
			return err
		}
	}
	tell := os.NewFile(tellFD, "tell")
	_, err = tell.WriteString(told)
	return errors.Join(err, tell.Close())
}

// takeDown ends the cluster that an earlier run left, if there is one.
func takeDown(ctx context.Context) error {
	// What a killed one left, too.
	if err := cluster.Sweep(); err != nil {
		return err
	}
	pid, err := cluster.Owner(clusterName)
	if err != nil {
		return err
	}
	if pid == 0 {
		fmt.Println("no demo cluster is up")
		return nil
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return fmt.Errorf("end process %d: %w", pid, err)
	}
	ctx, cancel := context.WithTimeout(ctx, downTimeout)
	defer cancel()
	for {
		if pid, err := cluster.Owner(clusterName); err == nil && pid == 0 {
			fmt.Println("the demo cluster is gone")
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("process %d did not end: %w", pid, context.Cause(ctx))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func thingsToTry(out io.Writer, c *cluster.Cluster) {
	fmt.Fprint(out, strings.NewReplacer(
		"KUBECONFIG_PATH", c.Kubeconfig, "ASSETS", c.Assets, "LOGS", c.LogDir(),
		"exec CLIENT", "exec "+c.Exec(namespace+".client-1"), "exec NODE", "exec "+c.Exec("node1"), "exec OUTSIDE", "exec "+c.Exec("outside"),
		"pids NODE", "pids "+c.Exec("node1"),
	).Replace(`
The cluster stays up. Things to try:

    export KUBECONFIG=KUBECONFIG_PATH PATH=ASSETS:$PATH
    kubectl get spp,svca,nps,claim -A
    kubectl explain serviceproxypolicy.spec

  call the orange Service from a pod on NODE1, as often as you like:
    ip netns exec CLIENT curl -s http://10.99.13.178/

  call the purple node port from outside, through each node:
    for n in 11 12 13; do ip netns exec OUTSIDE curl -s http://172.30.0.$n:30080/; done

  make a pod not ready, and ready again; scale; see how the rules follow:
    kubectl -n demo annotate pod -l app=orange --overwrite serviceproxy.io/ready=false
    kubectl -n demo annotate pod -l app=orange --overwrite serviceproxy.io/ready=true
    kubectl -n demo scale deployment orange --replicas=10

  see, and break, what the agent on NODE1 programmed; it repairs it:
    ip netns exec NODE nft list ruleset
    ip netns exec NODE nft flush ruleset

  kill the agent on NODE1; it comes back after a second, as its DaemonSet would bring it back:
    kill -KILL $(ip netns pids NODE); tail -f LOGS/supervisor.log

  logs:
    ls LOGS

End it with:  make demo-down
`))
}
