package loader

import (
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
)

// Fingerprint changes whenever something of the filter is attached, exchanged, detached or
// unpinned, by whomever. It costs some system calls for each pin.
func (f *Filter) Fingerprint() string {
	var b strings.Builder
	all, err := f.pins.All()
	for _, pin := range all {
		fmt.Fprintln(&b, pin)
		if pins.OfState(pin) {
			continue
		}
		info, err := pins.Info(pin)
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
