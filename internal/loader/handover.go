package loader

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/egressbpf/egressbpf/bpf"
)

// lasting are the pins, beside those of policed cgroups, that every version knows and can
// take over.
var lasting = []string{
	bpf.EgressMapContainers, bpf.EgressMapTotals, bpf.EgressMapRetired,
	bpf.CgroupsProgRecognise, bpf.CgroupsProgKeep, bpf.CgroupsProgRelease,
	"host_forward4", "host_forward6", "host_deliver4", "host_deliver6",
}

// ErrServed means that a process keeps the filter as it wants it.
var ErrServed = errors.New("egressbpf run is running, and would restore what is removed")

// HandOver removes the pins over which an earlier version would not attach. The programs in
// force keep the maps that they use, with all that is counted: nothing is unpoliced. What an
// earlier version does not know, it does without. The error can wrap ErrBusy and ErrServed.
// That nothing is attached is no error.
func (f *Filter) HandOver(ctx context.Context) error {
	if ours, err := f.hasPins(); !ours {
		return err
	}
	if f.Served() {
		return fmt.Errorf("%s: %w", f.pins, ErrServed)
	}
	unlock, _, err := f.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	entries, err := os.ReadDir(f.pins)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if slices.Contains(lasting, entry.Name()) || strings.HasPrefix(entry.Name(), cgroupPrefix) {
			continue
		}
		if err := f.step("unpin %s", entry.Name()); err != nil {
			return err
		}
		if err := os.RemoveAll(filepath.Join(f.pins, entry.Name())); err != nil {
			return err
		}
	}
	return nil
}
