package maps

import (
	"errors"
	"fmt"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
)

// Format says what the values of the kept maps begin with. Format 2 begins like format 1.
// Values may be longer or shorter than a version knows: what is missing is 0, and what is
// beyond is ignored.
type Format uint32

const (
	// Earliest is the format of the versions that write no format.
	Earliest Format = 1
	// Latest is the format of this version.
	Latest Format = 2 // FORMAT
)

// ErrNewer means that the maps have a format that this version does not know.
var ErrNewer = errors.New("of a later format than this version knows")

// Format returns the format of the State's maps.
func (s *State) Format() Format {
	if s.containers.ValueSize() < uint32(unsafe.Sizeof(Container{})) || s.totals != nil && s.totals.ValueSize() < uint32(unsafe.Sizeof(Sums{})) {
		return Earliest
	}
	return Latest
}

// CheckFormat returns ErrNewer if the map totals has a format that this version does not
// know.
func CheckFormat(totals *ebpf.Map) error {
	sum, err := readSums(totals)
	if err == nil && Format(sum.Format) > Latest {
		err = fmt.Errorf("format %d: %w", sum.Format, ErrNewer)
	}
	return err
}

// apply changes the specs to those of maps of the format.
func (f Format) apply(specs map[string]*ebpf.MapSpec) error {
	if f == Latest {
		return nil
	}
	spec, err := bpf.LoadControl()
	if err != nil {
		return err
	}
	containers := spec.Maps[bpf.ControlMapContainers1]
	containers.Name = bpf.EgressMapContainers
	specs[bpf.EgressMapContainers] = containers
	totals := specs[bpf.EgressMapTotals]
	totals.ValueSize = uint32(unsafe.Offsetof(Counters{}.MoreDropped))
	totals.Key, totals.Value = nil, nil
	return nil
}

// CreateMap creates an empty map from a spec of StateSpec. The caller closes it.
func CreateMap(spec *ebpf.MapSpec) (*ebpf.Map, error) {
	m, err := ebpf.NewMap(spec)
	if err != nil {
		return nil, fmt.Errorf("create map %s: %w", spec.Name, Cause(err))
	}
	if err := CheckName(m, spec.Name); err != nil {
		m.Close()
		return nil, err
	}
	if spec.Name != bpf.EgressMapTotals || spec.ValueSize < uint32(unsafe.Sizeof(Sums{})) {
		return m, nil
	}
	cpus, err := ebpf.PossibleCPU()
	if err == nil {
		zero := make([]Sums, cpus)
		zero[0].Format = uint32(Latest)
		err = m.Put(uint32(0), zero)
	}
	if err != nil {
		m.Close()
		return nil, fmt.Errorf("write map %s: %w", spec.Name, err)
	}
	return m, nil
}

// CheckName returns an error if the kernel does not know a new map by its name. The library
// leaves out all names if there was no memory when it tried whether the kernel has names, and
// by its name alone is a map found again.
func CheckName(m *ebpf.Map, name string) error {
	info, err := m.Info()
	if err == nil && info.Name != name {
		err = fmt.Errorf("it got no name: %w", unix.ENOMEM)
	}
	if err != nil {
		return fmt.Errorf("create map %s: %w", name, err)
	}
	return nil
}

// Compatible returns an error unless programs can use the map in place of one from
// StateSpec. An LRU map may have another size.
func Compatible(spec *ebpf.MapSpec, m *ebpf.Map) error {
	spec = spec.Copy()
	if spec.Type == ebpf.LRUHash {
		spec.MaxEntries = m.MaxEntries()
	}
	return spec.Compatible(m)
}

// Convertible returns an error unless the contents of a map can be taken over into one from
// StateSpec: the values may be longer or shorter, and there may be more or less room.
func Convertible(spec *ebpf.MapSpec, m *ebpf.Map) error {
	spec = spec.Copy()
	spec.MaxEntries, spec.ValueSize = m.MaxEntries(), m.ValueSize()
	return spec.Compatible(m)
}
