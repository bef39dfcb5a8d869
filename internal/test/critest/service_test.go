package critest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// Rules for containers, as in a config file.
const (
	systemRule = "containers: [{namespace: kube-system, metadata: allow, socket_families: any}]\n"
	rules      = `containers:
  - {namespace: kube-system, metadata: allow, socket_families: any}
  - {namespace: monitoring, host_network: true, metadata: allow, socket_families: any}
`
	noRules = "containers: []\n"
)

// allowed is what an attempt of a pod with an exception says.
const allowed = "connect ok, packet ok"

// blocked returns what an attempt of a pod without an exception says. Some kernels cannot refuse
// packet sockets.
func blocked(t *testing.T, n *lab.Network) string {
	t.Helper()
	if status, _ := n.Status(t); !status.HasDefence(loader.SocketFamilies) {
		return "connect ECONNREFUSED, packet ok"
	}
	return "connect ECONNREFUSED, packet EPERM"
}

// service is a running `egressbpf run`.
type service struct {
	n      *lab.Network
	cmd    *exec.Cmd
	log    testenv.Log
	config string
	ended  bool
}

// startService starts the service and waits until the filter is in force. It ends with the test, and
// the filter too.
func startService(t *testing.T, n *lab.Network, config string, flags ...string) *service {
	t.Helper()
	dir, err := os.MkdirTemp("", "service-")
	if err != nil {
		t.Fatal(err)
	}
	s := &service{n: n, config: filepath.Join(dir, "config.yaml")}
	s.write(t, config)
	s.cmd = exec.Command(lab.Binary(t), append([]string{"run", "--config", s.config}, flags...)...)
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	n.Host.Do(func() { err = s.cmd.Start() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.end(unix.SIGTERM); err != nil {
			t.Errorf("run: %v", err)
		}
		if t.Failed() {
			t.Logf("run:\n%s", s.log.String())
		}
		n.Egressbpf(t, "detach")
	})
	s.await(t, inForce, 1)
	return s
}

// What the service says in its log.
const (
	inForce       = `msg="in force"`
	silent        = `msg="the container runtime does not answer`
	answers       = `msg="the container runtime answers again"`
	applied       = `msg="rules applied"`
	attachesAgain = `msg="containers have new devices; attaching again"`
	panicked      = "panic:"
)

// said counts lines of the log that have a text.
func (s *service) said(text string) int { return strings.Count(s.log.String(), text) }

func (s *service) await(t *testing.T, text string, n int) {
	t.Helper()
	testenv.Eventually(t, "the service says "+text, func() bool { return s.said(text) >= n })
}

func (s *service) write(t *testing.T, config string) {
	t.Helper()
	next := s.config + ".next"
	err := os.WriteFile(next, []byte(config), 0o600)
	if err == nil {
		err = os.Rename(next, s.config)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// configure rewrites the config file and waits until it is in force.
func (s *service) configure(t *testing.T, config string) {
	t.Helper()
	before := s.said(inForce)
	s.write(t, config)
	s.await(t, inForce, before+1)
}

// end ends the service with a signal.
func (s *service) end(sig unix.Signal) error {
	if s.ended {
		return nil
	}
	s.ended = true
	_ = s.cmd.Process.Signal(sig)
	return s.cmd.Wait()
}

// memory returns how much memory the service has, in bytes.
func (s *service) memory(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(s.cmd.Process.Pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		t.Fatalf("no VmRSS in %s", text)
	}
	kib, err := strconv.Atoi(fields[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// withState calls a function with the maps of the filter.
func withState(t *testing.T, do func(*maps.State) error) {
	t.Helper()
	state, err := loader.New(loader.DefaultPinPath, testenv.Root(t)).State()
	if err != nil {
		t.Fatal(err)
	}
	defer state.Close()
	if err := do(state); err != nil {
		t.Fatal(err)
	}
}

// idOf returns the id of a cgroup, by its path below the root.
func idOf(t *testing.T, rel string) uint64 {
	t.Helper()
	id, err := testenv.Root(t).ID(rel)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

const exception = maps.MayReachMetadata | maps.AnyFamily

// podHas says whether all containers of a pod have the exception from their start.
func podHas(t *testing.T, rel string) (has bool) {
	t.Helper()
	id := idOf(t, rel)
	withState(t, func(s *maps.State) error {
		pod, err := s.Pod(id)
		has = pod.Flags&exception == exception
		return err
	})
	return has
}

// flags returns those of a container, by the path of its cgroup.
func flags(t *testing.T, rel string) (f maps.Flag) {
	t.Helper()
	id := idOf(t, rel)
	withState(t, func(s *maps.State) error {
		c, _, err := s.Container(id)
		f = c.Flags & exception
		return err
	})
	return f
}

// awaitPod waits until the exception of a pod is known.
func awaitPod(t *testing.T, rel string) {
	t.Helper()
	testenv.Eventually(t, "exception of "+rel, func() bool { return podHas(t, rel) })
}
