package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egressbpf/egressbpf/internal/test/e2e/lab"
)

// greeter is a mail server that speaks first.
type greeter struct {
	mu   sync.Mutex
	from map[netip.Addr]int
}

const greeterPort = 26

// greets starts a server that accepts connections at greeterPort, also from their SYN on, does
// something with each, and then ends it.
func (s *scene) greets(do func(net.Conn)) *greeter {
	s.t.Helper()
	g := &greeter{from: map[netip.Addr]int{}}
	var l net.Listener
	var err error
	config := net.ListenConfig{
		Control: func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 1000) })
		},
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 3},
	}
	s.Server.Do(func() { l, err = config.Listen(s.t.Context(), "tcp", fmt.Sprintf("[::]:%d", greeterPort)) })
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			g.mu.Lock()
			g.from[c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()]++
			g.mu.Unlock()
			go func() {
				defer c.Close()
				do(c)
			}()
		}
	}()
	return g
}

// accepted returns how many connections of a container the server has accepted.
func (g *greeter) accepted(s *scene, c *container, mail netip.Addr) int {
	s.t.Helper()
	s.Capture(s.t).Settle(s.t)
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.from[c.addr(mail)]
}

// policedAt26 attaches the filter with greeterPort as a mail port.
func (s *scene) policedAt26(flags ...string) {
	s.t.Helper()
	s.attach(append([]string{"--smtp-ports", fmt.Sprint("25,465,587,", greeterPort), "--smtp-burst", fmt.Sprint(burst)}, flags...)...)
}

// A server with SYN cookies or TCP fast open that has forgotten a connection accepts it
// again when the socket repeats its first data. It takes no capability to keep the socket
// from hearing the server.
func TestDeafSocketsPay(t *testing.T) {
	for _, by := range []lab.Deafness{lab.DeafByHops, lab.DeafByDevice, lab.DeafFromSYN} {
		for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
			t.Run(fmt.Sprintf("%s, %s", by, mail), func(t *testing.T) {
				s := newScene(t)
				s.Slow(t, 30*time.Millisecond)
				if by == lab.DeafFromSYN {
					s.openFast()
				} else {
					s.cookies(true)
				}
				g := s.greets(func(c net.Conn) {
					if by == lab.DeafByHops {
						fmt.Fprint(c, "554 no\r\n")
						return
					}
					fmt.Fprint(c, "220 mail.example ESMTP\r\n")
					_, _ = io.Copy(io.Discard, c)
				})
				r := lab.Repeats{To: at(mail, greeterPort), Sockets: burst + 3, By: by, For: 5 * time.Second}
				r.Own = at(s.b.addr(mail), 2001)
				s.b.Repeat(r)
				if n := g.accepted(s, s.b, mail); n <= r.Sockets {
					t.Errorf("without the filter %d connections were accepted of %d sockets, want more", n, r.Sockets)
				}
				s.policedAt26("--smtp-rate", scarce)
				r.Own = at(s.a.addr(mail), 2001)
				s.a.Repeat(r)
				if n := g.accepted(s, s.a, mail); n > burst || n == 0 {
					t.Errorf("%d connections were accepted, want at most %d", n, burst)
				}
			})
		}
	}
}

// TCP segments that the container's own firewall makes behind the filter open no more
// connections than are paid for either.
func TestInjectedSegmentsPay(t *testing.T) {
	const rounds = 10
	for _, how := range []lab.Injection{lab.InjectOverlapping, lab.InjectAcknowledgements} {
		for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
			t.Run(fmt.Sprintf("%s, %s", how, mail), func(t *testing.T) {
				s := newScene(t)
				seen := s.Capture(t)
				s.cookies(how == lab.InjectAcknowledgements)
				undisguise := fmt.Sprintf("ip protocol %d ip protocol set 6;", lab.Disguise)
				if mail.Is6() {
					undisguise = fmt.Sprintf("ip6 nexthdr %d ip6 nexthdr set 6;", lab.Disguise)
				}
				for _, c := range []*container{s.a, s.b} {
					c.NFT(t, "table netdev t { chain out { type filter hook egress device eth0 priority 0; tcp dport 25 drop; "+undisguise+" }; }")
				}
				s.b.Inject(how, at(s.b.addr(mail), 2001), at(mail, 25), rounds)
				seen.Settle(t)
				if n := s.accepted(s.b, mail); n < rounds {
					t.Errorf("without the filter %d connections were accepted, want at least %d", n, rounds)
				}
				s.attach("--smtp-rate", scarce, "--smtp-burst", fmt.Sprint(burst))
				s.a.Inject(how, at(s.a.addr(mail), 2001), at(mail, 25), rounds)
				seen.Settle(t)
				if n := s.accepted(s.a, mail); n > burst || n == 0 {
					t.Errorf("%d connections were accepted, want at most %d", n, burst)
				}
			})
		}
	}
}

// A client that has sent no data stays connected while the server sends keepalive probes,
// and while the server sends a long greeting. Neither costs a token.
func TestSilentClients(t *testing.T) {
	for _, mail := range []netip.Addr{lab.Mail4, lab.Mail6} {
		t.Run(mail.String(), func(t *testing.T) {
			s := newScene(t)
			const lines, probes = 400, 8
			gone := make(chan error, 1)
			g := s.greets(func(c net.Conn) {
				for range lines {
					fmt.Fprint(c, "220-hello, wait a little\r\n")
					time.Sleep(5 * time.Millisecond)
				}
				fmt.Fprint(c, "220 go on\r\n")
				_ = c.SetReadDeadline(time.Now().Add(probes * time.Second))
				_, err := c.Read(make([]byte, 1))
				gone <- err
			})
			s.policedAt26("--smtp-rate", scarce)
			sock := s.a.Socket(lab.Family(mail), unix.SOCK_STREAM, 0)
			if r := sock.Connect(at(mail, greeterPort)); r.Errno != ok {
				t.Fatal(r.Errno)
			}
			var heard strings.Builder
			for !strings.Contains(heard.String(), "220 go on") {
				r := sock.Receive()
				if r.Errno != ok || len(r.Data) == 0 {
					t.Fatalf("after %d bytes: %v", heard.Len(), r.Errno)
				}
				heard.Write(r.Data)
			}
			if err := <-gone; err == nil || !strings.Contains(err.Error(), "timeout") {
				t.Errorf("the server gave the client up: %v", err)
			}
			if n := g.accepted(s, s.a, mail); n != 1 {
				t.Errorf("%d connections were accepted", n)
			}
			if got := s.row(s.a).SMTP.SMTP; got.Allowed != 1 || got.RateLimited != 0 {
				t.Errorf("counted %+v, want one token", got)
			}
		})
	}
}
