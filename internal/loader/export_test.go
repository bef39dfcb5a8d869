package loader

import (
	"os"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
)

// SetFault has fault run before each step that changes anything.
func (f *Filter) SetFault(fault func(step string) error) { f.fault = fault }

// SetFormat has attaches leave maps of a format.
func (f *Filter) SetFormat(format maps.Format) { f.format = format }

// MountForHost has mounts count as the host's.
func MountForHost() { inHostsMounts = func() (bool, error) { return true, nil } }

// HookNames are the names of a policed cgroup's hooks, the boundary first.
func HookNames() (names []string) {
	for _, h := range hooks {
		names = append(names, h.name)
	}
	return names
}

// FamiliesHook is the name of the hook that refuses sockets.
const FamiliesHook = pins.Families

// CgroupsHooks are the names of the hooks that follow cgroups.
var CgroupsHooks = cgroupsHooks

// TryStep begins the names of steps that may fail, and the attach go on.
const TryStep = tryStep

// HostHookNames are the names of the host side's hooks.
func HostHookNames() (names []string) {
	for _, h := range hostHooks {
		names = append(names, h.name)
	}
	return names
}

// ProgramCgroup returns the cgroup that a program was loaded for; "" if it is
// not a packet hook of this filter.
func ProgramCgroup(id ebpf.ProgramID) string {
	doc, _, err := readDocument(id)
	if doc == nil || err != nil {
		return ""
	}
	return doc.Cgroup
}

// ProgramBurst returns the burst of the policy that a program was loaded with; 0 if it does
// not tell.
func ProgramBurst(id ebpf.ProgramID) uint32 {
	doc, _, err := readDocument(id)
	if doc == nil || err != nil {
		return 0
	}
	return doc.Policy.SMTP.Burst
}

// Attached says whether there is a pin path.
func (f *Filter) Attached() bool {
	_, err := os.Stat(string(f.pins))
	return err == nil
}
