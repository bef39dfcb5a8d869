package e2e

import (
	"bufio"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// serve starts the service and waits until the filter is in force. The service ends with
// the test, or when stop is called.
func (s *scene) serve(flags ...string) (stop func()) {
	s.t.Helper()
	service := exec.Command(lab.Binary(s.t), append([]string{"run", "--cgroup", s.policed, "--docker-host", "unix:///nowhere"}, flags...)...)
	stderr, err := service.StderrPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	s.Host.Do(func() { err = service.Start() })
	if err != nil {
		s.t.Fatal(err)
	}
	lines := bufio.NewScanner(stderr)
	stop = sync.OnceFunc(func() {
		if err := service.Process.Signal(unix.SIGTERM); err != nil {
			s.t.Error(err)
		}
		if err := service.Wait(); err != nil {
			s.t.Error(err)
		}
	})
	s.t.Cleanup(func() {
		stop()
		s.Egressbpf(s.t, "detach")
	})
	for lines.Scan() && !strings.Contains(lines.Text(), "in force") {
	}
	go io.Copy(io.Discard, stderr)
	return stop
}

// soon waits for a condition that no event announces. It takes a moment, except under
// emulation, where an attach alone takes half a minute.
func soon(t *testing.T, what string, ok func() bool) {
	t.Helper()
	const patience = 3 * time.Minute
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not after %v", what, patience)
		}
	}
}

// TestNewTunnel makes a tunnel while the service runs. Soon after that the tunnel is closed
// to all packets of containers. Without a tunnel, packets to the host meet no program of
// their own, unless nobody watches for tunnels.
func TestNewTunnel(t *testing.T) {
	s := newScene(t)
	stop := s.serve()
	if _, own := s.delivers(); own {
		t.Error("packets to a host without tunnels are judged")
	}
	const port = 7999
	arrives := func() bool {
		if err := s.a.SendUDP(at(lab.Gateway4, port), []byte("innocent")); err != nil {
			t.Fatal(err)
		}
		before := s.Stats(t).Total.HostSide.Packets
		if err := s.a.SendUDP(at(lab.Gateway4, port), []byte("innocent")); err != nil {
			t.Fatal(err)
		}
		return s.Stats(t).Total.HostSide.Packets == before
	}
	if !arrives() {
		t.Fatal("a port without a tunnel is closed")
	}
	s.Host.IP(t, fmt.Sprintf("link add v0 type vxlan id 7 dstport %d", port), "link set v0 up")
	soon(t, "the tunnel's port is closed", func() bool { return !arrives() })
	if all, _ := s.delivers(); !all {
		t.Error("packets to a host with a tunnel are not all judged")
	}
	s.Host.IP(t, "link del v0")
	s.Host.IP(t, fmt.Sprintf("link add v1 type vxlan id 8 dstport %d", port+1), "link set v1 up")
	soon(t, "the port is open again", arrives)
	s.Host.IP(t, "link del v1")
	stop()
	if all, _ := s.delivers(); !all {
		t.Error("nobody watches for tunnels, and packets to the host are not all judged")
	}
}

// TestNewBridge makes bridges as Docker does, while the service runs. Soon after that their
// packets are judged, also on kernels with a filter for each bridge.
func TestNewBridge(t *testing.T) {
	s := newScene(t)
	s.serve()

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
	soon(t, "all bridges are judged", func() bool {
		d, ok := judged()
		return ok && d.Active
	})
}
