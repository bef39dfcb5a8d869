package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	statemaps "github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Before 6.4 the host side is a filter of traffic control (tc) at the ingress of each
// device that containers are behind. It is in force while the device is there, and
// needs no pin: its name tells whose it is.

// ingressHook is the filter in status.
const ingressHook = "host_ingress"

// filterPriority is before all others, of which some end the search.
const filterPriority = 1

// LoadHostIngress loads the program of the host side for kernels without BPF netfilter
// programs, with state as its memory, and attaches it nowhere. It knows containers of the
// cgroup rel. The caller closes it.
func LoadHostIngress(p policy.Policy, state *statemaps.State, rel string, id uint64) (*ebpf.Program, error) {
	l, err := loadPolicy(p)
	if err != nil {
		return nil, err
	}
	defer l.close()
	t := &target{rel: rel, id: id, recognises: p.Recognises(rel)}
	return l.hostIngress(state, []*target{t}, p.HostDevices, ethernetHeader)
}

// ethernetHeader is what is before the network header of most devices, in bytes.
const ethernetHeader = 14

// linkHeader returns it for any device.
func linkHeader(device netlink.Link) uint32 {
	if device.Attrs().EncapType == "ether" {
		return ethernetHeader
	}
	return 0
}

// hostIngress loads the program for devices with linkHeader bytes before the network
// header.
func (l *loaded) hostIngress(state *statemaps.State, targets []*target, devices []policy.Device, linkHeader uint32) (*ebpf.Program, error) {
	spec, err := bpf.LoadTc()
	if err != nil {
		return nil, err
	}
	shared, err := l.share(spec, state)
	if err != nil {
		return nil, err
	}
	if err := set(spec, map[string]any{bpf.TcVarPlaces: places(targets), bpf.TcVarLinkHeader: linkHeader}); err != nil {
		return nil, err
	}
	var progs struct {
		Ingress *ebpf.Program `ebpf:"host_ingress"`
	}
	if err := spec.LoadAndAssign(&progs, &ebpf.CollectionOptions{MapReplacements: shared}); err != nil {
		return nil, fmt.Errorf("load program of the host side: %w", err)
	}
	if err := bindDocument(document{Version: Version(), Policy: l.policy, Devices: devices, Network: netNamespace("self")}, progs.Ingress); err != nil {
		progs.Ingress.Close()
		return nil, err
	}
	return progs.Ingress, nil
}

// filter is one of this instance's at a device.
type filter struct {
	device netlink.Link
	*netlink.BpfFilter
}

// filterName is what the kernel calls them, and whose they are.
func (f *Filter) filterName() string { return "egressbpf " + string(f.pins) }

// filters returns those that are there, in no order.
func (f *Filter) filters() (found []filter, err error) {
	qdiscs, err := retry(func() ([]netlink.Qdisc, error) { return netlink.QdiscList(nil) })
	if err != nil {
		return nil, fmt.Errorf("list queueing disciplines: %w", err)
	}
	for _, q := range qdiscs {
		if q.Attrs().Parent != netlink.HANDLE_INGRESS { // as clsact's
			continue
		}
		device, err := netlink.LinkByIndex(q.Attrs().LinkIndex)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("find network device %d: %w", q.Attrs().LinkIndex, err)
		}
		at, err := f.filterOf(device)
		if err != nil {
			return nil, err
		}
		if at != nil {
			found = append(found, filter{device, at})
		}
	}
	return found, nil
}

// filterOf returns the one at a device; nil if there is none.
func (f *Filter) filterOf(device netlink.Link) (*netlink.BpfFilter, error) {
	all, err := filtersAt(device, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return nil, err
	}
	for _, at := range all {
		if b, ok := at.(*netlink.BpfFilter); ok && b.Name == f.filterName() {
			return b, nil
		}
	}
	return nil, nil
}

// filtersAt returns the filters at one side of a device; none if that is gone.
func filtersAt(device netlink.Link, parent uint32) ([]netlink.Filter, error) {
	all, err := retry(func() ([]netlink.Filter, error) { return netlink.FilterList(device, parent) })
	if gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list filters of %s: %w", strconv.Quote(device.Attrs().Name), err)
	}
	return all, nil
}

// gone is of what the kernel says of a device that is not there any more.
func gone(err error) bool { return errors.Is(err, unix.ENODEV) }

// retry reads a list again if it has changed meanwhile.
func retry[T any](list func() ([]T, error)) (all []T, err error) {
	for range 10 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// attachIngress has what the devices receive judged, and nothing else.
func (f *Filter) attachIngress(shared *loaded, state *statemaps.State, targets []*target, devices []policy.Device, why *found, change *pins.Change) error {
	why.Ingress = true
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
		if progs[header], err = shared.hostIngress(state, targets, devices, header); err != nil {
			why.note(HostSide, errors.New(firstLine(err)))
			return nil
		}
	}
	for _, device := range wanted {
		if err := f.addFilter(device, progs[linkHeader(device)], change); err != nil {
			return fmt.Errorf("judge what %s receives: %w", strconv.Quote(device.Attrs().Name), err)
		}
	}
	return f.dropFilters(wanted, change)
}

// addFilter has the program judge what a device receives. What the kernel has against that,
// perhaps for what others have there, is for Status to tell.
func (f *Filter) addFilter(device netlink.Link, prog *ebpf.Program, change *pins.Change) error {
	if err := change.Step("judge %s", device.Attrs().Name); err != nil {
		return err
	}
	old, err := f.filterOf(device)
	if err != nil {
		return err
	}
	next := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: device.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: filterPriority, Protocol: unix.ETH_P_ALL,
		},
		Fd: prog.FD(), Name: f.filterName(), DirectAction: true,
	}
	delete(f.notJudged, device.Attrs().Index)
	if old == nil {
		err := netlink.QdiscAdd(clsact(device))
		if err == nil || errors.Is(err, unix.EEXIST) {
			err = netlink.FilterAdd(next)
		}
		if err != nil {
			f.cannotJudge(device, err)
			return f.removeFilter(device)
		}
		change.Back(func() error { return f.removeFilter(device) })
		return nil
	}
	before, err := change.Program(ebpf.ProgramID(old.Id))
	if err != nil {
		return err
	}
	next.Handle, next.Priority = old.Handle, old.Priority
	// In place: there is no moment without one.
	if err := netlink.FilterReplace(next); err != nil {
		f.cannotJudge(device, err)
		return nil
	}
	change.Back(func() error {
		next.Fd = before.FD()
		if err := netlink.FilterReplace(next); !gone(err) {
			return err
		}
		return nil
	})
	return nil
}

func (f *Filter) cannotJudge(device netlink.Link, err error) {
	if gone(err) {
		return
	}
	if f.notJudged == nil {
		f.notJudged = map[int]error{}
	}
	f.notJudged[device.Attrs().Index] = err
}

// clsact is what holds the filters of a device.
func clsact(device netlink.Link) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: device.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

// dropFilters takes off those of all devices but some.
func (f *Filter) dropFilters(but []netlink.Link, change *pins.Change) error {
	all, err := f.filters()
	if err != nil {
		return err
	}
	for _, at := range all {
		if slices.ContainsFunc(but, func(l netlink.Link) bool { return l.Attrs().Index == at.device.Attrs().Index }) {
			continue
		}
		if err := change.Step("judge %s no more", at.device.Attrs().Name); err != nil {
			return err
		}
		prog, err := change.Program(ebpf.ProgramID(at.Id))
		if err != nil {
			return err
		}
		change.Back(func() error { return f.addFilter(at.device, prog, pins.OneWay(f.fault)) })
		if err := f.removeFilter(at.device); err != nil {
			return err
		}
	}
	return nil
}

// removeFilter takes the filter off a device, and what holds filters there if that is
// empty then.
func (f *Filter) removeFilter(device netlink.Link) error {
	at, err := f.filterOf(device)
	if err != nil {
		return err
	}
	if at != nil {
		if err := netlink.FilterDel(at); err != nil && !gone(err) && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove filter of %s: %w", strconv.Quote(device.Attrs().Name), err)
		}
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		if others, err := filtersAt(device, parent); err != nil || len(others) > 0 {
			return err
		}
	}
	err = netlink.QdiscDel(clsact(device))
	// There may be none, or somebody's of another kind.
	if err != nil && !gone(err) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("remove clsact of %s: %w", strconv.Quote(device.Attrs().Name), err)
	}
	return nil
}

// judged returns the devices of which what they receive is judged: those that are
// covered, and of a bridge and its ports the bridge alone, since a packet is judged once.
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

// ingressStatus reads the filters back: their document and programs, none if there are
// no filters.
func (f *Filter) ingressStatus(s *Status, d *Defence) (doc *document, programs []ebpf.ProgramID, err error) {
	all, err := f.filters()
	if err != nil || len(all) == 0 {
		return nil, nil, err
	}
	has := map[int]bool{}
	for _, at := range all {
		has[at.device.Attrs().Index] = true
		id := ebpf.ProgramID(at.Id)
		row := Hook{Name: ingressHook, Attached: true, Device: at.device.Attrs().Name, Program: uint32(id)}
		this, since, err := readDocument(id)
		if errors.Is(err, fs.ErrNotExist) {
			continue // somebody attaches meanwhile
		}
		if err != nil {
			return nil, nil, err
		}
		if this != nil {
			doc = this
		}
		row.Since = since
		programs = append(programs, id)
		s.Hooks = append(s.Hooks, row)
	}
	if doc == nil {
		return nil, nil, fmt.Errorf("filter %q: %w", f.filterName(), ErrOtherVersion)
	}
	d.Active, d.Reason = true, ingressRemark
	links, err := links()
	if err != nil {
		return nil, nil, err
	}
	for _, l := range judged(links, doc.Devices) {
		if !has[l.Attrs().Index] {
			d.Active, d.Reason = false, f.whyNotJudged(s, l)
		}
	}
	return doc, programs, nil
}

// whyNotJudged says why what a device receives is not judged.
func (f *Filter) whyNotJudged(s *Status, l netlink.Link) string {
	what := fmt.Sprintf("what %s receives is not judged: ", strconv.Quote(l.Attrs().Name))
	if err := f.notJudged[l.Attrs().Index]; err != nil {
		return what + fmt.Sprintf("the kernel accepts no filter there (%v); see `tc filter show dev %s ingress`", err, l.Attrs().Name)
	}
	s.Unjudged = append(s.Unjudged, l.Attrs().Name)
	return what + "attach again"
}

// ingressRemark is what differs from the host side of later kernels.
const ingressRemark = "before 6.4, and where the kernel is locked down, only bridges that are there when it is attached are judged: attach again when Docker has made another one, or have the service do it"
