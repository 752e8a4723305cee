package nftables

import (
	"math/bits"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
)

// tries is how often a chain draws a slot before it takes slot 0. At least 3/8 of the slots are filled, so all tries miss in at
// most (5/8)^24, one of 80 000 connections: what slot 0 gets too much is below any measurable share.
const tries = 24

// masquerade says which of a frontend's connections get the node's address as their source.
type masquerade uint8

const (
	_ masquerade = iota // nobody: the zero value
	// masqueradeAll is for external traffic, whose answers must come back through this node.
	masqueradeAll
	// masqueradeNode is for external traffic that keeps the client's address: only this node's own traffic is masqueraded,
	// because the address it was sent from may be one that only exists here.
	masqueradeNode
	// masqueradeOffCluster is for service IPs: what comes from outside the cluster's pods.
	masqueradeOffCluster
)

var masqueradeSuffix = [...]string{"", "-masq", "-nodemasq", "-offmasq"}

// balancer is a chain that chooses an endpoint: all that its rules depend on, and its name says it all. Frontends with the same
// balancer share the chain.
type balancer struct {
	door  door
	shard int
	// hash takes the slot from a hash of the client's address rather than a random number.
	hash bool
	// size is the number of slots to draw from, a power of two.
	size int
	masq masquerade
	// pin makes clients keep their endpoint, with the help of chains of another kind.
	pin  pin
	kind kind
}

func (b balancer) name() string {
	algorithm := "random"
	if b.hash {
		algorithm = "hash"
	}
	suffix := kindSuffix[b.kind]
	if b.pin != 0 {
		suffix = pinSuffix
	}
	return shardName(b.door, b.shard) + suffix + "-" + algorithm + "-" + strconv.Itoa(b.size) + masqueradeSuffix[b.masq] + b.pin.suffix()
}

func parseBalancer(name string) (b balancer, ok bool) {
	whole := name
	name, b.pin = cutPin(name)
	for m, suffix := range masqueradeSuffix {
		if base, found := strings.CutSuffix(name, suffix); found && suffix != "" {
			name, b.masq = base, masquerade(m)
			break
		}
	}
	name, size, ok := cutLast(name, "-")
	if !ok {
		return b, false
	}
	n, err := strconv.Atoi(size)
	if err != nil || n < 1 || bits.OnesCount(uint(n)) != 1 {
		return b, false
	}
	b.size = n
	name, algorithm, ok := cutLast(name, "-")
	if !ok || (algorithm != "random" && algorithm != "hash") {
		return b, false
	}
	b.hash = algorithm == "hash"
	for k := drawing; int(k) < len(kindSuffix); k++ {
		if base, found := strings.CutSuffix(name, kindSuffix[k]); found {
			name, b.kind = base, k
			break
		}
	}
	name = strings.TrimSuffix(name, pinSuffix)
	b.door, b.shard, ok = parseShard(name)
	return b, ok && b.name() == whole && (b.kind == balancing || b.pin == 0)
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// rules are rejection sampling: draw a slot, translate if it holds an endpoint; the lookup of a hole ends the rule, and the next
// one draws again. So the choice is exactly uniform whatever slots are filled, and no rule changes when an endpoint does.
func (b balancer) rules(f *family) []*nfnl.Rule {
	switch b.kind {
	case drawing:
		return b.drawRules(f)
	case translating:
		return []*nfnl.Rule{b.translatePinned(f)}
	}
	var rules []*nfnl.Rule
	switch b.masq {
	case masqueradeAll:
		rules = append(rules, setMark(nfnl.NewRule()))
	case masqueradeNode:
		rules = append(rules, setMark(local(nfnl.NewRule(), unix.NFTA_FIB_F_SADDR)))
	case masqueradeOffCluster:
		rules = append(rules, jump(nfnl.NewRule(), chainOffCluster))
	}
	if b.pin != 0 {
		return append(rules, b.pinRules(f)...)
	}
	rules = append(rules, b.attempts(f, b.translate)...)
	// Only a packet that the change to another verdict overtook gets here. Untranslated, its connection would be recorded as
	// one to the service address itself and stay lost; discarded, the next packet finds the new verdict.
	return append(rules, nfnl.NewRule().Verdict(nfnl.Verdict{Code: nfnl.Drop}))
}

// attempts are rules that draw a slot and end with what then gives for the key at R0.
func (b balancer) attempts(f *family, then func(*family, *nfnl.Rule) *nfnl.Rule) []*nfnl.Rule {
	var rules []*nfnl.Rule
	if b.size > 1 {
		for try := range uint32(tries) {
			r := nfnl.NewRule()
			slot := f.loadKey(r, b.door)
			if b.hash {
				// The key takes at most seven registers. A seed per try makes the tries independent.
				const source = nfnl.R0 + 8
				r.Payload(source, unix.NFT_PAYLOAD_NETWORK_HEADER, f.saddrOffset, f.addrLen).
					Hash(slot, source, f.addrLen, uint32(b.size), (try+1)*0x9e3779b9)
			} else {
				r.Random(slot, uint32(b.size))
			}
			rules = append(rules, then(f, r))
		}
	}
	// Twice, because a lookup can miss an element that is replaced at that very moment.
	for range 2 {
		r := nfnl.NewRule()
		r.Random(f.loadKey(r, b.door), 1) // nft has no constant in a concatenation; below one there is only slot 0
		rules = append(rules, then(f, r))
	}
	return rules
}

func (b balancer) translate(f *family, r *nfnl.Rule) *nfnl.Rule {
	return r.Map(shardName(b.door, b.shard), nfnl.R0, nfnl.R0).DNAT(f.proto, nfnl.R0, nfnl.R0+f.words())
}

// slotsFor gives how many slots n endpoints need, when there are now that many. It is a power of two that n fills to at least 3/8; it only
// changes when that no longer holds, so that an endpoint that comes and goes does not change a verdict each time.
func slotsFor(n, now int) int {
	if n <= now && 8*n >= 3*now {
		return now
	}
	return 1 << bits.Len(uint(n-1))
}
