package loader_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/bpf"
	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
	statemaps "github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// What is refused changes nothing, whether a filter is in force or not.
func TestRefused(t *testing.T) {
	for _, inForce := range []bool{false, true} {
		t.Run(fmt.Sprint("in force ", inForce), func(t *testing.T) {
			h := newHost(t)
			h.mkdir("a")
			if inForce {
				h.mustAttach(withBurst(5), "a")
			}
			before := h.snapshot()
			refused := func(name string, err, want error) {
				t.Helper()
				if err == nil || want != nil && !errors.Is(err, want) {
					t.Errorf("%s: got %v, want %v", name, err, want)
				}
				h.unchanged(before, name)
				before = h.snapshot() // so that each tells of itself
			}
			attach := func(p policy.Policy, paths ...string) error { return h.Attach(t.Context(), paths, p) }
			ok, root := withBurst(7), string(h.root)
			new := h.paths("new")[0]

			refused("nested", attach(ok, new, new+"/b"), loader.ErrNested)
			refused("nested, inner first", attach(ok, new+"/b/c", new), loader.ErrNested)
			refused("nested among others", attach(ok, new, new+"-b", new+"/c"), loader.ErrNested)
			refused("nested in the root", attach(ok, new, root), loader.ErrNested)
			refused("each cgroup of the root", attach(withAnyScope(ok), root), loader.ErrWholeHost)
			refused("outside", attach(ok, new, t.TempDir()), cgroup.ErrNotBelowRoot)
			refused("outside by dots", attach(ok, new, new+"/../../../x"), cgroup.ErrNotBelowRoot)
			refused("file", attach(ok, new, h.base+"/cgroup.procs"), nil)
			refused("below a file", attach(ok, new, h.base+"/cgroup.procs/a"), nil)
			refused("no mode", attach(policy.Policy{}, new), nil)
			refused("no burst", attach(withBurst(0), new), nil)
			if inForce {
				refused("inside of a policed one", attach(ok, new, h.base+"/a/b"), loader.ErrInPoliced)
				refused("detach what is outside", h.Detach(t.Context(), []string{"/tmp"}), cgroup.ErrNotBelowRoot)
			}
		})
	}
}

func TestNotOnBPFFS(t *testing.T) {
	root, dir := testenv.Root(t), t.TempDir()
	cgroups := []string{testenv.CgroupName(t)}
	for _, pins := range []string{dir, filepath.Join(dir, "egressbpf"), filepath.Join(dir, "a/b"), "/sys/fs/cgroup/egressbpf"} {
		f := loader.New(pins, root)
		if err := f.Attach(t.Context(), cgroups, policy.Default()); !errors.Is(err, loader.ErrPinPath) {
			t.Errorf("attach with pin path %s: got %v, want %v", pins, err, loader.ErrPinPath)
		}
		if s, err := f.Status(); err != nil || s.Enforcing {
			t.Errorf("status with pin path %s: got %+v, %v", pins, s, err)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("%s has %v, %v", dir, entries, err)
	}
	if _, err := os.Stat(cgroups[0]); err == nil {
		t.Error("the cgroup was made")
	}
}

// A detach removes what an attach has made, and no other directories.
func TestDetachElsewhere(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "somebody's")
	check(t, os.Mkdir(dir, 0o755))
	_ = loader.New(dir, testenv.Root(t)).Detach(t.Context(), nil)
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("an empty directory that is no pin path: %v", err)
	}
}

// Where no bpffs is mounted at the usual place, attach mounts one, unless the host would not
// see it.
func TestMountsBPFFS(t *testing.T) {
	const usual = "/sys/fs/bpf"
	const marker = "LOADER_TEST_MOUNTS"
	if os.Getenv(marker) == "" {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$")
		cmd.Env = append(os.Environ(), marker+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	onBPFFS := func() bool {
		var st unix.Statfs_t
		check(t, unix.Statfs(usual, &st))
		return st.Type == unix.BPF_FS_MAGIC
	}
	for onBPFFS() {
		check(t, unix.Unmount(usual, unix.MNT_DETACH))
	}
	cgroups := []string{testenv.CgroupName(t)}
	f := loader.New(loader.DefaultPinPath, testenv.Root(t))
	if s, err := f.Status(); err != nil || s.Enforcing || onBPFFS() {
		t.Fatalf("got status %+v, %v, mounted: %v", s, err, onBPFFS())
	}
	refusal := loader.ErrPrivateMount
	var host unix.Statfs_t
	if unix.Statfs("/proc/1/root"+usual, &host) == nil && host.Type != unix.BPF_FS_MAGIC {
		refusal = loader.ErrNotMounted
	}
	if err := f.Attach(t.Context(), cgroups, policy.Default()); !errors.Is(err, refusal) && !errors.Is(err, loader.ErrUnmounted) || onBPFFS() {
		t.Fatalf("in a mount namespace of its own: got %v, mounted: %v", err, onBPFFS())
	}
	loader.MountForHost()
	f.SetFault(func(string) error { return errInjected })
	if err := f.Attach(t.Context(), cgroups, policy.Default()); !errors.Is(err, errInjected) || onBPFFS() {
		t.Fatalf("got %v, mounted: %v", err, onBPFFS())
	}
	f.SetFault(nil)
	for range 2 {
		check(t, f.Attach(t.Context(), cgroups, policy.Default()))
		if s, err := f.Status(); err != nil || !s.Enforcing || !onBPFFS() {
			t.Fatalf("got status %+v, %v, mounted: %v", s, err, onBPFFS())
		}
	}
	if info, err := os.Stat(usual); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%s: got %v, %v, want that only root can read it", usual, info, err)
	}
	check(t, f.Detach(t.Context(), nil))
	check(t, unix.Unmount(usual, 0))
	if onBPFFS() {
		t.Error("it was mounted twice")
	}
}

// hold takes the lock of a filter until it is called.
func (h *host) hold() (release func()) {
	h.t.Helper()
	check(h.t, os.MkdirAll(h.pins, 0o700))
	dir, err := os.Open(h.pins)
	check(h.t, err)
	check(h.t, unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB))
	h.t.Cleanup(func() { dir.Close() })
	return func() { dir.Close() }
}

func TestBusy(t *testing.T) {
	h := newHost(t)
	ended, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("the test has no patience")
	cancel(reason)
	busy := func(what string) {
		t.Helper()
		before := h.snapshot()
		for action, err := range map[string]error{
			"attach": h.Attach(ended, h.paths("b"), withBurst(7)),
			"detach": h.Detach(ended, nil),
		} {
			if !errors.Is(err, loader.ErrBusy) || !errors.Is(err, reason) {
				t.Errorf("%s while %s: got %v, want %v: %v", action, what, err, loader.ErrBusy, reason)
			}
		}
		h.unchanged(before, "a refused attach and detach while "+what)
		h.status() // needs no lock
	}
	release := h.hold()
	busy("somebody holds the lock")
	release()

	// Whatever is done, it is done under the lock.
	other := loader.New(h.pins, h.root)
	n := 0
	other.SetFault(func(step string) error {
		n++
		busy(fmt.Sprintf("another one is at %q", step))
		return nil
	})
	check(t, other.Attach(t.Context(), h.paths("a"), withBurst(5)))
	check(t, other.Detach(t.Context(), nil))
	if n < 10 {
		t.Errorf("only %d steps", n)
	}
}

// An attach that waits for a detach finds that the directory it waits for is
// removed.
func TestAttachWaitsForDetach(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a")
	done := make(chan error)
	var once sync.Once
	h.SetFault(func(string) error {
		once.Do(func() {
			go func() { done <- loader.New(h.pins, h.root).Attach(t.Context(), h.paths("b"), withBurst(7)) }()
		})
		return nil
	})
	h.mustDetach()
	check(t, <-done)
	if got := h.policed(); !slices.Equal(got, []string{"b"}) || !h.status().Enforcing {
		t.Errorf("%v are policed, want b, in force", got)
	}
}

// A service that waits for a detach does not make the directory again.
func TestFollowWaitsForDetach(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a")
	before := h.objects()
	done := make(chan error)
	var once sync.Once
	h.SetFault(func(string) error {
		once.Do(func() {
			go func() { done <- loader.New(h.pins, h.root).Follow(t.Context(), true) }()
			time.Sleep(20 * time.Millisecond) // until it waits for the lock
		})
		return nil
	})
	h.mustDetach()
	check(t, <-done)
	h.nothingLeft(before)
}

func TestParallelAttach(t *testing.T) {
	h := newHost(t)
	names := []string{"a", "b"}
	parallel := func(do func(i int, f *loader.Filter, cgroups []string) error) {
		t.Helper()
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				if err := do(i, loader.New(h.pins, h.root), h.paths(names[i%2])); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	}
	parallel(func(i int, f *loader.Filter, cgroups []string) error {
		return f.Attach(t.Context(), cgroups, withBurst(uint32(1+i)))
	})
	if got := h.policed(); !slices.Equal(got, names) || !h.status().Enforcing {
		t.Errorf("%v are policed, want %v, in force", got, names)
	}
	o := h.objects()
	parallel(func(i int, f *loader.Filter, cgroups []string) error {
		if i%3 == 0 {
			return f.Attach(t.Context(), cgroups, withBurst(uint32(1+i)))
		}
		return f.Detach(t.Context(), cgroups)
	})
	h.mustDetach()
	h.nothingLeft(o)
}

// Status takes no lock: what vanishes while it reads is gone, and no error. A
// link to nowhere is listed, and is not there when it is opened.
func TestStatusOfWhatVanishes(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a")
	vanish := func(name string) {
		t.Helper()
		pin := filepath.Join(h.pins, name)
		if err := os.Remove(pin); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		check(t, os.Symlink("nowhere", pin))
		t.Cleanup(func() { _ = os.Remove(pin) })
	}
	vanish("cgroup-1")
	if s := h.status(); !s.Enforcing || len(s.Cgroups) != 1 {
		t.Errorf("got status %+v, want a in force", s)
	}
	check(t, os.Remove(filepath.Join(h.pins, "cgroup-1")))
	vanish(fmt.Sprintf("cgroup-%d/sendmsg4", h.id("a")))
	for _, name := range loader.HookNames() {
		if row := h.hook(name, "a"); row.Attached == (name == "sendmsg4") {
			t.Errorf("got %+v", row)
		}
	}
	if h.status().Enforcing {
		t.Error("a hook has gone, and status says that all are attached")
	}
	h.mustAttach(withBurst(5))
}

func TestStatusWhileOthersAttach(t *testing.T) {
	h := newHost(t)
	statusWhile := func(others func() error) (all []*loader.Status) {
		t.Helper()
		done := make(chan error)
		go func() {
			var err error
			for range 8 / stride() {
				err = errors.Join(err, others())
			}
			done <- err
		}()
		for {
			s, err := h.Status()
			if err != nil {
				t.Error(err)
			}
			all = append(all, s)
			select {
			case err := <-done:
				check(t, err)
				return all
			default:
			}
		}
	}
	statusWhile(func() error {
		f := loader.New(h.pins, h.root)
		return errors.Join(f.Attach(t.Context(), h.paths("a"), withBurst(5)), f.Detach(t.Context(), nil))
	})
	// An exchange is no moment without a filter, for who looks either.
	h.mustAttach(withBurst(5), "a")
	for _, s := range statusWhile(func() error {
		return loader.New(h.pins, h.root).Attach(t.Context(), nil, withBurst(7))
	}) {
		if s != nil && !s.Enforcing {
			t.Fatalf("got status %+v, want it enforcing", s)
		}
	}
}

// pinMap pins a map that no filter has made.
func pinMap(t *testing.T, path string, spec ebpf.MapSpec) {
	t.Helper()
	m, err := ebpf.NewMap(&spec)
	check(t, err)
	defer m.Close()
	check(t, m.Pin(path))
	t.Cleanup(func() { _ = os.Remove(path) })
}

// otherVersion fails the test unless all is refused and nothing changes.
func (h *host) otherVersion() {
	h.t.Helper()
	before := h.snapshot()
	if err := h.attach(withBurst(7), "b"); !errors.Is(err, loader.ErrOtherVersion) {
		h.t.Errorf("attach: got %v, want %v", err, loader.ErrOtherVersion)
	}
	h.unchanged(before, "a refused attach")
}

func TestStateOfOtherVersion(t *testing.T) {
	incompatible := map[string]ebpf.MapSpec{
		bpf.EgressMapContainers: {Type: ebpf.Hash, KeySize: 4, ValueSize: 1000, MaxEntries: 65536, Flags: unix.BPF_F_NO_PREALLOC},
		bpf.EgressMapTotals:     {Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1},
	}
	for name, spec := range incompatible {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			h.mustAttach(withBurst(5), "a")
			pin := filepath.Join(h.pins, name)
			check(t, os.Remove(pin))
			pinMap(t, pin, spec)
			h.otherVersion()
			if _, err := h.State(); !errors.Is(err, loader.ErrOtherVersion) {
				t.Errorf("state: got %v, want %v", err, loader.ErrOtherVersion)
			}
			if !h.status().Enforcing {
				t.Error("what is in force is not shown")
			}
			o := h.objects()
			h.mustDetach()
			h.nothingLeft(o)
		})
	}
}

// Pins of others are neither taken for another version's nor removed, wherever the pin path
// leads.
func TestForeignPins(t *testing.T) {
	h := newHost(t)
	check(t, os.MkdirAll(filepath.Join(h.pins, "sub"), 0o700))
	spec := ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1}
	theirs := []string{filepath.Join(h.pins, "theirs"), filepath.Join(h.pins, "sub", "deep")}
	for _, pin := range theirs {
		pinMap(t, pin, spec)
	}
	_, err := h.Status()
	for what, err := range map[string]error{"status": err, "attach": h.attach(withBurst(5), "a"), "detach": h.Detach(t.Context(), nil)} {
		if !errors.Is(err, loader.ErrForeignPins) {
			t.Errorf("%s: got %v, want %v", what, err, loader.ErrForeignPins)
		}
	}
	for _, pin := range theirs {
		check(t, os.Remove(pin)) // it is there
	}
	if _, err := os.Stat(h.paths("a")[0]); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("cgroup a: %v", err)
	}
	check(t, os.RemoveAll(h.pins))
}

// Something else in the place of a link is no link, and no obstacle.
func TestNoLink(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a")
	occupy := func() {
		t.Helper()
		cgroup := fmt.Sprintf("%s/cgroup-%d/", h.pins, h.id("a"))
		for _, pin := range []string{cgroup + bpf.EgressProgConnect4, cgroup + loader.FamiliesHook, h.pins + "/release", h.pins + "/host_forward4"} {
			_ = os.Remove(pin)
			pinMap(t, pin, ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
		}
	}
	occupy()
	if s := h.status(); s.Enforcing {
		t.Errorf("enforcing: %+v", s.Hooks)
	}
	h.mustAttach(withDefences(5))
	if row := h.hook("release", ""); !row.Attached {
		t.Errorf("not restored: %+v", row)
	}
	if hasNetfilter(t) && !h.hook("host_forward4", "").Attached {
		t.Error("the host side is not restored")
	}
	occupy()
	h.mustAttach(withBurst(5))
	occupy()
	h.mustDetach()
	if h.Attached() {
		t.Error("something is left at the pin path")
	}
}

// A pin path is where it was when the filter was named, and is never the filesystem's root.
func TestRelativePinPath(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a")
	neighbour := filepath.Join(filepath.Dir(h.pins), "neighbour")
	pinMap(t, neighbour, ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	t.Chdir(filepath.Dir(h.pins))
	for _, path := range []string{".", "", filepath.Dir(h.pins)} {
		f := loader.New(path, h.root)
		_ = f.Detach(t.Context(), nil)
		if _, err := os.Stat(neighbour); err != nil {
			t.Fatalf("%q: %v", path, err)
		}
		if !h.status().Enforcing {
			t.Fatalf("%q: the filter was taken off", path)
		}
	}
	relative := loader.New(filepath.Base(h.pins), h.root)
	t.Chdir("/")
	s, err := relative.Status()
	check(t, err)
	if !s.Enforcing {
		t.Error("the filter is not found any more from another directory")
	}
}

// What is on its way is made anew where another version kept it in another form; after a
// fault it is as it was.
func TestPassingStateOfOtherVersion(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a")
	names := []string{bpf.EgressMapTickets, bpf.EgressMapAdmitted, bpf.EgressMapMails, bpf.EgressMapPermitted, bpf.EgressMapTunnels}
	id := func(name string) ebpf.MapID {
		t.Helper()
		m, err := ebpf.LoadPinnedMap(filepath.Join(h.pins, name), nil)
		check(t, err)
		defer m.Close()
		info, err := m.Info()
		check(t, err)
		id, _ := info.ID()
		return id
	}
	before := map[string]ebpf.MapID{}
	for _, name := range names {
		pin := filepath.Join(h.pins, name)
		check(t, os.Remove(pin))
		pinMap(t, pin, ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
		before[name] = id(name)
	}
	// Who reads does without.
	status := h.status()
	check(t, h.AddState(status))
	if !status.Enforcing || status.Room == nil {
		t.Errorf("got %+v", status)
	}
	h.SetFault(func(step string) error {
		if step == "host_forward4" || strings.HasPrefix(step, "load ") {
			return errInjected
		}
		return nil
	})
	if err := h.attach(withBurst(7)); !errors.Is(err, errInjected) {
		t.Errorf("attach: got %v, want %v", err, errInjected)
	}
	h.SetFault(nil)
	for _, name := range names {
		if id(name) != before[name] {
			t.Errorf("after a fault, map %s is another one", name)
		}
	}
	h.mustAttach(withBurst(7))
	state, err := h.State()
	check(t, err)
	check(t, state.Close())
	o := h.objects()
	h.mustDetach()
	h.nothingLeft(o)
}

// What another version has attached is shown and counted, and can be taken off, with what
// is unknown of it; this one does not attach over it.
func TestPinsOfOtherVersion(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a", "c")
	was := h.snapshot()
	o := h.objects()
	inCgroup, beside := fmt.Sprintf("%s/cgroup-%d/sock_create", h.pins, h.id("a")), filepath.Join(h.pins, "events")
	spec := ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1}
	pinMap(t, beside, spec)
	check(t, os.Mkdir(filepath.Join(h.pins, "listeners"), 0o700))
	pinMap(t, filepath.Join(h.pins, "listeners", "first"), spec)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSock, AttachType: ebpf.AttachCGroupInetSockCreate, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	check(t, err)
	cgroup, err := os.Open(h.paths("a")[0])
	check(t, err)
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(cgroup.Fd()), Program: prog, Attach: ebpf.AttachCGroupInetSockCreate})
	check(t, err)
	check(t, l.Pin(inCgroup))
	check(t, errors.Join(l.Close(), prog.Close(), cgroup.Close()))

	if err := h.attach(withBurst(7), "b"); !errors.Is(err, loader.ErrOtherVersion) {
		t.Errorf("attach: got %v, want %v", err, loader.ErrOtherVersion)
	}
	s := h.status()
	if !s.Enforcing || len(s.Unknown) != 3 || !slices.Contains(s.Unknown, inCgroup) || !slices.Contains(s.Unknown, beside) {
		t.Errorf("status: enforcing %v, unknown pins %v", s.Enforcing, s.Unknown)
	}
	h.counters()
	h.mustDetach("c")
	if got := h.status(); !got.Enforcing || len(got.Cgroups) != 1 {
		t.Errorf("after detach from c: %+v", got)
	}
	h.mustDetach()
	h.nothingLeft(o)
	h.mustAttach(withBurst(5), "a", "c")
	if now := h.snapshot(); len(now) != len(was) {
		t.Errorf("attached again: %v, was %v", now, was)
	}
}

// A pin that somebody has removed changes no answer but its own hook's, and nothing that
// is counted; the next attach makes it anew.
func TestMissingPins(t *testing.T) {
	h := newHost(t)
	h.mkdir("own.slice/docker-" + id + ".scope")
	h.mustAttach(policy.Default(), "own.slice", "a")
	container := h.id("own.slice/docker-" + id + ".scope")
	state, err := h.State()
	check(t, err)
	limit := policy.Limit{Rate: policy.Rate{Count: 7, Period: time.Hour}, Burst: 7}
	check(t, state.SetLimit(container, limit))
	check(t, state.Close())
	kept := func(after string) {
		t.Helper()
		known, _ := h.counters()
		if c, ok := known[container]; !ok || statemaps.PolicyLimit(c.Limit) != limit {
			t.Errorf("%s: got %+v", after, known)
		}
	}
	pins := h.pinned()
	for _, name := range pins {
		if strings.HasSuffix(name, "/") || name == h.pins {
			continue
		}
		t.Run(name, func(t *testing.T) {
			check(t, os.Remove(filepath.Join(h.pins, name)))
			s := h.status()
			isMap := slices.Contains(statemaps.StateNames(), name)
			if isMap && (!s.Enforcing || !slices.Equal(s.Unpinned, []string{name})) {
				t.Errorf("status without the map's pin: %+v", s)
			}
			if !isMap && s.Enforcing && s.Optional(loader.Hook{Name: name}) == strings.Contains(name, "/") {
				t.Errorf("status without the link: %+v", s)
			}
			kept("without the pin")
			check(t, h.AddState(s))
			h.mustAttach(policy.Default())
			kept("attached again")
			if got := h.pinned(); !slices.Equal(got, pins) {
				t.Errorf("pinned after the next attach: %v, want %v", got, pins)
			}
		})
	}
}

// A process that is killed may leave the link that is about to be the new one.
func TestLeftoverRelease(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withBurst(5), "a")
	pin := filepath.Join(h.pins, bpf.CgroupsProgRelease)
	leave := func() {
		t.Helper()
		check(t, os.Rename(pin, pin+"-next"))
	}
	leave()
	h.mustAttach(withBurst(5))
	if pins := h.pinned(); slices.Contains(pins, "release-next") || !slices.Contains(pins, "release") {
		t.Errorf("got pins %v, want release alone", pins)
	}
	o := h.objects()
	leave()
	h.mustDetach()
	h.nothingLeft(o)
}
