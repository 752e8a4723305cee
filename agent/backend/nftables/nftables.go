// Package nftables forwards services with nf_tables: a flat rule set that is static but for maps, changed over netlink element by
// element. README.md says why it looks as it does.
package nftables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/serviceproxy/serviceproxy-operator/agent/backend"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/anchor"
	"github.com/serviceproxy/serviceproxy-operator/agent/backend/internal/nfnl"
	"github.com/serviceproxy/serviceproxy-operator/agent/forwarding"
)

const (
	// partSize bounds a transaction: each part of a larger load leaves every service either as it was or as it is to be.
	partSize = 4 << 20
	// bulkSize is from where on notifications are turned off meanwhile.
	bulkSize = 256 << 10
	// guardedReads is how often a read-back starts again because somebody changed any table meanwhile. After that what was read
	// is used unguarded, and drift is signalled so that it is looked at again.
	guardedReads = 4
)

// Backend implements backend.Backend. Make one with New.
type Backend struct {
	conn    *nfnl.Conn
	watch   *nfnl.Watch
	drifted chan struct{}
	// mirrors are what the kernel holds, one per family; nil if that is not known. They are taken out while a transaction is
	// under way and put back when the kernel has accepted it.
	mirrors  []*mirror
	tx       transaction
	commits  uint32
	partSize int
	counting *counting
}

var _ backend.Backend = (*Backend)(nil)

// New opens nf_tables of the network namespace that the calling thread is in. It changes nothing.
func New() (*Backend, error) {
	conn, err := nfnl.Dial()
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	b := &Backend{conn: conn, drifted: make(chan struct{}, 1), partSize: partSize}
	if b.counting, err = newCounting(); err != nil {
		return nil, errors.Join(fmt.Errorf("nftables: %w", err), conn.Close())
	}
	b.watch, err = nfnl.NewWatch(conn, b.signal, TableName, anchor.TableName)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("nftables: %w", err), b.counting.close(), conn.Close())
	}
	return b, nil
}

// signal never blocks: one pending signal stands for any number.
func (b *Backend) signal() {
	select {
	case b.drifted <- struct{}{}:
	default:
	}
}

// Drifted implements backend.Backend.
func (b *Backend) Drifted() <-chan struct{} { return b.drifted }

// Close implements backend.Backend.
func (b *Backend) Close() error {
	return errors.Join(b.watch.Close(), b.counting.close(), b.conn.Close())
}

// Apply implements backend.Backend.
func (b *Backend) Apply(ctx context.Context, prev *forwarding.State, next forwarding.State) error {
	if prev == nil || b.mirrors == nil || !prev.Ground().Equal(next.Ground()) {
		return b.rebuild(ctx, next)
	}
	mirrors := b.mirrors
	b.mirrors = nil
	b.tx.reset()
	job := job{Backend: b, mirrors: mirrors, next: next}
	for c := range forwarding.Changes(*prev, next) {
		job.changes = append(job.changes, c)
	}
	if err := job.run(ctx); err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	b.mirrors = mirrors
	return nil
}

// rebuild reads the kernel back and changes what differs from next.
func (b *Backend) rebuild(ctx context.Context, next forwarding.State) error {
	b.mirrors = nil
	if err := anchor.Ensure(b.conn); err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	job := job{Backend: b, next: next, rebuild: true}
	for s := range next.All() {
		job.changes = append(job.changes, forwarding.Change{Next: s})
	}
	for attempt := range guardedReads + 1 {
		b.tx.reset()
		lenient := attempt == guardedReads
		generation, err := b.read(&job, lenient)
		if lenient {
			generation = 0
		}
		if job.generation = generation; err == nil {
			err = job.run(ctx)
		}
		if errors.Is(err, nfnl.ErrChanged) && !lenient {
			continue
		}
		if err != nil {
			return fmt.Errorf("nftables: %w", err)
		}
		b.mirrors = job.mirrors
		b.counting.retain(b.mirrors, next)
		if lenient {
			b.signal()
		}
		break
	}
	return nil
}

// read fills in the job's mirrors and gives the generation that they are of.
func (b *Backend) read(j *job, lenient bool) (generation uint32, err error) {
	before, err := b.conn.Generation()
	if err != nil {
		return 0, err
	}
	r := reader{b.conn, lenient}
	j.mirrors = nil
	for _, f := range families {
		m, err := r.read(f, j.next.Ground(), &b.tx)
		if err != nil {
			return 0, fmt.Errorf("read back: %w", err)
		}
		j.mirrors = append(j.mirrors, m)
	}
	if !b.tx.dry {
		b.counting.adopt(j.mirrors)
	}
	after, err := b.conn.Generation()
	if err == nil && after != before && !lenient {
		err = nfnl.ErrChanged
	}
	return after, err
}

// Verify implements backend.Backend: drift is what a rebuild would change.
func (b *Backend) Verify(ctx context.Context, want forwarding.State) ([]backend.Drift, error) {
	job := job{Backend: b, next: want, rebuild: true}
	for s := range want.All() {
		job.changes = append(job.changes, forwarding.Change{Next: s})
	}
	defer func() { b.tx = transaction{} }()
	for attempt := range guardedReads + 1 {
		b.tx = transaction{dry: true}
		_, err := b.read(&job, attempt == guardedReads)
		if errors.Is(err, nfnl.ErrChanged) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("nftables: %w", err)
		}
		break
	}
	if err := job.run(ctx); err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	drifts := b.tx.sortedDrifts()
	there, err := anchor.Present(b.conn)
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	if !there {
		drifts = append(drifts, backend.Drift{Object: "inet " + anchor.TableName + " table " + anchor.TableName, Problem: "missing"})
	}
	return drifts, nil
}

// job brings mirrors, and the kernel with them, from one state to another.
type job struct {
	*Backend
	mirrors []*mirror
	changes []forwarding.Change
	next    forwarding.State
	// rebuild says that the mirrors were read back: what no service claims goes away.
	rebuild bool
	// generation, if not 0, is what the rule set must be of for the mirrors to be true.
	generation uint32
	// paused says that notifications are off; pausedAt is the generation and commitsAt the number of own transactions at that time.
	paused              bool
	pausedAt, commitsAt uint32
}

func (j *job) run(ctx context.Context) (err error) {
	defer func() {
		err = errors.Join(err, j.resume())
		if !j.tx.dry {
			j.tx.shrink()
		}
	}()
	for _, c := range j.changes {
		if c.Next != nil {
			j.each(func(m *mirror) { m.claim(c.Next) })
		}
	}
	if j.rebuild {
		for _, c := range j.changes {
			j.each(func(m *mirror) { m.adoptNumbers(c.Next) })
		}
	}
	// Everything is filled before anything is let go of, so that what moves from one service to another is never missing.
	for _, c := range j.changes {
		if c.Next == nil {
			continue
		}
		j.each(func(m *mirror) { m.fill(c.Prev, c.Next) })
		if err := j.commitFull(ctx); err != nil {
			return err
		}
	}
	for _, c := range j.changes {
		if c.Prev == nil {
			continue
		}
		j.each(func(m *mirror) { m.forget(c.Prev, c.Next, j.next) })
		if err := j.commitFull(ctx); err != nil {
			return err
		}
	}
	if err := j.sweep(ctx); err != nil {
		return err
	}
	j.each((*mirror).finish)
	j.each((*mirror).collect)
	return j.commit(ctx)
}

func (j *job) each(f func(*mirror)) {
	for _, m := range j.mirrors {
		f(m)
	}
}

// sweep removes what was read back and nobody claimed.
func (j *job) sweep(ctx context.Context) error {
	if !j.rebuild {
		return nil
	}
	for _, m := range j.mirrors {
		for _, key := range m.unclaimed() {
			m.remove(key, m.fronts[key])
			if err := j.commitFull(ctx); err != nil {
				return err
			}
		}
		m.sweep()
	}
	return nil
}

// commitFull commits what there is if it is enough for a transaction.
func (j *job) commitFull(ctx context.Context) error {
	if j.tx.size() < j.partSize || j.tx.whole {
		return nil
	}
	j.each((*mirror).finish)
	return j.commit(ctx)
}

func (j *job) commit(ctx context.Context) error {
	tx := &j.tx
	if tx.dry || tx.size() == 0 {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if tx.size() > bulkSize && !j.paused {
		if err := j.pause(); err != nil {
			return err
		}
	}
	if tx.whole {
		tx.new.Append(&tx.now)
		tx.new.Append(&tx.late)
		tx.now.Reset()
		tx.late.Reset()
	}
	for _, batch := range []*nfnl.Batch{&tx.new, &tx.now, &tx.late} {
		if batch.Empty() {
			continue
		}
		if err := j.conn.Commit(batch, j.generation); err != nil {
			return err
		}
		j.commits++
		if j.generation != 0 {
			j.generation = nfnl.NextGeneration(j.generation)
		}
	}
	tx.reset()
	return nil
}

func (j *job) pause() error {
	generation, err := j.conn.Generation()
	if err != nil {
		return err
	}
	j.pausedAt, j.commitsAt, j.paused = generation, j.commits, true
	return j.watch.Pause()
}

// resume turns notifications on again. If there were other transactions than ours meanwhile, they may have been about our tables.
func (j *job) resume() error {
	if !j.paused {
		return nil
	}
	j.paused = false
	if err := j.watch.Resume(); err != nil {
		return err
	}
	generation, err := j.conn.Generation()
	if err != nil {
		return err
	}
	if generation-j.pausedAt != j.commits-j.commitsAt {
		j.signal()
	}
	return nil
}

// Cleanup removes our tables and nothing else from the network namespace that the calling thread is in. The anchor, which other modes share, stays, so that
// what was translated stays open.
func Cleanup(ctx context.Context) error {
	conn, err := nfnl.Dial()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	var errs []error
	for _, f := range families {
		if err := deleteTable(ctx, conn, f.table()); err != nil {
			errs = append(errs, fmt.Errorf("nftables: %w", err))
		}
	}
	return errors.Join(append(errs, conn.Close())...)
}

// deleteTable deletes a table if it is there. The anchor is there before it goes, whichever version made the table.
func deleteTable(ctx context.Context, conn *nfnl.Conn, t nfnl.Table) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if there, err := conn.HasTable(t); err != nil || !there {
		return err
	}
	if err := anchor.Ensure(conn); err != nil {
		return err
	}
	var batch nfnl.Batch
	batch.DeleteTable(t)
	if err := conn.Commit(&batch, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// Probe tells whether the kernel can do all that the rules need, by letting it check them in a transaction that is not committed.
func Probe(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	conn, err := nfnl.Dial()
	if err != nil {
		return fmt.Errorf("nftables is not available: %w", err)
	}
	var batch nfnl.Batch
	for _, f := range families {
		f.sample(&batch)
	}
	if err := conn.Try(&batch); err != nil {
		return errors.Join(fmt.Errorf("nftables is not available: %w", err), conn.Close())
	}
	return conn.Close()
}

// sample encodes one of everything that the rules consist of, in a table of another name.
func (f *family) sample(batch *nfnl.Batch) {
	t := nfnl.Table{Family: f.proto, Name: TableName + "-probe"}
	anywhere := netip.PrefixFrom(f.loopback.Addr(), 0).Masked()
	var sets []*nfnl.Set
	sets = append(sets, f.pinSet())
	cl := class{1, []netip.Prefix{anywhere}}
	everything := plot{sources: []netip.Prefix{f.loopback}, interfaces: []string{"eth0", "veth*"}, ranges: []netip.Prefix{f.loopback}, dropInvalid: true}
	chains := append(f.staticChains(everything), f.loopbackGuard())
	sets = append(sets, append(f.staticSets(), f.rangeSet())...)
	chains = append(chains, f.nodePortChains([]class{cl})...)
	chains = append(chains, f.tallyChains([]class{cl})...)
	for _, kind := range []tallyKind{tallyTraffic, tallyConnections} {
		sets = append(sets, f.tallySet(tallySet{kind, 0}), f.tallySet(tallySet{kind, cl.id}))
	}
	for _, d := range []door{{}, {class: cl.id}, {class: cl.id, here: true}} {
		if d.class != 0 {
			sets = append(sets, f.doorMap(d))
		}
		draws, pinned := f.pinningMaps(d, 0)
		sets = append(sets, f.endpointMap(d, 0), draws, pinned)
		pinning := balancer{door: d, size: 2, pin: 1}
		for _, b := range append(pinning.helpers(), pinning) {
			chains = append(chains, chain{name: b.name(), rules: b.rules(f)})
		}
		for m := range masqueradeSuffix {
			b := balancer{door: d, size: 2, masq: masquerade(m), hash: m == 0}
			chains = append(chains, chain{name: b.name(), rules: b.rules(f)})
		}
	}
	sets = append(sets, f.fromSet(door{}, 1))
	chains = append(chains, chain{name: fromChain(door{}), rules: f.fromRules(door{}, []int{1})}, chain{name: gate{}.name(), rules: gate{}.rules()})
	batch.AddTable(t)
	for _, s := range sets {
		s.Table = t
		batch.AddSet(s)
	}
	for _, c := range chains {
		batch.AddChain(t, c.name, c.hook)
	}
	for _, c := range chains {
		for _, r := range c.rules {
			batch.AppendRule(t, c.name, r)
		}
	}
}
