package main

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/bench/lab"
)

// supervised says that this process is the one that supervise has started.
const supervised = "EGRESSBPF_BENCH_SUPERVISED"

// errSaid means that the process has said what failed.
var errSaid = errors.New("")

// supervise runs this command again, in a mount namespace of its own. Filters are pinned in
// that namespace and networks are held by that process, so that all of it ends with the
// process, whatever ends that. Only the cgroups do not, and are removed here.
func supervise() (err error) {
	// The process ends with this thread.
	runtime.LockOSThread()
	if err := lab.RemoveCgroups(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.RemoveCgroups()) }()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), supervised+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// A group of its own, so that a signal from the terminal arrives once.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL, Setpgid: true}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM)
	if err := cmd.Start(); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err = <-done:
		var status *exec.ExitError
		if errors.As(err, &status) && status.ExitCode() == 1 {
			return errSaid
		}
		return err
	case s := <-signals:
		// The whole group, with the commands that it runs.
		unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		<-done
		return errors.New(s.String())
	}
}
