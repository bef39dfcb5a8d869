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
	"github.com/cilium/ebpf/link"

	"github.com/egressbpf/egressbpf/internal/maps"
)

const (
	// beforeSuffix is that of a kept map that another one replaces, until everything that was
	// counted in it is carried over; and of the links that still need it.
	beforeSuffix = "-before"
	// swapSuffix is that of a map while it changes places with the one before.
	swapSuffix = "-swap"
)

// OfState says whether a pin is that of a map of the state, or of a map that is being
// replaced.
func OfState(pin string) bool {
	name := filepath.Base(pin)
	for _, suffix := range []string{beforeSuffix, nextSuffix, swapSuffix} {
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

// repair does that for a map. If the map is not pinned, the map before is pinned again, and the
// map that should have replaced it counts as the one before.
func (p Path) repair(name string) error {
	pin := p.Pin(name)
	exists := func(path string) bool { _, err := os.Lstat(path); return err == nil }
	next, before, swap := pin+nextSuffix, pin+beforeSuffix, pin+swapSuffix
	switch {
	case exists(swap) && exists(pin):
		return os.Rename(swap, before)
	case exists(swap):
		return os.Rename(swap, pin)
	case exists(pin) || !exists(before):
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

// SwapMaps exchanges a map that replaced another one for that one.
func (c *Change) SwapMaps(pin string) error {
	name := filepath.Base(pin)
	before, swap := pin+beforeSuffix, pin+swapSuffix
	if err := c.Step("swap maps %s", name); err != nil {
		return err
	}
	if err := os.Rename(pin, swap); err != nil {
		return err
	}
	err := c.Step("swap maps %s, begun", name)
	if err == nil {
		err = os.Rename(before, pin)
	}
	if err != nil {
		return errors.Join(err, os.Rename(swap, pin))
	}
	err = c.Step("swap maps %s, half done", name)
	if err == nil {
		err = os.Rename(swap, before)
	}
	if err != nil {
		return errors.Join(err, os.Rename(pin, before), os.Rename(swap, pin))
	}
	c.Back(func() error {
		return errors.Join(os.Rename(pin, swap), os.Rename(before, pin), os.Rename(swap, before))
	})
	return nil
}

// KeepLink pins a link a second time, so that it stays in force after another one has replaced
// it, until UnpinKept. It is no error if there is no link, or if one is kept whose program has
// the same containers. Two are kept if an attach was interrupted, and the version before
// attaches again.
func (c *Change) KeepLink(pin string) error {
	l, err := heldLink(pin)
	if err != nil || l == nil {
		return err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return err
	}
	own, err := StateOf(info.Program)
	if err != nil {
		return err
	}
	for _, before := range keptPins(pin) {
		kept, err := Info(before)
		if errors.Is(err, fs.ErrNotExist) {
			return c.keepAt(before, l)
		}
		if err != nil {
			return fmt.Errorf("open pinned link %s: %w", before, err)
		}
		if state, err := StateOf(kept.Program); err != nil || state == own {
			return err
		}
	}
	return nil
}

func (c *Change) keepAt(before string, l link.Link) error {
	if err := c.Step("keep %s", filepath.Base(before)); err != nil {
		return err
	}
	if err := l.Pin(before); err != nil {
		return fmt.Errorf("pin link %s: %w", before, err)
	}
	c.Back(func() error { return Remove(before) })
	return nil
}

// keptPins are where KeepLink pins a link.
func keptPins(pin string) []string {
	return []string{pin + beforeSuffix, pin + beforeSuffix + beforeSuffix}
}

// UnpinKept ends the links that KeepLink has kept.
func (p Path) UnpinKept() error {
	for _, name := range hostLinks {
		for _, pin := range keptPins(p.Pin(name)) {
			if err := Remove(pin); err != nil {
				return err
			}
		}
	}
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
