package tell

import "github.com/egressbpf/egressbpf/internal/stats"

// ledger compares the counters with what they were.
type ledger struct {
	begun bool
	of    map[uint64]stats.Refused // of each container, when last seen
	total stats.Refused            // of all, when last seen
	told  stats.Refused            // how much of total was returned as a change, or was there before
}

// begin takes what is counted so far as told.
func (l *ledger) begin(t *stats.Tally) {
	*l = ledger{begun: true, of: t.Containers, total: t.Total, told: t.Total}
}

// changes returns what was counted since the last time: of each container, and what is in the
// total alone, since the container is gone or not known. Over time, all of it adds up to the
// total exactly.
func (l *ledger) changes(t *stats.Tally) (of map[uint64]stats.Refused, rest stats.Refused) {
	of = map[uint64]stats.Refused{}
	for i := range t.Total {
		if t.Total[i] < l.total[i] {
			// The filter was detached, and attached anew: the counters began at 0 then.
			*l = ledger{begun: true}
			break
		}
	}
	for id, now := range t.Containers {
		before := l.of[id]
		var change stats.Refused
		for i, n := range now {
			if n < before[i] {
				before[i] = 0
			}
			change[i] = n - before[i]
			l.told[i] += change[i]
		}
		if change != (stats.Refused{}) {
			of[id] = change
		}
	}
	for i, n := range t.Total {
		// The total was read first, so it can be behind.
		if n > l.told[i] {
			rest[i] = n - l.told[i]
			l.told[i] = n
		}
	}
	l.of, l.total = t.Containers, t.Total
	return of, rest
}
