package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

const (
	ok      = syscall.Errno(0)
	refused = unix.ECONNREFUSED
	denied  = unix.EPERM

	ipv6Freebind  = 78 // include/uapi/linux/in6.h
	protoUDPLite  = 136
	protoESP      = 50
	lsrr          = 131
	segmentRoute  = 4
	paddingOption = 1
)

// attempt is one way of sending to the metadata service, or as it.
type attempt struct {
	name string
	do   func(*container) lab.Result
	// What happens with the filter.
	errno                        syscall.Errno
	connects, packets, malformed uint64
}

// attempts returns all attempts.
func attempts() []attempt {
	var all []attempt
	add := func(name string, errno syscall.Errno, connects, packets, malformed uint64, do func(*container) lab.Result) {
		all = append(all, attempt{name, do, errno, connects, packets, malformed})
	}
	for _, to := range []netip.Addr{lab.Metadata4, lab.Metadata6, lab.Mapped(lab.Metadata4), lab.NAT64} {
		family, in := lab.Family(to), " to "+to.String()
		add("TCP"+in, refused, 1, 0, 0, func(c *container) lab.Result { return c.Connect(at(to, 80)) })
		add("MPTCP"+in, refused, 1, 0, 0, func(c *container) lab.Result {
			s := c.Socket(family, unix.SOCK_STREAM, unix.IPPROTO_MPTCP)
			defer s.Close()
			return s.Connect(at(to, 80))
		})
		add("TCP fast open"+in, refused, 1, 0, 0, func(c *container) lab.Result {
			s := c.Socket(family, unix.SOCK_STREAM, 0)
			defer s.Close()
			return s.SendFlags([]byte("GET /"), at(to, 80), unix.MSG_FASTOPEN)
		})
		add("connected UDP"+in, refused, 1, 0, 0, func(c *container) lab.Result {
			s := c.Socket(family, unix.SOCK_DGRAM, 0)
			defer s.Close()
			if r := s.Connect(at(to, 80)); r.Errno != ok {
				return r
			}
			return s.Send([]byte("hello"), netip.AddrPort{})
		})
		add("unconnected UDP"+in, refused, 1, 0, 0, func(c *container) lab.Result {
			s := c.Socket(family, unix.SOCK_DGRAM, 0)
			defer s.Close()
			return s.Send([]byte("hello"), at(to, 80))
		})
	}
	for _, to := range []netip.Addr{lab.Metadata4, lab.Metadata6, lab.NAT64} {
		in := " to " + to.String()
		add("echo from a raw socket"+in, denied, 0, 1, 0, func(c *container) lab.Result { return c.echo(unix.SOCK_RAW, to) })
		pingErrno := denied
		if to.Is6() {
			pingErrno = ok // the kernel's ping_v6_sendmsg does not tell
		}
		add("echo from a ping socket"+in, pingErrno, 0, 1, 0, func(c *container) lab.Result { return c.echo(unix.SOCK_DGRAM, to) })
		for _, payload := range []struct {
			kind  string
			proto uint8
			bytes []byte
		}{
			{"UDP", unix.IPPROTO_UDP, lab.UDP(1024, 80, 8)},
			{"SYN", unix.IPPROTO_TCP, lab.TCP(1024, 80, 1, 0x02)},
			{"ACK", unix.IPPROTO_TCP, lab.TCP(1024, 80, 1, 0x10)},
			{"mail SYN", unix.IPPROTO_TCP, lab.TCP(1024, 25, 1, 0x02)},
			{"UDP-Lite", protoUDPLite, lab.UDP(1024, 80, 8)},
			{"SCTP", unix.IPPROTO_SCTP, lab.UDP(1024, 80, 8)},
			{"ESP", protoESP, make([]byte, 16)},
		} {
			add("raw "+payload.kind+in, denied, 0, 1, 0, func(c *container) lab.Result {
				return c.Raw(lab.Header{Src: c.addr(to), Dst: to, Proto: payload.proto}.Packet(payload.bytes), to)
			})
		}
		add("fragments of UDP"+in, denied, 0, 2, 0, func(c *container) lab.Result {
			return c.fragments(to, unix.IPPROTO_UDP, lab.UDP(1024, 80, 24), 16)
		})
		add("fragments of TCP"+in, denied, 0, 2, 0, func(c *container) lab.Result {
			return c.fragments(to, unix.IPPROTO_TCP, append(lab.TCP(1024, 80, 1, 0x02), make([]byte, 20)...), 24)
		})
	}
	for _, to := range []netip.Addr{lab.Other4, lab.Other6} {
		in := " to " + to.String()
		from := lab.Metadata4
		if to.Is6() {
			from = lab.Metadata6
		}
		add("as "+from.String()+in, denied, 0, 1, 0, func(c *container) lab.Result {
			return c.Raw(lab.Header{Src: from, Dst: to, Proto: unix.IPPROTO_UDP}.Packet(lab.UDP(80, 1024, 8)), to)
		})
		// The second fragment overwrites the ports and flags of the first.
		add("a TCP header in two fragments"+in, denied, 0, 0, 2, func(c *container) lab.Result {
			return c.fragments(to, unix.IPPROTO_TCP, append(lab.TCP(1024, 25, 1, 0x02), make([]byte, 20)...), 16)
		})
	}
	add("as "+lab.Metadata6.String()+" without privilege", denied, 0, 1, 0, func(c *container) lab.Result {
		s := c.Socket(unix.AF_INET6, unix.SOCK_DGRAM, 0)
		defer s.Close()
		s.Set(unix.IPPROTO_IPV6, ipv6Freebind, 1, nil)
		if r := s.Bind(at(lab.Metadata6, 0)); r.Errno != ok {
			return r
		}
		return s.Send([]byte("hello"), at(lab.Other6, 80))
	})
	add("a source route of a socket", refused, 1, 0, 0, func(c *container) lab.Result {
		s := c.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		defer s.Close()
		s.Set(unix.IPPROTO_IP, unix.IP_OPTIONS, 0, sourceRoute(lab.Gateway4))
		return s.Send([]byte("hello"), at(lab.Metadata4, 80))
	})
	add("a source route of a raw socket", denied, 0, 0, 1, func(c *container) lab.Result {
		h := lab.Header{Src: c.IPv4, Dst: lab.Gateway4, Proto: unix.IPPROTO_UDP, Options: sourceRoute(lab.Metadata4)}
		return c.Raw(h.Packet(lab.UDP(1024, 80, 8)), lab.Gateway4)
	})
	add("a segment route", denied, 0, 0, 1, func(c *container) lab.Result {
		// RFC 8754: the list of segments begins with the last one.
		route := slices.Concat([]byte{unix.IPPROTO_UDP, 4, segmentRoute, 1, 1, 0, 0, 0},
			lab.Metadata6.AsSlice(), lab.Gateway6.AsSlice())
		h := lab.Header{Src: c.IPv6, Dst: lab.Gateway6, Proto: unix.IPPROTO_ROUTING}
		return c.Raw(h.Packet(append(route, lab.UDP(1024, 80, 8)...)), lab.Gateway6)
	})
	return all
}

// sourceRoute returns an IPv4 option (RFC 791).
func sourceRoute(via netip.Addr) []byte {
	return append([]byte{lsrr, 7, 4}, append(via.AsSlice(), paddingOption)...)
}

// addr returns the container's address in the family of another one.
func (c *container) addr(to netip.Addr) netip.Addr {
	if to.Is4() {
		return c.IPv4
	}
	return c.IPv6
}

// echo sends an echo request from a socket of the type.
func (c *container) echo(typ int, to netip.Addr) lab.Result {
	icmp := unix.IPPROTO_ICMP
	if to.Is6() {
		icmp = unix.IPPROTO_ICMPV6
	}
	s := c.Socket(lab.Family(to), typ, icmp)
	defer s.Close()
	return s.Send(lab.Echo(to.Is6()), at(to, 0))
}

var fragmentID uint16

// fragments sends a packet in two fragments, the first with so many bytes of the payload, and
// returns the result of the last fragment that failed.
func (c *container) fragments(to netip.Addr, proto uint8, payload []byte, first int) lab.Result {
	fragmentID++
	h := lab.Header{Src: c.addr(to), Dst: to, Proto: proto, ID: fragmentID, More: true}
	r := c.Raw(h.Packet(payload[:first]), to)
	h.Offset, h.More = first, false
	if last := c.Raw(h.Packet(payload[first:]), to); last.Errno != ok {
		r = last
	}
	return r
}

func TestMetadataIsOutOfReach(t *testing.T) {
	s := newScene(t)
	outside := s.Host.Agent(t, lab.Cgroup(t))
	seen := s.Capture(t)
	for _, a := range attempts() {
		seen.Forget()
		if r := a.do(s.a); r.Errno != ok {
			t.Errorf("without the filter, %s: %v", a.name, r.Errno)
		}
		if len(seen.Settle(t)) == 0 {
			t.Errorf("without the filter, %s: nothing arrived", a.name)
		}
	}

	s.attach()
	seen.Settle(t)
	seen.Forget()
	before := s.row(s.b)
	var slowest time.Duration
	for _, a := range attempts() {
		r := a.do(s.b)
		if r.Errno != a.errno {
			t.Errorf("%s: %v, want %v", a.name, r.Errno, a.errno)
		}
		promptly(t, a.name, r.Elapsed)
		slowest = max(slowest, r.Elapsed)
		if arrived := seen.Settle(t); len(arrived) > 0 {
			t.Errorf("%s: arrived: %v", a.name, arrived)
			seen.Forget()
		}
		row := s.row(s.b)
		connects := row.Blocked.Connects - before.Blocked.Connects
		packets := row.Blocked.Packets - before.Blocked.Packets
		malformed := row.Malformed.Packets - before.Malformed.Packets
		if connects != a.connects || packets != a.packets || malformed != a.malformed {
			t.Errorf("%s: counted %d connects, %d packets, %d malformed, want %d, %d, %d",
				a.name, connects, packets, malformed, a.connects, a.packets, a.malformed)
		}
		before = row
	}
	t.Logf("the slowest refusal took %v", slowest)
	if r := outside.Connect(at(lab.Metadata4, 80)); r.Errno != ok {
		t.Errorf("from outside of the policed cgroup: %v", r.Errno)
	}
}

// On some clouds the metadata service is on the containers' own link.
func TestLinkLocalMetadataIsOutOfReach(t *testing.T) {
	s := newScene(t)
	seen := s.CaptureBridge(t)
	to := at(lab.MetadataLocal, 80)
	if r := s.a.Connect(to); r.Errno != ok || len(seen.Settle(t)) == 0 {
		t.Fatalf("without the filter: %v", r.Errno)
	}
	s.attach()
	seen.Settle(t)
	seen.Forget()
	if r := s.b.Connect(to); r.Errno != refused {
		t.Errorf("TCP: %v, want ECONNREFUSED", r.Errno)
	}
	if r := s.b.echo(unix.SOCK_RAW, lab.MetadataLocal); r.Errno != denied {
		t.Errorf("echo: %v, want EPERM", r.Errno)
	}
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("arrived: %v", arrived)
	}
}

func TestAuditLetsEverythingArriveAndCounts(t *testing.T) {
	s := newScene(t)
	s.attach("--mode", "audit", "--smtp-burst", "1")
	seen := s.Capture(t)
	for _, a := range attempts() {
		before := s.row(s.a)
		seen.Forget()
		if r := a.do(s.a); r.Errno != ok {
			t.Errorf("%s: %v", a.name, r.Errno)
		}
		if len(seen.Settle(t)) == 0 {
			t.Errorf("%s: nothing arrived", a.name)
		}
		row := s.row(s.a)
		// An attempt that is not refused also sends packets, and each datagram of a connected
		// socket to a v4-mapped address passes the socket hook again.
		dropped := row.Blocked.Packets - before.Blocked.Packets + row.Malformed.Packets - before.Malformed.Packets
		if connects := row.Blocked.Connects - before.Blocked.Connects; connects < a.connects || dropped == 0 {
			t.Errorf("%s: counted %d connects and %d packets, want at least %d and 1", a.name, connects, dropped, a.connects)
		}
	}
	seen.Forget()
	s.b.ConnectAtOnce(at(lab.Mail4, 25), 10)
	if n := connections(seen.Settle(t), 25, s.b.IPv4); n != 10 {
		t.Errorf("%d of 10 mail connections arrived", n)
	}
	s.expectMail(s.b, 1, 9)
}

// Conntrack in a container's namespace reassembles fragments before they are judged, into a
// packet that is not contiguous in memory: the part that programs can read directly has
// only as much of the TCP header as the first fragment.
func TestReassembledFragments(t *testing.T) {
	s := newScene(t)
	firsts := []int{8, 16, 24, 1440}
	const mails = 6
	s.attach("--smtp-rate", scarce, "--smtp-burst", fmt.Sprint(mails))
	s.a.NFT(t, "table inet track { chain output { type filter hook output priority 0; ct state new accept; }; }")
	seen := s.Capture(t)
	datagram := lab.UDP(1024, 80, 1440)
	stream := append(lab.TCP(1024, 80, 1, 0x10), make([]byte, 1440)...)
	mail := append(lab.TCP(1024, 25, 1, 0x02), make([]byte, 1440)...)
	// As without conntrack, if conntrack leaves it alone (RFC 8200, 4.5).
	incomplete := func(to netip.Addr, proto uint8, first int) bool {
		return to.Is6() && proto == unix.IPPROTO_TCP && first < 20
	}
	var blocked uint64
	for _, first := range firsts {
		for _, send := range []struct {
			to      netip.Addr
			proto   uint8
			payload []byte
			errno   syscall.Errno
		}{
			{lab.Metadata4, unix.IPPROTO_UDP, datagram, denied},
			{lab.Metadata6, unix.IPPROTO_UDP, datagram, denied},
			{lab.Metadata4, unix.IPPROTO_TCP, stream, denied},
			{lab.Metadata6, unix.IPPROTO_TCP, stream, denied},
			{lab.Other4, unix.IPPROTO_UDP, datagram, ok},
			{lab.Other6, unix.IPPROTO_UDP, datagram, ok},
			{lab.Other4, unix.IPPROTO_TCP, stream, ok},
			{lab.Other6, unix.IPPROTO_TCP, stream, ok},
			{lab.Mail4, unix.IPPROTO_TCP, mail, ok},
			{lab.Mail6, unix.IPPROTO_TCP, mail, ok},
		} {
			if incomplete(send.to, send.proto, first) {
				continue
			}
			seen.Forget()
			name := fmt.Sprintf("protocol %d to %s, cut at %d", send.proto, send.to, first)
			if r := s.a.fragments(send.to, send.proto, send.payload, first); r.Errno != send.errno {
				t.Errorf("%s: %v, want %v", name, r.Errno, send.errno)
			}
			// The container's kernel fragments the packet in the same way again, and the
			// host judges the fragments.
			want := send.errno == ok && (send.proto != unix.IPPROTO_TCP || first >= 20)
			if arrived := len(seen.Settle(t)) > 0; arrived != want {
				t.Errorf("%s: arrived: %v", name, arrived)
			}
			if send.errno != ok {
				blocked++
			}
		}
	}
	// Each packet counts once, since it was reassembled.
	if row := s.row(s.a); row.Blocked.Packets != blocked || row.Malformed.Packets != 0 {
		t.Errorf("counted %+v, malformed %+v, want %d packets and none", row.Blocked, row.Malformed, blocked)
	}
	s.expectMail(s.a, mails, 0)
	seen.Forget()
	for _, first := range firsts {
		for _, to := range []netip.Addr{lab.Mail4, lab.Mail6} {
			if incomplete(to, unix.IPPROTO_TCP, first) {
				continue
			}
			if r := s.a.fragments(to, unix.IPPROTO_TCP, mail, first); r.Errno != denied {
				t.Errorf("SYN to %s over the limit, cut at %d: %v, want EPERM", to, first, r.Errno)
			}
		}
	}
	if arrived := seen.Settle(t); len(arrived) > 0 {
		t.Errorf("over the limit, arrived: %v", arrived)
	}
	s.expectMail(s.a, mails, mails)
}
