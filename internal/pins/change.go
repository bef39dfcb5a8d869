package pins

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Fault, if it is set by a test, runs before each step that changes anything and can make
// it fail.
type Fault func(step string) error

// Step returns what the fault has to say of a step.
func (f Fault) Step(format string, args ...any) error {
	if f == nil {
		return nil
	}
	return f(fmt.Sprintf(format, args...))
}

// Change is a change of what is in force: the steps back to what was in force before, and
// what they need. It is undone as a whole, and never seen half done by the hooks: what takes
// the place of something else is in force before that ends.
type Change struct {
	fault  Fault
	oneWay bool
	back   []func() error
	held   []io.Closer
}

// NewChange begins a change that [Change.End] ends.
func NewChange(fault Fault) *Change { return &Change{fault: fault} }

// OneWay begins a change without a way back: what was done stays done. [Change.End] ends it
// too.
func OneWay(fault Fault) *Change { return &Change{fault: fault, oneWay: true} }

// OneWay begins one for what a way back does.
func (c *Change) OneWay() *Change { return OneWay(c.fault) }

// Step begins a step, which a test can have fail.
func (c *Change) Step(format string, args ...any) error { return c.fault.Step(format, args...) }

// Back notes the way back of a step that was taken.
func (c *Change) Back(back func() error) {
	if !c.oneWay {
		c.back = append(c.back, back)
	}
}

// Keep has something open until the end, when it is closed.
func (c *Change) Keep(open io.Closer) { c.held = append(c.held, open) }

// End closes what was kept, and if there is an error undoes the change before, the last
// step first. It returns the error, which tells if that has failed too.
func (c *Change) End(err error) error {
	if err != nil {
		var errs []error
		for _, back := range slices.Backward(c.back) {
			errs = append(errs, back())
		}
		if undo := errors.Join(errs...); undo != nil {
			err = fmt.Errorf("%w; and to restore what was in force before: %w", err, undo)
		}
	}
	for _, open := range c.held {
		open.Close()
	}
	return err
}

// Program opens a program that the way back puts in force again, and keeps it open; nil if
// there is no way back.
func (c *Change) Program(id ebpf.ProgramID) (*ebpf.Program, error) {
	if c.oneWay {
		return nil, nil
	}
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return nil, fmt.Errorf("open program %d: %w", id, err)
	}
	c.Keep(prog)
	return prog, nil
}

// Mkdir makes a directory for pins. That there is one is no error.
func (c *Change) Mkdir(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err == nil {
		c.Back(func() error { return os.Remove(dir) })
	}
	return err
}

// PinMap pins a map.
func (c *Change) PinMap(pin string, m *ebpf.Map) error {
	if err := m.Pin(pin); err != nil {
		return fmt.Errorf("pin map %s: %w", filepath.Base(pin), err)
	}
	c.Back(func() error { return os.Remove(pin) })
	return nil
}

// UnpinMap makes way for a map of the same name; the programs that are in force keep
// theirs. The map becomes the Change's.
func (c *Change) UnpinMap(pin string, m *ebpf.Map) error {
	c.Keep(m)
	if err := c.Step("unpin map %s", filepath.Base(pin)); err != nil {
		return err
	}
	if err := os.Remove(pin); err != nil {
		return err
	}
	again, err := m.Clone()
	if err != nil {
		return err
	}
	c.Keep(again)
	c.Back(func() error { return again.Pin(pin) })
	return nil
}

// UpdateLink has a link run another program, in the place of the one with an id.
func (c *Change) UpdateLink(l link.Link, old ebpf.ProgramID, prog *ebpf.Program) error {
	before, err := c.Program(old)
	if err != nil {
		return err
	}
	if err := l.Update(prog); err != nil {
		return err
	}
	c.Back(func() error { return l.Update(before) })
	return nil
}

// PinLink attaches a link to a cgroup and pins it.
func (c *Change) PinLink(pin string, attach func() (link.Link, error)) error {
	// A pin that is still here holds a link that some other program has
	// detached, and that cannot be attached again.
	if err := Remove(pin); err != nil {
		return err
	}
	l, err := attach()
	if err != nil {
		return err
	}
	defer l.Close()
	if err := l.Pin(pin); err != nil {
		return fmt.Errorf("pin link %s: %w", pin, err)
	}
	c.Back(func() error { return Detach(pin) })
	return nil
}

// ReplaceLink pins a new link in the place of one that cannot be updated. For a
// moment both are in force.
func (c *Change) ReplaceLink(pin string, attach func() (link.Link, error)) error {
	next := pin + nextSuffix
	if err := Remove(next); err != nil {
		return err
	}
	if err := c.Step("pin %s", filepath.Base(pin)); err != nil {
		return err
	}
	old, err := heldLink(pin)
	if err != nil {
		return err
	}
	if old != nil {
		c.Keep(old)
	}
	l, err := attach()
	if err != nil {
		return err
	}
	defer l.Close()
	if err := l.Pin(next); err != nil {
		return fmt.Errorf("pin link %s: %w", next, err)
	}
	if err := os.Rename(next, pin); err != nil {
		return err
	}
	c.Back(func() error {
		if err := Remove(pin); err != nil || old == nil {
			return err
		}
		return old.Pin(pin)
	})
	return nil
}

// DropLink ends a pinned link. That there is none is no error.
func (c *Change) DropLink(pin string) error {
	if _, err := os.Lstat(pin); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var old link.Link
	if !c.oneWay {
		var err error
		if old, err = heldLink(pin); err != nil {
			return err
		}
		if old == nil {
			return Remove(pin)
		}
		c.Keep(old)
	}
	if err := c.Step("unpin %s", filepath.Base(pin)); err != nil {
		return err
	}
	if err := Remove(pin); err != nil {
		return err
	}
	c.Back(func() error { return old.Pin(pin) })
	return nil
}
