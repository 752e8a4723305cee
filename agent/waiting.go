package agent

import (
	"context"
	"time"

	"github.com/go-logr/logr"
)

// waitingPeriod is how often the log says what the agent waits for.
const waitingPeriod = 15 * time.Second

// logWaiting says every period what the agent still waits for, until it has all or ctx ends. It is needed because client-go retries a refused
// connection without a word.
func logWaiting(ctx context.Context, log logr.Logger, period time.Duration, server, nodeName string, lacks func() string) {
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		what := lacks()
		if what == "" {
			return
		}
		log.Info("Waiting; what the kernel holds stays in force. Is the API server reachable from this node, may the agent list and watch, "+
			"and does a Node of this name exist?", "for", what, "server", server, "node", nodeName)
	}
}
