package netns

import (
	"net"
	"os"
	"strings"
	"testing"
)

func TestNamespaceIsSeparate(t *testing.T) {
	n := NewT(t)
	if _, err := n.Run("ip", "addr", "add", "192.0.2.1/32", "dev", "lo"); err != nil {
		t.Fatal(err)
	}
	var inside net.Listener
	if err := n.Do(func() (err error) { inside, err = net.Listen("tcp", "192.0.2.1:80"); return err }); err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	if l, err := net.Listen("tcp", "192.0.2.1:80"); err == nil {
		l.Close()
		t.Fatal("the address given to the namespace is on the machine itself")
	}
}

func TestPin(t *testing.T) {
	n := NewT(t)
	name := "netns-test-" + strings.ReplaceAll(t.Name(), "/", "-")
	if err := n.Pin(name); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/run/netns/" + name); err != nil {
		t.Fatal(err)
	}
}
