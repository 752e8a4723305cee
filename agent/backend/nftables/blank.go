package nftables

import (
	"context"
	"errors"
	"fmt"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
)

// Blank says whether the network namespace that the calling thread is in has none of our tables, as after a boot. It changes nothing.
func Blank(ctx context.Context) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	conn, err := nfnl.Dial()
	if err != nil {
		return false, fmt.Errorf("nftables: %w", err)
	}
	blank := true
	for _, f := range families {
		_, exists, failed := conn.Chains(f.table())
		if failed != nil && !errors.Is(failed, nfnl.ErrChanged) { // whether the table is there was known before its chains were read
			err = fmt.Errorf("nftables: %w", failed)
		}
		blank = blank && !exists
	}
	return blank && err == nil, errors.Join(err, conn.Close())
}
