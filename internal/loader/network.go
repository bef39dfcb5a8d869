package loader

import (
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/pins"
)

// netNamespace returns the number of a process's network namespace; 0 if this process
// cannot see it.
func netNamespace(pid string) uint64 {
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join("/proc", pid, "ns/net"), &st); err != nil {
		return 0
	}
	return st.Ino
}

// hostsNetwork returns the number of the host's network namespace; 0 if this process cannot
// see it.
func hostsNetwork() uint64 {
	if !pins.SeesInit() {
		return 0
	}
	return netNamespace("1")
}

// InHostsNetwork says whether this process is in the host's network namespace, as far as it
// can see the host.
func InHostsNetwork() bool {
	host := hostsNetwork()
	return host == 0 || host == netNamespace("self")
}
