package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cilium/ebpf"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/container"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/stats"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// execute runs the command line in this process.
func execute(ctx context.Context, args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = run(ctx, args, &out, &errs)
	return code, out.String(), errs.String()
}

// Malformed input is refused, with its place and what would be right, and nothing is touched.
func TestBadInput(t *testing.T) {
	base := newBase(t)
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		check(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	write("key.yaml", "mode: enforce\nblok: []\n")
	write("value.yaml", "smtp:\n  ports: [25]\n  rate: 5/fortnight\n")
	write("rule.yaml", "block:\n  - 10.0.0.0/8\n  - 10.0.0.1/8\n")
	write("syntax.yaml", "mode: enforce\nblock: [\n")
	write("cgroup.yaml", "cgroups: [docker]\n")
	write("outside.yaml", "cgroups: [/tmp]\n")
	write("burst.yaml", "smtp: {rate: 1/day, burst: 1000000}\n")
	check(t, os.Symlink(base+"/nothing", filepath.Join(dir, "dangling")))
	expand := strings.NewReplacer("CG", base, "ROOT", string(testenv.Root(t)), "DIR", dir, "_", " ").Replace

	tests := []struct {
		args string // with _ for a space
		want string // each word is in the message
	}{
		{"attach --block nonsense", `--block "nonsense" address`},
		{"attach --block 10.0.0.0/8,example.com", `--block "example.com" address`},
		{"attach --block 10.0.0.1/8", "--block 10.0.0.1/8 want 10.0.0.0/8"},
		{"attach --block 10.0.0.0/33", "--block 33 want 32"},
		{"attach --block 1.2.3.4:0", "--block port 65535"},
		{"attach --block 1.2.3.4:65536/tcp", "--block port 65535"},
		{"attach --block 1.2.3.4:80/tpc", "--block tpc tcp udp"},
		{"attach --block 1.2.3.4:80/icmp", "--block icmp ports"},
		{"attach --block 2001:db8::/32:80", "--block [2001:db8::/32]:80"},
		{"attach --block fe80::1%eth0", "--block zone"},
		{"attach --block 1.2.3.4 --block _1.2.3.5", "--block want"},
		{`attach --block "`, "--block"},
		{"attach --allow 1.2.3", `--allow "1.2.3" address`},
		{"attach --allow-dns=perhaps", "--allow-dns perhaps"},
		{"attach --preset clowd", `preset "clowd" want aws azure`},
		{"attach --preset azur", `"azure"`},
		{"attach --preset none,aws", `--preset "none"`},
		{"attach --smtp-ports 0", "--smtp-ports 65535"},
		{"attach --smtp-ports 25,smtp", `--smtp-ports "smtp" 65535`},
		{"attach --smtp-ports=", "--smtp-ports at least one port"},
		{"attach --smtp-rate 5", "--smtp-rate N/minute unlimited"},
		{"attach --smtp-rate 0/minute", "--smtp-rate 0/minute --block"},
		{"attach --smtp-rate -1/minute", "--smtp-rate -1/minute"},
		{"attach --smtp-rate 5/fortnight", "--smtp-rate 5/fortnight N/hour"},
		{"attach --smtp-rate 1000001/second", "--smtp-rate 1000000"},
		{"attach --smtp-burst 0", "burst 0 want 1"},
		{"attach --smtp-burst -1", "--smtp-burst -1"},
		{"attach --smtp-burst 1000001", "burst 1000000"},
		{"attach --smtp-burst 4294967296", "--smtp-burst"},
		{"attach --smtp-rate 1/day --smtp-burst 1000000", "burst at most 36500"},
		{"attach --over-limit pass", "--over-limit pass drop reject"},
		{"attach --smtp-exempt 10.0.0.1:25", "--smtp-exempt 10.0.0.1:25 address"},
		{"attach --smtp-exempt 10.0.0.1/8", "--smtp-exempt want 10.0.0.0/8"},
		{"attach --mode strict", `--mode "strict" enforce audit`},
		{"attach --config DIR/missing.yaml", "--config DIR/missing.yaml"},
		{"attach --config DIR", "--config DIR"},
		{"attach --config DIR/key.yaml", `DIR/key.yaml:2 blok "block"`},
		{"attach --config DIR/value.yaml", "DIR/value.yaml:3 smtp.rate 5/fortnight N/hour"},
		{"attach --config DIR/value.yaml --smtp-rate 5/hour", "DIR/value.yaml:3"},
		{"attach --config DIR/rule.yaml", "DIR/rule.yaml:3 block 10.0.0.0/8"},
		{"attach --config DIR/syntax.yaml", "DIR/syntax.yaml: YAML"},
		{"attach --config DIR/cgroup.yaml", "DIR/cgroup.yaml:1 cgroups absolute"},
		{"attach --config DIR/burst.yaml", "DIR/burst.yaml:1 smtp.burst at most 36500"},
		{"attach --config DIR/outside.yaml", "/tmp of the cgroup2 mount"},
		{"attach --cgroup CG/new --cgroup /tmp", "/tmp of the cgroup2 mount"},
		{"attach --cgroup CG/new --cgroup ROOT", "ROOT CG/new nested"},
		{"attach --cgroup ROOT --scopes any", "ROOT host --scopes"},
		{"attach --scopes docker", `--scopes "docker" docker-{id}.scope`},
		{"attach --scopes any,a-*", "--scopes any alone"},
		{"attach --cgroup CG/new --cgroup CG/../..", "of the cgroup2 mount"},
		{"attach --cgroup CG/new --cgroup CG/new/er", "CG/new CG/new/er nested outer"},
		{"attach --cgroup CG/new --cgroup CG/cgroup.procs", "CG/cgroup.procs"},
		{"attach --cgroup CG/new --cgroup DIR/dangling", "DIR/dangling dangling"},
		{"attach --cgroup CG/new --pin-path DIR", "DIR bpf filesystem --pin-path"},
		{"attach --cgroup CG/new --pin-path DIR/pins", "DIR/pins bpf filesystem --pin-path"},
		{"attach --cgroup CG/new --cgroup-root DIR", "--cgroup-root DIR cgroup2"},
		{"attach --cgroup CG/new --cgroup-root DIR/missing", "--cgroup-root DIR/missing cgroup2"},
		// Part of the hierarchy: egressbpf would look for containers at the wrong depth.
		{"attach --cgroup CG/new --cgroup-root CG", "--cgroup-root CG cgroup2"},
		{"attach --output yaml", "--output yaml table json"},
		{"attach -o=", "--output table json"},
		{"attach --nonsense", "--nonsense egressbpf attach --help"},
		{"attach extra", `"extra" egressbpf attach --help`},
		{"attach --cgroup", "--cgroup"},
		{"detach --nonsense", "--nonsense egressbpf detach --help"},
		{"detach extra", `"extra"`},
		{"detach --cgroup /tmp", "/tmp of the cgroup2 mount"},
		{"detach --cgroup-root DIR", "--cgroup-root DIR"},
		{"status extra", `"extra"`},
		{"status --output xml", "--output xml table json"},
		{"status --cgroup-root DIR", "--cgroup-root DIR"},
		{"stats extra", `"extra"`},
		{"stats --docker-host ssh://there", "--docker-host ssh://there unix:///PATH tcp://HOST:PORT"},
		{"status --docker-host /run/docker.sock", "--docker-host /run/docker.sock unix:///PATH"},
		{"attach --cgroup CG/new --docker-host tcp://there", "--docker-host tcp://there tcp://HOST:PORT"},
		{"limit get a --docker-host nonsense", "--docker-host nonsense unix:///PATH"},
		{"stats --output xml", "--output xml table json"},
		{"stats --output prometheus --container web", "--output prometheus --container"},
		{"monitor extra", `"extra"`},
		{"monitor --output xml", "--output xml compact table json"},
		{"monitor --color perhaps", "--color perhaps auto always never"},
		{"monitor --color always -o json", "--color JSON"},
		{"monitor --reason block", `--reason "block" blocked family`},
		{"monitor --reason blocked,", "--reason"},
		{"monitor --reason=", "--reason"},
		{"monitor --destination example.com", `--destination "example.com" address`},
		{"monitor --destination 10.0.0.1/8", "--destination want 10.0.0.0/8"},
		{"monitor --destination 2001:db8::/32:80", "--destination [2001:db8::/32]:80"},
		{"monitor --destination 192.0.2.1,", "--destination"},
		{"monitor --destination=", "--destination"},
		{"monitor --container=", "--container"},
		{"monitor --process=", "--process"},
		{"monitor --not", "--not --container --reason --destination --process"},
		{"monitor --limit 0", "--limit 1"},
		{"monitor --limit -1", "--limit"},
		{"monitor --limit few", "--limit few"},
		{"monitor --fields name", `--fields "name" container.name destination.port`},
		{"monitor --fields time,,reason", "--fields"},
		{"monitor --fields=", "--fields"},
		{"monitor --input=", "--input"},
		{"monitor --input DIR", "--input DIR"},
		{"monitor --input DIR/missing.json", "--input DIR/missing.json"},
		{"monitor --input DIR/key.yaml -f", "--follow tail"},
		{"monitor --follow=false", "--follow --limit --input"},
		{"run --web-listen nonsense", "--web-listen ADDR:PORT"},
		{"run --web-listen 0 --web-config-file DIR/key.yaml", "--web-listen DIR/key.yaml blok"},
		{"run --web-config-file DIR/key.yaml", "--web-config-file --web-listen"},
		{"run --web-listen=", "--web-listen"},
		{"stats --interval 1ms", "--interval 100ms"},
		{"stats --interval 2", "--interval 2"},
		{"stats --container", "--container"},
		{"top", "stdout terminal stats --watch monitor"},
		{"top extra", `"extra" egressbpf top --help`},
		{"top --interval 99ms", "--interval 100ms"},
		{"top --sort size", `--sort "size" name now total`},
		{"top --color maybe", `--color "maybe" auto always never`},
		{"top --container=", "--container"},
		{"limit nonsense", `"nonsense"`},
		{"limit set", "NAME"},
		{"limit set a b --burst 1", "NAME"},
		{"limit set a", "--rate --burst"},
		{"limit set a --rate 5", "--rate N/minute"},
		{"limit set a --burst x", "--burst x"},
		{"limit get", "NAME"},
		{"limit get a b", "NAME"},
		{"limit get a --output xml", "--output xml"},
		{"limit unset", "NAME"},
		{"limit unset a b", "NAME"},
		{"import nonsense", `"nonsense"`},
		{"import iptables --nonsense", "--nonsense egressbpf import iptables --help"},
		{"import iptables --live DIR/rule.yaml", "--live files"},
		{"version extra", `"extra"`},
		{"version --output xml", "--output xml"},
		{"completion bash extra", `"extra"`},
		{"completion tcsh", `"tcsh"`},
		{"atach", `"atach" egressbpf --help`},
		{"--nonsense", "--nonsense egressbpf --help"},
		{"--nonsense attach", "--nonsense"},
	}
	for _, inForce := range []bool{false, true} {
		var before string
		reset := func() {
			t.Helper()
			if code, _, stderr := execute(t.Context(), "detach"); code != exitDone {
				t.Fatalf("detach: exit code %d: %s", code, stderr)
			}
			_ = os.Remove(base + "/new")
			if inForce {
				attach(t, base+"/a")
			}
			before = touchable(t, base)
		}
		reset()
		for _, tt := range tests {
			args, want := strings.Fields(tt.args), strings.Fields(tt.want)
			for i, arg := range args {
				args[i] = expand(arg)
			}
			code, stdout, stderr := execute(t.Context(), args...)
			missing := slices.DeleteFunc(want, func(word string) bool { return strings.Contains(stderr, expand(word)) })
			if code != exitUsage || stdout != "" || !strings.HasPrefix(stderr, "egressbpf: ") {
				t.Errorf("%s, in force %v: got exit code %d, stdout %.100q, stderr %q", tt.args, inForce, code, stdout, stderr)
			} else if len(missing) > 0 {
				t.Errorf("%s: %q are not in the message: %s", tt.args, missing, stderr)
			}
			if after := touchable(t, base); after != before {
				t.Errorf("%s: something was touched:\n- %s\n+ %s", tt.args, without(before, after), without(after, before))
				reset()
			}
		}
	}
}

// attach attaches the filter with the default policy.
func attach(t *testing.T, cgroups ...string) {
	t.Helper()
	args := []string{"attach"}
	for _, path := range cgroups {
		args = append(args, "--cgroup", path)
	}
	if code, _, stderr := execute(t.Context(), args...); code != exitDone {
		t.Fatalf("attach: exit code %d: %s", code, stderr)
	}
}

// touchable describes everything that a command could have changed.
func touchable(t *testing.T, base string) string {
	t.Helper()
	s, err := loader.New(loader.DefaultPinPath, testenv.Root(t)).Status()
	check(t, err)
	s.Uncovered = nil // of other tests
	for i := range s.Hooks {
		s.Hooks[i].Since = time.Time{} // differs a little each time
	}
	text, err := json.Marshal(s)
	check(t, err)
	for _, dir := range []string{loader.DefaultPinPath, base} {
		check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if d != nil && (dir != base || d.IsDir()) {
				text = append(text, "\n"+path...)
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}))
	}
	return string(text)
}

// Without --cgroup, the root is policed, or the cgroups that are policed already. The policy
// blocks nothing, since there may be real containers.
func TestDefaultCgroup(t *testing.T) {
	lockHost(t)
	base := newBase(t)
	harmless := []string{"attach", "--mode", "audit", "--preset", "none", "--smtp-rate", "unlimited", "-o", "json"}
	for _, want := range []string{base + "/a", string(testenv.Root(t))} {
		if want == base+"/a" {
			attach(t, want)
		}
		code, stdout, stderr := execute(t.Context(), harmless...)
		if code != exitDone || !strings.Contains(stdout, `"cgroups":["`+want+`"]`) {
			t.Errorf("got exit code %d, stdout %s, stderr %s", code, stdout, stderr)
		}
		if code, _, stderr := execute(t.Context(), "detach"); code != exitDone {
			t.Fatalf("detach: exit code %d: %s", code, stderr)
		}
	}
}

// without returns the lines of a text that are not in another one.
func without(text, other string) []string {
	lines := strings.Split(other, "\n")
	return slices.DeleteFunc(strings.Split(text, "\n"), func(line string) bool { return slices.Contains(lines, line) })
}

// everyCommand calls do with each command that a user can give.
func everyCommand(cmd *cobra.Command, do func(*cobra.Command)) {
	do(cmd)
	for _, sub := range cmd.Commands() {
		everyCommand(sub, do)
	}
}

func TestHelp(t *testing.T) {
	root := newRoot(new(globals))
	root.InitDefaultCompletionCmd()
	var names []string
	everyCommand(root, func(cmd *cobra.Command) {
		args := strings.Fields(cmd.CommandPath())[1:]
		names = append(names, strings.Join(args, " "))
		code, stdout, stderr := execute(t.Context(), append(args, "--help")...)
		if code != exitDone || stderr != "" {
			t.Errorf("%s --help: got exit code %d, stderr %q", cmd.CommandPath(), code, stderr)
		}
		mentions := func(flag *pflag.Flag) {
			if flag.Usage == "" || !strings.Contains(stdout, "--"+flag.Name+" ") || !strings.Contains(stdout, flag.Usage) {
				t.Errorf("%s --help does not explain --%s:\n%s", cmd.CommandPath(), flag.Name, stdout)
			}
		}
		cmd.Flags().VisitAll(mentions)
		cmd.InheritedFlags().VisitAll(mentions)
		for _, sub := range cmd.Commands() {
			if !strings.Contains(stdout, "\n  "+sub.Name()+" ") || sub.Short == "" {
				t.Errorf("%s --help does not explain %s:\n%s", cmd.CommandPath(), sub.Name(), stdout)
			}
		}
	})
	for _, want := range []string{"attach", "detach", "status", "stats", "monitor", "top", "explain", "suggest", "limit set", "limit get", "limit unset", "import iptables", "notify test", "version", "completion bash"} {
		if !slices.Contains(names, want) {
			t.Errorf("there is no command %q", want)
		}
	}
	cmd, _, err := root.Find([]string{"attach"})
	check(t, err)
	for _, want := range []string{
		"preset", "block", "allow", "allow-dns", "smtp-ports", "smtp-rate", "smtp-burst", "over-limit", "smtp-exempt", "mode",
		"cgroup", "config", "output", "pin-path", "cgroup-root", "debug",
	} {
		if cmd.Flag(want) == nil && cmd.InheritedFlags().Lookup(want) == nil {
			t.Errorf("attach has no flag --%s", want)
		}
	}
}

func TestVersionAndCompletion(t *testing.T) {
	for args, want := range map[string]string{
		"version":               "egressbpf " + loader.Version() + " (" + runtime.Version(),
		"version -o json":       `"version":"` + loader.Version() + `"`,
		"completion bash":       "__start_egressbpf",
		"completion zsh":        "#compdef egressbpf",
		"completion fish":       "complete -c egressbpf",
		"completion powershell": "Register-ArgumentCompleter",
		"":                      "Available Commands:",
		"limit":                 "Available Commands:",
		"import":                "Available Commands:",
		"help attach":           "--smtp-rate",
	} {
		code, stdout, stderr := execute(t.Context(), strings.Fields(args)...)
		if code != exitDone || !strings.Contains(stdout, want) || stderr != "" {
			t.Errorf("%s: got exit code %d, stdout %.200q, stderr %q, want %q", args, code, stdout, stderr, want)
		}
	}
}

// The name of a container must not make a terminal do anything.
func TestHostileNames(t *testing.T) {
	base := newBase(t)
	const hostile = "\x1b[2J\tweb\u202e"
	attach(t, base+"/"+hostile)
	testenv.Child(t, base+"/"+hostile, hostile)
	for _, args := range [][]string{{"status"}, {"stats"}, {"stats", "--container", hostile}, {"stats", "--container", hostile + "x"}} {
		_, stdout, stderr := execute(t.Context(), args...)
		// Errors contain the cgroups that the user has named.
		if out := stdout + strings.ReplaceAll(stderr, base+"/"+hostile, ""); strings.ContainsAny(out, hostile[:1]+"\u202e") {
			t.Errorf("%v: a name reaches the terminal: %q", args, out)
		} else if !strings.Contains(out, `\x1b[2J\tweb\u202e`) {
			t.Errorf("%v: the name is missing in %q", args, out)
		}
	}
}

func TestTitle(t *testing.T) {
	for _, tt := range []struct{ name, id, want string }{
		{"web", hex, "web"},
		{"", hex, "0123456789ab"},
		{"", "web-2", "web-2"},
		{"", "", `""`},
		{"a b", hex, "a b"},
		{"\x1b[2J", hex, `"\x1b[2J"`},
		{"\x9b2J", hex, `"\x9b2J"`}, // no valid UTF-8, and an escape to some terminals
		{"", "\x1b[2J" + hex[4:], `"\x1b[2J456789ab"`},
	} {
		if got := title(tt.name, tt.id); got != tt.want {
			t.Errorf("title(%q, %q) = %s, want %s", tt.name, tt.id, got, tt.want)
		}
	}
}

func TestReport(t *testing.T) {
	rejected := &ebpf.VerifierError{Cause: unix.EPERM}
	for i := range 100 {
		rejected.Log = append(rejected.Log, fmt.Sprintf("line %d.", i))
	}
	for _, tt := range []struct {
		err   error
		debug bool
		want  []string
		not   string
	}{
		{err: fmt.Errorf("load: %w", rejected), want: []string{"load: ", "line 90.", "line 99.", "--debug"}, not: "line 10."},
		{err: fmt.Errorf("load: %w", rejected), debug: true, want: []string{"line 0.", "line 50.", "line 99."}, not: "needs root"},
		{err: fmt.Errorf("x: %w", cgroup.ErrNoCgroup2), want: []string{"x: ", "mount -t cgroup2"}},
		{err: cgroup.ErrNotInitialNamespace, want: []string{"nsenter"}},
		{err: loader.ErrOtherVersion, want: []string{"egressbpf detach", "counters and buckets start anew"}},
		{err: fs.ErrPermission, want: []string{"needs root", "CAP_BPF"}},
		{err: errors.New("anything"), want: []string{"egressbpf: anything\n"}},
	} {
		var out bytes.Buffer
		report(&out, tt.err, tt.debug)
		for _, want := range tt.want {
			if !strings.Contains(out.String(), want) {
				t.Errorf("%v, debug %v: %q is not in %s", tt.err, tt.debug, want, &out)
			}
		}
		if tt.not != "" && strings.Contains(out.String(), tt.not) {
			t.Errorf("%v, debug %v: %q is in %s", tt.err, tt.debug, tt.not, &out)
		}
	}
}

// A command that gives up waiting for another one says so.
func TestBusy(t *testing.T) {
	base := newBase(t)
	attach(t, base+"/a")
	dir, err := os.Open(loader.DefaultPinPath)
	check(t, err)
	defer dir.Close()
	check(t, unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, action := range []string{"attach", "detach"} {
		code, stdout, stderr := execute(ctx, action, "--cgroup", base+"/a")
		if code != exitFailed || stdout != "" || !strings.Contains(stderr, "another egressbpf") || !strings.Contains(stderr, "try again") {
			t.Errorf("%s: got exit code %d, stdout %q, stderr %q", action, code, stdout, stderr)
		}
	}
}

// Ending by a signal is no failure.
func TestWatch(t *testing.T) {
	base := newBase(t)
	attach(t, base+"/a")
	testenv.Child(t, base+"/a", "web")
	for _, signal := range []os.Signal{os.Interrupt, unix.SIGTERM} {
		cmd := exec.CommandContext(t.Context(), "egressbpf", "stats", "--watch", "--interval", "100ms", "--output", "json")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		stdout, err := cmd.StdoutPipe()
		check(t, err)
		check(t, cmd.Start())
		lines := bufio.NewReader(stdout)
		for range 3 {
			line, err := lines.ReadString('\n')
			check(t, err)
			var s stats.Stats
			if err := json.Unmarshal([]byte(line), &s); err != nil || len(s.Containers) != 1 || s.Containers[0].ID != "web" {
				t.Errorf("got %q, %v, want the stats of web", line, err)
			}
		}
		check(t, cmd.Process.Signal(signal))
		_, err = io.Copy(io.Discard, lines)
		check(t, err)
		if err := cmd.Wait(); err != nil || stderr.Len() > 0 {
			t.Errorf("%v: got %v, stderr %q", signal, err, &stderr)
		}
	}

	// Tables are separated by an empty line.
	ctx, cancel := context.WithCancel(t.Context())
	read, write := io.Pipe()
	done := make(chan int)
	go func() {
		code := run(ctx, []string{"stats", "--watch", "--interval", "100ms"}, write, write)
		write.Close()
		done <- code
	}()
	lines, header := bufio.NewReader(read), ""
	for range 5 {
		line, err := lines.ReadString('\n')
		check(t, err)
		if header == "" {
			header = line
		}
	}
	cancel()
	rest, err := io.ReadAll(lines)
	check(t, err)
	if code := <-done; code != exitDone || !strings.HasPrefix(header, "CONTAINER ") {
		t.Errorf("got exit code %d, header %q, then %q", code, header, rest)
	}
}

// TestWeb has the service serve metrics.
func TestWeb(t *testing.T) {
	lockHost(t)
	base := newBase(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer taken.Close()
	address := taken.Addr().String()

	before := touchable(t, base)
	code, _, stderr := execute(t.Context(), "run", "--cgroup", base+"/a", "--web-listen", address)
	if code != exitFailed || !strings.Contains(stderr, "address already in use") {
		t.Errorf("a port in use: exit code %d: %s", code, stderr)
	}
	if after := touchable(t, base); after != before {
		t.Errorf("something was touched: %s", without(after, before))
	}

	check(t, taken.Close())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan int)
	go func() {
		code, _, stderr := execute(ctx, "run", "--cgroup", base+"/a", "--web-listen", address, "--metrics-containers=false")
		if strings.Contains(stderr, "level=WARN msg=\"anyone") {
			t.Errorf("on loopback: %s", stderr)
		}
		done <- code
	}()
	testenv.Eventually(t, "enforcing", func() bool {
		resp, err := http.Get("http://" + address + "/metrics")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if strings.Contains(string(text), "egressbpf_container_") {
			t.Errorf("without containers: %s", text)
		}
		return err == nil && strings.Contains(string(text), "\negressbpf_enforcing 1\n")
	})
	cancel()
	if code := <-done; code != exitDone {
		t.Errorf("exit code %d", code)
	}
	if _, err := net.Dial("tcp", address); err == nil {
		t.Error("it still listens")
	}
}

// TestWebProcess ends a service whose process that serves does nothing any more.
func TestWebProcess(t *testing.T) {
	lockHost(t)
	base := newBase(t)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	address := free.Addr().String()
	check(t, free.Close())
	cmd := exec.Command("/proc/self/exe", "run", "--cgroup", base+"/a", "--web-listen", address)
	cmd.Args[0] = "egressbpf"
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	check(t, cmd.Start())
	defer cmd.Wait()
	defer cmd.Process.Kill()
	testenv.Eventually(t, "the page", func() bool {
		resp, err := http.Get("http://" + address + "/")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		return err == nil && strings.Contains(string(text), ">In force")
	})
	children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", cmd.Process.Pid))
	check(t, err)
	pid := 0
	for _, list := range children {
		text, err := os.ReadFile(list)
		check(t, err)
		for _, field := range strings.Fields(string(text)) {
			pid, err = strconv.Atoi(field)
			check(t, err)
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	check(t, err)
	if !strings.Contains(string(status), "\nCapBnd:\t0000000000000000\n") || !strings.Contains(string(status), "\nUid:\t65534\t") {
		t.Errorf("the process that serves:\n%s", status)
	}
	status, err = os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	check(t, err)
	_, own, err := capabilities()
	check(t, err)
	want := uint64(needed)
	for _, c := range webCapabilities {
		want |= 1 << c.bit
	}
	want &= uint64(own[1].Permitted)<<32 | uint64(own[0].Permitted) // this machine may lack some
	if !strings.Contains(string(status), fmt.Sprintf("\nCapEff:\t%016x\n", want)) {
		t.Errorf("the service should have %016x:\n%s", want, status)
	}
	check(t, syscall.Kill(pid, syscall.SIGSTOP))
	check(t, cmd.Process.Kill())
	_ = cmd.Wait()
	testenv.Eventually(t, "the end of the process that serves", func() bool {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		return err != nil || strings.Contains(string(text), "State:\tZ")
	})
}

// TestPatiently has the service wait for the names of containers that nobody knows: they must not
// hold up the events of others.
func TestPatiently(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const slow = "0000000000000000000000000000000000000000000000000000000000000000"
		told := time.Now().Add(100 * time.Millisecond)
		find := patiently(func(id string) (container.Container, bool) {
			return container.Container{}, id == slow && time.Now().After(told)
		})
		if _, ok := find(slow); !ok {
			t.Error("not found, though it was told of a moment later")
		}
		time.Sleep(time.Minute)
		begun := time.Now()
		for i := range 100 {
			if _, ok := find(fmt.Sprintf("%064x", i+1)); ok {
				t.Error("found one that nobody knows")
			}
		}
		if took := time.Since(begun); took > time.Second {
			t.Errorf("100 unknown containers take %v", took)
		}
	})
}

// A config file at its usual path may be missing. A link that leads nowhere is not missing.
func TestMissingConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.yaml")
	load := func() error {
		o := runOptions{globals: &globals{}, configOptions: configOptions{config: path}}
		flags := pflag.NewFlagSet("", pflag.ContinueOnError)
		o.register(flags)
		_, err := o.load(flags)()
		return err
	}
	if err := load(); err != nil {
		t.Errorf("without a file: %v", err)
	}
	if err := os.Symlink("nowhere", path); err != nil {
		t.Fatal(err)
	}
	if err := load(); err == nil {
		t.Error("a link that leads nowhere counts as no file")
	}
}
