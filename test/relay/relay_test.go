package relay

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"testing"
	"time"
)

// echo answers every line with its name and the line, until stop is called.
func echo(t *testing.T, name string) (address string, stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				go func() { <-done; conn.Close() }()
				for lines := bufio.NewScanner(conn); lines.Scan(); {
					fmt.Fprintf(conn, "%s %s\n", name, lines.Text())
				}
			}()
		}
	}()
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			l.Close()
			close(done)
		}
	}
	t.Cleanup(stop)
	return l.Addr().String(), stop
}

type client struct {
	*testing.T
	net.Conn
	lines *bufio.Reader
}

func dial(t *testing.T, r *Relay) *client {
	t.Helper()
	conn, err := net.Dial("tcp", r.Address())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &client{t, conn, bufio.NewReader(conn)}
}

func (c *client) say(line string) {
	c.Helper()
	if _, err := fmt.Fprintln(c.Conn, line); err != nil {
		c.Fatal(err)
	}
}

func (c *client) hears(want string, within time.Duration) error {
	if err := c.SetReadDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	got, err := c.lines.ReadString('\n')
	if err == nil && got != want+"\n" {
		err = fmt.Errorf("heard %q, want %q", got, want)
	}
	return err
}

func (c *client) expect(want string) {
	c.Helper()
	if err := c.hears(want, 10*time.Second); err != nil {
		c.Fatal(err)
	}
}

func newRelay(t *testing.T, targets ...string) *Relay {
	t.Helper()
	r, err := New(targets...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func TestTargetsServeInTurnAndStandInForOneAnother(t *testing.T) {
	a, stopA := echo(t, "a")
	b, _ := echo(t, "b")
	r := newRelay(t, a, b)
	for range 10 {
		c := dial(t, r)
		c.say("hello")
		if _, err := c.lines.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	if x, y := r.Target(0).Carried(), r.Target(1).Carried(); x != 5 || y != 5 {
		t.Errorf("carried %d and %d connections, want 5 each", x, y)
	}
	stopA()
	for range 4 {
		c := dial(t, r)
		c.say("hello")
		c.expect("b hello")
	}
}

func TestAnUnreadyTargetKeepsWhatItHasAndGetsNothingNew(t *testing.T) {
	a, _ := echo(t, "a")
	b, _ := echo(t, "b")
	r := newRelay(t, a, b)
	r.Target(1).SetReady(false)
	old := dial(t, r)
	old.say("first")
	old.expect("a first")
	r.Target(0).SetReady(false)
	r.Target(1).SetReady(true)
	c := dial(t, r)
	c.say("hello")
	c.expect("b hello")
	old.say("still")
	old.expect("a still")
}

func TestAHeldTargetIsSilentUntilItResumes(t *testing.T) {
	a, _ := echo(t, "a")
	r := newRelay(t, a)
	old := dial(t, r)
	old.say("before")
	old.expect("a before")
	r.Target(0).Hold()
	r.Target(0).Hold() // twice is once
	old.say("during")
	fresh := dial(t, r)
	fresh.say("fresh")
	for _, c := range []*client{old, fresh} {
		if err := c.hears("", 50*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("want silence, got %v", err)
		}
	}
	r.Target(0).Resume()
	old.expect("a during")
	fresh.expect("a fresh")
}

func TestAClientSeesTheEndOfItsTarget(t *testing.T) {
	a, stop := echo(t, "a")
	r := newRelay(t, a)
	c := dial(t, r)
	c.say("hello")
	c.expect("a hello")
	stop()
	if err := c.hears("", 10*time.Second); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("want the connection's end, got %v", err)
	}
}

func TestCloseEndsEverythingEvenWhatIsHeld(t *testing.T) {
	a, _ := echo(t, "a")
	r := newRelay(t, a)
	r.Target(0).Hold()
	c := dial(t, r)
	c.say("hello")
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if err := c.hears("", 10*time.Second); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("want the connection's end, got %v", err)
	}
}
