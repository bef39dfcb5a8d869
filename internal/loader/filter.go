// Package loader puts the filter in force, swaps it and takes it away. Links and
// state are pinned to a bpffs, so that no process is needed meanwhile.
package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/pins"
)

// DefaultPinPath is where the filter is pinned unless told otherwise.
const DefaultPinPath = "/sys/fs/bpf/egressbpf"

var (
	// ErrNotAttached means that there is nothing at the pin path.
	ErrNotAttached = errors.New("egressbpf is not attached")
	// ErrBusy means that another process attaches or detaches and does not finish.
	ErrBusy = pins.ErrBusy
	// ErrOtherVersion means that the pins were made by a version whose state
	// this one cannot take over.
	ErrOtherVersion = errors.New("attached by a version that this one cannot take over from")
	// ErrPinPath means that the pin path is not a directory below the root of a
	// bpf filesystem, and not at the usual place of one, where it could be mounted.
	ErrPinPath = pins.ErrPinPath
	// ErrUnmounted means that there is no bpf filesystem, and that whether this process could
	// mount one for the host cannot be seen.
	ErrUnmounted = pins.ErrUnmounted
	// ErrPrivateMount means that the pins would be gone with this process's mount
	// namespace, and the filter with them.
	ErrPrivateMount = pins.ErrPrivateMount
	// ErrForeignPins means that what is at the pin path is not egressbpf's.
	ErrForeignPins = pins.ErrForeignPins
	// ErrTooMany means that more cgroups are to be policed than there can be.
	ErrTooMany = errors.New("too many policed cgroups")
	// ErrWholeHost means that every process of the host would be a container's.
	ErrWholeHost = errors.New("each cgroup of the host would be a container")
	// ErrExcluded means that some other program is attached to a cgroup, or above it, in
	// a way that excludes all others below.
	ErrExcluded = errors.New("another program excludes all others here")
	// ErrNested means that a cgroup to be policed lies within another one.
	ErrNested = errors.New("policed cgroups cannot be nested")
)

type hook struct {
	name   string
	attach ebpf.AttachType
}

// hooks are the programs of a policed cgroup in the order in which they are
// attached: the boundary first.
var hooks = []hook{
	{bpf.EgressProgEgress, ebpf.AttachCGroupInetEgress},
	{bpf.EgressProgConnect4, ebpf.AttachCGroupInet4Connect},
	{bpf.EgressProgConnect6, ebpf.AttachCGroupInet6Connect},
	{bpf.EgressProgSendmsg4, ebpf.AttachCGroupUDP4Sendmsg},
	{bpf.EgressProgSendmsg6, ebpf.AttachCGroupUDP6Sendmsg},
}

// isHook says whether one of the hooks has that name.
func isHook(name string) bool {
	return slices.ContainsFunc(hooks, func(h hook) bool { return h.name == name })
}

// cgroupsHooks are the programs that follow containers as they come and go. They are of
// the whole host.
var cgroupsHooks = []string{bpf.CgroupsProgRecognise, bpf.CgroupsProgKeep, bpf.CgroupsProgRelease}

// inHostsMounts says whether what this process mounts is mounted for the host. Tests, which
// mount nothing for the host, change it.
var inHostsMounts = pins.InHostsMounts

// Filter is the filter of this host, in force or not, as its pins tell.
type Filter struct {
	pins pins.Path
	root cgroup.Root
	// notJudged are the devices, by their indexes, that the last attach of this process
	// could not have judged, and why.
	notJudged map[int]error
	fault     pins.Fault
}

// New returns the filter that is or will be pinned at pinPath, which must not be empty, and
// polices cgroups below root.
func New(pinPath string, root cgroup.Root) *Filter {
	return &Filter{pins: pins.At(pinPath), root: root}
}

// Pins is the pin path.
func (f *Filter) Pins() string { return string(f.pins) }

// CheckMount returns ErrPrivateMount if the filesystem of the pins is not the one that the
// host has in their place, as far as this process can see the host.
func (f *Filter) CheckMount() error { return f.pins.CheckMount() }

// Serve tells others that a process keeps the filter as it wants it, until that closes the
// file.
func (f *Filter) Serve() (*os.File, error) { return f.pins.Serve() }

// Served says whether some process keeps the filter as it wants it.
func (f *Filter) Served() bool { return f.pins.Served() }

// policed is a cgroup that has links pinned.
type policed struct {
	id  uint64
	dir string
	// rel is where the cgroup is, or was if it is gone.
	rel  string
	gone bool
	// links by the names of the hooks; dead ones, which some other program has
	// detached, are missing.
	links map[string]link.Link
	info  map[string]*link.Info
	// families is the link that refuses sockets; nil if there is none.
	families *link.Info
	// familiesDoc and familiesSince are of its program, as doc and since are of the
	// egress program.
	familiesDoc   *document
	familiesSince time.Time
	// docs and since are of the hooks' programs, by their names: what they were made from,
	// as far as the version that loaded them tells, and when they were loaded.
	docs  map[string]*document
	since map[string]time.Time
	// doc is that of the first hook that has one, which is the egress hook's; nil if none
	// has.
	doc *document
}

// Close closes the links, which stay pinned.
func (p *policed) Close() error {
	for _, l := range p.links {
		l.Close()
	}
	return nil
}

// installed reads all policed cgroups back from the kernel, those of other versions
// included. The caller closes them.
func (f *Filter) installed() (_ []*policed, err error) {
	var found []*policed
	defer func() {
		if err != nil {
			closeAll(found)
		}
	}()
	ids, err := f.pins.Cgroups()
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		p, err := f.readPoliced(id, f.pins.Cgroup(id))
		if errors.Is(err, errVanished) {
			continue
		}
		if err != nil {
			return nil, err
		}
		found = append(found, p)
	}
	slices.SortFunc(found, func(a, b *policed) int { return strings.Compare(a.rel, b.rel) })
	return found, nil
}

// inForce says whether a link that is not one of the whole host is at the cgroup.
func inForce(info *link.Info, id uint64) bool {
	c := info.Cgroup()
	return c == nil || c.CgroupId == id
}

func closeAll(all []*policed) {
	for _, p := range all {
		p.Close()
	}
}

// errVanished means that a policed cgroup was detached while it was read.
var errVanished = errors.New("detached meanwhile")

// read returns what the kernel says of the link of a hook, and notes what its program tells.
func (p *policed) read(name string, l link.Link) (*link.Info, error) {
	for {
		info, err := l.Info()
		if err != nil {
			return nil, err
		}
		doc, since, err := readDocument(info.Program)
		if errors.Is(err, fs.ErrNotExist) {
			// Who holds the lock has exchanged the program meanwhile. A link that was
			// detached keeps its program.
			continue
		}
		if err != nil {
			return nil, err
		}
		p.docs[name], p.since[name] = doc, since
		return info, nil
	}
}

func (f *Filter) readPoliced(id uint64, dir string) (_ *policed, err error) {
	p := &policed{
		id: id, dir: dir, links: map[string]link.Link{}, info: map[string]*link.Info{},
		docs: map[string]*document{}, since: map[string]time.Time{},
	}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errVanished
	}
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		name := entry.Name()
		if name == pins.Families || pins.IsNext(name, pins.Families) {
			// While an exchange goes on, either is in force.
			if info, err := pins.Info(filepath.Join(dir, pins.Families)); err == nil && inForce(info, id) {
				p.families = info
				// Without them, the link is as much in force.
				p.familiesDoc, p.familiesSince, _ = readDocument(info.Program)
			}
			continue
		}
		if !isHook(name) {
			continue // of another version
		}
		l, err := link.LoadPinnedLink(filepath.Join(dir, name), nil)
		if errors.Is(err, fs.ErrNotExist) || err != nil && pins.IsNoLink(filepath.Join(dir, name)) {
			continue // detached meanwhile, by who holds the lock, or in the place of a link
		}
		if err != nil {
			return nil, fmt.Errorf("open pinned link %s: %w", filepath.Join(dir, name), err)
		}
		info, err := p.read(name, l)
		if err != nil {
			l.Close()
			return nil, err
		}
		// The kernel empties a link whose cgroup is gone or that was detached.
		if c := info.Cgroup(); c == nil || c.CgroupId != id {
			l.Close()
			continue
		}
		p.links[name] = l
		p.info[name] = info
	}
	for _, h := range hooks {
		if p.doc == nil {
			p.doc = p.docs[h.name]
		}
	}
	p.rel, err = f.root.Find(id)
	if errors.Is(err, fs.ErrNotExist) {
		p.gone = true
		if p.doc != nil {
			p.rel = p.doc.Cgroup
		}
		return p, nil
	}
	return p, err
}
