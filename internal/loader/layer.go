package loader

import (
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
)

// A layer is a part of the filter that is attached, read back and detached by itself. Its
// detach is for a policed cgroup or for the host.
type layer interface {
	// attach puts the layer in force for the targets of an attach, within its change.
	// If the filter works without something that the kernel cannot have, attach notes
	// the reason in found, and leaves what an earlier attach has put in force.
	attach(a *attachment) error
	// read adds to a status what the kernel says about the layer, and why it is not as
	// it should be.
	read(r *reading)
}

// site is where a filter is: what the layers share, and what is the same for each attach.
type site struct {
	pins pins.Path
	root cgroup.Root
}

// attachment is an attach in progress: what layers get, and what they leave for each other.
type attachment struct {
	*loaded
	change *pins.Change
	state  *maps.State
	// migration moves the contents of kept maps to the maps that replace them; nil if
	// no map is replaced.
	migration *maps.Migration
	targets   []*target
	// refuser is the strategy for refusing sockets; nil if there is none.
	refuser *refuser
	found   found
}

// close closes what was loaded. The kernel keeps what is attached.
func (a *attachment) close() {
	for _, t := range a.targets {
		t.close()
	}
	a.loaded.close()
}

// reading is a status in the making.
type reading struct {
	*Status
	// before is an earlier status; nil if there is none.
	before  *Status
	policed []*policed
	// last is the number of the last attach; 0 if one is in progress, or the last one
	// wrote none.
	last uint64
	// interrupted is whether an attach was, while it replaced maps.
	interrupted bool
	// found is what the last attach found; nil if it was interrupted.
	found *found
}
