package loader

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
)

// ProbeFamilies says why this kernel refuses no sockets for the filter, or nil if it
// does. It makes a socket that must be refused.
func (f *Filter) ProbeFamilies() error {
	_, err := findRefuser(pins.OneWay(f.fault))
	return err
}

// ProbeRecognise says why this kernel cannot tell containers from what else is in a
// cgroup, or nil if it can.
func ProbeRecognise(state *maps.State) error {
	return probeCgroups(bpf.CgroupsProgRecognise, state)
}

// SocketIdentityGap says why sockets may not be known for a container's, or nothing if
// they are.
func SocketIdentityGap() (string, error) { return socketIdentityGap() }

// AttachTypes are the places in which a policed cgroup has a program.
func AttachTypes() (types []ebpf.AttachType) {
	for _, h := range hooks {
		types = append(types, h.attach)
	}
	return types
}

// AttachFor attaches programs to a cgroup, those for some places, until detach is called
// or the process ends.
func (p *Programs) AttachFor(dir *os.File, places []ebpf.AttachType) (detach func(), err error) {
	var links []link.Link
	detach = func() {
		for _, l := range links {
			l.Close()
		}
	}
	for _, h := range hooks {
		if !slices.Contains(places, h.attach) {
			continue
		}
		l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: p.byHook[h.name], Attach: h.attach})
		if errors.Is(err, unix.EPERM) {
			err = fmt.Errorf("%w: %w", ErrExcluded, err)
		}
		if err != nil {
			detach()
			return nil, fmt.Errorf("hook %s: %w", h.name, err)
		}
		links = append(links, l)
	}
	return detach, nil
}
