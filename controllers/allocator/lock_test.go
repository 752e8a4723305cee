package allocator

import (
	"net/netip"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/validation"
)

func TestLockNames(t *testing.T) {
	for _, tt := range []struct {
		lock Lock
		name string
	}{
		{AddrLock(netip.MustParseAddr("10.99.13.178")), "10.99.13.178"},
		{AddrLock(netip.MustParseAddr("fd00:99::1")), "fd00-0099-0000-0000-0000-0000-0000-0001"},
		{AddrLock(netip.MustParseAddr("::ffff:10.99.13.178")), "10.99.13.178"},
		{PortLock(30080), "nodeport-30080"},
	} {
		if got := tt.lock.Name(); got != tt.name {
			t.Errorf("%v is named %q, want %q", tt.lock, got, tt.name)
		}
		if msgs := validation.IsDNS1123Subdomain(tt.name); len(msgs) > 0 {
			t.Errorf("%q is no object name: %v", tt.name, msgs)
		}
		if got, err := ParseName(tt.name); err != nil || got != tt.lock {
			t.Errorf("ParseName(%q) = %v, %v", tt.name, got, err)
		}
	}
}

func TestParseNameRefuses(t *testing.T) {
	for _, name := range []string{"", "web", "nodeport-", "nodeport-0", "nodeport-030080", "nodeport-65536", "nodeport--1",
		"10.99.13", "10.99.013.178", "fd00:99::1", "fd00-99--1", "FD00-0099-0000-0000-0000-0000-0000-0001",
		"0000-0000-0000-0000-0000-ffff-0a63-0db2", "fe80-0000-0000-0000-0000-0000-0000-0001%eth0"} {
		if l, err := ParseName(name); err == nil {
			t.Errorf("ParseName(%q) = %v, want an error", name, l)
		} else if !strings.Contains(err.Error(), name) {
			t.Errorf("the error does not name %q: %v", name, err)
		}
	}
}

func FuzzParseName(f *testing.F) {
	for _, s := range []string{"10.99.13.178", "fd00-0099-0000-0000-0000-0000-0000-0001", "nodeport-30080", "1-2", "nodeport-+1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if l, err := ParseName(name); err == nil && l.Name() != name {
			t.Fatalf("%q parses to %v, whose name is %q", name, l, l.Name())
		}
	})
}
