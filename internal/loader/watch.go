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
	pins, err := f.allPins()
	for _, pin := range pins {
		fmt.Fprintln(&b, pin)
		if ofState(pin) {
			continue
		}
		info, err := pinnedInfo(pin)
		if err != nil {
			fmt.Fprintln(&b, err)
			continue
		}
		fmt.Fprintln(&b, info.ID, info.Program)
		if c := info.Cgroup(); c != nil {
			fmt.Fprintln(&b, c.CgroupId)
		}
	}
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
func (f *Filter) ForgetDevices() error { return f.withState(forgetDevices) }

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
