package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
	"github.com/egressbpf/egressbpf/internal/web"
)

// commands are the commands that scripts can run, each as a process of its own.
var commands = map[string]func(){
	"egressbpf": func() {
		resolvConfs = filepath.SplitList(os.Getenv("RESOLV_CONFS"))
		dockerConfig = os.Getenv("DOCKERD_CONFIG")
		main()
	},
	"unprivileged": func() {
		const nobody = 65534
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(nobody), syscall.Setuid(nobody)); err != nil {
			panic(err)
		}
		main()
	},
	// Connecting a UDP socket sends nothing.
	"connect": func() {
		conn, err := net.Dial("udp", os.Args[1])
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		conn.Close()
	},
}

// TestMain runs the tests in a mount namespace of their own with a new bpf filesystem at
// the usual path, so that the default pin path belongs to them.
func TestMain(m *testing.M) {
	const marker = "EGRESSBPF_TEST_MOUNTS"
	inTest = true
	if len(os.Args) > 1 && os.Args[1] == web.ServeArg {
		exit(web.Serve(os.Args[2:]))
	}
	if commands[filepath.Base(os.Args[0])] == nil {
		if os.Getenv(marker) == "" {
			os.Exit(runAgain(marker))
		}
		if err := unix.Mount("bpf", usualMount, "bpf", 0, "mode=0700"); err != nil {
			fmt.Fprintln(os.Stderr, "mount a bpf filesystem:", err)
			os.Exit(1)
		}
	}
	testscript.Main(m, commands)
}

const usualMount = "/sys/fs/bpf"

func runAgain(marker string) int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); cmd.ProcessState == nil {
		fmt.Fprintln(os.Stderr, "unshare the mount namespace:", err)
		return 1
	}
	return cmd.ProcessState.ExitCode()
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// lockHost is for tests whose containers other tests would take for Docker's.
func lockHost(t *testing.T) {
	t.Helper()
	unlock, err := testenv.LockHost()
	check(t, err)
	t.Cleanup(unlock)
}

// newBase makes a cgroup for a test. The filter is detached after the test.
func newBase(t *testing.T) string {
	t.Helper()
	base := testenv.Cgroup(t)
	t.Cleanup(func() {
		check(t, loader.New(loader.DefaultPinPath, testenv.Root(t)).Detach(context.Background(), nil))
	})
	return base
}

// one makes scripts run one after the other, since they share the default pin path.
type one struct{ *testing.T }

func (o one) Parallel()     {}
func (o one) Verbose() bool { return testing.Verbose() }
func (o one) Run(name string, run func(testscript.T)) {
	o.T.Run(name, func(t *testing.T) { run(one{t}) })
}

// hex is a container's id.
var hex = strings.Repeat("0123456789abcdef", 4)

// TestScripts runs testdata/*.txtar. In addition to testscript's own commands, scripts have
//
//	code N COMMAND...      runs a command, which must exit with this code
//	in CGROUP COMMAND...   runs a command in a cgroup
//	populate CGROUP        keeps a process, $PID, in the cgroup until the script ends
//	json PATH VALUE        compares a value in the JSON on stdout
//	in-force               fails unless status says that the filter is in force
//	daemon SOCKET ID=NAME[:PID]...  answers as Docker would; or instead stall, broken
//
// and $CG, a cgroup; $ROOT, the cgroup2 mount; $PINS, the default pin path; $HEX and
// $HEX2, ids of containers; $ESC, an escape sequence for terminals.
func TestScripts(t *testing.T) {
	testscript.RunT(one{t}, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			t := env.T().(one).T
			env.Values["t"] = t
			env.Setenv("CG", newBase(t))
			env.Setenv("ROOT", string(testenv.Root(t)))
			env.Setenv("PINS", loader.DefaultPinPath)
			env.Setenv("HEX", hex)
			env.Setenv("HEX2", strings.Repeat("fedcba9876543210", 4))
			env.Setenv("ESC", "\x1b[2J")
			env.Setenv("RESOLV_CONFS", env.WorkDir+"/resolv.conf:"+env.WorkDir+"/stub.conf")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"code": code, "in": in, "populate": populate, "json": jsonValue, "in-force": inForce, "daemon": daemon,
		},
	})
}

func testOf(ts *testscript.TestScript) *testing.T { return ts.Value("t").(*testing.T) }

func code(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	var failed *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &failed) {
		got = failed.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("got exit code %d, want %d", got, want)
	}
}

func in(ts *testscript.TestScript, neg bool, args []string) {
	cmd := testenv.Command(testOf(ts), args[0], args[1], args[2:]...)
	cmd.Stdout, cmd.Stderr = ts.Stdout(), ts.Stderr()
	if err := cmd.Run(); (err != nil) != neg {
		ts.Fatalf("in %s: %v", args[0], err)
	}
}

func populate(ts *testscript.TestScript, _ bool, args []string) {
	if ts.Getenv("PID") == "" {
		lockHost(testOf(ts)) // once
	}
	cmd := testenv.Command(testOf(ts), args[0], "sleep", "60")
	ts.Check(cmd.Start())
	ts.Setenv("PID", strconv.Itoa(cmd.Process.Pid))
	ts.Defer(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

func jsonValue(ts *testscript.TestScript, neg bool, args []string) {
	var v any
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &v))
	for key := range strings.SplitSeq(args[0], ".") {
		switch in := v.(type) {
		case map[string]any:
			var ok bool
			if v, ok = in[key]; !ok {
				ts.Fatalf("there is no %s in %v", key, in)
			}
		case []any:
			i, err := strconv.Atoi(key)
			ts.Check(err)
			if i >= len(in) {
				ts.Fatalf("there is no %s in %v", key, in)
			}
			v = in[i]
		default:
			ts.Fatalf("there is no %s in %v", key, in)
		}
	}
	text, err := json.Marshal(v)
	ts.Check(err)
	if got := string(text); (got == args[1] || got == strconv.Quote(args[1])) == neg {
		ts.Fatalf("%s: got %s", args[0], got)
	}
}

// inForce accepts uncovered containers, which may be elsewhere on this machine.
func inForce(ts *testscript.TestScript, neg bool, _ []string) {
	err := ts.Exec("egressbpf", "status", "--output", "json")
	var s struct {
		Enforcing bool
		Uncovered []loader.Uncovered
	}
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &s))
	want := exitDone
	if !s.Enforcing || len(s.Uncovered) > 0 {
		want = exitNotInForce
	}
	got := exitDone
	if failed := (*exec.ExitError)(nil); errors.As(err, &failed) {
		got = failed.ExitCode()
	}
	if got != want {
		ts.Fatalf("got exit code %d, want %d", got, want)
	}
	root, base := testenv.Root(testOf(ts)), ts.Getenv("CG")
	open := slices.ContainsFunc(s.Uncovered, func(u loader.Uncovered) bool { return cgroup.Within(root.Path(u.Cgroup), base) })
	if (s.Enforcing && !open) == neg {
		ts.Fatalf("enforcing %v, uncovered %v", s.Enforcing, s.Uncovered)
	}
}
