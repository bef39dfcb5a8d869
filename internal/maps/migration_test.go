package maps_test

import (
	"errors"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// stateIn makes the State in a format.
func stateIn(t *testing.T, format maps.Format) *maps.State {
	t.Helper()
	s, err := maps.CreateStateIn(format)
	check(t, err)
	t.Cleanup(func() { check(t, s.Close()) })
	if s.Format() != format {
		t.Fatalf("made format %d, want %d", s.Format(), format)
	}
	return s
}

// kept returns the maps of a State that are kept, for a migration to close.
func kept(t *testing.T, s *maps.State) map[string]*ebpf.Map {
	t.Helper()
	found := map[string]*ebpf.Map{}
	for name, m := range s.ByName() {
		if maps.Kept(name) {
			m, err := m.Clone()
			check(t, err)
			found[name] = m
		}
	}
	return found
}

func bytesOf[V any](v *V) []byte { return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v)) }

// change changes the entry of a container as programs would.
func change(t *testing.T, s *maps.State, id uint64, fn func(c *maps.Container)) {
	t.Helper()
	c := containers(t, s)[id]
	fn(&c)
	putIn(t, s, id, c)
}

// putIn writes a container in whatever format the State has.
func putIn(t *testing.T, s *maps.State, id uint64, c maps.Container) {
	t.Helper()
	m := s.ByName()[bpf.EgressMapContainers]
	check(t, m.Put(id, bytesOf(&c)[:m.ValueSize()]))
}

func setTotals(t *testing.T, s *maps.State, c maps.Counters) {
	t.Helper()
	m := s.ByName()[bpf.EgressMapTotals]
	all := make([][]byte, ebpf.MustPossibleCPU())
	for i := range all {
		all[i] = make([]byte, m.ValueSize())
	}
	sums := maps.Sums{Counters: c}
	copy(all[len(all)-1], bytesOf(&sums))
	check(t, m.Put(uint32(0), all))
}

// used returns a container that has taken tokens from its bucket, at a limit of 5 a minute.
func used(t *testing.T, tokens uint64) maps.Container {
	t.Helper()
	limit := maps.LimitOf(policy.Limit{Rate: policy.Rate{Count: 5, Period: time.Minute}, Burst: 5})
	c := maps.Container{Flags: maps.LimitSetByHand}
	c.Limit = limit
	c.Bucket.Count, c.Bucket.Interval, c.Bucket.Burst = limit.Count, limit.Interval, limit.Burst
	c.Bucket.FullAt = monotonic(t) + tokens*limit.Interval
	c.Counters.SmtpAllowed = tokens
	c.Counters.Dropped[bpf.EgressReasonREASON_BLOCKED] = bpf.EgressDrops{Packets: 7, Bytes: 420, Connects: 1}
	c.Counters.HostSide = bpf.EgressTraffic{Packets: 2, Bytes: 120}
	return c
}

// missing returns how many tokens are missing from a container's bucket, to the next half.
func missing(t *testing.T, c maps.Container) float64 {
	t.Helper()
	limit := maps.LimitOf(policy.Limit{Rate: policy.Rate{Count: 5, Period: time.Minute}, Burst: 5})
	left := float64(limit.Burst) - maps.Tokens(c.Bucket, limit, monotonic(t))
	return float64(int(left*2+0.5)) / 2
}

// Whatever was counted, taken or set by hand before, between and after the programs are
// exchanged is there afterwards, in either direction, and at no time is a count less than it
// was.
func TestMigration(t *testing.T) {
	const a, b, late, removed = 11, 12, 13, 14
	for _, tt := range []struct {
		name     string
		from, to maps.Format
	}{
		{"to the latest format", maps.Earliest, maps.Latest},
		{"back to the earliest", maps.Latest, maps.Earliest},
		{"within a format", maps.Latest, maps.Latest},
	} {
		t.Run(tt.name, func(t *testing.T) {
			from, to := stateIn(t, tt.from), stateIn(t, tt.to)
			putIn(t, from, a, used(t, 2))
			putIn(t, from, b, maps.Container{Flags: maps.MayReachMetadata})
			setTotals(t, from, maps.Counters{SmtpAllowed: 100, FamiliesDenied: 3})
			check(t, from.ByName()[bpf.EgressMapStateless].Put(uint64(removed), bpf.EgressWithoutStateWAS_REMOVED))
			past := bpf.EgressPast{Flags: maps.LimitSetByHand}
			check(t, from.ByName()[bpf.EgressMapRetired].Put(bpf.EgressNameKey{Policed: 1}, past))

			to.Replaces(kept(t, from))
			m, err := to.Migrate()
			check(t, err)
			defer m.Close()
			check(t, m.Copy())
			counted := func(when string, id uint64, allowed uint64) {
				t.Helper()
				if got := containers(t, to)[id].Counters.SmtpAllowed; got != allowed {
					t.Errorf("%s: container %d has %d mails, want %d", when, id, got, allowed)
				}
			}
			counted("copied", a, 2)
			if total, err := to.Totals(); err != nil || total.SmtpAllowed != 100 {
				t.Errorf("copied: %d in total, %v", total.SmtpAllowed, err)
			}
			if got := missing(t, containers(t, to)[a]); got != 2 {
				t.Errorf("copied: %v tokens are missing, want 2", got)
			}

			// The old programs go on, and the new ones begin.
			change(t, from, a, func(c *maps.Container) { c.Bucket.FullAt += 2 * c.Bucket.Interval; c.Counters.SmtpAllowed += 2 })
			putIn(t, from, late, used(t, 1))
			_, err = to.Enrol(late)
			check(t, err)
			check(t, m.Carry())
			change(t, from, a, func(c *maps.Container) { c.Bucket.FullAt += c.Bucket.Interval; c.Counters.SmtpAllowed++ })
			check(t, m.Carry())
			check(t, m.Carry())

			counted("carried", a, 5)
			counted("carried", late, 1)
			got := containers(t, to)
			if n := missing(t, got[a]); n != 5 {
				t.Errorf("%v tokens are missing, want 5", n)
			}
			if n := missing(t, got[late]); n != 1 {
				t.Errorf("%v tokens are missing from the late one, want 1", n)
			}
			if got[a].Flags != maps.LimitSetByHand || got[a].Limit.Burst != 5 || got[b].Flags != maps.MayReachMetadata {
				t.Errorf("limits and flags: got %+v and %+v", got[a], got[b])
			}
			want := used(t, 5).Counters
			want.SmtpAllowed = 5
			if got[a].Counters != want {
				t.Errorf("got %+v, want %+v", got[a].Counters, want)
			}
			left := 0
			for _, c := range containers(t, from) {
				if c.Counters != (maps.Counters{}) {
					left++
				}
			}
			if total, err := from.Totals(); err != nil || left != 0 || total != (maps.Counters{}) {
				t.Errorf("%d containers and the totals have counts left: %+v, %v", left, total, err)
			}
			if total, err := to.Totals(); err != nil || total.SmtpAllowed != 100 || total.FamiliesDenied != 3 {
				t.Errorf("totals: got %+v, %v", total, err)
			}
			known, err := to.Recognised(removed)
			if err != nil || !known {
				t.Errorf("a removed container is forgotten: %v", err)
			}
			var kept bpf.EgressPast
			if err := to.ByName()[bpf.EgressMapRetired].Lookup(bpf.EgressNameKey{Policed: 1}, &kept); err != nil || kept != past {
				t.Errorf("what a restart takes over: got %+v, %v", kept, err)
			}
		})
	}
}

// A migration whose process was killed is completed by another one, with nothing counted
// twice and no bucket fuller than before.
func TestMigrationAgain(t *testing.T) {
	const id = 11
	from, to := stateIn(t, maps.Earliest), stateIn(t, maps.Latest)
	putIn(t, from, id, used(t, 1))
	setTotals(t, from, maps.Counters{SmtpAllowed: 50})
	to.Replaces(kept(t, from))
	first, err := to.Migrate()
	check(t, err)
	check(t, first.Copy())
	check(t, first.Carry())
	check(t, first.Close())
	change(t, from, id, func(c *maps.Container) { c.Bucket.FullAt += 3 * c.Bucket.Interval; c.Counters.SmtpAllowed += 3 })
	second, err := to.Migrate()
	check(t, err)
	defer second.Close()
	for range 2 {
		check(t, second.Copy())
		check(t, second.Carry())
	}
	c := containers(t, to)[id]
	if c.Counters.SmtpAllowed != 4 || missing(t, c) != 4 {
		t.Errorf("got %d mails and %v missing tokens, want 4 of both", c.Counters.SmtpAllowed, missing(t, c))
	}
	if total, err := to.Totals(); err != nil || total.SmtpAllowed != 50 {
		t.Errorf("got %d in total, %v", total.SmtpAllowed, err)
	}
}

// What was taken from the new maps is not lost when the exchange is undone.
func TestMigrationUndone(t *testing.T) {
	const id = 11
	from, to := stateIn(t, maps.Earliest), stateIn(t, maps.Latest)
	putIn(t, from, id, used(t, 1))
	to.Replaces(kept(t, from))
	m, err := to.Migrate()
	check(t, err)
	defer m.Close()
	check(t, m.Copy())
	change(t, to, id, func(c *maps.Container) { c.Bucket.FullAt += 2 * c.Bucket.Interval })
	c := containers(t, to)[id]
	c.Counters = maps.Counters{SmtpAllowed: 2, HostSide: bpf.EgressTraffic{Packets: 1, Bytes: 60}}
	c.Counters.HostDropped[0].Packets = 1
	putIn(t, to, id, c)
	check(t, m.Undo())
	c = containers(t, from)[id]
	if c.Counters.SmtpAllowed != 3 || c.Counters.HostSide.Packets != 3 || missing(t, c) != 3 {
		t.Errorf("got %+v, and %v tokens are missing", c.Counters, missing(t, c))
	}
}

// A format that is not known is refused, and not misread.
func TestNewerFormat(t *testing.T) {
	s := newState(t)
	totals := s.ByName()[bpf.EgressMapTotals]
	check(t, maps.CheckFormat(totals))
	perCPU := make([]maps.Sums, ebpf.MustPossibleCPU())
	perCPU[0].Format = uint32(maps.Latest) + 1
	check(t, totals.Put(uint32(0), perCPU))
	if err := maps.CheckFormat(totals); !errors.Is(err, maps.ErrNewer) {
		t.Errorf("got %v, want %v", err, maps.ErrNewer)
	}
	check(t, maps.CheckFormat(stateIn(t, maps.Earliest).ByName()[bpf.EgressMapTotals]))
}
