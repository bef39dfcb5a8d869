package maps

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
)

// A Migration moves what is kept into maps of another format while programs use both: first
// all use the old maps, then, one after another, the new ones. Copy comes before the
// programs are replaced, and Carry after. If the process is killed in between, another
// Migration of the same maps completes it: the counts of old and new maps together never
// change, and no bucket of the new maps is fuller than when it was copied.
type Migration struct {
	from  map[string]*ebpf.Map
	to    *State
	carry *ebpf.Program
	// copied are the old buckets as they were when they were copied.
	copied map[uint64]bpf.EgressBucket
}

// Replaces adds to a State the maps that its own maps have replaced, by name, and which may
// still hold counts. The State closes them.
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

// Replacing says whether the State has maps that it is to replace.
func (s *State) Replacing() bool { return len(s.from) > 0 }

// Uses says whether a map is the State's of that name.
func (s *State) Uses(name string, m *ebpf.Map) bool { return sameMap(s.byName[name], m) }

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

// Migrate returns the migration from the maps that the State's maps have replaced. The
// caller closes it before the State.
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
	m := &Migration{from: from, to: to, copied: map[uint64]bpf.EgressBucket{}}
	if err := spec.Variables[bpf.ControlVarCounters].Set(uint32(m.words())); err != nil {
		return nil, err
	}
	m.carry, err = loadProgram(bpf.ControlProgCarry, spec, to, others)
	return m, err
}

// Close closes the Migration, but none of the maps.
func (m *Migration) Close() error { return m.carry.Close() }

// membarrierGlobal is MEMBARRIER_CMD_GLOBAL (include/uapi/linux/membarrier.h).
const membarrierGlobal = 1

// header is how many bytes of a container's value come before its counters.
const header = int(unsafe.Offsetof(Container{}.Counters))

// words returns how many counters both the old and the new values have.
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

// Copy copies the contents of the old maps to the new ones, except the counters.
func (m *Migration) Copy() error {
	for name, from := range m.from {
		var err error
		switch name {
		case bpf.EgressMapContainers:
			err = m.copyContainers(from)
		case bpf.EgressMapTotals:
		default:
			err = m.copyEntries(name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *Migration) copyContainers(from *ebpf.Map) error {
	m.copied = map[uint64]bpf.EgressBucket{}
	to := m.to.containers
	return eachEntry(from, func(id uint64, value []byte) error {
		m.copied[id] = decode[Container](value).Bucket
		err := to.Update(id, withoutCounters(resized(value, to)), ebpf.UpdateNoExist)
		if errors.Is(err, ebpf.ErrKeyExist) {
			// It was copied before, or a program of the new maps made it.
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

// copyEntries copies the entries that the new map of a name does not have, or has with more
// tokens.
func (m *Migration) copyEntries(name string) error {
	from, to := m.from[name], m.to.byName[name]
	return eachRaw(from, func(key, value []byte) error {
		flags := ebpf.UpdateNoExist
		if name == bpf.EgressMapRetired {
			now, err := to.LookupBytes(key)
			if err != nil {
				return fmt.Errorf("read map %v: %w", to, err)
			}
			if now != nil && decode[bpf.EgressPast](now).Bucket.FullAt < decode[bpf.EgressPast](value).Bucket.FullAt {
				flags = ebpf.UpdateAny
			}
		}
		err := to.Update(key, resized(value, to), flags)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) && !errors.Is(err, unix.E2BIG) {
			return fmt.Errorf("write map %v: %w", to, err)
		}
		return nil
	})
}

// resized returns a value with the length of another map's values: cut off, or filled up
// with zeros.
func resized(value []byte, in *ebpf.Map) []byte {
	size := int(in.ValueSize())
	return append(slices.Clone(value[:min(len(value), size)]), make([]byte, size-min(len(value), size))...)
}

// Carry moves the counts from the old maps to the new ones, and takes from the new buckets
// the tokens that were taken from the old ones since Copy. If programs were still using the
// old maps, Carry has to be called again.
func (m *Migration) Carry() error {
	// A replaced program may still be judging its last packet on another CPU. This
	// waits until it is done (synchronize_rcu). If the kernel cannot wait, the
	// replacement was long enough ago.
	_, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0)
	if from := m.from[bpf.EgressMapContainers]; from != nil {
		if err := m.carryContainers(from); err != nil {
			return err
		}
	}
	for name := range m.from {
		if name == bpf.EgressMapContainers || name == bpf.EgressMapTotals {
			continue
		}
		if err := m.copyEntries(name); err != nil {
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
	now, err := Now()
	if err != nil {
		return err
	}
	return eachEntry(from, func(id uint64, value []byte) error {
		c := decode[Container](value)
		before, copied := m.copied[id]
		debt := uint64(0)
		if copied {
			debt = debtSince(before, c.Bucket, now)
		}
		if copied && debt == 0 && c.Counters == (Counters{}) {
			return nil
		}
		m.copied[id] = c.Bucket
		return m.move(bpf.ControlCargo{Id: id, Debt: debt, Bucket: c.Bucket}, &c.Counters)
	})
}

// Undo moves the counts back from the new maps to the old ones, so that the old maps can be
// used again. It must come before Carry.
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
	back.copied = m.copied
	return back.Carry()
}

// debtSince returns for how long the tokens last, in nanoseconds, that were taken from bucket b
// since it was as before.
func debtSince(before, b bpf.EgressBucket, now uint64) uint64 {
	debt := func(b bpf.EgressBucket) uint64 {
		if b.Count == 0 {
			return 0
		}
		return max(b.FullAt, now) - now
	}
	old := debt(before)
	if before.Interval != b.Interval && before.Interval != 0 {
		// The bucket has adopted another limit meanwhile: as many tokens are missing.
		old = uint64(float64(old) / float64(before.Interval) * float64(b.Interval))
	}
	return max(debt(b), old) - old
}

// move makes the program carry move counters from the old maps to the new ones. counters
// may be nil for none.
func (m *Migration) move(c bpf.ControlCargo, counters *Counters) error {
	if counters == nil {
		counters = new(Counters)
	}
	// If the old map has no entry any more, it was removed meanwhile.
	if _, err := ask(m.carry, c, *wordsOf(counters)); err != nil {
		return fmt.Errorf("carry over what was counted for cgroup %d: %w", c.Id, err)
	}
	return nil
}
