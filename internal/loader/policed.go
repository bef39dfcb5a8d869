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

// maxPoliced is how many cgroups can be policed at once.
const maxPoliced = 8 // MAX_POLICED

// policed is a cgroup that has pinned links.
type policed struct {
	id  uint64
	dir string
	// rel is the path of the cgroup, or its former path if the cgroup is gone.
	rel  string
	gone bool
	// links are the links of the hooks, by name, without dead links: those that another
	// program has detached.
	links map[string]link.Link
	info  map[string]*link.Info
	// families is the link that refuses sockets; nil if there is none.
	families *link.Info
	// familiesDoc and familiesSince describe its program, like doc and since the egress
	// program.
	familiesDoc   *document
	familiesSince time.Time
	// docs and since describe the programs of the hooks, by name: their documents, as
	// far as the version that loaded them wrote any, and when they were loaded.
	docs  map[string]*document
	since map[string]time.Time
	// doc is the document of the first hook that has one, which is the egress hook; nil
	// if none has one.
	doc *document
}

// Close closes the links, which stay pinned.
func (p *policed) Close() error {
	for _, l := range p.links {
		l.Close()
	}
	return nil
}

// installed reads all policed cgroups back from the kernel, including those of other
// versions. The caller closes them.
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

// inForce says whether a link is attached to the cgroup with an id, or to the whole host.
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

// read returns what the kernel says about the link of a hook, and notes the document and
// load time of its program.
func (p *policed) read(name string, l link.Link) (*link.Info, error) {
	for {
		info, err := l.Info()
		if err != nil {
			return nil, err
		}
		doc, since, err := readDocument(info.Program)
		if errors.Is(err, fs.ErrNotExist) {
			// The process that holds the lock has replaced the program
			// meanwhile. A link that was detached keeps its program.
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
		} // Other names are pins of other versions.
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

// readHook opens the link of a hook if it is in force.
func (p *policed) readHook(name string) error {
	pin := filepath.Join(p.dir, name)
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, fs.ErrNotExist) || err != nil && pins.IsNoLink(pin) {
		return nil // the holder of the lock has detached it meanwhile, or something else is pinned there
	}
	if err != nil {
		return fmt.Errorf("open pinned link %s: %w", pin, err)
	}
	info, err := p.read(name, l)
	if err != nil {
		l.Close()
		return err
	}
	// The kernel clears the cgroup of a link that was detached or whose cgroup is gone.
	if c := info.Cgroup(); c == nil || c.CgroupId != p.id {
		l.Close()
		return nil
	}
	p.links[name], p.info[name] = l, info
	return nil
}

// readFamilies notes the link that refuses sockets if it is in force.
func (p *policed) readFamilies() {
	// During a replacement, either link may be pinned here; both are in force.
	info, err := pins.Info(familiesPin(p))
	if err != nil || !inForce(info, p.id) {
		return
	}
	p.families = info
	// The link is in force even if its document cannot be read.
	p.familiesDoc, p.familiesSince, _ = readDocument(info.Program)
}

// settled reads all policed cgroups back as an attach leaves them, not in the middle of
// one, and returns the number of the last attach; 0 if one is in progress. The caller
// closes the cgroups.
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
			// The attach may have ended meanwhile.
			closeAll(all)
		}
	}
	return all, last, nil
}

// older says whether a hook of the cgroup has a program of an earlier attach than the last.
// last is 0 if the last attach wrote no number.
func (p *policed) older(hook string, last uint64) bool {
	if last == 0 || p.info[hook] == nil {
		return false
	}
	doc := p.docs[hook]
	return doc == nil || doc.Attach != last
}

// isOlder says whether any hook of the cgroup does.
func (p *policed) isOlder(last uint64) bool {
	return slices.ContainsFunc(hooks, func(h hook) bool { return p.older(h.name, last) })
}

// lastAttach returns the number of the attach that loaded the newest program of the hooks.
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

// recognises says whether containers in the cgroup are recognised by name.
func (p *policed) recognises() bool {
	return p.rel != "" && p.doc != nil && p.doc.Policy.Recognises(p.rel)
}
