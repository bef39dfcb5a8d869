package hardened

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

var (
	stepFlag  = flag.Int("step", 23, "let every `n`-th of the chosen system calls fail; 1 for all, which takes minutes")
	firstFlag = flag.Int("first", 0, "the `index` of the first chosen system call to fail")
	lastFlag  = flag.Int("last", 1<<30, "the `index` of the last chosen system call to fail")
)

// inForce is what attach says if it could put the policy in force and not read it back.
const inForce = "the policy is in force"

func never(int, call) unix.Errno { return 0 }

// at lets the n-th call fail, and those after it that are for the same, if it is one that the
// library tries again.
func at(n int, errno unix.Errno) func(int, call) unix.Errno {
	what := ""
	return func(i int, c call) unix.Errno {
		switch {
		case i == n:
			if what = c.what; !c.bpf(unix.BPF_MAP_CREATE, unix.BPF_PROG_LOAD, unix.BPF_BTF_LOAD, unix.BPF_LINK_CREATE) {
				what = "\x00"
			}
		case i < n || c.what != what:
			what = "\x00"
			return 0
		}
		return errno
	}
}

// choose returns which calls are to fail, by their numbers: of calls that are for the same, the
// first two. There are hundreds that fill maps and read back what is in force.
func choose(calls []call) (chosen []int) {
	seen := map[string]int{}
	for i, c := range calls {
		if seen[c.what]++; seen[c.what] == 1 || seen[c.what] == 2 && c.nr == unix.SYS_BPF {
			chosen = append(chosen, i+1)
		}
	}
	return chosen
}

// failEach runs a command again and again, each time with another system call for which there
// is no memory, and lets judge look at what is left. judge has to bring back what was there.
// The calls are those of the command as it runs without a failure; undo brings back what was
// there after that.
func (h *host) failEach(undo func(), judge func(o outcome, when string), command string, more ...string) {
	h.t.Helper()
	o := supervise(h.t, never, h.binary, h.args(command, more...)...)
	if o.code != 0 {
		h.t.Fatalf("%s: %v", command, o)
	}
	undo()
	calls := o.calls
	chosen := choose(calls)
	h.t.Logf("%s: %d system calls, of which %d are chosen", command, len(calls), len(chosen))
	for i, n := range chosen {
		// Of the library's trials, that of names had the worst consequences.
		if i < *firstFlag || i > *lastFlag || (i-*firstFlag)%*stepFlag != 0 && calls[n-1].what != "MAP_CREATE feature_test" {
			continue
		}
		o := supervise(h.t, at(n, unix.ENOMEM), h.binary, h.args(command, more...)...)
		if len(o.calls) < n {
			// What is read back in the end differs a little each time.
			if o.code != 0 || n < len(calls)*9/10 {
				h.t.Errorf("there is no system call %d of %s: %v", n, command, o)
			}
			judge(o, "without a failure")
			break
		}
		when := fmt.Sprintf("%s, no memory at call %d, %s", command, n, strings.ReplaceAll(o.calls[n-1].what, h.pins, "PINS"))
		if o.code != 0 && (o.code != 1 || !strings.Contains(o.stderr, "cannot allocate memory")) {
			h.t.Errorf("%s: got %v", when, o)
		}
		if strings.Contains(o.stderr, "please report") || strings.Contains(o.stderr, "restore what was in force") {
			h.t.Errorf("%s: misleading: %s", when, o.stderr)
		}
		judge(o, when)
	}
}

// nothingNew checks that the kernel has no other objects than before.
func (h *host) nothingNew(before objects, when string) {
	h.t.Helper()
	if added := addedTo(h.t, before); len(added) > 0 {
		h.t.Fatalf("%s: the kernel still has %s", when, strings.Join(added, ", "))
	}
}

// told checks that what is missing was told by the attach that left it out.
func (h *host) told(s *status, reference *status, o outcome, when string) {
	h.t.Helper()
	for _, d := range reference.Defences {
		if now := defence(h.t, s, d.Name); d.Active && (!now.Active || now.Reason != d.Reason) && !strings.Contains(o.stderr, "defence "+d.Name) {
			h.t.Errorf("%s: %+v, and attach did not tell: %v", when, now, o)
		}
	}
	for _, row := range reference.Hooks {
		i := slices.IndexFunc(s.Hooks, func(now loader.Hook) bool { return now.Name == row.Name && now.Cgroup == row.Cgroup })
		// The hooks of a defence are told of by its name.
		if row.Attached && (i < 0 || !s.Hooks[i].Attached) && !strings.Contains(o.stderr, row.Name) && !strings.Contains(o.stderr, loader.HostSide) {
			h.t.Errorf("%s: %s is missing, and attach did not tell: %v", when, row.Name, o)
		}
	}
}

// A first attach for which there is not enough memory leaves nothing, and says so.
func TestNoMemoryInFirstAttach(t *testing.T) {
	h := newHost(t)
	p := newProber(t, h.policed)
	before := allObjects(t)
	h.must("attach")
	reference := h.status()
	h.must("detach")
	h.failEach(func() { h.must("detach") }, func(o outcome, when string) {
		s := h.status()
		if o.code != 0 && !strings.Contains(o.stderr, inForce) {
			if _, err := os.Stat(h.pins); err == nil {
				t.Errorf("%s: there are pins", when)
			}
			if s.Enforcing || len(s.Cgroups) > 0 {
				t.Errorf("%s: got status %+v", when, s)
			}
			p.policed(false, when)
			h.nothingNew(before, when)
			return
		}
		if !s.Enforcing {
			t.Errorf("%s: not enforcing: %+v, %v", when, s, o)
		}
		h.told(s, reference, o, when)
		p.policed(true, when)
		h.must("detach")
		h.nothingNew(before, when+", then detach")
	}, "attach")
	h.must("attach")
	p.policed(true, "in the end")
}

// What was in force stays in force if there is not enough memory for its successor.
func TestNoMemoryInSwap(t *testing.T) {
	h := newHost(t)
	p := newProber(t, h.policed)
	h.must("attach", "--smtp-burst=5")
	reference := h.status()
	var before *status
	var objects objects
	undo := func() {
		h.must("attach", "--smtp-burst=5")
		before, objects = h.status(), allObjects(t)
	}
	h.failEach(undo, func(o outcome, when string) {
		s := h.status()
		p.policed(true, when)
		if !s.Enforcing {
			t.Errorf("%s: not enforcing: %+v, %v", when, s, o)
		}
		if o.code != 0 && !strings.Contains(o.stderr, inForce) {
			if got, want := rows(s), rows(before); got != want || s.Policy.SMTP.Burst != before.Policy.SMTP.Burst {
				t.Errorf("%s: got\n%s\nwant\n%s", when, got, want)
			}
			h.nothingNew(objects, when)
			return
		}
		h.told(s, reference, o, when)
		// What was kept from the attach before has to be renewed.
		undo()
		for i, d := range before.Defences {
			if d != reference.Defences[i] {
				t.Errorf("%s, then attach: %+v", when, d)
			}
		}
	}, "attach", "--smtp-burst=7")
	h.must("attach", "--smtp-burst=9")
	if s := h.status(); !s.Enforcing || s.Policy.SMTP.Burst != 9 {
		t.Errorf("in the end: got %+v", s)
	}
}

// rows are the hooks of a status, but for their times, which the kernel tells a little
// differently each time.
func rows(s *status) string {
	var text strings.Builder
	for _, row := range s.Hooks {
		row.Since = time.Time{}
		fmt.Fprintf(&text, "%s %v %d %d %s\n", row.Name, row.Attached, row.Program, row.Link, row.Reason)
	}
	for _, d := range s.Defences {
		fmt.Fprintf(&text, "%+v\n", d)
	}
	return text.String()
}

// A detach that fails says so, status does not claim more than holds, and the next detach
// leaves nothing.
func TestNoMemoryInDetach(t *testing.T) {
	h := newHost(t)
	p := newProber(t, h.policed)
	before := allObjects(t)
	h.must("attach")
	h.failEach(func() { h.must("attach") }, func(o outcome, when string) {
		s := h.status()
		if o.code != 0 {
			// The boundary is detached last. Then its pin may be left.
			egress := slices.ContainsFunc(s.Hooks, func(row loader.Hook) bool { return row.Name == "egress" && row.Attached })
			p.policed(egress, when)
			if s.Enforcing && !egress {
				t.Errorf("%s: enforcing: %+v", when, s)
			}
		} else {
			p.policed(false, when)
			h.nothingNew(before, when)
		}
		h.must("detach")
		testenv.Eventually(t, "detach", func() bool { _, err := os.Stat(h.pins); return os.IsNotExist(err) })
		h.nothingNew(before, when+", then detach")
		h.must("attach")
	}, "detach")
}
