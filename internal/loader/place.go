package loader

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

var (
	// ErrLockedDown means that the kernel lets no program read its memory, whoever asks.
	ErrLockedDown = errors.New("the kernel is locked down (lockdown=confidentiality)")
	// ErrUnmounted means that there is no bpf filesystem, and that whether this process could
	// mount one for the host cannot be seen.
	ErrUnmounted = errors.New("no bpf filesystem is mounted, and this process cannot see whether it is in the host's mount namespace")
	// ErrPrivateMount means that the pins would be gone with this process's mount
	// namespace, and the filter with them.
	ErrPrivateMount = errors.New("not the host's bpf filesystem")
)

// LockedDown says whether the kernel lets no program read its memory.
func LockedDown() bool {
	text, err := os.ReadFile("/sys/kernel/security/lockdown")
	return err == nil && bytes.Contains(text, []byte("[confidentiality]"))
}

// initialPIDs is PROC_PID_INIT_INO (include/linux/proc_ns.h).
const initialPIDs = "pid:[4026531836]"

// seesInit says whether /proc/1 is the host's first process.
func seesInit() bool {
	ns, err := os.Readlink("/proc/self/ns/pid")
	return err == nil && ns == initialPIDs
}

// inHostsMounts says whether what this process mounts is mounted for the host. Tests, which
// mount nothing for the host, change it. The error is one of permission if that cannot be
// seen.
var inHostsMounts = func() (bool, error) {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil || !seesInit() {
		return false, err
	}
	init, err := os.Readlink("/proc/1/ns/mnt")
	return err == nil && own == init, err
}

// CheckMount returns ErrPrivateMount if the filesystem of the pins is not the one that the
// host has in their place, as far as this process can see the host: then the host sees
// nothing of the filter, which ends with this process's mount namespace.
func (f *Filter) CheckMount() error {
	if !seesInit() {
		return nil
	}
	if in, err := inHostsMounts(); in || errors.Is(err, fs.ErrPermission) {
		return nil
	}
	dir := f.pins
	for {
		if _, err := os.Stat(dir); err == nil || dir == "/" {
			break
		}
		dir = filepath.Dir(dir)
	}
	var here, host unix.Stat_t
	if err := unix.Stat(dir, &here); err != nil {
		return err
	}
	if err := unix.Stat(filepath.Join("/proc/1/root", dir), &host); err != nil || here.Dev != host.Dev {
		return fmt.Errorf("%s: %w", dir, ErrPrivateMount)
	}
	return nil
}

// netNamespace returns the number of a process's network namespace; 0 if it cannot be seen.
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
	if !seesInit() {
		return 0
	}
	return netNamespace("1")
}

// InHostsNetwork says whether this process is in the network namespace of the host, as far
// as it can see that.
func InHostsNetwork() bool {
	host := hostsNetwork()
	return host == 0 || host == netNamespace("self")
}
