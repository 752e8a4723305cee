package e2e

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
	"github.com/serviceproxy/serviceproxy-operator/test/cluster"
)

var _ = Describe("A node", func() {
	It("drops what goes to unused addresses of its policies' ranges, for as long as there is the policy", func() {
		ranges := func(n *cluster.Node) func() []string {
			return func() []string {
				var state v1alpha1.NodeProxyState
				Expect(k8s.Get(ctx, client.ObjectKey{Name: n.Name}, &state)).To(Succeed())
				return state.Spec.ServiceRanges
			}
		}
		t := newTenant()
		p := t.readyPolicy(nil)
		for _, n := range c.Nodes {
			Eventually(ranges(n)).Should(ContainElements(t.v4.String(), t.v6.String()))
		}
		for _, from := range append(podCallers(), nodeCallers()...) {
			for _, r := range []netip.Prefix{t.v4, t.v6} {
				unused := netip.AddrPortFrom(host(r, 200), 80)
				Eventually(func() bool { return silent(from, unused) }).Should(BeTrue(), "%s is answered from the unused address %s", from.name, unused)
			}
		}
		Expect(k8s.Delete(ctx, p)).To(Succeed())
		for _, n := range c.Nodes {
			Eventually(ranges(n)).ShouldNot(ContainElement(BeElementOf(t.v4.String(), t.v6.String())))
		}
	})

	It("tells which proxy mode carries its Services where kube-proxy does", func() {
		t := newTenant()
		t.readyPolicy(nil)
		t.deploy("web", 1)
		t.service("web", t.at(20))
		t.awaitProgrammed("web")
		for _, n := range c.Nodes {
			Expect(n.NS.Run("curl", "--silent", "--fail", "http://127.0.0.1:10249/proxyMode")).To(Equal("nftables"))
			Expect(n.NS.Run("curl", "--silent", "--fail", "http://127.0.0.1:10249/configz")).To(ContainSubstring(`"hostnameOverride":"` + n.Name + `"`))
		}
	})
})

// silent says whether nothing at all comes back from an address: neither a refusal nor word that there is no way.
func silent(from caller, to netip.AddrPort) bool {
	err := from.ns.Do(func() error {
		conn, err := net.DialTimeout("tcp", to.String(), time.Second)
		if err == nil {
			conn.Close()
		}
		return err
	})
	return errors.Is(err, os.ErrDeadlineExceeded)
}
