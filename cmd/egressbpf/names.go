package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/coverage"
	"github.com/egressbpf/egressbpf/internal/docker"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/stats"
)

const (
	// namesPatience is how long a command waits for the names of containers: nothing that is
	// in force depends on them.
	namesPatience = 2 * time.Second
	// namesAge is how long names stay valid.
	namesAge = time.Second
	// namesRetry is how long to wait before asking a daemon again that has not answered.
	namesRetry = 30 * time.Second
)

// names are the names of Docker's containers. If no daemon answers there are none; the user is
// warned only if the user has named a daemon.
type names struct {
	client *docker.Client // nil if there is none to ask
	asked  bool           // a daemon was named
	stderr io.Writer
	byID   map[string]string
	next   time.Time // when to ask again
	err    error     // of the last time
	warned bool
}

// names returns the names of the daemon that the flags or the environment name.
func (g *globals) names(stderr io.Writer) (*names, error) {
	client, err := docker.Open(g.dockerHost)
	if err != nil && g.dockerHost != "" {
		return nil, usageError{fmt.Errorf("--docker-host: %w", err)}
	}
	// No error: the environment may be meant for other programs.
	return &names{client: client, asked: g.dockerHost != "" || os.Getenv("DOCKER_HOST") != "", stderr: stderr, err: err}, nil
}

// refresh asks for the names, unless it has just done so.
func (n *names) refresh(ctx context.Context) {
	if now := time.Now(); n.client != nil && !now.Before(n.next) {
		ctx, cancel := context.WithTimeout(ctx, namesPatience)
		defer cancel()
		containers, err := n.client.Containers(ctx)
		n.next, n.err = time.Now().Add(namesAge), err
		if err != nil {
			n.next = time.Now().Add(namesRetry)
		} else {
			n.byID = make(map[string]string, len(containers))
			for _, c := range containers {
				n.byID[c.ID] = c.Name
			}
		}
	}
	if n.asked {
		n.warn()
	}
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
		s.Containers[i].Name = n.byID[s.Containers[i].ID]
	}
}

// addToStatus adds names to the containers of a status, and adds uncovered containers that only
// the daemon knows.
func (n *names) addToStatus(ctx context.Context, filter *loader.Filter, s *loader.Status) {
	if len(s.Uncovered)+len(s.MetadataAllowed)+len(s.FamiliesAllowed)+len(s.Exposed) == 0 && !n.asked && !docker.Running() {
		return
	}
	n.refresh(ctx)
	for i := range s.Uncovered {
		s.Uncovered[i].Name = n.byID[s.Uncovered[i].ID]
	}
	for i := range s.MetadataAllowed {
		s.MetadataAllowed[i].Name = n.byID[s.MetadataAllowed[i].ID]
	}
	for i := range s.Exposed {
		s.Exposed[i].Name = n.byID[s.Exposed[i].ID]
	}
	for i := range s.FamiliesAllowed {
		s.FamiliesAllowed[i].Name = n.byID[s.FamiliesAllowed[i].ID]
	}
	if n.err != nil || n.client == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, namesPatience)
	defer cancel()
	if err := coverage.Complete(ctx, n.client, filter, s, maps.Keys(n.byID)); err != nil {
		fmt.Fprintf(n.stderr, "warning: containers may be missing below: %s\n", strings.Map(visible, err.Error()))
	}
}

// selected returns the container of a name.
func (n *names) selected(ctx context.Context, r *stats.Reader, s *stats.Stats, name string) (*stats.Container, error) {
	// No container's name is a path, and whole ids take precedence.
	if !strings.Contains(name, "/") && cgroup.ContainerID(name) == "" {
		n.addTo(ctx, s)
		// Without the names, another container may be found by the beginning of its id.
		if !errors.Is(n.err, fs.ErrNotExist) {
			n.warn()
		}
	}
	return r.Select(s, name)
}
