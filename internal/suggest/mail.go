package suggest

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// window is the time in which the mail connections over a limit are counted.
const window = time.Minute

// uneven is by how much a container may exceed its average in a window, where only the average
// is known.
const uneven = 4

// most bounds counts, so that sums of them stay far from an overflow.
const most = 1 << 40

// mail is what a container sent over its limit, but for what relays got.
type mail struct {
	// n is how many connections there were, those of unknown destination included.
	n, unknown uint64
	to         tally[netip.AddrPort]
	// peak is how many there were in any window, or at most: if exact is false, not all
	// times are known.
	peak  uint64
	exact bool
}

// isMail says whether an attempt was a mail connection over the limit that the policy still
// limits. Other packets are over the limit too if they only pretend to belong to one.
func (o *Observation) isMail(a attempt) bool {
	return a.reason == events.ReasonRateLimited && slices.Contains(o.Config.SMTP.Ports, a.destination.Port()) &&
		!o.exempt(a.destination.Addr())
}

func (o *Observation) exempt(a netip.Addr) bool {
	const tcp = 6
	return len(o.Config.Match(a, tcp, 0).Exempt) > 0
}

// relay is a destination that takes most of the mail of several containers.
type relay struct {
	address netip.Addr
	ports   []uint16
	from    tally[string]
}

// relays returns the relays, in the order of their addresses. It counts connections over the
// limit, since nobody knows where the others went. A container that is gone and has no name may
// have been another one that was replaced, so it makes no relay.
func (o *Observation) relays() (found []relay) {
	// A container that was replaced under its name is one sender.
	senders, known := map[string]tally[netip.Addr]{}, map[string]bool{}
	ports := map[netip.Addr][]uint16{}
	for _, c := range o.containers {
		for a, t := range c.attempts {
			if !o.isMail(a) {
				continue
			}
			addr := a.destination.Addr()
			add(senders, c.title(), addr, min(t.count(), most))
			known[c.title()] = c.running || c.ruleName() != ""
			if port := a.destination.Port(); !slices.Contains(ports[addr], port) {
				ports[addr] = append(ports[addr], port)
			}
		}
	}
	from, mainly := map[netip.Addr]tally[string]{}, tally[netip.Addr]{}
	for name, to := range senders {
		for addr, n := range to {
			add(from, addr, name, n)
			if known[name] && 2*n > to.sum() {
				mainly[addr]++
			}
		}
	}
	for _, addr := range slices.SortedFunc(maps.Keys(from), netip.Addr.Compare) {
		if mainly[addr] > 1 {
			slices.Sort(ports[addr])
			found = append(found, relay{addr, ports[addr], from[addr]})
		}
	}
	return found
}

// mailOf returns what a container sent over its limit to others than the relays.
func (o *Observation) mailOf(c *observed, relays []relay) (m mail) {
	m.to, m.exact = tally[netip.AddrPort]{}, true
	var times []time.Time
	var spreads []spread
	var known uint64
	hasRecords := false
	for a, t := range c.attempts {
		if a.reason != events.ReasonRateLimited {
			continue
		}
		n := min(t.count(), most)
		known += n
		hasRecords = hasRecords || t.records > 0
		if !o.isMail(a) || slices.ContainsFunc(relays, func(r relay) bool { return r.address == a.destination.Addr() }) {
			continue
		}
		m.to[a.destination] += n
		m.n += n
		times = append(times, t.times...)
		switch rest := n - min(t.records, n); {
		case rest == 0:
		case t.records == 0 && rest == 1:
			times = append(times, t.seen.from)
		case t.records == 0 && rest == 2:
			times = append(times, t.seen.from, t.seen.to)
		default:
			spreads = append(spreads, spread{rest, t.seen.from, t.seen.to, t.seen.most})
		}
	}
	// What is suppressed may have been mail if other mail of the container is in the records. But
	// the kernel may have seen it, and the counters know how much there was.
	counted := min(c.counted.SMTP.RateLimited, most)
	var unknown uint64
	for _, s := range c.suppressed {
		s.n = min(s.n, most)
		if o.isCounted(c, s) {
			s.n = min(s.n, max(counted, known+unknown)-known-unknown)
		}
		if hasRecords && s.n > 0 {
			unknown += s.n
			spreads = append(spreads, s)
		}
	}
	if counted > known+unknown {
		rest := spread{n: counted - known - unknown, from: o.countedSince(c), to: o.Now}
		unknown += rest.n
		spreads = append(spreads, rest)
	}
	m.n, m.unknown = m.n+unknown, unknown
	m.exact = len(spreads) == 0
	m.peak = peakOf(times) + peakOfSpreads(spreads)
	return m
}

// countedSince is when a container's counters began, or later.
func (o *Observation) countedSince(c *observed) time.Time {
	if began := o.began(); !c.started.After(began) {
		return began
	}
	return c.started
}

// isCounted says whether the counters of a container have what records only count.
func (o *Observation) isCounted(c *observed, s spread) bool {
	return c.running && !o.Since.IsZero() && !s.from.Before(o.countedSince(c))
}

// peakOf returns how many of the times lie in one window.
func peakOf(times []time.Time) (peak uint64) {
	slices.SortFunc(times, time.Time.Compare)
	first := 0
	for i, t := range times {
		for t.Sub(times[first]) > window {
			first++
		}
		peak = max(peak, uint64(i-first+1))
	}
	return peak
}

// peakOfSpreads returns how many tries may lie in one window, if none of the spreads is too
// uneven.
func peakOfSpreads(spreads []spread) (peak uint64) {
	type edge struct {
		at    time.Time
		begin bool
		n     uint64
	}
	var edges []edge
	for _, s := range spreads {
		n := s.inWindow()
		end := s.from
		if s.to.After(end) {
			end = s.to
		}
		edges = append(edges, edge{s.from, true, n}, edge{end.Add(window), false, n})
	}
	slices.SortFunc(edges, func(a, b edge) int {
		if c := a.at.Compare(b.at); c != 0 || a.begin == b.begin {
			return c
		} else if a.begin {
			return -1
		}
		return 1
	})
	var sum uint64
	for _, e := range edges {
		if !e.begin {
			sum -= e.n
			continue
		}
		sum += e.n
		peak = max(peak, sum)
	}
	return peak
}

// inWindow is how many of the tries may lie in one window.
func (s spread) inWindow() uint64 {
	length := s.to.Sub(s.from)
	switch {
	case s.most > 0:
		return min(s.n, s.most)
	case length <= window:
		return s.n
	}
	average := float64(s.n) * float64(window) / float64(length)
	return min(s.n, uint64(average*uneven)+1)
}

// limitFor returns a limit for containers that sent so many connections over a limit in any
// window: it would have let these through as well. What passes a bucket of rate r and burst b,
// and besides at most n in any minute, passes one of rate r + n/minute and burst b + n.
func limitFor(limit policy.Limit, peak uint64) policy.Limit {
	const highest = 1_000_000 // of a rate's count, and of a burst
	perMinute := minutely(limit.Rate) + peak
	rate := policy.Rate{Count: generous(perMinute + (perMinute+3)/4), Period: time.Minute}
	if rate.Count > highest {
		rate = policy.Rate{Count: min(generous((perMinute+perMinute/4)/60+1), highest), Period: time.Second}
	}
	return policy.Limit{Rate: rate, Burst: uint32(min(generous(uint64(limit.Burst)+peak), highest))}
}

// minutely is a rate in tokens per minute, rounded up.
func minutely(r policy.Rate) uint64 {
	if r.Unlimited() {
		return 0
	}
	if r.Period < time.Minute {
		return r.Count * uint64(time.Minute/r.Period)
	}
	minutes := uint64(r.Period / time.Minute)
	return (r.Count + minutes - 1) / minutes
}

// generous rounds a number up to one that people would choose.
func generous(n uint64) uint64 {
	for scale := uint64(1); ; scale *= 10 {
		for _, step := range []uint64{10, 12, 15, 20, 25, 30, 40, 50, 60, 80} {
			if step*scale >= n {
				return step * scale
			}
		}
	}
}

// wider returns a limit that lets through what either does.
func wider(a, b policy.Limit) policy.Limit {
	if a.Rate.Unlimited() || b.Rate.Unlimited() {
		return policy.Limit{Burst: max(a.Burst, b.Burst)}
	}
	rate := a.Rate
	// count/period of each, with the periods as the other's factor.
	if cmp.Compare(float64(b.Rate.Count)/float64(b.Rate.Period), float64(a.Rate.Count)/float64(a.Rate.Period)) > 0 {
		rate = b.Rate
	}
	return policy.Limit{Rate: rate, Burst: max(a.Burst, b.Burst)}
}
