package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf/link"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
)

// Detach takes the filter off the cgroups, given by path, or off all of them if
// none is given. With the last one, state and pin path go too. Taking off what
// is not attached is no error. The error can wrap ErrBusy.
func (f *Filter) Detach(ctx context.Context, cgroups []string) error {
	var unwanted []string
	for _, path := range cgroups {
		rel, err := f.root.Rel(path)
		if err != nil {
			return err
		}
		unwanted = append(unwanted, rel)
	}
	if _, err := os.Stat(f.pins); errors.Is(err, fs.ErrNotExist) {
		// Filters of devices need no pins.
		return f.dropFilters(nil, nil)
	} else if err != nil {
		return err
	}
	if ours, err := f.hasPins(); !ours {
		return err
	}
	unlock, _, err := f.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	all, err := f.installed()
	if err != nil {
		return err
	}
	defer closeAll(all)
	left := 0
	for _, p := range all {
		if len(cgroups) > 0 && !slices.Contains(unwanted, p.rel) {
			left++
			continue
		}
		if err := f.removePoliced(p); err != nil {
			return err
		}
	}
	if left == 0 {
		return f.removeState()
	}
	return f.forgetBelow(unwanted)
}

// forgetBelow removes what is kept about containers below cgroups that are not policed any
// more.
func (f *Filter) forgetBelow(rels []string) error {
	err := f.withState(func(state *maps.State) error {
		return f.eachContainer(state, func(id uint64, rel string) error {
			if rel != "" && slices.ContainsFunc(rels, func(of string) bool { return cgroup.Within(rel, of) }) {
				return state.Forget(id)
			}
			return nil
		})
	})
	if errors.Is(err, ErrOtherVersion) {
		return nil
	}
	return err
}

// removePoliced takes the filter off one cgroup.
func (f *Filter) removePoliced(p *policed) error {
	// What refuses sockets, and what another version has pinned.
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if isHook(entry.Name()) {
			continue
		}
		if err := removePin(filepath.Join(p.dir, entry.Name())); err != nil {
			return err
		}
	}
	// The boundary goes last, as it came first.
	for _, h := range slices.Backward(hooks) {
		if err := f.step("detach %s of %s", h.name, p.rel); err != nil {
			return err
		}
		if err := removeLink(filepath.Join(p.dir, h.name)); err != nil {
			return err
		}
	}
	return os.Remove(p.dir)
}

// removeState removes everything but policed cgroups, what another version has pinned
// included.
func (f *Filter) removeState() error {
	if err := f.dropFilters(nil, nil); err != nil {
		return err
	}
	pins, err := os.ReadDir(f.pins)
	if err != nil {
		return err
	}
	for _, pin := range pins {
		if err := os.RemoveAll(filepath.Join(f.pins, pin.Name())); err != nil {
			return err
		}
	}
	return os.Remove(f.pins)
}

// removeLink detaches the pinned link of a cgroup at once, and removes the pin.
// That there is none is no error.
func removeLink(pin string) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil && isNoLink(pin) {
		return os.Remove(pin)
	}
	if err != nil {
		return fmt.Errorf("open pinned link %s: %w", pin, err)
	}
	defer l.Close()
	if err := l.Detach(); err != nil {
		return fmt.Errorf("detach link %s: %w", pin, err)
	}
	return os.Remove(pin)
}
