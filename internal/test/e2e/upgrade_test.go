package e2e

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// earlierVersion is the first that has to be taken over from, and gone back to.
const earlierVersion = "5acadd6"

// shell runs a script with bash, in a directory.
func shell(t *testing.T, dir, script string) {
	t.Helper()
	cmd := exec.Command("bash", "-o", "pipefail", "-ec", script)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// repository returns the top directory of the repository that the test is in.
func repository(t *testing.T) string {
	t.Helper()
	top, err := exec.Command("git", "rev-parse", "--show-toplevel").Output()
	if err != nil {
		t.Skip("this is no repository, which would have other versions")
	}
	return strings.TrimSpace(string(top))
}

// buildEarlier builds the command of the earlier version, from the repository.
func buildEarlier(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	shell(t, repository(t), fmt.Sprintf("git archive %s | tar x -C %s", earlierVersion, dir))
	path := filepath.Join(dir, "egressbpf-earlier")
	shell(t, dir, "go build -buildvcs=false -o "+path+" ./cmd/egressbpf")
	return path
}

// An edit is of a source file. It fails unless there is exactly one old.
type edit struct{ file, old, new string }

// nextVersion is what a later version may bring: one more reason to refuse, with a hook that
// refuses for it; one more thing that is kept of each container; and one more map that is
// kept.
var nextVersion = []edit{
	{"bpf/types.h", "\tREASONS,\n", "\tREASON_DISCARD,\n\tREASONS,\n"},
	{"bpf/maps.h", "} containers SEC(\".maps\");\n", `} containers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, __u64);
} noted SEC(".maps");
`},
	{"bpf/egress.bpf.c", "suspect(&f->dst) ? blocked(f) : 0;\n\n\tif (why && asked", `suspect(&f->dst) ? blocked(f) : 0;

	if (f->dport == bpf_htons(9) && asked_by_container(c) && *c) {
		__u64 key = 1, one = 1, *n = bpf_map_lookup_elem(&noted, &key);

		if (n)
			__sync_fetch_and_add(n, 1);
		else
			bpf_map_update_elem(&noted, &key, &one, BPF_NOEXIST);
		__sync_fetch_and_add(&(*c)->discarded, 1);
		return REASON_DISCARD;
	}
	if (why && asked`},
	{"internal/maps/state.go", "return []string{\n\t\tbpf.EgressMapContainers,", `return []string{ "noted", bpf.EgressMapContainers,`},
	{"internal/maps/state.go", "case bpf.EgressMapContainers, bpf.EgressMapStateless,", `case "noted", bpf.EgressMapContainers, bpf.EgressMapStateless,`},
}

// Where the next version keeps what it keeps of a container: in the spare room, or once that
// is used up, behind it.
var (
	inSpareRoom  = edit{"bpf/types.h", "\tstruct counters counters;\n\t__u64 spare[1];\n", "\tstruct counters counters;\n\t__u64 discarded;\n"}
	behindIt     = edit{"bpf/types.h", "\tstruct counters counters;\n\t__u64 spare[1];\n", "\tstruct counters counters;\n\t__u64 used;\n\t__u64 discarded;\n\t__u64 spare[15];\n"}
	withNewSizes = edit{"bpf/types.h", "sizeof(struct container) == 448", "sizeof(struct container) == 576"}
)

// buildNext builds the command of a version that is made of this one.
func buildNext(t *testing.T, edits ...edit) string {
	t.Helper()
	dir := t.TempDir()
	shell(t, repository(t), "git ls-files -z --cached --others --exclude-standard | tar c --null -T - --ignore-failed-read | tar x -C "+dir)
	for _, e := range edits {
		path := filepath.Join(dir, e.file)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(text), e.old); n != 1 {
			t.Fatalf("%s has %d times what is to be edited: %q", e.file, n, e.old)
		}
		if err := os.WriteFile(path, []byte(strings.Replace(string(text), e.old, e.new, 1)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "egressbpf-next")
	shell(t, dir, "go generate . && go build -buildvcs=false -o "+path+" ./cmd/egressbpf")
	return path
}

// upgrade is a scene in which one version takes over from another, while a container tries
// all the time to get through.
type upgrade struct {
	*scene
	attach []string
	random *rand.Rand
	begin  time.Time
	seen   *lab.Capture
}

const upgradeRate, upgradeBurst = 20, 10

func newUpgrade(t *testing.T) *upgrade {
	s := newScene(t)
	t.Cleanup(func() { s.Egressbpf(t, "detach") })
	return &upgrade{
		scene:  s,
		attach: []string{"attach", "--cgroup", s.policed, "--smtp-rate", fmt.Sprint(upgradeRate, "/second"), "--smtp-burst", fmt.Sprint(upgradeBurst)},
		random: rand.New(rand.NewPCG(3, 4)),
	}
}

// run runs the command of a version.
func (u *upgrade) run(binary string, args ...string) {
	u.t.Helper()
	if exit := u.Run(u.t, exec.Command(binary, args...)); exit.Code != 0 {
		u.t.Fatalf("%s %s: exit code %d\n%s", filepath.Base(binary), strings.Join(args, " "), exit.Code, exit.Stderr)
	}
}

// start puts a version in force, sets a limit by hand and has the container begin.
func (u *upgrade) start(binary string) {
	u.t.Helper()
	u.run(binary, u.attach...)
	u.run(binary, "limit", "set", u.b.cgroup, "--rate", "7/hour", "--burst", "3")
	u.seen = u.Capture(u.t)
	u.begin = time.Now()
	u.a.Flood(lab.Flood{
		Blocked: []netip.Addr{lab.Metadata4, lab.Metadata6},
		Mail:    at(lab.Mail4, 25),
		Source:  u.a.IPv4,
	})
}

// takeOver has a version take over from another, after an attempt that is killed wherever it
// is.
func (u *upgrade) takeOver(binary string) {
	u.t.Helper()
	cmd := exec.Command(binary, u.attach...)
	var err error
	u.Host.Do(func() { err = cmd.Start() })
	if err != nil {
		u.t.Fatal(err)
	}
	time.AfterFunc(time.Duration(u.random.Int64N(int64(300*time.Millisecond))), func() { _ = cmd.Process.Kill() })
	_ = cmd.Wait()
	if exit := u.Run(u.t, exec.Command(binary, "status")); exit.Code != 0 && exit.Code != 3 {
		u.t.Errorf("status after a kill: exit code %d\n%s", exit.Code, exit.Stderr)
	}
	u.run(binary, u.attach...)
}

// finish holds against each other what the container has done, what arrived and what this
// version has counted.
func (u *upgrade) finish() {
	u.t.Helper()
	if status, _ := u.Status(u.t); !status.Enforcing {
		u.t.Errorf("in the end: %+v", status.Hooks)
	}
	flooded := u.a.StopFlood()
	u.expectFlood(flooded, u.seen, upgradeRate, upgradeBurst, time.Since(u.begin).Seconds())
	if limit := u.row(u.b).SMTP; limit.Rate.String() != "7/hour" || limit.Burst != 3 {
		u.t.Errorf("the limit set by hand became %s, burst %d", limit.Rate, limit.Burst)
	}
}

// An earlier version is taken over from and gone back to, again and again.
func TestEarlierVersion(t *testing.T) {
	earlier := buildEarlier(t)
	u := newUpgrade(t)
	u.start(earlier)
	for range 5 {
		u.takeOver(lab.Binary(t))
		if status, _ := u.Status(t); !status.Enforcing {
			t.Errorf("after taking over: %+v", status.Hooks)
		}
		u.run(lab.Binary(t), "detach", "--hand-over")
		u.run(earlier, u.attach...)
	}
	u.takeOver(lab.Binary(t))
	u.finish()
}

// keeps checks what the next version keeps of a container that has been refused as often, and
// in a map of its own, while whichever version is in force.
func (u *upgrade) keeps(at uintptr, ofContainer, discarded uint64) {
	u.t.Helper()
	open := func(name string) *ebpf.Map {
		m, err := ebpf.LoadPinnedMap(filepath.Join(loader.DefaultPinPath, name), nil)
		if err != nil {
			u.t.Fatal(err)
		}
		return m
	}
	noted := open("noted")
	defer noted.Close()
	var n uint64
	if err := noted.Lookup(uint64(1), &n); err != nil || n != discarded {
		u.t.Errorf("the later version's own map has %d, %v, want %d", n, err, discarded)
	}
	containers := open(bpf.EgressMapContainers)
	defer containers.Close()
	value, err := containers.LookupBytes(u.row(u.b).CgroupID)
	if err != nil || value == nil {
		u.t.Fatalf("container b: %v, %v", value, err)
	}
	if n := binary.NativeEndian.Uint64(append(value, make([]byte, 1024)...)[at:]); n != ofContainer {
		u.t.Errorf("the later version keeps %d of a container, want %d", n, ofContainer)
	}
	c := maps.Container{}
	reasonAt := unsafe.Offsetof(c.Counters) + unsafe.Offsetof(c.Counters.MoreDropped) + unsafe.Sizeof(c.Counters.MoreDropped[0]) // REASON_FAMILY comes first
	if n := binary.NativeEndian.Uint64(value[reasonAt+unsafe.Offsetof(c.Counters.MoreDropped[0].Connects):]); n != discarded {
		u.t.Errorf("%d connects were refused for the later version's reason, want %d", n, discarded)
	}
}

// A socket that outlives its container is judged as a container's, whichever version is in
// force, of those before or of this one.
func TestSocketOutlivesContainerAndVersion(t *testing.T) {
	earlier := buildEarlier(t)
	s := newScene(t)
	t.Cleanup(func() { s.Egressbpf(t, "detach") })
	slice := filepath.Join(s.policed, "own.slice")
	outside := s.agent(s.a, filepath.Join(filepath.Dir(s.policed), "outside"))
	u := &upgrade{scene: s, attach: []string{"attach", "--cgroup", slice}}
	seen := s.Capture(t)
	var sockets []*lab.Socket
	leave := func(n int) {
		t.Helper()
		path := filepath.Join(slice, scope(n))
		agent := s.agent(s.a, path)
		sockets = append(sockets, agent.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0).Give(outside))
		agent.End()
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	try := func(when string) {
		t.Helper()
		for i, socket := range sockets {
			if r := socket.Send([]byte("x"), at(lab.Metadata4, 80)); r.Errno == ok {
				t.Errorf("%s: socket %d may send", when, i)
			}
		}
		if arrived := seen.Settle(t); len(arrived) > 0 {
			t.Errorf("%s: arrived: %v", when, arrived)
			seen.Forget()
		}
	}
	u.run(earlier, u.attach...)
	leave(1)
	try("of the earlier version")
	u.run(lab.Binary(t), u.attach...)
	try("taken over")
	leave(2)
	try("of this version")
	u.run(lab.Binary(t), "detach", "--hand-over")
	try("handed over")
	leave(3)
	try("of this version, after it was handed over")
	u.run(earlier, u.attach...)
	try("gone back")
	u.run(lab.Binary(t), u.attach...)
	try("taken over again")
}

// What the host side drops is counted while maps are replaced.
func TestHostCountsInMigration(t *testing.T) {
	s := newScene(t)
	s.attach()
	beside := s.agent(s.a, filepath.Join(filepath.Dir(s.policed), "beside"))
	var sent uint64
	done := make(chan struct{})
	var loop sync.WaitGroup
	loop.Go(func() {
		socket := beside.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		for {
			select {
			case <-done:
				return
			default:
			}
			if r := socket.Send([]byte("x"), at(lab.Metadata4, 82)); r.Errno == ok {
				sent++
			}
		}
	})
	for range 4 {
		s.Egressbpf(t, "detach", "--hand-over")
		s.Egressbpf(t, "attach")
	}
	close(done)
	loop.Wait()
	if total := s.Stats(t).Total; total.HostSide.Packets != sent || sent == 0 {
		t.Errorf("%d packets sent, %d counted on the host", sent, total.HostSide.Packets)
	}
}

// A later version, too, is taken over from and gone back to. It keeps what this one knows nothing
// of. What it has in the spare
// room, and in maps of its own, is there when it comes back.
func TestLaterVersion(t *testing.T) {
	for _, tt := range []struct {
		name  string
		edits []edit
		at    uintptr // of what it keeps of a container
		stays bool
	}{
		{"in the spare room", []edit{inSpareRoom}, unsafe.Offsetof(maps.Container{}.Spare), true},
		{"with larger values", []edit{behindIt, withNewSizes}, unsafe.Sizeof(maps.Container{}), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			next := buildNext(t, append(tt.edits, nextVersion...)...)
			u := newUpgrade(t)
			u.start(lab.Binary(t))
			discarded, kept := uint64(0), uint64(0)
			for range 3 {
				u.takeOver(next)
				for range 2 {
					if r := u.b.Connect(at(lab.Other4, 9)); r.Errno != unix.ECONNREFUSED {
						t.Errorf("the later version's own reason: %v", r)
					}
					discarded, kept = discarded+1, kept+1
				}
				u.keeps(tt.at, kept, discarded)
				// This version's commands work beside that one.
				u.run(lab.Binary(t), "limit", "set", u.b.cgroup, "--rate", "7/hour", "--burst", "3")
				u.run(lab.Binary(t), "stats")
				u.takeOver(lab.Binary(t))
				if !tt.stays {
					kept = 0
				}
				u.keeps(tt.at, kept, discarded)
			}
			u.finish()
		})
	}
}
