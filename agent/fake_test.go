package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
	"github.com/serviceproxy/serviceproxy-operator/api/v1alpha1"
)

// fakeBackend is a backend whose kernel is a map. It trusts prev as a real one does: given a prev that is not what the kernel
// holds, the kernel ends up wrong.
type fakeBackend struct {
	mu     sync.Mutex
	kernel map[forwarding.ServiceKey]*forwarding.Service
	ground forwarding.Ground // of what was applied last
	// fail is how many of the next Apply fail, each after half of its changes.
	fail         int
	applies      int
	full         int // how many of them were told nothing about the kernel
	closed       bool
	drift        chan struct{}
	beforeReturn func()        // runs at the end of every Apply, without the lock
	hang         chan struct{} // if not nil, Apply begins with waiting for it to be closed
}

var errKernel = errors.New("the kernel says no")

func newFake() *fakeBackend {
	return &fakeBackend{kernel: map[forwarding.ServiceKey]*forwarding.Service{}, drift: make(chan struct{}, 1)}
}

func (f *fakeBackend) Apply(_ context.Context, prev *forwarding.State, next forwarding.State) error {
	if f.beforeReturn != nil {
		defer f.beforeReturn()
	}
	if f.hang != nil {
		<-f.hang
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.applies++
	var from forwarding.State
	if prev == nil {
		f.full++
		for _, s := range f.kernel {
			from = from.With(s)
		}
	} else {
		from = *prev
	}
	var changes []forwarding.Change
	for c := range forwarding.Changes(from, next) {
		changes = append(changes, c)
	}
	f.ground = next.Ground()
	failing := f.fail > 0
	if failing {
		f.fail--
		changes = changes[:len(changes)/2]
	}
	for _, c := range changes {
		if c.Next == nil {
			delete(f.kernel, c.Prev.Key)
			continue
		}
		f.kernel[c.Next.Key] = c.Next
	}
	if failing {
		return errKernel
	}
	return nil
}

func (f *fakeBackend) Verify(_ context.Context, want forwarding.State) ([]backend.Drift, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var drifts []backend.Drift
	for s := range want.All() {
		if got := f.kernel[s.Key]; got == nil || !got.Equal(s) {
			drifts = append(drifts, backend.Drift{Object: s.Key.String(), Problem: "missing"})
		}
	}
	for k := range f.kernel {
		if want.Get(k) == nil {
			drifts = append(drifts, backend.Drift{Object: k.String(), Problem: "unexpected"})
		}
	}
	return drifts, nil
}

func (f *fakeBackend) Drifted() <-chan struct{} { return f.drift }

func (f *fakeBackend) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	return nil
}

// flush empties the kernel behind the agent's back, as `nft flush ruleset` does.
func (f *fakeBackend) flush() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.kernel)
	f.signal()
}

func (f *fakeBackend) signal() {
	select {
	case f.drift <- struct{}{}:
	default:
	}
}

// get gives what the kernel holds of the TCP port 80 of a Service in namespace shop, nil if nothing.
func (f *fakeBackend) get(name string) *forwarding.Service {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.kernel[forwarding.ServiceKey{Namespace: "shop", Name: name, Port: 80, Protocol: forwarding.TCP}]
}

// names lists what the kernel holds, sorted.
func (f *fakeBackend) names() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for k := range f.kernel {
		out = append(out, k.Namespace+"/"+k.Name)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// standsOn gives the ground of what was applied last.
func (f *fakeBackend) standsOn() forwarding.Ground {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ground
}

func (f *fakeBackend) len() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.kernel)
}

func (f *fakeBackend) counts() (applies, full int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.applies, f.full
}

func (f *fakeBackend) failNext(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = n
}

// fakeMode is a row of a table of backends on a fake kernel.
type fakeMode struct {
	*fakeBackend
	name v1alpha1.ProxyMode

	mu       sync.Mutex
	missing  error // what the probe says
	unsure   error // why it cannot be told whether the kernel is blank
	made     int
	cleanups int
}

func newFakeMode(name v1alpha1.ProxyMode) *fakeMode {
	return &fakeMode{fakeBackend: newFake(), name: name}
}

func (m *fakeMode) mode() Mode {
	return Mode{
		Name: m.name,
		Probe: func(context.Context) error {
			m.mu.Lock()
			defer m.mu.Unlock()
			return m.missing
		},
		Blank: func(context.Context) (bool, error) { return m.unsure == nil && m.len() == 0, m.unsure },
		New: func() (backend.Backend, error) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.made++
			return m.fakeBackend, nil
		},
		Cleanup: func(context.Context) error {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.cleanups++
			m.fakeBackend.mu.Lock()
			defer m.fakeBackend.mu.Unlock()
			clear(m.kernel)
			return nil
		},
	}
}

func (m *fakeMode) setMissing(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.missing = err
}

func (m *fakeMode) String() string { return fmt.Sprintf("fake %s", m.name) }
