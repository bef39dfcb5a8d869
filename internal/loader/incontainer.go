package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/pins"
)

var (
	// ErrOwnPIDs means that this process is in a container that has a PID namespace of its own.
	// It does not see the processes of other containers, nor whether the bpf filesystem is the
	// host's.
	ErrOwnPIDs = errors.New("this container has a PID namespace of its own")
	// ErrOwnNetwork means that this process is in a container that does not have the host's
	// network namespace. The host side would judge nothing there, and end with the container.
	ErrOwnNetwork = errors.New("this container has a network namespace of its own")
	// ErrNotMounted means that the host has no bpf filesystem at the pin path.
	ErrNotMounted = pins.ErrNotMounted
	// ErrHidden means that this process may not look at the host's first process.
	ErrHidden = pins.ErrHidden
	// ErrNoBPF means that this process may not use bpf(2), although it has the capabilities.
	ErrNoBPF = errors.New("the system call bpf is not permitted to this process, although it has the capabilities")
)

// CheckContainer returns an error if this process is in a container and does not have what it
// needs of the host: its PID and network namespaces, and its bpf filesystem at the pin path. With
// anything else it would judge or show something else than the host, or what it puts in force
// would end with the container. The process has to be in the host's cgroup namespace.
//
// What is the host's is told by processes outside of all containers. So this holds too where
// the engine itself runs in namespaces.
func (f *Filter) CheckContainer() error {
	own := cgroup.OwnContainer()
	if own == "" {
		return nil
	}
	// Where it is the process of this container, or of one whose PID namespace this one shares,
	// it is not the host's.
	if first, err := cgroup.ContainerOf(1); err != nil || first != "" {
		return ErrOwnPIDs
	}
	if err := f.pins.CheckContainersMount(); err != nil {
		return err
	}
	return checkContainersNetwork()
}

// checkContainersNetwork returns ErrOwnNetwork if this process is in another network namespace
// than the host's first process and the engine, which is the nearest parent outside of all
// containers. Other processes do not tell: one of the host's may look into a container's.
func checkContainersNetwork() error {
	own := netNamespace("self")
	for pid := os.Getpid(); pid > 0; {
		in, err := cgroup.ContainerOf(pid)
		if err != nil {
			return err
		}
		if in == "" {
			if netNamespace(strconv.Itoa(pid)) == own {
				return nil
			}
			break
		}
		if pid, err = parent(pid); err != nil {
			return err
		}
	}
	if netNamespace("1") == own {
		return nil
	}
	return ErrOwnNetwork
}

// parent returns the parent of a process; 0 if it is in an outer PID namespace.
func parent(pid int) (int, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "PPid:"); ok {
			return strconv.Atoi(strings.TrimSpace(value))
		}
	}
	return 0, fmt.Errorf("/proc/%d/status: it names no parent", pid)
}

// CheckBPF returns ErrNoBPF if something else than capabilities keeps this process from using
// bpf(2). It has to have the capabilities.
func CheckBPF() error {
	_, err := ebpf.ProgramGetNextID(0)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("%w (%w)", ErrNoBPF, err)
	}
	return nil
}
