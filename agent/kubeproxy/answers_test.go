package kubeproxy

import (
	"net"
	"testing"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

func TestAnswers(t *testing.T) {
	ns := netns.NewT(t)
	if out, err := ns.Run("ip", "link", "set", "lo", "up"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	listen := func(at string) (l net.Listener) {
		t.Helper()
		if err := ns.Do(func() (err error) { l, err = net.Listen("tcp", at); return err }); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	answers := func(own ...net.Listener) (yes bool) {
		_ = ns.Do(func() error { yes = Answers(own...); return nil }) // it has no error
		return yes
	}
	if answers(nil, nil) {
		t.Error("somebody answers where nobody listens")
	}
	ours := listen(":10256")
	if answers(ours, nil) {
		t.Error("took the agent's own health port for kube-proxy's")
	}
	if !answers(nil, nil) {
		t.Error("whoever listens at port 10256 is not heard")
	}
	listen("127.0.0.1:10249")
	if !answers(ours, nil) {
		t.Error("whoever listens at port 10249 is not heard")
	}
}
