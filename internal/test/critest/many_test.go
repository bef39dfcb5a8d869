package critest

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

var podsOfMany = flag.Int("pods", 40, "the number of pods that TestMany makes")

// awaitAsked waits until a sandbox that tries to reach the metadata service has done so.
func (p *pod) awaitAsked() error {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		pid, _ := os.ReadFile(filepath.Join(p.cgroup(), p.id, "cgroup.procs"))
		name, _ := os.ReadFile(filepath.Join("/proc", strings.TrimSpace(string(pid)), "comm"))
		if string(name) == "asked\n" {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s has not asked: process %q has the name %q", p.config.Metadata.Name, pid, name)
		}
	}
}

// TestMany makes and removes pods whose sandboxes ask the metadata service at once. Some of the pods
// have a rule.
func TestMany(t *testing.T) {
	const atOnce = 4
	pods := *podsOfMany
	n := lab.New(t)
	k := startNode(t, n, hasty)
	s := startService(t, n, systemRule, "--cri-endpoint", endpoint)
	seen := k.Capture(t)
	var mu sync.Mutex
	exempt := map[string]bool{} // addresses

	one := func(i int) error {
		config := k.podConfig("shop", fmt.Sprint("web-", i))
		ruled := i%10 == 0
		switch {
		case ruled:
			config.Metadata.Namespace = "kube-system"
		case i%4 != 1:
			onHost(config) // is faster
		}
		p, err := k.runPod(context.Background(), config)
		if err != nil {
			return err
		}
		if err := p.awaitAsked(); err != nil {
			return err
		}
		if ruled {
			status, err := k.api.PodSandboxStatus(context.Background(), &runtime.PodSandboxStatusRequest{PodSandboxId: p.id})
			if err != nil {
				return err
			}
			mu.Lock()
			exempt[status.GetStatus().GetNetwork().GetIp()] = true
			mu.Unlock()
		}
		return p.remove()
	}
	many := func(from, to int) {
		t.Helper()
		next := numbers(from, to)
		var all sync.WaitGroup
		for range atOnce {
			all.Go(func() {
				for i := range next {
					if err := one(i); err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}

	before := n.Stats(t).Total.Blocked.Connects
	many(0, pods/4)
	warm := s.memory(t)
	begun := time.Now()
	many(pods/4, pods)
	after := s.memory(t)
	t.Logf("%d pods in %v; memory %d KiB, then %d KiB", pods-pods/4, time.Since(begun), warm>>10, after>>10)
	if after > warm+16<<20 {
		t.Errorf("the memory of the service grew from %d to %d bytes", warm, after)
	}
	for _, p := range seen.Settle(t) {
		if p.Dst.Addr() == lab.Metadata4 && !exempt[p.Src.Addr().String()] {
			t.Errorf("arrived: %v", p)
		}
	}
	// One that had its exception in time was not refused.
	refused := int(n.Stats(t).Total.Blocked.Connects - before)
	if refused < pods-len(exempt) || refused > pods {
		t.Errorf("%d attempts of %d pods were refused, of which %d had a rule", refused, pods, len(exempt))
	}

	expectNothingLeft(t)
	if s.said("level=ERROR") > 0 {
		t.Error("the service had an error")
	}
	// The Go runtime lists all goroutines.
	_ = s.end(unix.SIGQUIT)
	const usual = 60
	if n := s.said("\ngoroutine "); n == 0 || n > usual {
		t.Errorf("the service has %d goroutines, want at most %d", n, usual)
	} else {
		t.Logf("%d goroutines", n)
	}
}

// numbers returns a channel of the numbers in a range.
func numbers(from, to int) <-chan int {
	c := make(chan int, to-from)
	defer close(c)
	for i := from; i < to; i++ {
		c <- i
	}
	return c
}

// expectNothingLeft waits until the maps have no entry of a pod, or of a container that is gone or is
// in a pod. The machine may have other containers.
func expectNothingLeft(t *testing.T) {
	t.Helper()
	var left []string
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		left = nil
		withState(t, func(state *maps.State) error {
			containers, err := state.Containers()
			if err != nil {
				return err
			}
			for id, c := range containers {
				if rel, err := testenv.Root(t).Find(id); err != nil || cgroup.OfPod(rel) {
					left = append(left, fmt.Sprintf("container %d, %s (%v): flags %#x", id, rel, err, c.Flags))
				}
			}
			pods, err := state.Pods()
			if err != nil {
				return err
			}
			if len(pods) > 0 {
				left = append(left, fmt.Sprintf("pods: %v", pods))
			}
			room, err := state.Room(containers)
			if room.Removed > 0 || room.Without > 0 {
				left = append(left, fmt.Sprintf("room: %+v", room))
			}
			return err
		})
		if left == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("left:\n%s", strings.Join(left, "\n"))
			return
		}
	}
}

// TestManyQuick makes and removes more pods than containerd could, each with a container that asks
// the metadata service at once, as a runtime without containers tells of them.
func TestManyQuick(t *testing.T) {
	const pods, atOnce = 400, 4
	n := lab.New(t)
	path := filepath.Join(t.TempDir(), "s")
	f := startFake(t, path)
	s := startService(t, n, systemRule, "--cri-endpoint", "unix://"+path)
	network := n.Container(t)
	program, err := buildInpod()
	if err != nil {
		t.Fatal(err)
	}
	seen := n.Capture(t)
	mkdir(t, filepath.Dir(podCgroup(""))) // stays while pods come and go

	one := func(i int) (said string, err error) {
		namespace, uid, id := "shop", newUID(), newID()
		if i%10 == 0 {
			namespace = "kube-system"
		}
		pod := cgroups + podCgroup(uid)
		if err := os.MkdirAll(pod+"/"+id, 0o755); err != nil {
			return "", err
		}
		claim(f, id, namespace, uid)
		cmd := testenv.Command(t, pod+"/"+id, program, metadata, "once")
		var out []byte
		network.Do(func() { out, err = cmd.Output() })
		// One with a rule ends as soon as that is in force, when it is most likely to leave
		// something behind.
		for deadline := time.Now().Add(10 * time.Second); namespace == "kube-system" && !podHas(t, podCgroup(uid)); {
			if time.Now().After(deadline) {
				return "", fmt.Errorf("pod %d has no exception", i)
			}
			time.Sleep(2 * time.Millisecond)
		}
		f.Change(func() {
			f.Sandboxes = slices.DeleteFunc(f.Sandboxes, func(s *runtime.PodSandbox) bool { return s.GetMetadata().GetUid() == uid })
			f.Containers = slices.DeleteFunc(f.Containers, func(c *runtime.Container) bool { return c.GetId() == id })
		})
		for _, dir := range []string{pod + "/" + id, pod} {
			testenv.Eventually(t, "remove "+dir, func() bool { return unix.Rmdir(dir) != unix.EBUSY })
		}
		first, _, _ := strings.Cut(string(out), "\n")
		if namespace == "shop" && first != "connect ECONNREFUSED" {
			t.Errorf("pod %d: %s", i, out)
		}
		return first, err
	}
	before := n.Stats(t).Total.Blocked.Connects
	warm := s.memory(t)
	var reached atomic.Int64
	next := numbers(0, pods)
	var all sync.WaitGroup
	for range atOnce {
		all.Go(func() {
			for i := range next {
				said, err := one(i)
				if err != nil {
					t.Error(err)
				}
				if said == "connect ok" {
					reached.Add(1)
				}
			}
		})
	}
	all.Wait()
	t.Logf("%d of %d pods with a rule had it in time; memory %d KiB, then %d KiB", reached.Load(), pods/10, warm>>10, s.memory(t)>>10)
	syns := map[[2]any]bool{}
	for _, p := range seen.Settle(t) {
		if p.SYN(80) {
			syns[[2]any{p.Src, p.Seq}] = true
		}
	}
	if int64(len(syns)) != reached.Load() {
		t.Errorf("%d connections arrived, want %d", len(syns), reached.Load())
	}
	if refused := int64(n.Stats(t).Total.Blocked.Connects - before); refused != pods-reached.Load() {
		t.Errorf("%d attempts were refused, want %d", refused, pods-reached.Load())
	}
	if after := s.memory(t); after > warm+16<<20 {
		t.Errorf("the memory of the service grew from %d to %d bytes", warm, after)
	}
	expectNothingLeft(t)
	if s.said("level=ERROR") > 0 {
		t.Error("the service had an error")
	}
}
