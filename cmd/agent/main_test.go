package main

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// Every error on a flag names the flag, the value and what would be valid.
func TestBadFlags(t *testing.T) {
	t.Setenv("NODE_NAME", "")
	t.Setenv("KUBECONFIG", "")
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	kubeconfig := t.TempDir() + "/kubeconfig"
	for _, tc := range []struct {
		args []string
		want []string
	}{
		{nil, []string{"--node-name", "NODE_NAME"}},
		{[]string{"--cluster-cidr", "10.244.0.0"}, []string{"--cluster-cidr", `"10.244.0.0"`, "10.244.0.0/16"}},
		{[]string{"--cluster-cidr", "10.244.1.0/16"}, []string{"--cluster-cidr", "did you mean 10.244.0.0/16"}},
		{[]string{"--log-level", "loud"}, []string{"--log-level", `"loud"`, "info or debug"}},
		{[]string{"start"}, []string{`"start"`}},
		{[]string{"--no-such-flag"}, []string{"no-such-flag"}},
		{[]string{"--node-name", "a"}, []string{"--kubeconfig"}},
		{[]string{"--node-name", "a", "--kubeconfig", kubeconfig}, []string{"--kubeconfig", kubeconfig}},
	} {
		err := run(context.Background(), tc.args, &bytes.Buffer{}, &bytes.Buffer{})
		if err == nil {
			t.Errorf("%q: no error", tc.args)
			continue
		}
		for _, want := range tc.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q: %q does not name %q", tc.args, err, want)
			}
		}
	}
	if _, err := listen("--health-bind-address", busy.Addr().String()); err == nil ||
		!strings.Contains(err.Error(), "--health-bind-address") || !strings.Contains(err.Error(), busy.Addr().String()) || !strings.Contains(err.Error(), "free") {
		t.Errorf("a port in use: %v", err)
	}
	if ln, err := listen("--metrics-bind-address", ""); ln != nil || err != nil {
		t.Errorf("no address: %v, %v", ln, err)
	}
}

func TestClusterCIDRs(t *testing.T) {
	got, err := parseCIDRs("10.244.0.0/16, fd00:244::/56")
	want := []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/56")}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestVersion(t *testing.T) {
	var out bytes.Buffer
	if err := run(context.Background(), []string{"--version"}, &out, &bytes.Buffer{}); err != nil || strings.TrimSpace(out.String()) == "" {
		t.Errorf("printed %q, %v", out.String(), err)
	}
}
