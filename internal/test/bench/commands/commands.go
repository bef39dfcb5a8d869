// Package commands measures how much CPU time the commands of egressbpf and its service take
// on a host with many containers.
package commands

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/test/bench/results"
	"github.com/egressbpf/egressbpf/internal/test/fakedocker"
)

// Part is the part of a run that this package measures.
const Part = "commands"

const (
	few, many = 1_000, 10_000 // containers
	burst     = 100           // of starts
	patience  = 2 * time.Minute
	// Between starts that are measured one by one, the CPU does other work, or sleeps.
	singles, pause = 10, 200 * time.Millisecond
)

// Measure measures a binary of egressbpf, such as bin/egressbpf, several rounds. It needs
// root, 2 GiB of memory for the processes of 10,000 containers, and half a minute besides
// some 5 s for each round.
func Measure(binary string, rounds int) ([]results.Cost, error) {
	binary, err := filepath.Abs(binary)
	if err != nil {
		return nil, err
	}
	var costs []results.Cost
	for _, n := range []int{few, many} {
		more, err := measure(binary, n, rounds, n == few)
		if err != nil {
			return nil, fmt.Errorf("with %d containers: %w", n, err)
		}
		costs = append(costs, more...)
	}
	return costs, nil
}

// measure measures the commands beside a number of containers, and the service if starts is
// set.
func measure(binary string, containers, rounds int, starts bool) ([]results.Cost, error) {
	var costs []*results.Cost
	cost := func(operation string) *results.Cost {
		c := &results.Cost{Part: Part, Operation: operation, Filter: "egressbpf", Containers: containers, CPUs: 1, Unit: "ns"}
		costs = append(costs, c)
		return c
	}
	attach, status, stats := cost("attach"), cost("status"), cost("stats")
	var start, single *results.Cost
	if starts {
		start = cost("container start in a burst, service's CPU")
		single = cost("container start after a pause, service's CPU")
	}
	err := onHost(binary, func(h *host) error {
		for n := range containers {
			if err := h.startContainer(n); err != nil {
				return err
			}
		}
		for range rounds {
			for _, c := range []struct {
				cost *results.Cost
				args []string
			}{
				{attach, []string{"attach", "--cgroup", h.slice}},
				{status, []string{"status"}},
				{stats, []string{"stats"}},
				{nil, []string{"detach"}},
			} {
				took, err := h.run(c.args...)
				if err != nil {
					return err
				}
				if c.cost != nil {
					c.cost.Samples = append(c.cost.Samples, float64(took))
				}
			}
			if start == nil {
				continue
			}
			for _, c := range []struct {
				cost  *results.Cost
				n     int
				pause time.Duration
			}{{start, burst, 0}, {single, singles, pause}} {
				took, err := h.measureStarts(containers, c.n, c.pause)
				if err != nil {
					return err
				}
				c.cost.Samples = append(c.cost.Samples, float64(took)/float64(c.n))
			}
		}
		return nil
	})
	var found []results.Cost
	for _, c := range costs {
		found = append(found, *c)
	}
	return found, err
}

// host is a host of containers: a cgroup with their cgroups, mount and network namespaces for
// the filter, and a Docker daemon that knows the containers.
type host struct {
	binary string
	root   cgroup.Root
	slice  string // the containers' parent
	dir    string // for all files
	docker *fakedocker.Daemon
	// running are the containers' processes.
	running map[int]*exec.Cmd
}

// onHost makes a host, calls do, and removes the host. do must start all processes from its own
// goroutine.
func onHost(binary string, do func(*host) error) error {
	done := make(chan error)
	go func() {
		// The thread ends with the goroutine, and with it the namespaces.
		runtime.LockOSThread()
		done <- inNamespaces(binary, do)
	}()
	return <-done
}

func inNamespaces(binary string, do func(*host) error) (err error) {
	root, err := cgroup.FindRoot()
	if err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("make namespaces: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make the mounts private: %w", err)
	}
	dir, err := os.MkdirTemp("", "egressbpf-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	bpffs := filepath.Join(dir, "bpf")
	if err := os.Mkdir(bpffs, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("bpf", bpffs, "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount a bpf filesystem: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(bpffs, unix.MNT_DETACH)) }()
	slice, err := os.MkdirTemp(string(root), "egressbpf-bench-*.slice")
	if err != nil {
		return err
	}
	h := &host{binary: binary, root: root, slice: slice, dir: dir, docker: fakedocker.New(filepath.Join(dir, "docker.sock")), running: map[int]*exec.Cmd{}}
	defer func() { err = errors.Join(err, h.remove()) }()
	if err := h.docker.Start(); err != nil {
		return err
	}
	defer h.docker.Stop()
	err = do(h)
	_, detach := h.run("detach")
	return errors.Join(err, detach)
}

// remove ends the containers and removes their cgroups.
func (h *host) remove() error {
	var errs []error
	for n := range h.running {
		errs = append(errs, h.stopContainer(n))
	}
	return errors.Join(append(errs, unix.Rmdir(h.slice))...)
}

func id(n int) string { return fmt.Sprintf("%064x", n) }

func (h *host) cgroup(n int) string { return filepath.Join(h.slice, "docker-"+id(n)+".scope") }

// startContainer makes a container that Docker knows, and does not tell of it.
func (h *host) startContainer(n int) error {
	path := h.cgroup(n)
	if err := os.Mkdir(path, 0o755); err != nil {
		return err
	}
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	cmd := exec.Command("sleep", "infinity")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	h.running[n] = cmd
	h.docker.SetProcess(id(n), cmd.Process.Pid)
	h.docker.Add(id(n), fmt.Sprint("container-", n), map[string]string{"metadata": "yes"})
	return nil
}

// stopContainer ends a container.
func (h *host) stopContainer(n int) error {
	cmd := h.running[n]
	delete(h.running, n)
	h.docker.Remove(id(n))
	if err := cmd.Process.Kill(); err != nil {
		return err
	}
	_ = cmd.Wait() // it was killed
	// The kernel needs a moment to take the process out of its cgroup.
	return eventually(func() (bool, error) {
		err := unix.Rmdir(h.cgroup(n))
		if errors.Is(err, unix.EBUSY) {
			return false, nil
		}
		return true, err
	})
}

func (h *host) pins() string { return filepath.Join(h.dir, "bpf", "egressbpf") }

func (h *host) command(args ...string) *exec.Cmd {
	cmd := exec.Command(h.binary, append(args, "--pin-path", h.pins(), "--docker-host", "unix://"+h.docker.Socket)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// run runs a command of egressbpf and returns its CPU time.
func (h *host) run(args ...string) (time.Duration, error) {
	var stderr bytes.Buffer
	cmd := h.command(args...)
	cmd.Stderr = &stderr
	err := cmd.Run()
	// status says by 3 that containers beside these are not policed.
	if cmd.ProcessState == nil || !(cmd.ProcessState.Success() || cmd.ProcessState.ExitCode() == 3) {
		return 0, fmt.Errorf("egressbpf %s: %w: %s", args[0], err, stderr.String())
	}
	return cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

// measureStarts returns the CPU time that the service takes for n starts, with a pause before
// each.
func (h *host) measureStarts(others, n int, pause time.Duration) (took time.Duration, err error) {
	s, err := h.startService()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := s.waitFor(others); err != nil {
		return 0, err
	}
	for i := range n {
		if err := h.startContainer(others + i); err != nil {
			return 0, err
		}
	}
	before, err := s.settled()
	if err != nil {
		return 0, err
	}
	for i := range n {
		time.Sleep(pause)
		h.docker.Tell("start", id(others+i))
	}
	if err := s.waitFor(others + n); err != nil {
		return 0, err
	}
	after, err := s.cpu()
	for i := range n {
		err = errors.Join(err, h.stopContainer(others+i))
	}
	return after - before, err
}

// service is egressbpf run.
type service struct {
	*exec.Cmd
	host *host
	log  bytes.Buffer
}

func (h *host) startService() (*service, error) {
	config := filepath.Join(h.dir, "config.yaml")
	text := fmt.Sprintf("cgroups: [%s]\ncontainers:\n  - label: metadata=yes\n    metadata: allow\n", h.slice)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	s := &service{Cmd: h.command("run", "--config", config), host: h}
	s.Stderr = &s.log
	return s, s.Start()
}

func (s *service) stop() error {
	if err := s.Process.Signal(unix.SIGTERM); err != nil {
		return err
	}
	if err := s.Wait(); err != nil {
		return fmt.Errorf("egressbpf run: %w: %s", err, s.log.String())
	}
	return nil
}

// cpu returns the CPU time that the service has taken.
func (s *service) cpu() (time.Duration, error) {
	// The clock of a process, as clock_getcpuclockid(3) makes it.
	clock := int32(^s.Process.Pid)<<3 | 2
	var ts unix.Timespec
	if err := unix.ClockGettime(clock, &ts); err != nil {
		return 0, fmt.Errorf("read the CPU time of the service: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// settled waits until the service has done what it does at its start, and returns the CPU time
// that it has taken.
func (s *service) settled() (now time.Duration, err error) {
	const look, idle = 200 * time.Millisecond, 10 * time.Millisecond
	err = eventually(func() (bool, error) {
		before, err := s.cpu()
		if err != nil {
			return false, err
		}
		time.Sleep(look)
		now, err = s.cpu()
		return now-before < idle, err
	})
	return now, err
}

// waitFor waits until the service has applied its rule to a number of containers.
func (s *service) waitFor(containers int) error {
	filter := loader.New(s.host.pins(), s.host.root)
	err := eventually(func() (bool, error) {
		state, err := filter.State()
		if errors.Is(err, loader.ErrNotAttached) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		defer state.Close()
		known, err := state.Containers()
		n := 0
		for _, c := range known {
			if c.Flags&maps.MayReachMetadata != 0 {
				n++
			}
		}
		return n >= containers, err
	})
	if err != nil {
		return fmt.Errorf("wait for the rule of %d containers: %w", containers, err)
	}
	return nil
}

// eventually waits until ok returns true.
func eventually(ok func() (bool, error)) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if done, err := ok(); done || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return context.DeadlineExceeded
		}
	}
}
