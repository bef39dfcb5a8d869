package maps

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Pod is what holds for the containers of a pod from their start, beside what is said of each
// container.
type Pod struct {
	// Flags are those of its containers.
	Flags Flag
	// Limit is theirs; zero for the policy's.
	Limit policy.Limit
}

// Pods returns the pods for which something is set, by the ids of their cgroups.
func (s *State) Pods() (map[uint64]Pod, error) {
	found := map[uint64]Pod{}
	m := s.byName[bpf.EgressMapPods]
	if m == nil {
		return found, nil
	}
	return found, eachEntry(m, func(id uint64, value []byte) error {
		p := decode[bpf.EgressPod](value)
		found[id] = Pod{p.Flags, PolicyLimit(p.Limit)}
		return nil
	})
}

// Pod returns what is set for the pod with a cgroup id; zero if nothing is.
func (s *State) Pod(id uint64) (p Pod, err error) {
	m := s.byName[bpf.EgressMapPods]
	if m == nil {
		return p, nil
	}
	value, err := m.LookupBytes(id)
	if err != nil {
		return p, fmt.Errorf("read map %s: %w", bpf.EgressMapPods, err)
	}
	pod := decode[bpf.EgressPod](value)
	return Pod{pod.Flags, PolicyLimit(pod.Limit)}, nil
}

// SetPod sets what holds for the containers that are started in the pod with a cgroup id from now
// on; nothing if p is zero. If there is no room for it, its containers get the policy's defaults
// until each has been looked at; that is no error.
func (s *State) SetPod(id uint64, p Pod) error {
	m := s.byName[bpf.EgressMapPods]
	if m == nil || p == (Pod{}) {
		return remove(m, id)
	}
	err := m.Put(id, bpf.EgressPod{Flags: p.Flags, Limit: LimitOf(p.Limit)})
	if err != nil && !errors.Is(err, unix.E2BIG) {
		return fmt.Errorf("write map %s: %w", bpf.EgressMapPods, err)
	}
	return nil
}

// ForgetPods undoes SetPod for all pods.
func (s *State) ForgetPods() error {
	pods, err := s.Pods()
	if err != nil {
		return err
	}
	for id := range pods {
		if err := remove(s.byName[bpf.EgressMapPods], id); err != nil {
			return err
		}
	}
	return nil
}
