package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

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
	for {
		done, err := f.handOver(ctx)
		if done || err != nil {
			return err
		}
		if err := f.toEarliest(ctx); err != nil {
			return err
		}
	}
}

// handOver removes the pins over which an earlier version would not attach, and says so, if the
// maps are of the earliest format.
func (f *Filter) handOver(ctx context.Context) (done bool, err error) {
	unlock, err := f.pins.LockExisting(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer unlock()
	// A process may have been killed while it renamed the pins.
	from, err := f.pins.Repair()
	if err != nil {
		return false, err
	}
	maps.CloseAll(from)
	state, err := f.State()
	if errors.Is(err, ErrNotAttached) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer state.Close()
	if state.Format() != maps.Earliest || state.Replacing() {
		return false, nil
	}
	if err := state.KeepRemoved(); err != nil {
		return false, err
	}
	entries, err := os.ReadDir(string(f.pins))
	if err != nil {
		return false, err
	}
	for _, entry := range entries {
		if pins.Lasting(entry.Name()) {
			continue
		}
		if err := f.fault.Step("unpin %s", entry.Name()); err != nil {
			return false, err
		}
		if err := os.RemoveAll(f.pins.Pin(entry.Name())); err != nil {
			return false, err
		}
	}
	return true, nil
}

// toEarliest attaches the policy that is in force once more, with maps of the earliest format.
func (f *Filter) toEarliest(ctx context.Context) error {
	status, err := f.Status()
	if err != nil {
		return err
	}
	exists := func(cgroup string) bool { _, err := os.Stat(cgroup); return err == nil }
	if status.Policy == nil || !slices.ContainsFunc(status.Cgroups, exists) {
		return fmt.Errorf("%s: %w", f.pins, ErrNoPolicy)
	}
	earlier := *f
	earlier.format = maps.Earliest
	return earlier.Attach(ctx, nil, *status.Policy)
}
