package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

func id(n int) string { return fmt.Sprintf("%064x", n) }

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// engine is a source that says what a test wants.
type engine struct {
	name    string
	remote  bool
	started bool
	err     error // the answer to any question
	partly  error // the answer to Inspect, besides the container
	running map[string]Container
	asked   int
}

func newEngine(name string, ids ...string) *engine {
	e := &engine{name: name, running: map[string]Container{}}
	for _, id := range ids {
		e.run(id, name+"-"+id[60:])
	}
	return e
}

func (e *engine) run(id, name string) {
	e.running[id] = Container{Identity: Identity{ID: id, Name: name}, Source: e.name, Names: []string{name}}
}

func (e *engine) Name() string  { return e.name }
func (e *engine) Host() string  { return "test:" + e.name }
func (e *engine) Local() bool   { return !e.remote }
func (e *engine) Dormant() bool { return false }
func (e *engine) Started() bool { return e.started }

func (e *engine) Close() error { return nil }

func (e *engine) List(context.Context) (all []Container, err error) {
	e.asked++
	for _, c := range e.running {
		c.Pid = 0
		all = append(all, c)
	}
	return all, e.err
}

func (e *engine) Inspect(_ context.Context, id string) (Container, error) {
	e.asked++
	c, ok := e.running[id]
	switch {
	case e.err != nil:
		return Container{}, e.err
	case !ok:
		return c, ErrNoContainer
	}
	return c, e.partly
}

func (e *engine) Watch(ctx context.Context, fn func(Event)) error {
	fn(Event{Source: e, Action: Resync})
	<-ctx.Done()
	return ctx.Err()
}

// An inventory follows what each source tells, and keeps what one that is lost has told.
func TestUpdate(t *testing.T) {
	a, b := newEngine("a", id(1)), newEngine("b", id(2))
	v := NewInventory(a, b)
	update := func(e Event, changed bool, want error) {
		t.Helper()
		if got, err := v.Update(t.Context(), e); got != changed || !errors.Is(err, want) || (err == nil) != (want == nil) {
			t.Errorf("%s of %s: got %v, %v, want %v, %v", e.Action, e.Source.Name(), got, err, changed, want)
		}
	}
	names := func(want ...string) {
		t.Helper()
		var got []string
		for n := range 5 {
			if name := v.Name(id(n)); name != "" {
				got = append(got, name)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("got names %q, want %q", got, want)
		}
	}
	names()
	update(Event{Source: a, Action: Resync}, true, nil)
	update(Event{Source: b, Action: Resync}, true, nil)
	names("a-0001", "b-0002")

	a.run(id(1), "renamed")
	a.run(id(3), "new")
	update(Event{Source: a, Action: Changed, ID: id(1)}, true, nil)
	update(Event{Source: a, Action: Changed, ID: id(3)}, true, nil)
	update(Event{Source: a, Action: Changed, ID: id(4)}, false, nil) // has ended
	names("renamed", "b-0002", "new")
	update(Event{Source: b, Action: Gone, ID: id(1)}, false, nil) // another one's
	update(Event{Source: a, Action: Gone, ID: id(3)}, false, nil)
	names("renamed", "b-0002")

	down := errors.New("down")
	update(Event{Source: a, Action: Lost, Err: down}, false, down)
	update(Event{Source: a, Action: Lost, Err: down}, false, nil) // was told
	if !v.Lost(a) || v.Lost(b) || len(v.Stale()) > 0 {
		t.Errorf("lost: %v, %v; stale: %v", v.Lost(a), v.Lost(b), v.Stale())
	}
	a.err = down
	update(Event{Source: a, Action: Resync}, true, down)
	names("renamed", "b-0002")
	a.err = nil
	update(Event{Source: a, Action: Changed, ID: id(3)}, false, nil) // all are to be listed
	if !v.Lost(a) || !slices.Equal(v.Stale(), []Source{a}) {
		t.Errorf("lost: %v; stale: %v", v.Lost(a), v.Stale())
	}
	update(Event{Source: a, Action: Resync}, true, nil)
	if v.Lost(a) || len(v.Stale()) > 0 {
		t.Errorf("after an answer: lost: %v; stale: %v", v.Lost(a), v.Stale())
	}
	names("renamed", "b-0002", "new")

	// One that does not tell all of a container is still asked for others.
	b.partly = down
	b.run(id(4), "hangs")
	update(Event{Source: b, Action: Changed, ID: id(4)}, true, down)
	update(Event{Source: b, Action: Changed, ID: id(4)}, true, nil) // was told
	if b.run(id(0), "learnt"); !v.Learn(t.Context(), id(0)) || len(v.Stale()) > 0 {
		t.Errorf("stale: %v", v.Stale())
	}
	b.partly = nil
	names("learnt", "renamed", "b-0002", "new", "hangs")
	update(Event{Source: b, Action: Gone, ID: id(0)}, false, nil)
	update(Event{Source: b, Action: Gone, ID: id(4)}, false, nil)
	delete(b.running, id(0))
	delete(b.running, id(4))

	b.err = down
	update(Event{Source: b, Action: Changed, ID: id(2)}, false, down)
	if v.Lost(b) || !slices.Equal(v.Stale(), []Source{b}) {
		t.Errorf("lost: %v; stale: %v", v.Lost(b), v.Stale())
	}
	if err := v.Refresh(t.Context()); !errors.Is(err, down) {
		t.Errorf("got %v, want %v", err, down)
	}
	names("renamed", "b-0002", "new")
}

// That there is nothing to be reached can be told from other errors.
func TestNothingThere(t *testing.T) {
	docker, err := OpenDocker("unix://" + filepath.Join(t.TempDir(), "socket"))
	check(t, err)
	v := NewInventory(docker)
	if err := v.Refresh(t.Context()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	check(t, v.Close())
	if err := NewInventory().Refresh(t.Context()); err != nil {
		t.Errorf("without sources: %v", err)
	}
}

func TestWatch(t *testing.T) {
	a, b := newEngine("a"), newEngine("b")
	b.started = true
	v := NewInventory(a, b)
	if !v.Started() || NewInventory(a).Started() {
		t.Error("an engine runs, or does not")
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var mu sync.Mutex
	told := map[Source]int{}
	v.Watch(ctx, func(e Event) {
		mu.Lock()
		defer mu.Unlock()
		if told[e.Source]++; len(told) == 2 {
			cancel()
		}
	})
	if told[a] != 1 || told[b] != 1 {
		t.Errorf("told: %v", told)
	}
}

// The kernel says which containers run, and sources what these are called.
func TestRunning(t *testing.T) {
	unlock, err := testenv.LockHost()
	check(t, err)
	defer unlock()
	root, base := testenv.Root(t), testenv.Cgroup(t)
	testenv.Child(t, testenv.Child(t, base, id(1)), id(2)) // one is nested
	testenv.Child(t, base, "docker-"+id(3)+".scope")
	testenv.Child(t, base, "a.service")
	e := newEngine("a", id(1), id(2), id(4))
	v := NewInventory(e)
	check(t, v.Refresh(t.Context()))
	all, err := v.Running(root)
	check(t, err)
	all = slices.DeleteFunc(all, func(c Container) bool { return !strings.HasPrefix(root.Path(c.Cgroup), base+"/") })
	if len(all) != 2 {
		t.Fatalf("got %+v", all)
	}
	if c := all[0]; c.ID != id(1) || c.Name != "a-0001" || c.Source != "a" || root.Path(c.Cgroup) != base+"/"+id(1) {
		t.Errorf("got %+v", c)
	}
	if c := all[1]; c.ID != id(3) || c.Name != "" || c.Source != "" {
		t.Errorf("got %+v", c)
	}
	for _, c := range all {
		if is, err := Identify(root, c.CgroupID); err != nil || is.Cgroup != c.Cgroup || is.ID != c.ID {
			t.Errorf("got %+v, %v, want %+v", is, err, c)
		}
	}
	if is, err := Identify(root, 1<<60); err != nil || is != (Identity{ID: "cgroup-1152921504606846976", CgroupID: 1 << 60}) {
		t.Errorf("got %+v, %v for one that is gone", is, err)
	}
}

// The cgroup of a container is found by its process, if the cgroup's name says that too.
func TestLocate(t *testing.T) {
	root, base := testenv.Root(t), testenv.Cgroup(t)
	outer := testenv.Child(t, base, "docker-"+id(1)+".scope")
	inner := testenv.Child(t, outer, "docker-"+id(2)+".scope")
	cmd := testenv.Command(t, inner, "sleep", "infinity")
	check(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	e := newEngine("a", id(1), id(2))
	v := NewInventory(e)
	locate := func(id string, pid int) (Container, bool) {
		t.Helper()
		c := e.running[id]
		c.Pid = pid
		e.running[id] = c
		_, err := v.Update(t.Context(), Event{Source: e, Action: Changed, ID: id})
		check(t, err)
		return v.Locate(root, id)
	}
	want, err := root.ID(strings.TrimPrefix(outer, string(root)))
	check(t, err)
	c, ok := locate(id(1), cmd.Process.Pid)
	if !ok || root.Path(c.Cgroup) != outer || c.CgroupID != want || c.ID != id(1) || c.Name != "a-0001" || c.Source != "a" {
		t.Errorf("got %+v, %v", c, ok)
	}
	for what, of := range map[string]struct {
		id  string
		pid int
	}{
		"nested":          {id(2), cmd.Process.Pid},
		"another process": {id(1), os.Getpid()},
		"no such process": {id(1), 1<<22 + 1},
		"no process":      {id(1), 0},
	} {
		if c, ok := locate(of.id, of.pid); ok {
			t.Errorf("%s: got %+v", what, c)
		}
	}
	if c, ok := v.Locate(root, id(3)); ok {
		t.Errorf("got %+v of a container that no source knows", c)
	}
}

// Of containers whose cgroups have other names only their sources know, if they are asked.
func TestAddUncovered(t *testing.T) {
	filter := loader.New(testenv.PinPath(t), testenv.Root(t))
	runs := func(e *engine, ids ...string) *engine {
		for _, id := range ids {
			c := e.running[id]
			c.Pid = os.Getpid()
			e.running[id] = c
		}
		return e
	}
	ended := newEngine("ended", id(5)) // has no process
	a, away, lost := runs(newEngine("a", id(1), id(2)), id(1), id(2)), runs(newEngine("away", id(3)), id(3)), runs(newEngine("lost", id(4)), id(4))
	away.remote = true
	v := NewInventory(a, away, lost, ended)
	check(t, v.Refresh(t.Context()))
	if _, err := v.Update(t.Context(), Event{Source: lost, Action: Lost, Err: fs.ErrNotExist}); err == nil {
		t.Fatal("it is not lost")
	}
	before := []int{away.asked, lost.asked}
	s := &loader.Status{Named: map[string]bool{id(2): true}}
	check(t, v.AddUncovered(t.Context(), filter, s))
	if len(s.Uncovered) != 1 || s.Uncovered[0].ID != id(1) || s.Uncovered[0].Name != "a-0001" || s.Uncovered[0].Cgroup == "" {
		t.Errorf("got %+v", s.Uncovered)
	}
	if after := []int{away.asked, lost.asked}; !slices.Equal(before, after) {
		t.Errorf("asked %v times, before %v: of another machine's, and one that is lost", after, before)
	}

	failing := errors.New("no answer")
	a.err = failing
	s.Uncovered = nil
	if err := v.AddUncovered(t.Context(), filter, s); !errors.Is(err, failing) || len(s.Uncovered) > 0 {
		t.Errorf("got %+v, %v", s.Uncovered, err)
	}
}
