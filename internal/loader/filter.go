// Package loader puts the filter in force, swaps it and takes it away. Links and
// state are pinned to a bpffs, so that no process is needed meanwhile.
//
// Below the pin path:
//
//	containers stateless totals the state, kept from version to version
//	retired
//	tickets admitted permitted mails devices tunnels
//	                            what is on its way, made anew where a version changes it
//	udp_tunnels                 a file that tells where the host unpacks packets
//	recognise keep release      the links that follow containers as they come and go
//	host_*                      the links of the host side
//	cgroup-<id>/<hook>          the links of a policed cgroup
//
// The policy is not pinned: it is loaded with the programs and gone with them.
package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
)

// DefaultPinPath is where the filter is pinned unless told otherwise.
const DefaultPinPath = "/sys/fs/bpf/egressbpf"

var (
	// ErrNotAttached means that there is nothing at the pin path.
	ErrNotAttached = errors.New("egressbpf is not attached")
	// ErrBusy means that another process attaches or detaches and does not finish.
	ErrBusy = errors.New("another egressbpf is attaching or detaching")
	// ErrOtherVersion means that the pins were made by a version whose state
	// this one cannot take over.
	ErrOtherVersion = errors.New("attached by a version that this one cannot take over from")
	// ErrPinPath means that the pin path is not a directory below the root of a
	// bpf filesystem, and not at the usual place of one, where it could be mounted.
	ErrPinPath = errors.New("not a directory in a bpf filesystem")
	// ErrForeignPins means that what is at the pin path is not egressbpf's.
	ErrForeignPins = errors.New("it holds pins, and none that egressbpf has made")
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

// Filter is the filter of this host, in force or not, as its pins tell.
type Filter struct {
	pins string
	root cgroup.Root
	// notJudged are the devices, by their indexes, that the last attach of this process
	// could not have judged, and why.
	notJudged map[int]error
	// fault, if set by a test, runs before each step that changes anything and
	// can make it fail.
	fault func(step string) error
}

// New returns the filter that is or will be pinned at pinPath, which must not be empty, and
// polices cgroups below root.
func New(pinPath string, root cgroup.Root) *Filter {
	pins, err := filepath.Abs(pinPath)
	if err != nil {
		// This process is in a directory that is gone: nothing is there.
		pins = filepath.Clean(pinPath)
	}
	return &Filter{pins: pins, root: root}
}

// Pins is the pin path.
func (f *Filter) Pins() string { return f.pins }

func (f *Filter) step(format string, args ...any) error {
	if f.fault == nil {
		return nil
	}
	return f.fault(fmt.Sprintf(format, args...))
}

// State opens the maps of a filter that is attached. A map whose pin is gone is the one
// that the programs in force use; if none does, it is as good as empty. The caller closes
// it. The error wraps ErrNotAttached or ErrOtherVersion.
func (f *Filter) State() (*maps.State, error) {
	state, err := f.openState(nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w (no pins at %s)", ErrNotAttached, f.pins)
	}
	return state, err
}

// withState calls do with the state of a filter that is attached. That none is, is no error.
func (f *Filter) withState(do func(*maps.State) error) error {
	state, err := f.State()
	if errors.Is(err, ErrNotAttached) {
		return nil
	}
	if err != nil {
		return err
	}
	defer state.Close()
	return do(state)
}

// openState opens the maps of the state. It pins those that are not pinned, and of these
// makes those that no program uses, if it is told where to note the way back.
func (f *Filter) openState(back *undo) (*maps.State, error) {
	specs, err := maps.StateSpec()
	if err != nil {
		return nil, err
	}
	opened := map[string]*ebpf.Map{}
	for _, name := range maps.StateNames() {
		m, err := f.stateMap(name, specs[name], back)
		if err != nil {
			for _, m := range opened {
				m.Close()
			}
			return nil, err
		}
		opened[name] = m
	}
	return maps.NewState(opened), nil
}

// stateMap opens one of the maps for openState.
func (f *Filter) stateMap(name string, spec *ebpf.MapSpec, back *undo) (_ *ebpf.Map, err error) {
	pin := filepath.Join(f.pins, name)
	m, pinned, err := f.findMap(name)
	if err != nil {
		return nil, fmt.Errorf("open pinned map %s: %w", pin, err)
	}
	defer func() {
		if err != nil && m != nil {
			m.Close()
		}
	}()
	if m == nil && back == nil && name == bpf.EgressMapContainers {
		return nil, fmt.Errorf("map %s: %w", name, fs.ErrNotExist)
	}
	if m != nil {
		if err := maps.Compatible(spec, m); err != nil && maps.Kept(name) {
			return nil, fmt.Errorf("pinned map %s: %w: %w", pin, ErrOtherVersion, err)
		} else if err != nil {
			// Who only reads does without.
			other := m
			m = nil
			if back == nil || !pinned {
				other.Close()
			} else if err := f.unpinMap(name, other, back); err != nil {
				return nil, err
			}
		} else if pinned {
			return m, nil
		}
	}
	if back != nil {
		if err := f.step("pin map %s", name); err != nil {
			return nil, err
		}
	}
	if m == nil {
		if m, err = ebpf.NewMap(spec); err != nil {
			return nil, fmt.Errorf("create map %s: %w", name, err)
		}
	}
	if back == nil {
		return m, nil
	}
	if err := m.Pin(pin); err != nil {
		return nil, fmt.Errorf("pin map %s: %w", name, err)
	}
	back.add(func() error { return os.Remove(pin) })
	return m, nil
}

// findMap opens a map of the state by its pin, or else the one that the programs in force
// use; nil if there is neither.
func (f *Filter) findMap(name string) (m *ebpf.Map, pinned bool, err error) {
	m, err = ebpf.LoadPinnedMap(filepath.Join(f.pins, name), nil)
	if !errors.Is(err, fs.ErrNotExist) {
		return m, err == nil, err
	}
	m, err = f.mapInUse(name)
	return m, false, err
}

// mapInUse opens the map of the state that the programs in force use, whatever became of
// its pin; nil if they use none.
func (f *Filter) mapInUse(name string) (*ebpf.Map, error) {
	pins, err := f.linkPins()
	if err != nil {
		return nil, err
	}
	for _, pin := range pins {
		info, err := pinnedInfo(pin)
		if err != nil {
			continue // no link, or gone meanwhile
		}
		if m, err := mapOf(info.Program, name); m != nil || err != nil {
			return m, err
		}
	}
	return nil, nil
}

// mapOf opens the map of a name that a program uses; nil if it uses none.
func mapOf(id ebpf.ProgramID, name string) (*ebpf.Map, error) {
	prog, err := ebpf.NewProgramFromID(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open program %d: %w", id, err)
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return nil, err
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return nil, fmt.Errorf("open map %d: %w", id, err)
		}
		if info, err := m.Info(); err == nil && info.Name == name {
			return m, nil
		}
		m.Close()
	}
	return nil, nil
}

// allPins returns all that is pinned.
func (f *Filter) allPins() (pins []string, err error) {
	err = filepath.WalkDir(f.pins, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && !d.IsDir() {
			pins = append(pins, path)
		}
		return err
	})
	return pins, err
}

// ofState says whether a pin is that of a map of the state.
func ofState(pin string) bool { return slices.Contains(maps.StateNames(), filepath.Base(pin)) }

// linkPins returns all that is pinned but the maps of the state.
func (f *Filter) linkPins() ([]string, error) {
	pins, err := f.allPins()
	return slices.DeleteFunc(pins, ofState), err
}

// unknownPins returns what is pinned that this version does not know.
func (f *Filter) unknownPins() (unknown []string, err error) {
	pins, err := f.linkPins()
	for _, pin := range pins {
		rel, err := filepath.Rel(f.pins, pin)
		if err != nil {
			return nil, err
		}
		dir, name := filepath.Split(rel)
		known := slices.Contains(pinNames(), rel) || slices.Contains(formerMaps, rel)
		if digits, ok := strings.CutPrefix(dir, cgroupPrefix); ok {
			_, err := strconv.ParseUint(strings.TrimSuffix(digits, "/"), 10, 64)
			known = err == nil && (name == familiesHook || name == familiesHook+nextSuffix || isHook(name))
		}
		if !known {
			unknown = append(unknown, pin)
		}
	}
	return unknown, err
}

// checkPins returns ErrForeignPins if there are pins and none of them is egressbpf's, of any
// version: then the directory is somebody else's.
func (f *Filter) checkPins() error {
	pins, err := f.allPins()
	if err != nil || len(pins) == 0 || slices.ContainsFunc(pins, madeByUs) {
		return err
	}
	return fmt.Errorf("%s: %w: %s", f.pins, ErrForeignPins, pins[0])
}

// hasPins says whether there can be pins of ours at the pin path, and so something to remove.
// It returns ErrForeignPins as checkPins does.
func (f *Filter) hasPins() (bool, error) {
	if _, err := os.Stat(f.pins); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	if !onBPFFS(f.pins) || isMount(f.pins) {
		return false, nil
	}
	err := f.checkPins()
	return err == nil, err
}

// isNoLink says whether something else than a link is pinned.
func isNoLink(pin string) bool {
	if m, err := ebpf.LoadPinnedMap(pin, nil); err == nil {
		m.Close()
		return true
	}
	prog, err := ebpf.LoadPinnedProgram(pin, nil)
	if err == nil {
		prog.Close()
	}
	return err == nil
}

// madeByUs says whether a pin is of a map of the state, or of a link whose program uses it.
func madeByUs(pin string) bool {
	if m, err := ebpf.LoadPinnedMap(pin, nil); err == nil {
		defer m.Close()
		info, err := m.Info()
		return err == nil && info.Name == filepath.Base(pin) && (ofState(pin) || slices.Contains(formerMaps, info.Name))
	}
	info, err := pinnedInfo(pin)
	if err != nil {
		return false
	}
	state, err := stateOf(info.Program)
	return err == nil && state != 0
}

// formerMaps are those that earlier versions have pinned, and that this one does without.
var formerMaps = []string{"overflow"}

// unpinMap makes way for a map of the same name that this version knows; the programs that
// are in force keep theirs.
func (f *Filter) unpinMap(name string, m *ebpf.Map, back *undo) error {
	pin := filepath.Join(f.pins, name)
	back.held = append(back.held, m)
	if err := f.step("unpin map %s", name); err != nil {
		return err
	}
	if err := os.Remove(pin); err != nil {
		return err
	}
	again, err := m.Clone()
	if err != nil {
		return err
	}
	back.held = append(back.held, again)
	back.add(func() error { return again.Pin(pin) })
	return nil
}

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

const cgroupPrefix = "cgroup-"

// pinNames are what is pinned beside the policed cgroups.
func pinNames() []string {
	names := maps.StateNames()
	for _, name := range cgroupsHooks {
		names = append(names, name, name+nextSuffix)
	}
	for _, h := range hostHooks {
		names = append(names, h.name, h.name+nextSuffix)
	}
	return append(names, tunnelsFile, tunnelsFile+nextSuffix)
}

// nextSuffix is that of a link's pin until it takes the place of the one before.
const nextSuffix = "-next"

// installed reads all policed cgroups back from the kernel, those of other versions
// included. The caller closes them.
func (f *Filter) installed() (_ []*policed, err error) {
	var found []*policed
	defer func() {
		if err != nil {
			closeAll(found)
		}
	}()
	entries, err := os.ReadDir(f.pins)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		digits, ok := strings.CutPrefix(entry.Name(), cgroupPrefix)
		id, err := strconv.ParseUint(digits, 10, 64)
		if !ok || err != nil {
			continue
		}
		p, err := f.readPoliced(id, filepath.Join(f.pins, entry.Name()))
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
		if name == familiesHook || name == familiesHook+nextSuffix {
			// While an exchange goes on, either is in force.
			if info, err := pinnedInfo(filepath.Join(dir, familiesHook)); err == nil && inForce(info, id) {
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
		if errors.Is(err, fs.ErrNotExist) || err != nil && isNoLink(filepath.Join(dir, name)) {
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

// lock excludes other processes until unlock is called. It creates the pin path,
// and says whether it did. The error wraps ErrBusy when ctx ends before.
func (f *Filter) lock(ctx context.Context) (unlock func(), created bool, err error) {
	for {
		if err := os.MkdirAll(filepath.Dir(f.pins), 0o700); err != nil {
			return nil, false, err
		}
		err := os.Mkdir(f.pins, 0o700)
		created := err == nil
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, false, err
		}
		dir, err := os.Open(f.pins)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, false, err
		}
		if err := flock(ctx, dir); err != nil {
			dir.Close()
			return nil, false, err
		}
		// A detach that held the lock before may have removed the directory.
		ours, err := dir.Stat()
		if err == nil {
			if current, err := os.Stat(f.pins); err == nil && os.SameFile(ours, current) {
				return func() { dir.Close() }, created, nil
			}
		}
		dir.Close()
	}
}

// locked says whether another process attaches or detaches now.
func (f *Filter) locked() bool {
	dir, err := os.Open(f.pins)
	if err != nil {
		return false
	}
	defer dir.Close()
	return errors.Is(unix.Flock(int(dir.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

func flock(ctx context.Context, dir *os.File) error {
	const retry = 5 * time.Millisecond
	for {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock %s: %w", dir.Name(), err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("lock %s: %w: %w", dir.Name(), ErrBusy, context.Cause(ctx))
		case <-time.After(retry):
		}
	}
}

// usualMount is where a bpffs belongs.
const usualMount = "/sys/fs/bpf"

// mount makes sure that the pin path is in a bpffs, by mounting one at the
// usual place if it is missing there.
func (f *Filter) mount() error {
	existing := f.pins
	for {
		if _, err := os.Stat(existing); err == nil || existing == "/" {
			break
		}
		existing = filepath.Dir(existing)
	}
	if onBPFFS(existing) && !(existing == f.pins && isMount(existing)) {
		return nil
	}
	if existing != usualMount || existing == f.pins {
		return fmt.Errorf("%s: %w", f.pins, ErrPinPath)
	}
	switch in, err := inHostsMounts(); {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s: %w (%w)", usualMount, ErrUnmounted, err)
	case !in:
		return fmt.Errorf("%s: %w", usualMount, ErrPrivateMount)
	}
	if err := f.step("mount"); err != nil {
		return err
	}
	err := unix.Mount("bpf", usualMount, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700")
	if err != nil {
		return fmt.Errorf("mount a bpf filesystem on %s: %w", usualMount, err)
	}
	return nil
}

// isMount says whether path is where a filesystem is mounted. Other people have
// their pins there too.
func isMount(path string) bool {
	var here, above unix.Stat_t
	return unix.Stat(path, &here) == nil && unix.Stat(path+"/..", &above) == nil && (here.Dev != above.Dev || here.Ino == above.Ino)
}

func onBPFFS(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.BPF_FS_MAGIC
}
