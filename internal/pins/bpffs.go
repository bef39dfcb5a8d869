package pins

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

var (
	// ErrPinPath means that the pin path is not a directory below the root of a bpf
	// filesystem, nor at the usual place where one could be mounted.
	ErrPinPath = errors.New("not a directory in a bpf filesystem")
	// ErrUnmounted means that there is no bpf filesystem, and that this process cannot
	// see whether it could mount one for the host.
	ErrUnmounted = errors.New("no bpf filesystem is mounted, and this process cannot see whether it is in the host's mount namespace")
	// ErrPrivateMount means that the pins, and with them the filter, would end with
	// this process's mount namespace.
	ErrPrivateMount = errors.New("not the host's bpf filesystem")
)

// usualMount is the usual place of the bpf filesystem.
const usualMount = "/sys/fs/bpf"

// Mount makes sure that the pin path is in a bpf filesystem, and mounts one at the usual
// place if it is missing there. forHost says whether a mount by this process is a mount of
// the host: it is InHostsMounts, except in tests, which mount nothing for the host.
func (p Path) Mount(fault Fault, forHost func() (bool, error)) error {
	existing := p.existing()
	if onBPFFS(existing) && !(existing == string(p) && isMount(existing)) {
		return nil
	}
	if existing != usualMount || existing == string(p) {
		return fmt.Errorf("%s: %w", p, ErrPinPath)
	}
	switch in, err := forHost(); {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %w (%w)", usualMount, ErrUnmounted, err)
	case !in && SeesInit() && !onBPFFS(hostsRoot+usualMount):
		return fmt.Errorf("%s: %w", usualMount, ErrNotMounted)
	case !in:
		return fmt.Errorf("%s: %w", usualMount, ErrPrivateMount)
	}
	if err := fault.Step("mount"); err != nil {
		return err
	}
	err := unix.Mount("bpf", usualMount, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700")
	if err != nil {
		return fmt.Errorf("mount a bpf filesystem on %s: %w", usualMount, err)
	}
	return nil
}

// existing returns the pin path, or the longest part of it that exists.
func (p Path) existing() string {
	dir := string(p)
	for {
		if _, err := os.Stat(dir); err == nil || dir == "/" {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

// OnBPFFS says whether the pin path is a directory below the root of a bpf filesystem. The
// root itself does not count, since others have their pins there too.
func (p Path) OnBPFFS() bool { return onBPFFS(string(p)) && !isMount(string(p)) }

// isMount says whether a filesystem is mounted at path.
func isMount(path string) bool {
	var here, above unix.Stat_t
	return unix.Stat(path, &here) == nil && unix.Stat(path+"/..", &above) == nil && (here.Dev != above.Dev || here.Ino == above.Ino)
}

func onBPFFS(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.BPF_FS_MAGIC
}

// initialPIDs is PROC_PID_INIT_INO (include/linux/proc_ns.h).
const initialPIDs = "pid:[4026531836]"

// SeesInit says whether /proc/1 is the host's first process.
func SeesInit() bool {
	ns, err := os.Readlink("/proc/self/ns/pid")
	return err == nil && ns == initialPIDs
}

// InHostsMounts says whether a mount by this process is a mount of the host. If the process
// cannot see that, the error wraps fs.ErrPermission.
func InHostsMounts() (bool, error) {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil || !SeesInit() {
		return false, err
	}
	init, err := os.Readlink("/proc/1/ns/mnt")
	return err == nil && own == init, err
}

// CheckMount returns ErrPrivateMount if the filesystem of the pins is not the one that the
// host has at that place, as far as this process can see the host. In such a filesystem the
// host sees nothing of the filter, which ends with this process's mount namespace.
func (p Path) CheckMount() error {
	if !SeesInit() {
		return nil
	}
	if in, err := InHostsMounts(); in || errors.Is(err, fs.ErrPermission) {
		return nil
	}
	dir := p.existing()
	var here, host unix.Stat_t
	if err := unix.Stat(dir, &here); err != nil {
		return err
	}
	if err := unix.Stat(filepath.Join(hostsRoot, dir), &host); err != nil || here.Dev != host.Dev {
		return fmt.Errorf("%s: %w", dir, ErrPrivateMount)
	}
	return nil
}
