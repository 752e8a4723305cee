package configuration

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"

	config "github.com/serviceproxy/serviceproxy-operator/api/config/v1alpha1"
)

// Live is the configuration that is in force in a program, and how it stands to its file.
type Live[C Configuration] struct {
	program Program[C]
	args    []string
	taken   look // what was last taken in, or refused
	newest  look // what was last seen

	mu      sync.Mutex
	running C
	state   state
}

// look is what a look at the file saw.
type look struct{ content, problem string }

// state is how what is in force stands to the file.
type state struct {
	// File is the file's name.
	File string `json:"file,omitempty"`
	// Read is when the file was last taken in.
	Read time.Time `json:"read,omitzero"`
	// Problem says why the file, as it is now, is not in force.
	Problem string `json:"problem,omitempty"`
	// AfterRestart are the fields that the file has changed and that take effect after a restart.
	AfterRestart []string `json:"afterRestart,omitempty"`
}

// Start gives the configuration that a program starts with.
func Start[C Configuration](p Program[C], file string, args []string) (*Live[C], error) {
	content, err := read(file)
	if err != nil {
		return nil, err
	}
	running, err := p.Load(file, content, args)
	if err != nil {
		return nil, err
	}
	seen := look{content: string(content)}
	l := &Live[C]{program: p, args: args, taken: seen, newest: seen, running: running}
	if file != "" {
		l.state = state{File: file, Read: time.Now()}
	}
	return l, nil
}

// Configuration gives what is in force. Only the goroutine that calls Follow may ask, or any before it does.
func (l *Live[C]) Configuration() C { return l.running }

// Follow looks at the file once per period, until ctx ends. It compares the content, because the file of a mounted ConfigMap is a chain of symbolic links of which one in the middle
// changes. If the file has changed and is right, the fields that can be are put in force, and apply is called if there are any. A file that is wrong or gone changes nothing.
func (l *Live[C]) Follow(ctx context.Context, log logr.Logger, period time.Duration, apply func(C)) {
	if l.state.File == "" {
		return
	}
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			l.look(log, apply)
		}
	}
}

// look looks at the file once. It takes the file in when it is as it was the time before, because an editor may be in the middle of writing it, and half a file may be right, too.
func (l *Live[C]) look(log logr.Logger, apply func(C)) {
	var now look
	content, err := read(l.state.File)
	if err != nil {
		now.problem = err.Error()
	} else {
		now.content = string(content)
	}
	settled := now == l.newest
	l.newest = now
	if !settled || now == l.taken {
		return
	}
	l.taken = now
	var wanted C
	if err == nil {
		wanted, err = l.program.Load(l.state.File, content, l.args)
	}
	if err != nil {
		log.Error(err, "The configuration file cannot be used; what was in force stays in force")
		l.mu.Lock()
		defer l.mu.Unlock()
		l.state.Problem = err.Error()
		return
	}
	adopted := l.adopt(log, wanted)
	if len(adopted) > 0 {
		apply(l.running)
	}
}

func (l *Live[C]) adopt(log logr.Logger, wanted C) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	adopted, waiting := config.Adopt(l.running, wanted)
	log.Info("Read the configuration file again", "file", l.state.File, "changed", strings.Join(adopted, ", "))
	if len(waiting) > 0 && !slices.Equal(waiting, l.state.AfterRestart) {
		log.Info("A part of the configuration file takes effect after a restart", "fields", strings.Join(waiting, ", "))
	}
	l.state.Read, l.state.Problem, l.state.AfterRestart = time.Now(), "", waiting
	return adopted
}

// Collectors tell in metrics how what is in force stands to the file. Their names begin with prefix.
func (l *Live[C]) Collectors(prefix string) []prometheus.Collector {
	if l.state.File == "" {
		return nil
	}
	gauge := func(name, help string, of func(state) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: prefix + name, Help: help}, func() float64 {
			l.mu.Lock()
			defer l.mu.Unlock()
			return of(l.state)
		})
	}
	return []prometheus.Collector{
		gauge("config_last_reload_successful", "1 if the configuration file, as it is now, is right; 0 if it is wrong or gone, so that what was in force before stays.", func(s state) float64 {
			if s.Problem != "" {
				return 0
			}
			return 1
		}),
		gauge("config_last_reload_success_timestamp_seconds", "When the configuration file was last taken in.", func(s state) float64 {
			return float64(s.Read.UnixNano()) / 1e9
		}),
		gauge("config_fields_after_restart", "Fields of the configuration file that have changed and take effect after a restart.", func(s state) float64 {
			return float64(len(s.AfterRestart))
		}),
	}
}
