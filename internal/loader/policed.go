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

	"github.com/cilium/ebpf/link"

	"github.com/egressbpf/egressbpf/internal/pins"
)

// maxPoliced is how many cgroups can be policed.
const maxPoliced = 8 // MAX_POLICED

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
		switch name := entry.Name(); {
		case name == pins.Families || pins.IsNext(name, pins.Families):
			p.readFamilies()
		case isHook(name):
			if err := p.readHook(name); err != nil {
				return nil, err
			}
		} // Others are of another version.
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

// readHook opens the link of a hook, if it is in force.
func (p *policed) readHook(name string) error {
	pin := filepath.Join(p.dir, name)
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, fs.ErrNotExist) || err != nil && pins.IsNoLink(pin) {
		return nil // detached meanwhile, by who holds the lock, or in the place of a link
	}
	if err != nil {
		return fmt.Errorf("open pinned link %s: %w", pin, err)
	}
	info, err := p.read(name, l)
	if err != nil {
		l.Close()
		return err
	}
	// The kernel empties a link whose cgroup is gone or that was detached.
	if c := info.Cgroup(); c == nil || c.CgroupId != p.id {
		l.Close()
		return nil
	}
	p.links[name], p.info[name] = l, info
	return nil
}

// readFamilies notes the link that refuses sockets, if it is in force.
func (p *policed) readFamilies() {
	// While an exchange goes on, either is.
	info, err := pins.Info(familiesPin(p))
	if err != nil || !inForce(info, p.id) {
		return
	}
	p.families = info
	// Without them, the link is as much in force.
	p.familiesDoc, p.familiesSince, _ = readDocument(info.Program)
}

// settled reads all policed cgroups back, as an attach leaves them and not in its midst, and
// returns the number of the last attach; 0 if one is at work. The caller closes them.
func (f *Filter) settled() (all []*policed, last uint64, err error) {
	for try := range 2 {
		if all, err = f.installed(); err != nil {
			return nil, 0, err
		}
		last = lastAttach(all)
		if !slices.ContainsFunc(all, func(p *policed) bool { return p.isOlder(last) }) {
			break
		}
		if f.pins.Locked() {
			return all, 0, nil
		}
		if try == 0 {
			// It may have ended meanwhile.
			closeAll(all)
		}
	}
	return all, last, nil
}

// older says whether a hook of the cgroup has a program of another attach than the last,
// which is 0 if it gave no number.
func (p *policed) older(hook string, last uint64) bool {
	if last == 0 || p.info[hook] == nil {
		return false
	}
	doc := p.docs[hook]
	return doc == nil || doc.Attach != last
}

// isOlder says whether any of its hooks has.
func (p *policed) isOlder(last uint64) bool {
	return slices.ContainsFunc(hooks, func(h hook) bool { return p.older(h.name, last) })
}

// lastAttach returns the number of the attach that loaded the newest of the hooks' programs.
func lastAttach(all []*policed) (attach uint64) {
	var newest time.Time
	for _, p := range all {
		for name, doc := range p.docs {
			if doc != nil && !p.since[name].Before(newest) {
				newest, attach = p.since[name], doc.Attach
			}
		}
	}
	return attach
}

// recognises says whether containers of the cgroup are told by their names.
func (p *policed) recognises() bool {
	return p.rel != "" && p.doc != nil && p.doc.Policy.Recognises(p.rel)
}
