package loader

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/egressbpf/egressbpf/internal/maps"
)

// Stamp changes whenever an attach replaces a map of the state. The error wraps ErrNotAttached if
// nothing is attached.
func (f *Filter) Stamp() (string, error) {
	stamp, err := f.pins.Stamp()
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w (no pins at %s)", ErrNotAttached, f.pins)
	}
	return stamp, err
}

// Uses says whether a map of a state is still the one that the programs use.
func (f *Filter) Uses(state *maps.State, name string) (bool, error) {
	now, _, err := f.pins.Map(name)
	if err != nil || now == nil {
		return false, err
	}
	defer now.Close()
	return state.Uses(name, now), nil
}

// Changing says whether an attach or a detach is under way.
func (f *Filter) Changing() bool { return f.pins.Locked() }

// InForce says whether programs in force use a map of a state. Those of a version that does not know
// the map leave its pin alone.
func (f *Filter) InForce(state *maps.State, name string) (bool, error) {
	used, err := f.pins.MapInUse(name)
	if err != nil || used == nil {
		return false, err
	}
	defer used.Close()
	return state.Uses(name, used), nil
}
