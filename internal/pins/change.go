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

// Fault runs before each step that changes anything, if a test sets it, and can make the
// step fail.
type Fault func(step string) error

// Step returns the error of the fault for a step; nil if there is none.
func (f Fault) Step(format string, args ...any) error {
	if f == nil {
		return nil
	}
	return f(fmt.Sprintf(format, args...))
}

// Change is a change of what is in force. It records how to undo each step, and keeps open
// what that needs. A Change is undone as a whole. No hook is ever without a program: a
// replacement is in force before what it replaces ends.
type Change struct {
	fault  Fault
	oneWay bool
	back   []func() error
	// old is what only an undo needs, and held what the change itself does.
	old, held []io.Closer
}

// NewChange begins a change that [Change.End] ends.
func NewChange(fault Fault) *Change { return &Change{fault: fault} }

// OneWay begins a change that cannot be undone. [Change.End] ends it too.
func OneWay(fault Fault) *Change { return &Change{fault: fault, oneWay: true} }

// OneWay begins a change for what an undo does.
func (c *Change) OneWay() *Change { return OneWay(c.fault) }

// Step begins a step, which a test can make fail.
func (c *Change) Step(format string, args ...any) error { return c.fault.Step(format, args...) }

// Back records how to undo a step that was taken.
func (c *Change) Back(back func() error) {
	if !c.oneWay {
		c.back = append(c.back, back)
	}
}

// Keep keeps something open until the end of the change, and closes it then.
func (c *Change) Keep(open io.Closer) { c.held = append(c.held, open) }

// End ends the change. If err is not nil, it first undoes the change, the last step first.
// It returns err, joined with the error of the undo if that fails too. Then it closes what
// was kept open.
func (c *Change) End(err error) error {
	if err != nil {
		var errs []error
		for _, back := range slices.Backward(c.back) {
			errs = append(errs, back())
		}
		if undo := errors.Join(errs...); undo != nil {
			err = fmt.Errorf("%w; restore what was in force before: %w", err, undo)
		}
	}
	closeAll(c.old)
	closeAll(c.held)
	return err
}

// Commit ends the time in which the change can be undone: what was replaced ends now.
func (c *Change) Commit() {
	closeAll(c.old)
	c.back, c.old = nil, nil
}

func closeAll(all []io.Closer) {
	for _, open := range all {
		open.Close()
	}
}

// Program opens a program for an undo to put in force again, and keeps it open; nil if the
// change cannot be undone.
func (c *Change) Program(id ebpf.ProgramID) (*ebpf.Program, error) {
	if c.oneWay {
		return nil, nil
	}
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return nil, fmt.Errorf("open program %d: %w", id, err)
	}
	c.old = append(c.old, prog)
	return prog, nil
}

// Mkdir makes a directory for pins. It is no error if the directory exists.
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

// UnpinMap removes the pin of a map to make way for another map of that name. Programs in
// force keep using the map. The Change closes it.
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

// UpdateLink makes a link run another program instead of the one with the id old.
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
	// A pin that is still here holds a link that another program has detached, and that
	// cannot be attached again.
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

// ReplaceLink pins a new link in place of one that cannot be updated. For a moment both are
// in force.
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
		c.old = append(c.old, old)
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
		return errors.Join(err, Remove(next))
	}
	c.Back(func() error {
		if old == nil {
			return Remove(pin)
		}
		if err := old.Pin(next); err != nil {
			return err
		}
		return os.Rename(next, pin)
	})
	return nil
}

// DropLink ends a pinned link. It is no error if there is none.
func (c *Change) DropLink(pin string) error {
	// A process may have been killed while it replaced the link.
	if err := Remove(pin + nextSuffix); err != nil {
		return err
	}
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
		c.old = append(c.old, old)
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
