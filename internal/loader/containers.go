package loader

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// maxDepth is how many levels below a policed cgroup containers are recognised.
const maxDepth = 16 // MAX_DEPTH

// recognises says whether any of the targets recognises containers by name.
func recognises(targets []*target) bool {
	for _, t := range targets {
		if t.recognises {
			return true
		}
	}
	return false
}

// containersIn returns the cgroups in which every process belongs to a container: the
// containers' own cgroups if they are recognised by name, and otherwise the policed cgroup.
func (s site) containersIn(policed string, p policy.Policy) ([]string, error) {
	if !p.Recognises(policed) {
		return []string{policed}, nil
	}
	found, err := s.recognised(policed, p)
	rels := make([]string, len(found))
	for i, c := range found {
		rels[i] = c.Rel
	}
	return rels, err
}

// recognised returns the cgroups below a policed cgroup that are containers by their names.
func (s site) recognised(policed string, p policy.Policy) ([]cgroup.Cgroup, error) {
	found, err := s.root.Outermost(policed, p.IsContainer)
	if err != nil {
		return nil, fmt.Errorf("look for containers below %s: %w", s.root.Path(policed), err)
	}
	return found, nil
}

// enrol gives state to the containers that exist already.
func (r recognition) enrol(a *attachment) error {
	for _, t := range a.targets {
		if !t.recognises {
			continue
		}
		found, err := r.recognised(t.rel, a.policy)
		if err != nil {
			return err
		}
		for _, c := range found {
			if cgroup.Level(c.Rel)-cgroup.Level(t.rel) > maxDepth {
				continue // status reports it
			}
			if err := r.enrolContainer(c, a); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r recognition) enrolContainer(c cgroup.Cgroup, a *attachment) error {
	added, err := a.state.Enrol(c.ID)
	if err != nil || !added {
		return err
	}
	if now, err := r.root.ID(c.Rel); err != nil || now != c.ID {
		// It was removed, perhaps before there was an entry to delete.
		return a.state.Forget(c.ID)
	}
	a.change.Back(func() error { return a.state.Forget(c.ID) })
	return nil
}

// forgetOthers removes the state of containers that are gone, and of cgroups that are no
// containers under this policy.
func (r recognition) forgetOthers(a *attachment) error {
	return r.eachContainer(a.state, func(id uint64, rel string) error {
		if rel == "" {
			return a.state.Bury(id)
		}
		for _, t := range a.targets {
			if t.recognises && cgroup.Within(rel, t.rel) && !a.policy.IsContainer(rel) {
				return a.state.Forget(id)
			}
		}
		return nil
	})
}

// eachContainer calls fn for each container that has state, with its cgroup's id and path.
// The path is "" if the cgroup was removed.
func (s site) eachContainer(state *maps.State, fn func(id uint64, rel string) error) error {
	known, err := state.Containers()
	if err != nil {
		return err
	}
	for id := range known {
		rel, err := s.root.Find(id)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := fn(id, rel); err != nil {
			return err
		}
	}
	return nil
}
