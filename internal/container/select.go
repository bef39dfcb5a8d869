package container

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/egressbpf/egressbpf/internal/cgroup"
)

// ErrAmbiguous means that more than one container goes by a name.
var ErrAmbiguous = errors.New("more than one container goes by that name")

// Select returns which of the containers goes by a name: its id or the beginning of it, its
// Name, the name of its cgroup, or the path of that, below root or in full. A whole id goes
// before a name, and a name before the beginning of an id, as with Docker. The error wraps
// ErrNoContainer or ErrAmbiguous.
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
