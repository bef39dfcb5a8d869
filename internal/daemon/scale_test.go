package daemon_test

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/daemon"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// source answers for an engine at once, so that no work but the daemon's is measured.
type source struct {
	container.Source
	ids     []string
	process int    // of the first container
	label   string // of the first container, when it is asked for
}

func (s *source) Name() string { return "test" }
func (s *source) Host() string { return "test" }
func (s *source) Local() bool  { return true }

func (s *source) List(context.Context) (all []container.Container, err error) {
	for _, id := range s.ids {
		all = append(all, container.Container{Identity: container.Identity{ID: id}, Source: s.Name(), Labels: map[string]string{"metadata": "yes"}})
	}
	return all, nil
}

func (s *source) Inspect(_ context.Context, id string) (container.Container, error) {
	return container.Container{Identity: container.Identity{ID: id}, Source: s.Name(), Pid: s.process, Labels: map[string]string{"metadata": s.label}}, nil
}

// crowd is a daemon on a host with a number of containers.
type crowd struct {
	*daemon.Daemon
	source *source
}

// newCrowd returns one that has applied its rules. A process runs in the first container.
func newCrowd(t testing.TB, containers int) *crowd {
	slice := testenv.Child(t, testenv.Cgroup(t), "own.slice")
	c := &crowd{source: &source{label: "yes"}}
	var first string
	for n := range containers {
		id := id(containers<<32 + n) // no other crowd's
		path := testenv.Child(t, slice, "docker-"+id+".scope")
		first = cmp.Or(first, path)
		c.source.ids = append(c.source.ids, id)
	}
	cmd := testenv.Command(t, first, "sleep", "infinity")
	check(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	c.source.process = cmd.Process.Pid
	text := fmt.Sprintf("cgroups: [%s]\n%s", slice, rulesText)
	c.Daemon = &daemon.Daemon{
		Filter: testenv.Filter(t), Root: testenv.Root(t), Containers: container.NewInventory(c.source),
		Load:   func() (policy.Config, error) { return policy.ParseConfig("config.yaml", []byte(text)) },
		Log:    slog.New(slog.NewTextHandler(io.Discard, nil)),
		Notify: func(string) {},
	}
	end, err := c.Begin(t.Context())
	check(t, err)
	t.Cleanup(end)
	c.Event(t.Context(), container.Event{Source: c.source, Action: container.Resync})
	return c
}

// start has the first container start with another label than before.
func (c *crowd) start(ctx context.Context) {
	if c.source.label == "yes" {
		c.source.label = "no"
	} else {
		c.source.label = "yes"
	}
	c.Event(ctx, container.Event{Source: c.source, Action: container.Changed, ID: c.source.ids[0]})
}

// allowed says whether the first container may reach the metadata service.
func (c *crowd) allowed(t testing.TB) bool {
	var s loader.Status
	check(t, c.Filter.AddState(&s))
	return slices.ContainsFunc(s.MetadataAllowed, func(u loader.Uncovered) bool { return u.ID == c.source.ids[0] })
}

// cpu returns the CPU time of this thread.
func cpu(t testing.TB) time.Duration {
	var ts unix.Timespec
	check(t, unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts))
	return time.Duration(ts.Nano())
}

// What the start of a container costs does not depend on how many others there are.
func TestStartAmongMany(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cost := map[int]time.Duration{}
	crowds := map[int]*crowd{10: newCrowd(t, 10), 1000: newCrowd(t, 1000)}
	for range 5 {
		for n, c := range crowds {
			c.start(t.Context())
			if want := c.source.label == "yes"; c.allowed(t) != want {
				t.Fatalf("among %d: may reach the metadata service: %v, want %v", n, !want, want)
			}
			before := cpu(t)
			for range 20 {
				c.start(t.Context())
			}
			if took := cpu(t) - before; cost[n] == 0 || took < cost[n] {
				cost[n] = took
			}
		}
	}
	t.Logf("20 starts among 10: %v; among 1000: %v", cost[10], cost[1000])
	if cost[1000] > 4*cost[10] {
		t.Errorf("20 starts take %v among 10 containers, and %v among 1000", cost[10], cost[1000])
	}
}

func BenchmarkStart(b *testing.B) {
	for _, n := range []int{10, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			c := newCrowd(b, n)
			for b.Loop() {
				c.start(b.Context())
			}
		})
	}
}

func BenchmarkCheck(b *testing.B) {
	for _, n := range []int{10, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			c := newCrowd(b, n)
			for b.Loop() {
				c.Check(b.Context())
			}
		})
	}
}
