package container

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/egressbpf/egressbpf/internal/cgroup"
)

// ErrAmbiguous means that several containers have a name.
var ErrAmbiguous = errors.New("more than one container goes by that name")

// Select returns the index of the container that name stands for: an id or the beginning of
// one, a Name, the name of a cgroup, or the path of a cgroup, below root or in full. A
// whole id takes precedence over a name, and a name over the beginning of an id, as in
// Docker. The error wraps ErrNoContainer or ErrAmbiguous.
func Select(root cgroup.Root, all []Identity, name string) (index int, err error) {
	var ids, exact, begin []int
	for i, c := range all {
		switch {
		case c.Cgroup != "" && (c.Cgroup == name || root.Path(c.Cgroup) == filepath.Clean(name)):
			return i, nil
		case c.ID == name && cgroup.ContainerID(name) != "":
			ids = append(ids, i)
		case name != "" && (c.ID == name || c.Name == name || c.Cgroup != "" && filepath.Base(c.Cgroup) == name):
			exact = append(exact, i)
		case name != "" && strings.HasPrefix(c.ID, name):
			begin = append(begin, i)
		}
	}
	for _, found := range [][]int{ids, exact, begin} {
		switch len(found) {
		case 0:
			continue
		case 1:
			return found[0], nil
		}
		var paths []string
		for _, i := range found {
			paths = append(paths, all[i].Cgroup)
		}
		return 0, fmt.Errorf("%q: %w: %s", name, ErrAmbiguous, strings.Join(paths, ", "))
	}
	return 0, fmt.Errorf("%q: %w", name, ErrNoContainer)
}
