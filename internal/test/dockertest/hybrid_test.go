package dockertest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// TestHybrid makes Docker use cgroup v1 on systemd's hybrid layout, beside the unified
// hierarchy.
func TestHybrid(t *testing.T) {
	hybridCgroups(t)
	n := lab.New(t)
	e := startEngine(t, n)
	host := "unix://" + e.path("socket")
	n.Egressbpf(t, "attach")
	t.Cleanup(func() { n.Egressbpf(t, "detach") })
	if got := e.docker(t, "info", "-f", "{{.CgroupVersion}}"); got != "1" {
		t.Fatalf("the engine uses cgroup v%s", got)
	}
	if exit := n.Run(t, exec.Command(lab.Binary(t), "check", "--docker-host", host)); exit.Code != 0 || !strings.Contains(exit.Stdout, "runc before 1.1") {
		t.Errorf("check: exit code %d\n%s%s", exit.Code, exit.Stdout, exit.Stderr)
	}
	c := e.run(t, "hybrid")
	seen := e.Capture(t)
	expectMetadataRefused(t, c.Agent)
	c.ConnectAtOnce(at(lab.Mail4, 25), 60)
	expectBurst(t, seen.Settle(t), 60)
	if got := row(t, n, c.id); got.Blocked.Connects != 3 || got.Blocked.Packets != 2 || got.SMTP.Allowed != 5 {
		t.Errorf("counted %+v", got)
	}
	if exit := n.Run(t, exec.Command(lab.Binary(t), "status", "--docker-host", host)); exit.Code != 0 {
		t.Errorf("status: exit code %d\n%s%s", exit.Code, exit.Stdout, exit.Stderr)
	}

	// An older runc leaves the container in the engine's cgroup: egressbpf's own, too.
	e.importImage(t, toolImage, executable(t, "egressbpf", lab.Binary(t)), executable(t, "bin/busybox", "/usr/bin/busybox"))
	own := e.command("run", "--rm", "--cap-add=SYS_ADMIN", "--cap-add=NET_ADMIN", "--cap-add=DAC_READ_SEARCH", "--cap-add=SYS_PTRACE",
		"--volume=/sys/fs/cgroup:/sys/fs/cgroup", "--volume=/sys/fs/bpf:/sys/fs/bpf", toolImage,
		"/bin/busybox", "sh", "-c", "echo 0 > /sys/fs/cgroup/unified/cgroup.procs && exec /egressbpf status")
	if exit := lab.Run(t, own); exit.Code != 3 || !strings.Contains(exit.Stderr, "--pid=host") {
		t.Errorf("status in a container: exit code %d\n%s%s", exit.Code, exit.Stdout, exit.Stderr)
	}
	pid := e.docker(t, "inspect", "-f", "{{.State.Pid}}", "hybrid")
	if err := os.WriteFile(filepath.Join(cgroups, "unified/cgroup.procs"), []byte(pid), 0); err != nil {
		t.Fatal(err)
	}
	exit := n.Run(t, exec.Command(lab.Binary(t), "status", "--docker-host", host))
	if exit.Code != 3 || !strings.Contains(exit.Stdout, "\nhybrid       /\n") {
		t.Errorf("status: exit code %d\n%s%s", exit.Code, exit.Stdout, exit.Stderr)
	}
}

// hybridCgroups sets up systemd's hybrid layout until the test ends, with the v1
// hierarchies that this machine has.
func hybridCgroups(t *testing.T) {
	t.Helper()
	mount := func(source, target, kind, options string) {
		t.Helper()
		err := os.MkdirAll(target, 0o755)
		if err == nil {
			err = unix.Mount(source, target, kind, 0, options)
		}
		if err != nil {
			t.Fatalf("mount %s with %q: %v", target, options, err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
				t.Errorf("unmount %s: %v", target, err)
			}
		})
	}
	of, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(of), "devices") {
		t.Skip("this machine has all controllers in the unified hierarchy: Docker could not use v1")
	}
	mount("tmpfs", cgroups, "tmpfs", "mode=755")
	mount("cgroup2", filepath.Join(cgroups, "unified"), "cgroup2", "")
	for line := range strings.Lines(string(of)) {
		// HIERARCHY:CONTROLLERS:PATH
		fields := strings.SplitN(line, ":", 3)
		if number, err := strconv.Atoi(fields[0]); err != nil || number == 0 {
			continue
		}
		dir := filepath.Join(cgroups, strings.TrimPrefix(fields[1], "name="))
		options := fields[1]
		if strings.HasPrefix(options, "name=") {
			options = "none," + options
		}
		mount("cgroup", dir, "cgroup", options)
		// The engine leaves its own cgroups behind.
		t.Cleanup(func() { _ = os.Remove(filepath.Join(dir, "docker")) })
	}
}
