package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
)

// State opens the maps of a filter that is attached. If the pin of a map is gone, State
// opens the map that the programs in force use. Maps other than containers are left out if
// they do not exist or this version cannot use them: readers do without. The caller closes
// the State. The error wraps ErrNotAttached or ErrOtherVersion.
func (f *Filter) State() (*maps.State, error) { return f.state() }

func (s site) state() (*maps.State, error) {
	state, err := s.withMaps(maps.Latest, (*stateMap).forReader)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w (no pins at %s)", ErrNotAttached, s.pins)
	}
	if err != nil {
		return nil, err
	}
	from, err := s.pins.Replaced()
	if err != nil {
		state.Close()
		return nil, err
	}
	state.Replaces(from)
	return state, nil
}

// withState calls do with the state of a filter that is attached. It is no error if nothing
// is attached.
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

// IsCurrent says whether no attach has replaced the maps of a state since it was opened.
func (f *Filter) IsCurrent(state *maps.State) bool {
	for _, name := range []string{bpf.EgressMapContainers, bpf.EgressMapTotals} {
		now, _, err := f.pins.Map(name)
		if err != nil || now == nil {
			return true // there is nothing that would be better
		}
		uses := state.Uses(name, now)
		now.Close()
		if !uses {
			return false
		}
	}
	return true
}

// ChangeState calls do with the state of a filter that is attached, to change what holds for
// containers. No attach replaces the maps meanwhile, which would lose the change. The error
// can wrap ErrBusy, ErrInterrupted, ErrNotAttached and ErrOtherVersion.
func (f *Filter) ChangeState(ctx context.Context, do func(*maps.State) error) error {
	c := f.Control()
	defer c.Close()
	return c.Change(ctx, do)
}

// Control changes the state again and again, as ChangeState does. It keeps the state open in
// between, until somebody has replaced a map of it.
type Control struct {
	filter *Filter
	state  *maps.State // nil unless it is open
	// stamp is that of the pins when the state was opened.
	stamp string
}

// Control returns a Control of the filter, which opens nothing yet. The caller closes it.
func (f *Filter) Control() *Control { return &Control{filter: f} }

// Close closes what is open. The Control can still be used.
func (c *Control) Close() error {
	if c.state == nil {
		return nil
	}
	state := c.state
	c.state = nil
	return state.Close()
}

// Change is ChangeState.
func (c *Control) Change(ctx context.Context, do func(*maps.State) error) error {
	f := c.filter
	unlock, err := f.pins.LockExisting(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		// Nothing else may use the maps any more.
		return errors.Join(fmt.Errorf("%w (no pins at %s)", ErrNotAttached, f.pins), c.Close())
	}
	if err != nil {
		return err
	}
	defer unlock()
	if err := c.open(); err != nil {
		return err
	}
	if c.state.Replacing() {
		// The programs in force may use other maps.
		return fmt.Errorf("%s: %w", f.pins, ErrInterrupted)
	}
	return do(c.state)
}

// open opens the state, unless the one that is open is still in force. The lock must be held.
func (c *Control) open() error {
	stamp, err := c.filter.pins.Stamp()
	if err != nil {
		return err
	}
	if c.state != nil && stamp == c.stamp {
		return nil
	}
	if err := c.Close(); err != nil {
		return err
	}
	c.state, err = c.filter.State()
	c.stamp = stamp
	return err
}

// openState opens the maps of the state for an attach, and creates and pins those that are
// missing. Kept maps of another format are replaced by new maps, which get everything
// except the counts. The migration moves the counts once no program uses the old maps any
// more; it is nil if none is needed.
func (s site) openState(change *pins.Change, format maps.Format) (*maps.State, *maps.Migration, error) {
	from, err := s.pins.Repair()
	if err != nil {
		return nil, nil, err
	}
	state, err := s.withMaps(format, func(found *stateMap) (*ebpf.Map, error) { return found.forAttach(change, from) })
	if err != nil {
		maps.CloseAll(from)
		return nil, nil, err
	}
	change.Keep(state)
	if state.Replaces(from); len(from) == 0 {
		return state, nil, nil
	}
	m, err := state.Migrate()
	if err != nil {
		return nil, nil, err
	}
	change.Keep(m)
	change.Back(m.Undo)
	if err := change.Step("copy what is kept"); err != nil {
		return nil, nil, err
	}
	return state, m, m.Copy()
}

// withMaps makes a State of the maps that use returns for each map that is found. nil
// leaves a map out.
func (s site) withMaps(format maps.Format, use func(*stateMap) (*ebpf.Map, error)) (_ *maps.State, err error) {
	specs, err := maps.StateSpec(format)
	if err != nil {
		return nil, err
	}
	opened := map[string]*ebpf.Map{}
	defer func() {
		if err != nil {
			maps.CloseAll(opened)
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

// stateMap is a map of the state as it was found, and the spec by which this version
// creates it.
type stateMap struct {
	name, pin string
	spec      *ebpf.MapSpec
	// m is nil if no map was found.
	m      *ebpf.Map
	pinned bool
}

// findMap finds a map of the state by its pin, or otherwise through the programs in force.
// The caller closes it.
func (s site) findMap(name string, spec *ebpf.MapSpec) (*stateMap, error) {
	found := &stateMap{name: name, pin: s.pins.Pin(name), spec: spec}
	var err error
	if found.m, found.pinned, err = s.pins.Map(name); err != nil {
		return nil, fmt.Errorf("open pinned map %s: %w", found.pin, err)
	}
	return found, nil
}

// take returns the map, which close does not close then.
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

// mapUse is what happens to a map that was found.
type mapUse int

const (
	keepMap    mapUse = iota
	makeMap           // create another map instead
	convertMap        // create another map, with the contents of this one
)

// use decides what happens to the map. The error wraps ErrOtherVersion if this version
// cannot use the map and its contents must not be lost.
func (s *stateMap) use() (mapUse, error) {
	if s.m == nil {
		return makeMap, nil
	}
	fits := maps.Compatible(s.spec, s.m)
	if !maps.Kept(s.name) {
		if fits != nil {
			return makeMap, nil
		}
		return keepMap, nil
	}
	err := maps.Convertible(s.spec, s.m)
	if err == nil && s.name == bpf.EgressMapTotals {
		err = maps.CheckFormat(s.m)
	}
	switch {
	case err != nil:
		return 0, fmt.Errorf("pinned map %s: %w: %w", s.pin, ErrOtherVersion, err)
	case fits != nil:
		return convertMap, nil
	}
	return keepMap, nil
}

// forReader returns the map for a reader; nil if the reader does without it.
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

// forAttach returns the map for an attach, which is pinned and if need be created. If the
// map replaces another one, forAttach adds the other one to from.
func (s *stateMap) forAttach(change *pins.Change, from map[string]*ebpf.Map) (*ebpf.Map, error) {
	use, err := s.use()
	if err != nil {
		return nil, err
	}
	if use == keepMap && s.name == bpf.EgressMapRetired && from[bpf.EgressMapContainers] != nil && from[s.name] == nil {
		// Until all programs are replaced, recognise and keep of both maps of containers run.
		// What one of them takes from this map, or writes, would be missing or wrong for the
		// other.
		use = convertMap
	}
	if use == convertMap {
		return s.replace(change, from)
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

// makeAnew creates the map as this version would have it.
func (s *stateMap) makeAnew() (err error) {
	s.close()
	s.m, err = maps.CreateMap(s.spec)
	return err
}

// replace pins a map that this version can use in place of a kept one, and adds the kept
// one to from.
func (s *stateMap) replace(change *pins.Change, from map[string]*ebpf.Map) (*ebpf.Map, error) {
	if before := from[s.name]; before != nil {
		if maps.Compatible(s.spec, before) != nil {
			return nil, fmt.Errorf("pinned map %s: %w: an attach by a third version was interrupted; attach with that version first", s.pin, ErrOtherVersion)
		}
		if err := change.SwapMaps(s.pin); err != nil {
			return nil, err
		}
		from[s.name] = s.take()
		return before, nil
	}
	m, err := maps.CreateMap(s.spec)
	if err != nil {
		return nil, err
	}
	if err := change.ReplaceMap(s.pin, s.m, m); err != nil {
		m.Close()
		return nil, err
	}
	from[s.name] = s.take()
	return m, nil
}
