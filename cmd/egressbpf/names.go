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
	// namesPatience is how long a command waits for what containers are called:
	// what is in force does not depend on it.
	namesPatience = 2 * time.Second
	// namesAge is how long names are good for.
	namesAge = time.Second
	// namesRetry is when a daemon that has not answered is asked again.
	namesRetry = 30 * time.Second
)

// names are what Docker calls its containers. There are none where no daemon
// answers, which is told only to who has named one.
type names struct {
	client *docker.Client // nil if there is none to ask
	asked  bool           // a daemon was named
	stderr io.Writer
	byID   map[string]string
	next   time.Time // when to ask again
	err    error     // of the last time
	warned bool
}

// names returns those of the daemon that the flags or the environment name.
func (g *globals) names(stderr io.Writer) (*names, error) {
	client, err := docker.Open(g.dockerHost)
	if err != nil && g.dockerHost != "" {
		return nil, usageError{fmt.Errorf("--docker-host: %w", err)}
	}
	// The environment may be meant for other programs.
	return &names{client: client, asked: g.dockerHost != "" || os.Getenv("DOCKER_HOST") != "", stderr: stderr, err: err}, nil
}

// refresh asks for the names, unless that was just done.
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

// addTo names the rows.
func (n *names) addTo(ctx context.Context, s *stats.Stats) {
	// Where there is none to name, asking could start a daemon that waits for its
	// first client.
	if !slices.ContainsFunc(s.Containers, func(c stats.Container) bool { return cgroup.ContainerID(c.ID) != "" }) {
		return
	}
	n.refresh(ctx)
	for i := range s.Containers {
		s.Containers[i].Name = n.byID[s.Containers[i].ID]
	}
}

// addToStatus names the containers that are not covered, and adds those of which only
// the daemon knows that they are containers.
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

// selected returns the container that goes by a name.
func (n *names) selected(ctx context.Context, r *stats.Reader, s *stats.Stats, name string) (*stats.Container, error) {
	// No container's name is a path, and whole ids go first.
	if !strings.Contains(name, "/") && cgroup.ContainerID(name) == "" {
		n.addTo(ctx, s)
		// It may be the name of another container than the one that is found.
		if !errors.Is(n.err, fs.ErrNotExist) {
			n.warn()
		}
	}
	return r.Select(s, name)
}
