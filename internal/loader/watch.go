package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/maps"
)

// Fingerprint changes whenever something of the filter is attached, exchanged, detached or
// unpinned, by whomever. It costs some system calls for each pin.
func (f *Filter) Fingerprint() string {
	var b strings.Builder
	err := filepath.WalkDir(f.pins, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		fmt.Fprintf(&b, "%s", path)
		if !slices.Contains(maps.StateNames(), d.Name()) {
			info, err := pinnedInfo(path)
			if err != nil {
				fmt.Fprintf(&b, " %v\n", err)
				return nil
			}
			fmt.Fprintf(&b, " %d %d", info.ID, info.Program)
			if c := info.Cgroup(); c != nil {
				fmt.Fprintf(&b, " %d", c.CgroupId)
			}
		}
		b.WriteByte('\n')
		return nil
	})
	return fmt.Sprint(b.String(), err)
}

// serviceDir is a directory beside the pins that a service keeps locked.
const serviceDir = "service"

// Serve tells others that a process keeps the filter as it wants it, until that closes the
// file.
func (f *Filter) Serve() (*os.File, error) {
	path := filepath.Join(f.pins, serviceDir)
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
		dir.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return dir, nil
}

// Served says whether some process keeps the filter as it wants it.
func (f *Filter) Served() bool {
	dir, err := os.Open(filepath.Join(f.pins, serviceDir))
	if err != nil {
		return false
	}
	defer dir.Close()
	return errors.Is(unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// ForgetDevices removes the buckets of network devices that are no more. Who watches
// devices calls it now and then: there is only so much room.
func (f *Filter) ForgetDevices() error {
	state, err := f.State()
	if errors.Is(err, ErrNotAttached) {
		return nil
	}
	if err != nil {
		return err
	}
	defer state.Close()
	return forgetDevices(state)
}

func forgetDevices(state *maps.State) error {
	known, err := state.Devices()
	if err != nil || len(known) == 0 {
		return err
	}
	// After those that are known were listed: what is missing is gone.
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list network devices: %w", err)
	}
	for _, index := range known {
		if !slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Attrs().Index == int(index) }) {
			if err := state.ForgetDevice(index); err != nil {
				return err
			}
		}
	}
	return nil
}
