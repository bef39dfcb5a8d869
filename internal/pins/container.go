package pins

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

var (
	// ErrNotMounted means that the host has no bpf filesystem at the pin path.
	ErrNotMounted = errors.New("the host has no bpf filesystem there")
	// ErrHidden means that this process may not look at the host's first process.
	ErrHidden = errors.New("this process may not look at the host's first process, and so cannot see whose namespaces and mounts it has")
)

// hostsRoot is the root of PID 1, which is the host's in the host's PID namespace.
const hostsRoot = "/proc/1/root"

// CheckContainersMount returns an error unless a container has the host's bpf filesystem at the
// pin path. Another one ends with the container, or with the volume that it is, and the filter
// with it. The error wraps ErrPrivateMount, ErrNotMounted or ErrHidden. The process has to be in
// the host's PID namespace.
func (p Path) CheckContainersMount() error {
	// Other errors than that of a missing directory are about the right to look.
	var root unix.Stat_t
	if err := unix.Stat(hostsRoot+"/", &root); err != nil {
		return fmt.Errorf("%w (%s: %w)", ErrHidden, hostsRoot, err)
	}
	on := Path(filepath.Join(hostsRoot, string(p))).existing()
	if !onBPFFS(on) {
		if onBPFFS(p.existing()) {
			return fmt.Errorf("%s: %w", p.existing(), ErrPrivateMount)
		}
		if strings.HasPrefix(string(p), usualMount+"/") {
			return fmt.Errorf("%s: %w", usualMount, ErrNotMounted)
		}
		return nil // Mount says what is wrong
	}
	// It has to be the same directory: of a part of that filesystem, mounted as if it were the
	// whole, the host knows nothing either.
	var here, host unix.Stat_t
	if unix.Stat(strings.TrimPrefix(on, hostsRoot), &here) != nil || unix.Stat(on, &host) != nil || here.Dev != host.Dev || here.Ino != host.Ino {
		return fmt.Errorf("%s: %w", p.existing(), ErrPrivateMount)
	}
	return nil
}
