package events

import (
	"context"
	"errors"
	"fmt"
	gomaps "maps"
	"math/bits"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

// every is how often a reader looks at what the programs have not told it.
const every = time.Second

// Reader reads events from the kernel, as records. It is a [Source].
type Reader struct {
	filter  *loader.Filter
	names   *Names
	size    int
	stop    context.CancelFunc
	stopped chan struct{}

	mu sync.Mutex
	at *seat // where the reader reads; nil once it is closed
	// notes are records that no event brought.
	notes []Record
	// err is why there will be no more events.
	err error
	// fingerprint is the filter's when the reader last looked, and telling whether its programs
	// were found to tell events since it became that.
	fingerprint string
	telling     bool
	// lacking is whether the pinned maps were of a version that tells no events when the reader last looked, and
	// no attach was under way.
	lacking bool
	// offset is CLOCK_REALTIME less CLOCK_MONOTONIC, in ns.
	offset atomic.Int64
}

// seat is a reader's place in one set of maps, which an attach of another version may replace.
type seat struct {
	state    *maps.State
	stamp    string
	audience *maps.Audience
	*maps.Seat
	ring *ringbuf.Reader
	// sample is the last event that was read.
	sample ringbuf.Record
	// count is how many were.
	count atomic.Uint64

	// What follows was found when the reader last looked.

	looked time.Time
	account
	// containers and devices are how many of their events were left out.
	containers map[uint64]uint64
	devices    map[uint32]uint64
}

// account is what had become of all refusals at one time.
type account struct {
	refused uint64 // by the counters
	told    uint64 // put into the reader's buffer
	lost    uint64 // for lack of room in it
	leftOut uint64 // since a container had too many
}

// Open begins to read the events of a filter that is attached. The first record is a Start. size
// is how many bytes of events can wait for the reader. names tells whose they are. The caller
// closes the Reader. The error can wrap [loader.ErrNotAttached], [maps.ErrNoEvents] and
// [maps.ErrNoSeat].
func Open(filter *loader.Filter, names *Names, size int) (*Reader, error) {
	r := &Reader{filter: filter, names: names, size: size, stopped: make(chan struct{})}
	if err := r.setClock(); err != nil {
		return nil, err
	}
	// Kernels before 5.11 charge the buffer to it.
	if err := maps.RemoveMemlock(); err != nil {
		return nil, err
	}
	names.refresh()
	var err error
	if r.at, err = r.sit(); err != nil {
		return nil, err
	}
	// What an attach has not replaced yet is looked at again.
	changing := r.filter.Changing()
	if r.telling, err = r.filter.InForce(r.at.state, bpf.EgressMapReaders); err == nil && !r.telling && !changing {
		err = maps.ErrNoEvents
	}
	if err != nil {
		return nil, errors.Join(err, r.at.close())
	}
	r.notes = []Record{{Type: Start, Time: time.Now().UTC(), Version: loader.Version(), Node: names.Node}}
	var ctx context.Context
	ctx, r.stop = context.WithCancel(context.Background())
	go r.keep(ctx)
	return r, nil
}

// Close ends the reading.
func (r *Reader) Close() error {
	r.stop()
	<-r.stopped
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.at == nil {
		return nil
	}
	err := r.at.close()
	r.at = nil
	return err
}

// sit takes a seat in the maps that are in force.
func (r *Reader) sit() (_ *seat, err error) {
	s := &seat{looked: time.Now()}
	if s.stamp, err = r.filter.Stamp(); err != nil {
		return nil, err
	}
	if s.state, err = r.filter.State(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.audience, err = s.state.Audience(); err != nil {
		return nil, err
	}
	buffer, err := maps.NewBuffer(r.size)
	if err != nil {
		return nil, err
	}
	defer buffer.Close()
	if s.ring, err = ringbuf.NewReader(buffer); err != nil {
		return nil, fmt.Errorf("read a ring buffer: %w", err)
	}
	if s.containers, s.devices, err = s.state.LeftOut(); err != nil {
		return nil, err
	}
	if s.account, err = s.read(); err != nil {
		return nil, err
	}
	s.Seat, err = s.audience.Sit(buffer)
	return s, err
}

func (s *seat) close() error {
	var errs []error
	if s.Seat != nil {
		errs = append(errs, s.Leave())
	}
	if s.ring != nil {
		errs = append(errs, s.ring.Close())
	}
	if s.audience != nil {
		errs = append(errs, s.audience.Close())
	}
	return errors.Join(append(errs, s.state.Close())...)
}

// recordSize is what an event takes in a buffer (BPF_RINGBUF_HDR_SZ).
const recordSize = 8 + (int(unsafe.Sizeof(maps.Event{}))+7)/8*8

// read reads what has become of all refusals until now.
func (s *seat) read() (a account, err error) {
	total, err := s.state.Totals()
	if err != nil {
		return a, err
	}
	a.refused, a.leftOut = maps.RefusedInAll(total), s.audience.LeftOut()
	if s.Seat != nil {
		a.lost = s.Lost()
	}
	a.told = s.count.Load() + uint64(s.ring.AvailableBytes()/recordSize)
	return a, nil
}

// keep renews the seat until ctx ends.
func (r *Reader) keep(ctx context.Context) {
	defer close(r.stopped)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		r.mu.Lock()
		if err := r.look(); err != nil && r.err == nil {
			r.err = err
		}
		if len(r.notes) > 0 || r.err != nil {
			r.at.wake()
		}
		r.mu.Unlock()
	}
}

// look renews the seat, and notes what the programs have not told.
func (r *Reader) look() error {
	if err := r.setClock(); err != nil {
		return err
	}
	fingerprint := r.names.refresh()
	s := r.at
	moved, err := r.replaced(s)
	if err != nil {
		return err
	}
	if err := s.audience.Sweep(); err != nil {
		return err
	}
	gap, err := s.Renew()
	switch {
	case errors.Is(err, maps.ErrSeatLost):
		moved = true
	case err != nil:
		return err
	}
	now, err := s.read()
	if err != nil {
		return err
	}
	if err := r.note(s, now); err != nil {
		return err
	}
	if moved {
		r.telling = false
		changing := r.filter.Changing() // asked first, since it may end
		err := r.move(s, now)
		// While an attach replaces the maps, those that are pinned may not be what it leaves.
		if !errors.Is(err, maps.ErrNoEvents) || !changing && r.lacking {
			return err
		}
		r.lacking = !changing
	} else if err := r.checkTelling(s, fingerprint); err != nil {
		return err
	} else {
		r.lacking = false
	}
	if gap {
		r.noteGap(s, now)
	}
	s.account, s.looked = now, time.Now()
	return nil
}

// checkTelling looks at the programs whenever others are in force. The error is maps.ErrNoEvents if
// they are of a version that tells none: their maps can stay pinned.
func (r *Reader) checkTelling(s *seat, fingerprint string) (err error) {
	changed := fingerprint != r.fingerprint
	r.fingerprint = fingerprint
	if r.telling && !changed {
		return nil
	}
	changing := r.filter.Changing() // asked first, since it may end
	if r.telling, err = r.filter.InForce(s.state, bpf.EgressMapReaders); err != nil {
		return err
	}
	// An attach replaces the maps before the programs.
	if !r.telling && !changed && !changing {
		return maps.ErrNoEvents
	}
	return nil
}

// replaced says whether an attach has replaced the maps of a seat.
func (r *Reader) replaced(s *seat) (bool, error) {
	stamp, err := r.filter.Stamp()
	if err != nil || stamp == s.stamp {
		return false, err
	}
	same, err := r.filter.Uses(s.state, bpf.EgressMapReaders)
	if same && err == nil {
		same, err = r.filter.Uses(s.state, bpf.EgressMapBuffers)
	}
	if same {
		s.stamp = stamp
	}
	return !same, err
}

// move takes a seat in the maps that are in force, after what is left of the old one.
func (r *Reader) move(s *seat, now account) error {
	next, err := r.sit()
	if err != nil {
		return err
	}
	// Next, which may be waiting there, holds a lock that this needs.
	s.wake()
	s.ring.SetDeadline(time.Unix(1, 0))
	var sample ringbuf.Record
	for s.ring.ReadInto(&sample) == nil {
		r.notes = append(r.notes, r.record(maps.DecodeEvent(sample.RawSample), s.state))
	}
	now.refused = next.refused
	r.noteGap(s, now)
	r.at = next
	return s.close()
}

// noteGap notes refusals that nobody was told of since the reader last looked.
func (r *Reader) noteGap(s *seat, now account) {
	refused, known := now.refused-s.refused, now.told-s.told+now.lost-s.lost+now.leftOut-s.leftOut
	if refused > known {
		since := s.looked
		r.addNote(Record{
			Type: Lost, Time: time.Now().UTC(), Node: r.names.Node, Stage: StageReader, Count: refused - known, Since: &since,
		})
	}
}

// addNote adds a note, or its count to one that waits: whoever does not read for days gets few.
func (r *Reader) addNote(note Record) {
	for i := range r.notes {
		if n := &r.notes[i]; n.Type == note.Type && n.Stage == note.Stage && n.Interface == note.Interface && cgroupID(*n) == cgroupID(note) {
			n.Count += note.Count
			n.Time = note.Time
			return
		}
	}
	r.notes = append(r.notes, note)
}

func cgroupID(r Record) uint64 {
	if r.Container == nil {
		return 0
	}
	return r.Container.CgroupID
}

// note notes the events that were left out or lost since the last time.
func (r *Reader) note(s *seat, now account) error {
	since := s.looked
	record := Record{Time: time.Now().UTC(), Node: r.names.Node, Since: &since}
	if now.lost > s.lost {
		record := record
		record.Type, record.Stage, record.Count = Lost, StageKernel, now.lost-s.lost
		r.addNote(record)
	}
	if now.leftOut == s.leftOut {
		return nil
	}
	containers, devices, err := s.state.LeftOut()
	if err != nil {
		return err
	}
	record.Type = Suppressed
	for _, id := range slices.Sorted(gomaps.Keys(containers)) {
		if record.Count = more(s.containers[id], containers[id]); record.Count > 0 {
			record := record
			r.names.describe(&record, id)
			r.addNote(record)
		}
	}
	for _, index := range slices.Sorted(gomaps.Keys(devices)) {
		if record.Count = more(s.devices[index], devices[index]); record.Count > 0 {
			record := record
			record.Interface = r.names.device(index)
			r.addNote(record)
		}
	}
	s.containers, s.devices = containers, devices
	return nil
}

// more returns by how much a count has grown. The count begins anew if its entry had to make
// room.
func more(before, now uint64) uint64 {
	if now < before {
		return now
	}
	return now - before
}

// setClock finds out what the time of the programs is.
func (r *Reader) setClock() error {
	now, err := maps.Now()
	r.offset.Store(time.Now().UnixNano() - int64(now))
	return err
}

// wake has whoever waits for an event stop waiting.
func (s *seat) wake() { _ = s.ring.Flush() } // fails once it is closed, which wakes too

// Next implements [Source]. The error can wrap [loader.ErrNotAttached], if the filter is
// detached meanwhile. Next must not be called concurrently.
func (r *Reader) Next(ctx context.Context) (Record, error) {
	for {
		if err := ctx.Err(); err != nil {
			return Record{}, err
		}
		s, note, err := r.pending()
		if err != nil {
			return Record{}, err
		}
		if note != nil {
			return *note, nil
		}
		e, err := s.wait(ctx)
		switch {
		case err == nil:
			return r.describe(e), nil
		case errors.Is(err, ringbuf.ErrFlushed), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, os.ErrClosed):
			// There is a note, or another seat.
		default:
			return Record{}, fmt.Errorf("read events: %w", err)
		}
	}
}

// pending returns the next note, if there is one, or otherwise where to wait.
func (r *Reader) pending() (*seat, *Record, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.notes) > 0 {
		note := r.notes[0]
		r.notes = r.notes[1:]
		return nil, &note, nil
	}
	if r.err != nil {
		return nil, nil, r.err
	}
	if r.at == nil {
		return nil, nil, os.ErrClosed
	}
	return r.at, nil, nil
}

// wait waits for the next event in the seat's buffer.
func (s *seat) wait(ctx context.Context) (e maps.Event, err error) {
	stop := context.AfterFunc(ctx, s.wake)
	defer stop()
	if err := s.ring.ReadInto(&s.sample); err != nil {
		return e, err
	}
	s.count.Add(1)
	return maps.DecodeEvent(s.sample.RawSample), nil
}

var hooks = map[bpf.EgressHook]string{
	bpf.EgressHookHOOK_EGRESS:  HookPacket,
	bpf.EgressHookHOOK_CONNECT: HookConnect,
	bpf.EgressHookHOOK_SENDMSG: HookSendmsg,
	bpf.EgressHookHOOK_SOCKET:  HookSocket,
	bpf.EgressHookHOOK_HOST:    HookHost,
}

var reasons = map[bpf.EgressReason]string{
	bpf.EgressReasonREASON_MALFORMED:    ReasonMalformed,
	bpf.EgressReasonREASON_BLOCKED:      ReasonBlocked,
	bpf.EgressReasonREASON_RATE_LIMITED: ReasonRateLimited,
	bpf.EgressReasonREASON_NO_BUCKET:    ReasonNoBucket,
	bpf.EgressReasonREASON_FAMILY:       ReasonFamily,
}

// describe makes a record of an event.
func (r *Reader) describe(e maps.Event) Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	var state *maps.State
	if r.at != nil {
		state = r.at.state
	}
	return r.record(e, state)
}

// record does so with the state that the programs use, or nil.
func (r *Reader) record(e maps.Event, state *maps.State) Record {
	yes, blocked := true, e.Refused != 0
	record := Record{
		Type: Refusal, Time: time.Unix(0, int64(e.Time)+r.offset.Load()).UTC(), Node: r.names.Node,
		Hook: hooks[e.Hook], Reason: reasons[e.Reason], WouldBlock: &yes, Blocked: &blocked, Bytes: e.Bytes,
	}
	src, dst := endpoint(e.Src, e.Sport), endpoint(e.Dst, e.Dport)
	if e.Hook == bpf.EgressHookHOOK_SOCKET {
		record.Family = policy.FamilyName(uint(e.Family))
	} else if e.Proto != 0 {
		record.Protocol = policy.ProtocolName(uint8(e.Proto))
	}
	if src.IsValid() {
		record.Source = &Endpoint{src.Addr(), src.Port()}
	}
	if dst.IsValid() {
		record.Destination = &Endpoint{dst.Addr(), dst.Port()}
	}
	if e.Device != 0 && e.Hook == bpf.EgressHookHOOK_HOST {
		record.Interface = r.names.device(e.Device)
	}
	if e.Process.Pid != 0 {
		record.Process = &Process{PID: e.Process.Pid, Comm: unix.ByteSliceToString(e.Process.Comm[:]), UID: e.Process.Uid}
	}
	known := r.names.describe(&record, e.Container)
	record.Rule = r.names.rule(state, &known, e.Reason, src, dst, uint8(e.Proto))
	return record
}

// endpoint returns an address and a port of an event, in network byte order; invalid if the
// address is not known.
func endpoint(addr [16]uint8, port uint16) netip.AddrPort {
	if addr == [16]uint8{} {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(netip.AddrFrom16(addr).Unmap(), bits.ReverseBytes16(port))
}
