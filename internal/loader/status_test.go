package loader_test

import (
	"strings"
	"testing"

	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// StatusAfter sees at once what starts, and what is uncovered; within eight calls, which policed
// container has ended.
func TestStatusAfter(t *testing.T) {
	unlock, err := testenv.LockHost()
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	filter, base := testenv.Filter(t), testenv.Cgroup(t)
	parent, other := testenv.Child(t, base, "docker"), testenv.Child(t, base, "other")
	if err := filter.Attach(t.Context(), []string{parent}, policy.Default()); err != nil {
		t.Fatal(err)
	}
	run := func(parent, digit string) (id string, stop func()) {
		t.Helper()
		id = strings.Repeat(digit, 64)
		cmd := testenv.Command(t, testenv.Child(t, parent, id), "sleep", "60")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		stop = func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
		t.Cleanup(stop)
		return id, stop
	}
	before, err := filter.StatusAfter(nil)
	if err != nil {
		t.Fatal(err)
	}
	after := func() (runs func(id string) bool, uncovered func(id string) bool) {
		t.Helper()
		s, err := filter.StatusAfter(before)
		if err != nil {
			t.Fatal(err)
		}
		before = s
		return func(id string) bool { return s.Named[id] }, func(id string) bool {
			for _, u := range s.Uncovered {
				if u.ID == id {
					return true
				}
			}
			return false
		}
	}

	policed, end := run(parent, "a")
	open, endOpen := run(other, "b")
	for range 20 {
		if runs, uncovered := after(); !runs(policed) || !runs(open) || uncovered(policed) || !uncovered(open) {
			t.Errorf("policed: %v, %v; other: %v, %v", runs(policed), uncovered(policed), runs(open), uncovered(open))
		}
	}
	end()
	endOpen()
	if runs, uncovered := after(); runs(open) || uncovered(open) {
		t.Error("one that has ended is uncovered")
	}
	for i := 0; ; i++ {
		if runs, _ := after(); !runs(policed) {
			break
		} else if i == 8 {
			t.Fatal("a container that has ended runs")
		}
	}
}
