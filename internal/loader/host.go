package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	statemaps "github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// hostHook is a place in the host's network stack where packets from containers are
// judged again.
type hostHook struct {
	name    string // also of the pin
	program string
	pf      link.NetfilterProtocolFamily
	hook    link.NetfilterInetHook
}

var hostHooks = []hostHook{
	{pins.HostForward4, bpf.HostProgHostForward, link.NetfilterProtoIPv4, link.NetfilterInetPreRouting},
	{pins.HostForward6, bpf.HostProgHostForward, link.NetfilterProtoIPv6, link.NetfilterInetPreRouting},
	{pins.HostDeliver4, bpf.HostProgHostDeliver, link.NetfilterProtoIPv4, link.NetfilterInetLocalIn},
	{pins.HostDeliver6, bpf.HostProgHostDeliver, link.NetfilterProtoIPv6, link.NetfilterInetLocalIn},
	{pins.HostAnswer6, bpf.HostProgHostAnswer, link.NetfilterProtoIPv6, link.NetfilterInetLocalOut},
}

// hostPriority is before the kernel puts fragments together and tracks connections
// (NF_IP_PRI_CONNTRACK_DEFRAG is -400). No two BPF programs may have the same, so an
// exchange needs another one for its new program, and so does another instance: the
// next before it that is free.
const (
	hostPriority   = -450
	hostPriorities = 32
)

// HostPrograms are the programs of the host side, loaded and not attached.
type HostPrograms struct {
	// Forward judges whatever comes from a container's device, Deliver what is
	// within packets to the host itself.
	Forward *ebpf.Program `ebpf:"host_forward"`
	Deliver *ebpf.Program `ebpf:"host_deliver"`
	// Answer judges what the host itself says of packets before Forward has seen them.
	Answer *ebpf.Program `ebpf:"host_answer"`
}

// Close closes the programs; the kernel keeps them while they are attached.
func (p *HostPrograms) Close() error {
	return errors.Join(p.Forward.Close(), p.Deliver.Close(), p.Answer.Close())
}

func (p *HostPrograms) byName(name string) *ebpf.Program {
	switch name {
	case bpf.HostProgHostForward:
		return p.Forward
	case bpf.HostProgHostDeliver:
		return p.Deliver
	}
	return p.Answer
}

// LoadHost loads the programs of the host side for a policy and its devices, with
// state as their memory, and attaches nothing. The error wraps ebpf.ErrNotSupported
// before 6.4, and where the kernel is locked down. The caller closes the programs.
func LoadHost(p policy.Policy, state *statemaps.State) (*HostPrograms, error) {
	l, err := loadPolicy(p)
	if err != nil {
		return nil, err
	}
	defer l.close()
	return l.hostSide(state, nil, p.HostDevices)
}

// hostSide loads the programs of the host side. They need netfilter programs and
// bpf_dynptr_from_skb(), both of 6.4.
func (l *loaded) hostSide(state *statemaps.State, targets []*target, devices []policy.Device) (*HostPrograms, error) {
	spec, err := bpf.LoadHost()
	if err != nil {
		return nil, err
	}
	shared, err := l.share(spec, state)
	if err != nil {
		return nil, err
	}
	err = set(spec, map[string]any{
		bpf.HostVarPlaces:         places(targets),
		bpf.HostVarHasDeviceNames: len(devices) > 0,
		bpf.HostVarHasCoarseClock: false, // not for programs of this type
	})
	if err != nil {
		return nil, err
	}
	names := spec.Maps[bpf.HostMapDeviceNames]
	names.MaxEntries = uint32(max(len(devices), 1))
	for _, d := range devices {
		names.Contents = append(names.Contents, ebpf.MapKV{Key: deviceName(d), Value: uint32(1)})
	}
	progs := new(HostPrograms)
	if err := spec.LoadAndAssign(progs, &ebpf.CollectionOptions{MapReplacements: shared}); err != nil {
		if LockedDown() {
			// They read names of devices, and those before 6.4 do not.
			err = errors.Join(ErrLockedDown, ebpf.ErrNotSupported)
		}
		return nil, fmt.Errorf("load programs of the host side: %w", err)
	}
	err = bindDocument(document{Version: Version(), Policy: l.policy, Devices: devices, Network: netNamespace("self")}, progs.Forward)
	if err != nil {
		progs.Close()
		return nil, err
	}
	return progs, nil
}

// places returns the targets as the programs know them.
func places(targets []*target) (all [8]bpf.HostPlace) { // MAX_PLACES
	for i, t := range targets {
		all[i] = bpf.HostPlace{Id: t.id, Level: cgroup.Level(t.rel)}
		if t.recognises {
			all[i].Recognises = 1
		}
	}
	return all
}

// deviceName returns d as a key of the trie of names.
func deviceName(d policy.Device) bpf.HostDeviceName {
	name, begin := strings.CutSuffix(string(d), "*")
	var key bpf.HostDeviceName
	for i := range len(name) {
		key.Name[i] = int8(name[i])
	}
	key.Len = uint32(8 * len(name))
	if !begin {
		key.Len += 8 // its NUL
	}
	return key
}

// attachHost puts the host side in force in the network namespace of this process.
// Where the kernel cannot have its programs, the filter works without it, and what an
// earlier attach has put in force stays.
func (f *Filter) attachHost(shared *loaded, state *statemaps.State, targets []*target, why *found, change *pins.Change) error {
	if shared.policy.HostSide == policy.Off {
		if err := f.setTunnels(state, nil, change); err != nil {
			return err
		}
		return f.detachHost(change)
	}
	names, err := f.findDevices(targets, shared.policy)
	if err != nil {
		return err
	}
	if err := f.attachTunnels(state, why, change); err != nil {
		return err
	}
	devices := slices.Clone(shared.policy.HostDevices)
	for _, name := range names {
		if d := policy.Device(name); !coversDevice(devices, name) {
			devices = append(devices, d)
		}
	}
	if err := change.Step(tryStep + HostSide); err != nil {
		why.note(HostSide, err)
		return nil
	}
	progs, err := f.loadHost(shared, state, targets, devices, change)
	if errors.Is(err, ebpf.ErrNotSupported) {
		return f.attachIngress(shared, state, targets, devices, why, change)
	}
	if err != nil {
		why.note(HostSide, errors.New(firstLine(err)))
		return nil
	}
	defer progs.Close()
	for _, h := range hostHooks {
		if err := f.attachHostHook(h, progs, change); err != nil {
			return fmt.Errorf("hook %s: %w", h.name, err)
		}
	}
	return nil
}

// loadHost loads the host side of kernels since 6.4.
func (f *Filter) loadHost(shared *loaded, state *statemaps.State, targets []*target, devices []policy.Device, change *pins.Change) (*HostPrograms, error) {
	if err := change.Step(tryStep + "netfilter"); err != nil {
		return nil, err
	}
	return shared.hostSide(state, targets, devices)
}

func (f *Filter) attachHostHook(h hostHook, progs *HostPrograms, change *pins.Change) error {
	pin := f.pins.Pin(h.name)
	return change.ReplaceLink(pin, func() (link.Link, error) {
		prog := progs.byName(h.program)
		var l link.Link
		err := error(unix.EBUSY)
		for i := int32(0); i < hostPriorities && errors.Is(err, unix.EBUSY); i++ {
			l, err = link.AttachNetfilter(link.NetfilterOptions{
				Program: prog, ProtocolFamily: h.pf, Hook: h.hook, Priority: hostPriority - i,
			})
		}
		return l, err
	})
}

func (f *Filter) detachHost(change *pins.Change) error {
	for _, h := range hostHooks {
		if err := change.DropLink(f.pins.Pin(h.name)); err != nil {
			return err
		}
	}
	if err := change.DropLink(f.pins.Pin(pins.Tunnels)); err != nil {
		return err
	}
	return f.dropFilters(nil, change)
}

// dockerDevice matches what the programs take for a bridge of Docker's without being
// told (from_containers in bpf/host.bpf.c).
var dockerDevice = regexp.MustCompile(`^(?:docker0|docker_gwbridge|br-[0-9a-f]{12})$`)

// CoversDevice says whether the host side of a policy judges what a device receives.
func CoversDevice(p policy.Policy, name string) bool { return coversDevice(p.HostDevices, name) }

func coversDevice(devices []policy.Device, name string) bool {
	return dockerDevice.MatchString(name) || slices.ContainsFunc(devices, func(d policy.Device) bool { return d.Matches(name) })
}

// findDevices returns the devices of this network namespace through which containers
// of the policed cgroups reach the host: the other ends of their veths, or the bridges
// that these belong to.
func (f *Filter) findDevices(targets []*target, p policy.Policy) ([]string, error) {
	var rels []string
	for _, t := range targets {
		found, err := f.containersIn(t.rel, p)
		if err != nil {
			return nil, err
		}
		rels = append(rels, found...)
	}
	ids := map[int]bool{}
	seen := map[string]bool{}
	for _, rel := range rels {
		err := f.root.Processes(rel, func(pid int) {
			ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
			if err != nil || seen[ns] {
				return // it has ended
			}
			seen[ns] = true
			if id, err := netlink.GetNetNsIdByPid(pid); err == nil && id >= 0 {
				ids[id] = true
			}
		})
		if err != nil {
			return nil, err
		}
	}
	if len(ids) == 0 {
		return nil, nil
	}
	links, err := links()
	if err != nil {
		return nil, err
	}
	names, found := map[int]string{}, map[string]bool{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	for _, l := range links {
		a := l.Attrs()
		if l.Type() != "veth" || !ids[a.NetNsID] {
			continue
		}
		if master, ok := names[a.MasterIndex]; ok {
			found[master] = true
		} else {
			found[a.Name] = true
		}
	}
	return slices.Sorted(maps.Keys(found)), nil
}

// links returns the devices of this network namespace.
func links() ([]netlink.Link, error) {
	all, err := retry(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list network devices: %w", err)
	}
	return all, nil
}

// hostStatus reads the host side back.
func (f *Filter) hostStatus(s *Status, all []*policed) Defence {
	d := Defence{Name: HostSide, Active: true}
	var doc *document
	var programs []ebpf.ProgramID
	for _, h := range hostHooks {
		row := Hook{Name: h.name}
		info, err := pins.Info(f.pins.Pin(h.name))
		if err == nil {
			row.Attached, row.Program, row.Link = true, uint32(info.Program), uint32(info.ID)
			programs = append(programs, info.Program)
			if h.program == bpf.HostProgHostForward {
				doc, row.Since, err = readDocument(info.Program)
			} else {
				_, row.Since, err = readDocument(info.Program)
			}
		}
		if err != nil {
			d.Active = false
			if !errors.Is(err, fs.ErrNotExist) {
				d.Reason = err.Error()
			}
			continue
		}
		s.Hooks = append(s.Hooks, row)
	}
	if len(programs) == 0 && d.Reason == "" {
		var err error
		if doc, programs, err = f.ingressStatus(s, &d); err != nil {
			d.Active, d.Reason = false, err.Error()
			return d
		}
	}
	if doc != nil {
		s.HostDevices = doc.Devices
	}
	if !d.Active || doc == nil {
		d.Active = false
		if d.Reason == "" {
			d.Active, d.Reason = f.whyNoHostSide(s, foundBy(all))
		}
		return d
	}
	d = f.olderHost(d, doc, s, all, programs)
	switch n, host := doc.Network, hostsNetwork(); {
	case n == 0 || n == host:
	case n == netNamespace("self"):
		if host != 0 && d.Reason == "" {
			d.Reason = "in this network namespace alone, which is not the host's"
		}
	case host != 0:
		d.Active, d.Reason = false, "it judges what another network namespace than the host's forwards: attach from the host's"
		return d
	default:
		d.Active, d.Reason = false, "not known: it judges what another network namespace forwards, and whether that is the host's cannot be seen from here"
		return d
	}
	var targets []*target
	for _, p := range all {
		if !p.gone && p.rel != "" {
			targets = append(targets, &target{rel: p.rel, recognises: doc.Policy.Recognises(p.rel)})
		}
	}
	f.tunnelsStatus(&d, foundBy(all))
	found, err := f.findDevices(targets, doc.Policy)
	if err != nil {
		d.Active, d.Reason = false, err.Error()
	}
	for _, name := range found {
		if d.Active && !coversDevice(doc.Devices, name) {
			d.Active = false
			s.Unjudged = append(s.Unjudged, name)
			d.Reason = fmt.Sprintf("containers reach the host through %s, which is not judged: attach again, or name it with --host-devices", strconv.Quote(name))
		}
	}
	return d
}

// whyNoHostSide says why there is none, or that there is nothing for it to judge yet.
func (f *Filter) whyNoHostSide(s *Status, why *found) (active bool, reason string) {
	const open = ": what does not come from a container's own IP socket passes"
	if s.Policy != nil && s.Policy.HostSide == policy.Off {
		return false, "turned off by the policy" + open
	}
	if why != nil && why.Missing[HostSide] != "" {
		return false, why.Missing[HostSide] + open
	}
	if why == nil || !why.Ingress || s.Policy == nil {
		return false, why.why(HostSide)
	}
	links, err := links()
	if err != nil {
		return false, err.Error()
	}
	devices := judged(links, s.Policy.HostDevices)
	if len(devices) == 0 {
		return true, ingressRemark
	}
	return false, f.whyNotJudged(s, devices[0])
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

func (f *Filter) familiesStatus(s *Status, all []*policed) Defence {
	d := Defence{Name: SocketFamilies, Active: len(s.Cgroups) > 0}
	for _, p := range all {
		if p.rel == "" {
			continue
		}
		if p.families == nil {
			d.Active = false
			continue
		}
		s.Hooks = append(s.Hooks, Hook{
			Name: pins.Families, Attached: true, Cgroup: f.root.Path(p.rel),
			Program: uint32(p.families.Program), Link: uint32(p.families.ID), Since: p.familiesSince,
		})
	}
	if d.Active {
		return f.olderFamilies(d, s, all)
	}
	const open = ": with CAP_NET_RAW, containers can send by packet sockets, past the filter; where nothing needs them, run containers with --cap-drop=NET_RAW"
	if s.Policy != nil && s.Policy.Families == policy.AnyFamily {
		d.Reason = "turned off by the policy" + open
		return d
	}
	d.Reason = foundBy(all).why(SocketFamilies)
	if why := foundBy(all); why != nil && why.Missing[SocketFamilies] != "" {
		d.Reason = "this kernel refuses no sockets for us (" + d.Reason + ")" + open
	}
	return d
}
