package verdict

import (
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

var (
	mail = packet{dst: open4, payload: tcp(25, syn)}
	web  = packet{dst: open4, payload: tcp(443, syn)}
)

// strict is a limit of one connection during a test.
var strict = policy.Limit{Rate: policy.Rate{Count: 1, Period: 24 * time.Hour}, Burst: 1}

func (f *filter) wants(t *testing.T, what string, p packet, want verdict) {
	t.Helper()
	f.expect(t, row{what, p, want}, f.device, want)
}

// admits says whether a mail connection gets a token.
func (f *filter) admits(t *testing.T) bool {
	t.Helper()
	return f.run(t, etherIPv4, mail.bytes(), f.device) == 1
}

func limited(l policy.Limit) policy.Policy {
	p := policy.Default()
	p.SMTP.Rate, p.SMTP.Burst = l.Rate, l.Burst
	return p
}

func TestDefaultLimit(t *testing.T) {
	at := newSender(t)
	f := at.load(t, policy.Default())
	at.inside(t, func() {
		for range 5 {
			f.wants(t, "within the burst", mail, admitted)
		}
		f.wants(t, "over the burst", mail, rateLimited)
		f.wants(t, "over the burst on IPv6", packet{dst: open6, payload: tcp(587, syn)}, rateLimited)
		f.wants(t, "no mail", web, pass)
	})
}

// TestOwner sends from policed cgroups and from cgroups below them. The container one level
// below is counted and limited, however deep the sender is.
func TestOwner(t *testing.T) {
	top := testenv.Cgroup(t)
	first := testenv.Child(t, top, "first")
	nested := testenv.Child(t, first, "nested")
	disguised := testenv.Child(t, first, "docker-"+strings.Repeat("0123456789abcdef", 4)+".scope")
	deepest := testenv.Child(t, nested, "deepest")
	for _, tt := range []struct{ name, policed, sender, owner string }{
		{"no container", top, top, top},
		{"container", top, first, first},
		{"nested cgroup", top, nested, first},
		{"nested twice", top, deepest, first},
		{"nested, named like a container", top, disguised, first},
		{"policed further down, no container", first, first, first},
		{"policed further down", first, nested, nested},
		{"policed further down, nested", first, deepest, nested},
		{"policed further down, named like a container", first, disguised, disguised},
	} {
		t.Run(tt.name, func(t *testing.T) {
			at := newSenderIn(t, tt.policed, tt.owner, tt.sender)
			f := at.load(t, limited(strict))
			at.inside(t, func() {
				f.wants(t, "mail", mail, admitted)
				f.wants(t, "more mail", mail, rateLimited)
				f.wants(t, "metadata", packet{dst: metadata, payload: icmp()}, blocked)
			})
			if counted, err := f.state.Containers(); err != nil || len(counted) != 1 {
				t.Errorf("counted %+v, %v; want only cgroup %d", counted, err, f.container)
			}
		})
	}
}

// TestFullMap fills the map of the containers: mail of a container without an entry is dropped,
// and counted in the total.
func TestFullMap(t *testing.T) {
	at := newSender(t)
	for _, mode := range []policy.Mode{policy.Enforce, policy.Audit} {
		t.Run(string(mode), func(t *testing.T) {
			p := limited(strict)
			p.Mode = mode
			f := at.load(t, p)
			containers := f.state.ByName()[bpf.EgressMapContainers]
			ids := make([]uint64, containers.MaxEntries())
			for i := range ids {
				ids[i] = 1<<48 + uint64(i) // of no cgroup
			}
			room := len(ids) - 1
			if _, err := containers.BatchUpdate(ids[:room], make([]maps.Container, room), nil); err != nil {
				t.Fatal(err)
			}
			at.inside(t, func() {
				f.wants(t, "into the last entry", mail, admitted)
				f.wants(t, "with an entry, full", mail, rateLimited)
				f.wants(t, "blocked, with an entry, full", packet{dst: metadata, payload: icmp()}, blocked)

				f.forget(t)
				if err := containers.Put(ids[room], maps.Container{}); err != nil {
					t.Fatal(err)
				}
				f.full = true
				f.wants(t, "full", mail, noBucket)
				f.wants(t, "full, on IPv6", packet{dst: open6, payload: hopOpts(tcp(25, syn))}, noBucket)
				f.wants(t, "full, no mail", web, pass)
				f.wants(t, "full, blocked", packet{dst: metadata, payload: icmp()}, blocked)
				f.wants(t, "full, malformed", packet{dst: open4, payload: udp(53), length: 1}, malformed)
				f.expect(t, row{"full, over loopback", mail, pass}, loopback, pass)

				if err := f.state.Forget(ids[0]); err != nil {
					t.Fatal(err)
				}
				f.full = false
				f.wants(t, "room again", mail, admitted)
			})
		})
	}
}

// TestChangedLimit changes the limit of a container in use, by a limit of its own and by
// another policy. The new limit holds at once: tokens that were spent stay spent, and come
// back at the new rate.
func TestChangedLimit(t *testing.T) {
	// So slow that the bucket does not fill up during a change, which loads a program.
	fast := policy.Limit{Rate: policy.Rate{Count: 500, Period: time.Second}, Burst: 1000}
	const fill = 2 * time.Second
	at := newSender(t)
	for _, tt := range []struct {
		name    string
		prepare func(*testing.T, *filter, policy.Limit) (change func() *filter)
	}{
		{"of its own", func(t *testing.T, f *filter, l policy.Limit) func() *filter {
			return func() *filter {
				if err := f.state.SetLimit(f.container, l); err != nil {
					t.Fatal(err)
				}
				return f
			}
		}},
		{"of the policy", func(t *testing.T, f *filter, l policy.Limit) func() *filter {
			changed := at.loadWith(t, limited(l), f.state)
			return func() *filter { return changed }
		}},
	} {
		changed := func(t *testing.T, from, to policy.Limit) *filter {
			f := at.load(t, limited(from))
			change := tt.prepare(t, f, to)
			for f.admits(t) {
			}
			return change()
		}
		t.Run(tt.name+", up", func(t *testing.T) {
			at.inside(t, func() {
				f := changed(t, strict, policy.Limit{Rate: fast.Rate, Burst: 1})
				for start := time.Now(); !f.admits(t); {
					if time.Since(start) > time.Second {
						t.Fatalf("no token after a second at %s", fast.Rate)
					}
				}
			})
		})
		t.Run(tt.name+", down", func(t *testing.T) {
			at.inside(t, func() {
				f := changed(t, fast, strict)
				// Until all tokens would be back at the old rate.
				for start := time.Now(); time.Since(start) < fill; {
					if f.admits(t) {
						t.Fatalf("a token after %v at %s", time.Since(start), strict.Rate)
					}
				}
			})
		})
	}
	t.Run("to unlimited and back", func(t *testing.T) {
		at.inside(t, func() {
			f := at.load(t, limited(strict))
			f.wants(t, "of the policy", mail, admitted)
			f.wants(t, "of the policy", mail, rateLimited)
			before := f.counts(t)
			if err := f.state.SetLimit(f.container, policy.Limit{Burst: 1}); err != nil {
				t.Fatal(err)
			}
			if after := f.counts(t); after != before {
				t.Errorf("counted %+v, then set a limit, and %+v", before, after)
			}
			for range 10 {
				f.wants(t, "unlimited", mail, admitted)
			}
			if err := f.state.UnsetLimit(f.container); err != nil {
				t.Fatal(err)
			}
			f.wants(t, "of the policy again", mail, rateLimited)
		})
	})
}

// clockNow reads a clock, in nanoseconds.
func clockNow(t *testing.T, id int32) int64 {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(id, &now); err != nil {
		t.Fatal(err)
	}
	return now.Nano()
}

func monotonic(t *testing.T) int64 {
	t.Helper()
	return clockNow(t, unix.CLOCK_MONOTONIC)
}

// hammer sends mail from all CPUs for a while, and returns how often it was admitted and how
// often it was refused.
func (f *filter) hammer(t *testing.T, duration time.Duration) (taken, refused int64) {
	t.Helper()
	var answers [2]atomic.Int64
	t.Run("hammer", func(t *testing.T) {
		for i := range runtime.NumCPU() {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				t.Parallel()
				f.inside(t, func() {
					for start := time.Now(); time.Since(start) < duration; {
						answers[f.run(t, etherIPv4, mail.bytes(), f.device)].Add(1)
					}
				})
			})
		}
	})
	return answers[1].Load(), answers[0].Load()
}

// counted compares the counters with what was sent.
func (f *filter) counted(t *testing.T, taken, refused int64) {
	t.Helper()
	want := maps.Counters{SmtpAllowed: uint64(taken)}
	want.Dropped[bpf.EgressReasonREASON_RATE_LIMITED].Packets = uint64(refused)
	want.Dropped[bpf.EgressReasonREASON_RATE_LIMITED].Bytes = uint64(refused) * uint64(len(mail.bytes()))
	if got := f.counts(t); got.container != want || got.total != want {
		t.Errorf("counted %s, in total %s, want %s", brief(got.container), brief(got.total), brief(want))
	}
}

// TestContention asks for more tokens than there are, from all CPUs at once. It gets
// exactly what burst and rate allow for the time between the first call and the last, and
// everything is counted.
func TestContention(t *testing.T) {
	// Only if nobody asks for a second does the bucket fill up and lose tokens.
	limit := policy.Limit{Rate: policy.Rate{Count: 1000, Period: time.Second}, Burst: 1000}
	at := newSender(t)
	f := at.load(t, limited(limit))
	var taken, refused int64
	// drain returns the times at which the call that found the bucket empty began and ended.
	drain := func() (began, ended int64) {
		at.inside(t, func() {
			for empty := false; !empty; {
				began = monotonic(t)
				late := began-clockNow(t, unix.CLOCK_MONOTONIC_COARSE) > 50*time.Millisecond.Nanoseconds()
				if f.admits(t) {
					taken++
				} else {
					refused++
					// In an emulator the clock's tick may be so late that there is a token
					// again and the program's first look does not see it.
					empty = !late
				}
				ended = monotonic(t)
			}
		})
		return began, ended
	}

	start := monotonic(t)
	emptyBegan, emptyEnded := drain()
	before := taken
	hammerTaken, hammerRefused := f.hammer(t, 1200*time.Millisecond)
	taken, refused = taken+hammerTaken, refused+hammerRefused
	lastBegan, lastEnded := drain()

	if most := int64(limit.Burst) + refill(limit, lastEnded-start); taken > most {
		t.Errorf("%d of %d were admitted, want at most %d", taken, taken+refused, most)
	}
	// An empty bucket has less than a token, not none.
	least, most := refill(limit, lastBegan-emptyEnded), refill(limit, lastEnded-emptyBegan)+1
	if got := taken - before; got < least || got > most {
		t.Errorf("%d of %d were admitted once the bucket was empty, want %d to %d", got, taken+refused, least, most)
	}
	f.counted(t, taken, refused)
}

// refill returns how many whole tokens come back in some nanoseconds.
func refill(l policy.Limit, ns int64) int64 { return ns * int64(l.Rate.Count) / int64(l.Rate.Period) }

// TestCollisions uses a limit so high that CPUs take tokens at the same moment.
func TestCollisions(t *testing.T) {
	limit := policy.Limit{Rate: policy.Rate{Count: 20_000, Period: time.Second}, Burst: 10_000}
	f := newSender(t).load(t, limited(limit))
	start := monotonic(t)
	taken, refused := f.hammer(t, time.Second)
	if most := int64(limit.Burst) + refill(limit, monotonic(t)-start); taken > most {
		t.Errorf("%d of %d were admitted, want at most %d", taken, taken+refused, most)
	}
	f.counted(t, taken, refused)
}

// TestFirstContact sends the first packets of a container from two CPUs at once. Both count for
// the same entry, and share its bucket.
func TestFirstContact(t *testing.T) {
	at := newSender(t)
	f := at.load(t, limited(strict))
	const rounds = 3000
	var begun, done atomic.Int64
	await := func(n *atomic.Int64, value int64) {
		for n.Load() < value {
			runtime.Gosched()
		}
	}
	other := make(chan struct{})
	go func() {
		defer close(other)
		defer done.Store(rounds) // should it fail, too
		at.inside(t, func() {
			for round := range int64(rounds) {
				await(&begun, round+1)
				f.admits(t)
				done.Store(round + 1)
			}
		})
	}()
	at.inside(t, func() {
		defer begun.Store(rounds)
		for round := range int64(rounds) {
			f.forget(t)
			begun.Store(round + 1)
			f.admits(t)
			await(&done, round+1)
			c := f.counts(t).container
			if n := c.Dropped[bpf.EgressReasonREASON_RATE_LIMITED].Packets; c.SmtpAllowed != 1 || n != 1 {
				t.Errorf("round %d: %s, want admitted 1, rate limited 1", round, brief(c))
			}
		}
	})
	<-other
}
