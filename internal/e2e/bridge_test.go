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

// TestNewBridge makes bridges as Docker does, while the service runs: what comes from them
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

	bridges := []string{"docker0", "br-0123456789ab", "br-0123456789ac"}
	judged := func() (_ loader.Defence, all bool) {
		status, _ := s.Status(t)
		n := 0
		for _, h := range status.Hooks {
			if h.Attached && h.Name == "host_forward4" {
				all = true
			}
			if h.Attached && h.Name == "host_ingress" && slices.Contains(bridges, h.Device) {
				n++
			}
		}
		i := slices.IndexFunc(status.Defences, func(d loader.Defence) bool { return d.Name == "host_side" })
		return status.Defences[i], all || n == len(bridges)
	}
	if d, _ := judged(); !d.Active {
		t.Fatalf("without a bridge of Docker's: %+v", d)
	}
	for _, name := range bridges {
		s.Host.IP(t, "link add "+name+" type bridge")
	}
	deadline := time.Now().Add(20 * time.Second) // the periodic check comes later
	for {
		d, ok := judged()
		if ok && d.Active {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("not all are judged: %+v", d)
		}
		time.Sleep(50 * time.Millisecond) // there is nothing to wait on
	}
}
