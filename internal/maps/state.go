// Package maps gives Go types to the BPF maps: the state of containers, and the policy's
// lists as the programs look them up.
package maps

import (
	"errors"
	"fmt"
	"maps"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/egressbpf/egressbpf/bpf"
)

// State holds the maps that outlive the programs: they are pinned, and each version of the
// programs gets the maps of the version before.
type State struct {
	containers, totals *ebpf.Map
	byName             map[string]*ebpf.Map
	// from are the maps that maps of the State have replaced, as long as they hold
	// counts.
	from map[string]*ebpf.Map
	// configure is the program of Configure; nil until it is first needed.
	configure *ebpf.Program
}

// StateNames returns the names of the State's maps, which are also the names of their pins.
func StateNames() []string {
	return []string{
		bpf.EgressMapContainers, bpf.EgressMapStateless, bpf.EgressMapRetired, bpf.EgressMapTotals, bpf.EgressMapTickets,
		bpf.EgressMapAdmitted, bpf.EgressMapPermitted, bpf.EgressMapMails, bpf.EgressMapDevices, bpf.EgressMapTunnels,
		bpf.EgressMapReaders, bpf.EgressMapBuffers, bpf.EgressMapTellings, bpf.EgressMapCallers, bpf.EgressMapSeen,
		bpf.EgressMapPods,
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

// latestSpec are the specs of the State's maps in the latest format. Reading them from the
// object takes longer than opening the maps.
var latestSpec = sync.OnceValues(func() (map[string]*ebpf.MapSpec, error) {
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
	return specs, nil
})

// StateSpec returns the specs of the State's maps in a format, for this machine: with many
// CPUs, an LRU map has to be larger.
func StateSpec(format Format) (map[string]*ebpf.MapSpec, error) {
	latest, err := latestSpec()
	if err != nil {
		return nil, err
	}
	specs := map[string]*ebpf.MapSpec{}
	for name, spec := range latest {
		own := *spec // whose fields change; what they point to does not
		specs[name] = &own
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
	return errors.Join(s.configure.Close(), CloseAll(s.byName), CloseAll(s.from))
}

// CloseAll closes maps. The kernel keeps them while they are pinned or used.
func CloseAll(byName map[string]*ebpf.Map) error {
	var errs []error
	for _, m := range byName {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}
