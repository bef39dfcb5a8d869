package cgroup

import (
	"os"
	"strings"
)

// OwnContainer returns the cgroup of the container that this process is in, as [Root.Rel] does;
// "" if it is in none. It needs the host's cgroup namespace.
func OwnContainer() string {
	rel, err := ContainerOf(os.Getpid())
	if err != nil {
		return ""
	}
	return rel
}

// ContainerOf returns the cgroup of the outermost container that a process is in, as [Root.Rel]
// does; "" if it is in none. On the hybrid layout it looks at the cgroups of version 1 too: runc
// before 1.1 gives a container no other. The error wraps
// fs.ErrNotExist if there is no such process.
func ContainerOf(pid int) (string, error) {
	cgroups, err := ofProcess(pid)
	if err != nil {
		return "", err
	}
	return containerIn(cgroups), nil
}

func containerIn(cgroups string) string {
	rel, _ := unified(cgroups) // that there is none is told elsewhere
	found := OutermostContainer(rel)
	for line := range strings.Lines(cgroups) {
		// HIERARCHY:CONTROLLERS:PATH, cgroups(7)
		if fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3); found == "" && len(fields) == 3 {
			found = OutermostContainer(fields[2])
		}
	}
	return found
}
