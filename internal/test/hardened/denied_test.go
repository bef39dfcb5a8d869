package hardened

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/preflight"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// refuse refuses some commands of bpf(2), or all, as a security module or a seccomp filter does.
func refuse(errno unix.Errno, commands ...int) func(int, call) unix.Errno {
	return func(_ int, c call) unix.Errno {
		if c.bpf(commands...) {
			return errno
		}
		return 0
	}
}

// Where something refuses bpf(2) to a process with all capabilities, attach says what that may
// be, and neither that the kernel cannot do it nor that the process should be root.
func TestRefused(t *testing.T) {
	h := newHost(t)
	for name, decide := range map[string]func(int, call) unix.Errno{
		"all, EPERM":              refuse(unix.EPERM),
		"all, EACCES":             refuse(unix.EACCES),
		"maps, EACCES":            refuse(unix.EACCES, unix.BPF_MAP_CREATE),
		"programs, EPERM":         refuse(unix.EPERM, unix.BPF_PROG_LOAD),
		"programs, EACCES":        refuse(unix.EACCES, unix.BPF_PROG_LOAD),
		"pins, EACCES":            refuse(unix.EACCES, unix.BPF_OBJ_PIN),
		"tracing programs, EPERM": func(_ int, c call) unix.Errno { return errnoIf(c.what == "PROG_LOAD recognise", unix.EPERM) },
	} {
		o := supervise(t, decide, h.binary, h.args("attach")...)
		// The supervisor is a seccomp filter.
		if o.code != 1 || !strings.Contains(o.stderr, "a seccomp filter of this process") {
			t.Errorf("%s: got %v", name, o)
		}
		for _, wrong := range []string{"MEMLOCK", "needs root", "please report", "cannot tell containers"} {
			if strings.Contains(o.stderr, wrong) {
				t.Errorf("%s: misleading, %q: %v", name, wrong, o)
			}
		}
		if s := h.status(); s.Enforcing || len(s.Hooks) > 0 {
			t.Errorf("%s: got status %+v", name, s)
		}
	}
}

func errnoIf(when bool, errno unix.Errno) unix.Errno {
	if when {
		return errno
	}
	return 0
}

// What is refused to a later attach leaves in force what was in force, and so do refused
// readers.
func TestRefusedInForce(t *testing.T) {
	h := newHost(t)
	p := newProber(t, h.policed)
	h.must("attach")
	for _, errno := range []unix.Errno{unix.EPERM, unix.EACCES} {
		for _, command := range []string{"attach", "status", "stats", "detach"} {
			o := supervise(t, refuse(errno), h.binary, h.args(command)...)
			if o.code != 1 || !strings.Contains(o.stderr, "a seccomp filter of this process") || o.stdout != "" {
				t.Errorf("%s, %v: got %v", command, errno, o)
			}
		}
		p.policed(true, errno.Error())
		if s := h.status(); !s.Enforcing {
			t.Errorf("%v: got %+v", errno, s)
		}
	}
}

// report runs check and returns what it says as JSON.
func (h *host) report(o outcome) *preflight.Report {
	h.t.Helper()
	r := new(preflight.Report)
	if err := json.Unmarshal([]byte(o.stdout), r); err != nil {
		h.t.Fatalf("check: %v: %v", err, o)
	}
	if r.Ready != (o.code == 0) || !r.Ready && o.code != 3 {
		h.t.Errorf("check: ready is %v: %v", r.Ready, o)
	}
	return r
}

func (h *host) result(r *preflight.Report, name string) preflight.Check {
	h.t.Helper()
	i := slices.IndexFunc(r.Checks, func(c preflight.Check) bool { return c.Name == name })
	if i < 0 {
		h.t.Fatalf("no check %s: %+v", name, r.Checks)
	}
	return r.Checks[i]
}

// check says, defence by defence, what status says after an attach.
func TestCheckAsStatus(t *testing.T) {
	h := newHost(t)
	r := h.report(h.run("check", "--output=json"))
	h.must("attach")
	s := h.status()
	names := func(all []loader.Defence) (names []string) {
		for _, d := range all {
			names = append(names, fmt.Sprint(d.Name, " ", d.Active))
			if d.Active == (d.Reason != "") {
				t.Errorf("got %+v", d)
			}
		}
		slices.Sort(names)
		return names
	}
	if got, want := names(r.Defences), names(s.Defences); !slices.Equal(got, want) {
		t.Errorf("check says %v, and status %v", got, want)
	}
}

// check fails, and says why, where bpf(2) is refused.
func TestCheckRefused(t *testing.T) {
	h := newHost(t)
	for name, decide := range map[string]func(int, call) unix.Errno{
		"programs": refuse(unix.EACCES, unix.BPF_PROG_LOAD),
		"maps":     refuse(unix.EPERM, unix.BPF_MAP_CREATE),
	} {
		r := h.report(supervise(t, decide, h.binary, h.args("check", "--output=json")...))
		if c := h.result(r, "programs"); r.Ready || c.Result != preflight.Fail || !strings.Contains(c.Detail, "a seccomp filter of this process") || strings.Contains(c.Detail, "MEMLOCK") {
			t.Errorf("%s: got %+v", name, c)
		}
		for _, d := range r.Defences {
			if d.Active || d.Reason == "" {
				t.Errorf("%s: got %+v", name, d)
			}
		}
		if len(r.Defences) < 2 {
			t.Errorf("%s: got defences %+v", name, r.Defences)
		}
	}
}

// Too few files that the process may open are told as that.
func TestFewFiles(t *testing.T) {
	h := newHost(t)
	p := newProber(t, h.policed)
	before := allObjects(t)
	for _, n := range []int{12, 20, 28, 37, 45} {
		h.wrap = []string{"/bin/sh", "-c", fmt.Sprintf(`ulimit -n %d; exec "$@"`, n), "-"}
		o := h.run("attach")
		h.wrap = nil
		if o.code != 1 || !strings.Contains(o.stderr, "LimitNOFILE=") {
			t.Errorf("%d files: got %v", n, o)
		}
		if _, err := os.Stat(h.pins); err == nil {
			t.Errorf("%d files: there are pins", n)
		}
		p.policed(false, fmt.Sprint(n, " files"))
		h.nothingNew(before, fmt.Sprint(n, " files"))
	}
	h.must("attach")
	p.policed(true, "in the end")
}

// memoryLimit makes a cgroup that may take so many bytes of memory, the kernel's for BPF objects
// among them (since 5.11), and returns its file of processes.
func memoryLimit(t *testing.T, bytes int) string {
	t.Helper()
	root, file := "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
	if _, err := os.Stat(root); err != nil {
		root, file = string(testenv.Root(t)), "memory.max"
		if err := os.WriteFile(root+"/cgroup.subtree_control", []byte("+memory"), 0); err != nil {
			t.Fatal(err)
		}
	}
	dir := fmt.Sprintf("%s/egressbpf-test-%d-memory", root, os.Getpid())
	check(t, os.Mkdir(dir, 0o755))
	t.Cleanup(func() {
		testenv.Eventually(t, "remove "+dir, func() bool { return unix.Rmdir(dir) != unix.EBUSY })
	})
	check(t, os.WriteFile(dir+"/"+file, fmt.Append(nil, bytes), 0))
	return dir + "/cgroup.procs"
}

// Where the cgroup of the process may take too little memory, what was in force stays in force,
// whether the kernel tells the process or ends it.
func TestMemoryLimit(t *testing.T) {
	h := newHost(t)
	p := newProber(t, h.policed)
	h.must("attach", "--smtp-burst=5")
	told, killed := 0, 0
	// The first is too small for any Go program; where it becomes enough depends on what else has
	// read the command's file, as its pages are charged to the first that does.
	for _, megabytes := range []int{8, 14, 16, 17, 18, 19, 20, 22, 24, 28, 32, 38} {
		when := fmt.Sprint(megabytes, " MB")
		t.Run(when, func(t *testing.T) {
			before := allObjects(t)
			procs := memoryLimit(t, megabytes<<20)
			h.wrap = []string{"/bin/sh", "-c", `echo $$ >` + procs + ` && exec "$@"`, "-"}
			o := h.run("attach", "--smtp-burst=7", "--cgroup="+h.policed)
			h.wrap = nil
			p.policed(true, when)
			s := h.status()
			switch {
			case o.code == 0:
				h.must("attach", "--smtp-burst=5")
				return
			case o.code == 1 && strings.Contains(o.stderr, "memory.max"):
				told++
			case o.code == -1 && o.stderr == "":
				killed++
				return // the next attach completes what it had begun
			default:
				t.Errorf("got %v", o)
			}
			if !s.Enforcing || s.Policy.SMTP.Burst != 5 {
				t.Errorf("got %+v", s)
			}
			h.nothingNew(before, when)
		})
	}
	if told+killed == 0 {
		t.Error("no limit was too small")
	}
	t.Logf("%d were told, and %d killed", told, killed)
	h.must("attach", "--smtp-burst=9")
	if s := h.status(); !s.Enforcing || s.Policy.SMTP.Burst != 9 {
		t.Errorf("in the end: got %+v", s)
	}
}
