package e2e

import (
	"fmt"
	"hash/crc32"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// deliver transfers mails at once; each must arrive.
func (s *scene) deliver(c *container, to netip.AddrPort, n, bytes int) {
	s.t.Helper()
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			if sent, received := c.Transfer(to, bytes); received != sent.String() || sent.Bytes != int64(bytes) {
				s.t.Errorf("to %s: sent %s, received %s", to, sent, received)
			}
		})
	}
	all.Wait()
}

// Mail that has tokens gets through, whatever is lost on the way. These clients speak first: if
// their first words are lost, that costs one more token.
func TestMailOverALossyPath(t *testing.T) {
	const lossy = "numgen random mod 100 < 20 drop"
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		for _, where := range []string{"behind the host", "before the host", "back"} {
			for _, cookies := range []bool{false, true} {
				if cookies && where != "back" {
					// Such a server resets a connection if the second segment arrives
					// before the first.
					continue
				}
				t.Run(fmt.Sprintf("%s, lossy %s, SYN cookies %v", mail, where, cookies), func(t *testing.T) {
					s := newScene(t)
					lab.HurrySYNs(t, s.policed)
					s.cookies(cookies)
					const tokens = 10 * burst
					s.attach("--smtp-rate", scarce, "--smtp-burst", fmt.Sprint(tokens))
					chain := map[string]string{
						"behind the host": "table inet t { chain c { type filter hook forward priority 0; tcp dport 25 " + lossy + "; }; }",
						"before the host": "table netdev t { chain c { type filter hook ingress device " + s.a.Port +
							" priority 0; tcp dport 25 " + lossy + "; }; }",
						"back": "table inet t { chain c { type filter hook forward priority 0; tcp sport 25 " + lossy + "; }; }",
					}
					s.Host.NFT(t, chain[where])
					s.deliver(s.a, at(mail, 25), burst, 20_000)
					if got := s.row(s.a).SMTP.SMTP; got.Allowed < burst || got.Allowed == tokens || got.RateLimited > 0 {
						s.t.Errorf("counted %+v, want %d and some repeats", got, burst)
					}
				})
			}
		}
	}
}

// A connection costs one token, however much it carries. If the path MTU turns out to be
// smaller, a client that speaks first sends its first words twice, and pays for that.
func TestLongMail(t *testing.T) {
	s := newScene(t)
	s.attach("--smtp-rate", scarce, "--smtp-burst", fmt.Sprint(2*burst))
	want := uint64(0)
	for i, to := range []netip.Addr{lab.Mail4, lab.Mail6, lab.Mapped(lab.Mail4), lab.Narrow4, lab.Narrow6} {
		s.cookies(i%2 == 0)
		s.deliver(s.a, at(to, 25), 1, 8<<20)
		want++
		if to == lab.Narrow4 || to == lab.Narrow6 {
			want++
		}
		s.expectMail(s.a, want, 0)
	}
}

// converse sends a line, ends the connection and expects the server's receipt.
func converse(t *testing.T, sock *lab.Socket, sent string) {
	t.Helper()
	want := lab.Receipt{Bytes: int64(len(sent)), CRC: crc32.ChecksumIEEE([]byte(sent))}.String()
	if r := sock.Shutdown(); r.Errno != ok {
		t.Errorf("shut down: %v", r.Errno)
	}
	if r := sock.Receive(); r.Errno != ok || string(r.Data) != want {
		t.Errorf("received %q, %v, want %q", r.Data, r.Errno, want)
	}
}

func TestKindsOfMailSockets(t *testing.T) {
	const line = "QUIT\r\n"
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6, lab.Mapped(lab.Mail4)} {
		for _, cookies := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, SYN cookies %v", mail, cookies), func(t *testing.T) {
				s := newScene(t)
				s.cookies(cookies)
				const clientAndServer = "3"
				s.Server.Sysctl(t, "ipv4/tcp_fastopen", clientAndServer)
				s.attach("--smtp-rate", scarce, "--smtp-burst", "6")
				seen := s.Capture(t)
				n := uint64(0)
				for _, proto := range []int{0, unix.IPPROTO_MPTCP} {
					sock := s.a.Socket(lab.Family(mail), unix.SOCK_STREAM, proto)
					if r := sock.Connect(at(mail, 25)); r.Errno != ok {
						t.Error(r.Errno)
					}
					sock.Send([]byte(line), netip.AddrPort{})
					converse(t, sock, line)
					sock.Close()
					n++
					s.expectMail(s.a, n, 0)
				}
				// The first connection asks for a fast open cookie; the others have it.
				for range 4 {
					sock := s.a.Socket(lab.Family(mail), unix.SOCK_STREAM, 0)
					if r := sock.SendFlags([]byte(line), at(mail, 25), unix.MSG_FASTOPEN); r.Errno != ok {
						t.Error(r.Errno)
					}
					converse(t, sock, line)
					sock.Close()
					n++
					s.expectMail(s.a, n, 0)
				}
				if got := connections(seen.Settle(t), 25, netip.Addr{}); uint64(got) != n {
					t.Errorf("%d connections arrived, want %d", got, n)
				}
			})
		}
	}
}

// Connections from before the filter was attached go on, if need be one after the other.
func TestMailConnectedBeforeAttach(t *testing.T) {
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		t.Run(mail.String(), func(t *testing.T) {
			s := newScene(t)
			const line = "QUIT\r\n"
			var before []*lab.Socket
			for range 3 * burst {
				sock := s.a.Socket(lab.Family(mail), unix.SOCK_STREAM, 0)
				if r := sock.Connect(at(mail, 25)); r.Errno != ok {
					t.Fatal(r.Errno)
				}
				before = append(before, sock)
			}
			s.attach("--smtp-rate", "5/second", "--smtp-burst", fmt.Sprint(burst))
			for _, sock := range before {
				if r := sock.Send([]byte(line), netip.AddrPort{}); r.Errno != ok {
					t.Errorf("send: %v", r.Errno)
				}
			}
			for _, sock := range before {
				converse(t, sock, line)
			}
		})
	}
}

// A connection that was paid for goes on under another policy, in another process and
// without its cgroup.
func TestMailConnectionGoesOn(t *testing.T) {
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		t.Run(mail.String(), func(t *testing.T) {
			s := newScene(t)
			flags := []string{"--smtp-rate", scarce, "--smtp-burst", "3"}
			s.attach(flags...)
			c := s.container("c")
			var socks []*lab.Socket
			for range 3 {
				sock := c.Socket(lab.Family(mail), unix.SOCK_STREAM, 0)
				if r := sock.Connect(at(mail, 25)); r.Errno != ok {
					t.Fatal(r.Errno)
				}
				socks = append(socks, sock)
			}
			text := ""
			send := func(line string) {
				t.Helper()
				text += line
				for _, sock := range socks {
					if r := sock.Send([]byte(line), netip.AddrPort{}); r.Errno != ok {
						t.Errorf("send: %v", r.Errno)
					}
				}
			}
			send("EHLO\r\n")
			s.attach(append(flags, "--preset", "aws")...)
			send("MAIL\r\n")
			socks[0] = socks[0].Give(s.b.Agent)
			send("RCPT\r\n")
			s.expectMail(c, 3, 0)
			c.Enter(lab.Cgroup(t))
			if err := unix.Rmdir(c.cgroup); err != nil {
				t.Fatal(err)
			}
			send("DATA\r\n")
			s.attach(flags...)
			send("QUIT\r\n")
			for _, sock := range socks {
				converse(t, sock, text)
			}
			if total := s.Stats(t).Total.SMTP; total.Allowed != 3 || total.RateLimited != 0 {
				t.Errorf("counted %+v, want 3 allowed", total)
			}
		})
	}
}

// A mail server in a container answers clients for free, and pays for the mail that it relays.
func TestMailServerInAContainer(t *testing.T) {
	s := newScene(t)
	s.attach("--smtp-rate", scarce, "--smtp-burst", fmt.Sprint(burst))
	s.a.Serve(25, netip.AddrPort{})
	clients := map[string]*lab.Netns{"outside": s.Server, "the host": s.Host}
	for name, client := range clients {
		for _, own := range []netip.Addr{s.a.IPv4, s.a.IPv6} {
			for range 2 * burst {
				if sent, received := client.Transfer(t, at(own, 25), 100_000); received != sent.String() {
					t.Errorf("from %s to %s: sent %s, received %s", name, own, sent, received)
				}
			}
		}
	}
	s.expectMail(s.a, 0, 0)
	// Another container pays for its connection to this server.
	s.deliver(s.b, at(s.a.IPv4, 25), burst, 100_000)
	s.expectMail(s.b, burst, 0)
	s.expectMail(s.a, 0, 0)

	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		relay := s.container("relay " + mail.String())
		relay.Serve(25, at(mail, 25))
		for range burst {
			if sent, received := s.Server.Transfer(t, at(relay.addr(mail), 25), 100_000); received != sent.String() {
				t.Errorf("by the relay: sent %s, received %s", sent, received)
			}
		}
		s.expectMail(relay, burst, 0)
		if n := s.accepted(relay, mail); n != burst {
			t.Errorf("%d connections of the relay were accepted, want %d", n, burst)
		}
	}
}
