package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/egressbpf/egressbpf/internal/pins"
)

// Elsewhere is a filter in force on a cgroup that is not pinned below this pin path: it has
// another pin path, or another mount hides its bpf filesystem.
type Elsewhere struct {
	// Cgroup is the path of the policed cgroup.
	Cgroup  string `json:"cgroup"`
	Program uint32 `json:"program_id"`
	Link    uint32 `json:"link_id"`
	// Version is the version of the programs; empty if this version cannot read it.
	Version string `json:"version,omitempty"`

	// containers is the map of the state that all programs of the filter share.
	containers ebpf.MapID
}

// foreignLinks returns all links of the kernel except those pinned below the pin path, with
// what the kernel says about them. The caller closes them.
func (f *Filter) foreignLinks() (found map[*link.Info]link.Link, err error) {
	found = map[*link.Info]link.Link{}
	defer func() {
		if err != nil {
			closeLinks(found)
		}
	}()
	links := new(link.Iterator)
	defer links.Close()
	for links.Next() {
		info, err := links.Link.Info()
		if err != nil {
			continue // it is gone, or of a type that the library does not know
		}
		found[info] = links.Take()
	}
	if err := links.Err(); err != nil {
		return nil, err
	}
	// The pins are read last, so that a link pinned meanwhile does not count as
	// foreign.
	linked, err := f.pins.Links()
	if err != nil {
		return nil, err
	}
	for _, pin := range linked {
		own, err := pins.Info(pin)
		if err != nil {
			continue // not a link, or gone meanwhile
		}
		for info, l := range found {
			if info.ID == own.ID {
				l.Close()
				delete(found, info)
			}
		}
	}
	return found, nil
}

func closeLinks(links map[*link.Info]link.Link) {
	for _, l := range links {
		l.Close()
	}
}

// elsewhere picks out the links that are packet hooks of a filter.
func (f *Filter) elsewhere(links map[*link.Info]link.Link) ([]Elsewhere, error) {
	var found []Elsewhere
	for info := range links {
		c := info.Cgroup()
		if c == nil || c.CgroupId == 0 || ebpf.AttachType(c.AttachType) != ebpf.AttachCGroupInetEgress {
			continue
		}
		doc, _, err := readDocument(info.Program)
		if errors.Is(err, fs.ErrNotExist) || doc == nil && !errors.Is(err, ErrOtherVersion) {
			continue // it is gone, or another program's
		}
		rel, err := f.root.Find(c.CgroupId)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		e := Elsewhere{Cgroup: f.root.Path(rel), Program: uint32(info.Program), Link: uint32(info.ID)}
		if doc != nil {
			e.Version = doc.Version
		}
		if e.containers, err = pins.StateOf(info.Program); err != nil {
			return nil, err
		}
		found = append(found, e)
	}
	slices.SortFunc(found, func(a, b Elsewhere) int { return strings.Compare(a.Cgroup, b.Cgroup) })
	return found, nil
}

// Elsewhere returns the filters that are in force but not pinned below the pin path.
func (f *Filter) Elsewhere() ([]Elsewhere, error) {
	links, err := f.foreignLinks()
	if err != nil {
		return nil, err
	}
	defer closeLinks(links)
	return f.elsewhere(links)
}

// ErrStillPinned means that a part of a filter can only be removed through its pin.
var ErrStillPinned = errors.New("it can only be detached by removing its pin")

// DetachElsewhere detaches the filters that Elsewhere returns. Links to functions of the
// kernel cannot be detached without their pins: if any are left, the error wraps
// ErrStillPinned. Such links judge nothing any more, except that they may still refuse
// sockets. The error can also wrap ErrBusy.
func (f *Filter) DetachElsewhere(ctx context.Context) error {
	if f.pins.OnBPFFS() {
		// Only there can another process be attaching that has not pinned its links
		// yet.
		unlock, _, err := f.pins.Lock(ctx)
		if err != nil {
			return err
		}
		defer unlock()
	}
	links, err := f.foreignLinks()
	if err != nil {
		return err
	}
	defer closeLinks(links)
	filters, err := f.elsewhere(links)
	if err != nil {
		return err
	}
	var errs []error
	for info, l := range links {
		state, err := pins.StateOf(info.Program)
		if err != nil {
			return err
		}
		if state == 0 || !slices.ContainsFunc(filters, func(e Elsewhere) bool { return e.containers == state }) {
			continue
		}
		if err := f.fault.Step("detach link %d", info.ID); err != nil {
			return err
		}
		if err := l.Detach(); errors.Is(err, ebpf.ErrNotSupported) {
			errs = append(errs, fmt.Errorf("link %d of program %d: %w", info.ID, info.Program, ErrStillPinned))
		} else if err != nil {
			errs = append(errs, fmt.Errorf("detach link %d: %w", info.ID, err))
		}
	}
	return errors.Join(errs...)
}
