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
// process of each. Those that have ended are not added. A daemon that is asked over the
// network may be another machine's, whose processes are none here: it is not asked.
//
// All are tried until ctx ends; the errors are joined.
func Complete(ctx context.Context, client *docker.Client, filter *loader.Filter, s *loader.Status, running iter.Seq[string]) error {
	if !client.Local() {
		return nil
	}
	var found []loader.Uncovered
	var errs []error
	for _, id := range slices.Sorted(running) {
		if s.Named[id] {
			continue
		}
		u, err := find(ctx, client, id)
		if err == nil {
			found = append(found, u)
		} else if !errors.Is(err, errEnded) {
			errs = append(errs, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	if len(found) > 0 {
		errs = append(errs, filter.AddUncovered(s, found))
	}
	return errors.Join(errs...)
}

var errEnded = errors.New("the container has ended")

// find returns where a container runs.
func find(ctx context.Context, client *docker.Client, id string) (u loader.Uncovered, err error) {
	c, err := client.Inspect(ctx, id)
	if errors.Is(err, docker.ErrNoContainer) || err == nil && c.Pid == 0 {
		return u, errEnded
	}
	if err != nil {
		return u, err
	}
	rel, err := cgroup.OfProcess(c.Pid)
	if errors.Is(err, fs.ErrNotExist) {
		return u, errEnded
	}
	return loader.Uncovered{ID: id, Name: c.Name, Cgroup: rel}, err
}
