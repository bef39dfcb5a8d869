package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/charmbracelet/x/ansi"

	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// window is a terminal of tmux in which a command runs.
type window struct {
	*testing.T
	socket string
}

// openWindow runs a shell command in a terminal of 80 columns and 24 lines, which says in the
// end with which code the command has exited.
func openWindow(t *testing.T, command string) *window {
	t.Helper()
	w := &window{t, filepath.Join(t.TempDir(), "tmux")}
	w.tmux("-u", "-f", os.DevNull, "new-session", "-d", "-x", "80", "-y", "24", command+`; echo "exit code $?"; exec sleep 600`)
	t.Cleanup(func() { w.tmux("kill-server") })
	return w
}

func (w *window) tmux(args ...string) string {
	w.Helper()
	out, err := exec.Command("tmux", append([]string{"-S", w.socket}, args...)...).CombinedOutput()
	if err != nil {
		w.Fatalf("tmux %s: %v: %s", args, err, out)
	}
	return strings.TrimRight(string(out), "\n")
}

func (w *window) press(keys ...string) { w.tmux(append([]string{"send-keys"}, keys...)...) }

// shows waits until a pattern is on the screen, and returns what the screen shows. Before each
// look it calls what there is to call.
func (w *window) shows(pattern string, calls ...func()) string {
	w.Helper()
	var screen string
	defer func() {
		if w.Failed() {
			w.Logf("the screen:\n%s", screen)
		}
	}()
	expr := regexp.MustCompile("(?m)" + pattern)
	testenv.Eventually(w, "the screen shows "+strconv.Quote(pattern), func() bool {
		for _, call := range calls {
			call()
		}
		screen = w.tmux("capture-pane", "-p")
		return expr.MatchString(screen)
	})
	return screen
}

// TestTop looks at the real screen while containers are refused.
func TestTop(t *testing.T) {
	const (
		wide    = "日本語のコンテナ"
		hostile = "x\x1b]2;owned\a\x1b[2J"
	)
	base := newBase(t)
	for _, name := range []string{"web", wide, hostile, "idle"} {
		testenv.Child(t, base, name)
	}
	attach := func() {
		t.Helper()
		if code, _, stderr := execute(t.Context(), "attach", "--cgroup", base, "--scopes", "any"); code != exitDone {
			t.Fatalf("attach: exit code %d: %s", code, stderr)
		}
	}
	attach()
	refuse := func(name string) {
		t.Helper()
		if out, err := testenv.Command(t, filepath.Join(base, name), "connect", "169.254.169.254:80").CombinedOutput(); err == nil {
			t.Fatalf("%s is not refused: %s", name, out)
		}
	}

	w := openWindow(t, "egressbpf top --interval 100ms")
	w.shows(`^enforcing  0 refused/s  0 in all  4 containers  +\S+, egressbpf `)
	for range 3 {
		refuse("web")
	}
	w.shows(`^web +0 +3 blocked .* 169\.254\.169\.254:80 +connect`)
	refuse(hostile)
	w.shows(`^"x\S* +0 +1 blocked`)
	refuse(wide)
	screen := w.shows(`^日本語\S* +0 +1 blocked`)
	// The row that was refused last comes first, and no name moves the columns.
	rows := strings.Split(screen, "\n")[3:7]
	for i, want := range []string{`^日本語`, `^"x\\x1b\]2;`, `^web +0 +3 blocked +5\.0/5 +\d+s`, `^idle +0 +0 +5\.0/5`} {
		if !regexp.MustCompile(want).MatchString(rows[i]) {
			t.Errorf("row %d is %q, want %s", i, rows[i], want)
		}
		if before, _, ok := strings.Cut(rows[i], "5.0/5"); !ok || ansi.StringWidth(before) != len("CONTAINER      NOW/S  TOTAL WHY           TOKENS")-len("5.0/5") {
			t.Errorf("row %d is not in its columns: %q", i, rows[i])
		}
	}
	if title := w.tmux("display-message", "-p", "#{pane_title}"); strings.Contains(title, "owned") {
		t.Errorf("a container has set the terminal's title: %s", title)
	}
	w.shows(`^web +[1-9][0-9.]* +\d+ blocked`, func() { refuse("web") })

	w.press("s")
	w.shows(`^web `)
	w.press("s", "s", "s", "s", "s", "s") // by name
	w.shows(`(?s)CONTAINER[^\n]*\nidle [^\n]*\nweb [^\n]*\n"x[^\n]*\n日`)
	w.press("r")
	w.shows(`(?s)-CONTAINER[^\n]*\n日[^\n]*\n"x[^\n]*\nweb `)
	w.press("/", "web")
	w.shows(`^filter: web`)
	w.press("Enter")
	if screen := w.shows(`filter web: 1 of 4`); strings.Contains(screen, "idle") {
		t.Errorf("not filtered:\n%s", screen)
	}
	w.press("Enter")
	w.shows(`(?s)^web\n.*^blocked +0 +[0-9]+ +0 `)
	w.tmux("resize-window", "-x", "40", "-y", "10")
	w.shows(`^esc back  q quit  up/down scroll  p pau…$`)
	w.press("Escape")
	w.shows(`^-?CONTAINER +NOW/S +TOTAL WHY *$`)
	w.press("Escape")
	w.shows(`^idle `)
	w.tmux("resize-window", "-x", "200", "-y", "50")
	w.shows(`^日本語のコンテナ +`)
	w.press("?")
	w.shows(`^\(others\) containers that are gone`)
	w.press("?")

	// While it is paused nothing changes, and afterwards nothing is missing.
	w.press("p")
	before := w.shows(`paused`)
	before, _, _ = strings.Cut(strings.SplitN(before, "\nweb ", 2)[1], "\n")
	for range 3 {
		refuse("idle")
	}
	w.shows(`^idle +0 +0 `)
	w.press("Space")
	after := w.shows(`^idle +\S+ +3 blocked`)
	after, _, _ = strings.Cut(strings.SplitN(after, "\nweb ", 2)[1], "\n")
	if strings.Fields(before)[1] != strings.Fields(after)[1] {
		t.Errorf("web was not refused, but %q became %q", before, after)
	}

	// It goes on when the filter is taken off and attached again, and so when a container goes.
	if code, _, stderr := execute(t.Context(), "detach"); code != exitDone {
		t.Fatalf("detach: exit code %d: %s", code, stderr)
	}
	w.shows(`(?s)not known whether it is enforcing.*cannot read the counters, trying again: `)
	attach()
	w.shows(`^enforcing  0 refused/s  0 in all  4 containers`)
	refuse("idle")
	w.shows(`^idle +\S+ +1 blocked`)
	check(t, os.Remove(filepath.Join(base, "idle")))
	w.shows(`^\(others\) +\S+ +1 blocked`)
	w.press("q")
	w.shows(`^exit code 0$`)

	w = openWindow(t, "NO_COLOR=1 egressbpf top --container web --sort name")
	refuse("web")
	w.shows(`^web +\S+ +1 blocked`)
	if screen := w.tmux("capture-pane", "-p", "-e"); regexp.MustCompile(`\x1b\[([0-9;]*;)?[349][0-7][;m]`).MatchString(screen) || !strings.Contains(screen, "\x1b[1m") {
		t.Errorf("the screen has colours:\n%q", screen)
	}
	w.press("C-c")
	w.shows(`^exit code 0$`)

	w = openWindow(t, "TERM=dumb egressbpf top")
	w.shows(`(?s)terminal.*stats --watch.*exit code 2$`)
}
