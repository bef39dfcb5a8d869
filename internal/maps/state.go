// Package maps gives Go types to the BPF maps: the state of containers, and the policy's
// lists as the programs look them up.
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

// State holds the maps that outlive the programs: they are pinned, and each version of the
// programs gets the maps of the version before.
type State struct {
	containers, totals *ebpf.Map
	byName             map[string]*ebpf.Map
	// from are the maps that maps of the State have replaced, as long as they hold
	// counts.
	from map[string]*ebpf.Map
}

// StateNames returns the names of the State's maps, which are also the names of their pins.
func StateNames() []string {
	return []string{
		bpf.EgressMapContainers, bpf.EgressMapStateless, bpf.EgressMapRetired, bpf.EgressMapTotals, bpf.EgressMapTickets,
		bpf.EgressMapAdmitted, bpf.EgressMapPermitted, bpf.EgressMapMails, bpf.EgressMapDevices, bpf.EgressMapTunnels,
	}
}

// Kept says whether a map of StateNames holds what must not be lost. The other maps hold
// what is on its way between hooks, and can be created anew.
func Kept(name string) bool {
	switch name {
	case bpf.EgressMapContainers, bpf.EgressMapStateless, bpf.EgressMapRetired, bpf.EgressMapTotals:
		return true
	}
	return false
}

// NewState makes a State of the maps of StateNames, and owns them. Readers may leave out
// any map except containers: a missing map counts as empty, and removing an entry from it
// does nothing.
func NewState(byName map[string]*ebpf.Map) *State {
	return &State{containers: byName[bpf.EgressMapContainers], totals: byName[bpf.EgressMapTotals], byName: byName}
}

// perCPU is how many free entries of an LRU map the kernel before 6.16 sets aside for each
// CPU, out of reach of all other CPUs (LOCAL_FREE_TARGET in kernel/bpf/bpf_lru_list.c).
const perCPU = 128

// StateSpec returns the specs of the State's maps in a format, for this machine: with many
// CPUs, an LRU map has to be larger.
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

// Use returns the maps, for the programs of spec to use instead of their own, and sets the
// constant that tells the programs their format.
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

// CreateState creates the maps in the latest format, empty and not pinned.
func CreateState() (*State, error) {
	return CreateStateIn(Latest)
}

// CreateStateIn creates the maps in a format, empty and not pinned.
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

// ByName returns the maps by name. The State still owns them.
func (s *State) ByName() map[string]*ebpf.Map {
	return maps.Clone(s.byName)
}

// Close closes the maps. The kernel keeps them while they are pinned or used.
func (s *State) Close() error {
	return errors.Join(CloseAll(s.byName), CloseAll(s.from))
}

// CloseAll closes maps. The kernel keeps them while they are pinned or used.
func CloseAll(byName map[string]*ebpf.Map) error {
	var errs []error
	for _, m := range byName {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

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

// Change is what [State.Configure] does to a container.
type Change struct {
	// Limit becomes the container's own limit if it is not nil; the zero value returns
	// the container to the policy's limit. Tokens that are missing from the bucket stay
	// missing.
	Limit *policy.Limit
	// The flags in Mask become those in Flags.
	Mask, Flags Flag
	// A container with one of these flags keeps its limit, whatever Limit is.
	Unless Flag
}

// Flag is an exception of a single container.
type Flag = bpf.EgressContainerFlag

const (
	// MayReachMetadata allows what the policy's presets block.
	MayReachMetadata Flag = bpf.EgressContainerFlagCONTAINER_METADATA
	// LimitSetByHand marks a limit that no rule changes.
	LimitSetByHand Flag = bpf.EgressContainerFlagCONTAINER_LIMIT_SET
	// AnyFamily allows all socket families; each of its bits allows one (FamilyFlags).
	AnyFamily Flag = bpf.EgressContainerFlagCONTAINER_FAMILIES
)

// FamilyFlags returns, for each number of a family, the flags that a container needs to
// open sockets of that family if the policy refuses them. The flags are kept from version
// to version, so a new number goes to the end of policy.FamilyNumbers.
func FamilyFlags() (flags [64]Flag) {
	for i := range flags {
		flags[i] = AnyFamily
	}
	for i, n := range policy.FamilyNumbers() {
		flags[n] = 1 << (bits.TrailingZeros32(uint32(AnyFamily)) + i)
	}
	return flags
}

// FlagsOf returns the flags that allow a container these families.
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

// FamiliesOf returns the families that a container's flags allow; policy.Restrict if they
// allow none.
func FamiliesOf(flags Flag) policy.Families {
	byNumber := FamilyFlags()
	return policy.FamiliesOf(slices.DeleteFunc(policy.FamilyNumbers(), func(n uint) bool { return flags&byNumber[n] == 0 }))
}

// Configure changes the flags and the limit of the container with a cgroup id, from its
// next packet on. A program makes the change: the system call would write the whole entry,
// and undo what is counted meanwhile.
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

// ask runs a program of bpf/control.bpf.c with values as its input, and says whether the
// program returned 1.
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

// SetLimit gives the container with a cgroup id a limit that no rule changes.
func (s *State) SetLimit(id uint64, l policy.Limit) error {
	return s.Configure(id, Change{Limit: &l, Mask: LimitSetByHand, Flags: LimitSetByHand})
}

// UnsetLimit returns the container to the policy's limit and to the rules. It is no error
// if the container has no limit of its own.
func (s *State) UnsetLimit(id uint64) error {
	return s.Configure(id, Change{Limit: new(policy.Limit), Mask: LimitSetByHand})
}

// LoadProgram loads a program of bpf/control.bpf.c, which uses the State's maps and no
// policy. The caller closes it.
func LoadProgram(name string, s *State) (*ebpf.Program, error) {
	spec, err := bpf.LoadControl()
	if err != nil {
		return nil, err
	}
	return loadProgram(name, spec, s, nil)
}

// loadProgram loads a program of spec that uses the State's maps and others. The caller
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

// Enrol creates the entry of the container with a cgroup id, unless it exists, and says
// whether it did. If there is no room, the container is judged without state; that is no
// error.
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

// Tunnels returns the UDP ports that are closed to containers. The value is true if a
// socket of the host unpacks packets there, and false if one may do so later.
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

// SetTunnels closes these ports to containers, with values as Tunnels returns them, and
// opens all others.
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
