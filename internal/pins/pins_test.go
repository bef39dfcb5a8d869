package pins_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// path returns a pin path that is there and locked.
func path(t *testing.T) pins.Path {
	t.Helper()
	p := pins.At(testenv.PinPath(t))
	unlock, created, err := p.Lock(t.Context())
	check(t, err)
	if !created {
		t.Errorf("%s was there before", p)
	}
	t.Cleanup(unlock)
	t.Cleanup(func() { check(t, os.RemoveAll(string(p))) })
	return p
}

func newMap(t *testing.T, name string) *ebpf.Map {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: name, Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	check(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

func TestUnknown(t *testing.T) {
	p := path(t)
	m := newMap(t, "any")
	ours := append(maps.StateNames(), "overflow", "recognise", "keep-next", "host_answer6", "host_answer6-next", "udp_tunnels",
		"cgroup-12/egress", "cgroup-12/sendmsg6", "cgroup-12/socket_create", "cgroup-12/socket_create-next")
	var unknown []string
	for _, name := range []string{"events", "recognise-next-next", "cgroup-12/sock_create", "cgroup-x/egress", "egress", "listeners/first"} {
		unknown = append(unknown, p.Pin(name))
	}
	for _, name := range ours {
		check(t, os.MkdirAll(filepath.Dir(p.Pin(name)), 0o700))
		clone, err := m.Clone()
		check(t, err)
		defer clone.Close()
		check(t, clone.Pin(p.Pin(name)))
	}
	for _, pin := range unknown {
		check(t, os.MkdirAll(filepath.Dir(pin), 0o700))
		clone, err := m.Clone()
		check(t, err)
		defer clone.Close()
		check(t, clone.Pin(pin))
	}
	got, err := p.Unknown()
	check(t, err)
	slices.Sort(got)
	slices.Sort(unknown)
	if !slices.Equal(got, unknown) {
		t.Errorf("got %q, want %q", got, unknown)
	}
	// None of these has the name of a map of the state.
	if err := p.Check(); !errors.Is(err, pins.ErrForeignPins) {
		t.Errorf("got %v, want %v", err, pins.ErrForeignPins)
	}
	check(t, newMap(t, "containers").Pin(p.Pin("x")))
	if err := p.Check(); !errors.Is(err, pins.ErrForeignPins) {
		t.Errorf("under another name: got %v, want %v", err, pins.ErrForeignPins)
	}
	check(t, os.Remove(p.Pin("containers")))
	check(t, newMap(t, "containers").Pin(p.Pin("containers")))
	check(t, p.Check())
}

func TestLock(t *testing.T) {
	p := path(t)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := p.Lock(ended); !errors.Is(err, pins.ErrBusy) || !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, pins.ErrBusy)
	}
	if !p.Locked() {
		t.Error("it is not locked")
	}
	if p.Served() {
		t.Error("it is served")
	}
	service, err := p.Serve()
	check(t, err)
	if !p.Served() {
		t.Error("it is not served")
	}
	check(t, service.Close())
}

var errInjected = errors.New("injected")

// An error takes back what was changed, the last step first.
func TestChangeIsUndone(t *testing.T) {
	p := path(t)
	old, next := newMap(t, "m"), newMap(t, "m")
	check(t, old.Pin(p.Pin("m")))
	id := func(m *ebpf.Map) ebpf.MapID {
		info, err := m.Info()
		check(t, err)
		id, _ := info.ID()
		return id
	}
	was := id(old)
	var steps, undone []string
	change := pins.NewChange(func(step string) error {
		steps = append(steps, step)
		return nil
	})
	change.Back(func() error { undone = append(undone, "first"); return nil })
	check(t, change.Mkdir(p.Cgroup(1)))
	check(t, change.Mkdir(p.Cgroup(1)))
	again, err := old.Clone()
	check(t, err)
	check(t, change.UnpinMap(p.Pin("m"), again))
	check(t, change.PinMap(p.Pin("m"), next))
	change.Back(func() error { undone = append(undone, "last"); return errors.New("no way") })
	if err := change.End(errInjected); !errors.Is(err, errInjected) || !strings.Contains(err.Error(), "restore what was in force before: no way") {
		t.Errorf("got %v", err)
	}
	if !slices.Equal(undone, []string{"last", "first"}) || !slices.Equal(steps, []string{"unpin map m"}) {
		t.Errorf("undone %q, steps %q", undone, steps)
	}
	if _, err := os.Stat(p.Cgroup(1)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is still there: %v", err)
	}
	now, err := ebpf.LoadPinnedMap(p.Pin("m"), nil)
	check(t, err)
	defer now.Close()
	if got := id(now); got != was {
		t.Errorf("map %d is pinned, want %d", got, was)
	}
}

// Without an error, and without a way back, what was done stays.
func TestChangeStays(t *testing.T) {
	p := path(t)
	for name, change := range map[string]*pins.Change{"done": pins.NewChange(nil), "one way": pins.OneWay(nil)} {
		check(t, change.PinMap(p.Pin(name), newMap(t, "m")))
		var err error
		if name == "one way" {
			err = errInjected
		}
		if got := change.End(err); got != err {
			t.Errorf("%s: got %v, want %v", name, got, err)
		}
		if _, err := os.Stat(p.Pin(name)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	change := pins.NewChange(func(string) error { return errInjected })
	if err := change.UnpinMap(p.Pin("done"), newMap(t, "m")); !errors.Is(err, errInjected) {
		t.Errorf("got %v, want %v", err, errInjected)
	}
	check(t, change.End(nil))
	if _, err := os.Stat(p.Pin("done")); err != nil {
		t.Errorf("unpinned in spite of the error: %v", err)
	}
}
