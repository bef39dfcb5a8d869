package loader_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// docker is the name of a container's cgroup.
func docker(n int) string { return fmt.Sprintf("docker-%064x.scope", n) }

// passes says what the filter lets this process send to a blocked address from a cgroup:
// "packet" and "connect" are what is not refused.
func (h *host) passes(policed, name string) (passed []string) {
	h.t.Helper()
	home, err := cgroup.OfProcess(os.Getpid())
	check(h.t, err)
	move := func(path string) {
		check(h.t, os.WriteFile(filepath.Join(path, "cgroup.procs"), []byte("0"), 0))
	}
	move(h.paths(name)[0])
	defer move(h.root.Path(home))
	if h.sends(policed, blockedAddress) {
		passed = append(passed, "packet")
	}
	if connects(h.t, blockedAddress) {
		passed = append(passed, "connect")
	}
	return passed
}

// A container that starts after an attach was killed, which has to replace maps, is policed,
// whichever step the attach was killed at.
func TestStartedAfterKillInMigration(t *testing.T) {
	h := newHost(t)
	for n := 1; ; n += 3 {
		h.mkdir("own.slice")
		h.SetFormat(maps.Earliest)
		h.mustAttach(withBurst(5), "own.slice")
		h.SetFormat(maps.Latest)
		h.mkdir("own.slice/" + docker(1))
		if passed := h.passes("own.slice", "own.slice/"+docker(1)); len(passed) > 0 {
			t.Fatalf("before: %v", passed)
		}
		step := h.killAt(n, "attach")
		for i, name := range []string{"before", "after"} {
			h.mkdir("own.slice/" + docker(1+i))
			if passed := h.passes("own.slice", "own.slice/"+docker(1+i)); len(passed) > 0 {
				s := h.status()
				var reasons []string
				for _, row := range s.Hooks {
					reasons = append(reasons, row.Reason)
				}
				t.Errorf("killed at %q: a container that was started %s that may %v; status: enforcing %v, uncovered %v, unpinned %v, unknown %v, reasons %q", step, name, passed, s.Enforcing, s.Uncovered, s.Unpinned, s.Unknown, reasons)
			}
		}
		h.mustAttach(withBurst(9))
		for i := range 2 {
			if passed := h.passes("own.slice", "own.slice/"+docker(1+i)); len(passed) > 0 {
				t.Errorf("killed at %q, attached: %v", step, passed)
			}
			h.rmdir("own.slice/" + docker(1+i))
		}
		h.mustDetach()
		if step == "" {
			return
		}
	}
}

// stepOf returns the number of the first step of an attach that begins like this.
func (h *host) stepOf(name, begin string) int {
	h.t.Helper()
	h.mkdir(name)
	h.SetFormat(maps.Earliest)
	h.mustAttach(withBurst(5), name)
	h.SetFormat(maps.Latest)
	steps := faultAt(h.Filter, 0, nil)
	check(h.t, h.attach(withBurst(7)))
	h.SetFault(nil)
	h.mustDetach()
	n := 1 + slices.IndexFunc(*steps, func(step string) bool { return strings.HasPrefix(step, begin) })
	if n == 0 {
		h.t.Fatalf("no step %q in %q", begin, *steps)
	}
	return n
}

// A container is policed that starts after an upgrade was killed, and then the hand-over that
// should have undone it.
func TestStartedAfterTwoKills(t *testing.T) {
	h := newHost(t)
	exchanged := h.stepOf("own.slice", "connect4 of")
	for n := 1; ; n += 4 {
		h.mkdir("own.slice")
		h.SetFormat(maps.Earliest)
		h.mustAttach(withBurst(5), "own.slice")
		h.SetFormat(maps.Latest)
		h.killAt(exchanged, "attach")
		step := h.killAt(n, "hand over")
		container := "own.slice/" + docker(1)
		h.mkdir(container)
		if passed := h.passes("own.slice", container); len(passed) > 0 {
			t.Errorf("hand-over killed at %q: %v", step, passed)
		}
		h.mustAttach(withBurst(9))
		if passed := h.passes("own.slice", container); len(passed) > 0 {
			t.Errorf("hand-over killed at %q, attached: %v", step, passed)
		}
		h.rmdir(container)
		h.mustDetach()
		if step == "" {
			return
		}
	}
}

// A container that is started again, more than once, after an attach was killed keeps its bucket
// and its limit.
func TestRestartedAfterKill(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	container := "own.slice/" + docker(1)
	for _, step := range []string{"replace map totals", "egress of", "connect4 of", "carry over"} {
		n := h.stepOf("own.slice", step)
		h.mkdir("own.slice")
		h.SetFormat(maps.Earliest)
		h.mustAttach(withBurst(5), "own.slice")
		h.SetFormat(maps.Latest)
		h.mkdir(container)
		h.set(container)
		h.killAt(n, "attach")
		for i := range 3 {
			h.rmdir(container)
			h.mkdir(container)
			if c, _ := h.inForceFor("own.slice", container); c.Bucket.FullAt != 1<<62 || c.Limit.Burst != 9 {
				t.Errorf("killed at %q, restarted %d times: limit %+v, bucket %+v", step, i+1, c.Limit, c.Bucket)
			}
		}
		h.mustAttach(withBurst(9))
		if c, _ := h.inForceFor("own.slice", container); c.Bucket.FullAt != 1<<62 || c.Limit.Burst != 9 || c.Flags != maps.LimitSetByHand {
			t.Errorf("killed at %q, restarted, attached: limit %+v, flags %b, bucket %+v", step, c.Limit, c.Flags, c.Bucket)
		}
		h.rmdir(container)
		h.mustDetach()
	}
}

// set has something counted, a bucket that is empty for long, and a limit set by hand for a
// container.
func (h *host) set(name string) {
	h.t.Helper()
	state, err := h.State()
	check(h.t, err)
	defer state.Close()
	id := h.id(name)
	check(h.t, state.SetLimit(id, policy.Limit{Rate: policy.Rate{Count: 5, Period: 5e9}, Burst: 9}))
	containers := state.ByName()[bpf.EgressMapContainers]
	value, err := containers.LookupBytes(id)
	check(h.t, err)
	check(h.t, containers.Put(id, edited(value, func(c *maps.Container) {
		c.Bucket.Burst, c.Bucket.Count, c.Bucket.Interval, c.Bucket.FullAt = 9, 5, 1e9, 1<<62
	})))
}

// inForceFor returns what the egress program in force knows of a container.
func (h *host) inForceFor(policed, name string) (c maps.Container, known bool) {
	h.t.Helper()
	for _, id := range mapsOf(h.t, ebpf.ProgramID(h.hook("egress", policed).Program)) {
		m, err := ebpf.NewMapFromID(id)
		check(h.t, err)
		defer m.Close()
		info, err := m.Info()
		check(h.t, err)
		if info.Name != bpf.EgressMapContainers {
			continue
		}
		value, err := m.LookupBytes(h.id(name))
		check(h.t, err)
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&c)), unsafe.Sizeof(c)), value)
		return c, value != nil
	}
	h.t.Fatal("no containers")
	return
}

// A container that is started again in the midst of an attach which replaces maps keeps its
// bucket and its limit.
func TestRestartedInMigration(t *testing.T) {
	for _, tt := range []struct {
		policed, container string
		from, to           maps.Format
	}{
		{"a", "a/c", maps.Earliest, maps.Latest},
		{"own.slice", "own.slice/" + docker(1), maps.Earliest, maps.Latest},
		{"a", "a/c", maps.Latest, maps.Latest},
		{"own.slice", "own.slice/" + docker(1), maps.Latest, maps.Latest},
	} {
		t.Run(fmt.Sprint(tt.policed, tt.from, tt.to), func(t *testing.T) {
			h := newHost(t)
			for n := 1; ; n += 3 {
				h.mkdir(tt.policed)
				h.SetFormat(tt.from)
				h.mustAttach(withBurst(5), tt.policed)
				h.SetFormat(tt.to)
				h.mkdir(tt.container)
				h.set(tt.container)
				steps := faultAt(h.Filter, n, func() error {
					h.rmdir(tt.container)
					h.mkdir(tt.container)
					return nil
				})
				check(t, h.attach(withBurst(7)))
				h.SetFault(nil)
				step := ""
				if len(*steps) >= n {
					step = (*steps)[n-1]
				}
				c, known := h.inForceFor(tt.policed, tt.container)
				if c.Bucket.FullAt != 1<<62 || c.Limit.Burst != 9 || c.Flags&maps.LimitSetByHand == 0 {
					t.Errorf("restarted at %q: known %v, limit %+v, flags %b, bucket %+v", step, known, c.Limit, c.Flags, c.Bucket)
				}
				h.rmdir(tt.container)
				h.mustDetach()
				if step == "" {
					return
				}
			}
		})
	}
}

// A hand-over that was killed is completed by the next, and nothing is lost.
func TestKilledInHandOver(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	for n := 1; ; n += 3 {
		h.inFormat(maps.Latest)
		step := h.killAt(n, "hand over")
		h.keeps("killed at " + step)
		check(t, h.HandOver(t.Context()))
		h.format(maps.Earliest)
		h.keeps("handed over after a kill at " + step)
		h.mustAttach(withBurst(7))
		h.keeps("attached again after a kill at " + step)
		h.mustDetach()
		h.rmdir("a/c")
		if step == "" {
			return
		}
	}
}

// Taking over after an attach that was killed, a hand-over loses nothing.
func TestHandOverAfterKill(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	for n := 1; ; n += 3 {
		h.inFormat(maps.Earliest)
		step := h.killAt(n, "attach")
		h.keeps("killed at " + step)
		check(t, h.HandOver(t.Context()))
		h.format(maps.Earliest)
		h.keeps("handed over after a kill at " + step)
		h.mustDetach()
		h.rmdir("a/c")
		if step == "" {
			return
		}
	}
}

// A limit that is set after an attach was killed is in force at once and stays, or is refused.
// Whoever sets it has had the maps open since before.
func TestLimitSetAfterKill(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	control := h.Control()
	t.Cleanup(func() { check(t, control.Close()) })
	for n := 1; ; n += 3 {
		h.SetFormat(maps.Earliest)
		h.mustAttach(withBurst(5), "a")
		h.SetFormat(maps.Latest)
		h.mkdir("a/c")
		check(t, control.Change(t.Context(), func(s *maps.State) error {
			return s.Configure(h.id("a/c"), maps.Change{Mask: maps.MayReachMetadata, Flags: maps.MayReachMetadata})
		}))
		step := h.killAt(n, "attach")
		set := func() error {
			return control.Change(t.Context(), func(s *maps.State) error { return s.SetLimit(h.id("a/c"), policy.Limit{Burst: 77}) })
		}
		err := set()
		if errors.Is(err, loader.ErrInterrupted) {
			h.mustAttach(withBurst(7))
			err = set()
		}
		check(t, err)
		c, _ := h.inForceFor("a", "a/c")
		if c.Limit.Burst != 77 {
			t.Errorf("killed at %q: the limit in force is %+v", step, c.Limit)
		}
		h.mustAttach(withBurst(7))
		c, _ = h.inForceFor("a", "a/c")
		if c.Limit.Burst != 77 || c.Flags != maps.MayReachMetadata|maps.LimitSetByHand {
			t.Errorf("killed at %q, then attached: the limit in force is %+v, flags %b", step, c.Limit, c.Flags)
		}
		h.rmdir("a/c")
		h.mustDetach()
		if step == "" {
			return
		}
	}
}

// A map whose pin somebody has removed after a kill is found again.
func TestUnpinnedAfterKill(t *testing.T) {
	h := newHost(t)
	for i, pin := range []string{"containers", "totals", "stateless", "retired"} {
		// Another part of the steps for each.
		for n := 1 + i; ; n += 5 {
			h.inFormat(maps.Earliest)
			step := h.killAt(n, "attach")
			err := os.Remove(h.pins + "/" + pin)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
			if err == nil {
				h.mustAttach(withBurst(9))
				t.Run(fmt.Sprintf("%s removed, killed at %s", pin, strings.ReplaceAll(step, "/", "_")), func(t *testing.T) {
					h.t = t
					h.keeps("attached")
				})
				h.t = t
			}
			h.mustDetach()
			h.rmdir("a/c")
			if step == "" {
				break
			}
		}
	}
}
