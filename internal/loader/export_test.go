package loader

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
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

// Processed returns how many instructions the verifier processes for each program that a filter
// with a policy can have on kernels before 5.16. Later kernels tell it of a loaded program.
func Processed(p policy.Policy, state *maps.State, rel string, id uint64) (map[string]int, error) {
	l, err := loadPolicy(p)
	if err != nil {
		return nil, err
	}
	defer l.close()
	t := &target{rel: rel, id: id, recognises: p.Recognises(rel)}
	egress, shared, err := l.prepare(state, policedCgroup(rel, id, t.recognises))
	if err != nil {
		return nil, err
	}
	tc, err := bpf.LoadTc()
	if err != nil {
		return nil, err
	}
	sharedTc, err := l.share(tc, state)
	if err != nil {
		return nil, err
	}
	if err := set(tc, map[string]any{bpf.TcVarPoliced: policedBy([]*target{t}), bpf.TcVarLinkHeader: uint32(ethernetHeader)}); err != nil {
		return nil, err
	}
	cgroups, err := bpf.LoadCgroups()
	if err != nil {
		return nil, err
	}
	if err := set(cgroups, cgroupsConstants([]*target{t}, p)); err != nil {
		return nil, err
	}
	sharedCgroups, err := state.Use(cgroups)
	if err != nil {
		return nil, err
	}
	processed := map[string]int{}
	for _, load := range []struct {
		spec *ebpf.CollectionSpec
		maps map[string]*ebpf.Map
	}{{egress, shared}, {tc, sharedTc}, {cgroups, sharedCgroups}} {
		loaded, err := ebpf.NewCollectionWithOptions(load.spec, ebpf.CollectionOptions{
			MapReplacements: load.maps, Cache: l.types, Programs: ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats},
		})
		if err != nil {
			return nil, err
		}
		for name, prog := range loaded.Programs {
			log := prog.VerifierLog
			n := 0
			if i := strings.Index(log, "processed "); i >= 0 {
				_, _ = fmt.Sscanf(log[i:], "processed %d insns", &n)
			}
			if n == 0 {
				err = errors.Join(err, fmt.Errorf("the verifier's log of %s does not tell: %q", name, log))
			}
			processed[name] = n
		}
		loaded.Close()
		if err != nil {
			return nil, err
		}
	}
	return processed, nil
}

// WithFound adds devices that lead to containers to those that are judged.
func WithFound(devices []policy.Device, names []string) []policy.Device {
	return withFound(devices, names)
}

// UsualPodDevices are the devices that are judged on each Kubernetes node.
var UsualPodDevices = usualPodDevices

// NotJudged returns the devices through which containers may reach the host and that are not
// judged, by network namespace.
func NotJudged(links []netlink.Link, judged []policy.Device) map[int][]string {
	return notJudged(links, judged)
}

// WhyPassing says why packets of devices may never reach netfilter; "" if nothing is known of.
func WhyPassing(links []netlink.Link, devices []policy.Device, byFilters bool) (string, error) {
	found, err := passages(links, devices, byFilters)
	if err != nil || len(found) == 0 {
		return "", err
	}
	return whyPassing(found), nil
}

// Few names some devices.
func Few(names []string) string { return few(names) }
