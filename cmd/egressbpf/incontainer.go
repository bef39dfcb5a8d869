package main

import (
	"fmt"

	"github.com/egressbpf/egressbpf/internal/cgroup"
)

// warnNoDocker says that nobody tells the names of containers, if this process is in a container,
// where the socket of the daemon may be missing. Outside of containers there may be no Docker.
func (n *names) warnNoDocker() {
	if n.containers != nil && !n.asked && !n.containers.Started() && cgroup.OwnContainer() != "" {
		fmt.Fprintln(n.stderr, "warning: this container has no socket of a Docker daemon: containers have no names here, rules by name or label are not applied, and containers without a cgroup of their own are not found; mount it with -v /var/run/docker.sock:/var/run/docker.sock:ro")
	}
}
