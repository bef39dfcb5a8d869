package loader_test

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"testing"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// What is in force by pins that cannot be seen from here is found, and taken off without
// touching what is pinned here.
func TestElsewhere(t *testing.T) {
	lockHost(t)
	h := newHost(t)
	h.mkdir("a", "b", "own.slice")
	h.mustAttach(withBurst(5), "a")
	expect := func(want ...string) {
		t.Helper()
		found, err := h.Elsewhere()
		check(t, err)
		var got []string
		for _, e := range found {
			if e.Version != loader.Version() || e.Program == 0 || e.Link == 0 {
				t.Errorf("got %+v", e)
			}
			got = append(got, e.Cgroup)
		}
		if !slices.Equal(got, want) {
			t.Errorf("found %v, want %v", got, want)
		}
	}
	expect()
	other := newHost(t)
	other.base = h.base
	other.mustAttach(withBurst(5), "b")
	expect(h.paths("b")...)
	takeOff := func() {
		t.Helper()
		// What follows containers is held by its pins alone.
		if err := h.DetachElsewhere(t.Context()); !errors.Is(err, loader.ErrStillPinned) {
			t.Errorf("got %v, want %v", err, loader.ErrStillPinned)
		}
		expect()
		for _, row := range other.status().Hooks {
			if row.Attached && row.Cgroup != "" {
				t.Errorf("%s is attached to %s", row.Name, row.Cgroup)
			}
		}
		if s := h.status(); !s.Enforcing {
			t.Errorf("this one is not in force any more: %+v", s.Hooks)
		}
	}
	takeOff()
	other.mustAttach(policy.Default(), "a", "own.slice")
	expect(h.paths("a", "b", "own.slice")...)
	takeOff()

	// It goes on with that, and this one does not see its own as another's.
	other.mustAttach(policy.Default())
	check(t, other.Detach(t.Context(), nil))
	expect()
	check(t, h.Detach(t.Context(), nil))
	check(t, h.DetachElsewhere(t.Context()))
	if _, err := os.Stat(h.pins); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v", h.pins, err)
	}
}

// What is handed over stays in force with all that is counted, and is not handed over while
// somebody would restore it.
func TestHandOver(t *testing.T) {
	h := newHost(t)
	check(t, h.HandOver(t.Context())) // of nothing
	h.mustAttach(withBurst(5), "a")
	service, err := h.Serve()
	check(t, err)
	before := h.snapshot()
	if err := h.HandOver(t.Context()); !errors.Is(err, loader.ErrServed) {
		t.Errorf("got %v, want %v", err, loader.ErrServed)
	}
	h.unchanged(before, "what was refused")
	check(t, service.Close())
	state, err := h.State()
	check(t, err)
	defer state.Close()
	check(t, state.SetLimit(h.id("a"), policy.Limit{Burst: 9}))
	check(t, h.HandOver(t.Context()))
	if s := h.status(); !s.Enforcing {
		t.Errorf("not in force: %+v", s.Hooks)
	}
	h.mustAttach(withBurst(7))
	again, err := h.State()
	check(t, err)
	defer again.Close()
	known, err := again.Containers()
	check(t, err)
	if got := known[h.id("a")].Limit.Burst; got != 9 {
		t.Errorf("the limit set by hand is %d", got)
	}
}
