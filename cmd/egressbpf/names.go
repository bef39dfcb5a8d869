package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/cri"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/stats"
)

const (
	// namesPatience is how long a command waits for the names of containers: nothing that is
	// in force depends on them.
	namesPatience = 2 * time.Second
	// namesAge is how long names stay valid.
	namesAge = time.Second
	// namesRetry is how long to wait before asking again for a container that nobody knew.
	namesRetry = 30 * time.Second
	// maxMissing is how many containers without a name are remembered.
	maxMissing = 10_000
)

// names are what sources call the containers. If no source answers there are none; the user is
// warned only if the user has named a source.
type names struct {
	mu         sync.Mutex
	containers *container.Inventory // nil if there is nobody to ask
	asked      bool                 // a source was named
	stderr     io.Writer
	next       time.Time // when to ask again
	err        error     // of the last time
	warned     bool
	// missing are containers that no source knew, and when to ask for them again.
	missing map[string]time.Time
}

// names returns those that the sources of the inventory tell.
func (g *globals) names(stderr io.Writer) (*names, error) {
	n := &names{asked: g.sourceNamed(), stderr: stderr}
	n.containers, n.err = g.inventory()
	if n.err != nil && (g.dockerHost != "" || g.criEndpoint != "") {
		return nil, n.err
	}
	return n, nil // the environment may be meant for other programs
}

// sourceNamed says whether the user has named a source.
func (g *globals) sourceNamed() bool {
	return g.dockerHost != "" || os.Getenv("DOCKER_HOST") != "" || g.criEndpoint != "" || os.Getenv(cri.EndpointVariable) != ""
}

// inventory returns one of all sources that there are, which the flags and the environment
// name. Nobody is asked yet. The caller closes it. The error is a usageError.
func (g *globals) inventory() (*container.Inventory, error) {
	root := cgroup.Root(g.cgroupRoot)
	if root == "" {
		root, _ = cgroup.FindRoot() // what needs it says why there is none
	}
	// A pod's containers may have the names of Docker's with cri-dockerd, but only the runtime
	// knows the pod.
	pods, err := container.OpenCRI(g.criEndpoint, root, g.podNetworks)
	if err != nil {
		return nil, usageError{fmt.Errorf("--cri-endpoint: %w", err)}
	}
	docker, err := container.OpenDocker(g.dockerHost)
	if err != nil {
		return nil, usageError{fmt.Errorf("--docker-host: %w", err)}
	}
	return container.NewInventory(pods, docker), nil
}

// refresh asks for the names, unless it has just done so.
func (n *names) refresh(ctx context.Context) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if now := time.Now(); n.containers != nil && !now.Before(n.next) {
		ctx, cancel := context.WithTimeout(ctx, namesPatience)
		defer cancel()
		n.err = n.containers.Refresh(ctx)
		n.next = time.Now().Add(namesAge)
	}
	if n.asked {
		n.warn()
	}
}

// askAgain asks those sources again that did not answer, however short ago that was.
func (n *names) askAgain(ctx context.Context) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.containers == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, namesPatience)
	defer cancel()
	for _, s := range n.containers.Stale() {
		_, _ = n.containers.Update(ctx, container.Event{Source: s, Action: container.Resync}) // refresh tells
	}
	n.next = time.Time{}
}

// find returns what is known about the container with an id. It may be called at any time. A
// container that has just started is asked for, alone.
func (n *names) find(id string) (container.Container, bool) {
	if n.containers == nil || cgroup.ContainerID(id) == "" {
		return container.Container{}, false
	}
	c, ok := n.containers.Find(id)
	if ok || !n.containers.Started() {
		return c, ok
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if time.Now().Before(n.missing[id]) {
		return c, false
	}
	ctx, cancel := context.WithTimeout(context.Background(), namesPatience)
	defer cancel()
	if now := time.Now(); !n.containers.Learn(ctx, id) && len(n.containers.Stale()) > 0 && !now.Before(n.next) {
		n.err = n.containers.Refresh(ctx)
		n.next = now.Add(namesRetry)
	}
	if c, ok = n.containers.Find(id); ok {
		return c, ok
	}
	if n.missing == nil || len(n.missing) > maxMissing {
		n.missing = map[string]time.Time{}
	}
	n.missing[id] = time.Now().Add(namesRetry)
	return c, false
}

// of returns what users call the container with an id.
func (n *names) of(id string) string {
	if n.containers == nil {
		return ""
	}
	return n.containers.Name(id)
}

// warn says, once, why there are no names.
func (n *names) warn() {
	if n.err != nil && !n.warned {
		fmt.Fprintf(n.stderr, "warning: names of containers are not known: %s\n", strings.Map(visible, n.err.Error()))
		n.warned = true
	}
}

// addTo adds names to the rows.
func (n *names) addTo(ctx context.Context, s *stats.Stats) {
	// If there is no container to name, do not ask: that could start a daemon that waits for
	// its first client.
	if !slices.ContainsFunc(s.Containers, func(c stats.Container) bool { return cgroup.ContainerID(c.ID) != "" }) {
		return
	}
	n.refresh(ctx)
	for i := range s.Containers {
		s.Containers[i].Name = n.of(s.Containers[i].ID)
	}
}

// addToStatus adds names to the containers of a status, and adds uncovered containers that only
// their source knows.
func (n *names) addToStatus(ctx context.Context, filter *loader.Filter, s *loader.Status) {
	var listed []*loader.Uncovered
	for i := range s.Uncovered {
		listed = append(listed, &s.Uncovered[i])
	}
	for i := range s.MetadataAllowed {
		listed = append(listed, &s.MetadataAllowed[i])
	}
	for i := range s.FamiliesAllowed {
		listed = append(listed, &s.FamiliesAllowed[i].Uncovered)
	}
	for i := range s.Exposed {
		listed = append(listed, &s.Exposed[i].Uncovered)
	}
	if len(listed) == 0 && !n.asked && (n.containers == nil || !n.containers.Started()) {
		return
	}
	n.refresh(ctx)
	for _, c := range listed {
		c.Name = n.of(c.ID)
	}
	if n.containers == nil {
		return
	}
	// Some runtimes give sandboxes the host's cgroup namespace. What runs in one is the runtime's.
	s.Exposed = slices.DeleteFunc(s.Exposed, func(e loader.Exposed) bool {
		c, _ := n.containers.Find(e.ID)
		return c.Pod.Container == container.Sandbox
	})
	ctx, cancel := context.WithTimeout(ctx, namesPatience)
	defer cancel()
	if err := n.containers.AddUncovered(ctx, filter, s); err != nil {
		fmt.Fprintf(n.stderr, "warning: containers may be missing below: %s\n", strings.Map(visible, err.Error()))
	}
}

// selected returns the container of a name.
func (n *names) selected(ctx context.Context, r *stats.Reader, s *stats.Stats, name string) (*stats.Container, error) {
	// No container's name begins with a slash, and whole ids take precedence.
	if !strings.HasPrefix(name, "/") && cgroup.ContainerID(name) == "" {
		n.addTo(ctx, s)
		// Without the names, another container may be found by the beginning of its id.
		if !errors.Is(n.err, fs.ErrNotExist) {
			n.warn()
		}
	}
	return r.Select(s, name)
}
