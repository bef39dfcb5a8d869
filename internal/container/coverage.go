package container

import (
	"context"
	"errors"
	"io/fs"
	"slices"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
)

// AddUncovered adds to the uncovered containers of a status those that have no cgroup of
// their own, or one without a container's name. Only their source knows that these are
// containers, and AddUncovered asks it for the process of each. Containers that have ended
// are left out. It does not ask sources that did not answer last time, nor sources that may
// be on another machine, whose processes are not this machine's.
//
// It goes on after an error, until ctx ends; the errors are joined.
func (v *Inventory) AddUncovered(ctx context.Context, filter *loader.Filter, s *loader.Status) error {
	var found []loader.Uncovered
	var errs []error
	for _, a := range v.accounts {
		more, err := a.unnamed(ctx, s)
		found, errs = append(found, more...), append(errs, err)
	}
	if len(found) > 0 {
		errs = append(errs, filter.AddUncovered(s, found))
	}
	return errors.Join(errs...)
}

// unnamed returns where the containers run that a status does not know by the names of
// their cgroups.
func (a *account) unnamed(ctx context.Context, s *loader.Status) (found []loader.Uncovered, err error) {
	var errs []error
	for _, id := range a.askable() {
		if s.Named[id] {
			continue
		}
		u, err := a.locate(ctx, id)
		if err == nil {
			found = append(found, u)
		} else if !errors.Is(err, errEnded) {
			errs = append(errs, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return found, errors.Join(errs...)
}

// askable returns the ids of the running containers whose source can tell their processes.
func (a *account) askable() []string {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if a.stale || a.lost || !a.Local() {
		return nil
	}
	var ids []string
	for id, c := range a.running {
		// Some runtimes run no process in a sandbox.
		if c.Pod.Container != Sandbox {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

var errEnded = errors.New("the container has ended")

// locate returns the cgroup in which a container runs.
func (a *account) locate(ctx context.Context, id string) (u loader.Uncovered, err error) {
	c, err := a.Inspect(ctx, id)
	if errors.Is(err, ErrNoContainer) || err == nil && c.Pid == 0 {
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
