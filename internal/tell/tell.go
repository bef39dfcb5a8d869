// Package tell tells of refusals by itself: in the log, and to the targets of notifications.
//
// How much was refused comes from the counters, which are compared at intervals, so that it is
// exact and complete. Events say what was refused to whom, and that it is time to compare.
package tell

import (
	"cmp"
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/journal"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/notify"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
)

// MessageID is the MESSAGE_ID of lines in the journal that tell of refusals.
const MessageID = "a7ec4642b6db4cf5b588d8f09dfa05a7"

const (
	// every is how often the counters are compared without an event, and soon how long after
	// an event about a container of which nothing was told. Others may follow.
	every = 15 * time.Second
	soon  = 200 * time.Millisecond
	// apart is how long it takes at least from one comparison to the next, and share the part
	// of the time that comparisons may take.
	apart = time.Second
	share = 20
	// again is how long after a line the next one tells of the same container and reason, and
	// for how long lines are counted. maxLines is how many there may be in that time.
	again    = time.Minute
	maxLines = 60
	// quiet is how long after its last refusal a container is forgotten: the next one is told
	// at once.
	quiet = time.Hour
	// maxKnown is for how many containers and reasons that is remembered, and maxSeen for how
	// many what events said is kept until the next comparison.
	maxKnown = 1 << 16
	maxSeen  = 10_000
)

// Options are what a Teller works with.
type Options struct {
	// Tally reads the counters. Its error wraps loader.ErrNotAttached while there are none.
	Tally func() (*stats.Tally, error)
	// Describe returns what is known of the container whose cgroup has an id.
	Describe func(cgroup uint64) events.Container
	Log      *slog.Logger
	// Node is the name of this host.
	Node string
	// Send tells a target.
	Send func(context.Context, notify.Target, notify.Message) error
}

// Teller tells of refusals.
type Teller struct {
	Options
	ledger ledger
	mode   policy.Mode
	failed bool // the counters could not be read the last time
	// who are the containers of the ledger to which something was refused lately.
	who   map[uint64]events.Container
	known map[key]*entry
	seen  map[sight]*sighting
	// lines is how many were written since window, and left what they have left out.
	window time.Time
	lines  int
	left   leftOut

	mu      sync.Mutex
	wanted  []notify.Target
	changed chan struct{}
	boxes   []*outbox
}

// key is a container and a reason. The container is empty if it is not known.
type key struct{ container, reason string }

// entry is what is remembered of a key.
type entry struct {
	container events.Container
	example   *events.Record // the latest that an event told of; nil if none did
	untold    uint64         // how many refusals no line has told of
	line      time.Time      // when the last line was; zero if there was none
	last      time.Time      // when the last refusal was noticed
}

// sight is what events are about, and sighting what they said since the last comparison.
type sight struct {
	cgroup uint64
	reason string
}

type sighting struct {
	record events.Record
	count  uint64
}

// leftOut is what lines have left out.
type leftOut struct {
	count      uint64
	containers map[string]bool
}

// New returns a Teller.
func New(o Options) *Teller {
	return &Teller{
		Options: o, who: map[uint64]events.Container{}, known: map[key]*entry{}, seen: map[sight]*sighting{},
		left: leftOut{containers: map[string]bool{}}, changed: make(chan struct{}, 1),
	}
}

// SetTargets says whom to notify from now on. It may be called at any time.
func (t *Teller) SetTargets(targets []notify.Target) {
	t.mu.Lock()
	t.wanted = targets
	t.mu.Unlock()
	signal(t.changed)
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Run tells of what is refused from now on, until ctx ends. What was refused before is not
// told. source is nil if there are no events: then all is told, but later and without saying
// what was refused.
func (t *Teller) Run(ctx context.Context, source events.Source) {
	var sending sync.WaitGroup
	defer sending.Wait()
	records := t.follow(ctx, source)
	t.look()
	t.arrange(ctx, &sending)
	tick := time.NewTicker(every)
	defer tick.Stop()
	next := time.Now().Add(apart)
	var due <-chan time.Time
	compare := func() {
		began := time.Now()
		t.look()
		due, next = nil, time.Now().Add(max(apart, share*time.Since(began)))
	}
	for {
		select {
		case <-ctx.Done():
			t.look()
			t.log(true)
			return
		case r, ok := <-records:
			if !ok {
				records = nil
			} else if t.take(r) && due == nil {
				due = time.After(max(soon, time.Until(next)))
			}
		case <-due:
			compare()
		case <-tick.C:
			compare()
		case <-t.changed:
			t.arrange(ctx, &sending)
		}
	}
}

// follow returns a channel of the source's records.
func (t *Teller) follow(ctx context.Context, source events.Source) <-chan events.Record {
	if source == nil {
		return nil
	}
	records := make(chan events.Record, 256)
	go func() {
		defer close(records)
		for {
			r, err := source.Next(ctx)
			if err != nil {
				if ctx.Err() == nil && !errors.Is(err, io.EOF) {
					t.Log.Warn("there are no events: refusals are told later, and without their destinations", "err", err)
				}
				return
			}
			select {
			case records <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	return records
}

// take takes in an event, and says whether it is the first about its container and reason.
func (t *Teller) take(r events.Record) bool {
	if r.Type != events.Refusal {
		return false
	}
	at, container := sight{reason: r.Reason}, ""
	if r.Container != nil {
		at.cgroup, container = r.Container.CgroupID, keyOf(*r.Container)
	}
	s := t.seen[at]
	if s == nil {
		if len(t.seen) == maxSeen {
			return false
		}
		s = &sighting{}
		t.seen[at] = s
	}
	s.record = r
	s.count++
	return t.known[key{container, r.Reason}] == nil
}

// keyOf returns what tells a container from others, also after its restart.
func keyOf(c events.Container) string {
	const id = 64
	if len(c.ID) == id {
		return c.ID
	}
	return cmp.Or(c.Cgroup, c.ID)
}

// look compares the counters, and tells of what has changed.
func (t *Teller) look() {
	tally, err := t.tally()
	if err != nil {
		if !t.failed {
			t.Log.Warn("cannot read the counters: refusals are not told until that works", "err", err)
		}
		t.failed = true
		return
	}
	t.failed, t.mode = false, tally.Mode
	now := time.Now()
	of, rest := t.ledger.changes(tally)
	for at, s := range t.seen {
		if at.cgroup != 0 && t.who[at.cgroup].Name == "" {
			t.who[at.cgroup] = *s.record.Container
		}
	}
	for cgroup, change := range of {
		t.add(now, cgroup, t.container(cgroup), change)
	}
	for at, s := range t.seen {
		i := slices.Index(stats.TallyReasons[:], at.reason)
		if _, there := tally.Containers[at.cgroup]; there || at.cgroup == 0 || i < 0 || rest[i] == 0 {
			continue
		}
		// The container is gone, and its counters with it.
		var change stats.Refused
		change[i] = min(rest[i], s.count)
		rest[i] -= change[i]
		t.add(now, at.cgroup, *s.record.Container, change)
	}
	t.add(now, 0, events.Container{}, rest)
	clear(t.seen)
	t.log(false)
	t.forget(now, tally)
}

// tally reads the counters. The first time, it takes them as told.
func (t *Teller) tally() (*stats.Tally, error) {
	read := func() (*stats.Tally, error) {
		tally, err := t.Tally()
		if errors.Is(err, loader.ErrNotAttached) {
			return &stats.Tally{}, nil
		}
		return tally, err
	}
	tally, err := read()
	for range 10 {
		if err != nil || t.ledger.begun {
			break
		}
		before := tally
		if tally, err = read(); err != nil {
			break
		}
		// Nothing was refused while the first tally was read, so that its total goes with
		// its containers.
		if before.Total == tally.Total {
			t.ledger.begin(before)
		}
	}
	if err == nil && !t.ledger.begun {
		t.ledger.begin(tally)
	}
	return tally, err
}

// container returns the container whose cgroup has an id.
func (t *Teller) container(cgroup uint64) events.Container {
	c, ok := t.who[cgroup]
	if !ok || c.Name == "" { // the engine may know it by now
		c = t.Describe(cgroup)
		t.who[cgroup] = c
	}
	return c
}

// add notes what was refused to a container. cgroup is 0 if the container is not known.
func (t *Teller) add(now time.Time, cgroup uint64, c events.Container, change stats.Refused) {
	for i, n := range change {
		if n == 0 {
			continue
		}
		reason := stats.TallyReasons[i]
		k := key{keyOf(c), reason}
		e, known := t.known[k]
		if !known {
			e = &entry{}
			if len(t.known) < maxKnown {
				t.known[k] = e
			} else {
				t.leave(k, n)
			}
		}
		e.container, e.last = c, now
		e.untold += n
		if s := t.seen[sight{cgroup, reason}]; s != nil {
			e.example = &s.record
		}
		for _, box := range t.boxes {
			box.add(k, news{container: c, example: e.example, count: n, first: !known}, t.mode)
		}
	}
}

// leave leaves refusals to the line that sums up the rest.
func (t *Teller) leave(k key, n uint64) {
	t.left.count += n
	t.left.containers[k.container] = true
}

// log writes the lines that are due; all if the service ends.
func (t *Teller) log(ends bool) {
	now := time.Now()
	if ends || now.Sub(t.window) >= again {
		t.rest()
		t.window, t.lines = now, 0
	}
	var due []key
	for k, e := range t.known {
		if e.untold > 0 && (ends || now.Sub(e.line) >= again) {
			due = append(due, k)
		}
	}
	slices.SortFunc(due, func(a, b key) int {
		x, y := t.known[a], t.known[b]
		return cmp.Or(x.line.Compare(y.line), cmp.Compare(y.untold, x.untold), strings.Compare(a.container, b.container), strings.Compare(a.reason, b.reason))
	})
	for _, k := range due {
		e := t.known[k]
		if t.lines < maxLines {
			t.line(k, e)
			t.lines++
		} else {
			t.leave(k, e.untold)
		}
		e.untold, e.line = 0, now
	}
	if ends {
		t.rest()
	}
}

// line writes a line about a container and a reason.
func (t *Teller) line(k key, e *entry) {
	message, attrs := verb(t.mode), []any{journal.MessageID, MessageID}
	if k.container != "" {
		attrs = append(attrs, "container_id", e.container.ID, "container_name", e.container.Name)
	} else {
		message += "; the container is gone or not known"
	}
	attrs = append(attrs, "reason", k.reason)
	if e.example != nil {
		if to := destination(*e.example); to != "" {
			attrs = append(attrs, "destination", to)
		}
		if e.example.Process != nil {
			attrs = append(attrs, "process", e.example.Process.Comm)
		}
		if e.example.Rule != "" {
			attrs = append(attrs, "rule", e.example.Rule)
		}
	}
	t.Log.Warn(message, append(attrs, "count", e.untold)...)
}

// rest writes the line about what others have left out.
func (t *Teller) rest() {
	if t.left.count > 0 {
		t.Log.Warn(verb(t.mode)+" to more containers than are told of singly: see egressbpf stats",
			journal.MessageID, MessageID, "containers", len(t.left.containers), "count", t.left.count)
	}
	t.left.count = 0
	clear(t.left.containers)
}

// forget forgets what has been quiet for long.
func (t *Teller) forget(now time.Time, tally *stats.Tally) {
	for k, e := range t.known {
		if e.untold == 0 && now.Sub(e.last) >= quiet {
			delete(t.known, k)
		}
	}
	for cgroup := range t.who {
		if _, there := tally.Containers[cgroup]; !there {
			delete(t.who, cgroup)
		}
	}
}

// arrange starts to tell new targets, and stops to tell those that are not wanted any more.
func (t *Teller) arrange(ctx context.Context, sending *sync.WaitGroup) {
	t.mu.Lock()
	wanted := t.wanted
	t.mu.Unlock()
	var boxes []*outbox
	for i, target := range wanted {
		at := slices.IndexFunc(t.boxes, func(b *outbox) bool { return b.target == target })
		if at >= 0 {
			boxes = append(boxes, t.boxes[at])
			t.boxes = slices.Delete(t.boxes, at, at+1)
			continue
		}
		box := newOutbox(t.Options, target, i+1)
		boxes = append(boxes, box)
		own, cancel := context.WithCancel(ctx)
		box.stop = cancel
		sending.Go(func() {
			defer cancel()
			box.run(own)
		})
	}
	for _, box := range t.boxes {
		box.stop()
	}
	t.boxes = boxes
}
