// Package lab is a network on one machine for end-to-end tests: containers, a host that
// forwards their packets, and a server that sees what arrives. It consists of network
// namespaces with no way out, and none of it outlives the tests.
package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// AgentArg, as the first argument of a program that calls Main, makes it an agent.
const AgentArg = "lab-agent"

// baseVar in the environment marks the process that runs the tests.
const baseVar = "EGRESSBPF_LAB_CGROUP"

// Main is the TestMain of a package whose tests use the lab. It runs the tests in a child
// process with its own PID and mount namespaces and a fresh bpffs at /sys/fs/bpf, and
// removes what they leave. Whether the tests pass, fail, panic or run out of time, their
// processes, mounts, pins, temporary files and the cgroups (given by path below the cgroup2
// mount) end with them.
//
// prepare, if not nil, runs in the child before the tests.
func Main(m *testing.M, prepare func() error, cgroups ...string) {
	if len(os.Args) > 1 && os.Args[1] == AgentArg {
		serveAgent()
	}
	if len(os.Args) > 2 && os.Args[1] == firstArg {
		sendFirst(os.Args[2:])
	}
	if os.Getenv(baseVar) == "" {
		code, err := supervise(cgroups)
		if err != nil {
			fmt.Fprintln(os.Stderr, "lab:", err)
			code = max(code, 1)
		}
		os.Exit(code)
	}
	err := enterMounts()
	if err == nil && prepare != nil {
		err = prepare()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// supervise runs this program again in the namespaces and returns its exit code.
func supervise(cgroups []string) (code int, err error) {
	// One lab at a time: the filter's status shows all containers of the host.
	unlock, err := testenv.LockHost()
	if err != nil {
		return 1, err
	}
	defer unlock()
	root, err := cgroup.FindRoot()
	if err != nil {
		return 1, err
	}
	for _, rel := range cgroups {
		path := root.Path(rel)
		// If no process is in it, a run that was killed has left it.
		events, err := os.ReadFile(filepath.Join(path, "cgroup.events"))
		if err == nil {
			if !strings.Contains(string(events), "populated 0") {
				return 1, fmt.Errorf("%s is in use", path)
			}
			err = removeCgroup(path)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 1, err
		}
		defer func() { err = errors.Join(err, removeCgroup(path)) }()
	}
	temp, err := os.MkdirTemp("", "egressbpf-lab-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()

	// An interrupt ends the child; this process still has to clean up.
	signal.Notify(make(chan os.Signal, 1), os.Interrupt, unix.SIGTERM)
	runtime.LockOSThread() // Pdeathsig is about the thread.
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), baseVar+"="+cgroups[0], "TMPDIR="+temp)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		Pdeathsig:  unix.SIGKILL,
	}
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		return 1, err
	}
	return max(cmd.ProcessState.ExitCode(), btoi(cmd.ProcessState.ExitCode() < 0)), nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func enterMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount /sys/fs/bpf: %w", err)
	}
	return nil
}

// Cgroup makes a cgroup below the first cgroup of Main, to be policed. It is removed after
// the test.
func Cgroup(t testing.TB) string {
	t.Helper()
	root, err := cgroup.FindRoot()
	if err != nil {
		t.Fatal(err)
	}
	base := root.Path(os.Getenv(baseVar))
	if err := os.MkdirAll(base, 0o755); err != nil {
		t.Fatal(err)
	}
	path, err := os.MkdirTemp(base, "policed-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := removeCgroup(path); err != nil {
			t.Error(err)
		}
	})
	return path
}

// removeCgroup removes a cgroup and those below it, and kills the processes in them.
func removeCgroup(path string) error {
	var all []string
	err := filepath.WalkDir(path, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			all = append(all, path)
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0); err != nil {
		return err
	}
	deadline := time.Now().Add(patience)
	for _, dir := range slices.Backward(all) {
		// A killed process stays in the cgroup until it is reaped.
		for err := unix.Rmdir(dir); err != nil; err = unix.Rmdir(dir) {
			if err != unix.EBUSY || time.Now().After(deadline) {
				return fmt.Errorf("remove %s: %w", dir, err)
			}
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}

// patience is how long the lab waits for something that must happen.
const patience = 2 * time.Minute

// answerPatience is how long an agent waits for what the filter may keep from happening.
const answerPatience = 20 * time.Second
