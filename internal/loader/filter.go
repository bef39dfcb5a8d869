// Package loader puts the filter in force, replaces it and removes it. Links and state are
// pinned to a bpffs, so that no process has to keep them.
package loader

import (
	"errors"
	"os"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
)

// DefaultPinPath is the pin path unless the user names another.
const DefaultPinPath = "/sys/fs/bpf/egressbpf"

var (
	// ErrNotAttached means that nothing is pinned at the pin path.
	ErrNotAttached = errors.New("egressbpf is not attached")
	// ErrBusy means that another process is attaching or detaching and does not finish.
	ErrBusy = pins.ErrBusy
	// ErrOtherVersion means that a version has attached whose state this one cannot
	// take over.
	ErrOtherVersion = errors.New("attached by a version that this one cannot take over from")
	// ErrPinPath means that the pin path is not a directory below the root of a bpf
	// filesystem, nor at the usual place where one could be mounted.
	ErrPinPath = pins.ErrPinPath
	// ErrUnmounted means that there is no bpf filesystem, and that this process cannot
	// see whether it could mount one for the host.
	ErrUnmounted = pins.ErrUnmounted
	// ErrPrivateMount means that the pins, and with them the filter, would end with
	// this process's mount namespace.
	ErrPrivateMount = pins.ErrPrivateMount
	// ErrForeignPins means that the pins at the pin path are not egressbpf's.
	ErrForeignPins = pins.ErrForeignPins
	// ErrInterrupted means that an attach was interrupted while it took over from another
	// version, and that the next one has to complete it.
	ErrInterrupted = errors.New("an attach was interrupted")
	// ErrTooMany means that more cgroups would be policed than there is room for.
	ErrTooMany = errors.New("too many policed cgroups")
	// ErrWholeHost means that every process of the host would count as a container's.
	ErrWholeHost = errors.New("each cgroup of the host would be a container")
	// ErrNested means that a cgroup to be policed lies in another one.
	ErrNested = errors.New("policed cgroups cannot be nested")
	// ErrInPoliced means that a cgroup to be policed lies in one that is policed already.
	ErrInPoliced = errors.New("the outer one is policed already")
)

// inHostsMounts says whether a mount by this process is a mount of the host. Tests change
// it, since they mount nothing for the host.
var inHostsMounts = pins.InHostsMounts

// Filter is the filter of this host, whether or not it is in force. What it knows is in its
// pins.
type Filter struct {
	site
	fault pins.Fault
	// format is the format of the maps that an attach leaves.
	format maps.Format

	egress      egress
	recognition recognition
	families    families
	host        host
}

// New returns the filter that is or will be pinned at pinPath, and that polices cgroups
// below root. pinPath must not be empty.
func New(pinPath string, root cgroup.Root) *Filter {
	at := site{pins: pins.At(pinPath), root: root}
	return &Filter{
		site:        at,
		format:      maps.Latest,
		egress:      egress{at},
		recognition: recognition{at},
		families:    families{at},
		host:        host{site: at, tunnels: tunnels{at}, netfilter: &netfilter{site: at}, ingress: &ingress{site: at}},
	}
}

// Pins returns the pin path.
func (f *Filter) Pins() string { return string(f.pins) }

// CheckMount returns ErrPrivateMount if the filesystem of the pins is not the one that the
// host has at that place, as far as this process can see the host.
func (f *Filter) CheckMount() error { return f.pins.CheckMount() }

// Serve tells other processes that this one keeps the filter in force, until it closes the
// file.
func (f *Filter) Serve() (*os.File, error) { return f.pins.Serve() }

// Served says whether a process keeps the filter in force.
func (f *Filter) Served() bool { return f.pins.Served() }
