package lab

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
)

// Lab is a host on which a filter is in force.
type Lab struct {
	*Network
	Cgroups *Cgroups
	Filter  Filter

	site   *Site
	remove []func() error
}

// Site is where labs are made.
type Site struct {
	Root cgroup.Root
	// hooks are the hooks of the whole tool, as it says itself.
	hooks *hooks
}

// pins is where filters are pinned.
const pins = "/sys/fs/bpf"

// NewSite mounts a bpf filesystem over that of the machine. This process has to be in a mount
// namespace of its own.
func NewSite() (*Site, error) {
	root, err := cgroup.FindRoot()
	if err != nil {
		return nil, err
	}
	if err := unix.Mount("bpf", pins, "bpf", 0, "mode=0700"); err != nil {
		return nil, fmt.Errorf("mount a bpf filesystem at %s: %w", pins, err)
	}
	return &Site{Root: root}, nil
}

// New makes a lab. The caller closes it.
func (s *Site) New(f Filter) (_ *Lab, err error) {
	l := &Lab{Filter: f, site: s}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s: %w", f, err), l.Close())
		}
	}()
	if l.Cgroups, err = NewCgroups(s.Root, f.Containers); err != nil {
		return nil, err
	}
	l.onClose(l.Cgroups.Close)
	if l.Network, err = newNetwork(); err != nil {
		return nil, err
	}
	l.onClose(l.Network.close)
	if err := l.docker(); err != nil {
		return nil, err
	}
	return l, f.putInForce(l)
}

// onClose has Close call fn, before what was given to it earlier.
func (l *Lab) onClose(fn func() error) { l.remove = append(l.remove, fn) }

// Close removes the filter and the host. No process may be in its cgroups.
func (l *Lab) Close() error {
	var errs []error
	for i := range l.remove {
		errs = append(errs, l.remove[len(l.remove)-1-i]())
	}
	l.remove = nil
	return errors.Join(errs...)
}
