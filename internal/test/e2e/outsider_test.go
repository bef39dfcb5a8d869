package e2e

import (
	"encoding/binary"
	"net/netip"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// If a mail server, or somebody in its name, repeats segments before the client has sent
// data, the client's kernel acknowledges them a few times. That costs no token, and the
// connection goes on.
func TestOldSegmentsTakeNoTokens(t *testing.T) {
	for _, hostSide := range []string{"on", "off"} {
		for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
			t.Run(mail.String()+", host side "+hostSide, func(t *testing.T) {
				s := newScene(t)
				s.attach("--smtp-rate", scarce, "--host-side", hostSide)
				outside := s.agent(s.a, filepath.Join(filepath.Dir(s.policed), "outside"))
				seen := s.Capture(t)
				own, server := at(s.a.addr(mail), 2001), at(mail, 25)
				sock := s.a.Socket(lab.Family(mail), unix.SOCK_STREAM, 0)
				if r := sock.Bind(own); r.Errno != ok {
					t.Fatal(r.Errno)
				}
				if r := sock.Connect(server); r.Errno != ok {
					t.Fatal(r.Errno)
				}
				var last lab.Packet
				for _, p := range seen.Settle(t) {
					if p.Src == own && p.Flags == 0x10 {
						last = p
					}
				}
				for range 24 {
					old := append(lab.TCP(25, own.Port(), last.Ack-4, 0x18), "220 "...)
					binary.BigEndian.PutUint32(old[8:], last.Seq)
					packet := lab.Header{Src: mail, Dst: own.Addr(), Proto: unix.IPPROTO_TCP}.Finished(old)
					if r := outside.Raw(packet, own.Addr()); r.Errno != ok {
						t.Fatal(r.Errno)
					}
				}
				seen.Settle(t)
				if got := s.row(s.a).SMTP; got.Allowed != 1 {
					t.Errorf("counted %+v, want one connection", got.SMTP)
				}
				if r := s.a.Connect(server); r.Errno != ok {
					t.Errorf("another connection: %v", r.Errno)
				}
				if r := sock.Send([]byte("QUIT\r\n"), netip.AddrPort{}); r.Errno != ok {
					t.Errorf("the connection: %v", r.Errno)
				}
				seen.Await(t, 1, "data", func(p lab.Packet) bool { return p.Src == own && p.Flags&0x08 != 0 })
			})
		}
	}
}

// Tunnels of the host do not end on a container's own loopback.
func TestTunnelPortsOverTheOwnLoopback(t *testing.T) {
	s := newScene(t)
	s.attach()
	for _, port := range []uint16{2152, 4789, 6080, 9999} {
		to := at(netip.MustParseAddr("127.0.0.1"), port)
		in := s.a.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		if r := in.Bind(to); r.Errno != ok {
			t.Fatal(r.Errno)
		}
		if err := s.a.SendUDP(to, []byte("hello")); err != nil {
			t.Errorf("port %d: %v", port, err)
			continue
		}
		if r := in.Receive(); string(r.Data) != "hello" {
			t.Errorf("port %d: received %q, %v", port, r.Data, r.Errno)
		}
	}
}
