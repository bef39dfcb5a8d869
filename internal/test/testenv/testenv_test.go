package testenv

import (
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
	left := func() (cgroups, mounts []string) {
		entries, err := os.ReadDir(string(Root(t)))
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			if strings.HasPrefix(entry.Name(), "egressbpf-test-") {
				cgroups = append(cgroups, entry.Name())
			}
		}
		text, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, "egressbpf-test-") {
				mounts = append(mounts, line)
			}
		}
		return cgroups, mounts
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestRemains$")
	cmd.Env = append(os.Environ(), killed+"=1", "TMPDIR="+t.TempDir())
	_ = cmd.Run()
	if cgroups, mounts := left(); len(cgroups) != 1 || len(mounts) != 1 {
		t.Fatalf("after a kill there are %q and %q, want one each", cgroups, mounts)
	}
	PinPath(t)
	if cgroups, mounts := left(); len(cgroups) != 0 || len(mounts) != 1 {
		t.Errorf("there are %q and %q, want no cgroup and one mount, this process's", cgroups, mounts)
	}
}
