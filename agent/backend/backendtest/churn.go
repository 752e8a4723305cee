package backendtest

import (
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"time"
)

// churn are the promises about a node on which much happens at once.
var churn = []Scenario{
	{"500 new connections a second go through a hundred changes of endpoints: none fails or is lost", func(l *Lab) {
		sent := l.resent(l.space("outside"))
		all := replicasOf("b", replicas)
		change := func(i int) { // always another number of them, and others
			n := 1 + i*7%len(all)
			l.Program(web(at(append(all[i%len(all):], all[:i%len(all)]...)[:n]...), nil), another(0, at(all[:n]...)))
		}
		change(0)
		began := time.Now()
		ld := l.startLoad("tcp", crowd, toServiceIP, 0, 500)
		// A subject to which a change takes a second need not make a hundred.
		for i := 1; i <= 100 && time.Since(began) < 20*time.Second; i++ {
			change(i)
			ld.awaitMore(10)
		}
		ld.finish()
		l.Logf("%d connections in %v", ld.total, time.Since(began).Round(time.Millisecond))
		if n := l.resent(l.space("outside")) - sent; n > 0 {
			l.Errorf("%d SYNs got no answer and were sent again", n)
		}
	}},
	{"new connections go through restarts of the proxy: none fails or is lost", func(l *Lab) {
		sent := l.resent(l.space("outside"))
		l.Program(web(at("a", "b1", "b2", "b3"), nil), another(0, at("a")))
		loads := []*load{l.startLoad("tcp", crowd, toServiceIP, 0, 0), l.startLoad("udp", crowd, toNodePort, 1, 0)}
		for range 4 {
			l.Restart()
			for _, ld := range loads {
				ld.awaitMore(50)
			}
		}
		for _, ld := range loads {
			ld.finish()
		}
		if n := l.resent(l.space("outside")) - sent; n > 0 {
			l.Errorf("%d SYNs got no answer and were sent again", n)
		}
	}},
	{"what others do to their own rules 50 times a second disturbs nothing, and theirs stay as they made them", func(l *Lab) {
		l.Program(web(at("a", "b1", "b2"), nil))
		others := l.startOthers()
		open := l.openFlows("c outside", "tcp", "udp")
		onA := open.at("a") // all others' endpoints come and go
		tcp := l.startLoad("tcp", crowd, toServiceIP, 0, 100)
		udp := l.startLoad("udp", crowd, toNodePort, 1, 100)
		onA.during(func() {
			for i := 0; i < 20 || !others.made(100); i++ {
				l.Program(web(append(at("a"), at(replicasOf("b", i%9)...)...), nil), another(i%3, at("b")))
				tcp.awaitMore(5)
			}
		})
		tcp.finish()
		udp.finish()
		others.finish()
		l.Restart()
		others.unchanged()
		onA.check()
	}},
}

// others are programs with rules of their own on the node: a firewall with nftables and one with legacy iptables, that keep some rules and never stop
// changing more.
type others struct {
	*Lab
	kept    string // what they keep, as listed at first
	wait    []func() error
	stop    chan struct{}
	running sync.WaitGroup

	mu           sync.Mutex
	transactions int
}

const (
	keptTable = `table inet lab-kept {
		set blocked { type ipv4_addr; flags interval; elements = { 203.0.113.0/25, 203.0.113.200 }; }
		map doors { type inet_service : verdict; elements = { 9 : drop, 30081 : accept }; }
		chain forward { type filter hook forward priority 0; policy accept; ip saddr @blocked drop; tcp dport vmap @doors; }
		chain pre { type nat hook prerouting priority -100; ip daddr 203.0.113.8 tcp dport 80 dnat ip to 10.244.2.3:8080; }
		chain tagging { type filter hook prerouting priority -150; meta mark set meta mark | 0x100; }
	}`
	keptIPTables = `*nat
:LAB-KEPT -
-A PREROUTING -m comment --comment "theirs" -j LAB-KEPT
-A LAB-KEPT -d 203.0.113.7/32 -p tcp -j DNAT --to-destination 10.244.2.3:8080
COMMIT
*filter
:LAB-KEPT -
-A FORWARD -j LAB-KEPT
-A LAB-KEPT -s 203.0.113.128/25 -j DROP
COMMIT
`
)

// startOthers starts them.
func (l *Lab) startOthers() *others {
	l.Helper()
	o := &others{Lab: l, stop: make(chan struct{})}
	l.sh(l.node, fmt.Sprintf("nft '%s'\niptables-legacy-restore --noflush <<'EOF'\n%sEOF", keptTable, keptIPTables))
	l.Cleanup(func() {
		l.sh(l.node, `nft delete table inet lab-kept
			iptables-legacy -t nat -D PREROUTING -m comment --comment theirs -j LAB-KEPT; iptables-legacy -D FORWARD -j LAB-KEPT
			for t in nat filter; do for c in LAB-KEPT LAB-CHURN; do iptables-legacy -t $t -F $c && iptables-legacy -t $t -X $c || true; done; done 2>/dev/null`)
	})
	o.kept = o.list()
	// Each makes one transaction of what it is sent: the first of a line, the second of a block.
	nft := o.start("nft", "-i")
	iptables := o.start("iptables-legacy-restore", "--noflush")
	o.running.Go(func() {
		ticker := time.NewTicker(time.Second / 50)
		defer ticker.Stop()
		for i := 0; ; i++ {
			select {
			case <-o.stop:
				return
			case <-ticker.C:
			}
			o.transact(i, nft, iptables)
		}
	})
	return o
}

func (o *others) transact(i int, nft, iptables io.Writer) {
	var err error
	switch i % 4 {
	case 0:
		_, err = fmt.Fprintf(nft, "add table inet lab-churn; add chain inet lab-churn c { type nat hook prerouting priority %d; }; "+
			"add set inet lab-churn s { type ipv4_addr; }; add element inet lab-churn s { 203.0.113.%d }; add rule inet lab-churn c ip daddr @s drop\n", -110+i%20, i%256)
	case 1:
		_, err = fmt.Fprintf(iptables, "*nat\n:LAB-CHURN -\n-A LAB-CHURN -d 203.0.113.%d -j RETURN\nCOMMIT\n", i%256)
	case 2:
		_, err = fmt.Fprintln(nft, "delete table inet lab-churn")
	case 3:
		_, err = fmt.Fprintf(iptables, "*filter\n:LAB-CHURN -\n-A LAB-CHURN -s 203.0.113.%d -j RETURN\nCOMMIT\n", i%256)
	}
	if err != nil {
		o.Errorf("the others' transaction %d: %v", i, err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.transactions++
}

// start starts a program on the node that is told what to do through what is returned.
func (o *others) start(name string, args ...string) io.Writer {
	o.Helper()
	cmd := exec.Command(name, args...)
	var complaints strings.Builder
	cmd.Stderr = &complaints
	in, err := cmd.StdinPipe()
	if err == nil {
		err = o.node.Start(cmd)
	}
	if err != nil {
		o.Fatalf("%s: %v", name, err)
	}
	ended := sync.OnceValue(func() error {
		in.Close()
		if err := cmd.Wait(); err != nil || complaints.Len() > 0 {
			return fmt.Errorf("%s: %w: %s", name, err, complaints.String())
		}
		return nil
	})
	o.Cleanup(func() { _ = ended() }) // finish reports it
	o.wait = append(o.wait, ended)
	return in
}

// made says whether they made n transactions.
func (o *others) made(n int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.transactions >= n
}

// finish ends them, and reports if something kept them from doing what they wanted.
func (o *others) finish() {
	o.Helper()
	close(o.stop)
	o.running.Wait()
	for _, ended := range o.wait {
		if err := ended(); err != nil {
			o.Error(err)
		}
	}
}

// unchanged checks that what they keep is as they made it.
func (o *others) unchanged() {
	o.Helper()
	if now := o.list(); now != o.kept {
		o.Errorf("their rules were\n%s\nand are now\n%s", o.kept, now)
	}
}

// volatile is what iptables-save says besides rules, and the chain that comes and goes.
var volatile = regexp.MustCompile(`(?m)^#.*\n|^.*LAB-CHURN.*\n| \[\d+:\d+\]`)

func (o *others) list() string {
	o.Helper()
	nft, err := o.node.Run("nft", "list", "table", "inet", "lab-kept")
	if err != nil {
		o.Fatal(err)
	}
	out := nft
	for _, table := range []string{"nat", "filter"} {
		rules, err := o.node.Run("iptables-legacy-save", "-t", table)
		if err != nil {
			o.Fatal(err)
		}
		out += volatile.ReplaceAllString(rules, "")
	}
	return out
}
