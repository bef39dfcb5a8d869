package e2e

import (
	"bufio"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/loader"
)

// TestNewBridge makes a bridge as Docker does, while the service runs: what comes from it
// is judged soon, also where the kernel judges devices one by one.
func TestNewBridge(t *testing.T) {
	s := newScene(t)
	service := exec.Command(lab.Binary(t), "run", "--cgroup", s.policed, "--docker-host", "unix:///nowhere")
	stderr, err := service.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.Host.Do(func() { err = service.Start() })
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stderr)
	t.Cleanup(func() {
		if err := service.Process.Signal(unix.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := service.Wait(); err != nil {
			t.Error(err)
		}
		s.Egressbpf(t, "detach")
	})
	for lines.Scan() && !strings.Contains(lines.Text(), "in force") {
	}
	go io.Copy(io.Discard, stderr)

	judged := func() (loader.Defence, bool) {
		status, _ := s.Status(t)
		i := slices.IndexFunc(status.Defences, func(d loader.Defence) bool { return d.Name == "host_side" })
		return status.Defences[i], slices.ContainsFunc(status.Hooks, func(h loader.Hook) bool {
			return h.Attached && (h.Name == "host_forward4" || h.Name == "host_ingress" && h.Device == "docker0")
		})
	}
	if d, _ := judged(); !d.Active {
		t.Fatalf("without a bridge of Docker's: %+v", d)
	}
	s.Host.IP(t, "link add docker0 type bridge")
	deadline := time.Now().Add(20 * time.Second) // the periodic check comes later
	for {
		d, ok := judged()
		if ok && d.Active {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("docker0 is not judged: %+v", d)
		}
		time.Sleep(50 * time.Millisecond) // there is nothing to wait on
	}
}
