package cgroup_test

import (
	"testing"
	"time"

	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

func TestStarted(t *testing.T) {
	root, base := testenv.Root(t), testenv.Cgroup(t)
	rel, err := root.Rel(base)
	if err != nil {
		t.Fatal(err)
	}
	if at, err := root.Started(rel); err != nil || !at.IsZero() {
		t.Errorf("without a process: got %v, %v", at, err)
	}
	before := time.Now()
	cmd := testenv.Command(t, base, "cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	at, err := root.Started(rel)
	const tick = 10 * time.Millisecond
	if err != nil || at.Before(before.Add(-2*tick)) || at.After(time.Now().Add(tick)) {
		t.Errorf("got %v, %v, want a time since %v", at, err, before)
	}
	in.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
