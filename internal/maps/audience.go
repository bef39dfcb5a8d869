package maps

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
)

// Event is a refusal as the programs tell it.
type Event = bpf.EgressEvent

// MaxReaders is how many can read events at the same time.
const MaxReaders = len(bpf.EgressAudience{}.Reader)

const (
	// Lease is for how long a reader gets events. It has to renew that, so that a reader that
	// was killed costs nothing for long.
	Lease = 5 * time.Second
	// grace is how long a reader that does not renew keeps its seat. It may only be stopped.
	grace = 5 * time.Second
)

var (
	// ErrNoEvents means that the programs in force are of a version that tells no events.
	ErrNoEvents = errors.New("the programs in force tell no events")
	// ErrNoSeat means that there are MaxReaders readers already.
	ErrNoSeat = fmt.Errorf("%d others read events already, and no more can", MaxReaders)
	// ErrSeatLost means that another reader has got the seat of one that did not renew it.
	ErrSeatLost = errors.New("the reader was stopped for too long")
)

// Audience is the readers of events, in memory that is shared with the programs and with the
// other readers.
type Audience struct {
	buffers *ebpf.Map
	shared  *bpf.EgressAudience
	memory  []byte
}

// Audience returns the Audience of the state. The caller closes it, before the State. The error
// can wrap ErrNoEvents.
func (s *State) Audience() (*Audience, error) {
	readers, buffers := s.byName[bpf.EgressMapReaders], s.byName[bpf.EgressMapBuffers]
	if readers == nil || buffers == nil {
		return nil, ErrNoEvents
	}
	memory, err := unix.Mmap(readers.FD(), 0, int(unsafe.Sizeof(bpf.EgressAudience{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the memory of %s: %w", bpf.EgressMapReaders, err)
	}
	return &Audience{buffers: buffers, shared: (*bpf.EgressAudience)(unsafe.Pointer(&memory[0])), memory: memory}, nil
}

// Close ends the use of the memory.
func (a *Audience) Close() error { return unix.Munmap(a.memory) }

// LeftOut returns how many events nobody got because their containers had too many, since the
// maps were made.
func (a *Audience) LeftOut() uint64 { return atomic.LoadUint64(&a.shared.LeftOut) }

// Missed counts the events that no reader got, since the maps were made: LeftOut because a
// container had too many, Lost because a reader's buffer had no room.
type Missed struct{ LeftOut, Lost uint64 }

// Missed returns what no reader got; nil if the programs in force tell no events.
func (s *State) Missed() (*Missed, error) {
	m := s.byName[bpf.EgressMapReaders]
	if m == nil {
		return nil, nil
	}
	value, err := m.LookupBytes(uint32(0))
	if err != nil {
		return nil, fmt.Errorf("read map %s: %w", bpf.EgressMapReaders, err)
	}
	a := decode[bpf.EgressAudience](value)
	return &Missed{a.LeftOut, a.Lost}, nil
}

// Seat is the place of one reader.
type Seat struct {
	audience *Audience
	index    uint32
	// owner is when it was taken, which no other owner has.
	owner uint64
	// lost is how many events earlier readers had lost here.
	lost uint64
}

// Sit takes a seat for a reader with a ring buffer, which gets events from now on. It frees
// the seats of readers that are gone. The error can wrap ErrNoSeat.
func (a *Audience) Sit(buffer *ebpf.Map) (*Seat, error) {
	if err := a.Sweep(); err != nil {
		return nil, err
	}
	owner, err := Now()
	if err != nil {
		return nil, err
	}
	for i := range uint32(MaxReaders) {
		if !atomic.CompareAndSwapUint64(&a.shared.Reader[i].Owner, 0, owner) {
			continue
		}
		s := &Seat{audience: a, index: i, owner: owner, lost: atomic.LoadUint64(&a.shared.Reader[i].Lost)}
		if err := a.buffers.Put(i, uint32(buffer.FD())); err != nil {
			atomic.StoreUint64(&a.shared.Reader[i].Owner, 0)
			return nil, fmt.Errorf("write map %s: %w", bpf.EgressMapBuffers, err)
		}
		if _, err := s.Renew(); err != nil {
			return nil, err
		}
		return s, nil
	}
	return nil, ErrNoSeat
}

// SweepReaders is [Audience.Sweep].
func (s *State) SweepReaders() error {
	a, err := s.Audience()
	if errors.Is(err, ErrNoEvents) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(a.Sweep(), a.Close())
}

// Sweep frees the seats of readers that are gone without having left.
func (a *Audience) Sweep() error {
	now, err := Now()
	if err != nil {
		return err
	}
	for i := range uint32(MaxReaders) {
		r := &a.shared.Reader[i]
		owner := atomic.LoadUint64(&r.Owner)
		if owner == 0 || now < max(owner, atomic.LoadUint64(&r.Until))+uint64(grace) {
			continue
		}
		// Nobody else frees it, or sits down there, while it has this owner.
		if !atomic.CompareAndSwapUint64(&r.Owner, owner, now) {
			continue
		}
		if err := a.free(i); err != nil {
			return err
		}
	}
	return nil
}

// free frees a seat, whose owner is the caller.
func (a *Audience) free(i uint32) error {
	r := &a.shared.Reader[i]
	a.wait(i, false)
	err := a.buffers.Delete(i)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		err = nil
	}
	if err != nil {
		return fmt.Errorf("write map %s: %w", bpf.EgressMapBuffers, err)
	}
	atomic.StoreUint64(&r.Until, 0)
	atomic.StoreUint64(&r.Owner, 0)
	return nil
}

// wait sets whether the reader of a seat waits for events, and returns whether it did before.
// Programs change the other bytes of the word meanwhile.
func (a *Audience) wait(i uint32, waits bool) (before bool) {
	word := (*uint64)(unsafe.Pointer(&a.shared.Waiting))
	var bytes [MaxReaders]uint8
	bytes[i] = 0xff
	mask := *(*uint64)(unsafe.Pointer(&bytes))
	bytes[i] = 1
	var old uint64
	if waits {
		old = atomic.OrUint64(word, *(*uint64)(unsafe.Pointer(&bytes)))
	} else {
		old = atomic.AndUint64(word, ^mask)
	}
	return old&mask != 0
}

// Renew has the reader get events for another Lease. gap says that it got none for a while, or
// may have got none. The error is ErrSeatLost if the seat is another reader's now.
func (s *Seat) Renew() (gap bool, err error) {
	r := &s.audience.shared.Reader[s.index]
	if atomic.LoadUint64(&r.Owner) != s.owner {
		return true, ErrSeatLost
	}
	now, err := Now()
	if err != nil {
		return false, err
	}
	until := atomic.SwapUint64(&r.Until, now+uint64(Lease))
	// A program that has read the old time just before may pass the reader over after this.
	waited := s.audience.wait(s.index, true)
	return until < now || !waited, nil
}

// Lost returns how many events the reader's buffer had no room for.
func (s *Seat) Lost() uint64 {
	return atomic.LoadUint64(&s.audience.shared.Reader[s.index].Lost) - s.lost
}

// Leave frees the seat. The reader's buffer gets nothing any more.
func (s *Seat) Leave() error {
	now, err := Now()
	if err != nil {
		return err
	}
	// As in Sweep. The seat may be another reader's.
	if !atomic.CompareAndSwapUint64(&s.audience.shared.Reader[s.index].Owner, s.owner, now) {
		return nil
	}
	return s.audience.free(s.index)
}

// NewBuffer creates a reader's ring buffer of about size bytes.
func NewBuffer(size int) (*ebpf.Map, error) {
	bytes := unix.Getpagesize()
	for bytes < size {
		bytes *= 2
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "event_buffer", Type: ebpf.RingBuf, MaxEntries: uint32(bytes)})
	if err != nil {
		return nil, fmt.Errorf("create a ring buffer of %d bytes: %w", bytes, err)
	}
	return m, nil
}

// DecodeEvent returns the event that a ring buffer has delivered. Other versions may tell more
// or less.
func DecodeEvent(sample []byte) Event { return decode[Event](sample) }

// LeftOut returns how many events of each container were left out, by the id of its cgroup. What
// is not known to be a container's is counted by the devices by which it reached the host.
func (s *State) LeftOut() (containers map[uint64]uint64, devices map[uint32]uint64, err error) {
	containers, devices = map[uint64]uint64{}, map[uint32]uint64{}
	m := s.byName[bpf.EgressMapTellings]
	if m == nil {
		return containers, devices, nil
	}
	const ofDevice = 1 << 63
	return containers, devices, eachEntry(m, func(key uint64, value []byte) error {
		if n := decode[bpf.EgressTelling](value).LeftOut; key&ofDevice != 0 {
			devices[uint32(key)] = n
		} else {
			containers[key] = n
		}
		return nil
	})
}
