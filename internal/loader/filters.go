package loader

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/pins"
)

// filterPriority comes before all other filters, since some of them end the search.
const filterPriority = 1

// filter is a filter of this instance at a device.
type filter struct {
	device netlink.Link
	*netlink.BpfFilter
}

// filterName is the kernel's name for the filters of this instance. It tells whose they
// are.
func (i *ingress) filterName() string { return "egressbpf " + string(i.pins) }

// filters returns the filters of this instance, in no order.
func (i *ingress) filters() (found []filter, err error) {
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
		at, err := i.filterOf(device)
		if err != nil {
			return nil, err
		}
		if at != nil {
			found = append(found, filter{device, at})
		}
	}
	return found, nil
}

// filterOf returns the filter of this instance at a device; nil if there is none.
func (i *ingress) filterOf(device netlink.Link) (*netlink.BpfFilter, error) {
	all, err := filtersAt(device, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return nil, err
	}
	for _, at := range all {
		if b, ok := at.(*netlink.BpfFilter); ok && b.Name == i.filterName() {
			return b, nil
		}
	}
	return nil, nil
}

// addFilter makes the program judge the packets of a device. If the kernel refuses, perhaps
// because of what others have attached there, Status reports it.
func (i *ingress) addFilter(device netlink.Link, prog *ebpf.Program, change *pins.Change) error {
	if err := change.Step("judge %s", device.Attrs().Name); err != nil {
		return err
	}
	old, err := i.filterOf(device)
	if err != nil {
		return err
	}
	next := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: device.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: filterPriority, Protocol: unix.ETH_P_ALL,
		},
		Fd: prog.FD(), Name: i.filterName(), DirectAction: true,
	}
	delete(i.notJudged, device.Attrs().Index)
	if old == nil {
		err := netlink.QdiscAdd(clsact(device))
		if err == nil || errors.Is(err, unix.EEXIST) {
			err = netlink.FilterAdd(next)
		}
		if err != nil {
			i.cannotJudge(device, err)
			return i.removeFilter(device)
		}
		change.Back(func() error { return i.removeFilter(device) })
		return nil
	}
	before, err := change.Program(ebpf.ProgramID(old.Id))
	if err != nil {
		return err
	}
	next.Handle, next.Priority = old.Handle, old.Priority
	// Replaced in place, so that there is no moment without a filter.
	if err := netlink.FilterReplace(next); err != nil {
		i.cannotJudge(device, err)
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

func (i *ingress) cannotJudge(device netlink.Link, err error) {
	if gone(err) {
		return
	}
	if i.notJudged == nil {
		i.notJudged = map[int]error{}
	}
	i.notJudged[device.Attrs().Index] = err
}

// clsact is the qdisc that holds the filters of a device.
func clsact(device netlink.Link) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: device.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

// dropFilters removes the filters from all devices except some.
func (i *ingress) dropFilters(but []netlink.Link, change *pins.Change) error {
	all, err := i.filters()
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
		change.Back(func() error { return i.addFilter(at.device, prog, change.OneWay()) })
		if err := i.removeFilter(at.device); err != nil {
			return err
		}
	}
	return nil
}

// removeFilter removes the filter from a device, and the qdisc that held it if the qdisc is
// empty then.
func (i *ingress) removeFilter(device netlink.Link) error {
	at, err := i.filterOf(device)
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
	// There may be no qdisc, or one of another kind that somebody else added.
	if err != nil && !gone(err) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("remove clsact of %s: %w", strconv.Quote(device.Attrs().Name), err)
	}
	return nil
}

// retry reads a list again if it changed while it was read.
func retry[T any](list func() ([]T, error)) (all []T, err error) {
	for range 10 {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// filtersAt returns the filters at one side of a device; none if the device is gone.
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

// gone says whether an error of the kernel means that the device does not exist any more.
func gone(err error) bool { return errors.Is(err, unix.ENODEV) }
