package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// ingress is the host side before 6.4: a filter of traffic control (tc) at the ingress of
// each device that leads to containers. The filter is in force as long as the device
// exists. It needs no pin, since its name tells whose it is.
type ingress struct {
	site
	// notJudged are the devices, by index, to which the last attach of this process
	// could not add a filter, and why.
	notJudged map[int]error
}

// ingressHook is the name of the filter in status.
const ingressHook = "host_ingress"

// LoadHostIngress loads the program of the host side for kernels without BPF netfilter
// programs, and does not attach it. The program uses the maps of state, and knows the
// containers of the cgroup rel. The caller closes it.
func LoadHostIngress(p policy.Policy, state *maps.State, rel string, id uint64) (*ebpf.Program, error) {
	l, err := loadPolicy(p)
	if err != nil {
		return nil, err
	}
	defer l.close()
	t := &target{rel: rel, id: id, recognises: p.Recognises(rel)}
	return l.hostIngress(state, []*target{t}, p.HostDevices, ethernetHeader)
}

// ethernetHeader is how many bytes most devices put before the network header.
const ethernetHeader = 14

// linkHeader returns how many bytes a device puts before the network header.
func linkHeader(device netlink.Link) uint32 {
	if device.Attrs().EncapType == "ether" {
		return ethernetHeader
	}
	return 0
}

// hostIngress loads the program for devices with linkHeader bytes before the network
// header.
func (l *loaded) hostIngress(state *maps.State, targets []*target, devices []policy.Device, linkHeader uint32) (*ebpf.Program, error) {
	spec, err := bpf.LoadTc()
	if err != nil {
		return nil, err
	}
	shared, err := l.share(spec, state)
	if err != nil {
		return nil, err
	}
	if err := set(spec, map[string]any{bpf.TcVarPoliced: policedBy(targets), bpf.TcVarLinkHeader: linkHeader}); err != nil {
		return nil, err
	}
	var progs struct {
		Ingress *ebpf.Program `ebpf:"host_ingress"`
	}
	if err := maps.Cause(spec.LoadAndAssign(&progs, &ebpf.CollectionOptions{MapReplacements: shared, Cache: l.types})); err != nil {
		return nil, fmt.Errorf("load program of the host side: %w", err)
	}
	if err := l.hostDocument(devices).bind(progs.Ingress); err != nil {
		progs.Ingress.Close()
		return nil, err
	}
	return progs.Ingress, nil
}

// attach adds the filter to the devices, and removes it from all others.
func (i *ingress) attach(a *attachment, devices []policy.Device) error {
	a.found.Ingress = true
	links, err := links()
	if err != nil {
		return err
	}
	wanted := judged(links, devices)
	progs := map[uint32]*ebpf.Program{}
	defer func() {
		for _, prog := range progs {
			prog.Close()
		}
	}()
	for _, device := range wanted {
		header := linkHeader(device)
		if progs[header] != nil {
			continue
		}
		if progs[header], err = a.hostIngress(a.state, a.targets, devices, header); err != nil {
			return cannot{err}
		}
	}
	for _, device := range wanted {
		if err := i.addFilter(device, progs[linkHeader(device)], a.change); err != nil {
			return fmt.Errorf("judge packets from %s: %w", strconv.Quote(device.Attrs().Name), err)
		}
	}
	return i.dropFilters(wanted, a.change)
}

func (i *ingress) detach(change *pins.Change) error { return i.dropFilters(nil, change) }

func (i *ingress) read(r *reading) hostInForce {
	in, err := i.readFilters(r)
	if err != nil {
		return hostInForce{reason: err.Error()}
	}
	return in
}

func (i *ingress) readFilters(r *reading) (in hostInForce, err error) {
	all, err := i.filters()
	if err != nil || len(all) == 0 {
		return in, err
	}
	has := map[int]bool{}
	for _, at := range all {
		has[at.device.Attrs().Index] = true
		id := ebpf.ProgramID(at.Id)
		row := Hook{Name: ingressHook, Attached: true, Device: at.device.Attrs().Name, Program: uint32(id)}
		doc, since, err := readDocument(id)
		if errors.Is(err, fs.ErrNotExist) {
			continue // somebody is attaching meanwhile
		}
		if err != nil {
			return in, err
		}
		if doc != nil {
			in.doc = doc
		}
		row.Since = since
		in.programs = append(in.programs, id)
		r.Hooks = append(r.Hooks, row)
	}
	if in.doc == nil {
		return in, fmt.Errorf("filter %q: %w", i.filterName(), ErrOtherVersion)
	}
	in.complete, in.reason = true, ingressRemark
	links, err := links()
	if err != nil {
		return in, err
	}
	for _, l := range judged(links, in.doc.Devices) {
		if !has[l.Attrs().Index] {
			in.complete, in.reason = false, i.whyNotJudged(r, l)
		}
	}
	return in, nil
}

func (i *ingress) whyNot(r *reading) (active bool, reason string) {
	if r.Policy == nil {
		return false, r.found.why(HostSide)
	}
	links, err := links()
	if err != nil {
		return false, err.Error()
	}
	devices := judged(links, r.Policy.HostDevices)
	if len(devices) == 0 {
		return true, ingressRemark
	}
	return false, i.whyNotJudged(r, devices[0])
}

// whyNotJudged says why the packets of a device are not judged.
func (i *ingress) whyNotJudged(r *reading, l netlink.Link) string {
	what := fmt.Sprintf("packets from %s are not judged: ", strconv.Quote(l.Attrs().Name))
	if err := i.notJudged[l.Attrs().Index]; err != nil {
		return what + fmt.Sprintf("the kernel accepts no filter there (%v); see `tc filter show dev %s ingress`", err, l.Attrs().Name)
	}
	r.Unjudged = append(r.Unjudged, l.Attrs().Name)
	return what + "attach again"
}

// ingressRemark is how this host side differs from that of later kernels.
const ingressRemark = "before 6.4, or without the kernel's BTF or JIT compiler, it judges only bridges that exist at attach: attach again after Docker has made a bridge, or run the service"
