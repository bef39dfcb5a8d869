package loader_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// The fingerprint changes with whatever is done to the filter, and with nothing else.
func TestFingerprint(t *testing.T) {
	h := newHost(t)
	h.mustAttach(policy.Default(), "a")
	last := h.Fingerprint()
	same := func(what string) {
		t.Helper()
		if now := h.Fingerprint(); now != last {
			t.Errorf("%s: %s\nbefore: %s", what, now, last)
		}
	}
	changed := func(what string) {
		t.Helper()
		now := h.Fingerprint()
		if now == last {
			t.Errorf("%s: the same: %s", what, now)
		}
		last = now
	}
	h.mkdir("a/container")
	h.status()
	same("a container came")
	check(t, h.linkOf(bpf.EgressProgEgress, "a").Detach())
	changed("a link was detached")
	h.mustAttach(policy.Default())
	changed("it was attached again")
	h.mustAttach(policy.Default())
	changed("programs were exchanged")
	check(t, os.Remove(filepath.Join(h.pins, bpf.EgressMapTotals)))
	changed("a pin was removed")
	same("nothing was done")
	h.mustDetach()
	changed("all was taken off")
}

// A service is known to others until it ends.
func TestServed(t *testing.T) {
	h := newHost(t)
	h.mustAttach(policy.Default(), "a")
	if h.Served() {
		t.Error("served by nobody")
	}
	service, err := h.Serve()
	check(t, err)
	if !h.Served() {
		t.Error("not known to be served")
	}
	h.mustAttach(policy.Default())
	check(t, service.Close())
	if h.Served() {
		t.Error("served by one that has ended")
	}
	o := h.objects()
	h.mustDetach()
	h.nothingLeft(o)
}

// What is attached to a cgroup takes over from those inside of it.
func TestOuterTakesOver(t *testing.T) {
	h := newHost(t)
	h.mkdir("a/b/container")
	h.mustAttach(policy.Default(), "a/b")
	state, err := h.State()
	check(t, err)
	limit := policy.Limit{Rate: policy.Rate{Count: 7, Period: 60e9}, Burst: 7}
	check(t, state.SetLimit(h.id("a/b"), limit))
	check(t, state.Close())
	h.failAtEachStep(func() error { return h.attach(policy.Default(), "a") })
	h.mustAttach(policy.Default(), "a")
	if got := h.policed(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("policed: %v, want a", got)
	}
	if s := h.status(); !s.Enforcing {
		t.Errorf("status: %+v", s)
	}
	known, _ := h.counters()
	if c, ok := known[h.id("a/b")]; !ok || c.Limit.Burst != limit.Burst {
		t.Errorf("state was lost: %+v", known)
	}
}

// The buckets of devices that are gone make room.
func TestForgetDevices(t *testing.T) {
	h := newHost(t)
	h.mustAttach(policy.Default(), "a")
	state, err := h.State()
	check(t, err)
	defer state.Close()
	const loopback, gone = uint32(1), uint32(1 << 30)
	for _, index := range []uint32{loopback, gone} {
		check(t, state.ByName()[bpf.EgressMapDevices].Put(index, bpf.EgressDevice{}))
	}
	check(t, h.ForgetDevices())
	if got, err := state.Devices(); err != nil || !slices.Equal(got, []uint32{loopback}) {
		t.Errorf("devices: %v, %v", got, err)
	}
}
