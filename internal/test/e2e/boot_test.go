package e2e

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// TestRefusedByAttach has a config file in which only an attach finds what is wrong, as at a boot: nothing is
// in force.
func TestRefusedByAttach(t *testing.T) {
	n := lab.New(t)
	outer := lab.Cgroup(t)
	file := filepath.Join(t.TempDir(), "config.yaml")
	text := fmt.Sprintf("mode: audit\ncgroups: [%s, %s/inner]\n", outer, outer)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"check"}, {"attach"}, {"run"}} {
		exit := n.Run(t, exec.Command(lab.Binary(t), append(args, "--config", file)...))
		if exit.Code != 2 || !strings.Contains(exit.Stderr, "inner") {
			t.Errorf("%s: exit code %d\n%s", args, exit.Code, exit.Stderr)
		}
		if s, _ := n.Status(t); len(s.Cgroups) > 0 {
			t.Fatalf("%s: in force at %q", args, s.Cgroups)
		}
	}
	t.Cleanup(func() { n.Egressbpf(t, "detach") })
	for _, args := range [][]string{
		{"--config", file},
		{"--config", file, "--smtp-rate", "5/min"}, // a unit's drop-in can have errors too
		{"--config", file, "--smtp-burst", "many"},
		{"--nonsense"},
		{"--config", ""},
		{"extra"},
	} {
		exit := n.Run(t, exec.Command(lab.Binary(t), append([]string{"run", "--or-defaults"}, args...)...))
		if exit.Code != 2 || !strings.Contains(exit.Stderr, "are in force: nothing was in force before") {
			t.Errorf("run --or-defaults %q: exit code %d\n%s", args, exit.Code, exit.Stderr)
		}
		if s, code := n.Status(t); code != 0 || s.Mode != "enforce" {
			t.Errorf("run --or-defaults %q: exit code %d, mode %s", args, code, s.Mode)
		}
		n.Egressbpf(t, "detach")
	}
}

// TestTwoServices starts a service beside another one.
func TestTwoServices(t *testing.T) {
	s := newScene(t)
	s.serve()
	second := exec.Command(lab.Binary(t), "run", "--cgroup", s.policed, "--docker-host", "unix:///nowhere")
	stderr, err := second.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.Host.Do(func() { err = second.Start() })
	if err != nil {
		t.Fatal(err)
	}
	told, inForce := false, false
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		told = told || strings.Contains(lines.Text(), "another egressbpf run keeps the filter in force")
		if !inForce && strings.Contains(lines.Text(), `msg="in force"`) {
			inForce = true
			_ = second.Process.Signal(unix.SIGTERM)
		}
	}
	if err := second.Wait(); err != nil || !told {
		t.Errorf("told: %v, %v", told, err)
	}
	exit := s.Run(t, exec.Command(lab.Binary(t), "detach", "--cgroup", s.policed))
	if exit.Code != 0 || !strings.Contains(exit.Stderr, "will restore") {
		t.Errorf("detach beside the first: exit code %d\n%s", exit.Code, exit.Stderr)
	}
}
