package dockertest

import (
	"encoding/binary"
	"hash/crc32"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
	"github.com/egressbpf/egressbpf/internal/test/testenv"
)

// The host's addresses on the default network.
var gateways = []netip.Addr{netip.MustParseAddr("172.30.0.1"), netip.MustParseAddr("fd00:d0c::1")}

// Containers still reach the services of the host.
func (n *neighbourhood) testHostServices(t *testing.T) {
	n.Host.ServeDNS(t, gateways[0])
	for _, network := range []string{"udp", "tcp"} {
		if addr, err := n.plain.Resolve(gateways[0], network); err != nil || addr != lab.ResolvedTo {
			t.Errorf("DNS over %s: %v, %v", network, addr, err)
		}
	}
	for _, host := range gateways {
		t.Run(host.String(), func(t *testing.T) {
			if sent, received := n.plain.Transfer(at(host, 80), len(big)); received != sent.String() {
				t.Errorf("upload: sent %s, received %s", sent, received)
			}
			expectEchoWithOptions(t, n.plain.Agent, host)
			n.testDatagrams(t, host)
		})
	}
}

// expectEchoWithOptions pings with options that every host understands.
func expectEchoWithOptions(t *testing.T, a *lab.Agent, host netip.Addr) {
	t.Helper()
	const recordRoute = 7 // RFC 791
	proto, reply := unix.IPPROTO_ICMP, byte(icmpReply)
	level, options := unix.IPPROTO_IP, map[int][]byte{unix.IP_OPTIONS: {recordRoute, 7, 4, 0, 0, 0, 0, 0}}
	if host.Is6() {
		proto, reply, level = unix.IPPROTO_ICMPV6, icmp6Reply, unix.IPPROTO_IPV6
		header := append([]byte{0}, padding...)
		options = map[int][]byte{unix.IPV6_HOPOPTS: header, unix.IPV6_DSTOPTS: header}
	}
	s := a.Socket(lab.Family(host), unix.SOCK_RAW, proto)
	defer s.Close()
	for option, value := range options {
		s.Set(level, option, 0, value)
	}
	if r := s.Send(lab.Echo(host.Is6()), at(host, 0)); r.Errno != ok {
		t.Errorf("echo with options: %v", r.Errno)
		return
	}
	for {
		r := s.Receive()
		if r.Errno != ok {
			t.Errorf("echo with options: no answer: %v", r.Errno)
			return
		}
		header := 0
		if host.Is4() {
			header = int(r.Data[0]&15) * 4
		}
		if r.Data[header] == reply {
			return
		}
	}
}

// testDatagrams sends random datagrams of all kinds to ports of the host at which no tunnel
// ends. None may be lost.
func (n *neighbourhood) testDatagrams(t *testing.T, host netip.Addr) {
	const quic = 443
	got := n.receive(t, at(host, quic))
	random := rand.NewChaCha8([32]byte{})
	payload := func(size int) []byte {
		b := make([]byte, size)
		_, _ = random.Read(b)
		return b
	}
	var want []uint32
	check := func(what string, err error, sent ...[]byte) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		for _, p := range sent {
			want = append(want, crc32.ChecksumIEEE(p))
		}
	}
	for i := range 100 {
		segments := make([][]byte, 45)
		for j := range segments {
			segments[j] = payload(1200)
			if i%2 == 0 { // short headers of RFC 9000
				segments[j][0] = segments[j][0]&0x3f | 0x40
			}
		}
		check("segments", n.plain.SendSegments(nil, at(host, quic), segments...), segments...)
	}
	for _, size := range []int{8, 20, 100, 1400} {
		for range 100 {
			p := payload(size)
			check("small datagram", n.plain.SendUDP(at(host, quic), p), p)
		}
	}
	for _, size := range []int{1500, 3000, 9000, 65000} { // in fragments
		for range 10 {
			p := payload(size)
			check("big datagram", n.plain.SendUDP(at(host, quic), p), p)
		}
	}
	slices.Sort(want)
	testenv.Eventually(t, "all datagrams", func() bool { return slices.Equal(got(), want) })
}

// receive receives datagrams, and returns their checksums, sorted.
func (n *neighbourhood) receive(t *testing.T, to netip.AddrPort) func() []uint32 {
	t.Helper()
	var conn *net.UDPConn
	var err error
	n.Host.Do(func() { conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(to)) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	raw, err := conn.SyscallConn()
	if err == nil {
		ctl := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256<<20)
		})
		if err == nil {
			err = ctl
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var sums []uint32
	go func() {
		buf := make([]byte, 1<<16)
		for {
			size, err := conn.Read(buf)
			if err != nil {
				return
			}
			mu.Lock()
			sums = append(sums, crc32.ChecksumIEEE(buf[:size]))
			mu.Unlock()
		}
	}()
	return func() []uint32 {
		mu.Lock()
		defer mu.Unlock()
		return slices.Sorted(slices.Values(sums))
	}
}

// A container may have tunnels to others than the host.
func (n *neighbourhood) testTunnels(t *testing.T) {
	inner := lab.Header{Src: netip.MustParseAddr("192.0.2.1"), Dst: netip.MustParseAddr("192.0.2.2"), Proto: unix.IPPROTO_UDP}.Finished(lab.UDP(9, 9, 100))
	frame := lab.Link{Source: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Gateway: net.HardwareAddr{2, 0, 0, 0, 0, 2}}.Frame(inner)
	vxlan := append([]byte{8, 0, 0, 0, 0, 0, 42, 0}, frame...)
	own := map[bool]netip.Addr{}
	for _, addr := range strings.Fields(n.docker(t, "inspect", "-f", "{{with .NetworkSettings.Networks.bridge}}{{.IPAddress}} {{.GlobalIPv6Address}}{{end}}", "plain")) {
		own[strings.Contains(addr, ":")] = netip.MustParseAddr(addr)
	}
	const times = 20
	for _, to := range []netip.Addr{lab.Other4, lab.Other6} {
		n.seen.Forget()
		udp := slices.Repeat([][]byte{vxlan}, times)
		if err := n.plain.SendUDP(at(to, 4789), udp...); err != nil {
			t.Error(err)
		}
		n.seen.Await(t, times, "VXLAN to "+to.String(), func(p lab.Packet) bool { return p.Dst == at(to, 4789) })
		// As one packet, or as one packet for each datagram.
		if err := n.plain.SendSegments(nil, at(to, 8472), udp...); err != nil {
			t.Error(err)
		}
		n.seen.Await(t, 1, "VXLAN in segments to "+to.String(), func(p lab.Packet) bool { return p.Dst == at(to, 8472) })
		for proto, header := range map[uint8][]byte{unix.IPPROTO_GRE: binary.BigEndian.AppendUint16([]byte{0, 0}, unix.ETH_P_IP), unix.IPPROTO_IPIP: nil} {
			outer := lab.Header{Src: own[to.Is6()], Dst: to, Proto: proto}
			if err := n.plain.Send("raw IP", lab.Link{}, slices.Repeat([][]byte{outer.Packet(append(header, inner...))}, times)...); err != nil {
				t.Error(err)
			}
			n.seen.Await(t, times, "IP of a tunnel to "+to.String(), func(p lab.Packet) bool { return p.Dst.Addr() == to && p.Proto == proto })
		}
	}
}
