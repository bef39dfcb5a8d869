package e2e

import (
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/cgroup"
	"github.com/egressbpf/egressbpf/internal/loader"
	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// configure changes what holds for one container.
func (s *scene) configure(c *container, change maps.Change) {
	s.t.Helper()
	root, err := cgroup.FindRoot()
	if err != nil {
		s.t.Fatal(err)
	}
	rel, err := root.Rel(c.cgroup)
	if err != nil {
		s.t.Fatal(err)
	}
	id, err := root.ID(rel)
	if err != nil {
		s.t.Fatal(err)
	}
	state, err := loader.New(loader.DefaultPinPath, root).State()
	if err != nil {
		s.t.Fatal(err)
	}
	defer state.Close()
	if err := state.Configure(id, change); err != nil {
		s.t.Fatal(err)
	}
}

// TestMetadataForOneContainer opens the metadata service to one container. Its own sockets
// reach the service, through the host side; no other container can make use of that.
func TestMetadataForOneContainer(t *testing.T) {
	s := newScene(t)
	s.attach("--host-devices", "br0", "--socket-families", "any")
	s.configure(s.a, maps.Change{Mask: maps.MayReachMetadata, Flags: maps.MayReachMetadata})
	seen := s.Capture(t)
	for _, to := range []netip.Addr{lab.Metadata4, lab.Metadata6} {
		family := lab.Family(to)
		tcp := s.a.Socket(family, unix.SOCK_STREAM, 0)
		if r := tcp.Connect(at(to, 80)); r.Errno != ok {
			t.Fatalf("%s: %v", to, r.Errno)
		}
		// More than one packet can hold.
		if r := tcp.Send(make([]byte, 100_000), netip.AddrPort{}); r.Errno != ok {
			t.Errorf("%s: %v", to, r.Errno)
		}
		if r := s.b.Socket(family, unix.SOCK_STREAM, 0).Connect(at(to, 80)); r.Errno != unix.ECONNREFUSED {
			t.Errorf("another container to %s: %v", to, r.Errno)
		}
		if r := s.a.Socket(family, unix.SOCK_DGRAM, 0).Send([]byte("hello"), at(to, 53)); r.Errno != ok {
			t.Errorf("datagram to %s: %v", to, r.Errno)
		}
		tcp.Close()
	}
	arrived := seen.Settle(t)
	for _, to := range []netip.Addr{lab.Metadata4, lab.Metadata6} {
		if n := lab.Count(arrived, func(p lab.Packet) bool { return p.Dst.Addr() == to }); n < 4 {
			t.Errorf("%d packets to %s arrived", n, to)
		}
	}
	stats := s.Stats(t).Total
	if stats.HostSide.Packets != 0 || stats.Blocked.Packets != 0 || stats.Blocked.Connects != 2 {
		t.Errorf("counted: %+v", stats)
	}

	// Packets that bypass the filter have no permit, whether they forge the flow or not.
	seen.Forget()
	sent := 0
	for _, c := range []*container{s.a, s.b} {
		for _, port := range []uint16{1024, 53} {
			header := lab.Header{Src: s.a.IPv4, Dst: lab.Metadata4, Proto: unix.IPPROTO_UDP}
			mac := net.HardwareAddr{2, 0, 0, 0, 0x90, 1}
			link := lab.Link{Device: "eth0", Source: net.HardwareAddr{2, 0, 0, 0, 0x90, 9}, Gateway: mac}
			if err := c.Send("AF_PACKET", link, header.Finished(lab.UDP(port, 80, 8))); err != nil {
				t.Fatal(err)
			}
			sent++
		}
	}
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("arrived: %v", arrived)
	}
	if got := s.Stats(t).Total.HostSide.Packets; got != uint64(sent) {
		t.Errorf("host side: %d packets, want %d", got, sent)
	}
}

// TestForgedToTheBridgesGroup sends a packet with the source of the metadata service to the
// host, in a frame to a group that a bridge does not forward. The host would answer to the
// service.
func TestForgedToTheBridgesGroup(t *testing.T) {
	s := newScene(t)
	seen := s.Capture(t)
	forge := func() int {
		header := lab.Header{Src: lab.Metadata4, Dst: lab.Gateway4, Proto: unix.IPPROTO_ICMP}
		link := lab.Link{
			Device: "eth0", Source: net.HardwareAddr{2, 0, 0, 0, 0x90, 9}, Gateway: net.HardwareAddr{1, 0x80, 0xc2, 0, 0, 0x0e},
		}
		if err := s.a.Send("AF_PACKET", link, header.Finished(lab.Echo(false))); err != nil {
			t.Fatal(err)
		}
		defer seen.Forget()
		return lab.Count(seen.Settle(t), func(p lab.Packet) bool { return p.Dst.Addr() == lab.Metadata4 })
	}
	if forge() == 0 {
		t.Error("without the filter nothing arrived")
	}
	s.attach("--host-devices", "br0")
	if n := forge(); n != 0 {
		t.Errorf("%d packets arrived", n)
	}
	if got := s.Stats(t).Total.HostSide.Packets; got == 0 {
		t.Error("nothing is counted")
	}
}
