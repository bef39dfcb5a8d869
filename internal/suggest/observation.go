package suggest

import (
	"context"
	"errors"
	"io"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/events"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/stats"
)

// Observation is what was observed of the containers of a host while a policy was in force.
// It is not safe for concurrent use.
type Observation struct {
	// Node is the name of this host. Records of others are of other containers, though the
	// numbers and paths of their cgroups may be the same.
	Node string
	// Config is the policy in force, and the cgroups that it holds for.
	Config policy.Config
	// Since is when the policy was last put in force; zero if nothing is in force here.
	Since time.Time
	// Now is when the counters and Seen were read, and Clock is CLOCK_MONOTONIC at that
	// time, in nanoseconds.
	Now   time.Time
	Clock uint64
	// Seen is what mode audit let through.
	Seen []maps.Seen

	containers []*observed
	byKey      map[string]*observed
	byCgroup   map[uint64]*observed
	records    records
	// seenFrom is when the first of Seen happened: an attach keeps Seen and the counters, so that
	// can be before Since.
	seenFrom time.Time
}

// records is what all records together tell.
type records struct {
	first, last time.Time
	n           uint64
	enforced    uint64 // refused, and not only counted
	onHost      uint64 // refused on the host
	strangers   uint64 // of a container that is not known
	unusable    uint64 // without what a record of its type must have
	lost        uint64
}

// observed is a container, and what it was or would have been refused.
type observed struct {
	container.Container
	running bool
	// started is zero if it is not known.
	started time.Time
	// limit is the limit on mail that was in force for the container.
	limit policy.Limit
	// counted is zero for a container that is gone.
	counted  stats.Container
	attempts map[attempt]*tries
	// suppressed are refusals that the records only count.
	suppressed []spread
}

// attempt is what a container tried. What has no meaning for the reason is zero.
type attempt struct {
	reason      string // of package events
	destination netip.AddrPort
	protocol    uint8
	family      uint16
}

// tries is how often a container tried something. The records and the kernel tell of the same
// tries, but each may have missed some.
type tries struct {
	records uint64
	times   []time.Time // of the records; only for mail
	seen    spread
}

func (t *tries) count() uint64 { return max(t.records, t.seen.n) }

// spread is a number of tries of which only the first and the last time are known, and how many
// of them lie in one window at most; that is 0 if it is not known.
type spread struct {
	n        uint64
	from, to time.Time
	most     uint64
}

// Add adds a container that runs or has counters, with these. started is when the first of its
// processes was; zero if that is not known. Containers are added before records.
func (o *Observation) Add(c container.Container, counted stats.Container, started time.Time) {
	at := o.add(key(c.Identity), c)
	at.running, at.started, at.counted = c.Cgroup != "", started, counted
	if counted.SMTP.Known() {
		at.limit = policy.Limit{Rate: counted.SMTP.Rate, Burst: counted.SMTP.Burst}
	}
}

func (o *Observation) add(k string, c container.Container) *observed {
	if o.byKey == nil {
		o.byKey, o.byCgroup = map[string]*observed{}, map[uint64]*observed{}
	}
	at := &observed{Container: c, attempts: map[attempt]*tries{}}
	at.limit = o.Config.SMTP.Limit()
	if rule := policy.RuleFor(o.Config.Containers, c.Subject()); rule.SMTP != nil {
		at.limit = *rule.SMTP
	}
	o.containers = append(o.containers, at)
	if o.byKey[k] == nil {
		o.byKey[k] = at
	}
	if c.CgroupID != 0 {
		o.byCgroup[c.CgroupID] = at
	}
	return at
}

// key tells a container from others, also after the next boot.
func key(is container.Identity) string {
	switch {
	case cgroup.ContainerID(is.ID) != "":
		return is.ID
	case is.Cgroup != "":
		return is.Cgroup
	}
	return "cgroup " + strconv.FormatUint(is.CgroupID, 10) + " " + is.ID
}

// Read adds the records of a source, to its end.
func (o *Observation) Read(ctx context.Context, from events.Source) error {
	for {
		r, err := from.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		o.record(r)
	}
}

func (o *Observation) record(r events.Record) {
	all := &o.records
	if !r.Time.IsZero() {
		if all.first.IsZero() || r.Time.Before(all.first) {
			all.first = r.Time
		}
		if r.Time.After(all.last) {
			all.last = r.Time
		}
	}
	switch r.Type {
	case events.Lost:
		all.lost += r.Count
	case events.Suppressed:
		if r.Container == nil {
			all.strangers += r.Count
			return
		}
		s := spread{n: r.Count, from: r.Time, to: r.Time}
		if r.Since != nil && r.Since.Before(r.Time) {
			s.from = *r.Since
		}
		at := o.of(r)
		at.suppressed = append(at.suppressed, s)
	case events.Refusal:
		o.refusal(r)
	}
}

func (o *Observation) refusal(r events.Record) {
	all := &o.records
	a, ok := attemptOf(r)
	switch {
	case !ok:
		all.unusable++
		return
	case !*r.WouldBlock:
		return
	case r.Hook == events.HookHost:
		// The container's own hooks did not refuse it, or it is counted there already.
		all.onHost++
		return
	case r.Container == nil:
		all.strangers++
		return
	}
	all.n++
	if *r.Blocked {
		all.enforced++
	}
	t := o.of(r).tries(a)
	t.records++
	if a.reason == events.ReasonRateLimited {
		t.times = append(t.times, r.Time)
	}
}

// of returns the container of a record.
func (o *Observation) of(r events.Record) *observed {
	is := container.Identity{ID: r.Container.ID, Name: r.Container.Name, CgroupID: r.Container.CgroupID, Cgroup: r.Container.Cgroup}
	elsewhere := r.Node != "" && r.Node != o.Node
	if elsewhere {
		is.CgroupID = 0
	}
	k := key(is)
	if elsewhere && k != is.ID {
		k = r.Node + " " + k
	}
	at := o.byKey[k]
	if at == nil {
		// The numbers of cgroups begin anew with each boot. What is left of a container that
		// is gone has no other id.
		known := o.byCgroup[is.CgroupID]
		if known != nil && known.Cgroup == "" && !r.Time.Before(o.boot()) {
			at = known
		} else {
			if known != nil || r.Time.Before(o.boot()) {
				is.CgroupID = 0
			}
			at = o.add(k, container.Container{Identity: is})
		}
	}
	if len(at.Names) == 0 && is.Name != "" {
		at.Name, at.Names, at.Image = is.Name, []string{is.Name}, r.Container.Image
		if rule := policy.RuleFor(o.Config.Containers, at.Subject()); rule.SMTP != nil && !at.running {
			at.limit = *rule.SMTP
		}
	}
	return at
}

// boot is when this host was booted, more or less.
func (o *Observation) boot() time.Time { return o.Now.Add(-time.Duration(o.Clock)) }

func (at *observed) tries(a attempt) *tries {
	t := at.attempts[a]
	if t == nil {
		t = &tries{}
		at.attempts[a] = t
	}
	return t
}

// attemptOf returns what a record tells of; false if the record lacks something.
func attemptOf(r events.Record) (a attempt, ok bool) {
	if r.WouldBlock == nil || r.Blocked == nil {
		return a, false
	}
	a.reason = r.Reason
	switch r.Reason {
	case events.ReasonMalformed, events.ReasonNoBucket:
		return a, true
	case events.ReasonFamily:
		a.family, ok = familyNumber(r.Family)
		return a, ok
	case events.ReasonBlocked, events.ReasonRateLimited:
		if r.Destination == nil || !r.Destination.Address.IsValid() {
			return a, false
		}
		a.destination = netip.AddrPortFrom(plainAddress(r.Destination.Address), r.Destination.Port)
		a.protocol, ok = protocolNumber(r.Protocol)
		return a, ok
	}
	return a, false
}

// plainAddress is the address by which a packet is judged.
func plainAddress(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

func protocolNumber(name string) (uint8, bool) {
	for n := range math.MaxUint8 + 1 {
		if policy.ProtocolName(uint8(n)) == name {
			return uint8(n), true
		}
	}
	return 0, false
}

func familyNumber(name string) (uint16, bool) {
	for _, n := range policy.FamilyNumbers() {
		if string(policy.FamiliesOf([]uint{n})) == name {
			return uint16(n), true
		}
	}
	n, err := strconv.ParseUint(name, 10, 16)
	return uint16(n), err == nil
}

// reasons are those that Seen can have.
var reasons = map[bpf.EgressReason]string{
	bpf.EgressReasonREASON_MALFORMED:    events.ReasonMalformed,
	bpf.EgressReasonREASON_BLOCKED:      events.ReasonBlocked,
	bpf.EgressReasonREASON_RATE_LIMITED: events.ReasonRateLimited,
	bpf.EgressReasonREASON_NO_BUCKET:    events.ReasonNoBucket,
	bpf.EgressReasonREASON_FAMILY:       events.ReasonFamily,
}

// addSeen gives what was seen to its containers.
func (o *Observation) addSeen() {
	at := func(clock uint64) time.Time { return o.Now.Add(-time.Duration(o.Clock - min(clock, o.Clock))) }
	for _, s := range o.Seen {
		if first := at(s.First); o.seenFrom.IsZero() || first.Before(o.seenFrom) {
			o.seenFrom = first
		}
		reason, ok := reasons[s.Reason]
		if !ok || s.Container == 0 {
			o.records.strangers += s.Count
			continue
		}
		c := o.byCgroup[s.Container]
		if c == nil {
			is := container.Identity{ID: "cgroup-" + strconv.FormatUint(s.Container, 10), CgroupID: s.Container}
			c = o.add(key(is), container.Container{Identity: is})
		}
		a := attempt{reason: reason}
		switch reason {
		case events.ReasonFamily:
			a.family = s.Family
		case events.ReasonBlocked, events.ReasonRateLimited:
			a.destination = netip.AddrPortFrom(plainAddress(s.Destination.Addr()), s.Destination.Port())
			a.protocol = s.Protocol
		}
		t := c.tries(a)
		if t.seen.n == 0 {
			t.seen = spread{s.Count, at(s.First), at(s.Last), s.Most}
			continue
		}
		t.seen.n += s.Count
		t.seen.most += s.Most
		if from := at(s.First); from.Before(t.seen.from) {
			t.seen.from = from
		}
		if to := at(s.Last); to.After(t.seen.to) {
			t.seen.to = to
		}
	}
	o.Seen = nil
}

// began is when the counters began, or later; zero if nothing is in force here.
func (o *Observation) began() time.Time {
	if !o.Since.IsZero() && !o.seenFrom.IsZero() && o.seenFrom.Before(o.Since) {
		return o.seenFrom
	}
	return o.Since
}

// from is when observation began: with what was counted, or with the first record.
func (o *Observation) from() time.Time {
	began := o.began()
	if began.IsZero() || !o.records.first.IsZero() && o.records.first.Before(began) {
		return o.records.first
	}
	return began
}

// ruleName returns the name for a rule for this container alone; empty if there is none. The names
// of pods' containers are not their own: whoever makes a pod anywhere could take one.
func (at *observed) ruleName() string {
	if at.Pod.Name != "" {
		return ""
	}
	for _, name := range slices.Concat([]string{at.Name}, at.Names) {
		if slices.Contains(at.Names, name) && docker.MatchString(name) {
			return name
		}
	}
	return ""
}
