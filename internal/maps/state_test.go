package maps_test

import (
	gomaps "maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
)

func newState(t *testing.T) *maps.State {
	t.Helper()
	state, err := maps.CreateState()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := state.Close(); err != nil {
			t.Error(err)
		}
	})
	return state
}

// put writes a container as the programs would have.
func put(t *testing.T, s *maps.State, id uint64, c maps.Container) {
	t.Helper()
	if err := s.ByName()[bpf.EgressMapContainers].Put(id, c); err != nil {
		t.Fatal(err)
	}
}

func containers(t *testing.T, s *maps.State) map[uint64]maps.Container {
	t.Helper()
	all, err := s.Containers()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func want(t *testing.T, s *maps.State, want map[uint64]maps.Container) {
	t.Helper()
	if got := containers(t, s); !gomaps.Equal(got, want) {
		t.Fatalf("got containers %+v, want %+v", got, want)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestState(t *testing.T) {
	s := newState(t)
	want(t, s, map[uint64]maps.Container{})

	var busy maps.Container
	busy.Bucket = bpf.EgressBucket{FullAt: 1 << 40, Interval: 7, Count: 3, Rest: 1}
	busy.Counters.Dropped[bpf.EgressReasonREASON_BLOCKED] = bpf.EgressDrops{Packets: 1, Bytes: 2, Connects: 3}
	busy.Counters.SmtpAllowed = 1<<63 + 1
	put(t, s, 1, busy)
	put(t, s, 1<<40, maps.Container{})
	want(t, s, map[uint64]maps.Container{1: busy, 1 << 40: {}})

	check(t, s.Forget(1<<40))
	check(t, s.Forget(1<<40))
	want(t, s, map[uint64]maps.Container{1: busy})
}

func TestSetLimit(t *testing.T) {
	s := newState(t)
	const used, fresh = 1, 2
	old := maps.LimitOf(policy.Limit{Rate: policy.Rate{Count: 1, Period: time.Hour}, Burst: 5})
	var busy maps.Container
	busy.Counters.SmtpAllowed = 42
	busy.Bucket = bpf.EgressBucket{FullAt: monotonic(t) + uint64(3*time.Hour), Interval: old.Interval, Count: old.Count}
	put(t, s, used, busy)

	for _, tt := range []struct {
		limit      policy.Limit
		used, free float64 // tokens
	}{
		{policy.Limit{Rate: policy.Rate{Count: 7, Period: 24 * time.Hour}, Burst: 1000}, 997, 1000},
		{policy.Limit{Burst: 5}, math.Inf(1), math.Inf(1)},
		{policy.Limit{Rate: policy.Rate{Count: 1, Period: 24 * time.Hour}, Burst: 4}, 1, 4},
		{policy.Limit{Rate: policy.Rate{Count: 1, Period: 24 * time.Hour}, Burst: 2}, 0, 2},
	} {
		check(t, s.SetLimit(used, tt.limit))
		check(t, s.SetLimit(fresh, tt.limit)) // which nothing was counted for yet
		all := containers(t, s)
		for id, tokens := range map[uint64]float64{used: tt.used, fresh: tt.free} {
			c := all[id]
			if maps.PolicyLimit(c.Limit) != tt.limit {
				t.Errorf("got limit %+v, want %+v", c.Limit, tt.limit)
			}
			// Those that are missing stay missing, but for what comes back meanwhile.
			if got := maps.Tokens(c.Bucket, c.Limit, monotonic(t)); got != tokens && !(math.Abs(got-tokens) < 0.01) {
				t.Errorf("limit %+v of container %d: got %v tokens, want %v", tt.limit, id, got, tokens)
			}
		}
		if got := all[used].Counters; got != busy.Counters {
			t.Errorf("got counters %+v, want %+v", got, busy.Counters)
		}
	}
	for range 2 {
		check(t, s.UnsetLimit(used))
		check(t, s.UnsetLimit(fresh))
		for id, c := range containers(t, s) {
			if c.Limit != (bpf.EgressLimit{}) {
				t.Errorf("container %d: got limit %+v, want none", id, c.Limit)
			}
		}
	}
	if got := containers(t, s)[used].Counters; got != busy.Counters {
		t.Errorf("got counters %+v, want %+v", got, busy.Counters)
	}
}

func monotonic(t *testing.T) uint64 {
	t.Helper()
	var ts unix.Timespec
	check(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts))
	return uint64(ts.Nano())
}

func TestTotals(t *testing.T) {
	s := newState(t)
	var sum maps.Counters
	got, err := s.Totals()
	if err != nil || got != sum {
		t.Fatalf("got %+v, %v, want zeros", got, err)
	}
	perCPU := make([]maps.Sums, ebpf.MustPossibleCPU())
	for cpu := range perCPU {
		for r := range perCPU[cpu].Counters.Dropped {
			n := uint64(1000*cpu + 10*r)
			perCPU[cpu].Counters.Dropped[r] = bpf.EgressDrops{Packets: n + 1, Bytes: n + 2, Connects: n + 3}
			sum.Dropped[r].Packets += n + 1
			sum.Dropped[r].Bytes += n + 2
			sum.Dropped[r].Connects += n + 3
		}
		perCPU[cpu].Counters.SmtpAllowed = uint64(cpu + 1)
		sum.SmtpAllowed += uint64(cpu + 1)
	}
	check(t, s.ByName()[bpf.EgressMapTotals].Put(uint32(0), perCPU))
	if got, err = s.Totals(); err != nil || got != sum {
		t.Fatalf("got %+v, %v, want %+v", got, err, sum)
	}
}

// With as many containers as there is room for, all are read, and nobody more
// gets a limit.
func TestFullState(t *testing.T) {
	s := newState(t)
	m := s.ByName()[bpf.EgressMapContainers]
	ids := make([]uint64, m.MaxEntries())
	values := make([]maps.Container, len(ids))
	all := map[uint64]maps.Container{}
	r := rand.New(rand.NewPCG(1, 1))
	for i := range ids {
		ids[i] = r.Uint64()
		values[i].Counters.SmtpAllowed = uint64(i)
		all[ids[i]] = values[i]
	}
	if _, err := m.BatchUpdate(ids, values, nil); err != nil {
		t.Fatal(err)
	}
	want(t, s, all)

	limit := policy.Limit{Rate: policy.Rate{Count: 1, Period: time.Second}, Burst: 1}
	newcomer := uint64(1)
	if err := s.SetLimit(newcomer, limit); err == nil || !strings.Contains(err.Error(), "is full") {
		t.Errorf("got %v, want that the map is full", err)
	}
	check(t, s.SetLimit(ids[0], limit))
	check(t, s.Forget(ids[1]))
	check(t, s.SetLimit(newcomer, limit))
	if got := containers(t, s); len(got) != len(ids) || got[newcomer].Limit != maps.LimitOf(limit) {
		t.Errorf("got %d containers, want %d with the newcomer", len(got), len(ids))
	}
}

func TestLoadProgram(t *testing.T) {
	s := newState(t)
	for _, name := range []string{bpf.ControlProgConfigure, bpf.ControlProgCarry} {
		prog, err := maps.LoadProgram(name, s)
		if err != nil {
			t.Fatal(err)
		}
		info, err := prog.Info()
		check(t, err)
		check(t, prog.Close())
		ids, _ := info.MapIDs()
		state, err := s.ByName()[bpf.EgressMapContainers].Info()
		check(t, err)
		if own, _ := state.ID(); !slices.Contains(ids, own) {
			t.Errorf("%s uses maps %v, not the state's own %d", name, ids, own)
		}
	}
}

// Who reads does without the maps that there are not.
func TestMissingMaps(t *testing.T) {
	byName := newState(t).ByName()
	for name := range byName {
		if name != bpf.EgressMapContainers {
			delete(byName, name)
		}
	}
	s := maps.NewState(byName)
	put(t, s, 1, maps.Container{})
	want(t, s, map[uint64]maps.Container{1: {}})
	if totals, err := s.Totals(); err != nil || totals != (maps.Counters{}) {
		t.Errorf("totals: got %+v, %v", totals, err)
	}
	if known, err := s.Recognised(2); err != nil || known {
		t.Errorf("recognised: got %v, %v", known, err)
	}
	room, err := s.Room(containers(t, s))
	check(t, err)
	if room.Containers != 1 || room.Without != 0 {
		t.Errorf("room: got %+v", room)
	}
	devices, err := s.Devices()
	check(t, err)
	check(t, s.ForgetDevice(1))
	check(t, s.SetTunnels(map[uint16]bool{4789: true}))
	closed, err := s.Tunnels()
	check(t, err)
	if len(devices) != 0 || len(closed) != 0 {
		t.Errorf("got devices %v, tunnels %v", devices, closed)
	}
	check(t, s.Forget(1))
	want(t, s, map[uint64]maps.Container{})
}

// Versions that know no other way are told of containers without state by an entry.
func TestKeepRemoved(t *testing.T) {
	s := stateIn(t, maps.Earliest)
	const removed, noRoom, known = 1, 2, 3
	stateless := s.ByName()[bpf.EgressMapStateless]
	check(t, stateless.Put(uint64(removed), bpf.EgressWithoutStateWAS_REMOVED))
	check(t, stateless.Put(uint64(noRoom), bpf.EgressWithoutStateHAS_NO_ROOM))
	_, err := s.Enrol(known)
	check(t, err)
	check(t, s.KeepRemoved())
	check(t, s.KeepRemoved())
	got := containers(t, s)
	if len(got) != 3 || got[removed].Bucket.Closed != 1 || got[noRoom].Bucket.Closed != 0 || got[known].Bucket.Closed != 0 {
		t.Errorf("got %+v", got)
	}
}

// A container that has found no room, and has an entry by now, is not counted as one without.
func TestEnrolHeals(t *testing.T) {
	s := newState(t)
	const id = 1
	_, err := s.Enrol(id)
	check(t, err)
	check(t, s.ByName()[bpf.EgressMapStateless].Put(uint64(id), bpf.EgressWithoutStateHAS_NO_ROOM))
	_, err = s.Enrol(id)
	check(t, err)
	if room, err := s.Room(containers(t, s)); err != nil || room.Without != 0 || room.Containers != 1 {
		t.Errorf("got %+v, %v", room, err)
	}
}
