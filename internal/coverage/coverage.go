// Package coverage finds running containers that the filter does not judge.
package coverage

import (
	"context"
	"errors"
	"io/fs"
	"iter"
	"slices"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/docker"
	"github.com/egressbpf/egressbpf/internal/loader"
)

// Complete adds to what a status tells uncovered the containers that have no cgroup of
// their own, or none that is named like a container's. Only Docker knows then that they
// are containers: running has the ids of those that it runs, and it is asked for the
// process of each. Those that have ended are not added.
//
// It ends with the first error.
func Complete(ctx context.Context, client *docker.Client, filter *loader.Filter, s *loader.Status, running iter.Seq[string]) error {
	for _, id := range slices.Sorted(running) {
		if s.Named[id] {
			continue
		}
		u, covered, err := find(ctx, client, filter, id)
		if err != nil {
			return err
		}
		if !covered {
			s.Uncovered = append(s.Uncovered, u)
		}
	}
	return nil
}

func find(ctx context.Context, client *docker.Client, filter *loader.Filter, id string) (u loader.Uncovered, covered bool, err error) {
	c, err := client.Inspect(ctx, id)
	if errors.Is(err, docker.ErrNoContainer) || err == nil && c.Pid == 0 {
		return u, true, nil
	}
	if err != nil {
		return u, false, err
	}
	rel, err := cgroup.OfProcess(c.Pid)
	if errors.Is(err, fs.ErrNotExist) {
		return u, true, nil
	}
	if err != nil {
		return u, false, err
	}
	covered, err = filter.Covers(rel)
	return loader.Uncovered{ID: id, Name: c.Name, Cgroup: rel}, covered, err
}
