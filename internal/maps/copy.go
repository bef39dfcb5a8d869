package maps

import (
	"fmt"

	"github.com/egressbpf/egressbpf/bpf"
)

// CopyFor returns a State of new maps that hold what the maps of s hold about the container
// with a cgroup id, and the closed ports. What programs do to the copy changes nothing in s.
// The caller closes it.
func (s *State) CopyFor(id uint64) (_ *State, err error) {
	to, err := CreateStateIn(s.Format())
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			to.Close()
		}
	}()
	for _, name := range []string{bpf.EgressMapContainers, bpf.EgressMapStateless} {
		from := s.byName[name]
		if from == nil {
			continue
		}
		value, err := from.LookupBytes(id)
		if err != nil {
			return nil, fmt.Errorf("look for the container with cgroup %d: %w", id, err)
		}
		if value == nil {
			continue
		}
		if err := to.byName[name].Put(id, resized(value, to.byName[name])); err != nil {
			return nil, fmt.Errorf("copy what map %s holds about cgroup %d: %w", name, id, err)
		}
	}
	closed, err := s.Tunnels()
	if err != nil {
		return nil, err
	}
	return to, to.SetTunnels(closed)
}

// Stateless says whether the container with a cgroup id is one without state: it opens no
// mail connection.
func (s *State) Stateless(id uint64) (bool, error) {
	m := s.byName[bpf.EgressMapStateless]
	if m == nil {
		return false, nil
	}
	value, err := m.LookupBytes(id)
	if err != nil {
		return false, fmt.Errorf("read map %s: %w", bpf.EgressMapStateless, err)
	}
	return value != nil, nil
}
