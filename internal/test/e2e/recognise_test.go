package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// scope returns the name that Docker's systemd driver gives to a container's cgroup.
func scope(n int) string { return fmt.Sprintf("docker-%064x.scope", n) }

// TestContainersBesideServices attaches without saying where the containers are, and starts
// a thousand of them. Each sends its first packet at once. A service beside them is not
// affected.
func TestContainersBesideServices(t *testing.T) {
	s := newScene(t)
	slice := filepath.Join(s.policed, "system.slice")
	service := s.agent(s.a, filepath.Join(slice, "cloud-init.service"))
	seen := s.Capture(t)
	blocked := []string{at(lab.Metadata4, 80).String(), at(lab.Metadata6, 80).String()}
	start := func(n int) error {
		path := filepath.Join(slice, scope(n))
		if err := os.Mkdir(path, 0o755); err != nil {
			return err
		}
		return s.a.First(path, blocked...)
	}
	if err := start(0); err != nil {
		t.Fatal(err)
	}
	if got := seen.Settle(t); len(got) < 4 {
		t.Fatalf("without the filter %d packets arrived: %v", len(got), got)
	}

	s.t.Cleanup(func() { s.Egressbpf(t, "detach") })
	s.Egressbpf(t, "attach")
	seen.Settle(t)
	seen.Forget()
	const containers, starters = 1000, 4
	var wait sync.WaitGroup
	for i := range starters {
		wait.Go(func() {
			for n := 1 + i; n <= containers; n += starters {
				if err := start(n); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wait.Wait()
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("arrived: %v", arrived)
	}
	const attempts = 4 // each of a datagram and a connection, to two addresses
	counted := s.Stats(t)
	if got := counted.Total.Blocked.Connects; got != attempts*containers || len(counted.Containers) != containers+1 {
		t.Errorf("%d attempts of %d containers counted, want %d of %d", got, len(counted.Containers), attempts*containers, containers+1)
	}
	for n := range containers + 1 {
		if err := os.Remove(filepath.Join(slice, scope(n))); err != nil {
			t.Error(err)
		}
	}
	testenv.Eventually(t, "the containers are forgotten", func() bool { return len(s.Stats(t).Containers) == 0 })
	if got := s.Stats(t).Total.Blocked.Connects; got != attempts*containers {
		t.Errorf("%d attempts in the total after the containers went, want %d", got, attempts*containers)
	}

	for _, to := range []netip.Addr{lab.Metadata4, lab.Metadata6} {
		sock := service.Socket(lab.Family(to), unix.SOCK_STREAM, 0)
		if r := sock.Connect(at(to, 80)); r.Errno != ok {
			t.Errorf("service to %s: %v", to, r.Errno)
		}
		sock.Close()
	}
	for range 20 {
		sock := service.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if r := sock.Connect(at(lab.Mail4, 25)); r.Errno != ok {
			t.Errorf("mail of a service: %v", r.Errno)
		}
		sock.Close()
	}
}
