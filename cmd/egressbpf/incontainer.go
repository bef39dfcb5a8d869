package main

import (
	"fmt"
	"io"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
)

// warnNoEngine says that nobody tells the names of containers, if this process is in a container,
// where the socket of the engine may be missing. Outside of containers there may be no engine.
func (g *globals) warnNoEngine(containers *container.Inventory, stderr io.Writer) {
	own := cgroup.OwnContainer()
	if containers == nil || g.sourceNamed() || containers.Started() || own == "" {
		return
	}
	if cgroup.PodUID(own) != "" {
		fmt.Fprintln(stderr, "warning: this pod has no socket of the container runtime: containers have no names here, and rules for single containers are not applied; mount the directory of the socket, and name it with --cri-endpoint")
		return
	}
	fmt.Fprintln(stderr, "warning: this container has no socket of a Docker daemon: containers have no names here, rules by name or label are not applied, and containers without a cgroup of their own are not found; mount it with -v /var/run/docker.sock:/var/run/docker.sock:ro")
}
