package e2e

import (
	"os/exec"
	"testing"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// lastMap makes a map and returns its id. The kernel numbers maps in the order in which they
// are made.
func lastMap(t *testing.T) ebpf.MapID {
	t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	return id
}

// The commands that read make no map in the kernel, from their first instruction to their
// last; and no program, which would come with a map of its constants.
func TestReadingMakesNoMap(t *testing.T) {
	s := newScene(t)
	s.attach()
	lastMap(t) // the library probes, the first time
	for _, args := range [][]string{{"stats"}, {"status"}, {"limit", "get", "a"}, {"version"}} {
		before := lastMap(t)
		exit := s.Run(t, exec.Command(lab.Binary(t), args...))
		if after := lastMap(t); after != before+1 {
			t.Errorf("egressbpf %q made %d maps", args, after-before-1)
		}
		if exit.Code != 0 && exit.Code != 3 {
			t.Errorf("egressbpf %q: exit code %d\n%s", args, exit.Code, exit.Stderr)
		}
	}
}
