package hardened

import (
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/preflight"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

var guestFlag = flag.Bool("guest", false, "this is a virtual machine: change settings that hold until the next boot")

// guest is for tests that leave the machine changed.
func guest(t *testing.T) {
	t.Helper()
	if !*guestFlag {
		t.Skip("it changes settings that hold until the next boot: see -guest")
	}
	for dir, typ := range map[string]string{"/sys/fs/bpf": "bpf", "/sys/kernel/security": "securityfs"} {
		if err := unix.Mount(typ, dir, typ, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			t.Fatalf("mount %s: %v", dir, err)
		}
	}
}

// set sets sysctls. A kernel without one is an error.
func set(t *testing.T, settings map[string]string) {
	t.Helper()
	for name, value := range settings {
		check(t, os.WriteFile("/proc/sys/"+name, []byte(value), 0))
	}
}

// everythingInForce checks that an attach puts all in force that the kernel can have.
func (h *host) everythingInForce(p *prober, when string) {
	h.t.Helper()
	o := h.must("attach")
	p.policed(true, when)
	s := h.status()
	if !s.Enforcing {
		h.t.Errorf("%s: not enforcing: %+v", when, s)
	}
	for _, name := range []string{loader.SocketFamilies, loader.HostSide} {
		if d := defence(h.t, s, name); !d.Active {
			h.t.Errorf("%s: got %+v, %v", when, d, o)
		}
	}
	for _, row := range s.Hooks {
		if !row.Attached {
			h.t.Errorf("%s: got %+v", when, row)
		}
	}
}

// What hardening guides set takes nothing from the filter.
func TestHardenedSettings(t *testing.T) {
	guest(t)
	h := newHost(t)
	p := newProber(t, h.policed)
	set(t, map[string]string{
		"kernel/kptr_restrict": "2", "net/core/bpf_jit_harden": "2", "kernel/perf_event_paranoid": "3", "kernel/yama/ptrace_scope": "3",
		// From 1 there is no way back before the next boot; 2 differs only in that.
		"kernel/unprivileged_bpf_disabled": "1",
	})
	check(t, unix.Mount("", "/proc", "", unix.MS_REMOUNT, "hidepid=2"))
	check(t, unix.Mount("", "/sys", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	defer func() { check(t, unix.Mount("", "/sys", "", unix.MS_REMOUNT, "")) }()
	h.everythingInForce(p, "with hardened settings")
}

// In a mount namespace with a bpf filesystem of its own, as systemd's PrivateBPF= makes one, the
// filter would end with the service.
func TestPrivateMount(t *testing.T) {
	guest(t)
	h := newHost(t)
	p := newProber(t, h.policed)
	h.wrap = []string{"unshare", "--mount", "sh", "-c", `mount -t bpf bpf /sys/fs/bpf && exec timeout 600 "$@"`, "-"}
	h.pins = "/sys/fs/bpf/private"
	if o := h.run("run", "--cgroup="+h.policed); o.code != 3 || !strings.Contains(o.stderr, "not the host's bpf filesystem") {
		t.Errorf("run: got %v", o)
	}
	p.policed(false, "refused")
	if o := h.run("attach"); !strings.Contains(o.stderr, "the filter ends with this mount namespace") {
		t.Errorf("attach: got %v", o)
	}
	h.wrap = nil
}

// Without the JIT compiler, the netfilter programs of the host side cannot be loaded, since they call
// the kernel's functions. The program of older kernels does their work.
func TestNoJIT(t *testing.T) {
	guest(t)
	h := newHost(t)
	p := newProber(t, h.policed)
	set(t, map[string]string{"net/core/bpf_jit_harden": "0", "net/core/bpf_jit_enable": "0"})
	defer set(t, map[string]string{"net/core/bpf_jit_enable": "1"})
	h.everythingInForce(p, "without the JIT compiler")
	if d := defence(t, h.status(), loader.HostSide); !strings.Contains(d.Reason, "JIT compiler") {
		t.Errorf("got %+v", d)
	}
}

// A locked-down kernel: check foretells what attach and status say.
func TestLockdown(t *testing.T) {
	guest(t)
	confidential := loader.LockedDown()
	h := newHost(t)
	r := h.report(h.run("check", "--cgroup="+h.policed, "--output=json"))
	if c := h.result(r, "recognise"); (c.Result == preflight.OK) == confidential || confidential && !strings.Contains(c.Detail, "locked down") {
		t.Errorf("got %+v", c)
	}
	o := h.run("attach")
	if want := map[bool]int{false: 0, true: 3}[confidential]; o.code != want || confidential && !strings.Contains(o.stderr, "locked down (lockdown=confidentiality)") {
		t.Errorf("attach to a slice: got %v", o)
	}
	if s := h.status(); s.Enforcing == confidential {
		t.Errorf("got %+v", s)
	}
	h.must("detach")
	h.policed = testenv.Cgroup(t)
	p := newProber(t, h.policed)
	h.must("attach", "--scopes=any")
	p.policed(true, "locked down")
	for _, d := range h.status().Defences {
		i := slices.IndexFunc(r.Defences, func(c loader.Defence) bool { return c.Name == d.Name })
		if i < 0 || r.Defences[i].Active != d.Active {
			t.Errorf("status says %+v, and check %+v", d, r.Defences)
		}
		t.Log(d)
	}
}

// Without the kernel's BTF, containers cannot be told from services beside them, and attach says
// what to do. What it says works.
func TestNoBTF(t *testing.T) {
	h := newHost(t)
	if found, _ := filepath.Glob("/boot/vmlinux-*"); len(found) > 0 {
		t.Fatalf("the library would find BTF in %s", found)
	}
	h.wrap = []string{"unshare", "--mount", "sh", "-c", `mount -t tmpfs none /sys/kernel/btf && exec "$@"`, "-"}
	r := h.report(h.run("check", "--cgroup="+h.policed, "--output=json"))
	if c := h.result(r, "recognise"); r.Ready || c.Result != preflight.Fail || !strings.Contains(c.Detail, "containers cannot be told from services") {
		t.Errorf("got %+v", c)
	}
	o := h.run("attach")
	if o.code != 3 || !strings.Contains(o.stderr, loader.ErrCannotRecognise.Error()) || !strings.Contains(o.stderr, "name that with --cgroup") {
		t.Errorf("attach to a slice: got %v", o)
	}
	if _, err := os.Stat(h.pins); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there are pins: %v", err)
	}

	h.policed = testenv.Cgroup(t)
	p := newProber(t, h.policed)
	o = h.must("attach", "--scopes=any")
	p.policed(true, "without BTF")
	s := h.status()
	if !s.Enforcing {
		t.Errorf("got %+v", s)
	}
	for _, row := range s.Hooks {
		if !row.Attached && !strings.Contains(o.stderr, "hook "+row.Name) {
			t.Errorf("got %+v, and attach did not tell: %v", row, o)
		}
	}
	for _, d := range s.Defences {
		if !d.Active && !strings.Contains(o.stderr, "no defence "+d.Name) {
			t.Errorf("got %+v, and attach did not tell: %v", d, o)
		}
		t.Log(d)
	}
	t.Log(rows(s))
}

// confine loads a profile of AppArmor that allows everything but denied, and has the command run
// with it.
func (h *host) confine(denied string) {
	h.t.Helper()
	profile := "profile egressbpf-test flags=(attach_disconnected) { file, network, unix, mount, umount, signal, ptrace, capability, " + denied + " }\n"
	path := filepath.Join(h.t.TempDir(), "profile")
	check(h.t, os.WriteFile(path, []byte(profile), 0o600))
	if o := execute(h.t, "apparmor_parser", "--replace", "--skip-cache", path); o.code != 0 {
		h.t.Fatalf("load the profile: %v", o)
	}
	h.wrap = []string{"/bin/sh", "-c", `echo exec egressbpf-test >/proc/self/attr/exec && exec "$@"`, "-"}
}

// What AppArmor denies is told as that, by attach and by check.
func TestAppArmor(t *testing.T) {
	guest(t)
	h := newHost(t)
	for _, denied := range []string{"deny capability bpf, deny capability sys_admin,", "deny " + filepath.Dir(h.pins) + "/** w,"} {
		h.confine(denied)
		o := h.run("attach")
		if o.code != 1 || !strings.Contains(o.stderr, "AppArmor, by the profile egressbpf-test (enforce)") {
			t.Errorf("%s: got %v", denied, o)
		}
		h.wrap = nil
		if s := h.status(); s.Enforcing || len(s.Hooks) > 0 {
			t.Errorf("%s: got %+v", denied, s)
		}
	}
	// It does not judge a host that it may not look at.
	h.confine("deny capability bpf, deny capability sys_admin,")
	if o := h.run("check", "--output=json"); o.code != 1 || o.stdout != "" || !strings.Contains(o.stderr, "AppArmor, by the profile egressbpf-test (enforce)") {
		t.Errorf("check: got %v", o)
	}
}
