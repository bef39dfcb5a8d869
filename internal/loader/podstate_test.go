package loader_test

import (
	"fmt"
	"testing"

	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// What is set for a pod holds for the containers that are made in it from then on, for no others,
// and no longer than the pod's cgroup or the next attach.
func TestPods(t *testing.T) {
	h := newHost(t)
	h.mkdir("own.slice/kubepods/podone", "own.slice/kubepods/podtwo", "own.slice/kubepods/podone/"+fmt.Sprintf("%064x", 1))
	h.mustAttach(policy.Default(), "own.slice")
	change := func(do func(*maps.State) error) {
		t.Helper()
		state, err := h.State()
		check(t, err)
		defer state.Close()
		check(t, do(state))
	}
	want := maps.Pod{Flags: maps.MayReachMetadata | maps.FlagsOf("packet"), Limit: policy.Limit{Rate: policy.Rate{Count: 7, Period: 60e9}, Burst: 7}}
	pod := h.id("own.slice/kubepods/podone")
	change(func(s *maps.State) error { return s.SetPod(pod, want) })
	n := 1
	made := func(in string) maps.Pod {
		t.Helper()
		n++
		at := fmt.Sprintf("own.slice/kubepods/%s/%064x", in, n)
		h.mkdir(at)
		var got maps.Pod
		change(func(s *maps.State) error {
			c, ok, err := s.Container(h.id(at))
			if !ok {
				t.Errorf("%s has no state", at)
			}
			got = maps.Pod{Flags: c.Flags, Limit: maps.PolicyLimit(c.Limit)}
			return err
		})
		return got
	}
	for range 2 {
		if got := made("podone"); got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	if got := made("podtwo"); got != (maps.Pod{}) {
		t.Errorf("a container of another pod has %+v", got)
	}
	if got := made("podone/" + fmt.Sprintf("%d", 1)); got != (maps.Pod{}) {
		t.Errorf("a container below another cgroup of the pod has %+v", got)
	}
	change(func(s *maps.State) error {
		if c, ok, err := s.Container(h.id(fmt.Sprintf("own.slice/kubepods/podone/%064x", 1))); !ok || err != nil || c.Flags != 0 {
			t.Errorf("a container from before has %+v, %v", c, err)
		}
		if got, err := s.Pod(pod); err != nil || got != want {
			t.Errorf("got %+v, %v", got, err)
		}
		return s.SetPod(pod, maps.Pod{})
	})
	if got := made("podone"); got != (maps.Pod{}) {
		t.Errorf("nothing is set any more, but a container has %+v", got)
	}

	all := func() (pods map[uint64]maps.Pod) {
		t.Helper()
		change(func(s *maps.State) (err error) { pods, err = s.Pods(); return err })
		return pods
	}
	two := h.id("own.slice/kubepods/podtwo")
	change(func(s *maps.State) error { return s.SetPod(two, want) })
	if got := all(); len(got) != 1 || got[two] != want {
		t.Errorf("got %+v", got)
	}
	check(t, removeAll(h.base+"/own.slice/kubepods/podtwo"))
	if got := all(); len(got) != 0 {
		t.Errorf("after the pod has gone: %+v", got)
	}
	change(func(s *maps.State) error { return s.SetPod(pod, want) })
	h.mustAttach(policy.Default(), "own.slice")
	if got := all(); len(got) != 0 {
		t.Errorf("after another attach: %+v", got)
	}
	if got := made("podone"); got != (maps.Pod{}) {
		t.Errorf("after another attach a container has %+v", got)
	}
}

// A map without room for another pod is no error: its containers get their rules later.
func TestPodsWithoutRoom(t *testing.T) {
	state, err := maps.CreateState()
	check(t, err)
	defer state.Close()
	for id := range uint64(5000) {
		check(t, state.SetPod(id+1, maps.Pod{Flags: maps.MayReachMetadata}))
	}
	pods, err := state.Pods()
	check(t, err)
	if len(pods) != 4096 {
		t.Errorf("got %d", len(pods))
	}
	check(t, state.ForgetPods())
	if pods, err = state.Pods(); err != nil || len(pods) != 0 {
		t.Errorf("got %d, %v", len(pods), err)
	}
}
