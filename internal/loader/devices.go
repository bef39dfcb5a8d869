package loader

import (
	"cmp"
	"fmt"
	gomaps "maps"
	"os"
	"regexp"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// dockerDevice matches the devices that the programs take for Docker's bridges without
// being told (from_containers in bpf/host.bpf.c).
var dockerDevice = regexp.MustCompile(`^(?:docker0|docker_gwbridge|br-[0-9a-f]{12})$`)

// CoversDevice says whether the host side of a policy judges the packets of a device.
func CoversDevice(p policy.Policy, name string) bool { return coversDevice(p.HostDevices, name) }

func coversDevice(devices []policy.Device, name string) bool {
	return dockerDevice.MatchString(name) || slices.ContainsFunc(devices, func(d policy.Device) bool { return d.Matches(name) })
}

// findDevices returns the devices of this network namespace that the host side does not judge
// with these devices, and through which containers of the policed cgroups reach the host: the
// other ends of their veths, or the bridges of these. It looks at processes only if there are
// veths that may be a container's, since on most hosts Docker's bridges have them all.
func (s site) findDevices(targets []*target, p policy.Policy, judged []policy.Device) ([]string, error) {
	links, err := links()
	if err != nil {
		return nil, err
	}
	byNetwork := notJudged(links, judged)
	if len(byNetwork) == 0 {
		return nil, nil
	}
	found, seen := map[string]bool{}, map[string]bool{}
	for _, t := range targets {
		rels, err := s.containersIn(t.rel, p)
		if err != nil {
			return nil, err
		}
		for _, rel := range rels {
			err := s.root.Processes(rel, func(pid int) {
				ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
				if err != nil || seen[ns] {
					return // it has ended
				}
				seen[ns] = true
				if id, err := netlink.GetNetNsIdByPid(pid); err == nil {
					for _, name := range byNetwork[id] {
						found[name] = true
					}
				}
			})
			if err != nil {
				return nil, err
			}
		}
	}
	return slices.Sorted(gomaps.Keys(found)), nil
}

// notJudged returns the devices to which the ends of pairs lead whose other ends are in another
// network namespace, by the number that the kernel gives to that namespace in this one: without
// those that are judged.
func notJudged(links []netlink.Link, judged []policy.Device) map[int][]string {
	names := map[int]string{}
	for _, l := range links {
		// Open vSwitch passes packets on without a device of its own.
		if l.Type() != openVSwitch {
			names[l.Attrs().Index] = l.Attrs().Name
		}
	}
	byNetwork := map[int][]string{}
	for _, l := range links {
		a := l.Attrs()
		if !LeadsElsewhere(l) {
			continue
		}
		name := cmp.Or(names[a.MasterIndex], a.Name)
		if !coversDevice(judged, name) {
			byNetwork[a.NetNsID] = append(byNetwork[a.NetNsID], name)
		}
	}
	return byNetwork
}

// links returns the devices of this network namespace.
func links() ([]netlink.Link, error) {
	all, err := retry(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list network devices: %w", err)
	}
	return all, nil
}

// judged returns the devices that get a filter: those that the policy covers. If it covers
// both a bridge and a port of it, the bridge alone gets one, since a packet is judged once.
func judged(links []netlink.Link, devices []policy.Device) (found []netlink.Link) {
	covered := map[int]bool{}
	for _, l := range links {
		covered[l.Attrs().Index] = coversDevice(devices, l.Attrs().Name)
	}
	for _, l := range links {
		if a := l.Attrs(); covered[a.Index] && !covered[a.MasterIndex] {
			found = append(found, l)
		}
	}
	return found
}

// ForgetDevices removes the buckets of network devices that are gone. A process that
// watches devices calls it now and then, since the map has limited room.
func (f *Filter) ForgetDevices() error { return f.withState(forgetDevices) }

func forgetDevices(state *maps.State) error {
	known, err := state.Devices()
	if err != nil || len(known) == 0 {
		return err
	}
	// Listed after the known ones: a device that is missing now is gone.
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
