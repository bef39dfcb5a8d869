package maps

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
)

// A Migration takes what is kept over into maps of another format, while programs use both:
// first those that it comes from, then, one after the other, those that it goes to. Copy
// comes before the programs are exchanged, and Carry after. Whatever becomes of the process
// meanwhile, another Migration of the same maps completes it: what is counted in the maps
// together never changes, and no bucket of the new maps is fuller than when it was copied.
type Migration struct {
	from  map[string]*ebpf.Map
	to    *State
	carry *ebpf.Program
	// copied are the buckets as they were at a time, in nanoseconds of CLOCK_MONOTONIC.
	copied map[uint64]bpf.EgressBucket
	at     uint64
}

// Replaces tells a State of maps that some of its own replace, by their names, and in which
// something may be counted still. The State closes them.
func (s *State) Replaces(from map[string]*ebpf.Map) {
	s.from = from
	for name, m := range from {
		own := s.byName[name]
		if own == nil {
			continue
		}
		if sameMap(m, own) {
			// It was not replaced yet when it was opened.
			m.Close()
			delete(from, name)
		}
	}
}

// Same says whether two States have the same maps of containers and totals.
func (s *State) Same(other *State) bool {
	return sameMap(s.containers, other.containers) && sameMap(s.totals, other.totals)
}

// sameMap says whether both are the same map of the kernel, or there is none.
func sameMap(a, b *ebpf.Map) bool {
	id := func(m *ebpf.Map) (id ebpf.MapID) {
		if m == nil {
			return 0
		}
		if info, err := m.Info(); err == nil {
			id, _ = info.ID()
		}
		return id
	}
	return id(a) == id(b)
}

// Migrate returns the migration from the maps that the State replaces. The caller closes it,
// before the State.
func (s *State) Migrate() (*Migration, error) { return newMigration(s.from, s) }

func newMigration(from map[string]*ebpf.Map, to *State) (*Migration, error) {
	spec, err := bpf.LoadControl()
	if err != nil {
		return nil, err
	}
	others := map[string]*ebpf.Map{}
	for name, of := range map[string]string{
		bpf.EgressMapContainers: bpf.ControlMapContainersFrom, bpf.EgressMapTotals: bpf.ControlMapTotalsFrom,
	} {
		if from[name] != nil {
			others[of] = from[name]
		}
	}
	m := &Migration{from: from, to: to}
	if err := spec.Variables[bpf.ControlVarCounters].Set(uint32(m.words())); err != nil {
		return nil, err
	}
	m.carry, err = loadProgram(bpf.ControlProgCarry, spec, to, others)
	return m, err
}

// Close closes the Migration, and no map.
func (m *Migration) Close() error { return m.carry.Close() }

// membarrierGlobal is MEMBARRIER_CMD_GLOBAL (include/uapi/linux/membarrier.h).
const membarrierGlobal = 1

// header is what is before the counters of a container, in bytes.
const header = int(unsafe.Offsetof(Container{}.Counters))

// words returns how many counters both the old and the new maps have.
func (m *Migration) words() int {
	n := len(words{})
	for name, from := range m.from {
		for _, size := range []uint32{from.ValueSize(), m.to.byName[name].ValueSize()} {
			switch name {
			case bpf.EgressMapContainers:
				n = min(n, (int(size)-header)/8)
			case bpf.EgressMapTotals:
				n = min(n, int(size)/8)
			}
		}
	}
	return n
}

// Copy gives the new maps what is in the old ones, but for counters.
func (m *Migration) Copy() error {
	for name, from := range m.from {
		var err error
		switch name {
		case bpf.EgressMapContainers:
			err = m.copyContainers(from)
		case bpf.EgressMapTotals:
		case bpf.EgressMapRetired:
			err = copyEntries[bpf.EgressNameKey](from, m.to.byName[name])
		default:
			err = copyEntries[uint64](from, m.to.byName[name])
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *Migration) copyContainers(from *ebpf.Map) error {
	m.copied, m.at = map[uint64]bpf.EgressBucket{}, monotonic()
	to := m.to.containers
	return eachEntry(from, func(id uint64, value []byte) error {
		m.copied[id] = decode[Container](value).Bucket
		err := to.Update(id, withoutCounters(resized(value, to)), ebpf.UpdateNoExist)
		if errors.Is(err, ebpf.ErrKeyExist) {
			// An earlier migration has copied it, and was interrupted.
			return m.move(bpf.ControlCargo{Id: id, Bucket: m.copied[id]}, nil)
		}
		if errors.Is(err, unix.E2BIG) {
			return m.to.doWithout(id, bpf.EgressWithoutStateHAS_NO_ROOM)
		}
		if err != nil {
			return fmt.Errorf("write map %s: %w", bpf.EgressMapContainers, err)
		}
		return nil
	})
}

func withoutCounters(value []byte) []byte {
	clear(value[min(header, len(value)):min(header+int(unsafe.Sizeof(Counters{})), len(value))])
	return value
}

// copyEntries copies the entries that there are none of.
func copyEntries[K any](from, to *ebpf.Map) error {
	return eachEntry(from, func(key K, value []byte) error {
		err := to.Update(&key, resized(value, to), ebpf.UpdateNoExist)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) && !errors.Is(err, unix.E2BIG) {
			return fmt.Errorf("write map %v: %w", to, err)
		}
		return nil
	})
}

// resized returns a value as it is in another map: cut off, or filled up with zeros.
func resized(value []byte, in *ebpf.Map) []byte {
	size := int(in.ValueSize())
	return append(slices.Clone(value[:min(len(value), size)]), make([]byte, size-min(len(value), size))...)
}

// Carry moves what was counted in the old maps, and takes the tokens that were taken there
// since Copy from the new ones. Programs may still be using the old maps: then it is to be
// called again.
func (m *Migration) Carry() error {
	// A program that was exchanged may still be at its last packet on another CPU: this waits
	// until none is (synchronize_rcu). The exchange was long ago where the
	// kernel cannot.
	_, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0)
	if from := m.from[bpf.EgressMapContainers]; from != nil {
		if err := m.carryContainers(from); err != nil {
			return err
		}
	}
	from := m.from[bpf.EgressMapTotals]
	if from == nil {
		return nil
	}
	sum, err := readSums(from)
	if err != nil {
		return err
	}
	return m.move(bpf.ControlCargo{}, &sum.Counters)
}

func (m *Migration) carryContainers(from *ebpf.Map) error {
	now := monotonic()
	err := eachEntry(from, func(id uint64, value []byte) error {
		c := decode[Container](value)
		tokens := uint32(0)
		if before, ok := m.copied[id]; ok {
			tokens = taken(before, c.Bucket, m.at)
		}
		if tokens == 0 && c.Counters == (Counters{}) {
			return nil
		}
		m.copied[id] = c.Bucket
		return m.move(bpf.ControlCargo{Id: id, Tokens: tokens, Bucket: c.Bucket}, &c.Counters)
	})
	m.at = now
	return err
}

// Undo moves back what was counted in the new maps, for the old ones to be used again. It is
// for before Carry.
func (m *Migration) Undo() error {
	to, from := maps.Clone(m.to.byName), map[string]*ebpf.Map{}
	for name, old := range m.from {
		to[name], from[name] = old, m.to.byName[name]
	}
	back, err := newMigration(from, NewState(to))
	if err != nil {
		return err
	}
	defer back.Close()
	back.copied, back.at = m.copied, m.at
	return back.Carry()
}

// taken returns how many tokens were taken from a bucket since it was as before, at a time.
func taken(before, b bpf.EgressBucket, at uint64) uint32 {
	since := at
	if before.Interval == b.Interval {
		since = max(at, before.FullAt)
	}
	if b.Count == 0 || b.Interval == 0 || b.FullAt <= since {
		return 0
	}
	return uint32(min((b.FullAt-since)/b.Interval, uint64(b.Burst)))
}

// move has the program carry move counters from the old maps to the new ones; nil are none.
func (m *Migration) move(c bpf.ControlCargo, counters *Counters) error {
	if counters == nil {
		counters = new(Counters)
	}
	// What is gone from either map was removed meanwhile.
	if _, err := ask(m.carry, c, *wordsOf(counters)); err != nil {
		return fmt.Errorf("carry over what was counted for cgroup %d: %w", c.Id, err)
	}
	return nil
}

// monotonic returns CLOCK_MONOTONIC, as programs see it, in nanoseconds.
func monotonic() uint64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0
	}
	return uint64(time.Duration(now.Nano()))
}
