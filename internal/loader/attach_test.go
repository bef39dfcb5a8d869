package loader_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/loader"
	statemaps "github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

func TestAttach(t *testing.T) {
	h := newHost(t)
	if h.Attached() {
		t.Error("attached before the first attach")
	}
	if s := h.status(); s.Enforcing || s.Mode != "" || s.Policy != nil || len(s.Cgroups)+len(s.Hooks) > 0 {
		t.Errorf("got status %+v, want that nothing is attached", s)
	}
	if _, err := h.State(); !errors.Is(err, loader.ErrNotAttached) {
		t.Errorf("got %v, want %v", err, loader.ErrNotAttached)
	}
	h.mustDetach()

	begin := time.Now().Add(-time.Second) // load times are those of another clock
	s := h.mustAttach(withDefences(5), "new/a")
	if want := h.paths("new/a"); !slices.Equal(s.Cgroups, want) || s.Mode != policy.Enforce {
		t.Errorf("got cgroups %v in mode %q, want %v, enforce", s.Cgroups, s.Mode, want)
	}
	if want := withDefences(5); !reflect.DeepEqual(*s.Policy, want) || s.Version != loader.Version() {
		t.Errorf("got policy %+v of version %q, want %+v of %q", s.Policy, s.Version, want, loader.Version())
	}
	var names []string
	for _, row := range s.Hooks {
		names = append(names, row.Name)
		if !row.Attached || row.Reason != "" || row.Program == 0 || row.Link == 0 ||
			row.Since.Before(begin) || row.Since.After(time.Now().Add(time.Second)) {
			t.Errorf("got hook %+v, want it attached just now", row)
		}
	}
	want := append(loader.HookNames(), loader.CgroupsHooks...)
	for _, d := range s.Defences {
		switch {
		case d.Active && d.Name == "socket_families":
			want = append(want, loader.FamiliesHook)
		case d.Active && d.Name == "host_side" && hasNetfilter(t):
			want = append(want, loader.HostHookNames()...)
		}
	}
	if !slices.Equal(names, want) {
		t.Errorf("got hooks %v, want %v", names, want)
	}
	for _, d := range s.Defences {
		if !d.Active && d.Reason == "" {
			t.Errorf("defence %s is missing, and status does not say why", d.Name)
		}
	}
	if !h.Attached() {
		t.Error("not attached after an attach")
	}
	if info, err := os.Stat(h.pins); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%s: got %v, %v, want that only root can read it", h.pins, info, err)
	}
	// The kernel agrees.
	for i, name := range loader.HookNames() {
		row := h.hook(name, "new/a")
		dir, err := os.Open(h.paths("new/a")[0])
		check(t, err)
		defer dir.Close()
		got, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: loader.AttachTypes()[i]})
		check(t, err)
		if len(got.Programs) != 1 || uint32(got.Programs[0].ID) != row.Program {
			t.Errorf("the kernel runs %+v at %s, status says %+v", got.Programs, name, row)
		}
	}

	o := h.objects()
	h.mustDetach()
	h.nothingLeft(o)
	h.mustDetach()
	if _, err := os.Stat(h.paths("new/a")[0]); err != nil {
		t.Errorf("detach has removed the cgroup: %v", err)
	}
}

// What is in force is exchanged through its links, and state is kept.
func TestSwap(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a", "b")
	h.mkdir("a/web")
	web := h.id("a/web")
	state, err := h.State()
	check(t, err)
	defer state.Close()
	check(t, state.SetLimit(web, policy.Limit{Burst: 3}))
	kept := statemaps.Container{
		Bucket:   bpf.EgressBucket{FullAt: 1 << 60, Interval: 7, Count: 5, Rest: 1},
		Limit:    statemaps.LimitOf(policy.Limit{Burst: 3}),
		Counters: statemaps.Counters{SmtpAllowed: 42},
	}
	check(t, state.ByName()[bpf.EgressMapContainers].Put(web, kept))
	testenv.Enter(t, filepath.Join(h.base, "a/web"))
	if h.sends("a", blockedAddress) || connects(t, blockedAddress) {
		t.Fatal("a blocked address is reached")
	}
	kept.Counters.Dropped[bpf.EgressReasonREASON_BLOCKED] = bpf.EgressDrops{Packets: 1, Bytes: packetSize, Connects: 1}

	before := h.status()
	p := withBurst(7)
	p.Presets, p.Block = []string{policy.None}, rules(t, "192.0.2.7")
	after := h.mustAttach(p, "a")
	if !reflect.DeepEqual(*after.Policy, p) || !slices.Equal(after.Cgroups, before.Cgroups) {
		t.Errorf("got %+v for %v, want %+v for %v", after.Policy, after.Cgroups, p, before.Cgroups)
	}
	for i, row := range after.Hooks {
		was := before.Hooks[i]
		if row.Cgroup == "" || row.Name == loader.FamiliesHook {
			continue // a link that cannot be updated
		}
		if row.Link != was.Link || row.Program == was.Program {
			t.Errorf("got %+v, want another program at the same link as %+v", row, was)
		}
	}
	containers, totals := h.counters()
	if containers[web] != kept || totals.Dropped != kept.Counters.Dropped {
		t.Errorf("got %+v, in total %+v, want them kept: %+v", containers[web], totals, kept)
	}

	// The new programs go on with the same state.
	if !h.sends("a", blockedAddress) || !connects(t, blockedAddress) {
		t.Error("what was blocked before still is")
	}
	if h.sends("a", "192.0.2.7") || connects(t, "192.0.2.7") {
		t.Error("what should be blocked now is not")
	}
	drops := &kept.Counters.Dropped[bpf.EgressReasonREASON_BLOCKED]
	drops.Packets, drops.Bytes, drops.Connects = 2, 2*packetSize, 2
	containers, totals = h.counters()
	if containers[web] != kept || totals.Dropped != kept.Counters.Dropped {
		t.Errorf("got %+v, in total %+v, want %+v", containers[web], totals, kept)
	}
}

// The old programs and their policy are not kept in memory, also while the
// process that has attached goes on.
func TestSwapFreesOldPrograms(t *testing.T) {
	// The collector would close what was forgotten, some day.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	h := newHost(t)
	h.mustAttach(withBurst(5), "a")
	old := h.objects()
	h.mustAttach(withBurst(7))
	old.without(h.objects()).gone(t)
}

func rules(t *testing.T, texts ...string) (rules []policy.Rule) {
	t.Helper()
	for _, text := range texts {
		rule, err := policy.ParseRule(text)
		check(t, err)
		rules = append(rules, rule)
	}
	return rules
}

// The policy holds for every cgroup, those of earlier attaches included.
func TestAttachAddsCgroups(t *testing.T) {
	h := newHost(t)
	for i, name := range []string{"b", "a", "c/d", "a"} {
		s := h.mustAttach(withBurst(uint32(5+i)), name, name)
		if s.Policy.SMTP.Burst != uint32(5+i) {
			t.Errorf("got policy %+v, want the last one", s.Policy)
		}
	}
	if got, want := h.policed(), []string{"a", "b", "c/d"}; !slices.Equal(got, want) {
		t.Errorf("%v are policed, want %v", got, want)
	}
	o := h.objects()
	h.mustDetach("b", "not-policed", "a/not-policed")
	if got, want := h.policed(), []string{"a", "c/d"}; !slices.Equal(got, want) || !h.status().Enforcing {
		t.Errorf("%v are policed, want %v", got, want)
	}
	h.mustDetach("c/d", "a")
	h.nothingLeft(o)
}

func TestModes(t *testing.T) {
	h := newHost(t)
	audit := withBurst(5)
	audit.Mode = policy.Audit
	check(t, h.attach(audit, "a"))
	h.mkdir("a/web")
	testenv.Enter(t, filepath.Join(h.base, "a/web"))
	for i, mode := range []policy.Mode{policy.Audit, policy.Enforce, policy.Audit} {
		p := withBurst(5)
		p.Mode = mode
		check(t, h.attach(p))
		enforce := mode == policy.Enforce
		if s := h.status(); s.Enforcing != enforce || s.InForce() && !enforce || s.Mode != mode {
			t.Errorf("%s: got status %+v", mode, s)
		}
		if h.sends("a", blockedAddress) == enforce || connects(t, blockedAddress) == enforce {
			t.Errorf("%s: the mode has no effect", mode)
		}
		if !h.sends("a", "192.0.2.1") || !connects(t, "192.0.2.1") {
			t.Errorf("%s: what is not blocked does not pass", mode)
		}
		n := uint64(i + 1)
		containers, _ := h.counters()
		got := containers[h.id("a/web")].Counters.Dropped[bpf.EgressReasonREASON_BLOCKED]
		if want := (bpf.EgressDrops{Packets: n, Bytes: n * packetSize, Connects: n}); got != want {
			t.Errorf("%s: got %+v, want %+v", mode, got, want)
		}
	}
}

// A container is what is one level below its policed cgroup, however deep that
// is and whatever the container makes below itself.
func TestContainersOfEachLevel(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a", "b/c/d")
	h.mkdir("a/x/y/z", "b/c/d/x/y")
	for _, tt := range []struct{ policed, in, container string }{
		{"a", "a/x", "a/x"},
		{"a", "a/x/y/z", "a/x"},
		{"b/c/d", "b/c/d/x", "b/c/d/x"},
		{"b/c/d", "b/c/d/x/y", "b/c/d/x"},
		{"a", "a", "a"}, // no container, but charged all the same
		{"b/c/d", "b/c/d", "b/c/d"},
	} {
		t.Run(tt.in, func(t *testing.T) {
			id := h.id(tt.container)
			before, _ := h.counters()
			testenv.Enter(t, filepath.Join(h.base, tt.in))
			if h.sends(tt.policed, blockedAddress) || connects(t, blockedAddress) {
				t.Error("a blocked address is reached")
			}
			after, _ := h.counters()
			want := before[id]
			drops := &want.Counters.Dropped[bpf.EgressReasonREASON_BLOCKED]
			drops.Packets++
			drops.Bytes += packetSize
			drops.Connects++
			before[id] = want
			if !reflect.DeepEqual(after, before) {
				t.Errorf("got %+v, want one more of each for %s, cgroup %d: %+v", after, tt.container, id, before)
			}
		})
	}
	t.Run("outside", func(t *testing.T) {
		testenv.Enter(t, filepath.Join(h.base, "b/c"))
		if !connects(t, blockedAddress) {
			t.Error("the filter works outside of the policed cgroups")
		}
	})
}

func TestRelease(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a")
	h.mkdir("a/web/nested", "a/other")
	web, other := h.id("a/web"), h.id("a/other")
	for _, name := range []string{"a/other", "a/web"} {
		t.Run(name, func(t *testing.T) {
			testenv.Enter(t, filepath.Join(h.base, name))
			h.sends("a", blockedAddress)
			connects(t, blockedAddress)
		})
	}
	_, before := h.counters()
	if drops := before.Dropped[bpf.EgressReasonREASON_BLOCKED]; drops.Packets != 2 || drops.Connects != 2 {
		t.Fatalf("got totals %+v, want two of each", before)
	}
	h.rmdir("a/web/nested")
	h.rmdir("a/web")
	testenv.Eventually(t, "forget the removed container", func() bool {
		containers, _ := h.counters()
		_, ok := containers[web]
		return !ok
	})
	containers, after := h.counters()
	if _, ok := containers[other]; !ok || len(containers) != 1 {
		t.Errorf("got containers %+v, want %d", containers, other)
	}
	if after != before {
		t.Errorf("got totals %+v, want them kept: %+v", after, before)
	}
}

// Links outlive their cgroup for a while, and must not be taken for it.
func TestRemovedCgroup(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a", "b")
	was := h.objects()
	h.rmdir("b")
	for _, name := range loader.HookNames() {
		if row := h.hook(name, "b"); row.Attached || !strings.Contains(row.Reason, "removed") {
			t.Errorf("got %+v, want that its cgroup was removed", row)
		}
	}
	if s := h.status(); s.Enforcing || s.Policy == nil {
		t.Errorf("got status %+v, want it not in force", s)
	}

	// Made again, it has another id.
	h.mkdir("b")
	if h.status().Enforcing {
		t.Error("a cgroup that was made anew is not policed yet")
	}
	if s := h.mustAttach(withBurst(5)); !slices.Equal(h.policed(), []string{"a", "b"}) {
		t.Errorf("got status %+v, want a and b", s)
	}
	h.mkdir("b/web")
	t.Run("in force", func(t *testing.T) {
		testenv.Enter(t, filepath.Join(h.base, "b/web"))
		if connects(t, blockedAddress) {
			t.Error("a blocked address is reached")
		}
	})
	was.without(h.objects()).gone(t)

	// Not made again, it is forgotten.
	h.rmdir("b/web")
	h.rmdir("b")
	if h.mustAttach(withBurst(5)); !slices.Equal(h.policed(), []string{"a"}) {
		t.Errorf("%v are policed, want a", h.policed())
	}
	if pins := h.pinned(); slices.ContainsFunc(pins, func(name string) bool {
		return strings.HasPrefix(name, "cgroup-") && !strings.HasPrefix(name, fmt.Sprintf("cgroup-%d/", h.id("a")))
	}) {
		t.Errorf("a removed cgroup has pins: %v", pins)
	}

	// Nor is it an obstacle to a detach.
	o := h.objects()
	h.rmdir("a")
	h.mustDetach()
	h.nothingLeft(o)
}

// A killed attach may leave an empty folder for a cgroup that is removed later.
func TestNothingKnownOfRemovedCgroup(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a")
	h.mkdir("b")
	leftover := fmt.Sprint(h.pins, "/cgroup-", h.id("b"))
	check(t, os.Mkdir(leftover, 0o700))
	h.rmdir("b")
	if s := h.status(); slices.Contains(s.Cgroups, string(h.root)) {
		t.Errorf("got policed cgroups %q, which are not", s.Cgroups)
	}
	h.mustAttach(withBurst(5))
	if _, err := os.Stat(leftover); err == nil {
		t.Errorf("%s is still there", leftover)
	}
}

func TestDetachedByOthers(t *testing.T) {
	h := newHost(t)
	names := append(loader.HookNames(), loader.CgroupsHooks...)
	if testing.Short() {
		names = []string{names[0], names[len(names)-1]}
	}
	for _, name := range names {
		h.mustAttach(withBurst(5), "a", "b")
		cgroup := "b"
		optional := slices.Contains(loader.CgroupsHooks, name)
		if optional {
			cgroup = ""
			check(t, os.Remove(filepath.Join(h.pins, name)))
		} else {
			check(t, h.linkOf(name, cgroup).Detach())
		}
		row := h.hook(name, cgroup)
		if row.Attached || !strings.Contains(row.Reason, "attach again") {
			t.Errorf("got %+v, want that it is detached, and what to do", row)
		}
		s := h.status()
		if s.Enforcing != optional {
			t.Errorf("%s is detached: got enforcing %v", name, s.Enforcing)
		}
		for _, other := range s.Hooks {
			if other.Attached == (other.Name == name && other.Cgroup == row.Cgroup) {
				t.Errorf("%s is detached: got %+v", name, other)
			}
		}
		h.mustAttach(withBurst(5))
		if row := h.hook(name, cgroup); !row.Attached {
			t.Errorf("attached again: got %+v", row)
		}
	}
	h.mkdir("b/web")
	testenv.Enter(t, filepath.Join(h.base, "b/web"))
	if connects(t, blockedAddress) {
		t.Error("a blocked address is reached")
	}
}

// A pin that somebody has removed takes its link along.
func TestPinRemovedByOthers(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a")
	check(t, os.Remove(fmt.Sprintf("%s/cgroup-%d/egress", h.pins, h.id("a"))))
	if s := h.status(); s.Enforcing || h.hook("egress", "a").Attached {
		t.Errorf("got status %+v, want egress detached", s)
	}
	h.mustAttach(withBurst(7))
	check(t, os.RemoveAll(fmt.Sprintf("%s/cgroup-%d", h.pins, h.id("a"))))
	if s := h.status(); s.Enforcing || len(s.Hooks) > 0 {
		t.Errorf("got status %+v, want nothing attached", s)
	}
	h.mustAttach(withBurst(5), "a")
}

// An attach beside other programs works; where one insists on being alone, it
// is refused as a whole.
func TestBesideOtherPrograms(t *testing.T) {
	h := newHost(t)
	pass, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.CGroupSKB,
		AttachType:   ebpf.AttachCGroupInetEgress,
		License:      "MIT",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	check(t, err)
	defer pass.Close()
	h.mkdir("a", "b")
	attach := func(name string, flags uint32) {
		t.Helper()
		dir, err := os.Open(h.paths(name)[0])
		check(t, err)
		t.Cleanup(func() { dir.Close() })
		check(t, link.RawAttachProgram(link.RawAttachProgramOptions{
			Target: int(dir.Fd()), Program: pass, Attach: ebpf.AttachCGroupInetEgress, Flags: flags,
		}))
	}
	const multi = 2 // BPF_F_ALLOW_MULTI
	attach("a", multi)
	h.mustAttach(withBurst(5), "a")
	before := h.snapshot()
	attach("b", 0)
	if err := h.attach(withBurst(7), "c", "b"); err == nil || !strings.Contains(err.Error(), h.paths("b")[0]) {
		t.Errorf("got %v, want that %s is refused", err, h.paths("b")[0])
	}
	h.unchanged(before, "a refused attach")
}

func TestManyRules(t *testing.T) {
	h := newHost(t)
	p := withBurst(5)
	for i := range 10_000 {
		addr := netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0})
		rule := policy.Rule{Prefix: netip.PrefixFrom(addr, 24)}
		switch i % 4 {
		case 1:
			rule.Port, rule.Proto = uint16(i), 6
		case 2:
			addr := netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, byte(i >> 8), byte(i)})
			rule.Prefix = netip.PrefixFrom(addr, 48+i%80)
		}
		p.Block = append(p.Block, rule)
	}
	for range 2 { // fresh, and as a swap
		if s := h.mustAttach(p, "a"); !reflect.DeepEqual(*s.Policy, p) {
			t.Error("the policy that status shows is not the one that was attached")
		}
	}
	h.mkdir("a/web")
	testenv.Enter(t, filepath.Join(h.base, "a/web"))
	for dst, want := range map[string]bool{
		"10.0.0.1": false, "10.39.12.255": false, "10.39.16.0": true, "10.0.1.1": true, blockedAddress: false,
	} {
		if got := h.sends("a", dst); got != want {
			t.Errorf("%s: got %v, want %v", dst, got, want)
		}
	}
}

// Every key of the policy is read back as it was.
func TestStatusShowsPolicy(t *testing.T) {
	h := newHost(t)
	p := policy.Policy{
		Mode:     policy.Enforce,
		Presets:  []string{"aws", "gcp"},
		Block:    rules(t, "10.0.0.0/8", "[2001:db8::/32]:443/tcp", "192.0.2.1/32/47"),
		Allow:    rules(t, "10.0.0.53:53/udp"),
		AllowDNS: true,
		SMTP: policy.SMTP{
			Ports:     []uint16{25, 2525, 65535},
			Rate:      policy.Rate{Count: 7, Period: 24 * time.Hour},
			Burst:     1_000,
			OverLimit: policy.Reject,
			Exempt:    []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("::/0")},
		},
		Families:    "packet,vsock",
		HostSide:    policy.On,
		HostDevices: []policy.Device{"podman0", "cali*"},
		Scopes:      []policy.Scope{"docker-{id}.scope", "/ci/*"},
	}
	if s := h.mustAttach(p, "a"); !reflect.DeepEqual(*s.Policy, p) {
		t.Errorf("got %+v, want %+v", *s.Policy, p)
	}
	p.SMTP.Rate = policy.Rate{}
	if s := h.mustAttach(p); !reflect.DeepEqual(*s.Policy, p) {
		t.Errorf("got %+v, want %+v", *s.Policy, p)
	}
}

func TestUncovered(t *testing.T) {
	lockHost(t)
	h := newHost(t)
	hex := strings.Repeat("0123456789abcdef", 4)
	h.mustAttach(withBurst(5), "a")
	h.mkdir("a/"+hex, "b/"+hex, "c/"+hex)
	for _, name := range []string{"a/" + hex, "b/" + hex} {
		cmd := testenv.Command(t, filepath.Join(h.base, name), "sleep", "60")
		check(t, cmd.Start())
		defer func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}()
	}
	// Other tests may have containers too.
	ours := func() (names []string) {
		s := h.status()
		if s.InForce() == (len(s.Uncovered) > 0) {
			t.Errorf("in force: %v, with %v uncovered", s.InForce(), s.Uncovered)
		}
		for _, u := range s.Uncovered {
			if name, ok := strings.CutPrefix(h.root.Path(u.Cgroup), h.base+"/"); ok {
				names = append(names, name)
				if u.ID != hex {
					t.Errorf("got id %q, want %q", u.ID, hex)
				}
			}
		}
		return names
	}
	if got, want := ours(), []string{"b/" + hex}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	h.mustAttach(withBurst(5), "b")
	if got := ours(); len(got) != 0 {
		t.Errorf("got %v, want none", got)
	}
}

// Some other program may be attached so that no other can be, at the cgroup or above it.
func TestExcluded(t *testing.T) {
	h := newHost(t)
	h.mkdir("a/b")
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetEgress, License: "MIT",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	check(t, err)
	defer prog.Close()
	dir, err := os.Open(h.paths("a")[0])
	check(t, err)
	defer dir.Close()
	other := link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: prog, Attach: ebpf.AttachCGroupInetEgress}
	check(t, link.RawAttachProgram(other))
	before := h.snapshot()
	for _, name := range []string{"a", "a/b"} {
		if err := h.attach(withBurst(5), name); !errors.Is(err, loader.ErrExcluded) {
			t.Errorf("attach to %s: got %v, want %v", name, err, loader.ErrExcluded)
		}
	}
	h.unchanged(before, "a program that excludes others")
	check(t, link.RawDetachProgram(link.RawDetachProgramOptions{Target: other.Target, Program: prog, Attach: other.Attach}))
	h.mustAttach(withBurst(5), "a/b")
}

func TestHolders(t *testing.T) {
	h := newHost(t)
	open := func(family int) {
		t.Helper()
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		check(t, err)
		t.Cleanup(func() { unix.Close(fd) })
	}
	// Before the filter, which may refuse them.
	open(unix.AF_PACKET)
	open(unix.AF_XDP)
	open(unix.AF_NETLINK)
	scope := "own.slice/docker-" + id + ".scope"
	h.mkdir("own.slice/tcpdump.service", scope+"/nested")
	h.mustAttach(withBurst(5), "a", "b", "own.slice")
	h.mkdir("a/web/nested", "a/idle")
	expect := func(want ...loader.Holder) {
		t.Helper()
		got, err := h.Holders()
		check(t, err)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	expect()
	rel := func(name string) string {
		rel, err := h.root.Rel(h.paths(name)[0])
		check(t, err)
		return rel
	}
	both := []string{"packet", "xdp"}
	for in, container := range map[string]string{"a/web": "a/web", "a/web/nested": "a/web", "b": "b", scope + "/nested": scope} {
		t.Run(in, func(t *testing.T) {
			testenv.Enter(t, filepath.Join(h.base, in))
			expect(loader.Holder{Cgroup: rel(container), Families: both})
		})
	}
	t.Run("service", func(t *testing.T) {
		testenv.Enter(t, filepath.Join(h.base, "own.slice/tcpdump.service"))
		expect()
	})
	t.Run("spared", func(t *testing.T) {
		scope := h.sparedScope("1", "packet")
		testenv.Enter(t, filepath.Join(h.base, scope))
		expect(loader.Holder{Cgroup: rel(scope), Families: []string{"xdp"}})
		status := h.status()
		check(t, h.AddState(status))
		want := []loader.WithFamilies{{Uncovered: loader.Uncovered{ID: strings.Repeat("1", 64), Cgroup: rel(scope)}, Families: "packet"}}
		if !reflect.DeepEqual(status.FamiliesAllowed, want) {
			t.Errorf("got %+v, want %+v", status.FamiliesAllowed, want)
		}
	})
	testenv.Enter(t, filepath.Join(h.base, "a/idle"))
	p := withBurst(5)
	p.Families = "packet"
	h.mustAttach(p)
	expect(loader.Holder{Cgroup: rel("a/idle"), Families: []string{"xdp"}})
	p.Families = policy.AnyFamily
	h.mustAttach(p)
	expect()
}
