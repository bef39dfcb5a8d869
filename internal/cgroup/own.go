package cgroup

import "os"

// OwnContainer returns the cgroup of the container that this process is in, as [Root.Rel] does;
// "" if it is in none. It needs the host's cgroup namespace.
func OwnContainer() string {
	rel, err := OfProcess(os.Getpid())
	if err != nil {
		return ""
	}
	return OutermostContainer(rel)
}
