package loader

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// usualPodDevices are the devices of the usual network plugins that are judged on each
// Kubernetes node, before its first pod has a network: bridges, and the beginnings of the
// names of routed veths. No uplink has such a name. Of each device whose name begins with one
// of these letters, the programs look up the name for each packet. So no name here begins as
// eth0, ens3, bond0 or lo do.
var usualPodDevices = []policy.Device{
	"cni0",        // the plugin "bridge", flannel, k3s
	"cbr0",        // kubenet
	"kube-bridge", // kube-router
	"weave",       // Weave Net
	"cali*",       // Calico
	"azv*",        // Azure CNI
	"gke*",        // GKE
}

// podVeth matches the names of the host's ends of pods' veths by which no other device is
// called: those of Calico, Azure, GKE, the AWS VPC CNI and Cilium. The first submatch is what
// all of a plugin's have in common. "veth" is not among them, since a bridge with a port of that
// name may have an uplink as another port.
var podVeth = regexp.MustCompile(`^(cali|azv|gke|eni|lxc)[0-9a-f]{8,12}$`)

// podDevices returns the devices of a policy, and the usual ones of pods if the policy holds
// for the pods of this host.
func (s site) podDevices(targets []*target, p policy.Policy) []policy.Device {
	devices := slices.Clone(p.HostDevices)
	ofPods := func(t *target) bool { return t.rel == "/" || cgroup.OfPod(t.rel) }
	if !p.PolicesPods() || !slices.ContainsFunc(targets, ofPods) || !s.root.HasPods() {
		return devices
	}
	for _, d := range usualPodDevices {
		if !coversDevice(devices, strings.TrimSuffix(string(d), "*")) {
			devices = append(devices, d)
		}
	}
	return devices
}

// withFound adds devices that lead to containers. If a name shows which network plugin has made
// the device, all devices of the plugin are added: it makes one for each new pod.
func withFound(devices []policy.Device, names []string) []policy.Device {
	for _, name := range names {
		if coversDevice(devices, name) {
			continue
		}
		d := policy.Device(name)
		if m := podVeth.FindStringSubmatch(name); m != nil {
			d = policy.Device(m[1] + "*")
		}
		devices = append(devices, d)
	}
	return devices
}

// openVSwitch is the kind of the device that is the master of Open vSwitch's ports.
const openVSwitch = "openvswitch"

// LeadsElsewhere says whether a device is this network namespace's end of a pair whose other end
// is in another one, perhaps a container's.
func LeadsElsewhere(l netlink.Link) bool {
	kind := l.Type()
	return (kind == "veth" || kind == "netkit") && l.Attrs().NetNsID >= 0
}

// JudgesNewDevice says whether the host side judges a device of this name from the moment that
// it exists.
func (s *Status) JudgesNewDevice(name string) bool {
	return coversDevice(s.HostDevices, name) && slices.ContainsFunc(s.Hooks, func(h Hook) bool {
		return h.Attached && h.Name == hostHooks[0].name
	})
}

// A passage is where packets of a device may leave before the host side has seen them: Open
// vSwitch, if there is no program.
type passage struct{ device, program string }

// findPassing looks for devices of containers whose packets the host side may never see. It looks
// only at the ends of pairs that are no ports of a bridge: these are the devices at which
// network plugins attach programs for eBPF host routing.
func (h host) findPassing(d *Defence, r *reading, doc *document) {
	links, err := links()
	var found []passage
	if err == nil {
		found, err = passages(links, doc.Devices, h.wayOf(r.found) == hostWay(h.ingress))
	}
	if err != nil {
		d.Active, d.Reason = false, err.Error()
		return
	}
	if len(found) > 0 {
		d.Active, d.Reason = false, whyPassing(found)
	}
}

// whyPassing says why packets of containers may never reach netfilter. What holds for one is
// usually true of all; of different ones it tells about those that are as the first.
func whyPassing(found []passage) string {
	var names []string
	for _, at := range found {
		if at.program == found[0].program {
			names = append(names, at.device)
		}
	}
	who := "the program " + strconv.Quote(found[0].program)
	if found[0].program == "" {
		who = "Open vSwitch"
	}
	return fmt.Sprintf("at %s, %s gets packets first and may send them on without netfilter, as with eBPF host routing: it is not known whether host_side sees what these containers send", few(names), who)
}

// passages returns the passages at the devices that the host side judges. If it judges by filters
// at the devices, only programs that run before all filters count.
func passages(links []netlink.Link, devices []policy.Device, byFilters bool) (found []passage, err error) {
	kinds := map[int]string{}
	for _, l := range links {
		kinds[l.Attrs().Index] = l.Type()
	}
	var filtered map[int]bool
	for _, l := range links {
		a := l.Attrs()
		master := kinds[a.MasterIndex]
		if !LeadsElsewhere(l) || master != "" && master != openVSwitch || !coversDevice(devices, a.Name) {
			continue
		}
		if master == openVSwitch && !byFilters {
			found = append(found, passage{device: a.Name})
			continue
		}
		if filtered == nil && !byFilters {
			if filtered, err = withFilters(); err != nil {
				return nil, err
			}
		}
		program, err := programBefore(l, filtered[a.Index])
		if err != nil {
			return nil, fmt.Errorf("list programs at %s: %w", strconv.Quote(a.Name), err)
		}
		if program != "" {
			found = append(found, passage{a.Name, program})
		}
	}
	return found, nil
}

// withFilters returns the devices that may have filters of traffic control at their ingress.
func withFilters() (map[int]bool, error) {
	qdiscs, err := retry(func() ([]netlink.Qdisc, error) { return netlink.QdiscList(nil) })
	if err != nil {
		return nil, fmt.Errorf("list queueing disciplines: %w", err)
	}
	found := map[int]bool{}
	for _, q := range qdiscs {
		if q.Attrs().Parent == netlink.HANDLE_INGRESS {
			found[q.Attrs().LinkIndex] = true
		}
	}
	return found, nil
}

// programBefore returns the name of a program that gets the packets of a device before netfilter
// does; "" if there is none.
func programBefore(l netlink.Link, filtered bool) (string, error) {
	a := l.Attrs()
	if a.Xdp != nil && a.Xdp.Attached {
		return programName(ebpf.ProgramID(a.Xdp.ProgId)), nil
	}
	at := ebpf.AttachTCXIngress
	if l.Type() == "netkit" {
		at = ebpf.AttachNetkitPeer
	}
	attached, err := link.QueryPrograms(link.QueryOptions{Target: a.Index, Attach: at})
	switch {
	case err == nil && len(attached.Programs) > 0:
		return programName(attached.Programs[0].ID), nil
	case err == nil || gone(err) || errors.Is(err, ebpf.ErrNotSupported):
	case errors.Is(err, unix.EINVAL): // before 6.6
	default:
		return "", err
	}
	if !filtered {
		return "", nil
	}
	filters, err := filtersAt(l, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return "", err
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && !strings.HasPrefix(b.Name, "egressbpf ") {
			return programName(ebpf.ProgramID(b.Id)), nil
		}
	}
	return "", nil
}

// programName returns the name of a program, or its id if it has none.
func programName(id ebpf.ProgramID) string {
	fallback := fmt.Sprint("id ", id)
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return fallback
	}
	defer prog.Close()
	if info, err := prog.Info(); err == nil && info.Name != "" {
		return info.Name
	}
	return fallback
}
