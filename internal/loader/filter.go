// Package loader puts the filter in force, swaps it and takes it away. Links and
// state are pinned to a bpffs, so that no process is needed meanwhile.
package loader

import (
	"errors"
	"os"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
)

// DefaultPinPath is where the filter is pinned unless told otherwise.
const DefaultPinPath = "/sys/fs/bpf/egressbpf"

var (
	// ErrNotAttached means that there is nothing at the pin path.
	ErrNotAttached = errors.New("egressbpf is not attached")
	// ErrBusy means that another process attaches or detaches and does not finish.
	ErrBusy = pins.ErrBusy
	// ErrOtherVersion means that the pins were made by a version whose state
	// this one cannot take over.
	ErrOtherVersion = errors.New("attached by a version that this one cannot take over from")
	// ErrPinPath means that the pin path is not a directory below the root of a
	// bpf filesystem, and not at the usual place of one, where it could be mounted.
	ErrPinPath = pins.ErrPinPath
	// ErrUnmounted means that there is no bpf filesystem, and that whether this process could
	// mount one for the host cannot be seen.
	ErrUnmounted = pins.ErrUnmounted
	// ErrPrivateMount means that the pins would be gone with this process's mount
	// namespace, and the filter with them.
	ErrPrivateMount = pins.ErrPrivateMount
	// ErrForeignPins means that what is at the pin path is not egressbpf's.
	ErrForeignPins = pins.ErrForeignPins
	// ErrTooMany means that more cgroups are to be policed than there can be.
	ErrTooMany = errors.New("too many policed cgroups")
	// ErrWholeHost means that every process of the host would be a container's.
	ErrWholeHost = errors.New("each cgroup of the host would be a container")
	// ErrNested means that a cgroup to be policed lies within another one.
	ErrNested = errors.New("policed cgroups cannot be nested")
)

// inHostsMounts says whether what this process mounts is mounted for the host. Tests, which
// mount nothing for the host, change it.
var inHostsMounts = pins.InHostsMounts

// Filter is the filter of this host, in force or not, as its pins tell.
type Filter struct {
	site
	fault pins.Fault
	// format is that of the maps that an attach leaves.
	format maps.Format

	egress      egress
	recognition recognition
	families    families
	host        host
}

// New returns the filter that is or will be pinned at pinPath, which must not be empty, and
// polices cgroups below root.
func New(pinPath string, root cgroup.Root) *Filter {
	at := site{pins: pins.At(pinPath), root: root}
	return &Filter{
		site:        at,
		format:      maps.Latest,
		egress:      egress{at},
		recognition: recognition{at},
		families:    families{at},
		host:        host{site: at, tunnels: tunnels{at}, netfilter: netfilter{at}, ingress: &ingress{site: at}},
	}
}

// Pins is the pin path.
func (f *Filter) Pins() string { return string(f.pins) }

// CheckMount returns ErrPrivateMount if the filesystem of the pins is not the one that the
// host has in their place, as far as this process can see the host.
func (f *Filter) CheckMount() error { return f.pins.CheckMount() }

// Serve tells others that a process keeps the filter as it wants it, until that closes the
// file.
func (f *Filter) Serve() (*os.File, error) { return f.pins.Serve() }

// Served says whether some process keeps the filter as it wants it.
func (f *Filter) Served() bool { return f.pins.Served() }
