package loader_test

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// inFormat has the cgroup a/ policed with maps of a format, and something counted and set for a
// container in there and in total, in either of which the pinned maps are then.
func (h *host) inFormat(format maps.Format) {
	h.t.Helper()
	h.SetFormat(format)
	h.mustAttach(withBurst(5), "a")
	h.SetFormat(maps.Latest)
	h.mkdir("a/c")
	state, err := h.State()
	check(h.t, err)
	defer state.Close()
	if state.Format() != format {
		h.t.Fatalf("the maps are of format %d, want %d", state.Format(), format)
	}
	check(h.t, state.SetLimit(h.id("a/c"), policy.Limit{Burst: 9}))
	containers := state.ByName()[bpf.EgressMapContainers]
	value, err := containers.LookupBytes(h.id("a/c"))
	check(h.t, err)
	check(h.t, containers.Put(h.id("a/c"), edited(value, func(c *maps.Container) {
		c.Counters.SmtpAllowed = 4
		c.Bucket.Burst, c.Bucket.Count, c.Bucket.Interval, c.Bucket.FullAt = 5, 5, 1e9, 1<<62
	})))
	totals := state.ByName()[bpf.EgressMapTotals]
	perCPU := make([][]byte, ebpf.MustPossibleCPU())
	check(h.t, totals.Lookup(uint32(0), &perCPU))
	perCPU[0] = edited(perCPU[0], func(s *maps.Sums) { s.Counters.SmtpAllowed = 40 })
	check(h.t, totals.Put(uint32(0), perCPU))
	h.keeps("in the beginning")
}

// edited returns a value of a map, of whatever length, after edit has changed its beginning.
func edited[V any](value []byte, edit func(*V)) []byte {
	var v V
	all := unsafe.Slice((*byte)(unsafe.Pointer(&v)), unsafe.Sizeof(v))
	copy(all, value)
	edit(&v)
	return append(slices.Clone(all[:min(len(all), len(value))]), value[min(len(all), len(value)):]...)
}

// keeps fails the test unless what inFormat has set is there.
func (h *host) keeps(when string) {
	h.t.Helper()
	containers, totals := h.counters()
	c := containers[h.id("a/c")]
	if c.Counters.SmtpAllowed != 4 || totals.SmtpAllowed != 40 {
		h.t.Errorf("%s: %d mails of the container and %d in total, want 4 and 40", when, c.Counters.SmtpAllowed, totals.SmtpAllowed)
	}
	if c.Limit.Burst != 9 || c.Flags != maps.LimitSetByHand || c.Bucket.FullAt != 1<<62 {
		h.t.Errorf("%s: got limit %+v, flags %b, bucket %+v", when, c.Limit, c.Flags, c.Bucket)
	}
}

// format fails the test unless the maps are of a format, and none is left that was replaced.
func (h *host) format(want maps.Format) {
	h.t.Helper()
	state, err := h.State()
	check(h.t, err)
	defer state.Close()
	if got := state.Format(); got != want {
		h.t.Errorf("the maps are of format %d, want %d", got, want)
	}
	for _, name := range []string{bpf.EgressMapContainers, bpf.EgressMapTotals, bpf.EgressMapRetired} {
		if _, err := os.Stat(h.pins + "/" + name); err != nil {
			h.t.Error(err)
		}
	}
	for _, name := range h.pinned() {
		if strings.HasSuffix(name, "-before") || strings.HasSuffix(name, "-next") {
			h.t.Errorf("%s is left", name)
		}
	}
}

func TestFormats(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.inFormat(maps.Earliest)
	h.mustAttach(withBurst(7))
	h.format(maps.Latest)
	h.keeps("taken over")
	check(t, h.HandOver(t.Context()))
	h.format(maps.Earliest)
	h.keeps("handed over")
	if s := h.status(); !s.Enforcing || s.Policy.SMTP.Burst != 7 {
		t.Errorf("handed over: %+v", s)
	}
	check(t, h.HandOver(t.Context()))
	h.mustAttach(withBurst(7))
	h.format(maps.Latest)
	h.keeps("taken over again")
	o := h.objects()
	h.mustDetach()
	h.nothingLeft(o)
}

// An error in an attach that replaces maps leaves what was there, whichever way it goes.
func TestErrorInMigration(t *testing.T) {
	t.Parallel()
	for _, from := range []maps.Format{maps.Earliest, maps.Latest} {
		h := newHost(t)
		h.inFormat(from)
		to := maps.Earliest + maps.Latest - from
		h.SetFormat(to)
		steps := h.failAtEachStep(func() error { return h.attach(withBurst(7), "a") }, func() {
			h.SetFormat(from)
			h.mustAttach(withBurst(7), "a")
			h.SetFormat(to)
		})
		h.mustInclude(steps, "replace map containers", "replace map totals", "copy what is kept", "carry over what was counted")
		h.format(to)
		h.keeps("in the end")
	}
}

// An attach that is killed while it replaces maps loses nothing that is counted, and is
// completed by the next, whichever format that is for.
func TestKilledInMigration(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	for n := 1; ; n += 2 {
		h.inFormat(maps.Earliest)
		step := h.killAt(n, "attach", "a")
		h.keeps("killed at " + step)
		if s := h.status(); len(s.Cgroups) != 1 || !h.hook("egress", "a").Attached {
			t.Errorf("killed at %q: %+v", step, s)
		}
		to := maps.Latest
		if n%4 == 3 {
			to = maps.Earliest
		}
		h.SetFormat(to)
		s := h.mustAttach(withBurst(9))
		for _, row := range s.Hooks {
			if !row.Attached || row.Reason != "" {
				t.Errorf("killed at %q, then attached: %+v", step, row)
			}
		}
		h.format(to)
		h.keeps("attached after a kill at " + step)
		h.SetFormat(maps.Latest)
		o := h.objects()
		h.mustDetach()
		h.nothingLeft(o)
		h.rmdir("a/c")
		if t.Failed() || step == "" {
			return
		}
	}
}

// A map that only a later version knows is let alone, and links are not.
func TestMapOfLaterVersion(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.mustAttach(withBurst(5), "a")
	theirs := h.pins + "/theirs"
	pinMap(t, theirs, ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if s := h.mustAttach(withBurst(7)); len(s.Unknown) != 1 || s.Unknown[0] != theirs {
		t.Errorf("got unknown pins %q, want %s", s.Unknown, theirs)
	}
	if _, err := os.Stat(theirs); err != nil {
		t.Error(err)
	}
	check(t, os.Rename(h.pins+"/release", h.pins+"/their_link"))
	if err := h.attach(withBurst(9)); !errors.Is(err, loader.ErrOtherVersion) {
		t.Errorf("got %v, want %v", err, loader.ErrOtherVersion)
	}
}

// Who changes what holds for a container waits for an attach, which could replace the maps.
func TestChangeState(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	set := func(ctx context.Context) error {
		return h.ChangeState(ctx, func(s *maps.State) error { return s.SetLimit(h.id("a"), policy.Limit{Burst: 3}) })
	}
	if err := set(t.Context()); !errors.Is(err, loader.ErrNotAttached) {
		t.Errorf("got %v, want %v", err, loader.ErrNotAttached)
	}
	h.mustAttach(withBurst(5), "a")
	release := h.hold()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := set(ctx); !errors.Is(err, loader.ErrBusy) {
		t.Errorf("got %v, want %v", err, loader.ErrBusy)
	}
	release()
	check(t, set(t.Context()))
	if containers, _ := h.counters(); containers[h.id("a")].Limit.Burst != 3 {
		t.Errorf("got %+v", containers[h.id("a")])
	}
}

// A Control lets go of maps that were detached.
func TestControlAfterDetach(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a")
	control := h.Control()
	t.Cleanup(func() { check(t, control.Close()) })
	set := func() error {
		return control.Change(t.Context(), func(s *maps.State) error { return s.SetLimit(h.id("a"), policy.Limit{Burst: 3}) })
	}
	check(t, set())
	before := h.objects()
	h.mustDetach()
	if err := set(); !errors.Is(err, loader.ErrNotAttached) {
		t.Errorf("got %v, want %v", err, loader.ErrNotAttached)
	}
	h.nothingLeft(before)
	h.mustAttach(withBurst(5), "a")
	check(t, set())
	if containers, _ := h.counters(); containers[h.id("a")].Limit.Burst != 3 {
		t.Errorf("got %+v", containers[h.id("a")])
	}
}

// Whoever reads counters while maps are replaced finds the same counts each time.
func TestReadersInMigration(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.inFormat(maps.Earliest)
	done := make(chan struct{})
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				state, err := h.State()
				if err != nil {
					t.Error(err)
					return
				}
				containers, errContainers := state.Containers()
				totals, errTotals := state.Totals()
				current := h.IsCurrent(state)
				state.Close()
				if err := errors.Join(errContainers, errTotals); err != nil {
					t.Error(err)
					return
				}
				if got := containers[h.id("a/c")].Counters.SmtpAllowed; current && (got != 4 || totals.SmtpAllowed != 40) {
					t.Errorf("read %d mails of the container and %d in total, want 4 and 40", got, totals.SmtpAllowed)
					return
				}
			}
		})
	}
	for i := range 6 {
		h.SetFormat([]maps.Format{maps.Latest, maps.Earliest}[i%2])
		check(t, h.attach(withBurst(uint32(5+i))))
	}
	close(done)
	readers.Wait()
	h.keeps("in the end")
}
