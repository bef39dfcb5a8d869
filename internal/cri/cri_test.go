package cri

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/egressbpf/egressbpf/internal/test/fakecri"
)

func id(n int) string { return fmt.Sprintf("%064x", n) }

const podUID = "0e0f1b6a-24a4-4b5c-8a3a-0f6c2f1a9b1d"

// start returns a runtime with a pod in the host's network, and another pod, and a client of it
// that does not wait long.
func start(t *testing.T) (*fakecri.Runtime, *Client) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "cri.sock")
	r, err := fakecri.Start(path)
	check(t, err)
	t.Cleanup(func() { _ = r.Stop() })
	r.Sandboxes = []*runtime.PodSandbox{
		fakecri.Sandbox(id(1), "kube-system", "cni-x7k2p", podUID, map[string]string{"app": "cni"}),
		fakecri.Sandbox(id(2), "team", "web", "a-2", nil),
	}
	r.Containers = []*runtime.Container{
		fakecri.Container(id(11), id(1), "agent", "registry/agent:1"),
		fakecri.Container(id(12), id(2), "web", "registry/web:1"),
	}
	r.Networks[id(1)], r.Networks[id(2)] = runtime.NamespaceMode_NODE, runtime.NamespaceMode_POD
	r.Pids[id(11)], r.Pids[id(1)] = "4711", "4700"
	c, err := Open("unix://" + path)
	check(t, err)
	t.Cleanup(func() { check(t, c.Close()) })
	c.Networks = true
	c.pace = pace{
		answer: time.Second, rarely: time.Minute, often: 20 * time.Millisecond, soon: 10 * time.Millisecond, soonFor: time.Second,
		retryMin: 10 * time.Millisecond, retryMax: 50 * time.Millisecond,
	}
	return r, c
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestContainers(t *testing.T) {
	r, c := start(t)
	all, err := c.Containers(t.Context())
	check(t, err)
	slices.SortFunc(all, func(a, b Container) int { return strings.Compare(a.ID, b.ID) })
	cni := Pod{Namespace: "kube-system", Name: "cni-x7k2p", UID: podUID, Labels: map[string]string{"app": "cni"}, HostNetwork: true}
	web := Pod{Namespace: "team", Name: "web", UID: "a-2"}
	want := []Container{
		{ID: id(1), Pod: cni, Sandbox: true}, {ID: id(2), Pod: web, Sandbox: true},
		{ID: id(11), Name: "agent", Image: "registry/agent:1", Pod: cni}, {ID: id(12), Name: "web", Image: "registry/web:1", Pod: web},
	}
	if got, want := fmt.Sprintf("%+v", all), fmt.Sprintf("%+v", want); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	// A sandbox's network does not change.
	_, err = c.Containers(t.Context())
	check(t, err)
	if n := r.Asked("PodSandboxStatus"); n != 2 {
		t.Errorf("asked for %d networks, want 2", n)
	}
	for _, tt := range []struct {
		id   string
		want Container
	}{
		{id(11), Container{ID: id(11), Name: "agent", Image: "registry/agent:1", Pod: cni, Pid: 4711}},
		{id(1), Container{ID: id(1), Pod: cni, Sandbox: true, Pid: 4700}},
		{id(12), Container{ID: id(12), Name: "web", Image: "registry/web:1", Pod: web}},
	} {
		if got, err := c.Inspect(t.Context(), tt.id); err != nil || fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", tt.want) {
			t.Errorf("got %+v, %v, want %+v", got, err, tt.want)
		}
	}
	c.Networks = false
	r.Networks[id(3)] = runtime.NamespaceMode_NODE
	r.Sandboxes = append(r.Sandboxes, fakecri.Sandbox(id(3), "team", "new", "n", nil))
	asked := r.Asked("PodSandboxStatus")
	if all, err := c.Containers(t.Context()); err != nil || len(all) != 5 || r.Asked("PodSandboxStatus") != asked {
		t.Errorf("names alone: got %d, %v, asked %d times more", len(all), err, r.Asked("PodSandboxStatus")-asked)
	}
	for _, id := range []string{id(99), "", "11", strings.Repeat("x", 64)} {
		if _, err := c.Inspect(t.Context(), id); !errors.Is(err, ErrNoContainer) {
			t.Errorf("%q: got %v, want %v", id, err, ErrNoContainer)
		}
	}
}

// Whatever a runtime says, nothing that is no id, name or uid gets through, and nothing counts as
// having the host's network that is not said to have it.
func TestLies(t *testing.T) {
	r, c := start(t)
	long := strings.Repeat("a", 300)
	r.Sandboxes = []*runtime.PodSandbox{
		fakecri.Sandbox("short", "kube-system", "a", "u", nil),
		fakecri.Sandbox(id(1), "kube-system\n", "a", "u", nil),
		fakecri.Sandbox(id(2), "kube-system", "\x1b[2J", "u", nil),
		fakecri.Sandbox(id(3), "kube-system", "a", "../u", nil),
		fakecri.Sandbox(id(4), long, "a", "u", nil),
		fakecri.Sandbox(id(5), "kube-system", "", "u", nil),
		fakecri.Sandbox(id(6), "kube-system", "network-not-told", "u", nil),
		fakecri.Sandbox(id(7), "kube-system/x", "a", "u", nil),
		{Id: id(8)},
		{Id: id(9), State: runtime.PodSandboxState_SANDBOX_NOTREADY, Metadata: &runtime.PodSandboxMetadata{Namespace: "kube-system", Name: "a", Uid: "u"}},
		nil,
	}
	r.Containers = []*runtime.Container{
		fakecri.Container(id(11), id(6), "\x1b[2J", "image\x1b"),
		fakecri.Container(id(12), "of nobody", "web", long+long+long+long),
		{Id: id(13)}, // only created
		nil,
	}
	r.Pids[id(11)] = "-1"
	all, err := c.Containers(t.Context())
	check(t, err)
	for _, one := range all {
		if one.ID != id(6) && one.ID != id(11) && (one.Pod.Name != "" || one.Pod.Namespace != "") {
			t.Errorf("got a pod: %+v", one)
		}
		if one.Pod.HostNetwork || strings.ContainsAny(one.Name+one.Image, "\x1b") || len(one.Image) > 1024 {
			t.Errorf("got %+v", one)
		}
		if one.ID == id(9) || one.ID == id(13) || len(one.ID) != 64 {
			t.Errorf("%s does not run", one.ID)
		}
	}
	if len(all) != 10 {
		t.Errorf("got %d, want 10: %+v", len(all), all)
	}
	if one, err := c.Inspect(t.Context(), id(11)); err != nil || one.Pid != 0 {
		t.Errorf("got %+v, %v", one, err)
	}
}

// A runtime that does not answer costs a bounded time, and one that does not tell the networks of
// sandboxes still tells the names.
func TestStalls(t *testing.T) {
	r, c := start(t)
	r.Change(func() { r.Stalls["PodSandboxStatus"] = true })
	all, err := c.Containers(t.Context())
	if err != nil || len(all) != 4 {
		t.Errorf("got %+v, %v", all, err)
	}
	for _, one := range all {
		if one.Pod.HostNetwork || !one.Pod.NetworkUnknown {
			t.Errorf("got %+v", one)
		}
	}
	if n := r.Asked("PodSandboxStatus"); n != 1 {
		t.Errorf("asked %d times, want once", n)
	}
	for _, id := range []string{id(1), id(11)} {
		one, err := c.Inspect(t.Context(), id)
		if !errors.Is(err, context.DeadlineExceeded) || one.ID != id || one.Pod.Name == "" || !one.Pod.NetworkUnknown {
			t.Errorf("got %+v, %v", one, err)
		}
	}
	if n := r.Asked("PodSandboxStatus"); n != 2 {
		t.Errorf("asked %d times, want once more", n)
	}
	c.until = time.Time{}
	r.Change(func() { delete(r.Stalls, "PodSandboxStatus") })
	if one, err := c.Inspect(t.Context(), id(11)); err != nil || !one.Pod.HostNetwork {
		t.Errorf("got %+v, %v", one, err)
	}
	r.Change(func() { r.Stalls["*"] = true })
	if _, err := c.Containers(t.Context()); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), c.path) {
		t.Errorf("got %v", err)
	}
}

func TestNoRuntime(t *testing.T) {
	dir := t.TempDir()
	c, err := Open(dir + "/none.sock")
	check(t, err)
	defer c.Close()
	if _, err := c.Containers(t.Context()); !errors.Is(err, fs.ErrNotExist) || c.Running() {
		t.Errorf("got %v", err)
	}
	for _, bad := range []string{"cri.sock", "unix:cri.sock", "tcp://127.0.0.1:1", "unix://cri.sock"} {
		if _, err := Open(bad); !errors.Is(err, ErrEndpoint) {
			t.Errorf("%s: got %v", bad, err)
		}
	}
	// Something that is no runtime.
	if err := os.WriteFile(dir+"/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := Open(dir + "/file")
	check(t, err)
	defer file.Close()
	file.pace.answer = 200 * time.Millisecond
	if _, err := file.Containers(t.Context()); err == nil || file.Running() {
		t.Errorf("got %v", err)
	}
}

// A watcher is told everything that starts and stops, with and without events of the runtime, and
// lists anew after a restart.
func TestWatch(t *testing.T) {
	for _, hasEvents := range []bool{false, true} {
		t.Run(fmt.Sprint("events ", hasEvents), func(t *testing.T) {
			r, c := start(t)
			r.HasEvents = hasEvents
			if hasEvents {
				c.pace.often = time.Minute // only events can tell in time
			}
			ctx, cancel := context.WithCancel(t.Context())
			got := make(chan Event)
			done := make(chan error)
			go func() {
				done <- c.Watch(ctx, nil, func(e Event) {
					select {
					case got <- e:
					case <-ctx.Done():
					}
				})
			}()
			want := func(all ...Event) {
				t.Helper()
				left := map[Event]bool{}
				for _, e := range all {
					left[e] = true
				}
				for len(left) > 0 {
					select {
					case e := <-got:
						e.Err = nil
						if !left[e] {
							t.Fatalf("got %+v, want %v", e, slices.Collect(maps.Keys(left)))
						}
						delete(left, e)
					case <-time.After(20 * time.Second):
						t.Fatalf("still waiting for %v", slices.Collect(maps.Keys(left)))
					}
				}
			}
			want(Event{Action: Resync})
			if hasEvents {
				await(t, func() bool {
					r.Change(func() {}) // until the stream is there
					return r.Asked("ListContainers") > 2
				})
			}
			r.Change(func() {
				r.Sandboxes = append(r.Sandboxes, fakecri.Sandbox(id(3), "team", "new", "n", nil))
				r.Containers = append(r.Containers[1:], fakecri.Container(id(13), id(3), "new", "new"))
			})
			// The sandbox comes before its container.
			want(Event{Action: Stop, ID: id(11)})
			want(Event{Action: Start, ID: id(3)})
			want(Event{Action: Start, ID: id(13)})
			check(t, r.Stop())
			want(Event{Action: Lost})
			r.Containers = nil
			check(t, r.Restart())
			want(Event{Action: Resync})
			cancel()
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A message that a pod was made is a reason to look at once, and often for a while.
func TestWatchMade(t *testing.T) {
	r, c := start(t)
	c.pace.often = time.Minute
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	made, got := make(chan struct{}), make(chan Event)
	go func() {
		_ = c.Watch(ctx, made, func(e Event) {
			select {
			case got <- e:
			case <-ctx.Done():
			}
		})
	}()
	<-got // Resync
	made <- struct{}{}
	asked := r.Asked("ListPodSandbox")
	await(t, func() bool { return r.Asked("ListPodSandbox") > asked+2 })
	r.Change(func() { r.Sandboxes = append(r.Sandboxes, fakecri.Sandbox(id(3), "team", "new", "n", nil)) })
	if e := <-got; e != (Event{Action: Start, ID: id(3)}) {
		t.Errorf("got %+v", e)
	}
}

func await(t *testing.T, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// A runtime without events is asked for them again only after it was started again.
func TestWatchWithoutEvents(t *testing.T) {
	r, c := start(t)
	c.pace.rarely = time.Second / 10
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	var lost atomic.Bool
	go func() {
		done <- c.Watch(ctx, nil, func(e Event) {
			if e.Action == Lost {
				lost.Store(true)
			}
		})
	}()
	lists := func(n int) {
		t.Helper()
		from := r.Asked("ListContainers")
		await(t, func() bool { return r.Asked("ListContainers") >= from+n })
	}
	lists(20)
	// The first call may be before the first list.
	before := r.Asked("GetContainerEvents")
	if before < 1 || before > 2 {
		t.Errorf("asked for events %d times", before)
	}
	check(t, r.Stop())
	await(t, lost.Load)
	check(t, r.Restart())
	await(t, func() bool { return r.Asked("GetContainerEvents") > before })
	lists(10)
	if got := r.Asked("GetContainerEvents"); got > before+2 {
		t.Errorf("asked for events %d times after a restart", got-before)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// Networks that could not be had are asked for again, and who they matter to is told.
func TestWatchNetworks(t *testing.T) {
	r, c := start(t)
	c.pace.rarely = 50 * time.Millisecond
	r.Change(func() { r.Stalls["PodSandboxStatus"] = true })
	got := make(chan Event, 100)
	go func() { _ = c.Watch(t.Context(), nil, func(e Event) { got <- e }) }()
	if e := <-got; e.Action != Resync {
		t.Fatalf("got %+v", e)
	}
	_, err := c.Containers(t.Context())
	check(t, err)
	r.Change(func() { delete(r.Stalls, "PodSandboxStatus") })
	left := map[string]bool{id(1): true, id(2): true, id(11): true, id(12): true}
	for len(left) > 0 {
		select {
		case e := <-got:
			if e.Action != Start || !left[e.ID] {
				t.Fatalf("got %+v, want %v", e, left)
			}
			delete(left, e.ID)
		case <-time.After(20 * time.Second):
			t.Fatalf("still waiting for %v", left)
		}
	}
	if one, err := c.Inspect(t.Context(), id(11)); err != nil || !one.Pod.HostNetwork || one.Pod.NetworkUnknown {
		t.Errorf("got %+v, %v", one, err)
	}
}

// Nothing is kept of pods that are gone.
func TestWatchForgets(t *testing.T) {
	r, c := start(t)
	got := make(chan Event, 100)
	go func() { _ = c.Watch(t.Context(), nil, func(e Event) { got <- e }) }()
	<-got // Resync
	_, err := c.Containers(t.Context())
	check(t, err)
	r.Change(func() { r.Sandboxes, r.Containers = nil, nil })
	await(t, func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.networks) == 0
	})
}

// A runtime that tells each event to one follower alone is not asked for them, so that the kubelet
// misses none.
func TestWatchTakesNoEvents(t *testing.T) {
	for is, follows := range map[[2]string]bool{
		{"containerd", "v1.7.27"}: false, {"containerd", "1.6.36"}: false, {"containerd", "v1.7.21-k3s2"}: false,
		{"containerd", "v2.1.0"}: true, {"cri-o", "1.27.4"}: false, {"cri-o", "1.34.0"}: true, {"docker", "1.2.3"}: true,
	} {
		r, c := start(t)
		r.HasEvents, r.Is = true, &runtime.VersionResponse{RuntimeName: is[0], RuntimeVersion: is[1]}
		c.pace.rarely = 10 * time.Millisecond
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- c.Watch(ctx, nil, func(Event) {}) }()
		if follows {
			await(t, func() bool { return r.Following() > 0 })
		} else {
			await(t, func() bool { return r.Asked("Version") > 3 })
			if n := r.Following(); n != 0 {
				t.Errorf("%s: %d follow its events", is, n)
			}
		}
		cancel()
		<-done
	}
}

// Events in a flood do not make a slow runtime list all the time.
func TestWatchFlood(t *testing.T) {
	r, c := start(t)
	c.pace.often, c.pace.soon = time.Second, time.Millisecond
	r.HasEvents, r.Delay = true, 20*time.Millisecond
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- c.Watch(ctx, nil, func(Event) {}) }()
	await(t, func() bool { return r.Following() > 0 })
	begun, asked := time.Now(), r.Asked("ListPodSandbox")
	for time.Since(begun) < 2*time.Second {
		r.Change(func() {})
		time.Sleep(time.Millisecond)
	}
	n, took := r.Asked("ListPodSandbox")-asked, time.Since(begun)
	// Each list is two answers, and is followed by a rest of ten times as long.
	if n < 1 || n > 2+int(took/(400*time.Millisecond)) {
		t.Errorf("%d lists in %v, each of which takes 40 ms", n, took)
	}
	cancel()
	<-done
}
