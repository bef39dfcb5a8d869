package pins

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/internal/maps"
)

// beforeSuffix marks the pin of a kept map that another map has replaced, until its counts
// are carried over.
const beforeSuffix = "-before"

// OfState says whether a pin is that of a map of the state, or of a map that is being
// replaced.
func OfState(pin string) bool {
	name := filepath.Base(pin)
	for _, suffix := range []string{beforeSuffix, nextSuffix} {
		if of, ok := strings.CutSuffix(name, suffix); ok && maps.Kept(of) {
			return true
		}
	}
	return slices.Contains(maps.StateNames(), name)
}

// kept returns the names of the kept maps.
func kept() []string {
	return slices.DeleteFunc(maps.StateNames(), func(name string) bool { return !maps.Kept(name) })
}

// Replaced opens the maps that were replaced, by name. There are none unless an attach is
// in progress or was interrupted. The caller closes them.
func (p Path) Replaced() (_ map[string]*ebpf.Map, err error) {
	found := map[string]*ebpf.Map{}
	for _, name := range kept() {
		pin := p.Pin(name) + beforeSuffix
		m, err := ebpf.LoadPinnedMap(pin, nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			maps.CloseAll(found)
			return nil, fmt.Errorf("open pinned map %s: %w", pin, err)
		}
		found[name] = m
	}
	return found, nil
}

// Repair completes the pins of replaced maps if a process was killed while it renamed them,
// and opens these maps as Replaced does. The caller must hold the lock.
func (p Path) Repair() (map[string]*ebpf.Map, error) {
	for _, name := range kept() {
		if err := p.repair(name); err != nil {
			return nil, err
		}
	}
	return p.Replaced()
}

// repair does this for one map. If the map is not pinned, the one that it replaced gets the
// pin back, and the map that was to replace it becomes the one with the suffix.
func (p Path) repair(name string) error {
	pin := p.Pin(name)
	exists := func(path string) bool { _, err := os.Lstat(path); return err == nil }
	next, before := pin+nextSuffix, pin+beforeSuffix
	if exists(pin) || !exists(before) {
		return Remove(next)
	}
	if err := os.Rename(before, pin); err != nil || !exists(next) {
		return err
	}
	return os.Rename(next, before)
}

// ReplaceMap pins a map in place of another one, and pins the other one beside it.
func (c *Change) ReplaceMap(pin string, old, m *ebpf.Map) error {
	name := filepath.Base(pin)
	if err := c.Step("replace map %s", name); err != nil {
		return err
	}
	next, before := pin+nextSuffix, pin+beforeSuffix
	if err := m.Pin(next); err != nil {
		return fmt.Errorf("pin map %s: %w", next, err)
	}
	err := os.Rename(pin, before)
	if errors.Is(err, fs.ErrNotExist) {
		// Somebody has removed the pin.
		err = old.Pin(before)
	}
	if err != nil {
		return errors.Join(err, Remove(next))
	}
	if err = c.Step("replace map %s, half done", name); err == nil {
		err = os.Rename(next, pin)
	}
	if err != nil {
		return errors.Join(err, os.Rename(before, pin), Remove(next))
	}
	c.Back(func() error {
		return errors.Join(os.Rename(pin, next), os.Rename(before, pin), os.Remove(next))
	})
	return nil
}

// SwapMaps swaps the pins of a map and of the map that it has replaced.
func (c *Change) SwapMaps(pin string) error {
	if err := c.Step("swap maps %s", filepath.Base(pin)); err != nil {
		return err
	}
	next, before := pin+nextSuffix, pin+beforeSuffix
	swap := func() error {
		if err := os.Rename(pin, next); err != nil {
			return err
		}
		if err := os.Rename(before, pin); err != nil {
			return err
		}
		return os.Rename(next, before)
	}
	if err := swap(); err != nil {
		return err
	}
	c.Back(swap)
	return nil
}

// UnpinReplaced removes the pins of the maps that were replaced.
func (p Path) UnpinReplaced() error {
	for _, name := range kept() {
		if err := Remove(p.Pin(name) + beforeSuffix); err != nil {
			return err
		}
	}
	return nil
}
