package loader

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// ErrCannotRecognise means that this kernel does not run a program when a cgroup is made,
// so that containers cannot be told from other cgroups.
var ErrCannotRecognise = errors.New("this kernel cannot tell containers from other cgroups")

// cgroupsHooks are the hooks of the programs that follow containers as they come and go.
// They are hooks of the whole host.
var cgroupsHooks = []string{bpf.CgroupsProgRecognise, bpf.CgroupsProgKeep, bpf.CgroupsProgRelease}

// recognition is the layer that follows containers as they come and go.
type recognition struct{ site }

// attach makes the containers of the targets known, those that exist and those to come, if
// they are recognised by name.
func (r recognition) attach(a *attachment) error {
	if err := r.keepOld(a); err != nil {
		return err
	}
	constants := cgroupsConstants(a.targets, a.policy)
	if !recognises(a.targets) {
		return nil
	}
	// First the program, for containers made from now on; then those that exist.
	if err := r.attachHook(bpf.CgroupsProgRecognise, constants, a); err != nil {
		if Inconclusive(err) {
			return fmt.Errorf("recognise containers in %s: %w", r.root.Path(a.targets[0].rel), err)
		}
		return fmt.Errorf("%s: %w: %w", r.root.Path(a.targets[0].rel), ErrCannotRecognise, err)
	}
	return r.enrol(a)
}

// keepOld keeps the programs of maps that are replaced beside those of the new maps, until all
// programs are exchanged: the others look for containers in the old maps, for long if this
// process is killed meanwhile.
func (r recognition) keepOld(a *attachment) error {
	if a.migration == nil {
		return nil
	}
	for _, name := range cgroupsHooks {
		if err := a.change.KeepLink(r.pins.Pin(name)); err != nil {
			return err
		}
	}
	return nil
}

// followEarly attaches the other programs before the filter uses new maps, if there are any: who
// restarts then has its bucket in them.
func (r recognition) followEarly(a *attachment) error {
	if a.migration != nil {
		r.attachOthers(a)
	}
	return nil
}

// follow attaches the other programs, and removes the state of cgroups that are no
// containers. The filter works without these programs, but then the state of removed
// containers takes room, and a restarted container has a full bucket.
func (r recognition) follow(a *attachment) error {
	if a.migration == nil {
		r.attachOthers(a)
	}
	return r.forgetOthers(a)
}

func (r recognition) attachOthers(a *attachment) {
	constants := cgroupsConstants(a.targets, a.policy)
	for _, name := range cgroupsHooks {
		if name != bpf.CgroupsProgRecognise || !recognises(a.targets) {
			err := r.attachHook(name, constants, a)
			if err != nil && a.migration != nil {
				// The program of the old maps stays until these go (keepOld), and no longer.
				err = errors.Join(err, a.change.DropLink(r.pins.Pin(name)))
			}
			a.found.note(name, err)
		}
	}
}

func (r recognition) attachHook(name string, constants map[string]any, a *attachment) error {
	prog, err := loadCgroups(name, a.state, constants, a.types)
	if err != nil {
		return err
	}
	defer prog.Close()
	// Links of tracing programs cannot be updated. For a moment, both programs run and
	// do the same.
	return a.change.ReplaceLink(r.pins.Pin(name), func() (link.Link, error) {
		return link.AttachTracing(link.TracingOptions{Program: prog})
	})
}

// detach detaches the programs that follow containers.
func (r recognition) detach(change *pins.Change) error {
	for _, name := range cgroupsHooks {
		if err := change.DropLink(r.pins.Pin(name)); err != nil {
			return err
		}
	}
	return nil
}

// read adds the hooks to a status.
func (r recognition) read(s *reading) {
	for _, name := range cgroupsHooks {
		row := r.readHook(name, s.found)
		s.Hooks = append(s.Hooks, row)
		for _, p := range s.policed {
			if name == bpf.CgroupsProgRecognise && p.recognises() {
				s.Recognises = true
				s.Enforcing = s.Enforcing && row.Attached
			}
		}
	}
}

func (r recognition) readHook(name string, found *found) Hook {
	row := Hook{Name: name}
	info, err := pins.Info(r.pins.Pin(name))
	if errors.Is(err, fs.ErrNotExist) {
		row.Reason = found.why(name)
		return row
	}
	if err != nil {
		row.Reason = err.Error()
		return row
	}
	row.Attached, row.Program, row.Link = true, uint32(info.Program), uint32(info.ID)
	if _, row.Since, err = readDocument(info.Program); err != nil {
		row.Reason = err.Error()
	}
	return row
}

// ProbeRecognise says why this kernel cannot tell containers from other cgroups; nil if it
// can.
func ProbeRecognise(state *maps.State) error {
	root := &target{id: 1, rel: "/", recognises: true}
	prog, err := loadCgroups(bpf.CgroupsProgRecognise, state, cgroupsConstants([]*target{root}, policy.Default()), nil)
	if err != nil {
		return err
	}
	return prog.Close()
}

// loadCgroups loads one of the programs that follow cgroups. types may be nil. The caller
// closes it.
func loadCgroups(name string, state *maps.State, constants map[string]any, types *btf.Cache) (*ebpf.Program, error) {
	spec, err := bpf.LoadCgroups()
	if err != nil {
		return nil, err
	}
	if err := set(spec, constants); err != nil {
		return nil, err
	}
	spec.Programs = map[string]*ebpf.ProgramSpec{"program": spec.Programs[name]}
	// Kernels before 5.11 charge maps to it.
	if err := maps.RemoveMemlock(); err != nil {
		return nil, err
	}
	shared, err := state.Use(spec)
	if err != nil {
		return nil, err
	}
	var loaded struct {
		Program *ebpf.Program `ebpf:"program"`
	}
	if err := maps.Cause(spec.LoadAndAssign(&loaded, &ebpf.CollectionOptions{MapReplacements: shared, Cache: types})); err != nil {
		if LockedDown() {
			err = ErrLockedDown // the verifier's message would mislead
		}
		return nil, fmt.Errorf("load program %s: %w", name, err)
	}
	return loaded.Program, nil
}

// cgroupsConstants returns the policed cgroups and the scopes as constants of the programs.
func cgroupsConstants(targets []*target, p policy.Policy) map[string]any {
	scopes, n := scopesOf(p)
	return map[string]any{bpf.CgroupsVarPoliced: policedBy(targets), bpf.CgroupsVarScopes: scopes, bpf.CgroupsVarN_scopes: n}
}

func scopesOf(p policy.Policy) (scopes [32]bpf.CgroupsScope, n uint32) { // MAX_SCOPES
	for i, s := range p.Scopes {
		parts := s.Parts()
		scope := bpf.CgroupsScope{
			Kind:      bpf.CgroupsScopeKind(parts.Kind),
			PrefixLen: uint32(len(parts.Prefix)),
			SuffixLen: uint32(len(parts.Suffix)),
			Level:     uint32(parts.Level),
		}
		for i := range len(parts.Prefix) {
			scope.Prefix[i] = int8(parts.Prefix[i])
		}
		for i := range len(parts.Suffix) {
			scope.Suffix[i] = int8(parts.Suffix[i])
		}
		scopes[i] = scope
	}
	return scopes, uint32(len(p.Scopes))
}
