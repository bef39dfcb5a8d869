// Package testenv makes what tests need in the kernel, and removes it after them:
// cgroups, bpf filesystems, processes. It needs root. A test fails if it cannot have
// what it asks for.
package testenv

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
)

// Root returns the cgroup2 mount.
func Root(t testing.TB) cgroup.Root {
	t.Helper()
	root, err := cgroup.FindRoot()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// LockHost makes other test processes that lock the host wait until unlock is called. It
// is for tests that use something of which there is only one, such as Docker's cgroup.
func LockHost() (unlock func(), err error) {
	root, err := cgroup.FindRoot()
	if err != nil {
		return nil, err
	}
	dir, err := os.Open(string(root))
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		dir.Close()
		return nil, fmt.Errorf("lock %s: %w", root, err)
	}
	return func() { dir.Close() }, nil
}

// patience is how long to wait for what should take no time.
const patience = 2 * time.Minute

var serial atomic.Int64

// remains is the name of what belongs to the tests of a process.
const remains = "egressbpf-test-%d"

// removeRemains removes what tests of a killed process left: other tests would see its filters.
var removeRemains = sync.OnceFunc(func() {
	if !seesAllProcesses() {
		return
	}
	isRemains := func(name string) bool {
		var pid int
		if n, _ := fmt.Sscanf(name, remains, &pid); n == 0 {
			return false
		}
		return unix.Kill(pid, 0) == unix.ESRCH
	}
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 1 && isRemains(fields[0]) {
			_ = unix.Unmount(fields[1], unix.MNT_DETACH)
		}
	}
	root, err := cgroup.FindRoot()
	if err != nil {
		return
	}
	entries, _ := os.ReadDir(string(root))
	for _, entry := range entries {
		if isRemains(entry.Name()) {
			_ = removeCgroup(root.Path("/" + entry.Name()))
		}
	}
})

// seesAllProcesses says whether this process is in the first PID namespace.
func seesAllProcesses() bool {
	const first = 0xeffffffc // PROC_PID_INIT_INO of linux/proc_ns.h
	var namespace unix.Stat_t
	return unix.Stat("/proc/self/ns/pid", &namespace) == nil && namespace.Ino == first
}

// Cgroup makes a cgroup directly below the root and returns its path. It is
// removed after the test, with the cgroups below it; processes in it are killed.
func Cgroup(t testing.TB) string {
	t.Helper()
	path := CgroupName(t)
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// CgroupName returns the path of a cgroup that does not exist. If the test makes that
// cgroup, it is removed as by Cgroup.
func CgroupName(t testing.TB) string {
	t.Helper()
	removeRemains()
	path := Root(t).Path(fmt.Sprintf("/"+remains+"-%d", os.Getpid(), serial.Add(1)))
	t.Cleanup(func() {
		if err := removeCgroup(path); err != nil && !os.IsNotExist(err) {
			t.Errorf("remove %s: %v", path, err)
		}
	})
	return path
}

// Child makes a cgroup below another one.
func Child(t testing.TB, parent, name string) string {
	t.Helper()
	path := filepath.Join(parent, name)
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// removeCgroup removes a cgroup and those below it, and kills the processes in them.
func removeCgroup(path string) error {
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeCgroup(filepath.Join(path, entry.Name())); err != nil {
				return err
			}
		}
	}
	// cgroup.kill needs 5.14.
	if pids, err := os.ReadFile(filepath.Join(path, "cgroup.procs")); err == nil {
		for pid := range strings.FieldsSeq(string(pids)) {
			var n int
			fmt.Sscan(pid, &n)
			_ = unix.Kill(n, unix.SIGKILL)
		}
	}
	// A killed process stays in the cgroup until it is reaped.
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if err := unix.Rmdir(path); err != unix.EBUSY || time.Now().After(deadline) {
			return err
		}
	}
}

// PinPath mounts a bpf filesystem for the test and returns a pin path in it that does not
// exist.
func PinPath(t testing.TB) string {
	t.Helper()
	removeRemains()
	dir := t.TempDir()
	if err := unix.Mount(fmt.Sprintf(remains, os.Getpid()), dir, "bpf", 0, "mode=0700"); err != nil {
		t.Fatalf("mount a bpf filesystem: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return filepath.Join(dir, "egressbpf")
}

// Filter returns a filter with a pin path of its own. It is detached after the test.
func Filter(t testing.TB) *loader.Filter {
	t.Helper()
	f := loader.New(PinPath(t), Root(t))
	t.Cleanup(func() {
		if err := f.Detach(context.Background(), nil); err != nil {
			t.Errorf("detach: %v", err)
		}
	})
	return f
}

// Command returns a command that is in a cgroup from its first instruction.
func Command(t testing.TB, cgroupPath, name string, args ...string) *exec.Cmd {
	t.Helper()
	dir, err := os.Open(cgroupPath)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL}
	return cmd
}

// Enter moves the test process into a cgroup until the test ends.
func Enter(t testing.TB, cgroupPath string) {
	t.Helper()
	home, err := cgroup.OfProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	move := func(path string) {
		if err := os.WriteFile(filepath.Join(path, "cgroup.procs"), []byte("0"), 0); err != nil {
			t.Fatal(err)
		}
	}
	move(cgroupPath)
	t.Cleanup(func() { move(Root(t).Path(home)) })
}

// Eventually waits until a condition is true that no event announces. It fails the test if
// that takes too long.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not after %v", what, patience)
		}
	}
}
