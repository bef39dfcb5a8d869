package loader

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
)

// State opens the maps of a filter that is attached. A map whose pin is gone is the one
// that the programs in force use; who only reads does without one that this version cannot
// use, or that there is none of. The caller closes it. The error wraps ErrNotAttached or
// ErrOtherVersion.
func (f *Filter) State() (*maps.State, error) { return f.state() }

func (s site) state() (*maps.State, error) {
	state, err := s.withMaps((*stateMap).forReader)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w (no pins at %s)", ErrNotAttached, s.pins)
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

// openState opens the maps of the state for an attach: each is there and pinned then.
func (s site) openState(change *pins.Change) (*maps.State, error) {
	return s.withMaps(func(found *stateMap) (*ebpf.Map, error) { return found.forAttach(change) })
}

// withMaps makes a State of what each map that is found is used as; nil is none.
func (s site) withMaps(use func(*stateMap) (*ebpf.Map, error)) (_ *maps.State, err error) {
	specs, err := maps.StateSpec()
	if err != nil {
		return nil, err
	}
	opened := map[string]*ebpf.Map{}
	defer func() {
		if err != nil {
			for _, m := range opened {
				m.Close()
			}
		}
	}()
	for _, name := range maps.StateNames() {
		found, err := s.findMap(name, specs[name])
		if err != nil {
			return nil, err
		}
		m, err := use(found)
		found.close()
		if err != nil {
			return nil, err
		}
		if m != nil {
			opened[name] = m
		}
	}
	return maps.NewState(opened), nil
}

// stateMap is a map of the state as it is found, and as this version makes it.
type stateMap struct {
	name, pin string
	spec      *ebpf.MapSpec
	// m is nil if there is none.
	m      *ebpf.Map
	pinned bool
}

// findMap finds a map of the state by its pin, or else by the programs in force. The caller
// closes it.
func (s site) findMap(name string, spec *ebpf.MapSpec) (*stateMap, error) {
	found := &stateMap{name: name, pin: s.pins.Pin(name), spec: spec}
	var err error
	if found.m, found.pinned, err = s.pins.Map(name); err != nil {
		return nil, fmt.Errorf("open pinned map %s: %w", found.pin, err)
	}
	return found, nil
}

// take returns the map, which close spares then.
func (s *stateMap) take() *ebpf.Map {
	m := s.m
	s.m = nil
	return m
}

func (s *stateMap) close() {
	if s.m != nil {
		s.m.Close()
	}
}

// mapUse is what becomes of a map that is found.
type mapUse int

const (
	keepMap mapUse = iota
	makeMap        // another one, in its place
)

// use decides that. The error, which wraps ErrOtherVersion, is of a map that this version
// cannot use, and whose content must not be lost.
func (s *stateMap) use() (mapUse, error) {
	if s.m == nil {
		return makeMap, nil
	}
	err := maps.Compatible(s.spec, s.m)
	if err == nil {
		return keepMap, nil
	}
	if maps.Kept(s.name) {
		return 0, fmt.Errorf("pinned map %s: %w: %w", s.pin, ErrOtherVersion, err)
	}
	return makeMap, nil
}

// forReader returns the map for who only reads; nil for one to do without.
func (s *stateMap) forReader() (*ebpf.Map, error) {
	if s.m == nil && s.name == bpf.EgressMapContainers {
		return nil, fmt.Errorf("map %s: %w", s.name, fs.ErrNotExist)
	}
	use, err := s.use()
	if err != nil || use == makeMap {
		return nil, err
	}
	return s.take(), nil
}

// forAttach returns the map for an attach: pinned, and made if need be.
func (s *stateMap) forAttach(change *pins.Change) (*ebpf.Map, error) {
	use, err := s.use()
	if err != nil {
		return nil, err
	}
	if s.pinned {
		if use == keepMap {
			return s.take(), nil
		}
		if err := change.UnpinMap(s.pin, s.take()); err != nil {
			return nil, err
		}
	}
	if err := change.Step("pin map %s", s.name); err != nil {
		return nil, err
	}
	if use == makeMap {
		if err := s.makeAnew(); err != nil {
			return nil, err
		}
	}
	if err := change.PinMap(s.pin, s.m); err != nil {
		return nil, err
	}
	return s.take(), nil
}

// makeAnew makes the map that this version would have.
func (s *stateMap) makeAnew() (err error) {
	s.close()
	if s.m, err = ebpf.NewMap(s.spec); err != nil {
		return fmt.Errorf("create map %s: %w", s.name, err)
	}
	return nil
}
