package loader

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
)

var (
	// ErrServed means that a process keeps the filter in force.
	ErrServed = errors.New("egressbpf run is running, and would restore what is removed")
	// ErrNoPolicy means that no program holds the policy that is in force.
	ErrNoPolicy = errors.New("no program holds the policy that is in force; attach first")
)

// HandOver prepares what is in force for an earlier version to take over. The maps become
// maps of the earliest format, with all counts and settings, and pins that such a version
// would not attach to are removed. Nothing is unpoliced meanwhile. Defences that an earlier
// version does not know are lost. The error can wrap ErrBusy, ErrNoPolicy and ErrServed. It
// is no error if nothing is attached.
func (f *Filter) HandOver(ctx context.Context) error {
	if ours, err := f.pins.Ours(); !ours {
		return err
	}
	if f.Served() {
		return fmt.Errorf("%s: %w", f.pins, ErrServed)
	}
	if err := f.toEarliest(ctx); err != nil {
		return err
	}
	unlock, _, err := f.pins.Lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	entries, err := os.ReadDir(string(f.pins))
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if pins.Lasting(entry.Name()) {
			continue
		}
		if err := f.fault.Step("unpin %s", entry.Name()); err != nil {
			return err
		}
		if err := os.RemoveAll(f.pins.Pin(entry.Name())); err != nil {
			return err
		}
	}
	return nil
}

// toEarliest attaches the policy in force once more, with maps of the earliest format,
// unless the maps have that format already.
func (f *Filter) toEarliest(ctx context.Context) error {
	state, err := f.State()
	if errors.Is(err, ErrNotAttached) {
		return nil
	}
	if err != nil {
		return err
	}
	format := state.Format()
	state.Close()
	if format == maps.Earliest {
		return nil
	}
	status, err := f.Status()
	if err != nil {
		return err
	}
	if status.Policy == nil {
		return fmt.Errorf("%s: %w", f.pins, ErrNoPolicy)
	}
	earlier := *f
	earlier.format = maps.Earliest
	return earlier.Attach(ctx, nil, *status.Policy)
}
