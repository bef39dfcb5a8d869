package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/maps"
)

// findUncovered looks for running containers that are not policed, anywhere. It knows them
// by the names of their cgroups.
func (f *Filter) findUncovered(r *reading) error {
	named, systems, err := f.root.Named()
	if err != nil {
		return fmt.Errorf("look for containers: %w", err)
	}
	r.paths = make(map[uint64]string, len(named))
	for _, c := range named {
		r.paths[c.ID] = c.Rel
	}
	containers := f.running(r, named)
	r.Named = make(map[string]bool, len(containers))
	r.running = containers
	var found []Uncovered
	for _, c := range containers {
		id := cgroup.ContainerID(c.Rel)
		r.Named[id] = true
		if r.Policy != nil && r.Policy.LeavesOut(c.Rel) {
			continue
		}
		found = append(found, Uncovered{ID: id, Cgroup: c.Rel})
	}
	if err := f.addUncovered(r.Status, r.policed, found); err != nil {
		return err
	}
	var asked []Uncovered
	for _, system := range systems {
		asked = append(asked, Uncovered{Cgroup: system.Cgroup})
	}
	open, err := f.uncovered(r.policed, asked)
	r.Systems = slices.DeleteFunc(systems, func(system cgroup.System) bool {
		return !slices.ContainsFunc(open, func(u Uncovered) bool { return u.Cgroup == system.Cgroup })
	})
	return err
}

// running returns those of the containers that run.
func (f *Filter) running(r *reading, named []cgroup.Cgroup) []cgroup.Cgroup {
	const every = 8
	if r.before == nil {
		return f.root.Running(named)
	}
	r.nth = r.before.nth + 1
	ran := make(map[uint64]bool, len(r.before.running))
	for _, c := range r.before.running {
		ran[c.ID] = true
	}
	uncovered := map[string]bool{}
	for _, u := range r.before.Uncovered {
		uncovered[u.Cgroup] = true
	}
	var running []cgroup.Cgroup
	for _, c := range named {
		// Ids are not evenly distributed.
		now := (c.ID*0x9e3779b97f4a7c15>>32+r.nth)%every == 0
		if !now && ran[c.ID] && !uncovered[c.Rel] || f.root.Runs(c) {
			running = append(running, c)
		}
	}
	return running
}

// AddUncovered adds to a status those of the containers that are not policed.
func (f *Filter) AddUncovered(s *Status, containers []Uncovered) error {
	all, err := f.installed()
	if err != nil {
		return err
	}
	defer closeAll(all)
	return f.addUncovered(s, all, containers)
}

func (f *Filter) addUncovered(s *Status, all []*policed, containers []Uncovered) error {
	found, err := f.uncovered(all, containers)
	s.Uncovered = append(s.Uncovered, found...)
	return err
}

// uncovered returns those of the containers that are not policed.
func (f *Filter) uncovered(all []*policed, containers []Uncovered) (found []Uncovered, err error) {
	if len(containers) == 0 {
		return nil, nil
	}
	state, err := f.State()
	if errors.Is(err, ErrNotAttached) {
		return containers, nil
	}
	if err != nil {
		return nil, err
	}
	defer state.Close()
	for _, c := range containers {
		covered, err := f.covers(all, state, c.Cgroup)
		if err != nil {
			return nil, err
		}
		if !covered {
			found = append(found, c)
		}
	}
	return found, nil
}

// covers says whether the processes in a cgroup are policed.
func (f *Filter) covers(all []*policed, state *maps.State, rel string) (bool, error) {
	for _, p := range all {
		if p.gone || p.rel == "" || !cgroup.Within(rel, p.rel) {
			continue
		}
		if p.doc == nil || !p.doc.Policy.Recognises(p.rel) {
			return true, nil
		}
		// The cgroup itself, or a container that it is nested in.
		for at := rel; at != p.rel && at != "/"; at = path.Dir(at) {
			id, err := f.root.ID(at)
			if errors.Is(err, fs.ErrNotExist) {
				return true, nil // it is gone
			}
			if err != nil {
				return false, err
			}
			if known, err := state.Recognised(id); known || err != nil {
				return known, err
			}
		}
	}
	return false, nil
}
