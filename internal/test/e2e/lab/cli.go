package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/stats"
)

// Exit is the result of a command.
type Exit struct {
	Code           int
	Stdout, Stderr string
}

// Run runs a command to its end, whether it succeeds or not.
func Run(t testing.TB, cmd *exec.Cmd) Exit {
	t.Helper()
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Error(err)
		return Exit{Code: -1}
	}
	return Exit{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// Run runs a command in the host's network namespace, to its end.
func (n *Network) Run(t testing.TB, cmd *exec.Cmd) (e Exit) {
	t.Helper()
	n.Host.Do(func() { e = Run(t, cmd) })
	return e
}

// Egressbpf runs the real command on the host and returns its stdout. The command must succeed.
func (n *Network) Egressbpf(t testing.TB, args ...string) string {
	t.Helper()
	exit := n.Run(t, exec.Command(Binary(t), args...))
	if exit.Code != 0 {
		t.Fatalf("egressbpf %s: exit code %d\n%s", strings.Join(args, " "), exit.Code, exit.Stderr)
	}
	return exit.Stdout
}

// Stats returns the output of egressbpf stats.
func (n *Network) Stats(t testing.TB) (s stats.Stats) {
	t.Helper()
	if err := json.Unmarshal([]byte(n.Egressbpf(t, "stats", "--output", "json")), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// FilterStatus is a loader.Status whose Mode may be empty.
type FilterStatus struct {
	loader.Status
	Mode string `json:"mode"`
}

// Status returns the output of egressbpf status, and its exit code.
func (n *Network) Status(t testing.TB) (s FilterStatus, code int) {
	t.Helper()
	exit := n.Run(t, exec.Command(Binary(t), "status", "--output", "json"))
	if err := json.Unmarshal([]byte(exit.Stdout), &s); err != nil {
		t.Fatalf("egressbpf status: exit code %d, %v\n%s", exit.Code, err, exit.Stderr)
	}
	return s, exit.Code
}

// ExpectPrograms checks how many programs are attached to a cgroup at each hook where the
// filter has one.
func ExpectPrograms(t testing.TB, cgroup string, n int) {
	t.Helper()
	dir, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, hook := range []ebpf.AttachType{
		ebpf.AttachCGroupInetEgress, ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect,
		ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg,
	} {
		attached, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: hook})
		if err != nil {
			t.Fatal(err)
		}
		if len(attached.Programs) != n {
			t.Errorf("%d programs are attached as %v, want %d", len(attached.Programs), hook, n)
		}
	}
}

// Binary returns the path of the real command: the value of binaryVar, or a command that is
// built on the first call.
func Binary(t testing.TB) string {
	t.Helper()
	path, err := buildBinary()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// binaryVar in the environment names a built command, for machines without Go.
const binaryVar = "EGRESSBPF_BINARY"

var buildBinary = sync.OnceValues(func() (string, error) {
	if path := os.Getenv(binaryVar); path != "" {
		return path, nil
	}
	path := filepath.Join(os.TempDir(), "egressbpf") // Main removes it
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", path, "github.com/egressbpf/egressbpf/cmd/egressbpf")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s", cmd, err, out)
	}
	return path, nil
})
