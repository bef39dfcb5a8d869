package maps

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// RemoveMemlock removes this process's limit on locked memory, to which kernels before 5.11
// charge maps and programs. If the process may not do so, the kernel decides when the first
// map is made: later kernels need none of this.
//
// Package rlimit of cilium/ebpf tells both apart, by a map that it makes in every process that
// imports it. Commands that only read make none.
func RemoveMemlock() error {
	unlimited := &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, unlimited); err != nil && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("remove the limit on locked memory: %w", err)
	}
	return nil
}
