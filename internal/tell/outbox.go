package tell

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/notify"
	"github.com/egressbpf/egressbpf/internal/policy"
)

const (
	// collect is how long a message about first refusals waits for others.
	collect = 5 * time.Second
	// digest is how long after the refusals that it tells of a digest goes out.
	digest = time.Hour
	// maxFirst is how many messages about first refusals a target gets within period.
	maxFirst = 6
	period   = time.Hour
	// backoff is how long after a failure a target is tried again. It doubles up to maxBackoff.
	backoff, maxBackoff = time.Minute, time.Hour
	// maxPending is of how many containers and reasons a target is told. Others are counted
	// together.
	maxPending = 2000
)

// news is what a target is to be told about a container and a reason.
type news struct {
	container events.Container
	reason    string
	example   *events.Record // the latest that an event told of; nil if none did
	count     uint64
	first     bool // the target was told nothing of it
}

// outbox tells one target.
type outbox struct {
	Options
	target notify.Target
	name   string // for the log
	stop   context.CancelFunc
	wake   chan struct{}

	mu      sync.Mutex
	pending map[key]*news
	// others counts refusals for which pending had no room.
	others uint64
	mode   policy.Mode // of the latest refusal
	// since is when the first that is pending was added; fresh is the same of those with
	// first set, and zero if there is none.
	since, fresh time.Time

	// What follows belongs to run.

	sent     []time.Time // the messages about first refusals within period
	failures int         // since the last success
	retry    time.Time   // not before
}

func newOutbox(o Options, target notify.Target, number int) *outbox {
	return &outbox{
		Options: o, target: target, name: fmt.Sprintf("%d: %v", number, target),
		wake: make(chan struct{}, 1), pending: map[key]*news{},
	}
}

// add adds to what the target is to be told.
func (o *outbox) add(k key, n news, mode policy.Mode) {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	o.mode = mode
	if o.since.IsZero() {
		o.since = now
	}
	n.reason = k.reason
	p := o.pending[k]
	switch {
	case p != nil:
		n.count += p.count
		n.first = n.first || p.first
		*p = n
	case len(o.pending) < maxPending:
		o.pending[k] = &n
	default:
		o.others += n.count
		n.first = false
	}
	if n.first && o.fresh.IsZero() {
		o.fresh = now
	}
	signal(o.wake)
}

// run tells the target until ctx ends.
func (o *outbox) run(ctx context.Context) {
	for {
		var timer <-chan time.Time
		if at := o.next(); !at.IsZero() {
			timer = time.After(time.Until(at))
		}
		select {
		case <-ctx.Done():
			if n := o.untold(); n > 0 {
				o.Log.Info("a notification target was not told of the latest refusals", "target", o.name, "count", n)
			}
			return
		case <-o.wake:
		case <-timer:
			o.tell(ctx)
		}
	}
}

// next returns when the next message is due; zero if there is none.
func (o *outbox) next() time.Time {
	o.mu.Lock()
	since, fresh := o.since, o.fresh
	o.mu.Unlock()
	if since.IsZero() {
		return time.Time{}
	}
	at := since.Add(digest)
	if !fresh.IsZero() {
		first := fresh.Add(collect)
		if len(o.sent) == maxFirst {
			first = later(first, o.sent[0].Add(period))
		}
		if first.Before(at) {
			at = first
		}
	}
	return later(at, o.retry)
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// tell sends what is due.
func (o *outbox) tell(ctx context.Context) {
	now := time.Now()
	o.mu.Lock()
	since, others, mode := o.since, o.others, o.mode
	all := !now.Before(since.Add(digest))
	var told []news
	keys := map[key]uint64{}
	for k, n := range o.pending {
		if all || n.first {
			told = append(told, *n)
			keys[k] = n.count
		}
	}
	o.mu.Unlock()
	slices.SortFunc(told, func(a, b news) int {
		return cmp.Or(cmp.Compare(b.count, a.count), strings.Compare(a.container.Name, b.container.Name),
			strings.Compare(keyOf(a.container), keyOf(b.container)), strings.Compare(a.reason, b.reason))
	})
	var m notify.Message
	if all {
		m = digestOf(o.Node, mode, since, told, others)
	} else {
		m = firstOf(o.Node, mode, told)
	}
	if err := o.Send(ctx, o.target, m); err != nil {
		if ctx.Err() != nil {
			return
		}
		wait := backoff << min(o.failures, 10)
		wait = min(wait, maxBackoff)
		o.failures++
		o.retry = time.Now().Add(wait)
		o.Log.Warn("a notification target cannot be told of refusals", "target", o.name, "err", err, "again", wait)
		return
	}
	if o.failures > 0 {
		o.Log.Info("a notification target is told of refusals again", "target", o.name)
	}
	o.failures, o.retry = 0, time.Time{}
	if !all {
		o.sent = append(slices.DeleteFunc(o.sent, func(at time.Time) bool { return now.Sub(at) >= period }), now)
	}
	o.done(keys, all, others)
}

// done removes what the target was told.
func (o *outbox) done(told map[key]uint64, all bool, others uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for k, count := range told {
		n := o.pending[k]
		n.count, n.first = n.count-count, false
		if n.count == 0 {
			delete(o.pending, k)
		}
	}
	if all {
		o.others -= others
		o.since = time.Now()
	}
	o.fresh = time.Time{}
	for _, n := range o.pending {
		if n.first {
			o.fresh = time.Now()
		}
	}
	if len(o.pending) == 0 && o.others == 0 {
		o.since = time.Time{}
	}
}

// untold returns how many refusals the target was not told of.
func (o *outbox) untold() (count uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, n := range o.pending {
		count += n.count
	}
	return count + o.others
}
