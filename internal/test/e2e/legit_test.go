package e2e

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// Packets of more than 64 KiB, whose length no IP header can state, pass like others.
func TestBigTCP(t *testing.T) {
	s := newScene(t)
	const size = " gso_max_size 196608"
	s.a.IP(t, "link set eth0"+size)
	s.Host.IP(t, "link set br0"+size, "link set "+s.a.Port+size, "link set "+s.b.Port+size)
	s.attach()
	s.b.Listen(t, 8080)
	if sent, received := s.a.Transfer(at(s.b.IPv6, 8080), 50<<20); received != sent.String() {
		t.Errorf("sent %s, received %s", sent, received)
	}
	s.expectNothingCounted()
}

// expectNothingCounted checks that no packet was refused.
func (s *scene) expectNothingCounted() {
	s.t.Helper()
	total := s.Stats(s.t).Total
	if total.Blocked.Packets+total.Blocked.Connects+total.Malformed.Packets+total.SMTP.RateLimited+total.SMTP.Allowed > 0 {
		s.t.Errorf("counted %+v, want nothing", total)
	}
}

func TestNameResolution(t *testing.T) {
	s := newScene(t)
	resolve := func(server netip.Addr) {
		t.Helper()
		for _, network := range []string{"udp", "tcp"} {
			if addr, err := s.a.Resolve(server, network); err != nil || addr != lab.ResolvedTo {
				t.Errorf("%s over %s: %v, %v", server, network, addr, err)
			}
		}
	}
	s.attach()
	resolve(lab.Resolver)
	s.expectNothingCounted()
	// The metadata service is the DNS server too.
	for _, flags := range [][]string{
		{"--allow-dns"},
		{"--allow", "169.254.169.254:53/udp,169.254.169.254:53/tcp"},
		{"--allow", "169.254.169.254:53"},
	} {
		s.attach(flags...)
		resolve(lab.Metadata4)
		resolve(lab.Resolver)
		s.expectNothingCounted()
	}
	if r := s.a.Connect(at(lab.Metadata4, 80)); r.Errno != refused {
		t.Errorf("metadata with its DNS allowed: %v, want ECONNREFUSED", r.Errno)
	}
}

func TestPing(t *testing.T) {
	s := newScene(t)
	s.attach()
	for _, to := range []netip.Addr{lab.Other4, lab.Other6, lab.Gateway4, lab.Gateway6, s.b.IPv4, s.b.IPv6} {
		for _, typ := range []int{unix.SOCK_RAW, unix.SOCK_DGRAM} {
			icmp, reply, header := unix.IPPROTO_ICMP, byte(0), 0
			if to.Is6() {
				icmp, reply = unix.IPPROTO_ICMPV6, 129
			} else if typ == unix.SOCK_RAW {
				header = 20
			}
			sock := s.a.Socket(lab.Family(to), typ, icmp)
			if r := sock.Connect(at(to, 0)); r.Errno != ok {
				t.Errorf("%s: connect: %v", to, r.Errno)
			}
			if r := sock.Send(lab.Echo(to.Is6()), netip.AddrPort{}); r.Errno != ok {
				t.Errorf("%s: send: %v", to, r.Errno)
			}
			// A raw socket also sees the neighbours' solicitations.
			r := sock.Receive()
			for r.Errno == ok && r.Data[header] != reply {
				r = sock.Receive()
			}
			if r.Errno != ok {
				t.Errorf("%s: no reply: %v", to, r.Errno)
			}
			sock.Close()
		}
	}
	s.expectNothingCounted()
}

func TestTransfers(t *testing.T) {
	s := newScene(t)
	s.attach()
	s.b.Listen(t, 8080)
	for _, test := range []struct {
		name string
		to   netip.AddrPort
	}{
		{"IPv4", at(lab.Other4, 80)},
		{"IPv6", at(lab.Other6, 80)},
		{"v4-mapped", at(lab.Mapped(lab.Other4), 80)},
		{"IPv4 through a narrow path", at(lab.Narrow4, 80)},
		{"IPv6 through a narrow path", at(lab.Narrow6, 80)},
		{"to another container", at(s.b.IPv4, 8080)},
	} {
		// Packets of up to 64 KiB pass the filter; the device segments them.
		if sent, received := s.a.Transfer(test.to, 10<<20); received != sent.String() || sent.Bytes != 10<<20 {
			t.Errorf("%s: sent %s, received %s", test.name, sent, received)
		}
	}
	// By now the container's kernel knows the path MTU, and makes fragments.
	seen := s.Capture(t)
	for _, to := range []netip.Addr{lab.Narrow4, lab.Narrow6} {
		sock := s.a.Socket(lab.Family(to), unix.SOCK_DGRAM, 0)
		if r := sock.Send(make([]byte, 4000), at(to, 9)); r.Errno != ok {
			t.Errorf("UDP to %s: %v", to, r.Errno)
		}
		got := 0
		for _, p := range seen.Settle(t) {
			if p.Dst.Addr() == to && p.Fragment {
				got++
			}
			if p.Len > 1280 {
				t.Errorf("arrived over a path of 1280 bytes: %s", p)
			}
		}
		if got < 4 {
			t.Errorf("UDP to %s: %d fragments arrived, want at least 4", to, got)
		}
		sock.Close()
	}
	s.expectNothingCounted()
}
