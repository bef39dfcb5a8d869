package loader

import (
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
)

// A layer is a part of the filter that is attached, read back and detached by itself. Its
// detach is for a policed cgroup, or for the host.
type layer interface {
	// attach puts it in force for the targets of an attach, within its change. Why the kernel
	// cannot have what the filter works without is noted in what was found, and what an
	// earlier attach has put in force stays then.
	attach(a *attachment) error
	// read adds to a status what the kernel says of it, and why it is not as it should be.
	read(r *reading)
}

// site is where a filter is: what layers share that is the same for each attach.
type site struct {
	pins pins.Path
	root cgroup.Root
}

// attachment is an attach under way: what layers get, and what they leave for each other.
type attachment struct {
	*loaded
	change *pins.Change
	state  *maps.State
	// migration is what is left to do where others replace maps that are kept; nil if none
	// are.
	migration *maps.Migration
	targets   []*target
	// refuser is the way of refusing sockets; nil if there is none.
	refuser *refuser
	found   found
}

// close closes what was loaded; the kernel keeps what is attached.
func (a *attachment) close() {
	for _, t := range a.targets {
		t.close()
	}
	a.loaded.close()
}

// reading is a status in the making.
type reading struct {
	*Status
	policed []*policed
	// last is the number of the last attach; 0 if one is at work, or gave none.
	last uint64
	// found is what the last attach has found; nil if that was interrupted.
	found *found
}
