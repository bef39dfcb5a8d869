package testenv

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Tests that are killed cannot clean up: the next ones do.
func TestRemains(t *testing.T) {
	if !seesAllProcesses() {
		t.Skip("in a PID namespace, nobody knows whether the process is there")
	}
	const killed = "EGRESSBPF_TEST_KILLED"
	if os.Getenv(killed) != "" {
		Child(t, Cgroup(t), "child")
		PinPath(t)
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestRemains$")
	cmd.Env = append(os.Environ(), killed+"=1", "TMPDIR="+t.TempDir())
	_ = cmd.Run()
	prefix := fmt.Sprintf(remains, cmd.Process.Pid)
	left := func() (cgroups, mounts []string) {
		entries, err := os.ReadDir(string(Root(t)))
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			if strings.HasPrefix(entry.Name(), prefix) {
				cgroups = append(cgroups, entry.Name())
			}
		}
		text, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, prefix) {
				mounts = append(mounts, line)
			}
		}
		return cgroups, mounts
	}
	if cgroups, mounts := left(); len(cgroups) != 1 || len(mounts) != 1 {
		t.Fatalf("after a kill there are %q and %q, want one each", cgroups, mounts)
	}
	PinPath(t)
	if cgroups, mounts := left(); len(cgroups) != 0 || len(mounts) != 0 {
		t.Errorf("there are %q and %q left", cgroups, mounts)
	}
}
