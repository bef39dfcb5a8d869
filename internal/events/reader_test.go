package events

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/pins"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// scene is a filter that is attached to a cgroup with a container.
type scene struct {
	*testing.T
	pins      string
	filter    *loader.Filter
	container string
}

func newScene(t *testing.T, p policy.Policy) *scene {
	s := &scene{T: t, pins: testenv.PinPath(t)}
	s.filter = loader.New(s.pins, testenv.Root(t))
	top := testenv.Cgroup(t)
	s.container = testenv.Child(t, top, "web")
	check(t, s.filter.Attach(t.Context(), []string{top}, p))
	t.Cleanup(func() { check(t, s.filter.Detach(context.Background(), nil)) })
	return s
}

// open opens a reader.
func (s *scene) open() *Reader {
	s.Helper()
	r, err := Open(s.filter, &Names{Node: "host", Filter: s.filter, Root: testenv.Root(s)}, 1<<16)
	check(s.T, err)
	s.Cleanup(func() { check(s.T, r.Close()) })
	return r
}

// connects is what the test binary does instead of testing, if it is set: it tries to reach the
// metadata service so often.
const connects = "EGRESSBPF_CONNECTS"

// reconnects is the pin of the map of callers, if it is set: the test binary connects one socket to a
// mail server for each line of stdin, and says who the map says did.
const reconnects = "EGRESSBPF_RECONNECTS"

func reconnect(pin string) error {
	callers, err := ebpf.LoadPinnedMap(pin, nil)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		_ = unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: 25}) // refused, by nobody who listens
		var p bpf.EgressProcess
		if err := callers.Lookup(int32(fd), &p); errors.Is(err, ebpf.ErrKeyNotExist) {
			fmt.Println("nobody")
		} else {
			fmt.Println(p.Pid == uint32(os.Getpid()), err)
		}
	}
	return nil
}

func TestMain(m *testing.M) {
	if pin := os.Getenv(reconnects); pin != "" {
		if err := reconnect(pin); err != nil {
			panic(err)
		}
		return
	}
	n, err := strconv.Atoi(os.Getenv(connects))
	if err != nil {
		os.Exit(m.Run())
	}
	for range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			panic(err)
		}
		if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{169, 254, 169, 254}, Port: 80}); os.Getenv("EGRESSBPF_ANY_RESULT") == "" && !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EPERM) {
			panic(err)
		}
		unix.Close(fd)
	}
}

// connect has the container try to reach the metadata service n times.
func (s *scene) connect(container string, n int) {
	s.Helper()
	cmd := testenv.Command(s, container, os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprint(connects, "=", n))
	if out, err := cmd.CombinedOutput(); err != nil {
		s.Fatalf("%v: %s", err, out)
	}
}

// looks waits until a reader has looked n times at what is in force, during an attach.
func looks(t *testing.T, r *Reader, n int) {
	t.Helper()
	for range n {
		begun := time.Now()
		testenv.Eventually(t, "the reader looks", func() bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.err != nil {
				t.Fatalf("while an attach is under way: %v", r.err)
			}
			return r.at.looked.After(begun)
		})
	}
}

// patience is how long to wait for a record that must come.
const patience = 3 * time.Minute

// next returns the next record of a source, after its Start.
func next(t *testing.T, from Source) Record {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		r, err := from.Next(ctx)
		check(t, err)
		if r.Type != Start {
			return r
		}
	}
}

// testPolicy has each child of the policed cgroup be a container, and leaves the rest of this
// machine alone.
func testPolicy() policy.Policy {
	p := policy.Default()
	p.Scopes, _ = policy.ParseScopes([]string{"any"})
	p.HostSide, p.Families = policy.Off, policy.AnyFamily
	return p
}

func TestRefusedConnect(t *testing.T) {
	s := newScene(t, testPolicy())
	r := s.open()
	s.connect(s.container, 1)
	got := next(t, r)
	if got.Hook != HookConnect || got.Reason != ReasonBlocked || !*got.Blocked || got.Destination == nil ||
		got.Destination.Address != netip.MustParseAddr("169.254.169.254") || got.Destination.Port != 80 || got.Protocol != "tcp" {
		t.Errorf("%+v", got)
	}
	comm := filepath.Base(os.Args[0])
	comm = comm[:min(len(comm), 15)]
	if got.Process == nil || got.Process.Comm != comm || got.Process.PID == 0 || got.Process.UID != uint32(os.Getuid()) {
		t.Errorf("process %+v", got.Process)
	}
	if got.Container == nil || got.Container.ID != "web" || got.Rule != "preset metadata" {
		t.Errorf("container %+v, rule %q", got.Container, got.Rule)
	}
}

// tally adds up what records tell, by container.
type tally map[string]struct{ refusals, suppressed uint64 }

// add returns how many refusals a record stands for.
func (all tally) add(r Record) uint64 {
	if r.Container == nil {
		return r.Count // Lost
	}
	t := all[r.Container.ID]
	defer func() { all[r.Container.ID] = t }()
	if r.Type == Refusal {
		t.refusals++
		return 1
	}
	t.suppressed += r.Count
	return r.Count
}

// TestCallers notes who connects a socket to a mail port while somebody reads events, and forgets it when
// the socket is connected again while nobody does: that may be another process.
func TestCallers(t *testing.T) {
	s := newScene(t, testPolicy())
	cmd := testenv.Command(t, s.container, os.Args[0])
	cmd.Env = append(os.Environ(), reconnects+"="+filepath.Join(s.pins, bpf.EgressMapCallers))
	in, err := cmd.StdinPipe()
	check(t, err)
	out, err := cmd.StdoutPipe()
	check(t, err)
	check(t, cmd.Start())
	says := bufio.NewScanner(out)
	connected := func(want string) {
		t.Helper()
		_, err := fmt.Fprintln(in)
		check(t, err)
		if !says.Scan() || says.Text() != want {
			t.Errorf("connected by %q, want %q", says.Text(), want)
		}
	}
	connected("nobody")
	r := s.open()
	connected("true <nil>")
	check(t, r.Close())
	connected("nobody")
	check(t, in.Close())
	check(t, cmd.Wait())
}

// TestFlood floods with refusals of one container, on all CPUs. Each of them is told, left out or
// lost, and counted as such, and none of a quiet container is left out.
func TestFlood(t *testing.T) {
	n := 500_000
	if testing.Short() {
		n = 5_000
	}
	s := newScene(t, testPolicy())
	quiet := testenv.Child(t, filepath.Dir(s.container), "quiet")
	r := s.open()
	var flood sync.WaitGroup
	var floods atomic.Int32
	for range runtime.NumCPU() {
		floods.Add(1)
		flood.Go(func() { s.connect(s.container, n); floods.Add(-1) })
	}
	all, got := tally{}, uint64(0)
	for all["web"].suppressed == 0 {
		got += all.add(next(t, r))
	}
	for i := range 3 {
		s.connect(quiet, 1)
		for before := all["quiet"].refusals; all["quiet"].refusals == before; {
			got += all.add(next(t, r))
		}
		if i == 0 && floods.Load() == 0 && !testing.Short() {
			t.Error("the refusal of the quiet container was told after the flood")
		}
	}
	flood.Wait()
	want := uint64(n*runtime.NumCPU() + 3)
	for got < want {
		got += all.add(next(t, r))
	}
	if got != want {
		t.Errorf("%d refusals are told, left out or lost; %d were made", got, want)
	}
	if q := all["quiet"]; q.refusals != 3 || q.suppressed != 0 {
		t.Errorf("of the quiet container: %+v", q)
	}
	if all["web"].suppressed == 0 {
		t.Errorf("nothing is left out: %+v", all)
	}
}

// TestUnread lets records wait for somebody who does not read. They take up no more memory with time.
func TestUnread(t *testing.T) {
	s := newScene(t, testPolicy())
	r := s.open()
	const n = 200
	for range 3 {
		s.connect(s.container, n)
		time.Sleep(every + every/5)
	}
	all, notes := tally{}, 0
	for got := uint64(0); got < 3*n; {
		record := next(t, r)
		got += all.add(record)
		if record.Type != Refusal {
			notes++
		}
	}
	if notes != 1 {
		t.Errorf("what was left out is told by %d records", notes)
	}
}

// TestReaders has as many readers as there can be: each gets everything, and none keeps others
// from reading.
func TestReaders(t *testing.T) {
	s := newScene(t, testPolicy())
	var readers []*Reader
	for range maps.MaxReaders {
		readers = append(readers, s.open())
	}
	names := &Names{Filter: s.filter, Root: testenv.Root(t)}
	if _, err := Open(s.filter, names, 1<<16); !errors.Is(err, maps.ErrNoSeat) {
		t.Fatalf("one reader more: %v", err)
	}
	check(t, readers[3].Close())
	readers[3] = s.open()
	s.connect(s.container, 3)
	whole := 0
	for i, r := range readers {
		lost := false
		for got := uint64(0); got < 3; {
			switch record := next(t, r); {
			case record.Type == Refusal:
				got++
			case record.Type == Lost && record.Stage == StageReader:
				lost = true // this machine did not let it renew its seat in time
				got += record.Count
			default:
				t.Fatalf("reader %d: %+v", i, record)
			}
		}
		if !lost {
			whole++
		}
	}
	if whole < 2 {
		t.Errorf("%d readers of %d got everything", whole, len(readers))
	}
	for _, r := range readers {
		check(t, r.Close())
	}
	state, err := s.filter.State()
	check(t, err)
	defer state.Close()
	if m := state.ByName()[bpf.EgressMapBuffers]; m.Lookup(uint32(0), new(uint32)) == nil {
		t.Error("a buffer is left")
	}
}

// TestReadersComeAndGo leaves nothing behind.
func TestReadersComeAndGo(t *testing.T) {
	s := newScene(t, testPolicy())
	open := func() {
		r, err := Open(s.filter, &Names{Filter: s.filter, Root: testenv.Root(t)}, 1<<16)
		check(t, err)
		check(t, r.Close())
	}
	open() // what is opened once
	files := func() int {
		all, err := os.ReadDir("/proc/self/fd")
		check(t, err)
		return len(all)
	}
	before := files()
	for range 100 {
		open()
	}
	if now := files(); now > before {
		t.Errorf("%d files are open, %d were", now, before)
	}
	state, err := s.filter.State()
	check(t, err)
	defer state.Close()
	var a bpf.EgressAudience
	check(t, state.ByName()[bpf.EgressMapReaders].Lookup(uint32(0), &a))
	for i, r := range a.Reader {
		if r.Owner != 0 || a.Waiting[i] != 0 {
			t.Errorf("seat %d is taken", i)
		}
	}
}

// TestMovedMaps replaces the maps of the events, as an attach of another version does.
func TestMovedMaps(t *testing.T) {
	s := newScene(t, testPolicy())
	r := s.open()
	s.connect(s.container, 1)
	next(t, r)
	pin := filepath.Join(s.pins, bpf.EgressMapReaders)
	// As if it was an attach that did this, so that the reader does not look at a half of it.
	unlock, err := pins.At(s.pins).LockExisting(t.Context())
	check(t, err)
	t.Cleanup(unlock) // before the filter is detached
	check(t, os.Remove(pin))
	other, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	check(t, err)
	defer other.Close()
	check(t, other.Pin(pin))
	looks(t, r, 3)
	attached := make(chan error)
	go func() { attached <- s.filter.Attach(t.Context(), nil, testPolicy()) }()
	unlock()
	check(t, <-attached)
	var got uint64
	for n := uint64(0); got < n+1; n++ {
		s.connect(s.container, 1)
		for got < n+1 {
			record := next(t, r)
			if got++; record.Type == Lost {
				got += record.Count - 1
			}
		}
		if n == 3 {
			return
		}
	}
}

// TestPassedOver has the programs pass a reader over that has just renewed its seat, as one that had
// read the old time before can. The reader says what it has missed.
func TestPassedOver(t *testing.T) {
	s := newScene(t, testPolicy())
	r := s.open()
	state, err := s.filter.State()
	check(t, err)
	defer state.Close()
	m := state.ByName()[bpf.EgressMapReaders]
	var a bpf.EgressAudience
	check(t, m.Lookup(uint32(0), &a))
	a.Waiting = [maps.MaxReaders]uint8{}
	check(t, m.Put(uint32(0), a))
	s.connect(s.container, 3)
	for got := uint64(0); got < 3; {
		record := next(t, r)
		if got++; record.Type == Lost {
			got += record.Count - 1
		}
	}
}

// TestOtherPrograms puts programs in force that do not know the maps of events, as a version does that
// tells none. It leaves the pins. As long as an attach is under way, the reader goes on.
func TestOtherPrograms(t *testing.T) {
	s := newScene(t, testPolicy())
	r := s.open()
	s.connect(s.container, 1)
	next(t, r)
	unlock, err := pins.At(s.pins).LockExisting(t.Context())
	check(t, err)
	t.Cleanup(unlock) // before the filter is detached
	all, err := pins.At(s.pins).Links()
	check(t, err)
	for _, pin := range all {
		l, err := link.LoadPinnedLink(pin, nil)
		check(t, err)
		defer l.Close()
		info, err := l.Info()
		check(t, err)
		if info.Cgroup() == nil {
			continue // it tells nothing
		}
		before, err := ebpf.NewProgramFromID(info.Program)
		check(t, err)
		defer before.Close()
		other, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: before.Type(), AttachType: ebpf.AttachType(info.Cgroup().AttachType), License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
		})
		check(t, err)
		defer other.Close()
		check(t, l.Update(other))
	}
	looks(t, r, 3)
	duringAttach, err := Open(s.filter, r.names, 1<<16)
	check(t, err)
	check(t, duringAttach.Close())
	unlock()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if got, err := r.Next(ctx); !errors.Is(err, maps.ErrNoEvents) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := Open(s.filter, r.names, 1<<16); !errors.Is(err, maps.ErrNoEvents) {
		t.Errorf("another reader: %v", err)
	}
}

func TestDetached(t *testing.T) {
	s := newScene(t, testPolicy())
	r := s.open()
	s.connect(s.container, 1)
	next(t, r)
	check(t, s.filter.Detach(t.Context(), nil))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if got, err := r.Next(ctx); !errors.Is(err, loader.ErrNotAttached) {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestAudit tells of what would be refused, and notes it for later.
func TestAudit(t *testing.T) {
	p := testPolicy()
	p.Mode = policy.Audit
	s := newScene(t, p)
	r := s.open()
	// There is no route.
	cmd := testenv.Command(t, s.container, os.Args[0])
	cmd.Env = append(os.Environ(), connects+"=3", "EGRESSBPF_ANY_RESULT=1")
	check(t, cmd.Run())
	if got := next(t, r); got.Type != Refusal || *got.Blocked || !*got.WouldBlock {
		t.Errorf("%+v", got)
	}
	state, err := s.filter.State()
	check(t, err)
	defer state.Close()
	seen, err := state.Seen()
	check(t, err)
	// All of them lie in a minute.
	if len(seen) != 1 || seen[0].Destination != netip.MustParseAddrPort("169.254.169.254:80") || seen[0].Count < 3 || seen[0].Most != seen[0].Count ||
		seen[0].Protocol != unix.IPPROTO_TCP || seen[0].Reason != bpf.EgressReasonREASON_BLOCKED || seen[0].Last < seen[0].First {
		t.Errorf("%+v", seen)
	}
}
