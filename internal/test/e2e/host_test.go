package e2e

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/maps"
	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// toHost is the link through which a container reaches the host.
var toHost = lab.Link{Device: "eth0", Source: net.HardwareAddr{2, 0, 0, 0, 0x90, 0x99}, Gateway: net.HardwareAddr{2, 0, 0, 0, 0x90, 1}}

const tcpSYN, tcpRST, tcpACK = 0x02, 0x04, 0x10

// attachHost attaches the filter and the host side, without socket_families.
func (s *scene) attachHost(flags ...string) {
	s.t.Helper()
	s.attach(append([]string{"--host-devices", "br0", "--socket-families", "any", "--smtp-rate", scarce}, flags...)...)
}

// forge sends IP packets to the host from a packet socket.
func (s *scene) forge(c *container, packets ...[]byte) {
	s.t.Helper()
	if err := c.Send("AF_PACKET", toHost, packets...); err != nil {
		s.t.Fatal(err)
	}
}

// segment returns a TCP packet.
func segment(from, to netip.AddrPort, seq, ack uint32, flags uint8) []byte {
	tcp := lab.TCP(from.Port(), to.Port(), seq, flags)
	binary.BigEndian.PutUint32(tcp[8:], ack)
	return lab.Header{Src: from.Addr(), Dst: to.Addr(), Proto: unix.IPPROTO_TCP}.Finished(tcp)
}

func mac(c *container) (addr net.HardwareAddr) {
	c.Do(func() {
		if device, err := net.InterfaceByName("eth0"); err == nil {
			addr = device.HardwareAddr
		}
	})
	return addr
}

// A SYN that was let through, and its repeats, go to somebody other than the host. The host
// gets similar SYNs, from other ports.
func TestRepeatsThatGoElsewhere(t *testing.T) {
	s := newScene(t)
	s.Host.NoBridgeNetfilter(t, "iptables") // which would have what passes the bridge judged
	s.attachHost()
	seen := s.Capture(t)
	accomplice := s.b.Socket(unix.AF_PACKET, unix.SOCK_RAW, int(unix.ETH_P_IP<<8&0xff00|unix.ETH_P_IP>>8))
	s.a.IP(t, "neigh replace 10.90.0.1 lladdr "+mac(s.b).String()+" dev eth0 nud permanent")
	const paid, forged = 5, 20
	mail := at(lab.Mail4, 25)
	for range paid {
		if r := s.a.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0).Connect(mail); r.Errno != unix.EINPROGRESS {
			t.Fatal(r.Errno)
		}
	}
	for sent := 0; sent < forged; {
		r := accomplice.Receive()
		if r.Errno != ok {
			t.Fatalf("after %d SYNs: %v", sent, r.Errno)
		}
		const ip = 14
		if len(r.Data) < ip+40 || r.Data[ip+9] != unix.IPPROTO_TCP || r.Data[ip+33] != tcpSYN {
			continue
		}
		sent++
		s.forge(s.a, segment(at(s.a.IPv4, uint16(1024+sent)), mail, binary.BigEndian.Uint32(r.Data[ip+24:]), 0, tcpSYN))
	}
	// Those that were paid for, and as many that take tokens of the bridge's bucket.
	if n := connections(seen.Settle(t), 25, netip.Addr{}); n > 2*paid {
		t.Errorf("%d mail connections of %d that were paid for, want at most %d", n, paid, 2*paid)
	}
}

// A server with SYN cookies accepts a connection from each acknowledgement with the right
// number, and accepts it again after a reset.
func TestCookieIsNoTicket(t *testing.T) {
	s := newScene(t)
	s.Server.Sysctl(t, "ipv4/tcp_syncookies", "2")
	seen := s.Capture(t)
	const tries = 60
	made := func(port uint16) int {
		from, mail := at(s.a.IPv4, port), at(lab.Mail4, 25)
		before := s.cookiesTaken()
		raw := s.a.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP)
		defer raw.Close()
		s.forge(s.a, segment(from, mail, 1, 0, tcpSYN))
		var cookie uint32
		for {
			r := raw.Receive()
			if r.Errno != ok {
				t.Fatalf("no answer to a SYN: %v", r.Errno)
			}
			if len(r.Data) >= 40 && binary.BigEndian.Uint16(r.Data[22:]) == port && r.Data[33] == tcpSYN|tcpACK {
				cookie = binary.BigEndian.Uint32(r.Data[24:])
				break
			}
		}
		for range tries {
			s.forge(s.a, segment(from, mail, 2, cookie+1, tcpACK), segment(from, mail, 2, 0, tcpRST))
		}
		seen.Settle(t)
		return s.cookiesTaken() - before
	}
	if n := made(2000); n != tries {
		t.Fatalf("without the filter, %d connections of %d", n, tries)
	}
	s.attachHost()
	if n := made(2001); n > 5 {
		t.Errorf("%d connections with a bucket of 5", n)
	}
}

// cookiesTaken returns how many connections the server has accepted from SYN cookies.
func (s *scene) cookiesTaken() (n int) {
	s.t.Helper()
	var table []byte
	var err error
	s.Server.Do(func() { table, err = os.ReadFile("/proc/thread-self/net/netstat") })
	if err != nil {
		s.t.Fatal(err)
	}
	lines := strings.Split(string(table), "\n")
	names, values := strings.Fields(lines[0]), strings.Fields(lines[1])
	i := slices.Index(names, "SyncookiesRecv")
	if i < 0 {
		s.t.Fatal("the kernel does not count SYN cookies")
	}
	if n, err = strconv.Atoi(values[i]); err != nil {
		s.t.Fatal(err)
	}
	return n
}

// If a container may reach the metadata service, its neighbour may not send there in its
// name, not even packets without data.
func TestSegmentsOfAPermittedNeighbour(t *testing.T) {
	s := newScene(t)
	s.attachHost()
	s.configure(s.a, maps.Change{Mask: maps.MayReachMetadata, Flags: maps.MayReachMetadata})
	seen := s.Capture(t)
	for _, to := range []netip.AddrPort{at(lab.Metadata4, 80), at(lab.Metadata6, 80)} {
		from := at(s.a.addr(to.Addr()), 2000)
		tcp := s.a.Socket(lab.Family(to.Addr()), unix.SOCK_STREAM, 0)
		if r := tcp.Bind(from); r.Errno != ok {
			t.Fatal(r.Errno)
		}
		if r := tcp.Connect(to); r.Errno != ok {
			t.Fatalf("%s: %v", to, r.Errno)
		}
		seen.Settle(t)
		seen.Forget()
		const forged, seq = 20, 1 << 16
		for i := range uint32(forged) {
			// Outside the window, so that the connection survives.
			s.forge(s.b, segment(from, to, seq+i, 1, []uint8{tcpACK, tcpRST, tcpRST | tcpACK, tcpACK | 1}[i%4]))
		}
		if n := lab.Count(seen.Settle(t), func(p lab.Packet) bool { return p.Dst == to && p.Seq >= seq && p.Seq < seq+forged }); n > 0 {
			t.Errorf("%s: %d of %d forged segments arrived", to, n, forged)
		}
		tcp.Close()
		if sent, received := s.a.Transfer(to, 1<<20); received != sent.String() {
			t.Errorf("%s: sent %s, received %s", to, sent, received)
		}
	}
}

// A neighbour that keeps the bridge's bucket empty and answers for others' connections
// cannot keep others from repeating a SYN that was lost.
func TestLostSYNAndABadNeighbour(t *testing.T) {
	s := newScene(t)
	s.attachHost()
	seen := s.Capture(t)
	for _, mail := range []netip.AddrPort{at(lab.Mail4, 25), at(lab.Mail6, 25)} {
		s.Server.NFT(t, "table inet deaf { chain input { type filter hook input priority 0; tcp dport 25 drop; }; }")
		from := at(s.a.addr(mail.Addr()), 2000)
		tcp := s.a.Socket(lab.Family(mail.Addr()), unix.SOCK_STREAM, 0)
		if r := tcp.Bind(from); r.Errno != ok {
			t.Fatal(r.Errno)
		}
		begun := time.Now()
		wait := tcp.ConnectMeanwhile(mail)
		syn := func(p lab.Packet) bool { return p.SYN(25) && p.Src == from }
		seen.Await(t, 1, "SYN", syn)
		var seq uint32
		for _, p := range seen.Settle(t) {
			if syn(p) {
				seq = p.Seq
			}
		}
		var forged [][]byte
		for i := range uint32(60) {
			forged = append(forged, segment(at(from.Addr(), uint16(3000+i)), mail, i, 0, tcpSYN))
		}
		for _, flags := range []uint8{tcpACK, tcpRST, tcpRST | tcpACK, tcpACK | 1} {
			forged = append(forged, segment(from, mail, seq+1, 1, flags), segment(from, mail, seq, 1, flags))
		}
		s.forge(s.b, forged...)
		seen.Settle(t)
		s.Server.NFT(t, "delete table inet deaf")
		// The time between two repeats doubles.
		deaf := time.Since(begun)
		if r := wait(); r.Errno != ok || r.Elapsed > 2*deaf+5*time.Second {
			t.Errorf("%s: %v after %v, %v of which the server was deaf", mail, r.Errno, r.Elapsed, deaf)
		}
		tcp.Close()
	}
}

// Packets of a container to the host's tunnels take no tokens from others on its bridge.
func TestTunnelsTakeNoTokens(t *testing.T) {
	s := newScene(t)
	other := &container{Container: s.Container(t), cgroup: filepath.Join(filepath.Dir(s.policed), "other")}
	other.Agent = s.agent(other, other.cgroup)
	s.attachHost()
	mail := at(lab.Mail4, 25)
	var udp, raw [][]byte
	for i := range uint32(20) {
		inner := segment(at(s.b.IPv4, uint16(1024+i)), mail, i, 0, tcpSYN)
		udp = append(udp, slices.Concat([]byte{8, 0, 0, 0, 0, 0, 42, 0}, toHost.Frame(inner)))
		outer := lab.Header{Src: s.b.IPv4, Dst: lab.Gateway4}
		for proto, header := range map[uint8][]byte{unix.IPPROTO_IPIP: nil, unix.IPPROTO_GRE: {0, 0, 8, 0}} {
			outer.Proto = proto
			raw = append(raw, outer.Packet(append(header, inner...)))
		}
	}
	for _, port := range []uint16{4789, 4790, 8472, 6081, 6635, 2152} {
		for _, to := range []netip.Addr{lab.Gateway4, lab.Gateway6} {
			if err := s.b.SendUDP(at(to, port), udp...); err != nil {
				t.Error(err)
			}
		}
	}
	if err := s.b.Send("raw IP", toHost, raw...); err != nil {
		t.Error(err)
	}
	before := s.Stats(t).Total
	if want := uint64(6*2*len(udp) + len(raw)); before.HostSide.Packets != want || before.SMTP.Allowed != 0 {
		t.Errorf("counted %+v, want %d packets at the host side and no mail", before, want)
	}
	for range 5 {
		if r := other.Connect(mail); r.Errno != ok || r.Elapsed > 5*time.Second {
			t.Fatalf("mail of a container that is not policed: %v after %v", r.Errno, r.Elapsed)
		}
	}
}
