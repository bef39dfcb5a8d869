package hardened

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
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
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(supervisedVar) != "":
		fmt.Fprintln(os.Stderr, supervised(os.Args[1:]))
		os.Exit(1)
	case os.Getenv(containerVar) != "":
		if err := container(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	if built != "" {
		os.RemoveAll(filepath.Dir(built))
	}
	os.Exit(code)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// binaryVar in the environment names a built command, for machines without Go.
const binaryVar = "EGRESSBPF_BINARY"

// built is the path of the command that this process has built.
var built string

var buildBinary = sync.OnceValues(func() (string, error) {
	if path := os.Getenv(binaryVar); path != "" {
		return path, nil
	}
	dir, err := os.MkdirTemp("", "hardened-")
	if err != nil {
		return "", err
	}
	built = filepath.Join(dir, "egressbpf") // TestMain removes it
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", built, "github.com/egressbpf/egressbpf/cmd/egressbpf")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", cmd, err, out)
	}
	return built, nil
})

// host is a pin path, and a slice that the real command polices, where containers are
// recognised by their names.
type host struct {
	t       *testing.T
	binary  string
	pins    string
	policed string
	// wrap starts the command in another environment.
	wrap []string
}

func newHost(t *testing.T) *host {
	t.Helper()
	binary, err := buildBinary()
	check(t, err)
	h := &host{t: t, binary: binary, pins: testenv.PinPath(t), policed: filepath.Join(testenv.Cgroup(t), "own.slice")}
	check(t, os.Mkdir(h.policed, 0o755))
	t.Cleanup(func() {
		h.wrap = nil
		if o := h.run("detach"); o.code != 0 {
			t.Errorf("detach: %v", o)
		}
	})
	return h
}

// args returns the arguments of the command.
func (h *host) args(command string, more ...string) []string {
	args := append([]string{command, "--pin-path", h.pins, "--docker-host", "unix:///nonexistent"}, more...)
	if command == "attach" && !slices.ContainsFunc(more, func(arg string) bool { return strings.HasPrefix(arg, "--cgroup=") }) {
		args = append(args, "--cgroup="+h.policed)
	}
	return args
}

// run runs the command.
func (h *host) run(command string, more ...string) outcome {
	h.t.Helper()
	argv := append(append(slices.Clone(h.wrap), h.binary), h.args(command, more...)...)
	return execute(h.t, argv[0], argv[1:]...)
}

func execute(t testing.TB, name string, args ...string) outcome {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return outcome{code: cmd.ProcessState.ExitCode(), stdout: stdout.String(), stderr: stderr.String()}
}

// must runs the command, which has to succeed.
func (h *host) must(command string, more ...string) outcome {
	h.t.Helper()
	o := h.run(command, more...)
	if o.code != 0 {
		h.t.Fatalf("%s: %v", command, o)
	}
	return o
}

// status is what the tests read of the command's status.
type status struct {
	Enforcing bool             `json:"enforcing"`
	Cgroups   []string         `json:"cgroups"`
	Hooks     []loader.Hook    `json:"hooks"`
	Defences  []loader.Defence `json:"defences"`
	Policy    struct {
		SMTP struct {
			Burst int `json:"burst"`
		} `json:"smtp"`
	} `json:"policy"`
}

// status returns what the command says is in force.
func (h *host) status() *status {
	h.t.Helper()
	o := h.run("status", "--output=json")
	if o.code != 0 && o.code != 3 {
		h.t.Fatalf("status: %v", o)
	}
	s := new(status)
	check(h.t, json.Unmarshal([]byte(o.stdout), s))
	return s
}

func defence(t testing.TB, s *status, name string) loader.Defence {
	t.Helper()
	i := slices.IndexFunc(s.Defences, func(d loader.Defence) bool { return d.Name == name })
	if i < 0 {
		t.Fatalf("status does not tell of %s: %+v", name, s.Defences)
	}
	return s.Defences[i]
}

// objects are the programs, maps and links in the kernel.
type objects map[string]bool

func allObjects(t testing.TB) objects {
	t.Helper()
	o := objects{}
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		check(t, err)
		id = next
		o[fmt.Sprint("program ", id)] = true
	}
	for id := ebpf.MapID(0); ; {
		next, err := ebpf.MapGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		check(t, err)
		id = next
		o[fmt.Sprint("map ", id)] = true
	}
	it := new(link.Iterator)
	defer it.Close()
	for it.Next() {
		o[fmt.Sprint("link ", it.ID)] = true
	}
	check(t, it.Err())
	return o
}

// addedTo waits until the kernel has no object that is not in before, and returns those that
// do not go away. The kernel frees objects some time after their last user has ended.
func addedTo(t testing.TB, before objects) (added []string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		added = nil
		for name := range allObjects(t) {
			if !before[name] {
				added = append(added, name)
			}
		}
		if len(added) == 0 {
			return nil
		}
	}
	slices.Sort(added)
	return added
}

// containerVar in the environment makes this program a process in a container.
const containerVar = "HARDENED_TEST_CONTAINER"

const (
	blocked = "169.254.169.254:80"
	open    = "192.0.2.1:80"
)

// container connects to an address for each line, and says what came of it. Both addresses
// are those of its own network namespace.
func container() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, address := range []string{blocked, open} {
		addr, err := netlink.ParseAddr(strings.TrimSuffix(address, ":80") + "/32")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(lo, addr); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for _, address := range []string{blocked, open} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		defer l.Close()
	}
	fmt.Println("ready")
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		conn, err := net.Dial("tcp", lines.Text())
		if err != nil {
			fmt.Println(err)
			continue
		}
		conn.Close()
		fmt.Println("connected")
	}
	return nil
}

// prober is a process in a container.
type prober struct {
	t   testing.TB
	in  io.Writer
	out *bufio.Scanner
}

// newProber starts a process in a container of a cgroup.
func newProber(t testing.TB, policed string) *prober {
	t.Helper()
	cmd := testenv.Command(t, testenv.Child(t, policed, "docker-"+strings.Repeat("c0", 32)+".scope"), "/proc/self/exe")
	cmd.Env = append(os.Environ(), containerVar+"=1")
	cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWNET
	in, err := cmd.StdinPipe()
	check(t, err)
	out, err := cmd.StdoutPipe()
	check(t, err)
	cmd.Stderr = os.Stderr
	check(t, cmd.Start())
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	p := &prober{t, in, bufio.NewScanner(out)}
	if answer := p.line(); answer != "ready" {
		t.Fatalf("got %q from the container", answer)
	}
	return p
}

func (p *prober) line() string {
	p.t.Helper()
	if !p.out.Scan() {
		p.t.Fatalf("the container has ended: %v", p.out.Err())
	}
	return p.out.Text()
}

func (p *prober) connect(address string) string {
	p.t.Helper()
	fmt.Fprintln(p.in, address)
	return p.line()
}

// policed checks whether the container is policed.
func (p *prober) policed(want bool, when string) {
	p.t.Helper()
	if got := p.connect(open); got != "connected" {
		p.t.Errorf("%s: to an open address: %s", when, got)
	}
	if got := p.connect(blocked); (got == "connected") == want {
		p.t.Errorf("%s: to a blocked address: %s, want policed %v", when, got, want)
	}
}
