package loader

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/egressbpf/egressbpf/internal/pins"
)

// ErrServed means that a process keeps the filter as it wants it.
var ErrServed = errors.New("egressbpf run is running, and would restore what is removed")

// HandOver removes the pins over which an earlier version would not attach. The programs in
// force keep the maps that they use, with all that is counted: nothing is unpoliced. What an
// earlier version does not know, it does without. The error can wrap ErrBusy and ErrServed.
// That nothing is attached is no error.
func (f *Filter) HandOver(ctx context.Context) error {
	if ours, err := f.pins.Ours(); !ours {
		return err
	}
	if f.Served() {
		return fmt.Errorf("%s: %w", f.pins, ErrServed)
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
