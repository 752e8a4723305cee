package e2e

import (
	. "github.com/onsi/ginkgo/v2"
	. "github.com/onsi/gomega"
)

var _ = Describe("A node", func() {
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
