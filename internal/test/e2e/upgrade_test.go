package e2e

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// earlierVersion is the first version from which an upgrade, and a way back, must work.
const earlierVersion = "5acadd6"

// buildEarlier builds the command of that version, from the repository.
func buildEarlier(t *testing.T) string {
	t.Helper()
	if err := exec.Command("git", "rev-parse", "--git-dir").Run(); err != nil {
		t.Skip("this is no repository, which would have the earlier version")
	}
	dir := t.TempDir()
	shell := func(script string) {
		t.Helper()
		cmd := exec.Command("bash", "-o", "pipefail", "-ec", script)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "DIR="+dir, "VERSION="+earlierVersion)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", script, err, out)
		}
	}
	shell(`git -C "$(git rev-parse --show-toplevel)" archive $VERSION | tar x -C $DIR`)
	path := filepath.Join(dir, "egressbpf-earlier")
	shell(`cd $DIR && go build -buildvcs=false -o egressbpf-earlier ./cmd/egressbpf`)
	return path
}

// TestEarlierVersion upgrades from an earlier version and goes back to it, again and again,
// while a container keeps trying to get through and some attaches are killed.
func TestEarlierVersion(t *testing.T) {
	earlier := buildEarlier(t)
	s := newScene(t)
	t.Cleanup(func() { s.Egressbpf(t, "detach") })
	const rate, burst = 20, 10
	attach := []string{"attach", "--cgroup", s.policed, "--smtp-rate", fmt.Sprint(rate, "/second"), "--smtp-burst", fmt.Sprint(burst)}
	run := func(binary string, args ...string) {
		t.Helper()
		if exit := s.Run(t, exec.Command(binary, args...)); exit.Code != 0 {
			t.Fatalf("%s %s: exit code %d\n%s", filepath.Base(binary), strings.Join(args, " "), exit.Code, exit.Stderr)
		}
	}
	run(earlier, attach...)
	run(earlier, "limit", "set", s.b.cgroup, "--rate", "7/hour", "--burst", "3")
	seen := s.Capture(t)
	begin := time.Now()
	s.a.Flood(lab.Flood{
		Blocked: []netip.Addr{lab.Metadata4, lab.Metadata6},
		Mail:    at(lab.Mail4, 25),
		Source:  s.a.IPv4,
	})
	random := rand.New(rand.NewPCG(3, 4))
	for range 5 {
		// It may be killed at any moment.
		cmd := exec.Command(lab.Binary(t), attach...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(time.Duration(random.Int64N(int64(300*time.Millisecond))), func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		if exit := s.Run(t, exec.Command(lab.Binary(t), "status")); exit.Code != 0 && exit.Code != 3 {
			t.Errorf("status after a kill: exit code %d\n%s", exit.Code, exit.Stderr)
		}
		run(lab.Binary(t), attach...)
		if status, _ := s.Status(t); !status.Enforcing {
			t.Errorf("after taking over: %+v", status.Hooks)
		}
		run(lab.Binary(t), "detach", "--hand-over")
		run(earlier, attach...)
	}
	run(lab.Binary(t), attach...)
	flooded := s.a.StopFlood()
	elapsed := time.Since(begin).Seconds()
	s.expectFlood(flooded, seen, rate, burst, elapsed)
	if limit := s.row(s.b).SMTP; limit.Rate.String() != "7/hour" || limit.Burst != 3 {
		t.Errorf("the limit set by hand became %s, burst %d", limit.Rate, limit.Burst)
	}
}
