// Package maps gives the BPF maps Go types: what the programs count and limit,
// and the policy they look up.
package maps

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// Container is what the programs keep about one container.
type Container = bpf.EgressContainer

// State holds the maps that outlive the programs: they are pinned, and each
// version of the programs is handed those of the version before.
type State struct {
	containers, totals *ebpf.Map
	byName             map[string]*ebpf.Map
	// from are maps that others of the State replace, as long as something is counted there.
	from map[string]*ebpf.Map
}

// StateNames are the names of the State's maps, also as pins.
func StateNames() []string {
	return []string{
		bpf.EgressMapContainers, bpf.EgressMapStateless, bpf.EgressMapRetired, bpf.EgressMapTotals, bpf.EgressMapTickets,
		bpf.EgressMapAdmitted, bpf.EgressMapPermitted, bpf.EgressMapMails, bpf.EgressMapDevices, bpf.EgressMapTunnels,
	}
}

// Kept says whether a map of StateNames holds what must not be lost. The others hold what
// is on its way, and can be made anew.
func Kept(name string) bool {
	switch name {
	case bpf.EgressMapContainers, bpf.EgressMapStateless, bpf.EgressMapRetired, bpf.EgressMapTotals:
		return true
	}
	return false
}

// NewState wraps the maps of StateNames, which it then owns. Some may be missing, for who
// only reads: they are taken to be empty, and what is removed from them is gone already. The
// containers are not among those.
func NewState(byName map[string]*ebpf.Map) *State {
	return &State{containers: byName[bpf.EgressMapContainers], totals: byName[bpf.EgressMapTotals], byName: byName}
}

// perCPU is how many free entries of an LRU map the kernel sets aside for each CPU, out of
// the reach of all others, before 6.16 (LOCAL_FREE_TARGET in kernel/bpf/bpf_lru_list.c).
const perCPU = 128

// StateSpec returns how the State's maps are made in a format, on this machine: an LRU map
// has to be larger where there are many CPUs.
func StateSpec(format Format) (map[string]*ebpf.MapSpec, error) {
	spec, err := bpf.LoadEgress()
	if err != nil {
		return nil, err
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, err
	}
	specs := map[string]*ebpf.MapSpec{}
	for _, name := range StateNames() {
		specs[name] = spec.Maps[name]
		if specs[name].Type == ebpf.LRUHash {
			specs[name].MaxEntries = max(specs[name].MaxEntries, uint32(2*perCPU*cpus))
		}
	}
	return specs, format.apply(specs)
}

// Use returns the maps, for the programs of spec to find instead of their own, and tells
// the programs their format.
func (s *State) Use(spec *ebpf.CollectionSpec) (map[string]*ebpf.Map, error) {
	for name, m := range s.byName {
		if own := spec.Maps[name]; own != nil {
			own.MaxEntries, own.ValueSize = m.MaxEntries(), m.ValueSize()
		}
	}
	if v := spec.Variables[bpf.EgressVarFormat]; v != nil {
		if err := v.Set(uint32(s.Format())); err != nil {
			return nil, fmt.Errorf("set constant %s: %w", bpf.EgressVarFormat, err)
		}
	}
	return s.ByName(), nil
}

// CreateState makes the maps in the latest format, empty and pinned nowhere.
func CreateState() (*State, error) {
	return CreateStateIn(Latest)
}

// CreateStateIn does so in a format.
func CreateStateIn(format Format) (*State, error) {
	specs, err := StateSpec(format)
	if err != nil {
		return nil, err
	}
	// Kernels before 5.11 charge maps to it.
	if err := RemoveMemlock(); err != nil {
		return nil, err
	}
	made := map[string]*ebpf.Map{}
	for _, name := range StateNames() {
		m, err := CreateMap(specs[name])
		if err != nil {
			CloseAll(made)
			return nil, err
		}
		made[name] = m
	}
	return NewState(made), nil
}

// ByName returns the maps by their names. They stay the State's.
func (s *State) ByName() map[string]*ebpf.Map {
	return maps.Clone(s.byName)
}

// Close closes the maps; the kernel keeps them while they are pinned or used.
func (s *State) Close() error {
	return errors.Join(CloseAll(s.byName), CloseAll(s.from))
}

// CloseAll closes maps; the kernel keeps them while they are pinned or used.
func CloseAll(byName map[string]*ebpf.Map) error {
	var errs []error
	for _, m := range byName {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

// Containers returns the containers that something was counted for, by the ids
// of their cgroups.
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

// Totals returns the sum over all containers since the first attach, those
// that are gone included.
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

// Change is what [State.Configure] does to a container.
type Change struct {
	// Limit, if not nil, becomes the container's own; the zero value returns it to the
	// policy's. The tokens that are missing from its bucket stay missing.
	Limit *policy.Limit
	// The flags in Mask become those in Flags.
	Mask, Flags Flag
	// A container with one of these flags keeps its limit, whatever Limit is.
	Unless Flag
}

// Flag is what holds for one container alone.
type Flag = bpf.EgressContainerFlag

const (
	// MayReachMetadata opens what the policy's presets block.
	MayReachMetadata Flag = bpf.EgressContainerFlagCONTAINER_METADATA
	// LimitSetByHand marks a limit that no rule changes.
	LimitSetByHand Flag = bpf.EgressContainerFlagCONTAINER_LIMIT_SET
	// AnyFamily opens all families of sockets; each of its bits opens one (FamilyFlags).
	AnyFamily Flag = bpf.EgressContainerFlagCONTAINER_FAMILIES
)

// FamilyFlags returns the flags that a container needs to make sockets of a family that
// the policy refuses, by the family's number. They are kept from version to version: a
// number goes to the end of policy.FamilyNumbers.
func FamilyFlags() (flags [64]Flag) {
	for i := range flags {
		flags[i] = AnyFamily
	}
	for i, n := range policy.FamilyNumbers() {
		flags[n] = 1 << (bits.TrailingZeros32(uint32(AnyFamily)) + i)
	}
	return flags
}

// FlagsOf returns the flags that open families to a container.
func FlagsOf(f policy.Families) (flags Flag) {
	if f == "" {
		return 0
	}
	byNumber := FamilyFlags()
	for _, n := range policy.FamilyNumbers() {
		if f.Mask()>>n&1 != 0 {
			flags |= byNumber[n]
		}
	}
	return flags
}

// FamiliesOf returns the families that the flags of a container open; policy.Restrict if
// none.
func FamiliesOf(flags Flag) policy.Families {
	byNumber := FamilyFlags()
	return policy.FamiliesOf(slices.DeleteFunc(policy.FamilyNumbers(), func(n uint) bool { return flags&byNumber[n] == 0 }))
}

// Configure changes what holds for the container with a cgroup id, from its next packet
// on. It has a program do so: the system call for it would write the whole entry, and
// undo what is counted meanwhile.
func (s *State) Configure(id uint64, c Change) error {
	prog, err := LoadProgram(bpf.ControlProgConfigure, s)
	if err != nil {
		return err
	}
	defer prog.Close()
	r := bpf.ControlRequest{Id: id, Mask: uint32(c.Mask), Flags: uint32(c.Flags), KeepLimit: 1, Unless: uint32(c.Unless)}
	if c.Limit != nil {
		r.KeepLimit, r.Limit = 0, LimitOf(*c.Limit)
	}
	done, err := ask(prog, r)
	if err != nil {
		return fmt.Errorf("configure the container with cgroup %d: %w", id, err)
	}
	if !done {
		return fmt.Errorf("configure the container with cgroup %d: map %s is full, or the container is gone", id, bpf.EgressMapContainers)
	}
	return nil
}

// ask runs a program of bpf/control.bpf.c with an input of values, and returns what it says.
func ask(prog *ebpf.Program, values ...any) (bool, error) {
	const ethernet = 14
	input := make([]byte, ethernet)
	for _, v := range values {
		var err error
		if input, err = binary.Append(input, binary.NativeEndian, v); err != nil {
			return false, err
		}
	}
	done, err := prog.Run(&ebpf.RunOptions{Data: input})
	return done == 1, err
}

// SetLimit gives the container with a cgroup id its own limit, as an operator does.
func (s *State) SetLimit(id uint64, l policy.Limit) error {
	return s.Configure(id, Change{Limit: &l, Mask: LimitSetByHand, Flags: LimitSetByHand})
}

// UnsetLimit returns the container to the policy's limit, and to the rules; without a
// limit of its own that is no error.
func (s *State) UnsetLimit(id uint64) error {
	return s.Configure(id, Change{Limit: new(policy.Limit), Mask: LimitSetByHand})
}

// LoadProgram loads a program that uses the State's maps and no policy. The
// caller closes it.
func LoadProgram(name string, s *State) (*ebpf.Program, error) {
	spec, err := bpf.LoadControl()
	if err != nil {
		return nil, err
	}
	return loadProgram(name, spec, s, nil)
}

// loadProgram loads a program of spec that uses the State's maps, and others. The caller
// closes it.
func loadProgram(name string, spec *ebpf.CollectionSpec, s *State, others map[string]*ebpf.Map) (*ebpf.Program, error) {
	shared, err := s.Use(spec)
	if err != nil {
		return nil, err
	}
	for name, m := range others {
		spec.Maps[name].MaxEntries, spec.Maps[name].ValueSize = m.MaxEntries(), m.ValueSize()
		shared[name] = m
	}
	spec.Programs = map[string]*ebpf.ProgramSpec{"program": spec.Programs[name]}
	// Kernels before 5.11 charge maps to it.
	if err := RemoveMemlock(); err != nil {
		return nil, err
	}
	var loaded struct {
		Program *ebpf.Program `ebpf:"program"`
	}
	if err := spec.LoadAndAssign(&loaded, &ebpf.CollectionOptions{MapReplacements: shared}); err != nil {
		return nil, fmt.Errorf("load program %s: %w", name, err)
	}
	return loaded.Program, nil
}

// Enrol makes room for the container with a cgroup id, which it may have already. It
// says whether it had none. A container for which there is no room is judged without
// state: that is no error.
func (s *State) Enrol(id uint64) (bool, error) {
	err := s.containers.Update(id, make([]byte, s.containers.ValueSize()), ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		return false, nil
	}
	if errors.Is(err, unix.E2BIG) {
		return false, s.doWithout(id, bpf.EgressWithoutStateHAS_NO_ROOM)
	}
	if err != nil {
		return false, fmt.Errorf("write map %s: %w", bpf.EgressMapContainers, err)
	}
	return true, remove(s.byName[bpf.EgressMapStateless], id)
}

// doWithout has the container with a cgroup id judged without state.
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

// remove deletes an entry that there may be, of a map that there may be.
func remove(m *ebpf.Map, id uint64) error {
	if m == nil {
		return nil
	}
	if err := m.Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("write map %v: %w", m, err)
	}
	return nil
}

// Recognised says whether the cgroup with an id is known for a container's, with state or
// without.
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

// Room is how much of the maps of containers is taken.
type Room struct {
	// Containers have state, of at most Of.
	Containers int `json:"containers"`
	Of         int `json:"of"`
	// Removed have none, since their cgroups were removed and the kernel has not released
	// them yet, and Without since there was no room; of at most OfStateless.
	Removed     int `json:"removed"`
	Without     int `json:"without_room"`
	OfStateless int `json:"of_stateless"`
}

// Short says whether there is not much room left, or too little.
func (r Room) Short() bool {
	return r.Without > 0 || r.Containers > r.Of/5*4 || r.Removed > r.OfStateless/5*4
}

// Room tells how much room the containers take that Containers has returned, and those
// without state, which it counts, in some milliseconds for 100,000.
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

// Devices returns the indexes of the network devices that have a bucket.
func (s *State) Devices() (indexes []uint32, err error) {
	m := s.byName[bpf.EgressMapDevices]
	if m == nil {
		return nil, nil
	}
	var (
		index uint32
		d     bpf.EgressDevice
	)
	all := m.Iterate()
	for all.Next(&index, &d) {
		indexes = append(indexes, index)
	}
	if err := all.Err(); err != nil {
		return nil, fmt.Errorf("read map %s: %w", bpf.EgressMapDevices, err)
	}
	return indexes, nil
}

// ForgetDevice removes the bucket of a network device.
func (s *State) ForgetDevice(index uint32) error {
	m := s.byName[bpf.EgressMapDevices]
	if m == nil {
		return nil
	}
	if err := m.Delete(index); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("write map %s: %w", bpf.EgressMapDevices, err)
	}
	return nil
}

// Tunnels returns the UDP ports that are closed to containers, since the host unpacks
// packets from others there, or might (false).
func (s *State) Tunnels() (map[uint16]bool, error) {
	closed := map[uint16]bool{}
	var (
		port  uint16 // in network byte order
		found uint8
	)
	m := s.byName[bpf.EgressMapTunnels]
	if m == nil {
		return closed, nil
	}
	all := m.Iterate()
	for all.Next(&port, &found) {
		closed[bits.ReverseBytes16(port)] = found != 0
	}
	if err := all.Err(); err != nil {
		return nil, fmt.Errorf("read map %s: %w", bpf.EgressMapTunnels, err)
	}
	return closed, nil
}

// SetTunnels closes those ports to containers, as Tunnels returns them, and opens all others.
func (s *State) SetTunnels(ports map[uint16]bool) error {
	m := s.byName[bpf.EgressMapTunnels]
	if m == nil {
		return nil
	}
	before, err := s.Tunnels()
	if err != nil {
		return err
	}
	for port, found := range ports {
		value := uint8(0)
		if found {
			value = 1
		}
		if err := m.Put(bits.ReverseBytes16(port), value); err != nil {
			return fmt.Errorf("write map %s: %w", bpf.EgressMapTunnels, err)
		}
	}
	for port := range before {
		if _, closed := ports[port]; closed {
			continue
		}
		if err := m.Delete(bits.ReverseBytes16(port)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("write map %s: %w", bpf.EgressMapTunnels, err)
		}
	}
	return nil
}

// Forget removes what is kept about the container with a cgroup id, which is none any more;
// the totals keep its counts.
func (s *State) Forget(id uint64) error {
	return errors.Join(remove(s.containers, id), remove(s.byName[bpf.EgressMapStateless], id))
}

// Bury removes what is kept about a container whose cgroup was removed. What its sockets
// still send is judged as a container's.
func (s *State) Bury(id uint64) error {
	if err := s.doWithout(id, bpf.EgressWithoutStateWAS_REMOVED); err != nil {
		return err
	}
	return remove(s.containers, id)
}
