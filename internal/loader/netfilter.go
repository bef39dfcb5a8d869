package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// netfilter is the host side by BPF netfilter programs.
type netfilter struct {
	site
	// follows is whether this process follows the host's tunnels. Without a tunnel
	// there is nothing to judge in packets to the host itself, and the hook for them
	// (host_deliver) is left out, since it would cost each packet that the host receives.
	// A process that does not follow them cannot know what comes: it attaches the hook.
	follows bool
	// deliver is the program of a hook that is left out.
	deliver *ebpf.Program
}

// hostHook is a place where netfilter runs a program. Its pin has the same name.
type hostHook struct {
	name    string
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

// delivers says whether the hook judges packets to the host itself.
func (h hostHook) delivers() bool { return h.program == bpf.HostProgHostDeliver }

// ForTunnels says whether a hook of a status is needed only while the host has tunnels.
func ForTunnels(row Hook) bool {
	return slices.ContainsFunc(hostHooks, func(h hostHook) bool { return h.name == row.Name && h.delivers() })
}

// hostPriority runs programs before the kernel reassembles fragments and tracks connections
// (NF_IP_PRI_CONNTRACK_DEFRAG is -400). No two BPF programs can have the same priority. So
// a program that replaces another one, and another instance, take the next earlier priority
// that is free.
const (
	hostPriority   = -450
	hostPriorities = 32
)

// HostPrograms are the programs of the host side, loaded and not attached.
type HostPrograms struct {
	// Forward judges every packet that comes from a container's device, Deliver what is
	// inside packets to the host itself.
	Forward *ebpf.Program `ebpf:"host_forward"`
	Deliver *ebpf.Program `ebpf:"host_deliver"`
	// Answer judges the host's answers to packets that Forward has not seen.
	Answer *ebpf.Program `ebpf:"host_answer"`
}

// Close closes the programs. The kernel keeps them while they are attached.
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

// LoadHost loads the programs of the host side for a policy and its devices, and does not
// attach them. The programs use the maps of state. The error wraps ebpf.ErrNotSupported
// before 6.4, and without BTF of the kernel or its JIT compiler. The caller closes the programs.
func LoadHost(p policy.Policy, state *maps.State) (*HostPrograms, error) {
	l, err := loadPolicy(p)
	if err != nil {
		return nil, err
	}
	defer l.close()
	return l.hostSide(state, nil, p.HostDevices)
}

// hostSide loads the programs of the host side. They need netfilter programs and
// bpf_dynptr_from_skb(), both from 6.4.
func (l *loaded) hostSide(state *maps.State, targets []*target, devices []policy.Device) (*HostPrograms, error) {
	spec, err := bpf.LoadHost()
	if err != nil {
		return nil, err
	}
	shared, err := l.share(spec, state)
	if err != nil {
		return nil, err
	}
	err = set(spec, map[string]any{
		bpf.HostVarPoliced:        policedBy(targets),
		bpf.HostVarHasDeviceNames: len(devices) > 0,
		bpf.HostVarFirstOfNames:   firstBytes(devices),
		bpf.HostVarHasCoarseClock: false, // programs of this type cannot use it
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
	if err := maps.Cause(spec.LoadAndAssign(progs, &ebpf.CollectionOptions{MapReplacements: shared, Cache: l.types})); err != nil {
		if errors.Is(err, unix.Errno(524)) { // the kernel's ENOTSUPP, which is not ENOTSUP
			// Without the JIT compiler, programs cannot call the kernel's functions.
			err = fmt.Errorf("%w: %w", ebpf.ErrNotSupported, err)
		}
		return nil, fmt.Errorf("load programs of the host side: %w", err)
	}
	if err := l.hostDocument(devices).bind(progs.Forward); err != nil {
		progs.Close()
		return nil, err
	}
	return progs, nil
}

// firstBytes says of each byte whether the name of a device may begin with it.
func firstBytes(devices []policy.Device) (first [256]bool) {
	for _, d := range devices {
		if name := strings.TrimSuffix(string(d), "*"); name != "" {
			first[name[0]] = true
			continue
		}
		for i := range first {
			first[i] = true
		}
	}
	return first
}

// deviceName returns d as a key of the trie device_names.
func deviceName(d policy.Device) bpf.HostDeviceName {
	name, begin := strings.CutSuffix(string(d), "*")
	var key bpf.HostDeviceName
	for i := range len(name) {
		key.Name[i] = int8(name[i])
	}
	key.Len = uint32(8 * len(name))
	if !begin {
		key.Len += 8 // with its NUL
	}
	return key
}

func (n *netfilter) attach(a *attachment, devices []policy.Device) error {
	if err := a.change.Step(tryStep + "netfilter"); err != nil {
		return cannot{err}
	}
	progs, err := a.hostSide(a.state, a.targets, devices)
	if err != nil {
		return cannot{err}
	}
	defer progs.Close()
	deliver, err := n.mustDeliver()
	if err != nil {
		return err
	}
	for _, h := range hostHooks {
		if h.delivers() && !deliver {
			err = a.change.DropLink(n.pins.Pin(h.name))
		} else {
			err = n.replace(h, progs.byName(h.program), a.change)
		}
		if err != nil {
			return fmt.Errorf("hook %s: %w", h.name, err)
		}
	}
	if deliver {
		return n.spare(nil, a.change)
	}
	return n.spare(progs.Deliver, a.change)
}

func (n *netfilter) replace(h hostHook, prog *ebpf.Program, change *pins.Change) error {
	return change.ReplaceLink(n.pins.Pin(h.name), func() (link.Link, error) { return h.link(prog) })
}

// mustDeliver says whether packets to the host itself have to be judged.
func (n *netfilter) mustDeliver() (bool, error) {
	if !n.follows {
		return true, nil
	}
	return tunnels{n.site}.exist()
}

// spare keeps a copy of the program of a hook that is left out; nil if none is.
func (n *netfilter) spare(prog *ebpf.Program, change *pins.Change) (err error) {
	before := n.deliver
	n.deliver = nil
	if prog != nil {
		n.deliver, err = prog.Clone()
	}
	if before != nil {
		change.Keep(before)
	}
	change.Back(func() (err error) {
		if n.deliver != nil {
			n.deliver.Close()
		}
		if n.deliver = nil; before != nil {
			n.deliver, err = before.Clone()
		}
		return err
	})
	return err
}

// forget closes the program of a hook that is left out, with which it could be attached.
func (n *netfilter) forget() error {
	deliver := n.deliver
	n.deliver = nil
	return deliver.Close()
}

// judgeDelivered attaches or detaches what judges packets to the host itself, if there are
// tunnels now or there are none any more.
func (n *netfilter) judgeDelivered(change *pins.Change) error {
	must, err := n.mustDeliver()
	if err != nil {
		return err
	}
	for _, h := range hostHooks {
		info, err := pins.Info(n.pins.Pin(h.name))
		attached := err == nil
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		switch {
		case h.program == bpf.HostProgHostForward && !attached:
			return nil // no host side, or that of older kernels
		case !h.delivers() || must == attached:
			continue
		case must && n.deliver != nil:
			err = n.replace(h, n.deliver, change)
		case !must:
			err = n.leaveOut(h, info.Program, change)
		}
		if err != nil {
			return fmt.Errorf("hook %s: %w", h.name, err)
		}
	}
	if must {
		// The next one to be left out may be another, with other maps.
		return n.spare(nil, change)
	}
	return nil
}

// leaveOut detaches a hook and keeps its program.
func (n *netfilter) leaveOut(h hostHook, id ebpf.ProgramID, change *pins.Change) error {
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return err
	}
	defer prog.Close()
	if err := n.spare(prog, change); err != nil {
		return err
	}
	return change.DropLink(n.pins.Pin(h.name))
}

// link attaches a program.
func (h hostHook) link(prog *ebpf.Program) (l link.Link, err error) {
	err = unix.EBUSY
	for i := int32(0); i < hostPriorities && errors.Is(err, unix.EBUSY); i++ {
		l, err = link.AttachNetfilter(link.NetfilterOptions{
			Program: prog, ProtocolFamily: h.pf, Hook: h.hook, Priority: hostPriority - i,
		})
	}
	return l, err
}

func (n *netfilter) read(r *reading) hostInForce {
	in := hostInForce{complete: true}
	leftOut := false
	for _, h := range hostHooks {
		row := Hook{Name: h.name}
		info, err := pins.Info(n.pins.Pin(h.name))
		if err == nil {
			row.Attached, row.Program, row.Link = true, uint32(info.Program), uint32(info.ID)
			in.programs = append(in.programs, info.Program)
			var doc *document
			doc, row.Since, err = readDocument(info.Program)
			if h.program == bpf.HostProgHostForward {
				in.doc = doc
			}
		}
		if h.delivers() && errors.Is(err, fs.ErrNotExist) {
			leftOut = true
			continue
		}
		if err != nil {
			in.complete = false
			if !errors.Is(err, fs.ErrNotExist) {
				in.reason = err.Error()
			}
			continue
		}
		r.Hooks = append(r.Hooks, row)
	}
	if leftOut && in.complete && in.doc != nil {
		in.complete, in.reason = n.nothingToDeliver()
	}
	return in
}

// nothingToDeliver says whether the host side is complete without judging packets to the
// host itself.
func (n *netfilter) nothingToDeliver() (complete bool, reason string) {
	exist, err := tunnels{n.site}.exist()
	switch {
	case err != nil:
		return false, err.Error()
	case exist:
		return false, "this host has tunnels, and what they unpack is not judged: attach again, or run the service"
	case !n.pins.Served():
		return true, "tunnels that are made from now on are judged after the next attach, since the service that watches for them does not run"
	}
	return true, ""
}

func (n *netfilter) whyNot(r *reading) (bool, string) { return false, r.found.why(HostSide) }

func (n *netfilter) detach(change *pins.Change) error {
	for _, h := range hostHooks {
		if err := change.DropLink(n.pins.Pin(h.name)); err != nil {
			return err
		}
	}
	return n.spare(nil, change)
}
