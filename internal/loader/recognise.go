package loader

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// ErrCannotRecognise means that this kernel runs no program when a cgroup is made, so
// that containers cannot be told from what is beside them.
var ErrCannotRecognise = errors.New("this kernel cannot tell containers from what else is in there")

const (
	maxPlaces = 8  // MAX_PLACES
	maxDepth  = 16 // MAX_DEPTH
)

// loadCgroups loads one of the programs that follow cgroups. The caller closes it.
func loadCgroups(name string, state *maps.State, constants map[string]any) (*ebpf.Program, error) {
	spec, err := bpf.LoadCgroups()
	if err != nil {
		return nil, err
	}
	if err := set(spec, constants); err != nil {
		return nil, err
	}
	spec.Programs = map[string]*ebpf.ProgramSpec{"program": spec.Programs[name]}
	// Kernels before 5.11 charge maps to it.
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, err
	}
	var loaded struct {
		Program *ebpf.Program `ebpf:"program"`
	}
	if err := spec.LoadAndAssign(&loaded, &ebpf.CollectionOptions{MapReplacements: state.Use(spec)}); err != nil {
		if LockedDown() {
			err = ErrLockedDown // and not what the verifier says of it
		}
		return nil, fmt.Errorf("load program %s: %w", name, err)
	}
	return loaded.Program, nil
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

// placesOf returns the policed cgroups, and whether containers are told by their names in
// any of these.
func placesOf(targets []*target) (places [maxPlaces]bpf.CgroupsPlace, recognises bool) {
	for i, t := range targets {
		places[i] = bpf.CgroupsPlace{Id: t.id, Level: cgroup.Level(t.rel)}
		if t.recognises {
			places[i].Recognises = 1
			recognises = true
		}
	}
	return places, recognises
}

func cgroupsConstants(places [maxPlaces]bpf.CgroupsPlace, p policy.Policy) map[string]any {
	scopes, n := scopesOf(p)
	return map[string]any{bpf.CgroupsVarPlaces: places, bpf.CgroupsVarScopes: scopes, bpf.CgroupsVarN_scopes: n}
}

// attachRecognise has the containers of the targets enrolled, those that exist and those
// to come, where they are told by their names.
func (f *Filter) attachRecognise(targets []*target, p policy.Policy, state *maps.State, change *pins.Change) error {
	places, recognises := placesOf(targets)
	if !recognises {
		return nil
	}
	// First the program, for what is made from now on; then what exists.
	err := f.attachCgroups(bpf.CgroupsProgRecognise, cgroupsConstants(places, p), state, change)
	if err != nil {
		return fmt.Errorf("%s: %w: %w", f.root.Path(targets[0].rel), ErrCannotRecognise, err)
	}
	return f.enrol(targets, p, state, change)
}

// followCgroups attaches the other programs that follow containers as they come and go.
// The filter works without them: state of containers that are gone takes room, and what
// is started again has a full bucket.
func (f *Filter) followCgroups(targets []*target, p policy.Policy, state *maps.State, found *found, change *pins.Change) {
	places, recognises := placesOf(targets)
	for _, name := range cgroupsHooks {
		if name != bpf.CgroupsProgRecognise || !recognises {
			found.note(name, f.attachCgroups(name, cgroupsConstants(places, p), state, change))
		}
	}
}

func (f *Filter) attachCgroups(name string, constants map[string]any, state *maps.State, change *pins.Change) error {
	prog, err := loadCgroups(name, state, constants)
	if err != nil {
		return err
	}
	defer prog.Close()
	// Links of tracing programs cannot be updated. For a moment two programs do the same.
	return change.ReplaceLink(f.pins.Pin(name), func() (link.Link, error) {
		return link.AttachTracing(link.TracingOptions{Program: prog})
	})
}

// probeCgroups loads one of the programs as for the root, and closes it.
func probeCgroups(name string, state *maps.State) error {
	prog, err := loadCgroups(name, state, cgroupsConstants([maxPlaces]bpf.CgroupsPlace{{Id: 1, Recognises: 1}}, policy.Default()))
	if err != nil {
		return err
	}
	return prog.Close()
}

// containersIn returns the cgroups in which all processes are containers': those of the
// containers where these are told by their names, else the policed one.
func (f *Filter) containersIn(policed string, p policy.Policy) ([]string, error) {
	if !p.Recognises(policed) {
		return []string{policed}, nil
	}
	found, err := f.root.Outermost(policed, p.IsContainer)
	if err != nil {
		return nil, fmt.Errorf("look for containers below %s: %w", f.root.Path(policed), err)
	}
	return found, nil
}

// enrol gives state to the containers that exist.
func (f *Filter) enrol(targets []*target, p policy.Policy, state *maps.State, change *pins.Change) error {
	for _, t := range targets {
		if !t.recognises {
			continue
		}
		found, err := f.containersIn(t.rel, p)
		if err != nil {
			return err
		}
		for _, rel := range found {
			if cgroup.Level(rel)-cgroup.Level(t.rel) > maxDepth {
				continue // status tells
			}
			id, err := f.root.ID(rel)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			added, err := state.Enrol(id)
			if err != nil {
				return err
			}
			if !added {
				continue
			}
			if now, err := f.root.ID(rel); err != nil || now != id {
				// It went, perhaps before there was an entry to remove.
				if err := state.Forget(id); err != nil {
					return err
				}
				continue
			}
			change.Back(func() error { return state.Forget(id) })
		}
	}
	return nil
}

// forgetOthers removes the state of what the policy takes for a container no more, or that
// is gone.
func (f *Filter) forgetOthers(targets []*target, p policy.Policy, state *maps.State) error {
	return f.eachContainer(state, func(id uint64, rel string) error {
		if rel == "" {
			return state.Bury(id)
		}
		for _, t := range targets {
			if t.recognises && cgroup.Within(rel, t.rel) && !p.IsContainer(rel) {
				return state.Forget(id)
			}
		}
		return nil
	})
}

// eachContainer calls fn for the containers that have state, with the ids of their cgroups
// and where these are; "" if they were removed.
func (f *Filter) eachContainer(state *maps.State, fn func(id uint64, rel string) error) error {
	known, err := state.Containers()
	if err != nil {
		return err
	}
	for id := range known {
		rel, err := f.root.Find(id)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := fn(id, rel); err != nil {
			return err
		}
	}
	return nil
}
