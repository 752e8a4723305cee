package kubeproxy_test

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/kubeproxy"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// asTheAgentMay calls f with no capability of the calling thread but the one that config/agent gives the agent's container.
func asTheAgentMay(f func() error) func() error {
	return func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var all [2]unix.CapUserData
		if err := unix.Capget(&header, &all[0]); err != nil {
			return err
		}
		few := all
		few[0].Effective, few[1].Effective = 1<<unix.CAP_NET_ADMIN, 0
		if err := unix.Capset(&header, &few[0]); err != nil {
			return err
		}
		return errors.Join(f(), unix.Capset(&header, &all[0]))
	}
}

func TestFind(t *testing.T) {
	netns.RequireRoot(t)
	for _, tt := range []struct {
		name, commands string
		want           kubeproxy.Mode
	}{
		{"nothing", "", kubeproxy.Absent},
		{"others' rules", "nft add table ip mine; iptables-legacy -t mangle -N MINE; iptables-nft -t nat -N KUBE-KUBELET-CANARY", kubeproxy.Absent},
		{"nftables", "nft add table ip kube-proxy", kubeproxy.NFTables},
		{"nftables, IPv6 only", "nft add table ip6 kube-proxy", kubeproxy.NFTables},
		{"iptables-nft", "iptables-nft -t mangle -N KUBE-PROXY-CANARY", kubeproxy.IPTables},
		{"iptables-nft, IPv6 only", "ip6tables-nft -t mangle -N KUBE-PROXY-CANARY", kubeproxy.IPTables},
		{"legacy iptables", "iptables-legacy -t mangle -N KUBE-PROXY-CANARY; iptables-legacy -t mangle -N Z", kubeproxy.IPTables},
		{"legacy iptables, IPv6 only", "ip6tables-legacy -t mangle -N KUBE-PROXY-CANARY", kubeproxy.IPTables},
		{"ipvs", "ip link add kube-ipvs0 type veth peer name other", kubeproxy.IPVS},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ns := netns.NewT(t)
			for command := range strings.SplitSeq(tt.commands, "; ") {
				if args := strings.Fields(command); len(args) > 0 {
					if out, err := ns.Run(args[0], args[1:]...); err != nil {
						t.Fatalf("%s: %v\n%s", command, err, out)
					}
				}
			}
			var got kubeproxy.Mode
			err := ns.Do(asTheAgentMay(func() (err error) {
				got, err = kubeproxy.Find()
				return err
			}))
			if err != nil || got != tt.want {
				t.Errorf("got %s, %v, want %s", got, err, tt.want)
			}
			if out, err := ns.Run("cat", "/proc/net/ip_tables_names"); err == nil && tt.commands == "" && out != "" {
				t.Errorf("looking brought tables into being: %s", out)
			}
		})
	}
}
