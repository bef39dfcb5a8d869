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
	// ErrServed means that a process keeps the filter as it wants it.
	ErrServed = errors.New("egressbpf run is running, and would restore what is removed")
	// ErrNoPolicy means that no program tells the policy that is in force.
	ErrNoPolicy = errors.New("no program tells the policy that is in force; attach first")
)

// HandOver brings what is in force to where an earlier version can take over: the maps become
// those of the earliest format, with all that is counted and set, and the pins go over which
// such a version would not attach. Nothing is unpoliced meanwhile. What an earlier version
// does not know, it does without. The error can wrap ErrBusy, ErrNoPolicy and ErrServed. That
// nothing is attached is no error.
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

// toEarliest has the policy that is in force attached once more, with maps of the earliest
// format, unless they are.
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
