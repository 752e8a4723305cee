package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/go-logr/logr"
)

// Anchor keeps connections open that modes have translated whose rules are gone. All modes that translate in the kernel share one.
type Anchor struct {
	// Release removes it unless a connection is still open that may need it, and says whether it is gone.
	Release func(context.Context) (gone bool, err error)
	// Remove removes it at once.
	Remove func(context.Context) error
}

const (
	// releaseEvery is how often the anchor is tried once no mode needs it any more.
	releaseEvery = 30 * time.Second
	// drainTimeout is how long it then waits for the last connection: as long as connection tracking keeps an established one that is silent.
	drainTimeout = 24 * time.Hour
)

// anchorage lets go of the anchor when nothing needs it. The zero value does not know whether there is one.
type anchorage struct {
	gone      bool
	idleSince time.Time
	tryAt     time.Time
}

// tend is called in every pass, with whether a mode needs the anchor or might.
func (a *anchorage) tend(ctx context.Context, log logr.Logger, anchor *Anchor, needed bool) {
	now := time.Now()
	switch {
	case needed:
		*a = anchorage{}
		return
	case a.gone || now.Before(a.tryAt):
		return
	case a.idleSince.IsZero():
		a.idleSince = now
	}
	a.tryAt = now.Add(releaseEvery)
	gone, err := anchor.Release(ctx)
	if late := now.Sub(a.idleSince) >= drainTimeout; late && !gone && err == nil {
		log.Info("Connections that no Service forwards any more end", "afterWaiting", drainTimeout)
		err = anchor.Remove(ctx)
		gone = err == nil
	}
	if err != nil && ctx.Err() == nil {
		log.Error(err, "Could not remove what keeps translated connections open", "retryIn", releaseEvery)
	}
	a.gone = gone && err == nil
}

// anchor gives the anchor that the modes of this node share, nil if none has one.
func (l *loop) anchor() *Anchor {
	for _, d := range l.planes {
		if d.Anchor != nil {
			return d.Anchor
		}
	}
	return nil
}

// tendAnchor lets go of the anchor once no mode has rules that could still translate.
func (l *loop) tendAnchor(ctx context.Context) {
	anchor := l.anchor()
	if anchor == nil {
		return
	}
	needed := false
	for _, d := range l.planes {
		needed = needed || d.backend != nil || d.available() && !d.cleaned
	}
	l.anchorage.tend(ctx, l.log, anchor, needed)
}

// removeAnchor removes the anchor of a table of modes.
func removeAnchor(ctx context.Context, table []Mode) error {
	for _, m := range table {
		if m.Anchor != nil {
			if err := m.Anchor.Remove(ctx); err != nil {
				return fmt.Errorf("remove what keeps translated connections open: %w", err)
			}
			return nil
		}
	}
	return nil
}
