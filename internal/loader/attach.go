package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Attach puts the policy in force for the cgroups, given by path, and for those
// that are policed already; for the root, if there are none of either. Directories
// that do not exist are made. Where the
// filter is in force, programs and policy are exchanged through its links: there
// is no moment without a filter, and state is kept.
//
// On an error, what was in force before is in force again. Besides errors of the
// kernel and those of package cgroup, the error can wrap ErrBusy, ErrCannotRecognise,
// ErrExcluded, ErrNested, ErrOtherVersion, ErrPinPath and ErrWholeHost.
//
// A process that was killed while it attached leaves each hook of each cgroup
// either as it was before or as it should be; the next Attach completes it.
func (f *Filter) Attach(ctx context.Context, cgroups []string, p policy.Policy) (err error) {
	if err := p.Validate(); err != nil {
		return err
	}
	var wanted []string
	for _, path := range cgroups {
		rel, err := f.root.Rel(path)
		if err != nil {
			return err
		}
		if rel == "/" && !p.Recognises(rel) {
			return fmt.Errorf("%s: %w", path, ErrWholeHost)
		}
		wanted = append(wanted, rel)
	}
	if err := cgroup.CheckNamespace(); err != nil {
		return err
	}
	// Kernels before 5.11 charge maps to it.
	if err := rlimit.RemoveMemlock(); err != nil {
		return err
	}
	if err := f.checkNested(wanted); err != nil {
		return err
	}
	if err := f.pins.Mount(f.fault, inHostsMounts); err != nil {
		return err
	}

	unlock, created, err := f.pins.Lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	change := pins.NewChange(f.fault)
	defer func() { err = change.End(err) }()
	if created {
		change.Back(f.pins.RemoveEmpty)
	}
	if err := f.pins.Check(); err != nil {
		return err
	}
	if unknown, err := f.pins.Unknown(); err != nil {
		return err
	} else if len(unknown) > 0 {
		return fmt.Errorf("%s: %w", unknown[0], ErrOtherVersion)
	}
	old, err := f.installed()
	if err != nil {
		return err
	}
	// Closed after the way back, which goes through their links.
	named := slices.Clone(wanted)
	var inner []*policed
	for _, o := range old {
		change.Keep(o)
		if o.rel == "" {
			continue
		}
		// What is named takes over from what it encloses, once it is in force.
		if slices.ContainsFunc(named, func(rel string) bool { return rel != o.rel && cgroup.Within(o.rel, rel) }) {
			inner = append(inner, o)
			continue
		}
		// A cgroup that is gone is policed again if somebody made it anew.
		if _, err := os.Stat(f.root.Path(o.rel)); err == nil {
			wanted = append(wanted, o.rel)
		}
	}
	if len(wanted) == 0 {
		if !p.Recognises("/") {
			return fmt.Errorf("%s: %w", f.root, ErrWholeHost)
		}
		wanted = []string{"/"}
	}
	slices.Sort(wanted)
	wanted = slices.Compact(wanted)
	if err := f.checkNested(wanted); err != nil {
		return err
	}
	if len(wanted) > maxPlaces {
		return fmt.Errorf("%d cgroups: %w: at most %d", len(wanted), ErrTooMany, maxPlaces)
	}
	state, err := f.openState(change)
	if err != nil {
		return err
	}
	change.Keep(state)
	shared, err := loadPolicy(p)
	if err != nil {
		return err
	}
	defer shared.close()

	// Everything that can be refused is loaded before anything is exchanged.
	var targets []*target
	defer func() {
		for _, t := range targets {
			t.close()
		}
	}()
	for _, rel := range wanted {
		t, err := f.prepare(rel, shared, state, change)
		if err != nil {
			return err
		}
		targets = append(targets, t)
	}
	if err := f.attachRecognise(targets, p, state, change); err != nil {
		return err
	}
	// What is missing, the filter works without. Status tells, and why.
	var found found
	var refuser *refuser
	if p.Families != policy.AnyFamily {
		refuser, err = findRefuser(change)
		found.note(SocketFamilies, err)
	}
	gap, err := socketIdentityGap()
	if err != nil {
		return err
	}
	if gap != "" {
		found.note(socketIdentity, errors.New(gap))
	}
	for _, t := range targets {
		was := &policed{id: t.id, dir: f.pins.Cgroup(t.id)}
		if i := slices.IndexFunc(old, func(o *policed) bool { return o.id == t.id }); i >= 0 {
			was = old[i]
		}
		if err := f.attachTarget(t, was, change); err != nil {
			return fmt.Errorf("attach to %s: %w", f.root.Path(t.rel), err)
		}
	}
	for _, t := range targets {
		dir := f.pins.Cgroup(t.id)
		if err := f.attachFamilies(refuser, t, dir, p, state, change); err != nil {
			return fmt.Errorf("refuse sockets of %s: %w", f.root.Path(t.rel), err)
		}
	}
	if err := f.attachHost(shared, state, targets, &found, change); err != nil {
		return err
	}
	if err := forgetDevices(state); err != nil {
		return err
	}
	f.followCgroups(targets, p, state, &found, change)
	if err := f.forgetOthers(targets, p, state); err != nil {
		return err
	}
	for _, t := range targets {
		if err := found.keep(t.progs.Egress(), t.progs.doc); err != nil {
			return fmt.Errorf("note what was found: %w", err)
		}
	}
	if err := f.pins.RemoveFormer(); err != nil {
		return err
	}
	for _, o := range inner {
		if err := f.removePoliced(o, change); err != nil {
			return err
		}
	}
	for _, o := range old {
		if o.gone && !slices.Contains(inner, o) {
			// Nothing can be in force there.
			if err := f.removePoliced(o, change); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *Filter) checkNested(rels []string) error {
	for _, outer := range rels {
		for _, inner := range rels {
			if inner != outer && cgroup.Within(inner, outer) {
				return fmt.Errorf("%s and %s: %w", f.root.Path(outer), f.root.Path(inner), ErrNested)
			}
		}
	}
	return nil
}

// target is a cgroup that is about to be policed.
type target struct {
	rel   string
	dir   *os.File
	id    uint64
	progs *Programs
	// recognises is whether its containers are told by their names.
	recognises bool
}

func (t *target) close() {
	t.dir.Close()
	if t.progs != nil {
		t.progs.Close()
	}
}

// prepare makes and opens the directory of a cgroup and loads its programs.
func (f *Filter) prepare(rel string, shared *loaded, state *maps.State, change *pins.Change) (_ *target, err error) {
	if err := f.makeCgroup(rel, change); err != nil {
		return nil, err
	}
	t := &target{rel: rel, recognises: shared.policy.Recognises(rel)}
	if t.dir, t.id, err = f.root.Open(rel); err != nil {
		return nil, err
	}
	if err := change.Step("load %s", rel); err != nil {
		t.close()
		return nil, err
	}
	if t.progs, err = shared.programs(state, rel, t.id); err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

// makeCgroup makes the directories of a cgroup that do not exist.
func (f *Filter) makeCgroup(rel string, change *pins.Change) error {
	path := f.root.Path(rel)
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if parent := filepath.Dir(rel); parent != "/" {
		if err := f.makeCgroup(parent, change); err != nil {
			return err
		}
	}
	if err := change.Step("make %s", rel); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	// Whoever moved in meanwhile keeps it.
	change.Back(func() error { os.Remove(path); return nil })
	return nil
}

// attachTarget brings the hooks of one cgroup to the target's programs.
func (f *Filter) attachTarget(t *target, was *policed, change *pins.Change) error {
	if err := change.Mkdir(was.dir); err != nil {
		return err
	}
	for _, h := range hooks {
		if err := change.Step("%s of %s", h.name, t.rel); err != nil {
			return err
		}
		var err error
		if l := was.links[h.name]; l != nil {
			err = change.UpdateLink(l, was.info[h.name].Program, t.progs.byHook[h.name])
		} else {
			err = attachHook(h, t, filepath.Join(was.dir, h.name), change)
		}
		if err != nil {
			return fmt.Errorf("hook %s: %w", h.name, err)
		}
	}
	return nil
}

func attachHook(h hook, t *target, pin string, change *pins.Change) error {
	return change.PinLink(pin, func() (link.Link, error) {
		// AttachCgroup would fall back to an attachment that cannot be pinned and that any
		// cgroup below could override.
		l, err := link.AttachRawLink(link.RawLinkOptions{
			Target:  int(t.dir.Fd()),
			Program: t.progs.byHook[h.name],
			Attach:  h.attach,
		})
		if errors.Is(err, unix.EPERM) {
			return nil, fmt.Errorf("%w: %w", ErrExcluded, err)
		}
		return l, err
	})
}
