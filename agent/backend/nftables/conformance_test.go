package nftables

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/backendtest"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// TestConformance holds this backend to the table that every backend is held to.
func TestConformance(t *testing.T) {
	script := func(name, script string) backendtest.Breakage {
		return backendtest.Breakage{Name: name, Do: func(node *netns.NS) error {
			_, err := node.Run("nft", script)
			return err
		}}
	}
	backendtest.Run(t, backendtest.Backend(func() (backend.Backend, error) { return New() },
		script("an element is taken away", "delete element ip serviceproxy services { 10.99.0.1 . tcp . 80 }"),
		script("endpoints are taken away", "flush map ip serviceproxy services.0; flush map ip6 serviceproxy services.0"),
		script("a chain is emptied", "flush chain ip serviceproxy services"),
		script("a rule of somebody's is in front of ours", "insert rule ip6 serviceproxy services drop"),
		script("the table is taken away", "delete table ip serviceproxy; delete table ip6 serviceproxy"),
	))
}

// TestForgetsHistory: what TestApply finds after a first Apply holds after all others. Each Apply is of several transactions.
func TestForgetsHistory(t *testing.T) {
	backendtest.ForgetsHistory(t, backendtest.Kernel{Snapshot: snapshot, Open: func() (backend.Backend, error) {
		b, err := New()
		if err == nil {
			b.partSize = 300
		}
		return b, err
	}})
}

// snapshot tells what the kernel forwards, whatever shards and slots it is in.
func snapshot(ns *netns.NS, g forwarding.Ground) (text string, err error) {
	err = ns.Do(func() error {
		b, err := New()
		if err != nil {
			return err
		}
		defer b.Close()
		content := kernelContent(panics{}, b, g)
		var lines []string
		for _, what := range slices.Sorted(maps.Keys(content)) {
			lines = append(lines, fmt.Sprintf("%s: %+v", what, content[what]))
		}
		text = strings.Join(lines, "\n")
		return nil
	})
	return text, err
}

// panics ends what rapid checks, which reports it.
type panics struct{}

func (panics) Fatal(args ...any)                 { panic(fmt.Sprint(args...)) }
func (panics) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }
