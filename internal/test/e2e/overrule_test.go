package e2e

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// TestOverrule lets a container that may attach programs attach one that passes everything
// to its own cgroup. The kernel asks both programs, and one refusal is enough.
func TestOverrule(t *testing.T) {
	s := newScene(t)
	s.attach()
	if err := s.a.Overrule(s.a.cgroup); err != nil {
		t.Fatal(err)
	}
	seen := s.Capture(t)
	for _, kind := range []int{unix.SOCK_DGRAM, unix.SOCK_STREAM} {
		socket := s.a.Socket(unix.AF_INET, kind, 0)
		if r := socket.Connect(at(lab.Metadata4, 80)); r.Errno == 0 {
			t.Errorf("connected, type %d", kind)
		}
		socket.Close()
	}
	header := lab.Header{Src: s.a.IPv4, Dst: lab.Metadata4, Proto: unix.IPPROTO_UDP}
	s.a.Raw(header.Finished(lab.UDP(1024, 80, 8)), lab.Metadata4)
	if packets := seen.Settle(t); len(packets) > 0 {
		t.Errorf("arrived: %v", packets)
	}
	if got := s.row(s.a).Blocked; got.Packets != 1 || got.Connects != 2 {
		t.Errorf("counted %+v", got)
	}
}
