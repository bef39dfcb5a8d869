package top

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/stats"
)

// The reasons to refuse, as rows of the details show them.
const (
	blocked = iota
	rateLimited
	noBucket
	malformed
	family
	// onHost are packets that the host dropped, and did not count by reason.
	onHost
	reasons
)

// reasonNames are the reasons of events, but for onHost.
var reasonNames = [reasons]string{
	events.ReasonBlocked, events.ReasonRateLimited, events.ReasonNoBucket, events.ReasonMalformed, events.ReasonFamily, "host",
}

// reasonWidth is how many columns a reason takes up.
const reasonWidth = len(events.ReasonRateLimited)

// refused counts what was refused for one reason: packets that were dropped, calls that failed
// before there was a packet, and packets that got past the filter and were dropped on the host.
type refused struct{ Packets, Calls, Host uint64 }

func (r refused) total() uint64 { return r.Packets + r.Calls + r.Host }

type counts [reasons]refused

func countsOf(all stats.Refusals, families stats.Denied, host stats.Traffic, hostReasons stats.Reasons) counts {
	of := func(b stats.Blocked, host stats.Traffic) refused { return refused{b.Packets, b.Connects, host.Packets} }
	reasoned := hostReasons.Blocked.Packets + hostReasons.RateLimited.Packets + hostReasons.Malformed.Packets
	return counts{
		blocked:     of(all.Blocked, hostReasons.Blocked),
		rateLimited: of(all.RateLimited, hostReasons.RateLimited),
		noBucket:    of(all.NoBucket, stats.Traffic{}),
		malformed:   of(all.Malformed, hostReasons.Malformed),
		family:      {Calls: families.Denied},
		onHost:      {Host: less(host.Packets, reasoned)},
	}
}

// less returns a-b, and 0 if that is negative: counters begin anew after a detach.
func less(a, b uint64) uint64 { return max(a, b) - b }

func (c counts) minus(d counts) counts {
	for i := range c {
		c[i] = refused{less(c[i].Packets, d[i].Packets), less(c[i].Calls, d[i].Calls), less(c[i].Host, d[i].Host)}
	}
	return c
}

func (c counts) plus(d counts) counts {
	for i := range c {
		c[i] = refused{c[i].Packets + d[i].Packets, c[i].Calls + d[i].Calls, c[i].Host + d[i].Host}
	}
	return c
}

func (c counts) total() (n uint64) {
	for _, r := range c {
		n += r.total()
	}
	return n
}

// dominant is the name of the reason for most refusals; empty if there are none.
func (c counts) dominant() string {
	most := 0
	for i := range c {
		if c[i].total() > c[most].total() {
			most = i
		}
	}
	if c[most].total() == 0 {
		return ""
	}
	return reasonNames[most]
}

const (
	// logLength is how many records are kept of a container, and logsLength of all together.
	logLength  = 100
	logsLength = 10_000
)

// others is the key of the row for refusals that belong to no container that is there: the
// container is gone, or the host could not tell which it was. No cgroup has this id.
const others = 0

// row is what is known of a container. Rows that were handed out do not change.
type row struct {
	key      uint64 // the id of the cgroup
	id, name string
	cgroup   string
	smtp     stats.Bucket
	counts   counts
	recent   counts  // since the reading before
	rate     float64 // of all refusals, per second
	total    uint64
	why      string
	last     time.Time // of the last refusal; zero if it is not known
	log      []events.Record
}

// newest returns the last refusal of the log, which can be older than row.last: the map counts
// what no event tells.
func (r *row) newest() *events.Record {
	for i := len(r.log) - 1; i >= 0; i-- {
		if r.log[i].Type == events.Refusal {
			return &r.log[i]
		}
	}
	return nil
}

// summary is what all rows have in common.
type summary struct {
	at         time.Time // zero before the first reading
	mode       string
	enforcing  bool
	containers int
	rate       float64
	total      uint64
	lost       uint64 // events
}

// tally adds up readings and records. What it keeps is bounded by the number of containers.
type tally struct {
	summary
	rows    map[uint64]*row
	seconds float64 // between the last two readings
	counts  counts  // of all containers, those that are gone included
	logs    map[uint64][]events.Record
	byID    map[string]uint64
}

func newTally() *tally {
	return &tally{rows: map[uint64]*row{}, logs: map[uint64][]events.Record{}}
}

// read adds a reading.
func (t *tally) read(r Reading) {
	first, before := t.at.IsZero(), t.rows
	t.seconds = r.Time.Sub(t.at).Seconds() // by the monotonic clock, which stands while the host sleeps
	t.at, t.mode, t.enforcing = r.Time, string(r.Stats.Mode), r.Enforcing
	t.rows, t.byID = make(map[uint64]*row, len(before)), make(map[string]uint64, len(before))

	var present, recent counts
	for _, c := range r.Stats.Containers {
		if c.Cgroup == "" {
			continue // gone, though the kernel keeps its entry for a while
		}
		now := row{key: c.CgroupID, id: c.ID, name: c.Name, cgroup: c.Cgroup, smtp: c.SMTP,
			counts: countsOf(c.Refused, c.Families, c.HostSide, c.HostReasons)}
		t.add(&now, before[now.key], first)
		t.byID[now.id] = now.key
		present, recent = present.plus(now.counts), recent.plus(now.recent)
	}
	t.containers = len(t.rows)

	s := r.Stats.Total
	all := countsOf(s.Refused, s.Families, s.HostSide, s.HostReasons)
	var since counts
	if !first {
		since = all.minus(t.counts)
	}
	t.counts, t.total, t.rate = all, all.total(), t.perSecond(since)

	t.forget()
	rest := row{key: others, counts: all.minus(present), recent: since.minus(recent)}
	if rest.counts.total() > 0 || len(t.logs[others]) > 0 {
		if was := before[others]; was != nil {
			rest.last = was.last
		}
		t.finish(&rest)
	}
}

// add adds the row of a container, and what has changed since the reading before.
func (t *tally) add(now, before *row, first bool) {
	switch {
	case before != nil:
		now.recent, now.last = now.counts.minus(before.counts), before.last
	case !first:
		now.recent = now.counts // a new container
	}
	t.finish(now)
}

func (t *tally) finish(r *row) {
	r.rate, r.total = t.perSecond(r.recent), r.counts.total()
	r.why = cmp.Or(r.recent.dominant(), r.counts.dominant())
	if r.recent.total() > 0 {
		r.last = t.at.Round(0)
	}
	t.rows[r.key] = r
}

func (t *tally) perSecond(c counts) float64 {
	if t.seconds <= 0 {
		return 0
	}
	return float64(c.total()) / t.seconds
}

// forget gives the records of containers that are gone to others. A container may have come
// after the reading was begun.
func (t *tally) forget() {
	for key, log := range t.logs {
		if key == others || t.rows[key] != nil || !log[len(log)-1].Time.Before(t.at) {
			continue
		}
		delete(t.logs, key)
		merged := slices.Concat(t.logs[others], log)
		slices.SortStableFunc(merged, func(a, b events.Record) int { return a.Time.Compare(b.Time) })
		t.logs[others] = newestOf(merged, logLength)
	}
}

// record adds records, the oldest first.
func (t *tally) record(records []events.Record) {
	for _, r := range records {
		switch r.Type {
		case events.Lost:
			t.lost += r.Count
		case events.Refusal, events.Suppressed:
			key := t.keyOf(r.Container)
			t.logs[key] = newestOf(append(t.logs[key], r), logLength)
		}
	}
	kept := 0
	for _, log := range t.logs {
		kept += len(log)
	}
	if kept > logsLength {
		for key, log := range t.logs {
			t.logs[key] = newestOf(log, max(1, logsLength/len(t.logs)))
		}
	}
}

func (t *tally) keyOf(c *events.Container) uint64 {
	if c == nil {
		return others
	}
	key := c.CgroupID
	if key == 0 {
		key = t.byID[c.ID]
	}
	if _, ok := t.logs[key]; !ok && len(t.logs) >= logsLength {
		return others
	}
	return key
}

func newestOf(log []events.Record, n int) []events.Record { return log[max(0, len(log)-n):] }

// snapshot returns the present rows, in no order.
func (t *tally) snapshot() []*row {
	rows := slices.Collect(maps.Values(t.rows))
	for i, r := range rows {
		now := *r
		// A log only grows at its end, so that the rows that have it keep what they have.
		now.log = t.logs[r.key]
		if newest := now.newest(); newest != nil && newest.Time.After(now.last) {
			now.last = newest.Time
		}
		rows[i] = &now
	}
	return rows
}

// matches says whether a filter finds the row: its name or id, or the destination or process of
// one of its last refusals. The filter is in lower case.
func (r *row) matches(filter string) bool {
	if filter == "" {
		return true
	}
	has := func(s string) bool { return strings.Contains(strings.ToLower(s), filter) }
	return has(r.title()) || has(r.id) || slices.ContainsFunc(r.log, func(e events.Record) bool {
		return has(destination(&e)) || has(process(&e)) || e.Container != nil && has(e.Container.Name)
	})
}
