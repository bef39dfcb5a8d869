package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

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
	first, err := cgroup.OfProcess(1)
	if err != nil || cgroup.OutermostContainer(first) == own {
		return ErrOwnPIDs
	}
	if err := f.pins.CheckContainersMount(); err != nil {
		return err
	}
	return checkContainersNetwork()
}

// checkContainersNetwork returns ErrOwnNetwork if no process outside of all containers is in
// this network namespace.
func checkContainersNetwork() error {
	own := netNamespace("self")
	is := func(pid string) bool {
		if n, err := strconv.Atoi(pid); err != nil || n < 1 || netNamespace(pid) != own {
			return false
		} else if rel, err := cgroup.OfProcess(n); err != nil || cgroup.OutermostContainer(rel) != "" {
			return false
		}
		return true
	}
	if is("1") {
		return nil
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, p := range processes {
		if is(p.Name()) {
			return nil
		}
	}
	return ErrOwnNetwork
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
