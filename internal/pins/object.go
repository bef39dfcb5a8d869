package pins

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
)

// Info returns what the kernel says about a pinned link.
func Info(pin string) (*link.Info, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	return l.Info()
}

// IsMap says whether the pin is of a map.
func IsMap(pin string) bool {
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if err == nil {
		m.Close()
	}
	return err == nil
}

// IsNoLink says whether the pin is of something other than a link.
func IsNoLink(pin string) bool {
	if IsMap(pin) {
		return true
	}
	prog, err := ebpf.LoadPinnedProgram(pin, nil)
	if err == nil {
		prog.Close()
	}
	return err == nil
}

// Remove removes the pin of a link, which ends the link if nothing else holds it. It is no
// error if there is no pin.
func Remove(pin string) error {
	if err := os.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Detach detaches the pinned link of a cgroup at once, and removes the pin. It is no error
// if there is no pin.
func Detach(pin string) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil && IsNoLink(pin) {
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

// heldLink returns a pinned link that does not know of its pin, so that it can be
// pinned there again; nil if there is none, or something else is pinned there.
func heldLink(pin string) (link.Link, error) {
	info, err := Info(pin)
	if errors.Is(err, fs.ErrNotExist) || err != nil && IsNoLink(pin) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open pinned link %s: %w", pin, err)
	}
	return link.NewFromID(info.ID)
}

// Map opens a map of the state by its pin, or otherwise the map that the programs in force
// use; nil if there is neither.
func (p Path) Map(name string) (m *ebpf.Map, pinned bool, err error) {
	m, err = ebpf.LoadPinnedMap(p.Pin(name), nil)
	if !errors.Is(err, fs.ErrNotExist) {
		return m, err == nil, err
	}
	m, err = p.MapInUse(name)
	return m, false, err
}

// MapInUse opens the map of the state that the programs in force use, whether or not it is
// pinned; nil if they use none.
func (p Path) MapInUse(name string) (*ebpf.Map, error) {
	pins, err := p.Links()
	if err != nil {
		return nil, err
	}
	for _, pin := range pins {
		info, err := Info(pin)
		if err != nil {
			continue // not a link, or gone meanwhile
		}
		if m, err := mapOf(info.Program, name); m != nil || err != nil {
			return m, err
		}
	}
	return nil, nil
}

// mapOf opens the map with a name that a program uses; nil if it uses none.
func mapOf(id ebpf.ProgramID, name string) (*ebpf.Map, error) {
	prog, err := ebpf.NewProgramFromID(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open program %d: %w", id, err)
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return nil, err
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return nil, fmt.Errorf("open map %d: %w", id, err)
		}
		if info, err := m.Info(); err == nil && info.Name == name {
			return m, nil
		}
		m.Close()
	}
	return nil, nil
}

// StateOf returns the id of the map by which all programs of one filter can be recognised;
// 0 if the program does not use one.
func StateOf(id ebpf.ProgramID) (ebpf.MapID, error) {
	m, err := mapOf(id, bpf.EgressMapContainers)
	if m == nil || err != nil {
		return 0, err
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		return 0, err
	}
	mapID, _ := info.ID()
	return mapID, nil
}

// madeByUs says whether a pin is of a map of the state, or of a link whose program uses the
// state.
func madeByUs(pin string) (bool, error) {
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if err == nil {
		defer m.Close()
		info, err := m.Info()
		return err == nil && info.Name == filepath.Base(pin) && (OfState(pin) || slices.Contains(formerMaps, info.Name)), err
	}
	// Whoever may not open a pin cannot know whose it is.
	if maps.Inconclusive(err) {
		return false, err
	}
	info, err := Info(pin)
	if err != nil {
		return false, err
	}
	state, err := StateOf(info.Program)
	return err == nil && state != 0, err
}
