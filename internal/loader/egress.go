package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// ErrExcluded means that another program is attached to the cgroup, or above it, in a way
// that excludes all programs below it.
var ErrExcluded = errors.New("another program excludes all others here")

// hook is a place where a policed cgroup has a program. The program and the pin have the
// same name.
type hook struct {
	name   string
	attach ebpf.AttachType
}

// hooks are the hooks of a policed cgroup, in the order in which they are attached: the
// boundary comes first.
var hooks = []hook{
	{bpf.EgressProgEgress, ebpf.AttachCGroupInetEgress},
	{bpf.EgressProgConnect4, ebpf.AttachCGroupInet4Connect},
	{bpf.EgressProgConnect6, ebpf.AttachCGroupInet6Connect},
	{bpf.EgressProgSendmsg4, ebpf.AttachCGroupUDP4Sendmsg},
	{bpf.EgressProgSendmsg6, ebpf.AttachCGroupUDP6Sendmsg},
}

// isHook says whether one of the hooks has this name.
func isHook(name string) bool {
	return slices.ContainsFunc(hooks, func(h hook) bool { return h.name == name })
}

// egress is the layer of the egress filter: the hooks of policed cgroups.
type egress struct{ site }

// load makes and opens the cgroups of a plan and loads their programs: these cgroups become
// the targets of the attach.
func (e egress) load(a *attachment, plan *plan) error {
	for _, rel := range plan.wanted {
		t, err := e.target(rel, a)
		if err != nil {
			return err
		}
		a.targets = append(a.targets, t)
		t.was = &policed{id: t.id, dir: e.pins.Cgroup(t.id)}
		if i := slices.IndexFunc(plan.old, func(o *policed) bool { return o.id == t.id }); i >= 0 {
			t.was = plan.old[i]
		}
	}
	return nil
}

// target is a cgroup that an attach polices.
type target struct {
	rel   string
	dir   *os.File
	id    uint64
	progs *Programs
	// recognises is whether containers in it are recognised by name.
	recognises bool
	// was is the cgroup as it was policed before. Without links it was not policed.
	was *policed
}

func (t *target) close() {
	t.dir.Close()
	if t.progs != nil {
		t.progs.Close()
	}
}

// target makes and opens the directory of a cgroup, and loads its programs.
func (e egress) target(rel string, a *attachment) (_ *target, err error) {
	if err := e.makeCgroup(rel, a.change); err != nil {
		return nil, err
	}
	t := &target{rel: rel, recognises: a.policy.Recognises(rel)}
	if t.dir, t.id, err = e.root.Open(rel); err != nil {
		return nil, err
	}
	if err := a.change.Step("load %s", rel); err != nil {
		t.close()
		return nil, err
	}
	if t.progs, err = a.programs(a.state, rel, t.id); err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

// makeCgroup makes the missing directories of a cgroup.
func (e egress) makeCgroup(rel string, change *pins.Change) error {
	path := e.root.Path(rel)
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if parent := filepath.Dir(rel); parent != "/" {
		if err := e.makeCgroup(parent, change); err != nil {
			return err
		}
	}
	if err := change.Step("make %s", rel); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	// The directory stays if a process has moved in meanwhile.
	change.Back(func() error { os.Remove(path); return nil })
	return nil
}

// attach puts the programs of the targets on their hooks.
func (e egress) attach(a *attachment) error {
	for _, t := range a.targets {
		if err := t.attach(a.change); err != nil {
			return fmt.Errorf("attach to %s: %w", e.root.Path(t.rel), err)
		}
	}
	return nil
}

func (t *target) attach(change *pins.Change) error {
	if err := change.Mkdir(t.was.dir); err != nil {
		return err
	}
	for _, h := range hooks {
		if err := change.Step("%s of %s", h.name, t.rel); err != nil {
			return err
		}
		prog := t.progs.byHook[h.name]
		var err error
		if l := t.was.links[h.name]; l != nil {
			err = change.UpdateLink(l, t.was.info[h.name].Program, prog)
		} else {
			err = change.PinLink(filepath.Join(t.was.dir, h.name), func() (link.Link, error) { return h.link(t.dir, prog) })
		}
		if err != nil {
			return fmt.Errorf("hook %s: %w", h.name, err)
		}
	}
	return nil
}

// link attaches a program to a cgroup. The error can wrap ErrExcluded.
func (h hook) link(dir *os.File, prog *ebpf.Program) (link.Link, error) {
	// AttachCgroup would fall back to an attachment that cannot be pinned, and that any
	// cgroup below could override.
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: prog, Attach: h.attach})
	if errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("%w: %w", ErrExcluded, err)
	}
	if err != nil {
		return nil, err
	}
	return l, nil
}

// AttachTypes returns the attach types of a policed cgroup's hooks.
func AttachTypes() (types []ebpf.AttachType) {
	for _, h := range hooks {
		types = append(types, h.attach)
	}
	return types
}

// AttachFor attaches programs to some hooks of a cgroup, until detach is called or the
// process ends.
func (p *Programs) AttachFor(dir *os.File, types []ebpf.AttachType) (detach func(), err error) {
	var links []link.Link
	detach = func() {
		for _, l := range links {
			l.Close()
		}
	}
	for _, h := range hooks {
		if !slices.Contains(types, h.attach) {
			continue
		}
		l, err := h.link(dir, p.byHook[h.name])
		if err != nil {
			detach()
			return nil, fmt.Errorf("hook %s: %w", h.name, err)
		}
		links = append(links, l)
	}
	return detach, nil
}

// detach removes the filter from one cgroup, together with pins of other versions.
func (e egress) detach(change *pins.Change, p *policed) error {
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if isHook(entry.Name()) {
			continue
		}
		if err := pins.Remove(filepath.Join(p.dir, entry.Name())); err != nil {
			return err
		}
	}
	// The boundary was attached first and goes last.
	for _, h := range slices.Backward(hooks) {
		if err := change.Step("detach %s of %s", h.name, p.rel); err != nil {
			return err
		}
		if err := pins.Detach(filepath.Join(p.dir, h.name)); err != nil {
			return err
		}
	}
	return os.Remove(p.dir)
}

// read adds the policed cgroups and their hooks to a status.
func (e egress) read(r *reading) {
	r.Enforcing = true
	for _, p := range r.policed {
		// No path: an attach was interrupted before it attached anything, and the
		// cgroup is gone.
		if p.rel != "" {
			e.readHooks(r, p)
		}
	}
	r.Enforcing = r.Enforcing && len(r.Cgroups) > 0
}

func (e egress) readHooks(r *reading, p *policed) {
	path := e.root.Path(p.rel)
	r.Cgroups = append(r.Cgroups, path)
	if p.doc != nil && r.Policy == nil {
		r.Policy, r.Mode, r.Version = &p.doc.Policy, p.doc.Policy.Mode, p.doc.Version
	}
	if p.doc == nil || p.doc.Policy.Mode != policy.Enforce {
		r.Enforcing = false
	}
	for _, h := range hooks {
		row := Hook{Name: h.name, Cgroup: path}
		info := p.info[h.name]
		switch {
		case p.gone:
			row.Reason = "the cgroup was removed; attach again"
		case info == nil:
			row.Reason = "detached by another program, or an attach was interrupted; attach again"
		default:
			row.Attached = true
			row.Program, row.Link = uint32(info.Program), uint32(info.ID)
			row.Since = p.since[h.name]
			switch {
			case p.older(h.name, r.last):
				row.Reason = "with an older policy, since an attach was interrupted; attach again"
			case r.interrupted:
				row.Reason = "an attach was interrupted while it took over from another version; attach again"
			}
		}
		if row.Reason != "" {
			r.Enforcing = false
		}
		r.Hooks = append(r.Hooks, row)
	}
}
