package loader_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/policy"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// withBurst is a policy that differs from others by its burst.
// withBurst leaves the host side off, which takes the kernel most of an attach to verify.
func withBurst(burst uint32) policy.Policy {
	p := withDefences(burst)
	p.HostSide = policy.Off
	return p
}

func withDefences(burst uint32) policy.Policy {
	p := policy.Default()
	p.SMTP.Burst = burst
	return p
}

// faultAt has the n-th step from now on do something, and returns the steps
// that are taken until then. Those in which something is only tried are not among
// them.
func faultAt(f *loader.Filter, n int, do func() error) *[]string {
	steps := new([]string)
	f.SetFault(func(step string) error {
		if strings.HasPrefix(step, loader.TryStep) {
			return nil
		}
		*steps = append(*steps, step)
		if len(*steps) == n {
			return do()
		}
		return nil
	})
	return steps
}

var errInjected = errors.New("injected")

// stride is from one step that a test tries to the next. Where programs take
// long to load, not all are tried.
func stride() int {
	if testing.Short() {
		return 4
	}
	return 1
}

// releaseStep may fail, and so may the other softSteps, which come with it at the end:
// the filter works without what they do.
const releaseStep = "pin release"

var softSteps = []string{"pin recognise", "pin keep", releaseStep, "unpin keep", "unpin release"}

func failRelease(f *loader.Filter) {
	f.SetFault(func(step string) error {
		if step == releaseStep {
			return errInjected
		}
		return nil
	})
}

// failAtEachStep runs do with an error at its first step, its second, and so on, and checks
// after each that nothing has changed. It returns all steps. It ends with a step that may fail,
// unless again makes what was there before.
func (h *host) failAtEachStep(do func() error, again ...func()) []string {
	h.t.Helper()
	before := h.snapshot()
	for n := 1; ; n += stride() {
		steps := faultAt(h.Filter, n, func() error { return errInjected })
		err := do()
		soft := len(*steps) >= n && slices.Contains(softSteps, (*steps)[n-1])
		if len(*steps) < n || soft && len(again) == 0 {
			h.SetFault(nil)
			check(h.t, err)
			return *steps
		}
		if soft {
			h.SetFault(nil)
			check(h.t, err)
			again[0]()
			before = h.snapshot()
			continue
		}
		step := (*steps)[n-1]
		if !errors.Is(err, errInjected) || strings.Contains(err.Error(), "restore") {
			h.t.Fatalf("error in %q: got %v", step, err)
		}
		h.unchanged(before, "an error in "+step)
		if h.t.Failed() {
			h.t.FailNow()
		}
	}
}

// hookSteps are the steps in which the hooks of a cgroup are attached.
func (h *host) hookSteps(name string) (steps []string) {
	rel, err := h.root.Rel(h.paths(name)[0])
	check(h.t, err)
	for _, hook := range loader.HookNames() {
		steps = append(steps, hook+" of "+rel)
	}
	return steps
}

func (h *host) mustInclude(steps []string, want ...string) {
	h.t.Helper()
	for _, step := range want {
		if !slices.Contains(steps, step) {
			h.t.Errorf("there is no step %q in %q", step, steps)
		}
	}
}

func TestErrorInFreshAttach(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.mkdir("a")
	steps := h.failAtEachStep(func() error { return h.attach(withBurst(5), "a", "new/b") })
	h.mustInclude(steps, append(h.hookSteps("a"), h.hookSteps("new/b")...)...)
	if s := h.status(); !s.Enforcing || len(s.Cgroups) != 2 {
		t.Errorf("got status %+v, want two cgroups in force", s)
	}

	h.mustDetach()
	failRelease(h.Filter)
	h.mustAttach(withBurst(5), "a")
	if row := h.hook("release", ""); row.Attached || row.Reason == "" {
		t.Errorf("got %+v, want that it is not attached, and why", row)
	}
	h.SetFault(nil)
	if h.mustAttach(withBurst(5)); !h.hook("release", "").Attached {
		t.Error("the next attach did not complete it")
	}
}

func TestErrorInSwap(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.mustAttach(withBurst(5), "a", "b")
	steps := h.failAtEachStep(func() error { return h.attach(withBurst(7), "new/c", "a") })
	h.mustInclude(steps, append(h.hookSteps("a"), append(h.hookSteps("b"), h.hookSteps("new/c")...)...)...)
	if s := h.status(); !s.Enforcing || len(s.Cgroups) != 3 || s.Policy.SMTP.Burst != 7 {
		t.Errorf("got status %+v, want three cgroups in force with the new policy", s)
	}
	release := h.hook("release", "")
	failRelease(h.Filter)
	h.mustAttach(withBurst(9))
	if now := h.hook("release", ""); now != release {
		t.Errorf("got %+v, want the one from before: %+v", now, release)
	}
}

// The cgroup of a filter may be removed and made anew. What was left of it is
// cleaned up last, and all else is as before if that fails.
func TestErrorInRepolicing(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.mustAttach(withBurst(5), "a", "b")
	was := h.hook("egress", "a")
	h.rmdir("b")
	h.mkdir("b")
	for n := 1; ; n += stride() {
		steps := faultAt(h.Filter, n, func() error { return errInjected })
		err := h.attach(withBurst(7))
		if len(*steps) < n {
			check(t, err)
			break
		}
		if step := (*steps)[n-1]; err == nil && !slices.Contains(softSteps, step) || err != nil && !errors.Is(err, errInjected) {
			t.Fatalf("error in %q: got %v", step, err)
		} else if now := h.hook("egress", "a"); err != nil && now != was {
			t.Fatalf("after an error in %q, %+v has become %+v", step, was, now)
		} else if err == nil {
			was = now
		}
	}
	if got := h.policed(); !slices.Equal(got, []string{"a", "b"}) || !h.status().Enforcing {
		t.Errorf("%v are policed, want a and b, in force", got)
	}
}

// The boundary stays until all else is off, and the next detach goes on.
func TestErrorInDetach(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	for n := range len(loader.HookNames()) {
		h.mustAttach(withBurst(5), "a")
		o := h.objects()
		faultAt(h.Filter, n+1, func() error { return errInjected })
		if err := h.Detach(t.Context(), nil); !errors.Is(err, errInjected) {
			t.Fatalf("error in step %d: got %v", n+1, err)
		}
		h.SetFault(nil)
		for i, name := range loader.HookNames() {
			if row := h.hook(name, "a"); row.Attached != (i < len(loader.HookNames())-n) {
				t.Errorf("after an error in step %d: %+v", n+1, row)
			}
		}
		h.mustDetach()
		h.nothingLeft(o)
	}
}

// A victim is this program in a process that kills itself at a step.
const victimVar = "LOADER_TEST_VICTIM"

func victim(args []string) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return fail(err)
	}
	action, pins, root, cgroups := args[1], args[2], args[3], args[4:]
	f := loader.New(pins, cgroup.Root(root))
	var steps *[]string
	steps = faultAt(f, n, func() error {
		fmt.Println((*steps)[n-1])
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // until it arrives
	})
	switch action {
	case "detach":
		err = f.Detach(context.Background(), cgroups)
	case "hand over":
		err = f.HandOver(context.Background())
	default:
		err = f.Attach(context.Background(), cgroups, withBurst(7))
	}
	if err != nil {
		return fail(err)
	}
	return 0
}

// killAt attaches or detaches in a process that is killed at the n-th step,
// which it returns; "" if there are fewer steps.
func (h *host) killAt(n int, action string, names ...string) (step string) {
	h.t.Helper()
	args := append([]string{strconv.Itoa(n), action, h.pins, string(h.root)}, h.paths(names...)...)
	cmd := exec.CommandContext(h.t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), victimVar+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	step = strings.TrimSpace(stdout.String())
	killed := cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
	if killed != (step != "") || !killed && err != nil {
		h.t.Fatalf("%s, to be killed at step %d: %v\n%s", action, n, err, &stderr)
	}
	return step
}

// killAtEachStep kills do at its first step, its second, and so on, each time
// after prepare, and checks that the next attach completes it, and that the
// detach after that leaves nothing.
func killAtEachStep(h *host, action string, prepare func(), names, want []string) {
	h.t.Helper()
	for n := 1; ; n += stride() {
		prepare()
		before := h.status()
		step := h.killAt(n, action, names...)
		after := h.status()
		for _, row := range before.Hooks {
			i := slices.IndexFunc(after.Hooks, func(now loader.Hook) bool { return now.Name == row.Name && now.Cgroup == row.Cgroup })
			exchanged := row.Cgroup == "" || row.Name == loader.FamiliesHook // for another link
			if action == "attach" && !after.Optional(row) && (i < 0 || !after.Hooks[i].Attached || after.Hooks[i].Link != row.Link && !exchanged) {
				h.t.Errorf("killed at %q: %+v is not in force any more: %+v", step, row, after.Hooks)
			}
		}
		s := h.mustAttach(withBurst(9), names...)
		if got := h.policed(); !slices.Equal(got, want) || s.Policy.SMTP.Burst != 9 {
			h.t.Errorf("killed at %q, then attached: %v are policed, want %v: %+v", step, got, want, s)
		}
		for _, row := range s.Hooks {
			if !row.Attached {
				h.t.Errorf("killed at %q, then attached: %+v is not", step, row)
			}
		}
		o := h.objects()
		h.mustDetach()
		h.nothingLeft(o)
		h.rmdir(want...)
		if h.t.Failed() {
			h.t.FailNow()
		}
		if step == "" {
			if n <= len(loader.HookNames()) {
				h.t.Errorf("only %d steps", n-1)
			}
			return
		}
	}
}

func TestKilledInFreshAttach(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	killAtEachStep(h, "attach", func() { h.mkdir("a") }, []string{"a", "b"}, []string{"a", "b"})
}

func TestKilledInSwap(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	killAtEachStep(h, "attach", func() { h.mustAttach(withBurst(5), "a", "b") }, []string{"c"}, []string{"a", "b", "c"})
}

func TestKilledInDetach(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	killAtEachStep(h, "detach", func() { h.mustAttach(withBurst(5), "a") }, []string{"a"}, []string{"a"})
}

// Status does not show one policy where an interrupted attach has left two.
func TestStatusAfterKill(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	seen := false
	for n := 1; ; n++ {
		h.mustAttach(withBurst(5), "a", "b")
		step := h.killAt(n, "attach")
		s := h.status()
		bursts := map[uint32]int{}
		for _, row := range s.Hooks {
			if row.Cgroup != "" && row.Name != loader.FamiliesHook {
				bursts[loader.ProgramBurst(ebpf.ProgramID(row.Program))]++
			}
		}
		mixed := len(bursts) > 1
		seen = seen || mixed
		if s.Enforcing == mixed {
			t.Errorf("killed at %q: enforcing %v with policies %v", step, s.Enforcing, bursts)
		}
		for _, row := range s.Hooks {
			older := mixed && row.Cgroup != "" && loader.ProgramBurst(ebpf.ProgramID(row.Program)) == 5
			if row.Name != loader.FamiliesHook && row.Attached && older != (row.Reason != "") {
				t.Errorf("killed at %q: %+v, older: %v", step, row, older)
			}
		}
		if step == "" {
			break
		}
	}
	if !seen {
		t.Error("no kill has left two policies")
	}
}

// What a killed attach has left is no obstacle to a detach.
func TestDetachAfterKill(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	for _, n := range []int{1, 3, 6, 9, 14} {
		h.mkdir("a", "b")
		if step := h.killAt(n, "attach", "a", "b"); step == "" {
			t.Fatalf("there is no step %d", n)
		}
		o := h.objects()
		h.mustDetach()
		h.nothingLeft(o)
	}
}

// failDefences has nothing be in the kernel that stands beside the hooks.
func failDefences(f *loader.Filter) {
	f.SetFault(func(step string) error {
		if strings.HasPrefix(step, loader.TryStep) {
			return errInjected
		}
		return nil
	})
}

// refuseSockets puts a link in the place of the one that refuses sockets, which the
// kernel of the test's machine may not be able to have; a link is all that counts here.
func (h *host) refuseSockets(name string) {
	h.t.Helper()
	pin := fmt.Sprintf("%s/cgroup-%d/%s", h.pins, h.id(name), loader.FamiliesHook)
	if _, err := os.Stat(pin); err == nil {
		return
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetIngress, License: "MIT",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	check(h.t, err)
	defer prog.Close()
	dir, err := os.Open(h.paths(name)[0])
	check(h.t, err)
	defer dir.Close()
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: prog, Attach: ebpf.AttachCGroupInetIngress})
	check(h.t, err)
	defer l.Close()
	check(h.t, l.Pin(pin))
}

func (h *host) defence(name string) loader.Defence {
	h.t.Helper()
	for _, d := range h.status().Defences {
		if d.Name == name {
			return d
		}
	}
	h.t.Fatalf("status does not tell of %s", name)
	return loader.Defence{}
}

// What stands beside the hooks stays in force when a later attach cannot have it
// anew, and status says that it is of an older one, and why.
func TestDefencesAreKept(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.mustAttach(withDefences(5), "a")
	h.refuseSockets("a")
	hostSide := hasNetfilter(t)
	row := func(name string) loader.Hook {
		t.Helper()
		if name == loader.FamiliesHook {
			return h.hook(name, "a")
		}
		return h.hook(name, "")
	}
	names := []string{loader.FamiliesHook}
	if hostSide {
		names = append(names, loader.HostHookNames()...)
	}
	before := map[string]loader.Hook{}
	for _, name := range names {
		before[name] = row(name)
	}
	expect := func(active bool, reasons ...string) {
		t.Helper()
		for _, name := range names {
			if now := row(name); now != before[name] {
				t.Errorf("got %+v, want it untouched: %+v", now, before[name])
			}
		}
		for _, name := range []string{"socket_families", "host_side"} {
			d := h.defence(name)
			if name == "host_side" && !hostSide {
				continue
			}
			if d.Active != active {
				t.Errorf("got %+v, want active: %v", d, active)
			}
			for _, reason := range reasons {
				if !strings.Contains(d.Reason, reason) {
					t.Errorf("got %+v, want it to say %q", d, reason)
				}
			}
		}
	}

	failDefences(h.Filter)
	for burst := range uint32(2) {
		h.mustAttach(withDefences(7 + burst))
		expect(true, "older attach", errInjected.Error())
	}
	// Another cgroup gets none, and does not take what the first one has.
	h.mustAttach(withDefences(5), "b")
	if d := h.defence("socket_families"); d.Active || !strings.Contains(d.Reason, errInjected.Error()) {
		t.Errorf("got %+v, want that b has none, and why", d)
	}
	h.mustDetach("b")
	h.SetFault(nil)
	if hostSide {
		if d := h.defence("host_side"); !d.Active || !strings.Contains(d.Reason, "attach again") {
			t.Errorf("got %+v, want that it can be renewed now", d)
		}
	}

	// A policy that does without them has its way.
	failDefences(h.Filter)
	without := withDefences(5)
	without.Families, without.HostSide = policy.AnyFamily, policy.Off
	for _, hook := range h.mustAttach(without).Hooks {
		if _, ok := before[hook.Name]; ok {
			t.Errorf("turned off, and still there: %+v", hook)
		}
	}
	for _, name := range []string{"socket_families", "host_side"} {
		if d := h.defence(name); d.Active || !strings.Contains(d.Reason, "turned off") {
			t.Errorf("got %+v, want it turned off", d)
		}
	}
}

// What only audits is no defence where the policy is to be enforced.
func TestKeptDefenceOfAudit(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	audit := withDefences(5)
	audit.Mode = policy.Audit
	check(t, h.attach(audit, "a"))
	had := map[string]bool{}
	for _, d := range h.status().Defences {
		had[d.Name] = d.Active
	}
	failDefences(h.Filter)
	h.mustAttach(withDefences(5))
	for _, name := range []string{"socket_families", "host_side"} {
		if d := h.defence(name); had[name] && (d.Active || !strings.Contains(d.Reason, "mode audit")) {
			t.Errorf("got %+v, want that it only audits", d)
		}
	}
	h.SetFault(nil)
	h.mustAttach(withDefences(5))
	for _, name := range []string{"socket_families", "host_side"} {
		if d := h.defence(name); had[name] && (!d.Active || d.Reason != "") {
			t.Errorf("attached again: got %+v", d)
		}
	}
}

// A process of a policed cgroup makes no packet socket while the defence is kept.
func TestKeptFamiliesRefuse(t *testing.T) {
	h := newHost(t)
	h.mustAttach(withDefences(5), "a")
	if !h.defence("socket_families").Active {
		t.Logf("this kernel refuses no sockets: %s", h.defence("socket_families").Reason)
	}
	refuses := h.defence("socket_families").Active
	failDefences(h.Filter)
	h.mustAttach(withDefences(7))
	h.mkdir("a/web")
	testenv.Enter(t, h.paths("a/web")[0])
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	if errors.Is(err, unix.EPERM) != refuses {
		t.Errorf("got %v, want it refused: %v", err, refuses)
	}
	if n := h.denied("a/web"); n != uint64(btoi(refuses)) {
		t.Errorf("%d refused sockets are counted", n)
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (h *host) denied(name string) uint64 {
	h.t.Helper()
	containers, _ := h.counters()
	return containers[h.id(name)].Counters.FamiliesDenied
}
