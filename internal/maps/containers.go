package maps

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
)

// Container is what the programs keep about one container.
type Container = bpf.EgressContainer

// Containers returns the containers that have state, by the ids of their cgroups.
func (s *State) Containers() (map[uint64]Container, error) {
	from := s.from[bpf.EgressMapContainers]
	if from == nil {
		return readContainers(s.containers)
	}
	var found map[uint64]Container
	err := steady(func() (map[uint64]Container, error) { return readContainers(from) }, func() (err error) {
		found, err = readContainers(s.containers)
		return err
	}, func(before, after map[uint64]Container) bool {
		for id, c := range after {
			if less(c.Counters, before[id].Counters) {
				return false
			}
		}
		for id, c := range before {
			now, ok := found[id]
			if !ok {
				found[id] = c
				continue
			}
			now.Counters = add(now.Counters, c.Counters)
			found[id] = now
		}
		return true
	})
	return found, err
}

// Container returns the container with a cgroup id, and whether it has state. Of a State whose
// maps are being replaced, Containers tells more.
func (s *State) Container(id uint64) (c Container, ok bool, err error) {
	value, err := s.containers.LookupBytes(id)
	if err != nil {
		return c, false, fmt.Errorf("look for the container with cgroup %d: %w", id, err)
	}
	return decode[Container](value), value != nil, nil
}

// Totals returns the sums over all containers since the first attach, including containers
// that are gone.
func (s *State) Totals() (Counters, error) {
	from := s.from[bpf.EgressMapTotals]
	if s.totals == nil {
		return Counters{}, nil
	}
	if from == nil {
		sum, err := readSums(s.totals)
		return sum.Counters, err
	}
	var sum Sums
	err := steady(func() (Sums, error) { return readSums(from) }, func() (err error) {
		sum, err = readSums(s.totals)
		return err
	}, func(before, after Sums) bool {
		sum.Counters = add(sum.Counters, before.Counters)
		return !less(after.Counters, before.Counters)
	})
	return sum.Counters, err
}

// steady reads what is in a map that is being replaced before and after read, which reads the
// map that replaces it, and has both joined. It does so again if join returns false, since
// something was moved from the one to the other meanwhile.
func steady[V any](from func() (V, error), read func() error, join func(before, after V) bool) error {
	for range 100 {
		before, err := from()
		if err != nil {
			return err
		}
		if err := read(); err != nil {
			return err
		}
		after, err := from()
		if err != nil {
			return err
		}
		if join(before, after) {
			break
		}
	}
	return nil
}

func readContainers(m *ebpf.Map) (map[uint64]Container, error) {
	found := map[uint64]Container{}
	return found, eachEntry(m, func(id uint64, value []byte) error {
		found[id] = decode[Container](value)
		return nil
	})
}

// Enrol creates the entry of the container with a cgroup id, unless it exists, and says
// whether it did. If there is no room, the container is judged without state; that is no
// error.
func (s *State) Enrol(id uint64) (bool, error) {
	err := s.containers.Update(id, make([]byte, s.containers.ValueSize()), ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		return false, s.hasRoom(id)
	}
	if errors.Is(err, unix.E2BIG) {
		return false, s.doWithout(id, bpf.EgressWithoutStateHAS_NO_ROOM)
	}
	if err != nil {
		return false, fmt.Errorf("write map %s: %w", bpf.EgressMapContainers, err)
	}
	return true, remove(s.byName[bpf.EgressMapStateless], id)
}

// hasRoom corrects what is kept of a container that has an entry: it may have found no room
// before.
func (s *State) hasRoom(id uint64) error {
	stateless := s.byName[bpf.EgressMapStateless]
	if stateless == nil {
		return nil
	}
	value, err := stateless.LookupBytes(id)
	if err != nil {
		return fmt.Errorf("read map %s: %w", bpf.EgressMapStateless, err)
	}
	if value == nil || decode[bpf.EgressWithoutState](value) != bpf.EgressWithoutStateHAS_NO_ROOM {
		return nil
	}
	return remove(stateless, id)
}

// doWithout marks the container with a cgroup id as one without state.
func (s *State) doWithout(id uint64, why bpf.EgressWithoutState) error {
	stateless := s.byName[bpf.EgressMapStateless]
	if stateless == nil {
		return nil
	}
	if err := stateless.Put(id, why); err != nil {
		return fmt.Errorf("write map %s: %w", bpf.EgressMapStateless, err)
	}
	return nil
}

// remove deletes an entry if there is one. m may be nil.
func remove(m *ebpf.Map, id uint64) error {
	if m == nil {
		return nil
	}
	if err := m.Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("write map %v: %w", m, err)
	}
	return nil
}

// KeepRemoved gives an entry to the containers without state, as far as there is room, for
// versions that know of no other way to tell that a cgroup is a container's. For this version,
// the entry of a removed container holds no token.
func (s *State) KeepRemoved() error {
	stateless := s.byName[bpf.EgressMapStateless]
	if stateless == nil {
		return nil
	}
	return eachEntry(stateless, func(id uint64, why []byte) error {
		var c Container
		if decode[bpf.EgressWithoutState](why) == bpf.EgressWithoutStateWAS_REMOVED {
			c.Bucket.Closed = 1
		}
		entry := unsafe.Slice((*byte)(unsafe.Pointer(&c)), unsafe.Sizeof(c))
		err := s.containers.Update(id, resized(entry, s.containers), ebpf.UpdateNoExist)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) && !errors.Is(err, unix.E2BIG) {
			return fmt.Errorf("write map %s: %w", bpf.EgressMapContainers, err)
		}
		return nil
	})
}

// Recognised says whether the cgroup with an id is known as a container's, with or without
// state.
func (s *State) Recognised(id uint64) (bool, error) {
	const containers, stateless = bpf.EgressMapContainers, bpf.EgressMapStateless
	for _, m := range []*ebpf.Map{s.byName[containers], s.byName[stateless], s.from[containers], s.from[stateless]} {
		if m == nil {
			continue
		}
		value, err := m.LookupBytes(id)
		if err != nil {
			return false, fmt.Errorf("look for the container with cgroup %d: %w", id, err)
		}
		if value != nil {
			return true, nil
		}
	}
	return false, nil
}

// Room says how full the maps of containers are.
type Room struct {
	// Containers is the number of containers that have state; at most Of.
	Containers int `json:"containers"`
	Of         int `json:"of"`
	// Removed and Without are the numbers of containers without state: those whose
	// cgroups were removed and that the kernel has not released yet, and those for
	// which there was no room; at most OfStateless in all.
	Removed     int `json:"removed"`
	Without     int `json:"without_room"`
	OfStateless int `json:"of_stateless"`
}

// Short says whether little room is left, or none.
func (r Room) Short() bool {
	return r.Without > 0 || r.Containers > r.Of/5*4 || r.Removed > r.OfStateless/5*4
}

// Room returns how much room is taken: by the containers in known, which Containers has
// returned, and by those without state, which Room counts. That takes some milliseconds for
// 100,000.
func (s *State) Room(known map[uint64]Container) (Room, error) {
	stateless := s.byName[bpf.EgressMapStateless]
	r := Room{Containers: len(known), Of: int(s.containers.MaxEntries())}
	if stateless == nil {
		return r, nil
	}
	r.OfStateless = int(stateless.MaxEntries())
	err := eachEntry(stateless, func(_ uint64, value []byte) error {
		if decode[bpf.EgressWithoutState](value) == bpf.EgressWithoutStateHAS_NO_ROOM {
			r.Without++
		} else {
			r.Removed++
		}
		return nil
	})
	return r, err
}

// Forget removes the entry of a cgroup that is no container any more. The totals keep its
// counts.
func (s *State) Forget(id uint64) error {
	return errors.Join(remove(s.containers, id), remove(s.byName[bpf.EgressMapStateless], id))
}

// Bury removes the entry of a container whose cgroup was removed. Packets of its sockets
// are still judged as a container's.
func (s *State) Bury(id uint64) error {
	if err := s.doWithout(id, bpf.EgressWithoutStateWAS_REMOVED); err != nil {
		return err
	}
	return remove(s.containers, id)
}

// RefusedInAll returns how many packets and system calls were refused, for any reason. In mode
// audit they were not refused, but counted.
func RefusedInAll(c Counters) (n uint64) {
	for reason := range bpf.EgressReasonREASONS {
		d := Refused(c, reason)
		n += d.Packets + d.Connects
	}
	return n + c.FamiliesDenied + c.HostSide.Packets
}
